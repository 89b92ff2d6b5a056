"""The shapes that decode attention is compiled, tested and timed at."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.decode_attention.api import cache_shape
from pallas_kernels.heads import GEMMA_2B, LLAMA_8B, LLAMA_70B, PAPER_67M, SMOLLM2

EMPTY = 2**30  # position of a ring's slot that holds nothing


@dataclasses.dataclass(frozen=True)
class Spec:
    """One call."""

    name: str
    batch: int = 64
    tokens: int = 5
    kv_heads: int = 8
    q_per_kv: int = 4
    head_dim: int = 128
    slots: int = 8192
    window: int | None = None
    sink: int = 0
    ring: bool = False  # sink + window slots and some, whose positions are given
    include_self: bool = True
    dtype: str = "bfloat16"

    @property
    def options(self) -> dict[str, Any]:
        """The static arguments of `decode_attention`."""
        return {
            "window": self.window, "sink": self.sink, "include_self": self.include_self,
            "scale": self.head_dim**-0.5,
        }  # fmt: skip

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The arrays of `decode_attention`, in its order."""
        heads = self.kv_heads, self.q_per_kv, self.head_dim
        cache = self.batch, *cache_shape(self.slots, self.kv_heads, self.head_dim)
        rows = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        arrays = [
            jax.ShapeDtypeStruct((self.batch, self.tokens, *heads), self.dtype),
            *[jax.ShapeDtypeStruct(cache, self.dtype)] * 2,
            rows,
            rows,
        ]
        if self.ring:
            arrays.append(jax.ShapeDtypeStruct(cache[:2], jnp.int32))
        return tuple(arrays)

    def arrays(
        self, key: jax.Array, lengths: Int[np.ndarray, " B"], slots: int = 0, width: int = 0
    ) -> tuple[Array, ...]:
        """Random values for these shapes, on a text of `lengths` tokens in each row.

        A ring holds each row's newest tokens, and its sinks. `slots` and `width` of the cache are
        as in `shapes` unless given.
        """
        q, k, _, *_ = self.shapes
        cache = self.batch, slots or k.shape[1], width or k.shape[2]
        keys = jax.random.split(key, 3)
        values = [
            jax.random.normal(key, shape, jnp.float32).astype(self.dtype)
            for key, shape in zip(keys, (q.shape, cache, cache), strict=True)
        ]
        text = jnp.asarray(lengths, jnp.int32)
        if not self.ring:
            return *values, text, text - self.tokens
        ring = self.slots - self.sink
        slot = np.arange(cache[1])[None]
        last = np.asarray(lengths)[:, None] - 1
        held = np.where(slot < self.sink, slot, last - (last - slot) % ring)
        used = (slot < self.slots) & (held <= last) & ((slot < self.sink) | (held >= self.sink))
        live = jnp.minimum(text, self.slots)
        positions = jnp.asarray(np.where(used, held, EMPTY), jnp.int32)
        return *values, live, text - self.tokens, positions


PRODUCTION = (
    Spec("llama 8B, verify k=4, 2k", slots=2048, **LLAMA_8B),
    Spec("llama 8B, verify k=4, 8k", slots=8192, **LLAMA_8B),
    Spec("llama 8B, verify k=4, 32k", slots=32768, **LLAMA_8B),
    Spec("llama 8B, verify k=8, 8k", tokens=9, slots=8192, **LLAMA_8B),
    Spec("llama 8B, verify k=15, 8k", tokens=16, slots=8192, **LLAMA_8B),
    Spec("llama 8B, one token, 2k", tokens=1, slots=2048, **LLAMA_8B),
    Spec("llama 8B, one token, 8k", tokens=1, slots=8192, **LLAMA_8B),
    Spec("llama 8B, one token, 32k", tokens=1, slots=32768, **LLAMA_8B),
    Spec("llama 8B, window 4096 in the cache", window=4096, sink=4, **LLAMA_8B),
    Spec("llama 8B, SPIRe's draft step", tokens=1, slots=69, window=64, sink=1, ring=True,
         include_self=False, **LLAMA_8B),
    Spec("llama 8B, draft step, window 4096", tokens=1, slots=4101, window=4096, sink=1, ring=True,
         include_self=False, **LLAMA_8B),
    Spec("llama 8B, vanilla draft's first step", tokens=2, slots=69, window=64, sink=1, ring=True,
         **LLAMA_8B),
    Spec("llama 70B, verify k=4, 64k", batch=16, slots=65536, **LLAMA_70B),
    Spec("llama 70B, SPIRe's draft step", tokens=1, slots=69, window=64, sink=1, ring=True,
         include_self=False, **LLAMA_70B),
    Spec("paper 67M, verify k=4", slots=1024, **PAPER_67M),
    Spec("paper 67M, verify k=4, float32", slots=1024, dtype="float32", **PAPER_67M),
    Spec("paper 67M, SPIRe's draft step", tokens=1, slots=69, window=64, sink=1, ring=True,
         include_self=False, **PAPER_67M),
    Spec("smollm2 135M, verify k=4", batch=16, slots=4096, **SMOLLM2),
    Spec("smollm2 135M, SPIRe's draft step", batch=16, tokens=1, slots=69, window=64, sink=1,
         ring=True, include_self=False, **SMOLLM2),
    Spec("gemma 2B, verify k=4", slots=8192, **GEMMA_2B),
    Spec("the widest: 16 tokens of 16 heads", slots=2048, tokens=16, kv_heads=16, q_per_kv=16),
    Spec("quickstart's heads of 32", batch=16, slots=1024, kv_heads=4, q_per_kv=1, head_dim=32,
         dtype="float32"),
)  # fmt: skip

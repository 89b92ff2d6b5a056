"""The shapes that streaming attention is compiled, tested and timed at."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from pallas_kernels.heads import GEMMA_2B, LLAMA_8B, LLAMA_70B, PAPER_67M, SMOLLM2


@dataclasses.dataclass(frozen=True)
class Spec:
    """One call: a text's own tokens, or, with `stride`, a rollout's pass from every k-th one."""

    name: str
    batch: int = 4
    keys: int = 2048  # tokens of the text
    stride: int = 0  # k of a rollout; 0: every token is a query
    depth: int = 0  # the pass: queries stand so many tokens after their rollouts' starts
    kv_heads: int = 8
    q_per_kv: int = 4
    head_dim: int = 128
    window: int | None = None
    sink: int = 0
    dtype: str = "bfloat16"

    @property
    def starts(self) -> Int[np.ndarray, " T"]:
        """Where queries' rollouts begin; their own positions without a rollout."""
        return np.arange(0, self.keys - self.depth, self.stride or 1)

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Queries, keys and values."""
        heads = self.kv_heads, self.q_per_kv, self.head_dim
        q = jax.ShapeDtypeStruct((self.batch, len(self.starts), *heads), self.dtype)
        k = jax.ShapeDtypeStruct((self.batch, self.keys, *heads[::2]), self.dtype)
        return q, k, k

    @property
    def positions(self) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " S"]]:
        """Of queries and of keys."""
        return self.starts + self.depth, np.arange(self.keys)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `streaming_attention`."""
        return {
            "window": self.window, "sink": self.sink, "scale": self.head_dim**-0.5,
            "limits": self.starts if self.stride else None,
        }  # fmt: skip

    def arrays(self, key: jax.Array) -> list[jax.Array]:
        """Random values for these shapes."""
        keys = jax.random.split(key, 3)
        return [
            jax.random.normal(key, x.shape, "float32").astype(x.dtype)
            for key, x in zip(keys, self.shapes, strict=True)
        ]


SPIRE: dict[str, Any] = dict(window=64, sink=1)

PRODUCTION = (
    Spec("llama 8B, dense, 2k", **LLAMA_8B),
    Spec("llama 8B, dense, 8k", keys=8192, batch=1, **LLAMA_8B),
    Spec("llama 8B, window 64, 1k", keys=1024, **SPIRE, **LLAMA_8B),
    Spec("llama 8B, window 64, 8k", keys=8192, **SPIRE, **LLAMA_8B),
    Spec("llama 8B, window 64, 64k", keys=65536, batch=1, **SPIRE, **LLAMA_8B),
    Spec("llama 8B, window 4096, 64k", keys=65536, batch=1, window=4096, sink=4, **LLAMA_8B),
    Spec("llama 8B, rollout's first pass, k=4", keys=2048, stride=4, **SPIRE, **LLAMA_8B),
    Spec("llama 8B, rollout's last pass, k=4", keys=2048, stride=4, depth=3, **SPIRE, **LLAMA_8B),
    Spec("llama 70B, window 64, 64k", keys=65536, batch=1, **SPIRE, **LLAMA_70B),
    Spec("paper 67M, dense", keys=1024, batch=32, **PAPER_67M),
    Spec("paper 67M, dense, float32", keys=1024, batch=32, dtype="float32", **PAPER_67M),
    Spec("paper 67M, rollout's pass, k=4", keys=1024, batch=32, stride=4, depth=1, **SPIRE,
         **PAPER_67M),
    Spec("paper 67M, rollout's pass, k=4, float32", keys=1024, batch=32, stride=4, depth=1,
         dtype="float32", **SPIRE, **PAPER_67M),
    Spec("smollm2 135M, dense", **SMOLLM2),
    Spec("smollm2 135M, rollout's pass, k=4", stride=4, **SMOLLM2,
         **SPIRE),
    Spec("gemma 2B, dense", **GEMMA_2B),
    Spec("the widest: 16 heads of 32, float32", q_per_kv=16, head_dim=32, dtype="float32"),
    Spec("the widest: 16 heads of 256, float32", keys=1024, q_per_kv=16, head_dim=256,
         dtype="float32"),
    Spec("lengths that no block divides", keys=1234, **SPIRE, **LLAMA_8B),
)  # fmt: skip

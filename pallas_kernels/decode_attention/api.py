"""Decode attention: a few query tokens per row over a long cache. Checks, and the choice.

Each row has its own length, and what lies beyond it is never used; key blocks wholly beyond it,
or before the window, are not even read.

    tpu        the Pallas kernel of `tpu.py`
    gpu        the Mosaic GPU kernel of `gpu.py`, for Hopper; it has compiled for sm_90a and run
               interpreted, but on no GPU yet, so that nothing chooses it by itself
    interpret  the TPU's kernel, interpreted on a CPU: for tests
    reference  plain jnp, which reads everything and keeps all logits
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import (
    MAX_TOKENS,
    check_implementation,
    check_types,
    check_window,
    unsupported_heads,
)
from pallas_kernels.decode_attention import reference, tpu
from pallas_kernels.platform import cores_per_device, is_tpu

IMPLEMENTATIONS = ("tpu", "gpu", "interpret", "reference")


def unsupported(head_dim: int, q_per_kv: int, tokens: int = 1) -> str:
    """Why the kernels cannot take these sizes; nothing if they can."""
    if reason := unsupported_heads(head_dim, q_per_kv):
        return reason
    if not 1 <= tokens <= MAX_TOKENS:
        return f"{tokens} query tokens per row: the kernel takes 1 to {MAX_TOKENS}"
    return ""


def cache_shape(slots: int, kv_heads: int, head_dim: int) -> tuple[int, int]:
    """Slots and numbers per slot to allocate so that a TPU lays the cache out as the kernel reads.

    Other sizes work, but XLA then prefers another layout and copies the cache at each call.
    """
    return -(-slots // 16) * 16, -(-kv_heads * head_dim // 128) * 128


def decode_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S KH"],
    v: Float[Array, "B S KH"],
    lengths: Int[Array, " B"],
    q_positions: Int[Array, " B"],
    k_positions: Int[Array, "B S"] | None = None,
    *,
    window: int | None = None,
    sink: int = 0,
    include_self: bool = True,
    scale: float = 1.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """Softmax attention of a row's T newest tokens over its cached keys, and its log-sum-exp.

    Forward only: the kernels cannot be differentiated.

    Args:
        q: rotated queries, 1 to 16 tokens per row; G query heads share a KV head.
        k, v: the cache, a slot's heads side by side: head h in k[..., h * H : (h + 1) * H]. Wider
            slots than K * H are allowed, their rest is not used (`cache_shape`).
        lengths: leading slots of each row that hold something, int32, at most S. Their values are
            finite, whether a query sees them or not; keys, and all beyond, may be anything.
        q_positions: position of each row's first query, int32; its others follow it.
        k_positions: position that each slot holds, int32, for a ring cache; slot j holds position
            j unless given. A slot that holds nothing has a position after all queries.
        window: visible positions, the query's own included; None for all earlier ones.
        sink: first positions that stay visible beyond the window.
        include_self: whether a query sees its own position.
        scale: multiplies the logits.
        implementation: one of IMPLEMENTATIONS; by default the kernel on a TPU, elsewhere the
            reference.

    Returns:
        The output in q's type, 0 for a query that sees nothing; its log-sum-exp in float32, -inf
        there.

    Raises:
        ValueError: shapes, types or numbers that are not allowed, and what is.
    """
    implementation = implementation or ("tpu" if is_tpu() else "reference")
    check_implementation(implementation, IMPLEMENTATIONS)
    _check(q, k, v, lengths, q_positions, k_positions, window, sink)
    arguments = q, k, v, lengths, q_positions, k_positions
    options: dict[str, Any] = dict(window=window, sink=sink, include_self=include_self, scale=scale)
    if implementation == "reference":
        width = q.shape[2] * q.shape[4]
        arguments = q, k[..., :width], v[..., :width], *arguments[3:]
        return reference.decode_attention(*arguments, **options)
    if implementation == "gpu":
        from pallas_kernels.decode_attention import gpu  # Mosaic GPU, a quarter of a second

        if reason := gpu.unsupported(q.shape[4], k.shape[1], k.shape[2], str(k.dtype)):
            raise ValueError(reason)
        return gpu.decode_attention(*arguments, **options)
    interpret = implementation == "interpret"
    return tpu.decode_attention(
        *arguments, **options, cores=cores_per_device(), interpret=interpret
    )


def _check(q, k, v, lengths, q_positions, k_positions, window, sink) -> None:
    if q.ndim != 5 or k.ndim != 3 or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"queries {q.shape}, keys {k.shape}, values {v.shape}: expected [B, T, K, G, H] and "
            "twice [B, S, K * H]"
        )
    batch, tokens, kv_heads, group, h = q.shape
    slots, width = k.shape[1:]
    if reason := unsupported(h, group, tokens):
        raise ValueError(reason)
    if width < kv_heads * h or slots == 0 or batch == 0:
        raise ValueError(
            f"a cache of {slots} slots of {width} numbers in {batch} rows: expected at least one "
            f"slot and row, and K * H = {kv_heads * h} numbers"
        )
    check_types(q, k, v)
    check_window(window, sink)
    for name, x, shape in (
        ("lengths", lengths, (batch,)),
        ("q_positions", q_positions, (batch,)),
        ("k_positions", k_positions, (batch, slots)),
    ):
        if x is not None and (x.shape != shape or x.dtype != jnp.int32):
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}: expected int32{list(shape)}")
    if not isinstance(lengths, jax.core.Tracer):
        longest = int(np.max(lengths))
        if longest > slots or int(np.min(lengths)) < 0:
            row = int(np.argmax(lengths)) if longest > slots else int(np.argmin(lengths))
            raise ValueError(
                f"row {row} has length {int(lengths[row])}: expected 0 to {slots} slots"
            )

"""Streaming attention: many queries under a sink and a window. Checks, and the choice.

A block of keys that no query of a block may see is never read, so that time grows with the
length times the window. Positions are known while tracing; the result can be differentiated.

    tpu        the Pallas kernels of `tpu.py`, forward and backward
    interpret  the same kernels, interpreted on a CPU: for tests
    reference  plain jnp, which reads everything and keeps all logits
"""

from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import (
    check_implementation,
    check_types,
    check_window,
    unsupported_heads,
)
from pallas_kernels.platform import is_tpu
from pallas_kernels.streaming_attention import reference, tpu

IMPLEMENTATIONS = ("tpu", "interpret", "reference")


def streaming_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_positions: Int[np.ndarray, " T"],
    k_positions: Int[np.ndarray, " S"],
    *,
    window: int | None = None,
    sink: int = 0,
    limits: Int[np.ndarray, " T"] | None = None,
    scale: float = 1.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """Softmax attention under a sink and window mask, and its log-sum-exp, both differentiable.

    Args:
        q, k, v: rotated queries and keys, and values; G query heads share a KV head. Values are
            finite; keys may be anything where no query sees them.
        q_positions, k_positions: NumPy arrays, the same for all rows; the keys' ascending.
        window: visible positions, the query's own included; None for all earlier ones.
        sink: first positions that stay visible beyond the window.
        limits: per query, the first position that is *not* visible; None for no such limit. A
            rollout's pass from start s sees the target's memories of positions < s.
        scale: multiplies the logits.
        implementation: one of IMPLEMENTATIONS; by default the kernels on a TPU, elsewhere the
            reference.

    Returns:
        The output in q's type, 0 for a query that sees nothing; its log-sum-exp in float32, -inf
        there.

    Raises:
        ValueError: shapes, types or numbers that are not allowed, and what is.
    """
    implementation = implementation or ("tpu" if is_tpu() else "reference")
    check_implementation(implementation, IMPLEMENTATIONS)
    _check(q, k, v, q_positions, k_positions, window, sink, limits)
    arguments = q, k, v, q_positions, k_positions
    options: dict[str, Any] = dict(window=window, sink=sink, limits=limits, scale=scale)
    if implementation == "reference":
        return reference.streaming_attention(*arguments, **options)
    return tpu.streaming_attention(*arguments, **options, interpret=implementation == "interpret")


def _check(q, k, v, q_positions, k_positions, window, sink, limits) -> None:
    heads_agree = q.ndim == 5 and k.ndim == 4 and k.shape == v.shape
    if not heads_agree or (q.shape[0], q.shape[2], q.shape[4]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"queries {q.shape}, keys {k.shape}, values {v.shape}: expected [B, T, K, G, H] and "
            "twice [B, S, K, H]"
        )
    if reason := unsupported_heads(q.shape[4], q.shape[3]):
        raise ValueError(reason)
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"queries {q.shape}, keys {k.shape}: no axis may be empty")
    check_types(q, k, v)
    check_window(window, sink)
    for name, x, length in (
        ("q_positions", q_positions, q.shape[1]),
        ("k_positions", k_positions, k.shape[1]),
        ("limits", limits, q.shape[1]),
    ):
        if x is None:
            continue
        known = isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.signedinteger)
        if not known or x.shape != (length,) or np.any(np.abs(x) >= 2**30):
            raise ValueError(
                f"{name} must be a NumPy array of {length} integers, signed and below 2**30"
            )
    if np.any(np.diff(k_positions) < 0):
        raise ValueError("k_positions must ascend; sort keys and values by position")

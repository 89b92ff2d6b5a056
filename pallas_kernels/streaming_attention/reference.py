"""Streaming attention from its definition, in plain jnp and float32; it reads everything."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def visible(
    q_positions: Int[np.ndarray, " T"],
    k_positions: Int[np.ndarray, " S"],
    *,
    window: int | None = None,
    sink: int = 0,
    limits: Int[np.ndarray, " T"] | None = None,
) -> Bool[np.ndarray, "T S"]:
    """Which keys each query may attend to.

    Those at its own position and before; of them, given a window, the last `window` (its own
    position counted) and those at positions below `sink`; of them, given limits, those at
    positions below the query's limit.
    """
    q_pos, k_pos = q_positions[:, None], k_positions[None]
    allowed = k_pos <= q_pos
    if window is not None:
        allowed = allowed & ((k_pos < sink) | (k_pos > q_pos - window))
    return allowed if limits is None else allowed & (k_pos < limits[:, None])


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
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """Softmax attention over the visible keys, and its log-sum-exp; see `api.py`."""
    allowed = visible(q_positions, k_positions, window=window, sink=sink, limits=limits)
    seen = np.asarray(allowed.any(axis=0))[:, None, None]
    some = np.asarray(allowed.any(axis=1))[:, None, None]
    k, v = (jnp.where(seen, x.astype(jnp.float32), 0.0) for x in (k, v))
    logits = scale * jnp.einsum("BTKGH,BSKH->BTKGS", q.astype(jnp.float32), k)
    logits = jnp.where(allowed[:, None, None], logits, -jnp.inf)
    # Twice `where`, so that the gradient of a query that sees nothing is 0 and not nan.
    logits = jnp.where(some[..., None], logits, 0.0)
    lse = jnp.logaddexp.reduce(logits, axis=-1)
    weight = jnp.where(allowed[:, None, None], jnp.exp(logits - lse[..., None]), 0.0)
    out = jnp.einsum("BTKGS,BSKH->BTKGH", weight, v)
    return out.astype(q.dtype), jnp.where(some, lse, -jnp.inf)

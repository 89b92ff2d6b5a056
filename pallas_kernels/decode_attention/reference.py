"""Decode attention from its definition, in plain jnp and float32; it reads everything."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(
    slots: int,
    tokens: int,
    lengths: Int[Array, " B"],
    q_positions: Int[Array, " B"],
    k_positions: Int[Array, "B S"] | None = None,
    *,
    window: int | None = None,
    sink: int = 0,
    include_self: bool = True,
) -> Bool[Array, "B T S"]:
    """Which of `slots` key slots each of `tokens` queries of a row may attend to.

    The slot must be among the row's first `lengths`; its position at most the query's (less than
    it without `include_self`); and, given a window, within the last `window` positions, the
    query's own included, or among the first `sink`.
    """
    slot = jnp.arange(slots)[None, None]
    k_pos = slot if k_positions is None else k_positions[:, None]
    q_pos = (q_positions[:, None] + jnp.arange(tokens))[..., None]
    allowed = (slot < lengths[:, None, None]) & (k_pos < q_pos + include_self)
    if window is not None:
        allowed &= (k_pos < sink) | (q_pos - k_pos < window)
    return allowed


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
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """Softmax attention over the visible slots, and its log-sum-exp; see `api.py`."""
    batch, tokens, kv_heads, _, h = q.shape
    k, v = (x.astype(jnp.float32).reshape(batch, -1, kv_heads, h) for x in (k, v))
    allowed = visible(
        k.shape[1], tokens, lengths, q_positions, k_positions,
        window=window, sink=sink, include_self=include_self,
    )[:, :, None, None]  # fmt: skip
    seen = jnp.any(allowed, axis=(1, 2, 3))[..., None, None]
    k, v = jnp.where(seen, k, 0.0), jnp.where(seen, v, 0.0)  # nothing leaks from the others
    logits = scale * jnp.einsum("BTKGH,BSKH->BTKGS", q.astype(jnp.float32), k)
    logits = jnp.where(allowed, logits, -jnp.inf)
    lse = jnp.logaddexp.reduce(logits, axis=-1)
    weight = jnp.where(allowed, jnp.exp(logits - lse[..., None]), 0.0)
    return jnp.einsum("BTKGS,BSKH->BTKGH", weight, v).astype(q.dtype), lse

"""Token verification: keep drafted tokens so that the output follows the target exactly.

Leviathan et al. 2023, Chen et al. 2023; method.md section 4.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from spire_jax.sampling import sample, stream


def verify_tokens(
    keys: Key[Array, " B"],
    drafts: Int[Array, "B k"],
    q: Float[Array, "B k V"],
    p: Float[Array, "B k1 V"],
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many drafted tokens each row keeps, and the token that follows them.

    Token d ~ q is kept with probability min(1, p_d / q_d); at the first rejection the next
    token comes from normalize(max(p - q, 0)), after k acceptances from p at depth k + 1.

    Args:
        keys: one key per row for this round; streams "accept" and "next" of it are used.
        drafts: drafted tokens, each sampled from its row of `q`.
        q: the draft's transformed distributions, as they were sampled, float32.
        p: the target's, at the same depths and one beyond (k1 = k + 1), float32.

    Returns:
        Accepted counts in 0 .. k, and next tokens.
    """
    k = drafts.shape[1]
    q_drafted = jnp.take_along_axis(q, drafts[..., None], axis=-1)[..., 0]
    p_drafted = jnp.take_along_axis(p[:, :k], drafts[..., None], axis=-1)[..., 0]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (k,)))(stream(keys, "accept"))
    # u < p/q without the division; u lies in [0, 1), so p = 0 never passes and p = q always does.
    accept = uniform * q_drafted < p_drafted
    accepted = jnp.sum(jnp.cumprod(accept.astype(jnp.int32), axis=1), axis=1)
    # Depth k + 1 has no draft: q = 0 there, so that the residual is p itself.
    q_next = jnp.concatenate([q, jnp.zeros_like(p[:, :1])], axis=1)
    at = accepted[:, None, None]
    p_at = jnp.take_along_axis(p, at, axis=1)[:, 0]
    residual = residual_distribution(p_at, jnp.take_along_axis(q_next, at, axis=1)[:, 0])
    return accepted, sample(stream(keys, "next"), residual)


def residual_distribution(p: Float[Array, "B V"], q: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """normalize(max(p - q, 0)); `p` itself where p and q agree to the last bit."""
    excess = jnp.maximum(p - q, 0.0)
    total = jnp.sum(excess, axis=-1, keepdims=True)
    return jnp.where(total > 0, excess / jnp.where(total > 0, total, 1.0), p)

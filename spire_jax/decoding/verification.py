"""Verification: keep drafted tokens so that the output follows the target exactly.

Token by token (Leviathan et al. 2023, Chen et al. 2023; method.md section 4), or a block at once
(Sun et al. 2024, arXiv 2403.10444), which never keeps fewer in expectation. Distributions come as
transformed logits (`sampling.transformed_logits`). A drafted NO_TOKEN, of a draft whose logits are
of no distribution, is never kept, and what follows is drawn from p; where p is of none, NO_TOKEN
follows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from spire_jax.models.sampling import NO_TOKEN, sample, share_of, stream


def verify_tokens(
    keys: Key[Array, " B"],
    drafts: Int[Array, "B k"],
    q: Float[Array, "B k V"],
    p: Float[Array, "B k1 V"],
    depth: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many drafted tokens each row keeps, and the token that follows them.

    Token d ~ q is kept with probability min(1, p_d / q_d); at the first rejection the next
    token comes from normalize(max(p - q, 0)), after k acceptances from p at depth k + 1.

    Args:
        keys: one key per row for this round; streams "accept" and "next" of it are used.
        drafts: drafted tokens, each sampled from its row of `q`.
        q: logits of the draft's transformed distributions, as they were sampled, float32.
        p: the target's, at the same depths and one beyond (k1 = k + 1), float32.
        depth: how many of a row's drafts are looked at, as if no more had been drafted; all unless
            given. Lossless where that a row goes on to token j was settled by what was known before
            j was drawn (`depth.chosen`).

    Returns:
        Accepted counts in 0 .. k, and next tokens.
    """
    k = drafts.shape[1]
    q_drafted, p_drafted = share_of(q, drafts), share_of(p[:, :k], drafts)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (k,)))(stream(keys, "accept"))
    # u < p/q without the division; u lies in [0, 1), so p = 0 never passes and p = q always does.
    accept = (uniform * q_drafted < p_drafted) & (drafts != NO_TOKEN)
    if depth is not None:
        accept &= jnp.arange(k) < depth[:, None]
    accepted = jnp.sum(jnp.cumprod(accept.astype(jnp.int32), axis=1), axis=1)
    return accepted, _following(keys, accepted, q, p, jnp.ones_like(p[:, :, 0]), depth)


def verify_blocks(
    keys: Key[Array, " B"],
    drafts: Int[Array, "B k"],
    q: Float[Array, "B k V"],
    p: Float[Array, "B k1 V"],
    depth: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """As `verify_tokens`, but the block is judged as a whole.

    The accepted length is the largest i whose uniform is below h_i of `block_acceptance`; the next
    token comes from normalize(max(b_i p - q, 0)), after k acceptances from p at depth k + 1. With a
    `depth` k is that: h there is b, by which the first i tokens are all kept, whatever follows.
    """
    k = drafts.shape[1]
    b, h = block_acceptance(drafts, q, p)
    if depth is not None:
        at, last = jnp.arange(1, k + 1), depth[:, None]
        h = jnp.where(at < last, h, jnp.where(at == last, b[:, 1:], 0.0))
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (k,)))(stream(keys, "accept"))
    accepted = jnp.max(jnp.where(uniform < h, jnp.arange(1, k + 1), 0), axis=1, initial=0)
    return accepted, _following(keys, accepted, q, p, b, depth)


def block_acceptance(
    drafts: Int[Array, "B k"], q: Float[Array, "B k V"], p: Float[Array, "B k1 V"]
) -> tuple[Float[Array, "B k1"], Float[Array, "B k"]]:
    """b_0 .. b_k and h_1 .. h_k of block verification (Sun et al. 2024).

    b_0 = 1, b_i = min(1, b_{i-1} p(x_i) / q(x_i)); r_i = sum_v max(b_i p_i(v) - q_i(v), 0) of the
    distributions after x_i; h_i = r_i / (r_i + 1 - b_i), with 0 / 0 = 0, and h_k = b_k. The first
    i drafted tokens are all kept with probability b_i. `q` and `p` are logits.
    """
    k = drafts.shape[1]
    q_drafted = jnp.where(drafts == NO_TOKEN, jnp.inf, share_of(q, drafts))
    p_drafted = share_of(p[:, :k], drafts)
    b = [jnp.ones(drafts.shape[0], p.dtype)]
    for i in range(k):
        # A drafted token has q > 0. The quotient is taken only where it is below 1.
        passed = b[i] * p_drafted[:, i]
        below = passed < q_drafted[:, i]
        above = jnp.where(passed > 0, 1.0, 0.0)  # 0 where p and an underflowed q are both 0
        b.append(jnp.where(below, passed / jnp.where(below, q_drafted[:, i], 1.0), above))
    h = []
    for i in range(1, k):
        p_i, q_i = jax.nn.softmax(p[:, i]), jax.nn.softmax(q[:, i])
        r = jnp.sum(jnp.maximum(b[i][:, None] * p_i - q_i, 0.0), axis=-1)
        total = r + 1 - b[i]
        ratio = jnp.where(total > 0, r / jnp.where(total > 0, total, 1.0), 0.0)
        # Where one of the two is of no distribution the block ends: what is later is never kept.
        # (Not asked of r: XLA's CPU may take the higher of nan and 0 for 0.)
        h.append(jnp.where(jnp.isnan(p_i[:, 0] + q_i[:, 0]), b[i], ratio))
    h += b[k:] if k else []
    return jnp.stack(b, axis=1), jnp.stack(h, axis=1) if h else jnp.zeros_like(q_drafted)


def _following(
    keys: Key[Array, " B"],
    accepted: Int[Array, " B"],
    q: Float[Array, "B k V"],
    p: Float[Array, "B k1 V"],
    b: Float[Array, "B k1"],
    depth: Int[Array, " B"] | None = None,
) -> Int[Array, " B"]:
    """The token after the accepted ones, from normalize(max(b p - q, 0))."""
    # Distributions at one depth a row, not at all. After the last draft that counts q = 0, so that
    # the residual is p itself.
    k = q.shape[1]
    p_at = jax.nn.softmax(_at(p, accepted))
    q_at = jnp.zeros_like(p_at)
    if k:
        drafted = (accepted < (k if depth is None else depth))[:, None]
        q_at = jnp.where(drafted, jax.nn.softmax(_at(q, jnp.minimum(accepted, k - 1))), 0.0)
    b_at = jnp.take_along_axis(b, accepted[:, None], axis=1)
    return sample(stream(keys, "next"), jnp.log(residual_distribution(p_at, q_at, b_at)))


def _at(x: Float[Array, "B J V"], depth: Int[Array, " B"]) -> Float[Array, "B V"]:
    return jnp.take_along_axis(x, depth[:, None, None], axis=1)[:, 0]


VERIFICATIONS = {"token": verify_tokens, "block": verify_blocks}


def residual_distribution(
    p: Float[Array, "B V"], q: Float[Array, "B V"], b: Float[Array, "B 1"] | float = 1.0
) -> Float[Array, "B V"]:
    """normalize(max(b p - q, 0)); `p` itself where nothing is left, or q is nan."""
    excess = jnp.maximum(b * p - q, 0.0)
    total = jnp.sum(excess, axis=-1, keepdims=True)
    return jnp.where(total > 0, excess / jnp.where(total > 0, total, 1.0), p)

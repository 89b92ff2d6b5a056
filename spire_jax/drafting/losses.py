"""Draft and target losses (method.md 3.4), float32, per token.

The target's side is its distribution p, made once for all the drafts that learn from it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spire_jax.config.registry import LOSSES


def cross_entropy(
    logits: Float[Array, "*rows V"], targets: Int[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """Hard target: -log q(x_next), in nats."""
    log_q = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]


@jax.custom_vjp
def compare(
    p: Float[Array, "*rows V"], logits: Float[Array, "*rows V"]
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Distillation, -sum_v p_v log q_v in nats, and acceptance, alpha = sum_v min(p_v, q_v).

    q is the softmax of `logits`, where padded vocabulary is -inf, and 0 in `p`. The sums go over
    the tokens given: a trimmed head's are not all, and p then sums to less than 1. The gradient
    goes to `logits` alone, in one pass over them; automatic differentiation would keep five
    arrays of that size.
    """
    return _compare(p, logits)[0]


def _compare(p, logits):
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    q = jnp.exp(logits - log_sum[..., None])
    # -sum p log q is (sum p) log_sum - sum p x; 0 * -inf is no part of it.
    total = jnp.sum(p, axis=-1)
    distillation = total * log_sum - jnp.sum(jnp.where(p > 0, p * logits, 0.0), axis=-1)
    alpha = jnp.sum(jnp.minimum(p, q), axis=-1)
    return (distillation, alpha), (p, logits, log_sum, total)


def _compare_backward(kept, cotangents):
    """With P = sum_v p_v, d distillation / d x = P q - p; d alpha / d x_u =
    q_u ([q_u < p_u] - sum_v q_v [q_v < p_v])."""
    p, logits, log_sum, total = kept
    of_distillation, of_alpha = (c[..., None] for c in cotangents)
    q = jnp.exp(logits - log_sum[..., None])
    under = jnp.where(q < p, q, 0.0)
    gradient = of_distillation * (total[..., None] * q - p)
    gradient += of_alpha * (under - q * jnp.sum(under, axis=-1, keepdims=True))
    return jnp.zeros_like(p), gradient


compare.defvjp(_compare, _compare_backward)


def draft_loss(
    kind: str,
    omega: float,
    p: Float[Array, "*rows V"] | None,
    logits: Float[Array, "*rows V"],
    targets: Int[Array, "*rows"],
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"] | None]:
    """Per-token loss of a kind in LOSSES, and alpha where `p` is given.

    Without `p` it is "hard", the only one that needs none.
    """
    if p is None:
        return cross_entropy(logits, targets), None
    distillation, alpha = compare(p, logits)
    return LOSSES.get(kind)(distillation, alpha, logits, targets, omega), alpha


@LOSSES.register("hard")
def _hard(distillation, alpha, logits, targets, omega):
    """-log q of the text's next token."""
    return cross_entropy(logits, targets)


@LOSSES.register("distillation")
def _distillation(distillation, alpha, logits, targets, omega):
    """-sum p log q."""
    return distillation


@LOSSES.register("dspark")
def _dspark(distillation, alpha, logits, targets, omega):
    """0.1 (-log q of the text's next token) + 0.9 sum |p - q|, as DSpark (arXiv 2607.05147).

    The sum is twice the total variation, 2 (1 - alpha): DeepSpec's code weighs the former.
    """
    return 0.1 * cross_entropy(logits, targets) + 1.8 * (1 - alpha)


@LOSSES.register("mixed")
def _mixed(distillation, alpha, logits, targets, omega):
    """omega distillation + (1 - omega)(-alpha)."""
    return omega * distillation - (1 - omega) * alpha

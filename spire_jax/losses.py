"""Draft and target losses (method.md 3.4), float32, from logits, per token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "*rows V"], targets: Int[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """Hard target: -log q(x_next), in nats."""
    log_q = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]


def distillation(
    target_logits: Float[Array, "*rows V"], logits: Float[Array, "*rows V"]
) -> Float[Array, "*rows"]:
    """-sum_v p_v log q_v, in nats; padded vocabulary (-inf in both) adds nothing."""
    p = jax.nn.softmax(target_logits)
    # Finite where p = 0, so that neither the product nor its gradient is 0 * inf.
    log_q = jnp.where(p > 0, jax.nn.log_softmax(logits), 0.0)
    return -jnp.sum(p * log_q, axis=-1)


def acceptance(
    target_logits: Float[Array, "*rows V"], logits: Float[Array, "*rows V"]
) -> Float[Array, "*rows"]:
    """alpha = sum_v min(p_v, q_v), the probability that a drafted token is accepted."""
    return jnp.sum(jnp.minimum(jax.nn.softmax(target_logits), jax.nn.softmax(logits)), axis=-1)


def draft_loss(
    kind: str,
    omega: float,
    target_logits: Float[Array, "*rows V"] | None,
    logits: Float[Array, "*rows V"],
    targets: Int[Array, "*rows"],
) -> Float[Array, "*rows"]:
    """Per-token loss: "hard", "distillation", or omega distillation + (1 - omega)(-alpha)."""
    if kind == "hard" or target_logits is None:
        return cross_entropy(logits, targets)
    loss = distillation(target_logits, logits)
    if kind == "mixed":
        loss = omega * loss - (1 - omega) * acceptance(target_logits, logits)
    return loss

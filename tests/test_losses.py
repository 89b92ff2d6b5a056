"""Losses against float64 NumPy, padded vocabulary included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spire_jax.drafting import losses

ROWS, V, PADDED = 7, 9, 12


@pytest.fixture(scope="module")
def logits():
    """Target and draft logits (ROWS, PADDED), -inf beyond V; next tokens (ROWS,)."""
    rng = np.random.default_rng(0)
    target, draft = rng.normal(0, 2, (2, ROWS, PADDED)).astype(np.float32)
    target[:, V:] = draft[:, V:] = -np.inf
    return jnp.asarray(target), jnp.asarray(draft), jnp.asarray(rng.integers(0, V, ROWS))


def softmax(x):
    x = np.asarray(x, np.float64)
    weight = np.exp(x - x.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


def expected(kind, omega, target, draft, tokens):
    p, q = softmax(target), softmax(draft)
    with np.errstate(divide="ignore"):
        log_q = np.where(q > 0, np.log(q), 0.0)
    if kind == "hard":
        return -log_q[np.arange(ROWS), tokens]
    distillation = -(p * log_q).sum(axis=-1)
    if kind == "distillation":
        return distillation
    return omega * distillation - (1 - omega) * np.minimum(p, q).sum(axis=-1)


@pytest.mark.parametrize("kind, omega", [("hard", 0.5), ("distillation", 0.5), ("mixed", 0.0),
                                         ("mixed", 0.3), ("mixed", 1.0)])  # fmt: skip
def test_loss_is_the_definition(logits, kind, omega):
    target, draft, tokens = logits
    loss, alpha = losses.draft_loss(kind, omega, jax.nn.softmax(target), draft, tokens)
    np.testing.assert_allclose(
        alpha, np.minimum(softmax(target), softmax(draft)).sum(-1), rtol=1e-5
    )
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected(kind, omega, target, draft, tokens), rtol=1e-5)


def test_acceptance_is_the_overlap(logits):
    target, draft, _ = logits
    overlap = np.minimum(softmax(target), softmax(draft)).sum(axis=-1)
    p = jax.nn.softmax(target)
    np.testing.assert_allclose(losses.compare(p, draft)[1], overlap, rtol=1e-5)
    np.testing.assert_allclose(losses.compare(p, target)[1], 1.0, rtol=1e-6)


def test_gradient_of_distillation_is_q_minus_p(logits):
    target, draft, _ = logits
    gradient = jax.grad(lambda x: losses.compare(jax.nn.softmax(target), x)[0].sum())(draft)
    np.testing.assert_allclose(gradient, softmax(draft) - softmax(target), atol=1e-6)


def test_gradient_of_acceptance_is_by_hand(logits):
    """d alpha / d x_u = q_u ([q_u < p_u] - sum_v q_v [q_v < p_v])."""
    target, draft, _ = logits
    p, q = softmax(target), softmax(draft)
    under = (q < p).astype(np.float64)
    by_hand = q * (under - (q * under).sum(axis=-1, keepdims=True))
    gradient = jax.grad(lambda x: losses.compare(jax.nn.softmax(target), x)[1].sum())(draft)
    np.testing.assert_allclose(gradient, by_hand, atol=1e-6)


def test_a_draft_without_a_target_learns_from_the_text(logits):
    _, draft, tokens = logits
    loss, alpha = losses.draft_loss("hard", 0.5, None, draft, tokens)
    assert alpha is None
    np.testing.assert_allclose(loss, expected("hard", 0.5, draft, draft, tokens), rtol=1e-5)


@pytest.mark.parametrize("kind", ["hard", "distillation", "mixed"])
def test_padding_of_the_vocabulary_is_harmless(logits, kind):
    target, draft, tokens = logits
    loss, gradient = jax.value_and_grad(
        lambda x: losses.draft_loss(kind, 0.5, jax.nn.softmax(target), x, tokens)[0].sum()
    )(draft)
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    assert not np.asarray(gradient)[:, V:].any() and np.asarray(gradient)[:, :V].all()
    p = jax.nn.softmax(target)[:, :V]
    alone = losses.draft_loss(kind, 0.5, p, draft[:, :V], tokens)[0].sum()
    np.testing.assert_allclose(loss, alone, rtol=1e-6)

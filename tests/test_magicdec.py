"""MagicDec against a literal streaming cache, and against the dense target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, target, texts

from spire_jax.drafting.magicdec import magicdec
from spire_jax.models.attention import Compute, attention

T, K = 20, 3
VALID = slice(0, TINY.n_tokens)


def rollout(window: int, sink: int):
    """Texts, and the draft's logits from every start, by the product."""
    model, params = target()
    strategy = magicdec(TINY, window, sink, Compute())
    tokens = jnp.asarray(texts(2, T))
    starts = np.arange(T - K + 1)

    @jax.jit
    def run(params):
        _, keys_values = model.bind(params).prefill(tokens)
        draft, everything = strategy.model.bind(params), np.arange(T)
        return draft.rollout_over(keys_values, tokens, everything, starts, K)

    return tokens, np.asarray(run(params))[..., VALID]


@pytest.mark.parametrize(
    "window, sink",
    [(6, 1), *(pytest.param(*of, marks=pytest.mark.slow) for of in ((5, 2), (4, 0)))],
)
def test_drafts_read_a_streaming_cache(window, sink):
    """Layer by layer and token by token: the cache holds layer inputs, its positions are 0, 1, ...

    For tokens that the target has processed those are the target's, for drafted ones the draft's.
    """
    tokens, found = rollout(window, sink)
    model, params = target()
    module = model.bind(params)
    _, inputs = module.forward(tokens, tuple(range(TINY.n_layers)))

    def literal(start: int):
        held = [list(jnp.moveaxis(y, 1, 0)[:start]) for y in inputs]  # layer -> token -> input
        logits = []
        for p in range(start, start + K):
            kept = sorted({*range(min(sink, p + 1)), *range(max(0, p - window + 1), p + 1)})
            place = np.arange(len(kept))
            x = module.embed(tokens[:, p : p + 1])
            for block, view, layer in zip(module.blocks, module.views, held, strict=True):
                layer.append(x[:, 0])
                k, v = block.keys_values(jnp.stack([layer[j] for j in kept], axis=1), place)
                q = block.queries(x, place[-1:])
                attended, _ = attention(q, k, v, place[-1:], place, view)
                x = block.finish(x, attended)
            logits.append(module.unembed(x)[:, 0])
        return jnp.stack(logits, axis=1)

    for start in (0, 3, window + sink - 1, window + sink, T - K):
        wanted = np.asarray(jax.jit(literal, static_argnums=0)(start))[..., VALID]
        np.testing.assert_allclose(found[:, start], wanted, atol=2e-5, err_msg=f"start {start}")


def test_with_a_budget_for_the_whole_text_it_is_the_target():
    tokens, found = rollout(T, 1)
    model, params = target()
    logits = np.asarray(jax.jit(lambda p: model.bind(p).forward(tokens)[0])(params))[..., VALID]
    for j in range(K):
        np.testing.assert_allclose(found[:, :, j], logits[:, j : T - K + 1 + j], atol=2e-5)


def test_a_window_leaves_something_out():
    _, sparse = rollout(5, 2)
    _, dense = rollout(T, 1)
    assert np.abs(sparse - dense)[:, :4].max() < 2e-5 < 1e-2 < np.abs(sparse - dense)[:, 12:].max()

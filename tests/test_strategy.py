"""The oracle's view of a strategy against what it decodes: `along` and `replay` are the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, Pair, pair, texts

from spire_jax.decoding.oracle import TargetAlong, target_along
from spire_jax.drafting.strategy import Strategy
from spire_jax.models.caches import empty_full, full_cache
from spire_jax.models.sampling import Sampling

CONTEXT, OUTPUT, K = 12, 9, 3  # a text well beyond window + sink + k of the drafts that have one
KINDS = ("spire", "spire_strict", "spire_plain", "spire_final", "spire_embedding", "spire_dense",
         "spire_trimmed", "vanilla", "ring", "self", "magicdec", "snapkv")  # fmt: skip
WINDOWED = dataclasses.replace(TINY, window=7, sink=2)


def pass_of_the_target(p: Pair, tokens, context: int) -> TargetAlong:
    """What the strategy may read of the target, over the text and no more."""
    rows, length = tokens.shape
    if context == 1:
        cache = empty_full(p.target.config, rows, length, p.target.compute)
    else:
        _, keys_values = p.target.bind(p.target_params).prefill(tokens[:, : context - 1])
        cache = tuple(full_cache(k, v, length, p.target.compute) for k, v in keys_values)
    return target_along(
        p.target, p.target_params, cache, tokens, context, (p.strategy,), Sampling()
    )


@pytest.mark.parametrize("context", [CONTEXT, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind, config",
    [(kind, TINY) for kind in KINDS]
    + [pytest.param(kind, WINDOWED, marks=pytest.mark.slow) for kind in ("spire", "self")],
)
def test_what_the_oracle_reads_is_what_rounds_draft(kind, config, context):
    """From every start a round that keeps nothing; the context is the prompt (of 1 token: none)."""
    p = pair(kind, config)
    tokens = jnp.asarray(texts(2, context + OUTPUT + K - 1, seed=4))
    along = pass_of_the_target(p, tokens, context)
    starts, sampling = np.arange(context - 1, context - 1 + OUTPUT), Sampling()
    ys = tuple(along.activations[layer] for layer in p.strategy.collect)
    found = []
    for view in (type(p.strategy).along, Strategy.replay):
        run = jax.jit(lambda params, tokens, ys, cache, view=view: view(
            p.strategy, params, tokens, ys, cache, along.read, starts, K, sampling))  # fmt: skip
        found.append(np.asarray(run(p.draft_params, tokens, ys, along.cache)))
    assert type(p.strategy).along is not Strategy.along, "it has a faster way"
    assert found[0].shape == (2, OUTPUT, K) and np.ptp(found[0]) > 0.1
    np.testing.assert_allclose(*found, atol=1e-4)

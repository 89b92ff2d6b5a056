"""Pruned initialization (method.md 3.2)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, WINDOW, init, pair, target, texts

from spire_jax.drafting.pruning import prune
from spire_jax.drafting.spire import SpireDraft
from spire_jax.models.attention import Compute
from spire_jax.models.transformer import Model


def draft_model(n_layers: int) -> Model:
    config = dataclasses.replace(TINY, n_layers=n_layers, window=WINDOW, sink=1)
    return Model(SpireDraft, config, Compute())


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_last_blocks_and_both_ends_are_copied(n_layers):
    _, params = target()
    fresh = init(draft_model(n_layers), 7)
    draft = prune(params, fresh)
    assert jax.tree.structure(draft) == jax.tree.structure(fresh)
    for i in range(n_layers):
        assert_same(draft["blocks"][i], params["blocks"][3 - n_layers + i])
    for name in ("embedding", "unembedding", "norm_final"):
        assert_same(draft[name], params[name])
    assert_same(draft["memory_mix"], fresh["memory_mix"])


def test_the_target_survives_donation_of_the_draft():
    _, params = target()
    draft = prune(params, init(draft_model(2), 7))
    pointers = [{x.unsafe_buffer_pointer() for x in jax.tree.leaves(p)} for p in (params, draft)]
    assert not pointers[0] & pointers[1]


def test_a_draft_of_a_narrow_target_is_trained_in_float32():
    _, params = target()
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    draft = prune(narrow, init(draft_model(2), 7))
    assert {leaf.dtype for leaf in jax.tree.leaves(draft)} == {jnp.dtype("float32")}
    assert_same(draft["embedding"], narrow["embedding"].astype(jnp.float32))


def test_a_deeper_draft_is_refused():
    _, params = target()
    with pytest.raises(ValueError, match="4 blocks cannot be pruned from 3"):
        prune(params, init(draft_model(4), 7))


def test_pruned_keys_and_values_of_verified_tokens_are_the_targets():
    """Draft layer i reads y^(N - n + i - 1), just what the copied target layer reads (3.3)."""
    pruned = pair("spire")

    @jax.jit
    def both(weights, tokens):
        module = pruned.target.bind(weights.target)
        activations, keys_values = module.prefill(tokens, pruned.strategy.collect)
        draft = pruned.strategy.model.bind(weights.draft)
        at = np.arange(tokens.shape[1])
        layers = range(pruned.strategy.model.config.n_layers)
        return keys_values, [draft.read_target(i, tokens, activations, at) for i in layers]

    of_target, of_draft = both(pruned.weights, jnp.asarray(texts(2, 12)))
    for theirs, mine in zip(of_target[1:], of_draft, strict=True):
        for x, y in zip(theirs, mine, strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-6, atol=1e-6)

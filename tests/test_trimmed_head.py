"""Drafts that unembed a part of the vocabulary, and drafts that share the target's embedding."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpora import SEPARATOR, corpus_of, names
from models import HEAD_IDS, TINY, pair, target, texts

from spire_jax.config import files
from spire_jax.config.schema import ConfigError, MeshConfig
from spire_jax.costs.throughput import memory_bytes, round_cost
from spire_jax.data.pipeline import Batch, Dataset, WrittenRows, most_frequent
from spire_jax.decoding import Weights, generate
from spire_jax.drafting.losses import draft_loss
from spire_jax.drafting.pruning import prune
from spire_jax.models.sharding import make_mesh
from spire_jax.storage.checkpoints import Checkpoints
from spire_jax.training.loop import Learner, train
from spire_jax.training.tasks import (
    draft_task,
    init_params,
    initial_draft,
    target_task,
    teacher,
    trainable,
)

OTHERS = np.setdiff1d(np.arange(TINY.vocab_size), HEAD_IDS)


# --- the head ----------------------------------------------------------------------------------


def test_logits_are_those_of_the_whole_head_and_nothing_else_is_drawn():
    whole, trimmed = pair("spire"), pair("spire_trimmed")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, TINY.d_model)), jnp.float32)
    expected = whole.strategy.model.bind(whole.draft_params).unembed(x)
    found = trimmed.strategy.model.bind(trimmed.draft_params).unembed(x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found[..., HEAD_IDS], expected[..., HEAD_IDS], atol=2e-6)
    assert np.all(np.asarray(found)[..., OTHERS] == -np.inf)


def test_a_head_pruned_from_a_tied_target_is_rows_of_its_embedding():
    _, params = target(dataclasses.replace(TINY, tied=True))
    pruned = prune(params, pair("spire_trimmed").draft_params)
    np.testing.assert_array_equal(pruned["unembedding"], params["embedding"][np.array(HEAD_IDS)].T)
    np.testing.assert_array_equal(pruned["head_ids"], HEAD_IDS)


def test_losses_in_the_head_are_those_over_the_vocabulary():
    """Values and gradients: what lies outside has q = 0, adds nothing to acceptance, and is no
    part of distillation, which it would make infinite."""
    rng = np.random.default_rng(0)
    p = jax.nn.softmax(jnp.asarray(rng.normal(size=(5, TINY.vocab_size)), jnp.float32))
    logits = jnp.asarray(rng.normal(size=(5, len(HEAD_IDS))), jnp.float32)
    ids, targets = np.array(HEAD_IDS), jnp.zeros(5, jnp.int32)

    def by_definition(logits):
        q = jax.nn.softmax(logits)
        kept = p[:, ids]
        distillation = -jnp.sum(kept * jnp.log(q), axis=-1)
        alpha = jnp.sum(jnp.minimum(p, jnp.zeros_like(p).at[:, ids].set(q)), axis=-1)
        return jnp.sum(0.3 * distillation - 0.7 * alpha)

    def ours(logits):
        return jnp.sum(draft_loss("mixed", 0.3, p[:, ids], logits, targets)[0])

    np.testing.assert_allclose(ours(logits), by_definition(logits), rtol=1e-5)
    found, expected = jax.grad(ours)(logits), jax.grad(by_definition)(logits)
    np.testing.assert_allclose(found, expected, atol=1e-6)


# --- training ----------------------------------------------------------------------------------

VALUES = {
    "target": {"n_layers": 2, "d_model": 16, "n_kv_heads": 2, "d_head": 8, "d_ff": 24,
               "tied": True},
    "drafts": {"small": {"kind": "spire", "n_layers": 1, "window": 8, "head_tokens": 40,
                         "share_embedding": True},
               "whole": {"kind": "spire", "n_layers": 1, "window": 8}},
    "train": {"steps": 6, "batch_size": 4, "seq_len": 16, "log_every": 2, "checkpoint_every": 3,
              "k": 4},
    "eval": {"context_lengths": (8,), "output_length": 4},
}  # fmt: skip


def experiment(**sections):
    values = {name: VALUES.get(name, {}) | sections.get(name, {}) for name in VALUES | sections}
    return files.build(values)


def batches(start):
    while True:
        rng = np.random.default_rng(start)
        tokens = rng.integers(0, 50, (4, 17)).astype(np.int32)
        yield Batch(tokens[:, :-1], tokens[:, 1:], np.ones((4, 16), bool), np.arange(4) + start)
        start += 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A draft trained twice, once interrupted; its first and its target's parameters."""
    config, mesh = experiment(), make_mesh(MeshConfig())
    task = draft_task(config, "small")
    folder = tmp_path_factory.mktemp("trimmed")
    with jax.set_mesh(mesh):
        frozen = init_params(target_task(config).model, jax.random.key(0), mesh)
        before = jax.tree.map(np.array, frozen)

        def initial(stride=2):
            return initial_draft(
                config, "small", task, frozen, mesh, lambda n: stride * np.arange(n)
            )

        def run(where, steps, initial=initial):
            settings = dataclasses.replace(config.train, steps=steps)
            with contextlib.ExitStack() as stack:
                kept = stack.enter_context(Checkpoints(folder / where, kept=2, identity={}))
                learner = stack.enter_context(
                    Learner(dataclasses.replace(task, steps=steps), settings, mesh, initial, kept,
                            folder / f"{where}.jsonl", frozen)
                )  # fmt: skip
                train([learner], settings, mesh, teacher(config, [task]), frozen, batches)
            return learner.params

        run("again", 3)
        first = jax.tree.map(np.array, initial())
        resumed = run("again", 6, lambda: initial(stride=1))  # other texts, by now
        return task, first, run("once", 6), resumed, before, frozen


def test_a_shared_embedding_is_neither_trained_nor_stored(trained):
    task, first, params, _, before, frozen = trained
    assert "embedding" not in params and task.shared == ("embedding",)
    jax.tree.map(np.testing.assert_array_equal, before, frozen)
    assert not np.array_equal(params["unembedding"], first["unembedding"]), "its own is trained"
    assert not np.array_equal(params["blocks"][0]["query"], first["blocks"][0]["query"])


def test_the_ids_of_a_head_stay_and_are_stored(trained):
    """With the columns that were trained for them, whatever is frequent when training goes on."""
    _, _, params, resumed, _, _ = trained
    for found in (params, resumed):
        assert found["head_ids"].dtype == np.int32
        np.testing.assert_array_equal(found["head_ids"], 2 * np.arange(40))


def test_what_is_trained_has_an_optimizer_state_and_nothing_else(trained):
    task, first, *_ = trained
    moving, fixed = trainable(task, first | {"embedding": np.zeros(3)})
    assert set(fixed) == {"embedding", "head_ids"} and not set(moving) & set(fixed)


# --- which tokens ------------------------------------------------------------------------------


def test_the_most_frequent_tokens_by_hand(tmp_path):
    (first, second), (heldout, *_) = names(False, 2), names(True, 1)
    files = {first: "aaabbc", second: "cccdbz", heldout: "y" * 50}
    dataset = Dataset(corpus_of(tmp_path, files), 4)
    found = most_frequent(dataset, None, 257, 4)  # c 4, a 3, b 3; held-out text does not count
    assert found.tolist() == [*b"abc", SEPARATOR]
    rows = np.array([[*b"ddddxxx"]], np.uint16)
    found = most_frequent(dataset, WrittenRows(rows, np.array([4]), 0), 257, 3)
    assert found.tolist() == [*b"cd", SEPARATOR], "d: 1 + 4; beyond a row's length nothing counts"


# --- configuration and cost --------------------------------------------------------------------


@pytest.mark.parametrize(
    "draft, message",
    [
        ({"head_tokens": 257}, "head_tokens=257 must lie between 1 and the target's 257 tokens"),
        ({"head_tokens": -1}, "head_tokens=-1 is negative"),
        ({"head_tokens": 8, "loss": "hard"}, "cannot learn the hard target"),
        ({"kind": "vanilla", "init": "random", "d_model": 8, "share_embedding": True},
         "d_model=8 is not the target's 16"),
    ],
)  # fmt: skip
def test_bad_heads_name_the_key(draft, message):
    with pytest.raises(ConfigError, match=message):
        experiment(drafts={"bad": {"kind": "spire", "n_layers": 1, "window": 8} | draft})


def test_the_head_counts_where_unembeddings_count():
    config = experiment()
    costs = {
        (name, variant): round_cost(config, name, batch=1, context=8, variant=variant).draft_step
        for name in ("small", "whole")
        for variant in ("per_operator", "with_head")
    }
    assert costs["small", "per_operator"] == costs["whole", "per_operator"]
    head = {name: costs[name, "with_head"] - costs[name, "per_operator"]
            for name in ("small", "whole")}  # fmt: skip
    assert head["small"] / head["whole"] == pytest.approx(40 / config.target.vocab_size)
    # Tied: the whole draft has one table of its own; the small one a head and no embedding.
    less = memory_bytes(config, "whole", batch=1, context=8) - memory_bytes(
        config, "small", batch=1, context=8
    )
    assert less == config.throughput.weight_bytes * 16 * (config.target.vocab_size - 40)


def test_texts_outside_the_head_are_still_written():
    """Greedy speculation with a trimmed draft writes the target's text, other tokens included."""
    p = pair("spire_trimmed")
    prompts, budgets, seeds = list(texts(4, 5)), [24] * 4, [0] * 4
    alone = generate(p.autoregressive(0.0), Weights(p.target_params), prompts, budgets, seeds)
    found = generate(p.decoder(3, 0.0), p.weights, prompts, budgets, seeds)
    np.testing.assert_array_equal(
        np.asarray(found.tokens)[:, :29], np.asarray(alone.tokens)[:, :29]
    )
    assert np.isin(np.asarray(alone.tokens)[:, 5:29], OTHERS).any()

"""LongSpec: the layer by definition, what a round sees of the target, its cost, what trains it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, WINDOW, init, target, texts
from test_strategies import WINDOWED

from spire_jax.config import files
from spire_jax.config.checks import ConfigError
from spire_jax.config.schema import ExperimentConfig, TrainConfig
from spire_jax.costs.scaling import TensorParallel, check_sharding
from spire_jax.costs.throughput import round_cost
from spire_jax.drafting.longspec import LongSpecOptions
from spire_jax.drafting.strategy import forced
from spire_jax.models.attention import Compute
from spire_jax.models.caches import full_cache
from spire_jax.models.masks import may_attend
from spire_jax.models.sampling import Sampling
from spire_jax.models.sharding import make_mesh
from spire_jax.models.transformer import Model, Transformer
from spire_jax.training.loop import init_state, make_optimizer, train_step
from spire_jax.training.tasks import (
    TrainBatch,
    draft_task,
    initial_draft,
    teach,
    teacher,
    trainable,
    with_shared,
)

T, K = 20, 4
STARTS = np.arange(0, T - K + 1, 2)
VALID = slice(0, TINY.n_tokens)
DRAFT = LongSpecOptions(window=WINDOW)


@functools.cache
def given(config=TINY):
    """A draft with its biases, texts, and the target's last keys and values over these."""
    model, of_target = target(config)
    strategy = DRAFT.strategy(config, Compute())
    own, rng = init(strategy.model, 1), np.random.default_rng(2)
    own = {**own, **{name: of_target[name] for name in DRAFT.shared if name in of_target}}
    for part in (own["blocks"][0], own["cross"]):
        part |= {name: jnp.asarray(rng.normal(size=x.shape), x.dtype)
                 for name, x in part.items() if name.endswith("_bias")}  # fmt: skip
    tokens = jnp.asarray(texts(2, T))
    cached = jax.jit(lambda w, x: model.bind(w).prefill(x)[1])(of_target, tokens)
    return strategy, own, tokens, cached


@functools.cache
def compiled(config):
    strategy = given(config)[0]
    return jax.jit(lambda w, *x: strategy.model.bind(w).rollout(
        *x, strategy.target_view, STARTS, K))  # fmt: skip


def rollout(own, tokens, of_target, config=TINY) -> np.ndarray:
    return np.asarray(compiled(config)(own, tokens, of_target))[..., VALID]


@functools.partial(jax.jit, static_argnums=0)
def by_definition(config, start):
    """Logits after every token where a round began at `start`, with every softmax written out."""
    strategy, own, tokens, cached = given(config)
    module, text = strategy.model.bind(own), jnp.arange(T)
    block, cross, last = module.blocks[0], module.cross, config.views()[-1]

    def attended(q, k, v, sees):
        logits = last.scale * jnp.einsum("btkgh,bskh->bkgts", q, k)
        weights = jnp.where(sees, jnp.exp(logits), 0.0)
        total = jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
        return jnp.einsum("bkgts,bskh->btkgh", weights / total, v)

    x, rows = own["embedding"][tokens], jnp.tile(text, (2, 1))
    near = may_attend(text[:, None], text, WINDOW)
    x = block.add(x, attended(block.queries(x, rows), *block.keys_values(x, rows), near))
    seen = (text < start) & may_attend(start, text, last.window, last.sink)
    x = cross.add(x, attended(cross.queries(x, rows), *cached[-1], seen[None]))
    head = own["embedding"].T if config.tied else own["unembedding"]
    return (block.feed_forward(x) @ head)[..., VALID]


@pytest.mark.parametrize(
    "config", [TINY, pytest.param(WINDOWED, marks=pytest.mark.slow)], ids=["dense", "windowed"]
)
def test_a_rollout_is_the_layer_by_definition(config):
    _, own, tokens, cached = given(config)
    found = rollout(own, tokens, cached[-1], config)
    for r, start in enumerate(STARTS):
        wanted = by_definition(config, start)[:, start : start + K]
        np.testing.assert_allclose(found[:, r], wanted, atol=2e-5)
    assert found.std() > 0.5


def test_no_key_of_the_target_at_a_start_or_after_it_is_read():
    """And every one before it is."""
    _, own, tokens, cached = given()
    r, start = 4, int(STARTS[4])
    plain = rollout(own, tokens, cached[-1])[:, r]
    for at, seen in ((0, True), (start - 1, True), (start, False), (start + K, False)):
        other = tuple(x.at[:, at].add(1.0) for x in cached[-1])
        change = np.abs(rollout(own, tokens, other)[:, r] - plain)
        assert (change.max(axis=(0, 2)) > 1e-4).all() if seen else change.max() == 0, at


def test_without_its_cross_attention_it_is_a_layer_with_a_window():
    strategy, own, tokens, cached = given()
    cut = {**own["cross"], "out": jnp.zeros_like(own["cross"]["out"])}
    of = strategy.model
    plain = Model(Transformer, of.config, Compute(), (("views", of.views),))
    params = {name: own[name] for name in ("blocks", "embedding", "unembedding")}
    params["norm_final"] = {"scale": jnp.ones(TINY.d_model)}
    (final,) = jax.jit(lambda w, x: plain.bind(w).forward(x, (1,))[1])(params, tokens)
    logits = np.asarray(final @ own["unembedding"])[..., VALID]
    found = rollout({**own, "cross": cut}, tokens, cached[-1])
    np.testing.assert_allclose(found, logits[:, STARTS[:, None] + np.arange(K)], atol=2e-5)


@pytest.mark.slow
def test_a_step_is_a_round_of_one():
    strategy, own, tokens, cached = given()
    cache = tuple(full_cache(*kv, T, Compute()) for kv in cached)
    state = strategy.empty(own, 2, 1, T)
    last, at = tokens[:, 9], jnp.asarray([9, 9])
    proposal, _ = strategy.propose(
        own, state, cache, last, last, at, 1, forced(last[:, None], Sampling())
    )
    logits, _ = strategy.step(own, state, cache, last[:, None], at[:, None])
    np.testing.assert_allclose(logits[:, VALID], proposal.q[:, 0, VALID], atol=1e-5)


@pytest.mark.parametrize("context, wanted", [(512, 1.95), (4096, 1.56)])
def test_a_rounds_cost(pair, context, wanted):
    """The paper's pair at B = 64, k = 4: a layer's weights, and the rows of two caches."""
    of = dataclasses.replace(pair, drafts=(("it", LongSpecOptions()),))
    found = round_cost(of, "it", batch=64, context=context, k=4, variant="fixed_window")
    assert found.delta_t == pytest.approx(wanted, abs=0.005)
    row, target = 2 * 8 * 128, 67.1e6 + 64 * context * 8 * 2 * 8 * 128
    read = 8.39e6 + 1.05e6 + 64 * row * (min(context, 513) + context)
    assert found.delta_t == pytest.approx(1 + 4 * read / target, rel=1e-3)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_trains_the_layer_alone_on_the_targets_last_keys(tied):
    config = ExperimentConfig(
        target=dataclasses.replace(TINY, tied=tied),
        drafts=(("it", DRAFT),),
        train=TrainConfig(batch_size=4, seq_len=16, k=4, accumulate=2),
    )
    model, of_target = target(config.target)
    task, rows = draft_task(config, "it"), jnp.asarray(texts(4, 17))
    batch = TrainBatch(rows[:, :-1], rows[:, 1:], jnp.ones((4, 16), bool))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        lesson = teach(teacher(config, [task]), of_target, batch)
        cached = jax.jit(lambda w, x: model.bind(w).prefill(x)[1])(of_target, batch.tokens)
        assert list(lesson.keys_values) == [2] and not lesson.activations
        for found, wanted in zip(lesson.keys_values[2], cached[2], strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-6)
        own = initial_draft(config, "it", task, of_target, mesh)
        assert sorted(own) == ["blocks", "cross"]
        params, fixed = trainable(task, own)
        optimizer = make_optimizer(config.train, task)
        fixed = with_shared(task, fixed, of_target)
        state, metrics = train_step(
            task, config.train, optimizer, init_state(task, optimizer, params, mesh),
            lesson, batch, fixed,
        )  # fmt: skip
    assert sorted(state["params"]) == sorted(own) and metrics["alpha_by_depth"].shape == (4,)
    # In warm-up the first step changes nothing; the moments say what has a gradient.
    moments = next(x.mu for x in state["opt_state"][1] if hasattr(x, "mu"))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(moments))


@pytest.mark.parametrize(
    "override, message",
    [
        ("window=-1", "window=-1 is under 1; the window counts the query itself"),
        ("d_ff=-2", "d_ff=-2"),
        ("k=3", "drafts.it.k=3 does not divide train.seq_len=256"),
        ("n_layers=2", "n_layers"),
    ],
)
def test_what_cannot_be_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        files.load("configs/quickstart.py", ["drafts.it.kind=longspec", f"drafts.it.{override}"])


def test_a_chip_cannot_draft_alone_from_a_sharded_cache(pair):
    of = dataclasses.replace(pair, drafts=(("it", LongSpecOptions()),))
    check_sharding(of, "it", TensorParallel(2))
    with pytest.raises(ConfigError, match="it reads the target's cache, which is sharded"):
        check_sharding(of, "it", TensorParallel(2, draft_parallelism="replicated"))

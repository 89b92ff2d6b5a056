"""Training and decoding with the kernels (interpreted) give what XLA's attention gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import SINK, TINY, WINDOW, computed_by, init, pair, ragged, texts

from spire_jax.config.schema import ExperimentConfig, TrainConfig
from spire_jax.decoding import generate
from spire_jax.drafting.eagle3 import Eagle3Options
from spire_jax.drafting.longspec import LongSpecOptions
from spire_jax.drafting.spire import SpireOptions
from spire_jax.drafting.vanilla import VanillaOptions
from spire_jax.models.caches import full_cache
from spire_jax.models.sampling import Sampling
from spire_jax.training.tasks import TrainBatch, draft_task, target_task, teach, teacher

WIDE = dataclasses.replace(TINY, n_layers=2, d_head=32)  # heads that the kernels take
K = 3


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "kind",
    [
        "spire",
        *(
            pytest.param(k, marks=slow)
            for k in ("ring", "vanilla", "magicdec", "snapkv", "longspec", "anchor", "eagle3")
        ),
    ],
)
def test_decoding(kind):
    """Greedy tokens, and how many drafts each round kept: prompts of 1 to 20 tokens."""
    prompts = ragged([1, 2, 7, 20])
    states = []
    for attention in ("xla", "interpret"):
        p = computed_by(attention, pair(kind, WIDE))
        states.append(generate(p.decoder(K, 0.0), p.weights, prompts, [12] * 4, range(4)))
    for field in ("tokens", "kinds", "counts"):
        np.testing.assert_array_equal(*(getattr(state, field) for state in states), err_msg=field)
    assert int(states[0].counts[:, 1:].sum()) > 0


@slow
def test_sampled_decoding():
    p = pair("spire", WIDE)
    runs = [
        generate(q.decoder(K), q.weights, ragged([3, 9]), [16] * 2, range(2))
        for q in (computed_by("xla", p), computed_by("interpret", p))
    ]
    np.testing.assert_array_equal(*(run.tokens for run in runs))


@pytest.mark.parametrize(
    "name, remat, k",
    [
        ("spire", False, 2),
        *(
            pytest.param(*case, marks=slow)
            for case in (
                ("target", True, 2),
                ("target", False, 4),
                ("spire", True, 4),
                ("vanilla", False, 4),
                ("longspec", True, 4),
                ("eagle3", True, 4),
            )
        ),
    ],
)
def test_training(name, remat, k):
    """Loss and gradients of a step, a rollout of every k-th token included."""
    sizes: dict = {"n_layers": 1, "window": WINDOW, "sink": SINK}
    drafts = (("eagle3", Eagle3Options(share_embedding=False, **sizes)),
              ("longspec", LongSpecOptions(window=WINDOW)), ("spire", SpireOptions(**sizes)),
              ("vanilla", VanillaOptions(loss="hard", **sizes)))  # fmt: skip
    rows = jnp.asarray(texts(2, 25))
    batch = TrainBatch(rows[:, :-1], rows[:, 1:], jnp.ones((2, 24), bool))
    found = []
    for attention in ("xla", "interpret"):
        train = TrainConfig(batch_size=2, seq_len=24, k=k, attention=attention, remat=remat)
        config = ExperimentConfig(target=WIDE, drafts=drafts, train=train)
        task = target_task(config) if name == "target" else draft_task(config, name)
        lesson = None
        if task.reads:
            params = pair("spire", WIDE).target_params
            lesson = teach(teacher(config, [task]), params, batch)

        def loss(params, task=task, lesson=lesson):
            return task.loss(params, lesson, batch)[0].mean()

        found.append(jax.jit(jax.value_and_grad(loss))(init(task.model, 1)))
    (loss, grads), (kernel_loss, kernel_grads) = found
    np.testing.assert_allclose(kernel_loss, loss, rtol=1e-5)
    norm = np.sqrt(sum(float(jnp.sum(x * x)) for x in jax.tree.leaves(grads)))
    for a, b in zip(jax.tree.leaves(kernel_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * norm, rtol=1e-3)


@slow
@pytest.mark.parametrize("kind", ["spire", "magicdec", "vanilla", "longspec", "anchor", "eagle3"])
def test_probabilities_along_a_text(kind):
    """What the oracle reads: rollouts from every position."""
    tokens, context = jnp.asarray(texts(2, 20)), 8
    found = []
    for attention in ("xla", "interpret"):
        p = computed_by(attention, pair(kind, WIDE))
        collect, read = p.strategy.collect, np.arange(20 - 1)
        activations, kv = p.target.bind(p.target_params).prefill(tokens[:, :-1], collect)
        cache = tuple(full_cache(*of_layer, 20, p.target.compute) for of_layer in kv)
        found.append(p.strategy.along(
            p.draft_params, tokens, activations, cache, read, np.arange(context, 20 - K), K,
            Sampling(),
        ))  # fmt: skip
    np.testing.assert_allclose(*found, atol=1e-5)

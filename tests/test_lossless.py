"""Speculation leaves the output's distribution as it is: greedy token for token, sampled by
chi-square against exact enumeration of the target (method.md section 4)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from test_strategies import CASES, named, pair_of
from test_verification import SIGNIFICANCE, chi_square

from spire_jax.config.schema import ExperimentConfig, TrainConfig
from spire_jax.decoding import generate
from spire_jax.drafting.build import strategy
from spire_jax.drafting.spire import SpireOptions
from spire_jax.models.attention import Compute
from spire_jax.models.sampling import Sampling, probabilities
from spire_jax.models.sharding import make_mesh
from spire_jax.training.loop import init_state, make_optimizer, train_step
from spire_jax.training.tasks import (
    Task,
    TrainBatch,
    draft_task,
    initial_draft,
    target_task,
    teach,
    teacher,
)

# From one token to beyond window + sink + k of every test (6 + 1 + 8).
CONTEXTS = (1, 2, 5, 7, 8, 12, 16, 30)
OUTPUT = 40  # wraps the ring several times


@functools.cache
def greedy_reference() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts, and their autoregressive continuations."""
    prompts, pair, rows = models.ragged(CONTEXTS), models.pair("self"), len(CONTEXTS)
    decoder = pair.autoregressive(0.0)
    state = generate(decoder, pair.weights, prompts, [OUTPUT] * rows, [0] * rows, width=90)
    return prompts, outputs(state, prompts)


def outputs(state, prompts) -> list[np.ndarray]:
    """Each row's generated tokens."""
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
    return [
        tokens[i, len(prompt) : length]
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def check_greedy(prompt: np.ndarray, got: np.ndarray, wanted: np.ndarray) -> None:
    """The same tokens; where they part, each is the target's argmax within 1e-3 in logit."""
    assert len(got) == len(wanted)
    if np.array_equal(got, wanted):
        return
    model, params = models.target()
    text = np.concatenate([prompt, got]).astype(np.int32)
    logits = np.asarray(
        model.bind(params).forward(jnp.asarray(text[None, :-1]))[0][0, len(prompt) - 1 :]
    )
    gap = logits.max(axis=-1) - logits[np.arange(len(got)), got]
    assert gap.max() <= 1e-3, f"token {gap.argmax()} is {gap.max()} below the target's argmax"


def check_kind(pair: models.Pair, k: int, batch: int = len(CONTEXTS)) -> None:
    """Every prompt of a batch, or three of them alone."""
    prompts, wanted = greedy_reference()
    for begin in [0] if batch == len(prompts) else (0, 3, 7):
        rows = slice(begin, begin + batch)
        state = generate(
            pair.decoder(k, 0.0), pair.weights, prompts[rows], [OUTPUT] * batch, [1] * batch,
            width=90,
        )  # fmt: skip
        for prompt, got, want in zip(
            prompts[rows], outputs(state, prompts[rows]), wanted[rows], strict=True
        ):
            check_greedy(prompt, got, want)


# A kind's first options in the fast tier, where no other kind drafts alike.
FIRST = {kind: options for kind, options in reversed(CASES)}
ALIKE = ("longspec", "anchor")
KINDS = [
    pytest.param(*case, id=named(case), marks=() if FIRST[case[0]] is case[1]
                 and case[0] not in ALIKE else pytest.mark.slow)
    for case in CASES
]  # fmt: skip


@pytest.mark.parametrize("kind,options", KINDS)
def test_greedy_equals_autoregressive(kind, options):
    check_kind(pair_of(kind, options), 3)


@pytest.mark.parametrize(
    "kind,k,batch",
    [("vanilla", 1, 8), ("spire", 8, 8),
     *(pytest.param(kind, k, batch, marks=pytest.mark.slow)
       for kind in ("spire", "vanilla", "ring", "self", "magicdec", "snapkv")
       for k in (1, 3, 4, 8) for batch in (1, 8)
       if (kind, k, batch) not in (("vanilla", 1, 8), ("spire", 8, 8)))],
)  # fmt: skip
def test_greedy_equals_autoregressive_at_every_depth(kind, k, batch):
    check_kind(models.pair(kind), k, batch)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 4, 8])
def test_dense_target_as_its_own_draft(k):
    """Every greedy draft is accepted but near-ties; sampled, more than 0.9999 of them."""
    pair, prompts = models.pair("self"), models.ragged(CONTEXTS)
    for temperature, least in ((0.0, 0.999), (1.0, 0.9999)):
        counts = np.zeros(k + 1, np.int64)
        for seed in range(4 if temperature else 1):
            state = generate(
                pair.decoder(k, temperature), pair.weights, prompts, [200] * 8,
                range(100 * seed, 100 * seed + 8), width=240,
            )  # fmt: skip
            counts += np.asarray(state.counts).sum(axis=0)
        tested = sum(counts[a:].sum() for a in range(k))
        accepted = sum(counts[a:].sum() for a in range(1, k + 1))
        assert accepted / tested > least


# --- sampled, end to end -----------------------------------------------------------------------

SMALL = dataclasses.replace(
    models.TINY, n_layers=2, d_model=16, d_ff=16, vocab_size=16, n_tokens=16, q_per_kv=1
)
ROWS, BATCHES = 4096, 4


def joint_of_three(pair, prompt: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The target's exact distribution over the next three tokens, [16, 16, 16]."""
    model, params = pair.target, pair.target_params
    v = SMALL.n_tokens
    pairs = np.stack(np.meshgrid(np.arange(v), np.arange(v), indexing="ij"), -1).reshape(-1, 2)
    texts = np.concatenate([np.tile(prompt, (v * v, 1)), pairs], axis=1).astype(np.int32)
    logits, _ = jax.jit(lambda p, x: model.bind(p).forward(x))(params, texts)
    p = np.asarray(probabilities(logits[:, len(prompt) - 1 :], sampling), np.float64)
    first, second, third = p[0, 0], p[::v, 1], p[:, 2].reshape(v, v, v)
    return first[:, None, None] * second[:, :, None] * third


def sampled_joint(pair, decoder, prompt: np.ndarray):
    """Counts of the first three tokens over many requests that differ in their seed alone."""
    v = SMALL.n_tokens
    counts, accepted = np.zeros((v, v, v)), np.zeros(decoder.k + 1)
    for batch in range(BATCHES):
        seeds = range(batch * ROWS, (batch + 1) * ROWS)
        state = generate(decoder, pair.weights, [prompt] * ROWS, [3] * ROWS, seeds)
        new = np.asarray(state.tokens)[:, len(prompt) : len(prompt) + 3]
        np.add.at(counts, tuple(new.T), 1)
        accepted += np.asarray(state.counts).sum(axis=0)
    return counts, accepted


PRICES = (1.0, 1.5, 2.05)
SAMPLED = [("spire", 0.6, {}), ("vanilla", 1.0, {"verification": "block", "top_p": 0.7})]
SAMPLED_LATER = [
    ("spire", 1.0, {}), ("spire", 1.0, {"top_k": 6}), ("spire", 0.6, {"top_k": 9, "top_p": 0.8}),
    ("vanilla", 1.0, {"top_p": 0.7}), ("ring", 0.6, {}), ("magicdec", 1.0, {}),
    ("snapkv", 1.0, {}), ("spire", 1.0, {"verification": "block"}), ("stride", 0.6, {"top_k": 9}),
    ("stride", 1.0, {"verification": "block"}), ("stride_argmax", 1.0, {}),
    ("spire_fused", 0.6, {}), ("block", 1.0, {}), ("block_causal", 0.6, {"top_k": 9}),
    ("block", 0.6, {"verification": "block"}),
    # Each row verifies as many as it chooses, of 0 to 2 or of 1 and 2.
    ("block", 1.0, {"prices": PRICES}), ("stride_confident", 1.0, {"prices": PRICES}),
    ("stride_confident", 0.6, {"prices": PRICES, "widths": (1, 2), "verification": "block"}),
    ("longspec", 0.6, {"top_k": 9}), ("longspec", 1.0, {"verification": "block"}),
    ("anchor", 0.6, {"top_k": 9}), ("anchor", 1.0, {"verification": "block"}),
    ("eagle3", 0.6, {"top_k": 9}), ("eagle3", 1.0, {"verification": "block"}),
    ("eagle3_argmax", 1.0, {}),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind,temperature,options",
    SAMPLED + [pytest.param(*case, marks=pytest.mark.slow) for case in SAMPLED_LATER],
)
def test_sampled_joint_equals_enumeration(kind, temperature, options):
    """The joint of the first three tokens, across rounds: k = 2 ends a round inside it."""
    check_joint(models.pair(kind, SMALL), temperature, **options)


def check_joint(
    pair, temperature: float, verification: str = "token", prices=(), widths=(), **options
) -> float:
    """The share of rounds that accept a draft, after comparing the tokens' distribution."""
    sampling = Sampling(temperature, **options)
    prompt = models.texts(1, 9, seed=3, n_tokens=SMALL.n_tokens)[0]
    decoder = dataclasses.replace(
        pair.decoder(2, temperature, **options),
        verification=verification,
        prices=prices,
        widths=widths,
    )
    counts, accepted = sampled_joint(pair, decoder, prompt)
    share = accepted[1:].sum() / accepted.sum()
    assert 0.05 < share < 0.95, "a draft that agrees or disagrees always tests nothing"
    joint = joint_of_three(pair, prompt, sampling)
    assert chi_square(counts, joint) > SIGNIFICANCE
    for position in range(3):
        others = tuple(i for i in range(3) if i != position)
        assert chi_square(counts.sum(axis=others), joint.sum(axis=others)) > SIGNIFICANCE
    return share


def trained(task: Task, config: ExperimentConfig, params, frozen=None):
    """`params` after `task.steps` on texts of a Markov chain."""
    mesh, rng = jax.sharding.get_mesh(), np.random.default_rng(0)
    v, train = SMALL.n_tokens, config.train
    following = rng.dirichlet(np.full(v, 0.2), v).cumsum(axis=-1)
    optimizer = make_optimizer(train, task)
    state, first = init_state(task, optimizer, params, mesh), 0.0
    for _ in range(task.steps):
        text = rng.integers(0, v, (train.batch_size, train.seq_len + 1)).astype(np.int32)
        for t in range(1, train.seq_len + 1):
            draws = rng.random((train.batch_size, 1))
            text[:, t] = (draws > following[text[:, t - 1]]).sum(axis=-1).clip(0, v - 1)
        full = jnp.ones((train.batch_size, train.seq_len), bool)
        batch = TrainBatch(jnp.asarray(text[:, :-1]), jnp.asarray(text[:, 1:]), full)
        lesson = None if frozen is None else teach(teacher(config, [task]), frozen, batch)
        state, metrics = train_step(task, train, optimizer, state, lesson, batch)
        first = first or float(metrics["loss"])
    assert float(metrics["loss"]) < 0.8 * first, f"{task.name} has learned nothing"
    return state["params"]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_joint_of_a_trained_pair(temperature):
    """A target and a SPIRe draft trained by the product's own step."""
    assert check_joint(trained_pair(), temperature) > 0.5


@functools.cache
def trained_pair() -> models.Pair:
    config = ExperimentConfig(
        target=SMALL,
        drafts=(
            ("spire", SpireOptions(n_layers=1, window=models.WINDOW, init="random", steps=60)),
        ),
        train=TrainConfig(steps=200, batch_size=32, seq_len=16, k=2, peak_lr=1e-2),
    )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        task = target_task(config)
        target = trained(task, config, models.init(task.model, 0))
        task = draft_task(config, "spire")
        draft = trained(task, config, initial_draft(config, "spire", task, target, mesh), target)
        return models.Pair(
            target_task(config).model, target, strategy(config, "spire", Compute()), draft
        )

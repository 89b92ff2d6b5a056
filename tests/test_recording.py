"""The numbers that the code gave before it was rebuilt (commit 9b66309): `recording.json`.

Decoded tokens, what each of them is, and counts are compared exactly; losses, ratios and modeled
numbers to nine digits or to what other orders of summation leave. In the file float32 numbers are
whole, others are cut to nine digits; parameters are hashes. The fast tier decodes four kinds of
draft, trains three and reads every modeled number.
"""

import dataclasses
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from paper_numbers import ROOT

from spire_jax.config import files, schema
from spire_jax.costs import throughput
from spire_jax.costs.chips import CHIPS
from spire_jax.costs.roofline import VARIANTS
from spire_jax.decoding import generate, oracle
from spire_jax.drafting.magicdec import MagicDecOptions
from spire_jax.drafting.pruning import prune
from spire_jax.drafting.snapkv import SnapKvOptions
from spire_jax.models.caches import full_cache
from spire_jax.models.sampling import Sampling
from spire_jax.models.sharding import make_mesh
from spire_jax.training.loop import evaluate_batch, init_state, make_optimizer, train_step
from spire_jax.training.tasks import (
    TrainBatch,
    draft_task,
    target_task,
    teach,
    teacher,
    trainable,
    with_shared,
)

RECORDED = json.loads((pathlib.Path(__file__).parent / "recording.json").read_text())
DIGITS = 1e-6  # relative; the recording itself moves by 5e-7 with the compiler's optimizations
RATIOS = 1e-5  # of probabilities, by 4e-6


def later(names, fast):
    """Cases of the full tier, and those of both."""
    assert set(fast) <= set(names)
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def check_parameters(name: str, params) -> None:
    """The inputs are those of the recording, to the last bit."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    assert digest.hexdigest() == RECORDED["parameters"][name], f"{name}: other parameters"


# --- decoding ----------------------------------------------------------------------------------

PROMPT_LENGTHS, BUDGET, K, SEEDS = (1, 4, 9, 17), 24, 3, (5, 6, 7, 8)
SAMPLINGS = {  # options of a decoder, and its verification
    "greedy": ({"temperature": 0.0}, "token"),
    "sampled": ({"temperature": 1.0}, "token"),
    "sampled block": ({"temperature": 1.0}, "block"),
    "cut": ({"temperature": 0.7, "eos": 18, "top_k": 15, "top_p": 0.95}, "token"),
}
FAST = ("spire sampled", "ring sampled", "magicdec sampled", "snapkv sampled")


@pytest.mark.parametrize("name", later(RECORDED["decoding"], FAST))
def test_decoded_texts(name):
    kind, how = name.split(" ", 1)
    options, verification = SAMPLINGS[how]
    p = models.pair("vanilla" if kind == "autoregressive" else kind)
    check_parameters("target", p.target_params)
    if kind == "autoregressive":
        decoder = p.autoregressive(**options)
    else:
        check_parameters(f"draft {kind}", p.draft_params)
        decoder = dataclasses.replace(p.decoder(K, **options), verification=verification)
    prompts = models.ragged(PROMPT_LENGTHS, seed=0)
    state = generate(decoder, p.weights, prompts, [BUDGET] * len(prompts), SEEDS)
    lengths = np.asarray(state.lengths)
    found = {
        "width": state.tokens.shape[1],
        "lengths": lengths.tolist(),
        "rounds": np.asarray(state.rounds).tolist(),
        "counts": np.asarray(state.counts).tolist(),
        "tokens": [np.asarray(state.tokens)[i, :n].tolist() for i, n in enumerate(lengths)],
        "kinds": ["".join(map(str, np.asarray(state.kinds)[i, :n])) for i, n in enumerate(lengths)],
    }
    assert found == RECORDED["decoding"][name]


# --- training ----------------------------------------------------------------------------------

HEAD_TOKENS, STEPS, N_TOKENS = 24, 10, 61
WINDOWED = {"kind": "spire", "n_layers": 2, "window": 6, "sink": 1}
TRAINING = {
    "target": {
        "n_layers": 3, "d_model": 32, "n_kv_heads": 2, "q_per_kv": 2, "d_head": 8, "d_ff": 48,
        "n_tokens": N_TOKENS, "vocab_size": 64,
    },
    "drafts": {
        "spire": WINDOWED,
        "spire_distillation": WINDOWED | {"loss": "distillation"},
        "spire_final": WINDOWED | {"memory": "final"},
        "spire_embedding": WINDOWED | {"memory": "embedding"},
        "spire_plain": WINDOWED | {"feedback": False},
        "spire_strict": WINDOWED | {"attend_self": False},
        "spire_trimmed": WINDOWED | {"head_tokens": HEAD_TOKENS, "share_embedding": True},
        "vanilla_hard": {"kind": "vanilla", "n_layers": 2, "d_model": 32, "window": 0,
                         "init": "random", "loss": "hard"},
        "vanilla_pruned": WINDOWED | {"kind": "vanilla"},
    },
    "train": {"steps": STEPS, "batch_size": 4, "seq_len": 16, "k": 4},
    "eval": {"context_lengths": (8,), "output_length": 4},
}  # fmt: skip


def batches():
    """Random tokens, of which some at the end of each row do not count."""
    for step in range(STEPS):
        rng = np.random.default_rng([11, step])
        text = rng.integers(0, N_TOKENS, (4, 17)).astype(np.int32)
        mask = np.arange(16) < rng.integers(8, 17, 4)[:, None]
        yield TrainBatch(*(jnp.asarray(x) for x in (text[:, :-1], text[:, 1:], mask)))


@pytest.mark.parametrize("name", later(RECORDED["training"], ("spire",)))
def test_ten_steps_of_training(name):
    """What is logged of each, and how large every parameter is after the last."""
    config, mesh = files.build(TRAINING), make_mesh(schema.MeshConfig())
    task = target_task(config) if name == "target" else draft_task(config, name)
    frozen = models.init(target_task(config).model, 0, sharpness=2.0)
    check_parameters("training target", frozen)
    if name == "target":
        params = frozen
    else:
        params = models.init(task.model, 1)
        params = {key: value for key, value in params.items() if key not in task.shared}
        if task.model.config.head_tokens:
            params["head_ids"] = jnp.asarray(np.arange(HEAD_TOKENS) * 5 // 2 + 1, jnp.int32)
        if config.draft(name).init != "random":
            params = prune(frozen, params)
        check_parameters(f"training {name}", params)
    found: dict[str, list] = {key: [] for key in RECORDED["training"][name] if key != "norms"}
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.train, task)
        moving, own_fixed = trainable(task, jax.tree.map(jnp.copy, params))
        fixed = with_shared(task, own_fixed, frozen)
        state = init_state(task, optimizer, moving, mesh)
        for batch in batches():
            lesson, monitored = None, {}
            if name != "target":
                lesson = teach(teacher(config, [task]), frozen, batch)
                if task.reads is None:
                    now = {**state["params"], **fixed}
                    monitored, lesson = evaluate_batch(task, now, lesson, batch), None
                else:
                    lesson = lesson.only(task.reads, ())
            state, metrics = train_step(task, config.train, optimizer, state, lesson, batch, fixed)
            for key, value in {**monitored, **metrics}.items():
                found[key].append(np.asarray(value, np.float64))
        leaves = jax.tree_util.tree_flatten_with_path(state["params"])[0]
    recorded = dict(RECORDED["training"][name])
    norms = {"/".join(str(part.key) for part in path): np.linalg.norm(np.asarray(x, np.float64))
             for path, x in leaves}  # fmt: skip
    assert norms == pytest.approx(recorded.pop("norms"), rel=DIGITS)
    for key, values in recorded.items():
        np.testing.assert_allclose(found[key], values, rtol=DIGITS, atol=1e-9, err_msg=key)


# --- the oracle --------------------------------------------------------------------------------

CONTEXT, OUTPUT = 12, 8
TEXTS = jnp.asarray(RECORDED["oracle"].pop("texts"), jnp.int32)
TOGETHER = "all kinds at once"


def target_along(kinds) -> oracle.TargetAlong:
    target, params = models.target()
    _, keys_values = target.bind(params).prefill(TEXTS[:, : CONTEXT - 1])
    cache = tuple(full_cache(k, v, TEXTS.shape[1], target.compute) for k, v in keys_values)
    strategies = tuple(models.pair(kind).strategy for kind in kinds)
    return oracle.target_along(target, params, cache, TEXTS, CONTEXT, strategies, Sampling())


@pytest.mark.parametrize("kind", later(RECORDED["oracle"], ("spire", "vanilla", "magicdec")))
def test_ratios_along_texts(kind):
    recorded = RECORDED["oracle"][kind]
    kinds = (
        [name for name in RECORDED["oracle"] if name != TOGETHER] if kind == TOGETHER else [kind]
    )
    along = target_along(kinds)
    expected = recorded["target_along"]
    if kind == "magicdec":  # it takes entries from the target's cache now, and reads no activations
        expected |= {"sinks": 0, "begin": CONTEXT - 1, "activation_norms": {}}
    assert [along.sinks, along.begin, along.end] == [expected[x] for x in ("sinks", "begin", "end")]
    np.testing.assert_allclose(along.p, expected["p"], rtol=RATIOS)
    norms = {str(layer): np.linalg.norm(np.asarray(y, np.float64))
             for layer, y in along.activations.items()}  # fmt: skip
    assert norms == pytest.approx(expected["activation_norms"], rel=DIGITS)
    if kind == TOGETHER:
        return
    p = models.pair(kind)
    ratios = np.asarray(oracle.ratios_along(
        p.strategy, p.draft_params, TEXTS, along, CONTEXT, OUTPUT, K, Sampling()))  # fmt: skip
    np.testing.assert_allclose(ratios, recorded["ratios"], rtol=RATIOS, atol=1e-9)
    for verification in ("token", "block"):
        statistics = oracle.round_statistics(ratios, verification)
        for key, values in recorded[verification].items():
            np.testing.assert_allclose(getattr(statistics, key), values, rtol=RATIOS)


# --- modeled throughput ------------------------------------------------------------------------

POINT = {"batch": 64, "context": 512}
SELF_DRAFTING = ("magicdec", "snapkv")


def experiment(name: str) -> schema.ExperimentConfig:
    """A config with MagicDec, and SnapKV of as many tokens, among its drafts."""
    once = ["drafts.spire.kind=spire", "drafts.stride2=", "drafts.stride4="]
    config = files.load(ROOT / "configs" / f"{name}.py", once if name == "quickstart" else ())
    drafts = dict(config.drafts)
    window, sink = drafts.setdefault("magicdec", MagicDecOptions()).kept()
    drafts["snapkv"] = SnapKvOptions(budget=sink + window)
    return dataclasses.replace(config, drafts=tuple(drafts.items()))


@pytest.mark.parametrize("name", RECORDED["modeled"])
def test_modeled_numbers(name):
    recorded, config = RECORDED["modeled"][name], experiment(name)
    at, taus = config.throughput, recorded["tau"]
    assert (config.decode.k, at.hoi, at.variant) == tuple(
        recorded[key] for key in ("k", "hoi", "variant"))  # fmt: skip
    assert list(at.batch_sizes) == recorded["batch_sizes"]
    assert list(at.context_lengths) == recorded["context_lengths"]
    assert throughput.critical_context(config) == recorded["critical_context"]
    assert dict(at.tau).items() <= taus.items()
    bodies = {name: of.model(config.target).body_parameters() for name, of in config.drafts}
    assert {"target": config.target.body_parameters()} | {
        name: body for name, body in bodies.items() if name not in SELF_DRAFTING
    } == recorded["body_parameters"]
    near = lambda x: pytest.approx(x, rel=DIGITS)  # noqa: E731
    for method, value in recorded["memory_bytes"].items():
        # Of a target that drafts no cache was counted then, and of a ring what is in it, without
        # the room that it has: for its whole window, whatever the context, and for k more.
        assert method not in SELF_DRAFTING
        if method != schema.AUTOREGRESSIVE and (window := config.draft(method).window):
            slots = window + config.decode.k - min(window, POINT["context"])
            row = config.draft(method).model(config.target).cache_row()
            value += at.cache_bytes * POINT["batch"] * slots * row
        assert throughput.memory_bytes(config, method, **POINT) == near(value), method
    grids = {v: throughput.grid(config, taus, variant=v) for v in VARIANTS}
    lengths = np.array(at.context_lengths)
    for method, tau in taus.items():
        # SnapKV has a budget now and no sinks: where the paper's variant counted a sink beside an
        # eighth of the context, and where the context is shorter than the budget, it read one more.
        whole = config.draft(method).budget if method == "snapkv" else 0
        variants = [v for v in VARIANTS if not (whole and v == "paper")]
        for chip in CHIPS if at.variant in variants else ():
            speed = throughput.tokens_per_s_per_chip(config, method, tau=tau, chip=chip, **POINT)
            assert speed == near(recorded["tokens_per_s_per_chip"][method][chip])
        for variant in variants:
            rows = np.array([list(row.values()) for row in grids[variant][method].values()])
            expected = np.array(recorded["grid"][method][variant])
            np.testing.assert_allclose(rows[:, lengths >= whole], expected[:, lengths >= whole],
                                       rtol=DIGITS, err_msg=f"{method}, {variant}")  # fmt: skip
            if whole > POINT["context"]:
                continue
            found = throughput.multiplier_over_generation(
                config, method, tau=tau, variant=variant, **POINT)  # fmt: skip
            assert found == near(recorded["multiplier_over_generation"][method][variant])

"""The training step and loop: accumulation, decay, schedules, the frozen target, divergence."""

import contextlib
import dataclasses
import functools
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spire_jax.config import files, schema
from spire_jax.data.pipeline import Batch
from spire_jax.models.sharding import make_mesh
from spire_jax.storage.checkpoints import Checkpoints
from spire_jax.storage.metrics import MetricsError
from spire_jax.training import loop
from spire_jax.training.loop import (
    Learner,
    TrainingError,
    by_depth,
    init_state,
    learning_rate,
    make_optimizer,
    train,
    train_step,
)
from spire_jax.training.tasks import (
    TrainBatch,
    draft_task,
    init_params,
    initial_draft,
    stream_key,
    target_task,
    teach,
    teacher,
)

SIZES: dict[str, dict] = {
    "target": {"n_layers": 2, "d_model": 16, "n_kv_heads": 2, "d_head": 8, "d_ff": 24},
    "drafts": {
        "spire": {"kind": "spire", "n_layers": 1, "window": 8},
        "vanilla": {
            "kind": "vanilla",
            "n_layers": 1,
            "window": 0,
            "init": "random",
            "loss": "hard",
        },
    },
    "train": {
        "steps": 24,
        "batch_size": 4,
        "seq_len": 16,
        "log_every": 4,
        "checkpoint_every": 8,
        "k": 4,
    },
    "eval": {"context_lengths": (8,), "output_length": 4},
}


def experiment(**train_values) -> schema.ExperimentConfig:
    values = SIZES | {"train": SIZES["train"] | train_values}
    return files.build(values)


@pytest.fixture(scope="module")
def mesh():
    mesh = make_mesh(schema.MeshConfig())
    with jax.set_mesh(mesh):
        yield mesh


def arrays(seed: int, rows: int = 4, length: int = 16) -> TrainBatch:
    """Text in which each token follows from the one before, with ragged padding."""
    rng = np.random.default_rng(seed)
    text = (rng.integers(0, 50, (rows, 1)) + 7 * np.arange(length + 1)) % 50
    mask = np.arange(length) < rng.integers(2, length + 1, (rows, 1))
    return TrainBatch(*(jnp.asarray(x) for x in (text[:, :-1], text[:, 1:], mask)))


def batches(start: int):
    step = start // 4
    while True:
        tokens, targets, mask = (np.asarray(x) for x in arrays(step))
        examples = np.arange(4) + 4 * step
        yield Batch(tokens.astype(np.int32), targets.astype(np.int32), mask, examples)
        step += 1


def run(task, config, mesh, initial, frozen, folder, **kwargs):
    return run_all({task: initial}, config, mesh, frozen, folder, **kwargs)[0]


def run_all(tasks, config, mesh, frozen, folder, batches=batches, **kwargs):
    """Parameters of task -> its initial parameters after training them together."""
    with contextlib.ExitStack() as stack:
        learners = []
        for task, initial in tasks.items():
            where = folder if len(tasks) == 1 else folder / task.name
            checkpoints = stack.enter_context(
                Checkpoints(where / "checkpoints", kept=2, identity={"of": task.name})
            )
            learner = Learner(task, config.train, mesh, initial, checkpoints,
                              where / f"{task.name}.jsonl")  # fmt: skip
            learners.append(stack.enter_context(learner))
        taught_by = None if frozen is None else teacher(config, list(tasks))
        train(learners, config.train, mesh, taught_by, frozen, batches, **kwargs)
    return [learner.state["params"] for learner in learners]


@pytest.fixture(scope="module")
def target(mesh, tmp_path_factory):
    """A trained target, its task, and the folder of its run."""
    config, folder = experiment(), tmp_path_factory.mktemp("target")
    task = target_task(config)
    params = run(task, config, mesh, lambda: init_params(task.model, jax.random.key(0), mesh),
                 None, folder)  # fmt: skip
    return task, params, folder


def records(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_the_target_learns_and_its_metrics_say_so(target):
    _, _, folder = target
    lines = records(folder, "target")
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 24]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert lines[-1]["examples"] == 96 and lines[-1]["tokens"] == 96 * 16
    assert {"grad_norm", "learning_rate", "tokens_per_s", "peak_share"} <= lines[-1].keys()
    assert 0 < lines[-1]["peak_share"] < 1


def test_the_metrics_tell_how_long_steps_wait_for_their_data(target, mesh, tmp_path):
    task, _, folder = target
    config, pause = experiment(), 0.1

    def late(start):
        for batch in batches(start):
            time.sleep(pause)
            yield batch

    initial = init_params(task.model, jax.random.key(0), mesh)
    run(task, config, mesh, lambda: initial, None, tmp_path, batches=late)
    record = records(tmp_path, "target")[-2]  # the last counts a step whose batch was there before
    seconds = 4 * 16 / record["tokens_per_s"]  # of a step
    assert pause / seconds <= record["data_wait_share"] <= 1
    assert records(folder, "target")[-2]["data_wait_share"] < record["data_wait_share"] / 2


@pytest.mark.parametrize("name", ["spire", "vanilla"])
def test_drafts_learn_and_the_target_stays(name, target, mesh, tmp_path):
    _, frozen, _ = target
    before = jax.tree.map(np.array, frozen)
    config = experiment()
    task = draft_task(config, name)
    run(task, config, mesh, lambda: initial_draft(config, name, task, frozen, mesh), frozen,
        tmp_path)  # fmt: skip
    lines = records(tmp_path, name)
    assert lines[-1]["alpha"] > lines[0]["alpha"], "acceptance, at every logged step"
    assert lines[-1]["loss"] < lines[0]["loss"]
    if name == "spire":
        assert len(lines[-1]["alpha_by_depth"]) == 4
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, frozen)))


def test_drafts_trained_together_are_those_trained_alone(target, mesh, tmp_path):
    """To the bit, whatever else is trained beside them and wherever an interruption left them."""
    frozen, config = target[1], experiment()
    tasks = {draft_task(config, name): name for name in ("spire", "vanilla")}
    initial = {task: functools.partial(initial_draft, config, name, task, frozen, mesh)
               for task, name in tasks.items()}  # fmt: skip
    alone = [run(task, config, mesh, initial[task], frozen, tmp_path / "alone" / name)
             for task, name in tasks.items()]  # fmt: skip
    together = run_all(initial, config, mesh, frozen, tmp_path / "together")
    same(alone, together)
    # One stands at step 16, the other has not begun: the first waits.
    folder, (spire, _) = tmp_path / "uneven", tasks
    with pytest.raises(KeyboardInterrupt):
        run(spire, config, mesh, initial[spire], frozen, folder / "spire", batches=interrupted)
    same(alone, run_all(initial, config, mesh, frozen, folder))
    assert [line["step"] for line in records(folder / "spire", "spire")] == [4, 8, 12, 16, 20, 24]


def interrupted(start):
    for step, batch in enumerate(batches(start)):
        if step == 18:
            raise KeyboardInterrupt
        yield batch


def same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_pass_of_the_target_serves_all_drafts(target, mesh, tmp_path, monkeypatch):
    calls = []
    original = loop.teach

    def counted(taught_by, params, batch):
        calls.append(taught_by.collect)
        return original(taught_by, params, batch)

    monkeypatch.setattr(loop, "teach", counted)
    config, frozen = experiment(steps=6), target[1]
    tasks = {draft_task(config, name): name for name in ("spire", "vanilla")}
    initial = {task: functools.partial(initial_draft, config, name, task, frozen, mesh)
               for task, name in tasks.items()}  # fmt: skip
    run_all(initial, config, mesh, frozen, tmp_path / "both")
    assert calls == [(1,)] * 6
    # A draft that needs nothing of the target costs no pass of it but at logged steps.
    calls.clear()
    (vanilla,) = [task for task, name in tasks.items() if name == "vanilla"]
    run(vanilla, config, mesh, initial[vanilla], frozen, tmp_path / "alone")
    assert calls == [()]


@pytest.mark.parametrize("name", [pytest.param("target", marks=pytest.mark.slow), "spire"])
def test_accumulation_and_remat_change_nothing(name, target, mesh):
    """Micro-batches with different amounts of padding count by tokens, not by batch."""
    states, metrics = [], []
    for values in ({}, {"accumulate": 4, "remat": True}):
        config = experiment(**values)
        task = target_task(config) if name == "target" else draft_task(config, name)
        frozen = None if name == "target" else target[1]
        params = (init_params(task.model, jax.random.key(1), mesh) if name == "target"
                  else initial_draft(config, name, task, frozen, mesh))  # fmt: skip
        optimizer = make_optimizer(config.train, task)
        state = init_state(task, optimizer, params, mesh)
        for step in range(2):
            lesson = (
                None if frozen is None else teach(teacher(config, [task]), frozen, arrays(step))
            )
            state, metric = train_step(task, config.train, optimizer, state, lesson, arrays(step))
        states.append(state["params"])
        metrics.append(metric)
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    for key in metrics[0]:
        np.testing.assert_allclose(metrics[0][key], metrics[1][key], rtol=1e-4)


def test_weight_decay_spares_the_memory_mix_alone(target, mesh):
    config = experiment()
    task = draft_task(config, "spire")
    params = initial_draft(config, "spire", task, target[1], mesh)
    optimizer = make_optimizer(config.train, task)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = optimizer.init(params)
    for _ in range(2):  # the first step's rate is the warm-up's zero
        updates, state = jax.jit(optimizer.update)(zeros, state, params)
    assert float(jnp.abs(updates["memory_mix"]).max()) == 0
    for name in ("embedding", "norm_final", "blocks"):
        for update in jax.tree.leaves(updates[name]):
            assert float(jnp.abs(update).max()) > 0


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    config = experiment(steps=1000)
    rate = learning_rate(config.train, target_task(config))
    assert float(rate(0)) == 0
    assert float(rate(50)) == pytest.approx(1.5e-3)
    assert float(rate(100)) == pytest.approx(3e-3)
    assert float(rate(550)) == pytest.approx((3e-3 + 3e-4) / 2)
    assert float(rate(1000)) == pytest.approx(3e-4)


def test_acceptance_by_depth_is_a_mean_over_unmasked_tokens():
    metrics = by_depth({"alpha_sums": jnp.array([3.0, 1.0]), "alpha_counts": jnp.array([4, 2])})
    assert metrics["alpha_by_depth"].tolist() == [0.75, 0.5]


def poisoned(task):
    """The task with a loss of nan at step 19."""

    def loss(params, lesson, batch):
        values, alpha = task.loss(params, lesson, batch)
        bad = jnp.all(batch.tokens == arrays(18).tokens)
        return jnp.where(bad, jnp.nan, values), alpha

    return dataclasses.replace(task, loss=loss)


def test_a_loss_that_is_not_finite_stops_the_run(target, mesh, tmp_path):
    """The step and the examples are named; the last good checkpoint stays and can be restored."""
    task, _, _ = target
    config = experiment()

    with pytest.raises(TrainingError) as error:
        run(poisoned(task), config, mesh,
            lambda: init_params(task.model, jax.random.key(0), mesh), None, tmp_path,
            describe_example=lambda i: f"example {i}")  # fmt: skip
    message = str(error.value)
    assert "at step 19" in message and "last good checkpoint is step 16" in message
    assert "example 72; example 73; example 74; example 75" in message
    state = init_state(task, make_optimizer(config.train, task),
                       init_params(task.model, jax.random.key(0), mesh), mesh)  # fmt: skip
    with Checkpoints(tmp_path / "checkpoints", kept=2, identity={"of": "target"}) as checkpoints:
        counts = {"examples": np.int64(0), "logged": np.int64(0)}
        step, restored = checkpoints.restore({**state, **counts})
    assert (step, int(restored["examples"]), int(restored["logged"])) == (16, 64, 16)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored["params"]))


def test_lost_metrics_are_an_error(target, mesh, tmp_path):
    """Resuming never leaves a hole where records were."""
    task, _, folder = target
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "target.jsonl").unlink()
    config = experiment()
    with pytest.raises(MetricsError, match="is of step 0, not 24"):
        run(task, config, mesh, lambda: init_params(task.model, jax.random.key(0), mesh), None,
            tmp_path / "copy")  # fmt: skip


def test_bfloat16_trains(mesh, tmp_path):
    config = experiment(dtype="bfloat16")
    task = target_task(config)
    params = run(task, config, mesh, lambda: init_params(task.model, jax.random.key(0), mesh),
                 None, tmp_path)  # fmt: skip
    lines = records(tmp_path, "target")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


def test_a_seed_of_more_than_32_bits_starts_from_weights_of_its_own():
    seeds = (0, 2**32, 2**63, 2**64 - 1, 2**32 - 1)
    keys = {tuple(jax.random.key_data(stream_key(seed, "init target")).tolist()) for seed in seeds}
    assert len(keys) == len(seeds)

"""The training step and loop: accumulation, decay, schedules, the frozen target, divergence."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spire_jax import config as configs
from spire_jax import config_files
from spire_jax.checkpoints import Checkpoints
from spire_jax.data.pipeline import Batch
from spire_jax.metrics import MetricsError
from spire_jax.sharding import make_mesh
from spire_jax.train import (
    TrainBatch,
    TrainingError,
    by_depth,
    draft_task,
    init_params,
    init_state,
    initial_draft,
    learning_rate,
    loss_and_metrics,
    make_optimizer,
    target_task,
    train,
    train_step,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES: dict[str, dict] = {
    "target": {"n_layers": 2, "d_model": 16, "n_kv_heads": 2, "d_head": 8, "d_ff": 24},
    "drafts": {
        "spire": {"n_layers": 1, "window": 8},
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


def experiment(**train_values) -> configs.ExperimentConfig:
    values = SIZES | {"train": SIZES["train"] | train_values}
    return config_files.build(config_files.defaults(values))


@pytest.fixture(scope="module")
def mesh():
    mesh = make_mesh(configs.MeshConfig())
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
    with Checkpoints(folder / "checkpoints", kept=2, identity={"of": task.name}) as checkpoints:
        return train(task, config.train, mesh, initial, frozen, batches, checkpoints,
                     str(folder / f"{task.name}.jsonl"), **kwargs)  # fmt: skip


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


def test_one_forward_pass_of_the_target_per_batch(target, mesh, monkeypatch):
    """Traced once in the step, and not differentiated."""
    from spire_jax.models.transformer import Transformer

    calls = []
    original = Transformer._run

    def counted(self, *args, **kwargs):
        calls.append(self.config.n_layers)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Transformer, "_run", counted)
    config, (_, frozen, _) = experiment(), target
    task = draft_task(config, "spire")
    params = initial_draft(config, "spire", task, frozen, mesh)
    gradient = jax.grad(
        lambda p, f, batch: loss_and_metrics(task, task.loss, p, f, batch, 30)[0], argnums=(0, 1)
    )
    _, of_target = jax.jit(gradient)(params, frozen, arrays(0))
    assert calls == [2]
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(of_target))


@pytest.mark.parametrize("name", ["target", "spire"])
def test_accumulation_and_remat_change_nothing(name, target, mesh):
    """Micro-batches with different amounts of padding count by tokens, not by batch."""
    states, metrics = [], []
    for values in ({}, {"accumulate": 4}, {"remat": True}):
        config = experiment(**values)
        task = target_task(config) if name == "target" else draft_task(config, name)
        frozen = None if name == "target" else target[1]
        params = (init_params(task.model, jax.random.key(1), mesh) if name == "target"
                  else initial_draft(config, name, task, frozen, mesh))  # fmt: skip
        optimizer = make_optimizer(config.train, task)
        state = init_state(task, optimizer, params, mesh)
        for step in range(2):
            state, metric = train_step(task, config.train, optimizer, state, frozen, arrays(step))
        states.append(state["params"])
        metrics.append(metric)
    for other in states[1:]:
        for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
    for other in metrics[1:]:
        for key in metrics[0]:
            np.testing.assert_allclose(metrics[0][key], other[key], rtol=1e-4)


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


def test_a_loss_that_is_not_finite_stops_the_run(target, mesh, tmp_path):
    """The step and the examples are named; the last good checkpoint stays and can be restored."""
    task, _, _ = target
    config = experiment()

    def poisoned(params, frozen, batch):
        values, alpha = task.loss(params, frozen, batch)
        bad = jnp.all(batch.tokens == arrays(18).tokens)  # the batch of step 19
        return jnp.where(bad, jnp.nan, values), alpha

    broken = dataclasses.replace(task, loss=poisoned)
    with pytest.raises(TrainingError) as error:
        run(broken, config, mesh, lambda: init_params(task.model, jax.random.key(0), mesh), None,
            tmp_path, describe_example=lambda i: f"example {i}")  # fmt: skip
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

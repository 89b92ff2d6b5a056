"""A model's optimizer step as training dispatches it: tokens per second, share of the peak.

    python -m launch.bench.train_steps --config=configs/paper_67m.py --config.train.batch_size=32

Initial weights and random tokens. For the target, and for each draft behind the target's own pass,
it prints tokens per second and the FLOP/s over the device's peak; `--out=FILE` keeps them as JSON.
"""

import argparse
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from launch.bench.command_line import count
from launch.bench.timing import Run, interleaved, save
from spire_jax.config.files import command_line, ends_in_a_line
from spire_jax.config.paths import local_path
from spire_jax.config.schema import ExperimentConfig
from spire_jax.costs.hardware import describe, peak_flops
from spire_jax.data.pipeline import Batch
from spire_jax.models.sharding import make_mesh
from spire_jax.models.transformer import Params
from spire_jax.training.loop import init_state, make_optimizer, to_device, train_step
from spire_jax.training.tasks import (
    TrainBatch,
    draft_task,
    init_params,
    initial_draft,
    target_task,
    teach,
    teacher,
    trainable,
    with_shared,
)
from spire_jax.training.workdir import ERRORS

Step = Callable[[TrainBatch], None]


TARGET = "target"


def trained(config: ExperimentConfig) -> list[str]:
    """The target, and the drafts with parameters of their own."""
    return [TARGET, *(name for name, _ in config.drafts if name in config.trained)]


def measure(config: ExperimentConfig, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """What a step of each model reaches on the mesh in force, measured in turn."""
    mesh, train = jax.sharding.get_mesh(), config.train
    shape = (train.batch_size, train.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.target.n_tokens, (2, *shape), np.int32)
    mask, examples = np.ones(shape, bool), np.arange(train.batch_size)
    batch = to_device(Batch(tokens[0], tokens[1], mask, examples), mesh)
    steps = training_steps(config, mesh, names)
    seconds = interleaved({n: functools.partial(step, batch) for n, step in steps.items()}, repeats)
    peak, source = peak_flops(train.dtype)
    found = []
    for name, value in seconds.items():
        rate, flops = np.prod(shape) / value, flops_per_token(config, name)
        found.append({
            "model": name, "batch": shape[0], "length": shape[1], "tokens/s": float(rate),
            "GFLOP/token": flops / 1e9, "of peak": float(rate * flops / (peak * mesh.size)),
            "peak": source,
        })  # fmt: skip
    return found


def flops_per_token(config: ExperimentConfig, name: str) -> float:
    """Of a step, with the target's pass where a draft learns from it."""
    task = target_task(config) if name == TARGET else draft_task(config, name)
    taught = 0.0 if task.reads is None else teacher(config, [task]).pass_flops(config.train.seq_len)
    return task.flops_per_token + taught


def training_steps(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, names: Collection[str]
) -> dict[str, Step]:
    """name -> one optimizer step of the target, or of a draft behind the target's own pass.

    Each takes a batch on the mesh in force and returns when the step is done.
    """
    key, steps = jax.random.key(0), {}
    frozen = init_params(target_task(config).model, key, mesh)
    for name in names:
        if name == TARGET:
            # The step donates what it trains: a second copy.
            task = target_task(config)
            steps[name] = _step(config, task, init_params(task.model, key, mesh), None, mesh)
        else:
            task = draft_task(config, name)
            params = initial_draft(config, name, task, frozen, mesh)
            steps[name] = _step(config, task, params, frozen, mesh)
    return steps


def _step(config: ExperimentConfig, task, params: Params, frozen: Params, mesh) -> Step:
    optimizer = make_optimizer(config.train, task)
    params, fixed = trainable(task, with_shared(task, params, frozen))
    copy = jax.tree.map(lambda x: x.copy(), params)  # some are the target's own arrays
    state = init_state(task, optimizer, copy, mesh)
    taught_by = None if task.reads is None else teacher(config, [task])

    def run(batch: TrainBatch) -> None:
        nonlocal state
        lesson = None if taught_by is None else teach(taught_by, frozen, batch)
        state, metrics = train_step(task, config.train, optimizer, state, lesson, batch, fixed)
        jax.block_until_ready(metrics)

    return run


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one model after another; print a line for each, and keep it."""
    parser = argparse.ArgumentParser("python -m launch.bench.train_steps", None,
                                     __doc__.split("\n", 1)[0])  # fmt: skip
    parser.add_argument("--repeats", type=count, default=10, help="timed steps of each model")
    parser.add_argument("--out", type=local_path, help="a JSON file for all figures")
    args, config = command_line(parser, argv)
    print(" | ".join(describe().values()))
    run = Run(jax.devices()[0].platform)
    if args.out:
        run.keep = lambda: save(args.out, {"machine": describe(), "figures": run.records})
    with jax.set_mesh(make_mesh(config.mesh)):
        for name in trained(config):
            _attempt(run, config, name, args.repeats)


def _attempt(run: Run, config: ExperimentConfig, name: str, repeats: int) -> None:
    run.attempt({"model": name}, lambda: measure(config, [name], repeats)[0])


if __name__ == "__main__":
    with ends_in_a_line(*ERRORS):
        main()

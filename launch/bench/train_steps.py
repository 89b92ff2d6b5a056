"""A model's optimizer step as training dispatches it, for the benchmarks; initial weights."""

from collections.abc import Callable

import jax

from spire_jax.config.schema import ExperimentConfig
from spire_jax.models.transformer import Params
from spire_jax.training.loop import init_state, make_optimizer, train_step
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

Step = Callable[[TrainBatch], None]


def training_steps(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> dict[str, Step]:
    """name -> one optimizer step of the target, and of each draft behind the target's own pass.

    Each takes a batch on the mesh in force and returns when the step is done.
    """
    task = target_task(config)
    key = jax.random.key(0)
    frozen = init_params(task.model, key, mesh)
    # The step donates what it trains: the target's own is a second copy.
    steps = {"target": _step(config, task, init_params(task.model, key, mesh), None, mesh)}
    for name in config.trained:
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

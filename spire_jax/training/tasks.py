"""What is trained: the target on text, drafts on what the target says of it.

A task is a model and a loss that maps a batch, and the lesson of the frozen target on it, to
per-token values. Tasks are compared by value: equal ones share a compiled step.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from spire_jax.config.drafts import TrainedOptions
from spire_jax.config.schema import ExperimentConfig, head_size
from spire_jax.drafting.build import compute_for, strategy, target_model
from spire_jax.drafting.learning import DraftLoss, Lesson, Loss, TrainBatch
from spire_jax.drafting.strategy import Strategy
from spire_jax.models.masks import View
from spire_jax.models.sampling import seed_keys, seed_words, stream
from spire_jax.models.sharding import constrain, replicated, shardings
from spire_jax.models.transformer import Model, Params

FIXED = ("head_ids",)  # a model's own parameters that no gradient reaches


@dataclasses.dataclass(frozen=True)
class Task:
    """What to train; hashable, so that the compiled step is shared between runs in a process."""

    name: str = dataclasses.field(compare=False)  # drafts that differ in name alone share a step
    model: Model
    loss: Loss
    steps: int
    peak_lr: float
    flops_per_token: float  # of one training step, forward and backward, without the target's
    shared: tuple[str, ...] = ()  # top-level parameters that are the target's own, frozen
    k: int = 1  # depths of rollouts; 1 = none
    strategy: Strategy | None = None  # says which token has which depth; None: t, t + k, ... one
    reads: tuple[int, ...] | None = None  # the y^l of its lessons; None: it needs no lesson
    reads_cache: tuple[int, ...] = ()  # the layers (from 0) of the target's cache, in its lessons


def trainable(task: Task, params: Params) -> tuple[Params, Params]:
    """A model's parameters as those that are trained, and the others: fixed or the target's."""
    others = {*task.shared, *FIXED}
    return ({name: value for name, value in params.items() if name not in others},
            {name: value for name, value in params.items() if name in others})  # fmt: skip


def with_shared(task: Task, params: Params, target: Params) -> Params:
    """A draft's own parameters and those of the target that it shares (the same arrays)."""
    # A tied target has one table where others have two.
    return {**params, **{name: target[name] for name in task.shared if name in target}}


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The frozen target's side of a training step: one pass per batch for all drafts."""

    model: Model
    collect: tuple[int, ...]
    collect_cache: tuple[int, ...] = ()

    def pass_flops(self, seq_len: int) -> float:
        """FLOPs per token."""
        return forward_flops(self.model, seq_len)


def init_params(model: Model, key: jax.Array, mesh: Mesh) -> Params:
    """Fresh parameters, created where they live on the mesh."""
    return jax.jit(model.init, out_shardings=shardings(mesh, model.axes()))(key)


def target_task(config: ExperimentConfig) -> Task:
    """The target on the hard target."""
    model, train = target_model(config, compute_for(config.train, config.train)), config.train
    flops = 3 * forward_flops(model, train.seq_len)
    loss = DraftLoss(Strategy(model), "hard")
    return Task("target", model, loss, train.steps, train.peak_lr, flops)


def draft_task(config: ExperimentConfig, name: str) -> Task:
    """The draft called `name`.

    One that needs no lessons (vanilla, hard target) has its acceptance measured at logged steps.
    """
    train, draft = config.train, config.draft(name).filled(config.train)
    assert isinstance(draft, TrainedOptions)  # of `config.trained`
    drafting, depths = strategy(config, name, compute_for(train, train)), draft.rollout(train)
    taught = drafting.collect or depths or draft.loss != "hard"
    views = config.target.views()
    reads = tuple(views[i] for i in drafting.collect_cache)
    # What reads the target's keys and values makes none of its activations.
    flops = forward_flops(drafting.model, train.seq_len, depths > 0 and not reads, reads)
    times = max(depths, 1) if draft.every_start else 1
    beside = draft.products(config.target, depths or 1)
    return Task(
        name,
        drafting.model,
        draft.learns(drafting, depths or 1),
        draft.steps,
        draft.peak_lr,
        3 * (times * flops + 2 * beside),
        shared=draft.shared,
        k=depths or 1,
        strategy=drafting,
        reads=drafting.collect if taught else None,
        reads_cache=drafting.collect_cache,
    )


def teacher(config: ExperimentConfig, tasks: Sequence[Task]) -> Teacher:
    """The target's pass for drafts that are trained together: all that any of them reads."""
    collect = sorted({layer for task in tasks for layer in task.reads or ()})
    cached = sorted({layer for task in tasks for layer in task.reads_cache})
    model = target_model(config, compute_for(config.train, config.train))
    return Teacher(model, tuple(collect), tuple(cached))


@functools.partial(jax.jit, static_argnums=0)
def teach(teacher: Teacher, params: Params, batch: TrainBatch) -> Lesson:
    """The target's pass over a batch."""
    tokens = constrain(batch.tokens, "batch", None)
    module, keys_values = teacher.model.bind(params), {}
    if teacher.collect_cache:
        last = module.config.n_layers
        activations, cached = module.prefill(tokens, (*teacher.collect, last))
        logits, activations = module.unembed(activations[-1]), activations[:-1]
        keys_values = {i: cached[i] for i in teacher.collect_cache}
    else:
        logits, activations = module.forward(tokens, teacher.collect)
    by_layer = dict(zip(teacher.collect, activations, strict=True))
    return Lesson(jax.nn.softmax(logits), by_layer, keys_values)


def initial_draft(
    config: ExperimentConfig,
    name: str,
    task: Task,
    target_params: Params,
    mesh: Mesh,
    frequent: Callable[[int], np.ndarray] = np.arange,
) -> Params:
    """A draft's parameters before training: random, or of the target's (`TrainedOptions.initial`).

    Those that it shares with the target are left out. Where the head is trimmed, `frequent` says
    which n tokens it keeps, ascending.
    """
    params = init_params(task.model, stream_key(config.seed, f"init {name}"), mesh)
    if task.model.config.head_tokens:
        ids = frequent(task.model.config.head_tokens).astype(np.int32)
        params["head_ids"] = jax.device_put(ids, replicated(mesh))
    own = {name: value for name, value in params.items() if name not in task.shared}
    axes = {name: value for name, value in task.model.axes().items() if name in own}
    initial = config.trained[name].initial
    return jax.jit(initial, out_shardings=shardings(mesh, axes))(target_params, own)


def stream_key(seed: int, name: str) -> jax.Array:
    """A named random key of the experiment."""
    return stream(seed_keys(seed_words(seed)[None]), name)[0]


def forward_flops(
    model: Model, seq_len: int, rolled_out: bool = False, of_target: Sequence[View] = ()
) -> float:
    """Matrix-product FLOPs per token of a forward pass over sequences of `seq_len`.

    Weights count 2 each (the embedding is a look-up), those that make keys and values twice in a
    rollout, of the target's activations too; attention 4 per query head, head dimension and visible
    key, to those of the target's layers under `of_target` too.
    """
    c = model.config
    weights = c.body_parameters()
    if rolled_out:
        weights += 2 * 2 * c.n_layers * c.d_model * c.n_kv_heads * c.d_head
    everything = (seq_len + 1) / 2
    visible = sum((min(everything, view.window + view.sink) if view.window else everything
                   for view in (*model.views, *of_target)), start=0.0)  # fmt: skip
    attention = 4 * c.n_kv_heads * c.q_per_kv * c.d_head * visible
    return float(2 * (weights + c.d_model * head_size(c)) + attention)

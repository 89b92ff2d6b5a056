"""One training loop and one step for the target and every draft; the loss is the argument.

A task says what is trained: a model, the frozen parameters that it reads, and a loss that maps a
batch to per-token values. The step is pure; the loop feeds it, reads its metrics one step late
so that the device never waits for the host, and checkpoints.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from spire_jax import losses
from spire_jax.checkpoints import Checkpoints
from spire_jax.config import ExperimentConfig, TrainConfig
from spire_jax.data.pipeline import Batch
from spire_jax.drafting.build import compute_for, strategy, target_model
from spire_jax.hardware import peak_flops
from spire_jax.metrics import MetricsLog, Progress
from spire_jax.models.pruning import prune
from spire_jax.models.spire import SpireDraft
from spire_jax.models.transformer import Model, Params
from spire_jax.sampling import stream
from spire_jax.sharding import batch_sharding, constrain, replicated, shardings


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what is left."""


class TrainBatch(NamedTuple):
    """What a loss sees of a batch, on the device."""

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]  # the token after each
    mask: Bool[Array, "B T"]  # False on padding


# Per-token loss in nats, and acceptance alpha where the target's distribution is at hand.
LossFn = Callable[[Params, Params, TrainBatch], tuple[Float[Array, "B T"], Any]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What to train; hashable, so that the compiled step is shared between runs in a process."""

    name: str
    model: Model
    loss: LossFn
    steps: int
    peak_lr: float
    flops_per_token: float  # of one training step, forward and backward, frozen parts included
    depths: int = 1  # tokens t, t + k, ... of a sequence share a depth; 1 = no depths
    monitor: LossFn | None = None  # acceptance for a loss that has none, at logged steps only


def init_params(model: Model, key: jax.Array, mesh: Mesh) -> Params:
    """Fresh parameters, created where they live on the mesh."""
    return jax.jit(model.init, out_shardings=shardings(mesh, model.axes()))(key)


# --- the tasks ---------------------------------------------------------------------------------


def target_task(config: ExperimentConfig) -> Task:
    """The target on the hard target."""
    model = target_model(config, compute_for(config.train, config.train))

    def loss(params, frozen, batch):
        logits, _ = model.bind(params).forward(batch.tokens)
        return losses.cross_entropy(logits, batch.targets), None

    train = config.train
    flops = 3 * forward_flops(model, train.seq_len)
    return Task("target", model, loss, train.steps, train.peak_lr, flops)


def draft_task(config: ExperimentConfig, name: str) -> Task:
    """The draft called `name`; frozen parameters are the target's.

    One forward pass of the target per batch serves memories, distillation and acceptance. A
    draft that needs none of them (vanilla, hard target) has its acceptance measured at logged
    steps only.
    """
    draft, train = config.draft(name), config.train
    compute = compute_for(train, train)
    target, drafting = target_model(config, compute), strategy(config, name, compute)
    starts = np.arange(0, train.seq_len, train.k)

    def per_token(params, frozen, batch, with_target: bool):
        target_logits, activations = None, ()
        if with_target:
            target_logits, activations = jax.lax.stop_gradient(
                target.bind(frozen).forward(batch.tokens, drafting.collect)
            )
        if draft.kind == "spire":
            module = drafting.model.bind(params)
            logits = module.rollout(batch.tokens, activations, starts, train.k)
            logits = logits.reshape(*batch.tokens.shape, -1)
        else:
            logits, _ = drafting.model.bind(params).forward(batch.tokens)
        loss = losses.draft_loss(draft.loss, draft.omega, target_logits, logits, batch.targets)
        alpha = None if target_logits is None else losses.acceptance(target_logits, logits)
        return loss, alpha

    with_target = draft.kind == "spire" or draft.loss != "hard"
    flops = 3 * forward_flops(drafting.model, train.seq_len)
    flops += forward_flops(target, train.seq_len) if with_target else 0
    return Task(
        name,
        drafting.model,
        functools.partial(per_token, with_target=with_target),
        draft.steps or train.steps,
        draft.peak_lr or train.peak_lr,
        flops,
        depths=train.k if draft.kind == "spire" else 1,
        monitor=None if with_target else functools.partial(per_token, with_target=True),
    )


def initial_draft(
    config: ExperimentConfig, name: str, task: Task, target_params: Params, mesh: Mesh
) -> Params:
    """A draft's parameters before training: random, or pruned from the target."""
    params = init_params(task.model, stream_key(config.seed, f"init {name}"), mesh)
    if config.draft(name).init == "random":
        return params
    placed = jax.jit(prune, out_shardings=shardings(mesh, task.model.axes()))
    return placed(target_params, params)


def stream_key(seed: int, name: str) -> jax.Array:
    """A named random key of the experiment."""
    return stream(jax.random.key(seed)[None], name)[0]


def forward_flops(model: Model, seq_len: int) -> float:
    """Matrix-product FLOPs per token of a forward pass over sequences of `seq_len`.

    Weights count 2 each (the embedding is a look-up), a SPIRe draft's second key/value
    projection included; attention 4 per query head, head dimension and visible key.
    """
    c = model.config
    shapes = model.shapes()
    weights = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes["blocks"]))
    if issubclass(model.module, SpireDraft):
        weights += 2 * 2 * c.n_layers * c.d_model * c.n_kv_heads * c.d_head
    visible = (seq_len + 1) / 2
    if c.window:
        visible = min(visible, float(c.window + c.sink))
    attention = 4 * c.n_layers * c.n_kv_heads * c.q_per_kv * c.d_head * visible
    return 2 * (weights + c.d_model * c.vocab_size) + attention


# --- the step ----------------------------------------------------------------------------------


def learning_rate(train: TrainConfig, task: Task) -> optax.Schedule:
    """Linear warm-up, then cosine to a fraction of the peak (method.md section 2)."""
    warmup = round(train.warmup_fraction * task.steps)
    peak = task.peak_lr
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, task.steps, train.final_lr_fraction * peak
    )


def make_optimizer(train: TrainConfig, task: Task) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping; weight decay on every leaf but SPIRe's memory mix."""

    def decays(params: Params) -> Any:
        return {name: jax.tree.map(lambda _, n=name: n != "memory_mix", leaf)
                for name, leaf in params.items()}  # fmt: skip

    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(
            learning_rate(train, task),
            b1=train.b1,
            b2=train.b2,
            eps=train.eps,
            weight_decay=train.weight_decay,
            mask=decays,
        ),
    )


def init_state(task: Task, optimizer: optax.GradientTransformation, params: Params, mesh: Mesh):
    """Parameters, optimizer state and step, sharded alike."""
    of_params = shardings(mesh, task.model.axes())
    whole = replicated(mesh)
    of_optimizer = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        of_params,
        transform_non_params=lambda _: whole,
    )
    return {
        "params": jax.device_put(params, of_params),
        "opt_state": jax.jit(optimizer.init, out_shardings=of_optimizer)(params),
        "step": jax.device_put(jnp.zeros((), jnp.int32), whole),
    }


def loss_and_metrics(
    task: Task, loss: LossFn, params: Params, frozen: Params, batch: TrainBatch, count
):
    """The mean loss over `count` tokens (this batch's share of it), and metrics likewise."""
    values, alpha = loss(params, frozen, batch)
    mean = jnp.sum(jnp.where(batch.mask, values, 0.0)) / count
    metrics = {"loss": mean}
    if alpha is not None:
        alpha = jnp.where(batch.mask, alpha, 0.0)
        metrics["alpha"] = jnp.sum(alpha) / count
        if task.depths > 1:
            by_depth = alpha.reshape(-1, task.depths), batch.mask.reshape(-1, task.depths)
            metrics["alpha_sums"], metrics["alpha_counts"] = (x.sum(axis=0) for x in by_depth)
    return mean, metrics


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def train_step(task: Task, train: TrainConfig, optimizer, state, frozen: Params, batch: TrainBatch):
    """One optimizer step over `train.accumulate` micro-batches; `state` is donated."""
    batch = TrainBatch(*(constrain(x, "batch", None) for x in batch))
    count = jnp.maximum(jnp.sum(batch.mask), 1)
    gradient = jax.grad(
        lambda params, micro: loss_and_metrics(task, task.loss, params, frozen, micro, count),
        has_aux=True,
    )
    if train.accumulate == 1:
        grads, metrics = gradient(state["params"], batch)
    else:
        # Micro-batch i takes rows i, i + n, ...: each device keeps its own rows.
        n = train.accumulate
        micros = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)
        shape = jax.eval_shape(gradient, state["params"], jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)

        def add(total, micro):
            micro = TrainBatch(*(constrain(x, "batch", None) for x in micro))
            return jax.tree.map(jnp.add, total, gradient(state["params"], micro)), None

        (grads, metrics), _ = jax.lax.scan(add, zeros, micros)
    metrics = by_depth(metrics)
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = learning_rate(train, task)(state["step"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics


def by_depth(metrics: dict[str, Array]) -> dict[str, Array]:
    """Sums and counts of alpha by depth, as means."""
    if "alpha_sums" in metrics:
        sums, counts = metrics.pop("alpha_sums"), metrics.pop("alpha_counts")
        metrics["alpha_by_depth"] = sums / jnp.maximum(counts, 1)
    return metrics


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluate_batch(task: Task, loss: LossFn, params: Params, frozen: Params, batch: TrainBatch):
    """Metrics of one batch without a step."""
    count = jnp.maximum(jnp.sum(batch.mask), 1)
    _, metrics = loss_and_metrics(task, loss, params, frozen, batch, count)
    return by_depth(metrics)


# --- the loop ----------------------------------------------------------------------------------


def to_device(batch: Batch, mesh: Mesh) -> TrainBatch:
    """This process's rows of a batch as global arrays, rows over data and fsdp."""
    sharding = batch_sharding(mesh)
    return TrainBatch(
        *(
            jax.make_array_from_process_local_data(sharding, np.asarray(x))
            for x in (batch.tokens_BxT, batch.targets_BxT, batch.mask_BxT)
        )
    )


def train(
    task: Task,
    config: TrainConfig,
    mesh: Mesh,
    initial: Callable[[], Params],
    frozen: Params,
    batches: Callable[[int], Iterator[Batch]],
    checkpoints: Checkpoints,
    metrics_path: str,
    describe_example: Callable[[int], str] = str,
) -> Params:
    """Train `task` to its last step, from the newest checkpoint if there is one.

    Args:
        initial: makes the parameters before step 1.
        frozen: the target's parameters for a draft, None for the target.
        batches: batches from a global count of consumed examples on; the only data state.
        describe_example: where in the data an example is from, for error messages.

    Raises:
        TrainingError: a loss or gradient that is not finite; names the step, the examples and
            the last good checkpoint.
        MetricsError: metrics that the checkpoint goes with are gone.
    """
    optimizer = make_optimizer(config, task)
    state = init_state(task, optimizer, initial(), mesh)
    done, examples, logged = 0, 0, 0  # logged: step of the last record of the metrics
    restored = checkpoints.restore({**state, "examples": np.int64(0), "logged": np.int64(0)})
    if restored is not None:
        done, state = restored
        examples, logged = int(state.pop("examples")), int(state.pop("logged"))
    peak, _ = peak_flops(config.dtype)
    peak *= mesh.size
    pending: tuple[int, Batch, dict[str, Array]] | None = None
    stopwatch = _Stopwatch()

    with (
        MetricsLog(metrics_path, resume_step=done, expected_last=logged) as log,
        Progress(task.name, total=task.steps, start=done) as progress,
    ):

        def read(step: int, batch: Batch, metrics: dict[str, Array]) -> None:
            nonlocal logged
            values = {name: np.asarray(x) for name, x in metrics.items()}
            if not all(np.isfinite(values[name]).all() for name in ("loss", "grad_norm")):
                raise TrainingError(_diverged(task, step, batch, values, checkpoints,
                                              describe_example))  # fmt: skip
            speed = stopwatch.steps_per_s(step)
            speed = speed and speed * config.batch_size * config.seq_len
            progress.update(step, loss=float(values["loss"]), tokens_per_s=speed)
            if step % config.log_every and step != task.steps:
                return
            stopwatch.mark(step)
            record = {"step": step, "examples": step * config.batch_size}
            record["tokens"] = record["examples"] * config.seq_len
            record |= {name: x.tolist() for name, x in values.items()}
            share = speed * task.flops_per_token / peak if speed else None
            log.write(record | {"tokens_per_s": speed, "peak_share": share})
            logged = step

        for batch in batches(examples) if done < task.steps else ():
            device_batch = to_device(batch, mesh)
            monitored = {}
            if task.monitor is not None and ((done + 1) % config.log_every == 0):
                monitored = evaluate_batch(
                    task, task.monitor, state["params"], frozen, device_batch
                )
            state, metrics = train_step(task, config, optimizer, state, frozen, device_batch)
            done, examples = done + 1, examples + config.batch_size
            if pending is not None:
                read(*pending)
            pending = (done, batch, {**monitored, **metrics})
            last = done == task.steps
            if last or done % config.checkpoint_every == 0:
                # A checkpoint stands only behind a loss that was read, and a metrics file that
                # is on the disk.
                read(*pending)
                pending = None
                log.sync()
                counts = {"examples": np.int64(examples), "logged": np.int64(logged)}
                checkpoints.save(done, {**state, **counts})
            if last:
                break
        checkpoints.wait()
    return state["params"]


class _Stopwatch:
    """Steps per second since the last mark; the first step, which compiles, is left out."""

    def __init__(self):
        self.begin: tuple[int, float] | None = None

    def steps_per_s(self, step: int) -> float | None:
        if self.begin is None:
            self.mark(step)
            return None
        return (step - self.begin[0]) / (time.perf_counter() - self.begin[1])

    def mark(self, step: int) -> None:
        self.begin = (step, time.perf_counter())


def _diverged(task, step, batch, values, checkpoints, describe_example) -> str:
    names = [describe_example(int(i)) for i in batch.example_B]
    steps = checkpoints.steps()
    kept = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint"
    return (
        f"{task.name}: loss {float(values['loss'])} and gradient norm "
        f"{float(values['grad_norm'])} at step {step} are not both finite; {kept}; lower the "
        f"peak learning rate or look at the examples: {'; '.join(names[:8])}"
        + (f"; and {len(names) - 8} more" if len(names) > 8 else "")
    )

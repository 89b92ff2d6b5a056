"""One training loop and one step for the target and any number of drafts; the loss is the argument.

The step is pure. The loop takes each batch to the target once and from
there to every draft in turn, so that drafts trained together see the same batches in the same order
and each ends with the parameters that it would have alone. It reads metrics one step late, so that
the device never waits for the host, and checkpoints.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from spire_jax.config.schema import TrainConfig
from spire_jax.costs.hardware import peak_flops
from spire_jax.data.pipeline import Batch
from spire_jax.models.sharding import batch_sharding, constrain, replicated, shardings
from spire_jax.models.transformer import Params
from spire_jax.storage.checkpoints import Checkpoints
from spire_jax.storage.metrics import MetricsLog, Progress
from spire_jax.storage.paths import Place
from spire_jax.storage.processes import Preempted, stop_requests, to_host
from spire_jax.training.tasks import (
    Lesson,
    Task,
    Teacher,
    TrainBatch,
    teach,
    trainable,
    with_shared,
)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what is left."""


# --- the step ----------------------------------------------------------------------------------


def learning_rate(train: TrainConfig, task: Task) -> optax.Schedule:
    """Linear warm-up, then cosine to a fraction of the peak (method.md section 2)."""
    warmup = round(train.warmup_fraction * task.steps)
    peak = task.peak_lr
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, task.steps, train.final_lr_fraction * peak
    )


@functools.lru_cache(maxsize=64)
def make_optimizer(train: TrainConfig, task: Task) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping; weight decay on every leaf but SPIRe's memory mix.

    The same object for the same settings, on which the compiled step depends.
    """

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
    """Trained parameters, optimizer state and step, sharded alike."""
    of_params = shardings(mesh, trainable(task, task.model.axes())[0])
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


def loss_and_metrics(task: Task, params: Params, lesson: Lesson | None, batch: TrainBatch, count):
    """The mean loss over `count` tokens (this batch's share of it), and metrics likewise."""
    values, alpha = task.loss(params, lesson, batch)
    mean = jnp.sum(jnp.where(batch.mask, values, 0.0)) / count
    metrics = {"loss": mean}
    if alpha is not None:
        alpha = jnp.where(batch.mask, alpha, 0.0)
        metrics["alpha"] = jnp.sum(alpha) / count
        if task.k > 1:
            whole = alpha.shape[1] - alpha.shape[1] % task.k
            by_depth = (x[:, :whole].reshape(-1, task.k) for x in (alpha, batch.mask))
            metrics["alpha_sums"], metrics["alpha_counts"] = (x.sum(axis=0) for x in by_depth)
    return mean, metrics


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def train_step(
    task: Task,
    train: TrainConfig,
    optimizer,
    state,
    lesson: Lesson | None,
    batch: TrainBatch,
    fixed: Params = None,
):
    """One optimizer step over `train.accumulate` micro-batches; `state` is donated.

    `fixed` are the model's parameters that are not trained, if there are any.
    """
    fixed = fixed or {}
    batch = TrainBatch(*(constrain(x, "batch", None) for x in batch))
    count = jnp.maximum(jnp.sum(batch.mask), 1)
    gradient = jax.grad(
        lambda params, *micro: loss_and_metrics(
            task, {**params, **fixed}, micro[0], micro[1], count
        ),
        has_aux=True,
    )
    if train.accumulate == 1:
        grads, metrics = gradient(state["params"], lesson, batch)
    else:
        # Micro-batch i takes rows i, i + n, ...: each device keeps its own rows.
        n = train.accumulate
        micros = jax.tree.map(
            lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), (lesson, batch)
        )
        shape = jax.eval_shape(gradient, state["params"], *jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)

        def add(total, micro):
            of_lesson, of_batch = micro
            if of_lesson is not None:
                p = constrain(of_lesson.p, "batch", None, "vocab")
                ys = of_lesson.activations.items()
                of_lesson = Lesson(p, {y: constrain(x, "batch", None, None) for y, x in ys})
            of_batch = TrainBatch(*(constrain(x, "batch", None) for x in of_batch))
            new = gradient(state["params"], of_lesson, of_batch)
            return jax.tree.map(jnp.add, total, new), None

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


@functools.partial(jax.jit, static_argnums=0)
def evaluate_batch(task: Task, params: Params, lesson: Lesson | None, batch: TrainBatch):
    """Metrics of one batch without a step."""
    count = jnp.maximum(jnp.sum(batch.mask), 1)
    _, metrics = loss_and_metrics(task, params, lesson, batch, count)
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


class Learner:
    """One model in training: its state, its place in the data, its metrics and checkpoints.

    Args:
        initial: makes the parameters before step 1, without those shared with the target.
        shared: the target's parameters by name; those of `task.shared` are used.
        events: a folder for TensorBoard's copy of the metrics; None = none.
        checkpoints: holds the newest checkpoint, from which training goes on.

    Raises:
        MetricsError: metrics that the checkpoint goes with are gone.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        mesh: Mesh,
        initial: Callable[[], Params],
        checkpoints: Checkpoints,
        metrics_path: Place,
        shared: Params = None,
        events: Place | None = None,
    ):
        self.task, self._config, self._checkpoints = task, config, checkpoints
        self._optimizer = make_optimizer(config, task)
        params, self._own_fixed = trainable(task, initial())
        self._fixed = with_shared(task, self._own_fixed, shared)
        self.state = init_state(task, self._optimizer, params, mesh)
        self.done = logged = 0  # logged: step of the last record of the metrics
        counts = {"examples": np.int64(0), "logged": np.int64(0)}
        restored = checkpoints.restore({**self.state, **self._kept(), **counts})
        if restored is not None:
            self.done, self.state = restored
            self._own_fixed = self.state.pop("fixed", {})
            self._fixed = with_shared(task, self._own_fixed, shared)
            del self.state["examples"]  # steps x batch
            logged = int(self.state.pop("logged"))
        self._logged = logged
        self._log = MetricsLog(metrics_path, self.done, logged, events)
        self._pending: list[tuple[int, Batch, dict[str, Array]]] = []

    def __enter__(self) -> "Learner":
        self._log.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._log.__exit__(*error)

    def _kept(self) -> dict[str, Params]:
        """The fixed parameters, in a checkpoint: the columns of a head go with its ids."""
        return {"fixed": self._own_fixed} if self._own_fixed else {}

    @property
    def params(self) -> Params:
        """The model's own parameters, trained and fixed, without those of the target."""
        return {**self.state["params"], **self._own_fixed}

    @property
    def finished(self) -> bool:
        return self.done >= self.task.steps

    def needs_lesson(self, logged: bool) -> bool:
        """Whether the next step reads what the target says; `logged`: it is a logged step."""
        return self.task.reads is not None or logged

    def step(self, batch: Batch, device_batch: TrainBatch, lesson: Lesson | None, logged: bool):
        """Dispatch one step; its metrics are for `read`."""
        task, monitored = self.task, {}
        if task.reads is None:
            if logged and lesson is not None:  # acceptance, which its own loss does not tell
                params = {**self.state["params"], **self._fixed}
                monitored = evaluate_batch(task, params, lesson, device_batch)
            lesson = None
        elif lesson is not None:  # others' layers are no argument of this one's compiled step
            lesson = Lesson(lesson.p, {y: lesson.activations[y] for y in task.reads})
        self.state, metrics = train_step(
            task, self._config, self._optimizer, self.state, lesson, device_batch, self._fixed
        )
        self.done += 1
        self._pending.append((self.done, batch, {**monitored, **metrics}))

    def read(
        self, keep: int, speed: "_Speed", describe_example: Callable[[int], str]
    ) -> float | None:
        """Check the metrics of all but the last `keep` steps, record logged ones; the loss."""
        loss = None
        while len(self._pending) > keep:
            step, batch, metrics = self._pending.pop(0)
            values = {name: to_host(x) for name, x in metrics.items()}
            loss = float(values["loss"])
            if not all(np.isfinite(values[name]).all() for name in ("loss", "grad_norm")):
                raise TrainingError(_diverged(self.task, step, batch, values, self._checkpoints,
                                              describe_example))  # fmt: skip
            if step % self._config.log_every and step != self.task.steps:
                continue
            record: dict[str, Any] = {"step": step, "examples": step * self._config.batch_size}
            record["tokens"] = record["examples"] * self._config.seq_len
            record |= {name: x.tolist() for name, x in values.items()}
            record |= {"tokens_per_s": speed.tokens_per_s, "peak_share": speed.peak_share}
            record |= {"data_wait_share": speed.data_wait_share}
            self._log.write(record)
            self._logged = step
        return loss

    def settle(self, keep: int) -> None:
        """Return when all but the last `keep` steps are done."""
        jax.block_until_ready([metrics for *_, metrics in self._pending[: -keep or None]])

    def save(self) -> None:
        """Checkpoint: behind a loss that was read, and metrics that are on the disk."""
        self._log.sync()
        examples = np.int64(self.done * self._config.batch_size)
        counts = {"examples": examples, "logged": np.int64(self._logged)}
        self._checkpoints.save(self.done, {**self.state, **self._kept(), **counts})

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk."""
        self._checkpoints.wait()


def train(
    learners: Sequence[Learner],
    config: TrainConfig,
    mesh: Mesh,
    teacher: Teacher | None,
    frozen: Params,
    batches: Callable[[int], Iterator[Batch]],
    describe_example: Callable[[int], str] = str,
) -> None:
    """Train every learner to its last step, on the same batches; one pass of the target for all.

    Learners that an interruption left at different steps are brought level first.

    Args:
        teacher, frozen: the target of drafts, and its parameters; None for the target itself.
        batches: batches from a global count of consumed examples on; the only data state.
        describe_example: where in the data an example is from, for error messages.

    Raises:
        TrainingError: a loss or gradient that is not finite; names the step, the examples and
            the last good checkpoint.
        Preempted: SIGTERM came; a checkpoint of the step that was under way is on the disk.
    """
    total = max(learner.task.steps for learner in learners)
    at = min((learner.done for learner in learners if not learner.finished), default=total)
    names = [learner.task.name for learner in learners]
    title = names[0] if len(names) == 1 else f"{len(names)} drafts"
    peak = peak_flops(config.dtype)[0] * mesh.size
    speed = _Speed(config.batch_size * config.seq_len, peak)
    with Progress(title, total=total, start=at) as progress, stop_requests() as stop_requested:
        dispatched: list[float] = []  # FLOPs per token of each step that is not read yet

        def read(keep: int) -> None:
            for learner in learners:
                learner.settle(keep)
            while len(dispatched) > keep:
                speed.add(dispatched.pop(0))
            losses = [learner.read(keep, speed, describe_example) for learner in learners]
            found = [loss for loss in losses if loss is not None]
            if found:
                mean = sum(found) / len(found)
                progress.update(at - keep, loss=mean, tokens_per_s=speed.tokens_per_s)
                if (at - keep) % config.log_every == 0:
                    speed.mark()

        for batch in speed.waits_for(batches(at * config.batch_size)) if at < total else ():
            active = [x for x in learners if x.done == at and not x.finished]
            logged = (at + 1) % config.log_every == 0
            device_batch, lesson = to_device(batch, mesh), None
            flops = sum(x.task.flops_per_token for x in active)
            if teacher is not None and any(x.needs_lesson(logged) for x in active):
                lesson = teach(teacher, frozen, device_batch)
                flops += teacher.pass_flops(config.seq_len)
            for learner in active:
                learner.step(batch, device_batch, lesson, logged)
            at += 1
            dispatched.append(flops)
            read(keep=1)
            stop = stop_requested()
            saving = [x for x in active if x.finished or stop or at % config.checkpoint_every == 0]
            if saving:
                read(keep=0)
                for learner in saving:
                    learner.save()
            if at == total or stop:
                break
        for learner in learners:
            learner.wait()
        if at < total:
            raise Preempted(f"stopped by SIGTERM after step {at} of {total}, which is saved")


class _Speed:
    """Tokens and FLOPs per second, and the share of the time that the loop waited for batches.

    Since the last mark; the first step, which compiles, is left out.
    """

    def __init__(self, tokens_per_step: int, peak: float):
        self._tokens_per_step, self._peak = tokens_per_step, peak
        self._begin: float | None = None
        self._tokens = self._flops = self._waited = 0.0
        self.tokens_per_s: float | None = None
        # Of the time since the mark: an upper bound, since the step before is computed meanwhile.
        self.data_wait_share: float | None = None
        self.peak_share: float | None = None  # of the machine's peak FLOP/s

    def add(self, flops_per_token: float) -> None:
        """One step more is done."""
        if self._begin is None:
            self.mark()
            return
        self._tokens += self._tokens_per_step
        self._flops += self._tokens_per_step * flops_per_token
        seconds = time.perf_counter() - self._begin
        self.tokens_per_s = self._tokens / seconds
        self.peak_share = self._flops / seconds / self._peak
        self.data_wait_share = self._waited / seconds

    def mark(self) -> None:
        self._begin, self._tokens, self._flops = time.perf_counter(), 0.0, 0.0
        self._waited = 0.0

    def waits_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches."""
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch


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

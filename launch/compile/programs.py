"""The steps of a config as programs for a mesh: abstract arguments, every array with its place.

Parameters and the optimizer's state lie as training puts them (`train.init_state`), batches and
what the target says of them by rows, caches by rows and KV heads. Nothing is allocated.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from launch.compile.tpu_compiler import Report, compile_for, placed_bytes
from spire_jax.config.schema import ExperimentConfig
from spire_jax.decoding.rounds import Decoder, Weights, _prefill, decode_rounds
from spire_jax.decoding.slots import empty_slots, prefill_chunk
from spire_jax.drafting.build import compute_for, strategy, target_model
from spire_jax.drafting.strategy import Strategy
from spire_jax.models.sampling import Sampling
from spire_jax.models.sharding import batch_sharding, replicated, shardings, spec
from spire_jax.models.transformer import Model
from spire_jax.training.loop import make_optimizer, train_step
from spire_jax.training.tasks import (
    Lesson,
    Task,
    TrainBatch,
    draft_task,
    target_task,
    teach,
    teacher,
    trainable,
)


class Failed(Exception):
    """A program that compiled, but not to what it should be."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and what it is called with."""

    function: Any
    arguments: tuple[Any, ...]  # ShapeDtypeStructs with their places, and what is static
    held: Mapping[str, Any]  # of the arguments, what lies in memory, by kind
    caches: Any = None  # of the arguments, what must be updated where it lies
    small: bool = False  # whether other temporaries may well outgrow them
    kernels: bool = True  # whether kernels of ours compute its attention on a TPU
    resident: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # in memory besides

    def compile(self, quick: bool = False) -> Report:
        """What the compiler says of it; raises OutOfMemory."""
        return compile_for(self.function, *self.arguments, quick=quick)


def programs(config: ExperimentConfig, mesh: Mesh) -> Iterator[tuple[str, Any]]:
    """Every step of a config as (name, what makes its `Program`); with the mesh in force."""
    names = _trained(config)
    yield "target's train step", functools.partial(train_program, config, "target", mesh)
    if any(draft_task(config, name).reads is not None for name in names):
        yield "teacher's pass", functools.partial(teacher_program, config, mesh)
    for name in names:
        yield f"{name}'s train step", functools.partial(train_program, config, name, mesh)
    yield "autoregressive step", functools.partial(_serving, config, None, mesh, "round")
    for name in names:
        steps = {"prefill": "prefill", "chunk": "prefill of a chunk", "draft": "draft step",
                 "verify": "verify step", "round": "whole round"}  # fmt: skip
        if strategy(config, name, compute_for(config.decode, config.train)).catches_up:
            del steps["draft"]
        for which, title in steps.items():
            yield f"{name}: {title}", functools.partial(_serving, config, name, mesh, which)


# --- training ----------------------------------------------------------------------------------


def train_program(config: ExperimentConfig, name: str, mesh: Mesh) -> Program:
    """The training step of the target or of a draft."""
    task = _task(config, name)
    state, fixed = _state(config, task, mesh)
    batch, lesson = _batch(config, mesh), None
    if task.reads is not None:
        lesson = _lesson(config, [task], mesh)
    optimizer = make_optimizer(config.train, task)
    arguments = task, config.train, optimizer, state, lesson, batch, fixed
    held = {
        "parameters": (state["params"], fixed),
        "optimizer": (state["opt_state"], state["step"]),
        "batch": batch,
    }
    resident = {}
    if lesson is not None:
        held["lesson"] = lesson
        resident["frozen target"] = frozen_target(config, mesh)
    others = [other for other in _trained(config) if name not in (other, "target")]
    if others:
        resident["other drafts"] = [_state(config, _task(config, n), mesh)[0] for n in others]
    return Program(train_step, arguments, held, resident=resident)


def teacher_program(config: ExperimentConfig, mesh: Mesh) -> Program:
    """The frozen target's pass over a batch, for all drafts that read it."""
    tasks = [_task(config, name) for name in _trained(config)]
    params, batch = frozen_target(config, mesh), _batch(config, mesh)
    resident = {"drafts": [_state(config, task, mesh)[0] for task in tasks]}
    arguments = teacher(config, tasks), params, batch
    return Program(teach, arguments, {"parameters": params, "batch": batch}, resident=resident)


def frozen_target(config: ExperimentConfig, mesh: Mesh) -> Any:
    """The target's parameters while drafts are trained: matrices in `pretrained.dtype`."""
    compute = compute_for(config.train, config.train)
    kept = dataclasses.replace(compute, dtype=config.pretrained.dtype)
    return _cast(target_model(config, kept), mesh)


def _trained(config: ExperimentConfig) -> list[str]:
    """The drafts with parameters of their own."""
    return [name for name, _ in config.drafts if name in config.trained]


def _task(config: ExperimentConfig, name: str) -> Task:
    return target_task(config) if name == "target" else draft_task(config, name)


def _state(config: ExperimentConfig, task: Task, mesh: Mesh) -> tuple[Any, Any]:
    """The state of a training step, and the parameters that it does not train."""
    optimizer = make_optimizer(config.train, task)
    params, fixed = trainable(task, task.model.shapes())
    places, fixed_places = (shardings(mesh, x) for x in trainable(task, task.model.axes()))
    moments = jax.eval_shape(optimizer.init, params)
    # `optax.tree_map_params` would compute, which no device here can.
    structure: Any = jax.tree.structure(params)

    def is_moment(x: Any) -> bool:
        return structure == jax.tree.structure(x)

    of_moments = jax.tree.map(
        lambda x: places if is_moment(x) else replicated(mesh), moments, is_leaf=is_moment
    )
    state = {
        "params": _placed(places, params),
        "opt_state": _placed(of_moments, moments),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh)),
    }
    return state, _placed(fixed_places, fixed)


def _batch(config: ExperimentConfig, mesh: Mesh) -> TrainBatch:
    shape, rows = (config.train.batch_size, config.train.seq_len), batch_sharding(mesh)
    ids, mask = (
        jax.ShapeDtypeStruct(shape, kind, sharding=rows) for kind in (jnp.int32, jnp.bool_)
    )
    return TrainBatch(ids, ids, mask)  # type: ignore[arg-type]


def _lesson(config: ExperimentConfig, tasks: list[Task], mesh: Mesh) -> Lesson:
    """What the target says of a batch, as its pass leaves it."""
    teaching = teacher(config, tasks)
    batch = _batch(config, mesh)
    lesson = jax.eval_shape(functools.partial(teach, teaching), teaching.model.shapes(), batch)
    rows = NamedSharding(mesh, spec("batch", None, None))
    by_token = NamedSharding(mesh, spec("batch", None, "vocab"))
    return Lesson(
        _placed(by_token, lesson.p),
        {layer: _placed(rows, y) for layer, y in lesson.activations.items()},
    )


# --- decoding ----------------------------------------------------------------------------------


def _serving(config: ExperimentConfig, name: str | None, mesh: Mesh, which: str) -> Program:
    """One of the programs of a decoder of the config's headline batch and context."""
    compute = compute_for(config.decode, config.train)
    target = target_model(config, compute)
    drafting = None if name is None else strategy(config, name, compute)
    at, k = config.decode, config.decode.k if name is not None else 0
    sampling = Sampling(at.temperature, at.top_k, at.top_p)
    decoder = Decoder(target, drafting, k, sampling, verification=at.verification)
    batch, context = config.throughput.batch_size, config.throughput.context_length
    width = context + config.eval.output_length + k
    weights = Weights(
        _cast(target, mesh), None if drafting is None else _cast(drafting.model, mesh)
    )
    state = jax.eval_shape(functools.partial(empty_slots, decoder, weights, batch, width))
    state = jax.tree.map(functools.partial(_by_rows, mesh), state)
    own = {"target": weights.target} | ({} if drafting is None else {"draft": weights.draft})
    caches = {"target's cache": state.target_cache}
    if drafting is not None:
        caches["draft's cache"] = state.draft_state
    whole = replicated(mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    every = {**own, **caches, "requests": [getattr(state, x) for x in _REQUESTS]}

    def rows(*shape: int) -> Any:
        return _by_rows(mesh, jax.ShapeDtypeStruct((batch, *shape), jnp.int32))

    if which == "round":
        arguments: tuple[Any, ...] = decoder, weights, state, number
        return Program(decode_rounds, arguments, every, list(caches.values()))
    if which == "prefill":
        prompts = rows(context - 1)
        arguments = decoder, weights, prompts, rows(), width
        return Program(_prefill, arguments, {**own, "batch": prompts})
    if which == "chunk":
        # As many prompts side by side as a mesh needs; `decode.chunk` tokens of each.
        prompts = mesh.shape["data"] * mesh.shape["fsdp"]
        some = jax.ShapeDtypeStruct((prompts,), jnp.int32, sharding=whole)
        arguments = decoder, weights, state, some, some, some, config.decode.chunk
        return Program(prefill_chunk, arguments, every, list(caches.values()), True, False)
    if which == "draft":
        assert drafting is not None
        step = jax.jit(functools.partial(_draft_step, drafting), donate_argnums=0)
        arguments = state.draft_state, weights.draft, state.target_cache, rows(1), rows(1)
        held = {"draft": weights.draft, "draft's cache": state.draft_state}
        others = {"target": weights.target, "target's cache": state.target_cache}
        return Program(step, arguments, held, state.draft_state, True, resident=others)
    block = rows(k + 1)
    step = jax.jit(functools.partial(_verify_step, target), donate_argnums=0)
    held = {"target": weights.target, "target's cache": state.target_cache}
    others = {name: x for name, x in every.items() if name in ("draft", "draft's cache")}
    arguments = state.target_cache, weights.target, block, block
    return Program(step, arguments, held, state.target_cache, resident=others)


_REQUESTS = ("tokens", "kinds", "lengths", "ends", "done", "rounds", "counts", "seeds")


def _draft_step(drafting: Strategy, state, params, target_cache, tokens, positions):
    return drafting.step(params, state, target_cache, tokens, positions)


def _verify_step(model: Model, cache, params, tokens, positions):
    return model.bind(params).extend(cache, tokens, positions)


# --- places ------------------------------------------------------------------------------------


def _cast(model: Model, mesh: Mesh) -> Any:
    return _placed(shardings(mesh, model.axes()), jax.eval_shape(model.cast, model.shapes()))


def _placed(places: Any, shapes: Any) -> Any:
    """Shapes with their places, leaf by leaf or one for all."""
    if isinstance(places, NamedSharding):
        places = jax.tree.map(lambda _: places, shapes)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def _by_rows(mesh: Mesh, x: Any) -> Any:
    """A leaf of a `DecodeState`: rows over data and fsdp, a cache's heads over tensor."""
    names = ("batch", None, "kv_heads") if x.ndim == 3 else ("batch", *(None,) * (x.ndim - 1))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(*names)))


def bytes_per_device(tree: Any) -> int:
    """Bytes of a pytree of placed shapes that one device holds, without padding."""
    return sum(map(placed_bytes, jax.tree.leaves(tree)))


def check_in_place(report: Report, program: Program) -> None:
    """Raise Failed unless the program updates its caches where they lie."""
    sizes = [placed_bytes(x) for x in jax.tree.leaves(program.caches) if x.ndim == 3]
    held, layer = sum(sizes), max(sizes, default=0)
    if report.aliased < held:
        raise Failed(f"{report.aliased} bytes are aliased, but the caches have {held}")
    if program.small or not held:
        return
    if report.temporaries >= held:
        raise Failed(f"temporaries of {report.temporaries} bytes; the caches have {held}")
    if report.largest_copy >= layer:
        raise Failed(f"an array of {report.largest_copy} bytes is copied; a cache has {layer}")

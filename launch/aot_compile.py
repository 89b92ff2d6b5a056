"""Compile for TPUs that are not here: every kernel at every production shape, and whole steps.

    bash launch/setup_libtpu.sh                          # the compiler, once
    python -m launch.aot_compile kernels                 # both kernels, forward and backward
    python -m launch.aot_compile steps --config=configs/paper_67m.py
    python -m launch.aot_compile steps --chips=v6e ... --config.target.n_layers=4

`steps` compiles the target's and the drafts' training steps, prefill, the draft step, the verify
step and the whole round of a config for one chip of each kind, and checks that the round updates
its caches in place: they are aliased, and nothing as large as a layer of the target's is copied.
The last line sums up; the status is 1 if anything did not compile or check out.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from launch.tpu_compiler import CHIPS, MEBIBYTE, NoCompiler, Report, compile_for, one_device
from pallas_kernels.decode_attention import specs as decode_specs
from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.streaming_attention import specs as streaming_specs
from pallas_kernels.streaming_attention.api import streaming_attention
from spire_jax.config import ExperimentConfig, MeshConfig
from spire_jax.config_files import command_line, exit_with_error
from spire_jax.decode.rounds import Decoder, DecodeState, Weights, _prefill, decode_rounds
from spire_jax.drafting.build import compute_for, strategy, target_model
from spire_jax.drafting.spire import Spire
from spire_jax.sharding import make_mesh, replicated
from spire_jax.tasks import TrainBatch, draft_task, target_task, teach, teacher, trainable
from spire_jax.train import make_optimizer, train_step


class Failed(Exception):
    """A program that compiled, but not to what it should be."""


# --- kernels -----------------------------------------------------------------------------------


def compile_decode(spec: decode_specs.Spec, chip: str) -> Report:
    """Decode attention at one shape."""
    place = one_device(chip)
    with jax.set_mesh(make_mesh(MeshConfig(), [*place.device_set])):
        call = functools.partial(decode_attention, **spec.options, implementation="tpu")
        report = compile_for(jax.jit(call), *_at(place, spec.shapes))
    cache = spec.shapes[1].size * spec.shapes[1].dtype.itemsize
    # A ring is small enough for XLA to hold it in VMEM, or a copy of it elsewhere, as it likes.
    if report.largest_copy >= cache or (report.temporaries >= cache and not spec.ring):
        raise Failed(f"the cache is copied: {report.line()}")
    return report


def compile_streaming(spec: streaming_specs.Spec, chip: str, backward: bool) -> Report:
    """Streaming attention at one shape; with all its gradients, those of the log-sum-exp too."""
    place = one_device(chip)

    def forward(q, k, v):
        return streaming_attention(q, k, v, *spec.positions, **spec.options, implementation="tpu")

    def loss(q, k, v):
        out, lse = forward(q, k, v)
        return jnp.sum(jnp.square(out.astype(jnp.float32))) + jnp.sum(lse)

    function = jax.grad(loss, (0, 1, 2)) if backward else forward
    return compile_for(jax.jit(function), *_at(place, spec.shapes))


def kernels(chips: list[str]) -> Iterator[tuple[str, Callable[[], Report]]]:
    """Every kernel at every production shape, as (name, what compiles it)."""
    for chip in chips:
        for spec in decode_specs.PRODUCTION:
            yield f"{chip:6} decode    {spec.name}", functools.partial(compile_decode, spec, chip)
        for at in streaming_specs.PRODUCTION:
            for backward in (False, True):
                name = f"{chip:6} streaming {at.name}{', backward' if backward else ''}"
                yield name, functools.partial(compile_streaming, at, chip, backward)


# --- steps -------------------------------------------------------------------------------------


def steps(config: ExperimentConfig, chips: list[str]) -> Iterator[tuple[str, Callable[[], Report]]]:
    """The steps of training and decoding a config on one chip of each kind."""
    for chip in chips:
        on_chip = functools.partial(_on_chip, chip)
        yield f"{chip:6} target's train step", on_chip(_train_step, config, "target")
        for name, _ in config.drafts:
            yield f"{chip:6} {name}'s train step", on_chip(_train_step, config, name)
        yield f"{chip:6} autoregressive step", on_chip(_round, config, None)
        for name, _ in config.drafts:
            serving = functools.partial(on_chip, _serving_step, config, name)
            yield f"{chip:6} {name}: prefill", serving("prefill")
            if isinstance(strategy(config, name, compute_for(config.decode, config.train)), Spire):
                yield f"{chip:6} {name}: draft step", serving("draft")
            yield f"{chip:6} {name}: verify step", serving("verify")
            yield f"{chip:6} {name}: whole round", on_chip(_round, config, name)


def _on_chip(chip: str, compile_step, *arguments) -> Callable[[], Report]:
    def run() -> Report:
        mesh = make_mesh(MeshConfig(), [*one_device(chip).device_set])
        with jax.set_mesh(mesh):
            report = compile_step(functools.partial(_at, replicated(mesh)), *arguments)
        if not report.kernels:
            raise Failed("no kernel is in it")
        return report

    return run


def _at(place: jax.sharding.Sharding, tree: Any) -> Any:
    """Shapes of a pytree, each with its place."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def _train_step(at, config: ExperimentConfig, name: str) -> Report:
    task = target_task(config) if name == "target" else draft_task(config, name)
    optimizer = make_optimizer(config.train, task)
    params, fixed = trainable(task, task.model.shapes())
    state = {
        "params": params,
        "opt_state": jax.eval_shape(optimizer.init, params),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    shape = config.train.batch_size, config.train.seq_len
    ids, mask = (jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.bool_))
    batch = at(TrainBatch(ids, ids, mask))  # type: ignore[arg-type]
    lesson = None
    if task.reads is not None:
        teaching = teacher(config, [task])
        lesson = at(jax.eval_shape(
            functools.partial(teach, teaching), teaching.model.shapes(), batch
        ))  # fmt: skip
    return compile_for(
        train_step, task, config.train, optimizer, at(state), lesson, batch, at(fixed)
    )


class _Serving:
    """A decoder of the config's headline batch and context, and its arguments' shapes."""

    def __init__(self, at, config: ExperimentConfig, name: str | None):
        compute = compute_for(config.decode, config.train)
        target = target_model(config, compute)
        drafting = None if name is None else strategy(config, name, compute)
        k = config.decode.k if name is not None else 0
        self.decoder = Decoder(target, drafting, k)
        batch, context = config.throughput.batch_size, config.throughput.context_length
        self.capacity = context + config.eval.output_length + k
        draft = None if drafting is None else _cast(drafting.model)
        self.weights = at(Weights(_cast(target), draft))
        self.prompts = at(jax.ShapeDtypeStruct((batch, context - 1), jnp.int32))
        self.rows = at(jax.ShapeDtypeStruct((batch,), jnp.int32))
        fill = functools.partial(_prefill, self.decoder, capacity=self.capacity)
        self.caches = at(jax.eval_shape(fill, self.weights, self.prompts, self.rows))

        def state(caches):
            def row(kind, *more):
                return jnp.zeros((batch, *more), kind)

            return DecodeState(
                tokens=row(jnp.int32, self.capacity), kinds=row(jnp.int8, self.capacity),
                lengths=row(jnp.int32), ends=row(jnp.int32), done=row(jnp.bool_),
                rounds=row(jnp.int32), counts=row(jnp.int32, k + 1),
                seeds=jax.vmap(jax.random.key)(row(jnp.uint32)),
                target_cache=caches[0], draft_cache=caches[1],
            )  # fmt: skip

        self.state = at(jax.eval_shape(state, self.caches))


def _cast(model) -> Any:
    return jax.eval_shape(model.cast, model.shapes())


def _serving_step(at, config: ExperimentConfig, name: str, which: str) -> Report:
    serving = _Serving(at, config, name)
    decoder, weights = serving.decoder, serving.weights
    if which == "prefill":
        return compile_for(
            _prefill, decoder, weights, serving.prompts, serving.rows, serving.capacity
        )
    if which == "draft":
        assert decoder.strategy is not None
        model = decoder.strategy.model

        def draft(cache, params, tokens, positions):
            return model.bind(params).step(cache, tokens, positions)

        step = jax.jit(draft, donate_argnums=0)
        report = compile_for(step, serving.caches[1], weights.draft, serving.rows, serving.rows)
        return _in_place(report, serving.caches[1], small=True)

    def verify(cache, params, tokens, positions):
        return decoder.target.bind(params).extend(cache, tokens, positions)

    block = at(jax.ShapeDtypeStruct((*serving.rows.shape, decoder.k + 1), jnp.int32))
    step = jax.jit(verify, donate_argnums=0)
    return _in_place(
        compile_for(step, serving.caches[0], weights.target, block, block), serving.caches[0]
    )


def _round(at, config: ExperimentConfig, name: str | None) -> Report:
    serving = _Serving(at, config, name)
    count = at(jax.ShapeDtypeStruct((), jnp.int32))
    report = compile_for(decode_rounds, serving.decoder, serving.weights, serving.state, count)
    return _in_place(report, serving.caches)


def _in_place(report: Report, caches: Any, small: bool = False) -> Report:
    """Raise Failed unless the caches are updated where they lie.

    `small`: a draft's ring, which other temporaries may well outgrow.
    """
    arrays = [x for x in jax.tree.leaves(caches) if x.ndim == 3]
    held = sum(x.size * x.dtype.itemsize for x in arrays)
    layer = max(x.size * x.dtype.itemsize for x in arrays)
    if report.temporaries >= held and not small:
        raise Failed(f"temporaries of {report.temporaries} bytes; the caches have {held}")
    if report.aliased < held:
        raise Failed(f"{report.aliased} bytes are aliased, but the caches have {held}")
    if report.largest_copy >= layer:
        raise Failed(f"an array of {report.largest_copy} bytes is copied; a cache has {layer}")
    return report


# --- the command -------------------------------------------------------------------------------


def compile_all(what: str, work: Iterator[tuple[str, Callable[[], Report]]]) -> int:
    """Compile, print a line each and one in the end; the process's status."""
    done, failed, vmem, seconds = 0, [], 0, 0.0
    for name, run in work:
        try:
            report = run()
        except NoCompiler as error:
            exit_with_error(error)
        except Exception as error:
            failed.append(name)
            print(f"{name:58} FAILED: {' '.join(str(error).split())[:600]}", flush=True)
            continue
        done, vmem, seconds = done + 1, max(vmem, report.vmem), seconds + report.seconds
        print(f"{name:58} {report.line()}", flush=True)
    print(
        f"{what}: {done} of {done + len(failed)} compiled in {seconds:.0f} s, at most "
        f"{vmem / MEBIBYTE:.1f} MiB of VMEM" + "".join(f"; failed: {name}" for name in failed)
    )
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("kernels", "steps"))
    parser.add_argument("--chips", default=",".join(CHIPS), help=f"of {', '.join(CHIPS)}")
    argv = list(sys.argv[1:] if argv is None else argv)
    config = None
    if "steps" in argv:
        args, config = command_line(parser, argv)
    else:
        args = parser.parse_args(argv)
    chips = args.chips.split(",")
    if unknown := [chip for chip in chips if chip not in CHIPS]:
        exit_with_error(f"no chip {unknown[0]!r}; there are {', '.join(CHIPS)}")
    work = kernels(chips) if config is None else steps(config, chips)
    return compile_all(args.what, work)


if __name__ == "__main__":
    sys.exit(main())

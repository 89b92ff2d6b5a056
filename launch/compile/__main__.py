"""Compile for TPUs that are not here: kernels at production shapes, whole steps, for whole slices.

    bash launch/setup/libtpu.sh                          # the compiler, once
    python -m launch.compile kernels                 # both kernels, forward and backward
    python -m launch.compile steps --config=configs/paper_67m.py
    python -m launch.compile steps --chips=v6e ... --config.target.n_layers=4
    python -m launch.compile --config=configs/paper_67m.py --topology=v5e:2x4 --json=FILE

With `--topology` the steps are compiled for all chips of a slice, over the config's mesh
(--config.mesh.data, .fsdp, .tensor): compile time, HBM by kind, whether it fits, and every
collective with its bytes. `steps` compiles the same for one chip of each kind, and checks that
caches are updated in place: they are aliased, and nothing as large as a layer of the target's is
copied.

The steps are the target's and the drafts' training steps, the teacher's pass, prefill, the draft
step, the verify step and the whole round. A failure does not keep the others from compiling. The
last line sums up; the status is 1 if anything did not compile, check out or fit.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from launch.compile.pods import GIB, hbm_bytes, report, write_json
from launch.compile.programs import Failed, Program, check_in_place, programs
from launch.compile.topologies import devices
from launch.compile.tpu_compiler import (
    CHIPS,
    MEBIBYTE,
    NoCompiler,
    Report,
    compile_for,
    describe,
    one_device,
    quiet,
)
from pallas_kernels.decode_attention import specs as decode_specs
from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.streaming_attention import specs as streaming_specs
from pallas_kernels.streaming_attention.api import streaming_attention
from spire_jax.config.files import command_line, exit_with_error
from spire_jax.config.paths import local_path
from spire_jax.config.schema import ConfigError, ExperimentConfig, MeshConfig
from spire_jax.models.sharding import check_mesh, make_mesh

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


def _at(place: jax.sharding.Sharding, tree: Any) -> Any:
    """Shapes of a pytree, each with its place."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


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
        with quiet():
            mesh = make_mesh(MeshConfig(), describe(CHIPS[chip])[:1])
        for name, make in programs(config, mesh):
            yield f"{chip:6} {name}", functools.partial(compile_on, mesh, make)


def compile_on(mesh: Mesh, make: Callable[[], Program]) -> Report:
    """A step on a chip.

    Raises:
        Failed: it has no kernel, or does not update its caches in place.
    """
    with jax.set_mesh(mesh):
        program = make()
        report = program.compile()
        check_in_place(report, program)
    if program.kernels and not report.kernels:
        raise Failed("no kernel is in it")
    return report


# --- a slice -----------------------------------------------------------------------------------


def pods(config: ExperimentConfig, args: argparse.Namespace) -> int:
    """Compile a config's steps for all chips of a slice and print what they take; the status."""
    try:
        mesh = make_mesh(config.mesh, devices(args.topology))
        check_mesh(mesh, config)
    except (ConfigError, NoCompiler) as error:
        exit_with_error(error)
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(
        f"{args.topology}: {mesh.size} devices ({mesh.devices.flat[0].device_kind}) of "
        f"{hbm_bytes(mesh) / GIB:.2f} GiB, {args.reserve:.0%} of it reserved; mesh {sizes}; "
        f"everything is per device",
        flush=True,
    )
    done = []
    only = tuple(args.steps.split(",")) if args.steps else ()
    for step in report(config, mesh, args.reserve, only, args.quick):
        done.append(step)
        print("\n".join(step.lines()), flush=True)
        if args.json:
            write_json(args.json, args.topology, mesh, args.reserve, done)
    if not done:
        exit_with_error(f"--steps={args.steps}: no step's name has that in it; there are "
                        f"{', '.join(name for name, _ in programs(config, mesh))}")  # fmt: skip
    bad = [step.name for step in done if not step.fits]
    seconds = sum(step.seconds for step in done)
    print(f"{args.topology}: {len(done) - len(bad)} of {len(done)} steps compiled and fit, in "
          f"{seconds:.0f} s" + "".join(f"; not: {name}" for name in bad))  # fmt: skip
    return 1 if bad else 0


# --- the command -------------------------------------------------------------------------------


def compile_all(what: str, work: Iterator[tuple[str, Callable[[], Report]]]) -> int:
    """Compile, print a line each and one in the end; the process's status."""
    done, failed, vmem, seconds = 0, [], 0, 0.0
    for name, run in work:
        try:
            report = run()
        except NoCompiler:
            raise
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
    parser.add_argument("what", nargs="?", choices=("kernels", "steps"))
    parser.add_argument("--chips", help=f"of {', '.join(CHIPS)}; all unless given")
    parser.add_argument("--topology", help="a slice such as v5e:16x16: the steps of a config on "
                        "all its chips, over the config's mesh")  # fmt: skip
    parser.add_argument("--steps", default="", help="with --topology: only those whose names have "
                        "one of these in them, such as round,train")  # fmt: skip
    parser.add_argument("--reserve", type=float, default=0.05, help="with --topology: share of HBM "
                        "that is left free (default 0.05)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="with --topology: let the compiler "
                        "optimize less; quicker, and with more temporaries")  # fmt: skip
    parser.add_argument("--json", type=local_path, metavar="PATH", help="with --topology: the "
                        "report as a file too")  # fmt: skip
    argv = list(sys.argv[1:] if argv is None else argv)
    if "kernels" in argv:
        args, config = parser.parse_args(argv), None
    else:
        args, config = command_line(parser, argv)
    if args.topology and (args.what or args.chips):
        exit_with_error("--topology stands alone: kernels, steps and --chips are for one chip")
    if not args.topology and args.what is None:
        exit_with_error("say what to compile: --topology=v5e:16x16 for a slice, steps or kernels "
                        "for one chip")  # fmt: skip
    if not 0 <= args.reserve < 1:
        exit_with_error(f"--reserve={args.reserve} must be 0 or more, and under 1")
    if args.json and not args.json.parent.is_dir():
        exit_with_error(f"--json={args.json}: {args.json.parent} is no folder")
    if args.topology:
        assert config is not None
        return pods(config, args)
    chips = args.chips.split(",") if args.chips else list(CHIPS)
    if unknown := [chip for chip in chips if chip not in CHIPS]:
        exit_with_error(f"no chip {unknown[0]!r}; there are {', '.join(CHIPS)}")
    work = kernels(chips) if config is None else steps(config, chips)
    try:
        return compile_all(args.what, work)
    except NoCompiler as error:
        exit_with_error(error)


if __name__ == "__main__":
    sys.exit(main())

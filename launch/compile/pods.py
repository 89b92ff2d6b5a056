"""Report the steps of a config, compiled for all chips of a slice: memory, fits or not, traffic."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from launch.compile.hlo_collectives import Collective, merged
from launch.compile.programs import Program, bytes_per_device, programs
from launch.compile.tpu_compiler import NoCompiler, OutOfMemory
from spire_jax.config.schema import ExperimentConfig
from spire_jax.costs.chips import device_chip

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One compiled step, per device; bytes."""

    name: str
    seconds: float  # to trace and compile
    held: dict[str, int]  # arguments by kind, without padding; what is resident besides, in ()
    padding: int = 0  # what their layouts add
    temporaries: int = 0
    outputs: int = 0  # that do not lie where donated arguments did
    program: int = 0
    used: int = 0  # of all these, or what the compiler says where it does not fit
    limit: int = 0  # HBM less the reserve
    sends: tuple[Collective, ...] = ()
    error: str = ""  # why there is nothing more to say

    @property
    def fits(self) -> bool:
        """Whether it compiled, and everything lies within the limit."""
        return not self.error and self.used <= self.limit

    def lines(self) -> Iterator[str]:
        """As text."""
        if self.error and not self.used:
            yield f"{self.name:32} FAILED: {' '.join(self.error.split())[:600]}"
            return
        verdict = "fits" if self.fits else "DOES NOT FIT"
        yield (f"{self.name:32} {self.seconds:6.1f} s  {verdict}: {self.used / GIB:.2f} of "
               f"{self.limit / GIB:.2f} GiB")  # fmt: skip
        parts = self.held | {
            "padding": self.padding,
            "temporaries": self.temporaries,
            "outputs": self.outputs,
            "program": self.program,
        }
        shown = [f"{name} {size / GIB:.3f}" for name, size in parts.items() if size >= 5e5]
        yield f"    GiB: {', '.join(shown)}"
        if self.error:
            yield f"    {' '.join(self.error.split())[:300]}"
        for send in merged(self.sends):
            each = " per iteration" if send.per_iteration else ""
            yield (f"    {send.kind:18} {send.count:4} x {_size(send.bytes):>9}  groups of "
                   f"{send.group:<4} sends {_size(send.sent):>9}{each}  "
                   f"{' '.join(send.shapes)[:70]}")  # fmt: skip


def report(
    config: ExperimentConfig,
    mesh: Mesh,
    reserve: float,
    only: tuple[str, ...] = (),
    quick: bool = False,
) -> Iterator[StepReport]:
    """Compile the steps whose names contain one of `only` (all without any), one after another.

    Args:
        reserve: share of a chip's HBM to leave to what no program shows: the runtime, buffers of
            the host's transfers, fragmentation.
        quick: with less effort of the compiler (`tpu_compiler.compile_for`).

    Raises:
        NoCompiler: there is no libtpu.
    """
    limit = int(hbm_bytes(mesh) * (1 - reserve))
    with jax.set_mesh(mesh):
        for name, make in programs(config, mesh):
            if not only or any(part in name for part in only):
                yield _compile(name, make, limit, quick)


def hbm_bytes(mesh: Mesh) -> float:
    """HBM of one device of the mesh, after its chip's data sheet."""
    chip = device_chip(mesh.devices.flat[0].device_kind)
    assert chip is not None  # of the generations in `topologies`
    return chip.hbm_bytes / chip.jax_devices


def _compile(name: str, make: Any, limit: int, quick: bool) -> StepReport:
    held: dict[str, int] = {}
    try:
        program: Program = make()
        held = {kind: bytes_per_device(x) for kind, x in program.held.items()}
        arguments = sum(held.values())
        held |= {f"({kind})": bytes_per_device(x) for kind, x in program.resident.items()}
        if (least := sum(held.values())) > limit:
            why = "what lies in memory before it begins does not fit; not compiled"
            return StepReport(name, 0.0, held, used=least, limit=limit, error=why)
        found = program.compile(quick)
    except NoCompiler:
        raise
    except OutOfMemory as error:
        # What is resident besides is nothing that the compiler knows of.
        used = error.used + sum(size for kind, size in held.items() if kind[0] == "(")
        return StepReport(name, 0.0, held, used=used, limit=limit, error=str(error))
    except Exception as error:
        return StepReport(name, 0.0, held, limit=limit, error=str(error) or repr(error))
    # Negative where a program does not read all that it is given; that lies there all the same.
    padding = max(found.arguments - arguments, 0)
    used = sum(held.values()) + padding + found.temporaries + found.outputs + found.program
    return StepReport(
        name, found.seconds, held, padding, found.temporaries, found.outputs, found.program, used,
        limit, found.sends,
    )  # fmt: skip


def write_json(
    path: str | pathlib.Path, topology: str, mesh: Mesh, reserve: float, steps: list[StepReport]
) -> None:
    """All that `lines` shows, and the operations that collectives come from; bytes per device."""
    values = {
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "hbm_bytes": hbm_bytes(mesh),
        "reserve": reserve,
        "steps": [
            dataclasses.asdict(step)
            | {"fits": step.fits}
            | {"sends": [dataclasses.asdict(c) | {"sent": c.sent} for c in step.sends]}
            for step in steps
        ],
    }
    pathlib.Path(path).write_text(json.dumps(values, indent=1) + "\n")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError

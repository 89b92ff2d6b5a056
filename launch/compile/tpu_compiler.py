"""The TPU compiler on a machine without a TPU: devices that are only described, and what it says.

`libtpu` holds the real compiler, Mosaic included (`bash launch/setup/libtpu.sh`). What it compiles
for a described chip is what that chip would run; errors that interpretation never shows (block
shapes, casts, memory that overflows) appear here.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

from launch.compile.hlo_collectives import Collective, array_bytes, collectives

# The smallest topologies that can be described; programs for one chip use one device of them.
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

MEBIBYTE = 2**20


class NoCompiler(RuntimeError):
    """There is no libtpu; the message says how to get it."""


class OutOfMemory(RuntimeError):
    """The compiler says that a program does not fit into a chip's HBM.

    Attributes:
        used: bytes that it would take, arguments included; 0 where the compiler names none.
    """

    def __init__(self, message: str, used: int):
        super().__init__(message)
        self.used = used


def find_libtpu() -> pathlib.Path:
    """Where libtpu.so is: TPU_LIBRARY_PATH, .venv/libtpu, or an installed package."""
    places = [os.environ.get("TPU_LIBRARY_PATH", ""), f"{sys.prefix}/libtpu/libtpu/libtpu.so"]
    spec = importlib.util.find_spec("libtpu")
    if spec is not None and spec.origin is not None:
        places.append(str(pathlib.Path(spec.origin).with_name("libtpu.so")))
    for place in places:
        if place and pathlib.Path(place).is_file():
            return pathlib.Path(place)
    raise NoCompiler("libtpu is not installed: bash launch/setup/libtpu.sh")


def describe(topology: str, **options: Any) -> list[Any]:
    """The devices of a topology such as "v5e:2x2", which need not exist.

    `options` are libtpu's own, such as chips_per_host_bounds.
    """
    # Set only here: libtpu reads them as it is loaded, and nothing asks for a machine's metadata.
    os.environ["TPU_LIBRARY_PATH"] = str(find_libtpu())
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a killed process leaves a lock file behind
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    return list(topologies.get_topology_desc(topology, "tpu", **options).devices)


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of one program."""

    seconds: float
    vmem: int  # bytes that the hungriest kernel takes of a core's vector memory
    kernels: int  # Pallas kernels in the program
    temporaries: int  # bytes of HBM besides arguments and results
    aliased: int  # bytes of results that lie where donated arguments did
    largest_copy: int  # bytes of the largest array that is copied, or laid out anew
    arguments: int  # bytes of arguments, with the padding of their layouts
    outputs: int  # bytes of results that are not aliased
    program: int  # bytes of the program itself
    sends: tuple[Collective, ...]

    def line(self) -> str:
        return (
            f"{self.seconds:5.1f} s  VMEM {self.vmem / MEBIBYTE:5.1f} MiB  "
            f"HBM temporaries {self.temporaries / MEBIBYTE:8.1f} MiB"
        )


def compile_for(function: Callable[..., Any], *arguments: Any, quick: bool = False) -> Report:
    """Lower a jitted function for abstract arguments that say where they are, and compile it.

    `quick`: with the least effort of the compiler to make it fast, which takes about 0.6 of the
    time (11.3 and 6.9 s of a decode step) and somewhat more temporaries.

    Raises:
        OutOfMemory: it does not fit into HBM.
    """
    options = {"exec_time_optimization_effort": -1.0} if quick else None
    begin = time.perf_counter()
    try:
        with quiet():
            compiled = function.lower(*arguments).compile(options)  # type: ignore[attr-defined]
    except jax.errors.JaxRuntimeError as error:
        if not re.search("(?i)ran out of memory (in memory space|on) hbm", str(error)):
            raise
        held = sum(placed_bytes(x) for x in jax.tree.leaves(arguments))
        raise OutOfMemory(str(error), _hbm_used(str(error), held)) from error
    seconds = time.perf_counter() - begin
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Report(
        seconds,
        max(vector_memory(text), default=0),
        text.count('custom_call_target="tpu_custom_call"'),
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        max(copies(text), default=0),
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
        tuple(collectives(text)),
    )


def _hbm_used(message: str, arguments: int = 0) -> int:
    """The bytes that a message says would be taken; 0 where it names none."""
    total = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    used = total or temporaries
    if used is None:
        return 0
    size = round(float(used[1]) * 1024 ** " KMGT".index(used[2] or " "))
    return size if total else size + arguments


def placed_bytes(x: Any) -> int:
    """Bytes of a placed shape that one device holds, without padding; 0 for what is static."""
    if not isinstance(x, jax.ShapeDtypeStruct) or x.sharding is None:
        return 0
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def vector_memory(hlo: str) -> list[int]:
    """Bytes of VMEM that each kernel of a compiled program takes."""
    used = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
    return [
        int(size)
        for line in hlo.splitlines()
        if "tpu_custom_call" in line
        for size in re.findall(used, line)
    ]


def copies(hlo: str) -> list[int]:
    """Bytes of each array that a compiled program copies or transposes within HBM."""
    # %copy.3 = bf16[64,8192,1024]{2,1,0:T(8,128)(2,1)} copy(...); the result of an asynchronous
    # one is the tuple (copy, original, context). S(1) is VMEM: a prefetch, or a result's way back.
    found = re.findall(r"= (\(?(\w+)\[([\d,]*)\][^=]*?) (?:copy|copy-start|transpose)\(", hlo)
    return [array_bytes(kind, shape) for result, kind, shape in found if "S(1)" not in result]


@contextlib.contextmanager
def quiet():
    """libtpu writes to the file descriptor of stderr as it is loaded; errors come as exceptions."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def one_device(chip: str) -> jax.sharding.SingleDeviceSharding:
    """Where the arguments of a program for one chip are."""
    with quiet():
        return jax.sharding.SingleDeviceSharding(describe(CHIPS[chip])[0])

"""The TPU compiler on a machine without a TPU: devices that are only described, and what it says.

`libtpu` holds the real compiler, Mosaic included (`bash launch/setup_libtpu.sh`). What it compiles
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

# The smallest topologies that can be described; programs for one chip use one device of them.
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

MEBIBYTE = 2**20


class NoCompiler(RuntimeError):
    """There is no libtpu; the message says how to get it."""


def find_libtpu() -> pathlib.Path:
    """Where libtpu.so is: TPU_LIBRARY_PATH, .venv/libtpu, or an installed package."""
    places = [os.environ.get("TPU_LIBRARY_PATH", ""), f"{sys.prefix}/libtpu/libtpu/libtpu.so"]
    spec = importlib.util.find_spec("libtpu")
    if spec is not None and spec.origin is not None:
        places.append(str(pathlib.Path(spec.origin).with_name("libtpu.so")))
    for place in places:
        if place and pathlib.Path(place).is_file():
            return pathlib.Path(place)
    raise NoCompiler("libtpu is not installed: bash launch/setup_libtpu.sh")


def describe(topology: str) -> list[Any]:
    """The devices of a topology such as "v5e:2x2", which need not exist."""
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
    return list(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of one program."""

    seconds: float
    vmem: int  # bytes that the hungriest kernel takes of a core's vector memory
    kernels: int  # Pallas kernels in the program
    temporaries: int  # bytes of HBM besides arguments and results
    aliased: int  # bytes of results that lie where donated arguments did
    largest_copy: int  # bytes of the largest array that is copied, or laid out anew

    def line(self) -> str:
        return (
            f"{self.seconds:5.1f} s  VMEM {self.vmem / MEBIBYTE:5.1f} MiB  "
            f"HBM temporaries {self.temporaries / MEBIBYTE:8.1f} MiB"
        )


def compile_for(function: Callable[..., Any], *arguments: Any, **static: Any) -> Report:
    """Lower a jitted function for abstract arguments that say where they are, and compile it."""
    begin = time.perf_counter()
    with _quiet():
        compiled = function.lower(*arguments, **static).compile()  # type: ignore[attr-defined]
    seconds = time.perf_counter() - begin
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Report(
        seconds,
        max(vector_memory(text), default=0),
        text.count('custom_call_target="tpu_custom_call"'),
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        max(copies(text), default=0),
    )


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
    return [
        math.prod(int(n) for n in shape.split(",") if n) * _width(kind)
        for result, kind, shape in found
        if "S(1)" not in result
    ]


def _width(kind: str) -> int:
    """Bytes of a number of an HLO type: bf16, s32, pred, f8e4m3fn."""
    bits = re.match(r"[a-z]+(\d+)", kind)
    return max(int(bits.group(1)) // 8, 1) if bits else 1


@contextlib.contextmanager
def _quiet():
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
    with _quiet():
        return jax.sharding.SingleDeviceSharding(describe(CHIPS[chip])[0])

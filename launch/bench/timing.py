"""How benchmarks measure: the time of a call, the rate of a copy, the error of a result.

A kernel's time is the median wall time of a compiled loop of calls on the device, divided by their
number, with nothing subtracted: whatever a call needs beside the kernel (the list of blocks, the
merge of parts) is in it; so is the host's start of the loop, which lasts about a tenth of a second.
A call's queries are the outputs of the one before it, and its other inputs go round several copies,
so that nothing is left in a cache and no call can be left out.
"""

import dataclasses
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GIB = 2**30
LOOP_SECONDS = 0.1
REPEATS = 5

Call = Callable[..., Sequence[jax.Array]]  # (queries, *inputs) -> (what is like them, *others)


@dataclasses.dataclass
class Run:
    """What a whole run shares."""

    platform: str  # cpu, gpu, tpu
    small: bool = False
    stop: float = math.inf  # on time.perf_counter's clock: nothing is begun after it
    keep: Callable[[], None] = lambda: None  # called after every record
    copy_rate: float = 0.0  # bytes per second of reading and writing a large array
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def attempt(self, case: dict[str, Any], work: Callable[[], dict[str, Any]]) -> bool:
        """Keeps and prints what `work` finds, or why it finds nothing; the run goes on."""
        try:
            if time.perf_counter() > self.stop:
                raise TimeoutError("not begun: the time is up")
            record = case | work()
        except Exception as error:  # of any kind: out of memory, unsupported, a compiler's
            reason = (str(error).strip() or "no message").splitlines()[0][:200]
            record = case | {"failed": f"{type(error).__name__}: {reason}"}
        self.records.append(record)
        print(" | ".join(f"{name} {_shown(value)}" for name, value in record.items()), flush=True)
        self.keep()
        return "failed" not in record

    def found(self, figure: str, **case: Any) -> Iterator[dict[str, Any]]:
        """The records of a case that have a figure."""
        for record in self.records:
            if figure in record and all(record.get(name) == v for name, v in case.items()):
                yield record

    def share_of_best(self, row: dict[str, Any]) -> float:
        """The shortest time of this record's case in terms of its own."""
        case = {name: row[name] for name in ("case", "L", "part")}
        return min(other["us"] for other in self.found("us", **case)) / row["us"]

    def rounds(self, bytes_per_round: float) -> int:
        """How many of a loop take LOOP_SECONDS at the copy's rate."""
        fitting = round(LOOP_SECONDS * self.copy_rate / bytes_per_round)
        return 1 if self.small else max(1, min(50, fitting))


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def interleaved(work: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each piece of work, run in turn, after one run that compiles."""
    for run in work.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def seconds(work: Callable[[], Any]) -> float:
    """Median of some runs, after one more."""
    jax.block_until_ready(work())
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def copy_rate(small: bool) -> float:
    """Bytes per second of adding a number to a large array, read and written."""
    array, times = jnp.zeros((2**24 if small else GIB) // 4, jnp.float32), 50
    loop = jax.jit(lambda x: lax.fori_loop(0, times, lambda i, x: x + i, x))
    return 2 * array.nbytes * times / seconds(lambda: loop(array))


def compiled(call: Call, q: jax.Array, sets: list, common: tuple, rounds: int):
    """A program of (q, sets, common): `rounds` times `call(q, *inputs, *common)` for all sets."""
    call = jax.jit(call)  # traced once for all uses

    def once(q, sets, common):
        others = []
        for inputs in sets:
            q, *rest = call(q, *inputs, *common)
            others.append(rest)
        return q, others

    kept = jax.eval_shape(once, q, sets, common)[1]

    def loop(q, sets, common):
        others = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)
        return lax.fori_loop(0, rounds, lambda _, at: once(at[0], sets, common), (q, others))

    return jax.jit(loop).lower(q, sets, common).compile()


def gradients(call: Callable) -> Call:
    """(q, k, v, cotangent) -> the queries' gradient, the output, the other gradients."""

    def both(q, k, v, cotangent):
        out, pull = jax.vjp(call, q, k, v)
        d_q, d_k, d_v = pull(cotangent)
        return d_q, out, d_k, d_v

    return both


def exactly(call: Callable, *arrays: jax.Array):
    """In float32, without the shorter formats that a device computes its products in."""
    with jax.default_matmul_precision("highest"):
        return call(*(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays))


def compared(compute: Callable[[], Sequence], wanted: Sequence) -> dict[str, Any]:
    """Whether results agree, -inf included, the largest error, whether a second run is the same."""
    got, again = compute(), compute()
    right, worst = True, 0.0
    for a, b in zip(got, wanted, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        finite = np.isfinite(b)
        error = np.abs(a[finite] - b[finite])
        # A bfloat16 rounding of a sum of many terms: relative to the largest.
        largest = max(float(np.abs(b[finite]).max(initial=0)), 1.0)
        right &= np.array_equal(a[~finite], b[~finite])
        right &= bool((error <= 0.02 * np.abs(b[finite]) + 0.015 * largest).all())  # no nan passes
        worst = max(worst, float(error.max(initial=0)))
    same = all(np.array_equal(a, b) for a, b in zip(got, again, strict=True))
    return {"right": right, "largest error": worst, "same bits twice": same}


def save(path: pathlib.Path, found: dict[str, Any]) -> None:
    """Write a JSON file, which is whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(temporary, path)


def verdict(measured: bool, met: bool, what: str) -> str:
    """What a summary says of a goal."""
    return f"{'met' if met else 'not met'} ({what})" if measured else "not measured here"

"""Several processes that run one program: how they meet, agree, stop, and speak with one voice.

The engine is JAX's own (`jax.distributed`, its preemption service, `multihost_utils`); with one
process everything here is a plain call. One process, the first, writes files and prints.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from spire_jax.config.schema import ConfigError
from spire_jax.storage.bucket import in_bucket, owned
from spire_jax.storage.paths import Place

PREEMPTED = 75  # exit status: stopped by SIGTERM, goes on when started again (EX_TEMPFAIL)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_ROOT = pathlib.Path(__file__).parents[2]


class ProcessError(RuntimeError):
    """Processes that cannot work together; the message names the one and what differs."""


class Preempted(Exception):
    """SIGTERM came; what training had reached is saved, and the same command goes on from it."""


# --- meeting -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a run in several processes."""
    group = parser.add_argument_group("several processes, each started with the same command")
    group.add_argument("--distributed", action="store_true",
                       help="find the others as on Cloud TPU, GKE and Slurm")  # fmt: skip
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; elsewhere")
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")
    group.add_argument("--connect-timeout", type=int, default=50, metavar="SECONDS",
                       help="to wait for the others")  # fmt: skip


def start(args: argparse.Namespace) -> None:
    """Join the other processes, where the flags name any; call before anything else of jax.

    Raises:
        ProcessError: flags that contradict each other, or others that cannot be reached in time.
    """
    if args.connect_timeout < 1:
        raise ProcessError(f"--connect-timeout={args.connect_timeout}: give 1 second or more")
    given = (args.coordinator, args.num_processes, args.process_id)
    if given == (None, None, None):
        if not args.distributed:
            return
        address: dict[str, Any] = {}
    else:
        if args.distributed or None in given:
            raise ProcessError(
                "give --coordinator, --num-processes and --process-id together, or --distributed "
                "alone, where Cloud TPU, GKE or Slurm say who takes part"
            )
        if not 0 <= args.process_id < args.num_processes:
            raise ProcessError(f"--process-id={args.process_id} is none of 0 to "
                               f"{args.num_processes - 1}")  # fmt: skip
        host, port = _host_port(args.coordinator)
        if args.process_id == 0:
            _check_free(port)
        else:
            _wait_for(host, port, args.connect_timeout)
        address = {"coordinator_address": args.coordinator, "process_id": args.process_id,
                   "num_processes": args.num_processes}  # fmt: skip
    try:
        jax.distributed.initialize(**address, initialization_timeout=args.connect_timeout)
    except (RuntimeError, ValueError) as error:
        where = f"at {args.coordinator}" if args.coordinator else "that the environment names"
        raise ProcessError(
            f"the processes {where} did not meet within {args.connect_timeout} s "
            f"({str(error).splitlines()[0][:200]}); are all of them started, and does each reach "
            f"the first one's port? --connect-timeout waits longer"
        ) from error


def _host_port(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ProcessError(f"--coordinator={coordinator}: HOST:PORT, such as 10.0.0.2:8476")
    return host, int(port)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ProcessError(f"--coordinator: port {port} of this machine cannot be used "
                               f"({error.strerror}); choose another") from error  # fmt: skip


def _wait_for(host: str, port: int, timeout: int) -> None:
    """Return when the coordinator listens: jax's own client ends the process without a word."""
    deadline, reason = time.monotonic() + timeout, ""
    while time.monotonic() < deadline:
        try:
            with contextlib.closing(socket.create_connection((host, port), timeout=5)):
                return
        except OSError as error:
            reason = str(error)
            time.sleep(0.2)
    raise ProcessError(
        f"--coordinator={host}:{port} cannot be reached ({reason}; tried for {timeout} s); is "
        f"process 0 started there, and the port open?"
    )


def devices() -> list[jax.Device]:
    """All devices of jax; ConfigError where it finds none, as with a wrong JAX_PLATFORMS."""
    try:
        return jax.devices()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"jax finds no device ({reason}); set JAX_PLATFORMS to what is here (cpu "
                          f"always is), or leave it out") from None  # fmt: skip


# --- agreeing ----------------------------------------------------------------------------------


def facts() -> dict[str, str]:
    """What must be the same in every process: the code, Python, the packages, the devices."""
    code = hashlib.sha256()
    for path in sorted(p for d in ("spire_jax", "pallas_kernels") for p in (_ROOT / d).rglob("*")):
        if path.suffix in (".py", ".cc"):
            code.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes())
    devices()
    kinds = {d.device_kind for d in jax.local_devices()}
    return {
        "code": code.hexdigest()[:12],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": f"{jax.local_device_count()} x {', '.join(sorted(kinds))}",
    }


def check_alike(mine: Mapping[str, Any]) -> None:
    """Compare nested mappings of JSON values between all processes.

    Raises:
        ProcessError: in every process alike; names each worker that differs from worker 0, and
            in what.
    """
    if jax.process_count() == 1:
        return
    text = np.frombuffer(json.dumps(_flat(mine), sort_keys=True).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(text)]))
    room = np.zeros(int(np.max(sizes)), np.uint8)
    room[: len(text)] = text
    rows = np.asarray(multihost_utils.process_allgather(room)).reshape(jax.process_count(), -1)
    told = [
        json.loads(bytes(row[: int(size)])) for row, size in zip(rows, sizes.ravel(), strict=True)
    ]
    first, bad = told[0], []
    for i, other in enumerate(told):
        keys = [key for key in sorted({*first, *other}) if first.get(key) != other.get(key)]
        if keys:
            parts = [f"{key} {other.get(key)!r}, not {first.get(key)!r}" for key in keys[:8]]
            parts += [f"and {len(keys) - 8} more"] if len(keys) > 8 else []
            bad.append(f"worker {i} has {'; '.join(parts)}")
    if bad:
        raise ProcessError(f"the workers do not agree with worker 0: {'. '.join(bad)}. Start all "
                           f"with the same code, packages, config and data")  # fmt: skip


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def of_first(value: bool) -> bool:
    """What the first process says, in every process: files may be on its disk alone."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def by_first(check: Callable[[], None]) -> None:
    """Let the first process check something: what it raises ends the others, too.

    Raises:
        ConfigError: in every process.
    """
    failed = None
    if is_first():
        try:
            check()
        except ConfigError as error:
            failed = error
    if not of_first(failed is None):
        raise failed or ConfigError("worker 0 cannot go on; see its error")


def to_host(x: Any) -> np.ndarray:
    """The whole of an array in every process, wherever its parts are."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        if not x.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x.addressable_data(0))
    return np.asarray(x)


@contextlib.contextmanager
def only_one(workdir: Place) -> Iterator[None]:
    """Hold the work directory: two runs in it would overwrite each other.

    Raises:
        ConfigError: it cannot be written, or another run holds it; in a bucket it is the one before
            that ends (`owned`).
    """
    if not is_first():
        yield
        return
    if in_bucket(workdir):
        with owned(workdir):
            yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        held = open(workdir / ".lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be written ({error.strerror}); choose another"
        ) from error
    with held as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--workdir={workdir} is in use by another run; wait for it, or "
                              f"choose another") from None  # fmt: skip
        yield


# --- stopping ----------------------------------------------------------------------------------

_asked = itertools.count()  # the preemption service wants steps that only grow


@contextlib.contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM raises Preempted, between two instructions of Python.

    With several processes JAX's preemption service listens instead: the signal may have come to
    one of them alone, and training asks it (`stop_requests`).
    """
    if jax.process_count() > 1:
        yield
        return
    with _on_sigterm(_raise):
        yield


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM waits; the function says, once a step, whether this step is the last.

    All processes get the same answer after the same step.
    """
    if jax.process_count() > 1:
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_asked))
        return
    came: list[int] = []
    with _on_sigterm(lambda number, frame: came.append(number)):
        yield lambda: bool(came)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # it may come twice, from a group and a launcher
    raise Preempted("stopped by SIGTERM")


@contextlib.contextmanager
def _on_sigterm(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread: whoever owns it decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(message: str) -> None:
    """A line on stderr, with the worker's number where there are several."""
    worker = f"worker {jax.process_index()}: " if jax.process_count() > 1 else ""
    print(worker + message, file=sys.stderr, flush=True)

"""Training steps on several devices of this machine's CPU against one, and their wait for data.

    python -m launch.bench.mesh --config=configs/quickstart.py --meshes='1; 4:data=4; 4:fsdp=4'

Each mesh (the number of devices, and the sizes of its axes) has a process of its own, since jax
counts a CPU's devices once, as it starts. They take turns, `--steps` steps each, and wait while
another computes; every figure is the median of `--repeats` turns. All train the config's target
and drafts from the same initial weights on the same batches of its data, read as training reads
them. `ratio` is the step's time over that on the first mesh; `waiting` is the share of the time
in which the step waits for its batch.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from launch.bench.command_line import count
from launch.bench.train_steps import trained, training_steps
from spire_jax.config.files import command_line, ends_in_a_line, exit_with_error
from spire_jax.config.schema import ConfigError
from spire_jax.costs.hardware import describe
from spire_jax.data.corpus import DataError
from spire_jax.data.pipeline import Dataset, train_batches
from spire_jax.data.sources import load_corpus
from spire_jax.models.sharding import MESH_AXES, check_mesh, make_mesh
from spire_jax.training.loop import to_device
from spire_jax.training.workdir import ERRORS

WARM_UP = 3  # steps: the first compiles, the second finds the layouts that the first has left


def parse_meshes(text: str) -> list[tuple[int, dict[str, int]]]:
    """(devices, axis -> size) of each of "1; 4:data=2,tensor=2"; an axis not named is 1."""
    meshes = []
    for part in text.split(";"):
        count, _, axes = part.strip().partition(":")
        sizes = {"data": 1} | dict(axis.split("=") for axis in axes.split(",") if axis)
        if unknown := set(sizes) - set(MESH_AXES):
            raise argparse.ArgumentTypeError(
                f"no mesh axis {min(unknown)!r}; there are {', '.join(MESH_AXES)}"
            )
        meshes.append((int(count), {axis: int(size) for axis, size in sizes.items()}))
    return meshes


class Worker:
    """A process that trains on one mesh when it is told to."""

    def __init__(self, argv: list[str], devices: int, mesh: dict[str, int]):
        flags = f"--xla_force_host_platform_device_count={devices}"
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        sizes = [f"--config.mesh.{axis}={mesh.get(axis, 1)}" for axis in MESH_AXES]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch.bench.mesh", *argv, *sizes, "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip

    def answer(self) -> Any:
        """The next line that it writes; ends this process where it has failed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(self._process.wait() or 1)  # its message is on stderr
        return json.loads(line)

    def turn(self, name: str) -> tuple[float, float]:
        """Seconds of a step of a model, and the share of it that waits for the batch."""
        assert self._process.stdin is not None
        print(name, file=self._process.stdin, flush=True)
        seconds, waited = self.answer()
        return seconds, waited / seconds

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()


def work(config, steps: int) -> None:
    """Train a model for some steps whenever its name comes on stdin; write how long it took."""
    mesh = make_mesh(config.mesh)
    check_mesh(mesh, config)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        corpus = load_corpus(config.data, pathlib.Path(folder))
        train = config.train
        batches = train_batches(Dataset(corpus, train.seq_len), batch_size=train.batch_size,
                                seed=config.seed, workers=config.data.workers)  # fmt: skip
        models = training_steps(config, mesh, trained(config))
        for step in models.values():
            for _ in range(WARM_UP):
                step(to_device(next(batches), mesh))
        print(json.dumps([*models]), flush=True)
        for line in sys.stdin:
            begin, waited = time.perf_counter(), 0.0
            for _ in range(steps):
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                models[line.strip()](to_device(batch, mesh))
            print(json.dumps([(time.perf_counter() - begin) / steps, waited / steps]), flush=True)


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--meshes", type=parse_meshes, default="1; 4:data=4; 4:fsdp=4; 4:tensor=2,data=2"
    )
    parser.add_argument("--steps", type=count, default=5, help="in a turn")
    parser.add_argument("--repeats", type=count, default=7, help="turns")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args, config = command_line(parser, argv)
    if args.worker:
        try:
            return work(config, args.steps)
        except (ConfigError, DataError) as error:
            exit_with_error(error)
    workers = [Worker(argv, *mesh) for mesh in args.meshes]
    try:
        names, *_ = [worker.answer() for worker in workers]  # once all of them have compiled
        found = {
            name: [[worker.turn(name) for worker in workers] for _ in range(args.repeats)]
            for name in names
        }
    finally:
        for worker in workers:
            worker.close()
    print_table(args.meshes, found, config.train)


def print_table(meshes, found, train) -> None:
    """found: name -> turns -> meshes -> (seconds, share of waiting)."""
    table = Table("model", "devices", "mesh", "ms a step", "ratio", "waiting")
    for name, turns in found.items():
        first = [turn[0][0] for turn in turns]
        for i, (devices, mesh) in enumerate(meshes):
            seconds = [turn[i][0] for turn in turns]
            ratio = statistics.median(s / f for s, f in zip(seconds, first, strict=True))
            waiting = statistics.median(turn[i][1] for turn in turns)
            shape = " x ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1) or "one device"
            table.add_row(name, str(devices), shape, f"{1e3 * statistics.median(seconds):.1f}",
                          f"{ratio:.2f}", f"{waiting:.2%}")  # fmt: skip
    machine = describe()
    console = Console()
    console.print(f"{machine['hardware']} | jax {machine['jax']} | batch {train.batch_size} x "
                  f"{train.seq_len} tokens")  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    with ends_in_a_line(*ERRORS):
        main()

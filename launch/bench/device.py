"""What a borrowed accelerator is asked, in at most ten minutes: one JSON file.

    bash launch/bench/device.sh --out=runs/device.json    # or --small, which a CPU can do

In this order, each part a process of its own:

    kernels    ours against their references, on this device
    attention  the bytes per second of decode attention against a copy's: XLA, cuDNN, our kernel
    rounds     a speculation round's pieces and delta_t at three contexts (`round.py`)
    training   the share of the peak that training reaches at the sizes of the paper's 67M pair

A part has its share of the time that is left, and is killed at its end: a kernel that never
returns, a crash, a missing package cost what that part had not found yet, no more. FILE is whole
after every part: how each ended, what it took, the figures that it found, the last lines of its
errors. This file and the first two parts need jax, jaxtyping and etils alone.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from launch.bench.command_line import minutes
from launch.bench.timing import save
from spire_jax.config.paths import local_path

ROOT = pathlib.Path(__file__).parent.parent.parent
DESCRIBE = """
import json, jax
from spire_jax.costs.hardware import describe
print(json.dumps({"platform": jax.devices()[0].platform} | describe()))
"""


@dataclasses.dataclass(frozen=True)
class Part:
    """A command, which leaves its figures in a file."""

    name: str
    share: float  # of the time, relative to the others'
    command: tuple[str, ...]  # Python's arguments; {} is a folder of its own
    result: str = "found.json"  # in that folder


def parts(small: bool) -> tuple[Part, ...]:
    """All of them, at sizes for an accelerator or to be tried out."""
    kernels = "-m", "launch.bench.kernels", "--out={}/found.json", *(["--small"] if small else [])
    rounds = "-m", "launch.bench.round", "--out={}", "--no-operators"
    training = "-m", "launch.bench.train_steps", "--out={}/found.json"
    points = ["--batch=32", "--context=4096,1024,8192", "--k=4", "--repeats=3"]
    sizes = ["--config=configs/paper_67m.py", "--config.train.batch_size=32"]
    if small:
        points = ["--small", "--batch=1", "--context=32,64,128", "--k=2", "--repeats=1"]
        sizes = ["--config=configs/quickstart.py", "--config.train.batch_size=2",
                 "--config.train.seq_len=64", "--repeats=2"]  # fmt: skip
    return (
        Part("kernels", 2, (*kernels, "--parts=check")),
        Part("attention", 3, (*kernels, "--parts=decode")),
        Part("rounds", 3, (*rounds, *points), "rounds.json"),
        Part("training", 2, (*training, *sizes)),
    )


def run_part(part: Part, seconds: float, folder: pathlib.Path) -> dict[str, Any]:
    """How a part ended, and the figures it left; never longer than `seconds`."""
    folder.mkdir(parents=True)
    command = [sys.executable, *(argument.replace("{}", str(folder)) for argument in part.command)]
    begin = time.perf_counter()
    with (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stderr=errors, process_group=0)
        try:
            status = process.wait(seconds)
            ended = "done" if status == 0 else f"ended with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after its {seconds:.0f} s"
        finally:  # with all that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # the device's driver may hold it
                process.wait(5)
    found: dict[str, Any] = {"ended": ended, "seconds": round(time.perf_counter() - begin, 1)}
    result = folder / part.result
    found["found"] = json.loads(result.read_text()) if result.exists() else None
    if ended != "done":
        lines = (folder / "errors").read_text(errors="replace").splitlines()
        found["errors"] = lines[-20:]
        print("\n".join(lines[-20:]), file=sys.stderr)
    return found


def run_parts(chosen: Sequence[Part], out: pathlib.Path, machine: dict, seconds: float) -> bool:
    """Run one after the other within `seconds`, and write OUT; whether all are done."""
    stop = time.perf_counter() + seconds
    found: dict[str, Any] = {"machine": machine, "parts": {}}
    save(out, found)  # a folder that cannot be written is found out now
    with tempfile.TemporaryDirectory() as folder:
        for i, part in enumerate(chosen):
            left = stop - time.perf_counter()
            limit = left * part.share / sum(p.share for p in chosen[i:])
            print(f"--- {part.name}: at most {limit:.0f} s", flush=True)
            ended = run_part(part, limit, pathlib.Path(folder) / part.name)
            print(f"--- {part.name}: {ended['ended']}, {ended['seconds']:.0f} s", flush=True)
            found["parts"][part.name] = ended
            save(out, found)
    return all(part["ended"] == "done" for part in found["parts"].values())


def describe_machine(seconds: float = 60.0) -> dict[str, str]:
    """The devices that a process of this Python gets; this one takes none of their memory."""
    try:
        done = subprocess.run([sys.executable, "-c", DESCRIBE], cwd=ROOT, capture_output=True,
                              text=True, timeout=seconds)  # fmt: skip
    except subprocess.TimeoutExpired:
        sys.exit(f"error: jax finds no device within {seconds:.0f} s")
    if done.returncode:
        why = (done.stderr.strip() or "no message").splitlines()[-1]
        sys.exit(f"error: {sys.executable} gets no device: {why}. Name a Python that has jax and "
                 f"the other packages of requirements.txt: PYTHON=/path/to/python")  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    names = [part.name for part in parts(small=True)]
    parser = argparse.ArgumentParser("launch/bench/device.sh", None, __doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=local_path, required=True, help="a JSON file")
    parser.add_argument("--minutes", type=minutes, default=9.0, help="for all parts together")
    parser.add_argument("--parts", default=",".join(names), help="of " + ", ".join(names))
    parser.add_argument("--small", action="store_true", help="tiny shapes; all that a CPU runs")
    args = parser.parse_args(argv)
    wanted = args.parts.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"--parts: unknown {sorted(unknown)}; there are {', '.join(names)}")
    machine = describe_machine()
    print(" | ".join(machine.values()), flush=True)
    if machine["platform"] == "cpu" and not args.small:
        parser.error("jax has only a CPU here, which runs --small; for an accelerator install "
                     "jax[cuda13] or jax[tpu], or name another Python: PYTHON=...")  # fmt: skip
    if args.small:  # its times say nothing; it compiles in half the time
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    chosen = [part for part in parts(args.small) if part.name in wanted]
    done = run_parts(chosen, args.out, machine, 60 * args.minutes)
    print(f"{args.out}: {', '.join(wanted)}")
    return 0 if done else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part that runs ends too
    sys.exit(main())

"""A pipeline of seconds: a folder of text, and configs small enough to run many times."""

import os
import pathlib
import random
import subprocess
import sys
from collections.abc import Mapping

from spire_jax import run

WORDS = ["def", "return", "if", "else", "for", "in", "while", "try", "class", "self", "x", "y"]
OVERRIDES = {
    "target.n_layers": 2,
    "target.d_model": 16,
    "target.n_kv_heads": 2,
    "target.d_head": 8,
    "target.d_ff": 24,
    "drafts.stride2": "",  # a program for each would take longer than all the rest
    "drafts.stride4": "",
    "drafts.spire.kind": "spire",
    "drafts.magicdec.window": 6,
    "drafts.spire.n_layers": 1,
    "drafts.spire.window": 8,
    "drafts.spire.steps": 12,
    "drafts.vanilla.n_layers": 1,
    "drafts.vanilla.d_model": 16,
    "drafts.vanilla.d_ff": 16,
    "drafts.vanilla.steps": 8,
    "train.steps": 24,
    "train.batch_size": 4,
    "train.seq_len": 32,
    "train.log_every": 2,
    "train.checkpoint_every": 3,
    "eval.contexts": 6,
    "eval.context_lengths": "8,16",
    "eval.output_length": 12,
    "eval.batch_size": 4,
    "eval.bootstrap": 200,
    "eval.timing_repeats": 1,
    "eval.examples": 1,
    "eval.heldout_rows": 8,
}


def write_corpus(folder: pathlib.Path) -> pathlib.Path:
    """Forty documents of made-up code, the same every time."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for i in range(40):
        lines = [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(40)]
        (folder / f"module_{i}.py").write_text("\n".join(lines))
    return folder


def arguments(corpus: pathlib.Path, workdir: pathlib.Path, *more: str) -> list[str]:
    """The command line of a run; later values of a key win."""
    values = {"data.source": corpus, **OVERRIDES}
    return [
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in values.items()),
        *more,
    ]


def main(corpus: pathlib.Path, workdir: pathlib.Path, *more: str) -> int:
    """Run in this process; the exit status."""
    return run.main(arguments(corpus, workdir, *more))


def process(
    corpus: pathlib.Path, workdir: pathlib.Path, *more: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """Run in a process of its own, which can be killed; `env` is added to its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "spire_jax.run", *arguments(corpus, workdir, *more)],
        env={**os.environ, **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

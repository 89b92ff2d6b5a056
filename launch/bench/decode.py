"""Decoding of a trained pair against the clock, the cost model, and other programs.

    python -m launch.bench.decode --config=configs/smollm2_135m.py --workdir=runs/smollm2 \
        --methods=autoregressive,quarter,tenth,magicdec --peers --out=runs/smollm2/bench

For every type, batch size B and context L: tokens per second of each method, taken in turn in one
process from the same held-out prompts (prefill and compilation left out); its tau; its speed-up
over autoregressive decoding; what the cost model says of this machine, per operator with the
unembedding, at the bytes/s of a large copy or read and the FLOP/s of a large product that are
measured in the same turns; and the ratio of the two.

A run is a fixed number of rounds of every row: no row waits for another, and tau and time come
from the same rounds. `--peers` sets beside it, on the same prompts and threads, `generate` and
assisted generation of transformers and llama.cpp at the same width of weights (`peers.py`, in an
environment that `peers.sh` makes). Points are added to OUT/decode.json as they are measured.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from launch.bench.command_line import count, sizes
from spire_jax.config.files import command_line, exit_with_error
from spire_jax.config.paths import local_path, path_or_url
from spire_jax.config.schema import AUTOREGRESSIVE, ConfigError, ExperimentConfig
from spire_jax.costs.hardware import describe
from spire_jax.costs.throughput import round_cost
from spire_jax.data.pipeline import cut_contexts
from spire_jax.decoding import (
    Weights,
    decode_rounds,
    generation_lengths,
    start,
)
from spire_jax.decoding.build import for_decoding, make_decoder
from spire_jax.pretrained.gguf_file import is_gguf
from spire_jax.results.intervals import mean_generation_length
from spire_jax.storage.metrics import write_whole
from spire_jax.training.workdir import ERRORS, WorkDir

Record = dict[str, Any]
SHARES = "multiplier", "predicted_multiplier", "share_of_prediction", "share_of_bandwidth"
VARIANT = "with_head"  # of the cost model: per operator, with the unembedding
COPIED, PRODUCT = 2**26, 2048  # elements of the array that is copied and read; rows of the product
PEERS_PYTHON = pathlib.Path(".venv/parity/bin/python")


@dataclasses.dataclass(frozen=True)
class Point:
    """What is held fixed while methods take turns."""

    dtype: str
    batch: int
    context: int

    def config(self, config: ExperimentConfig, k: int) -> ExperimentConfig:
        """The config at this point, its cost model counting elements of this type."""
        width = float(jnp.dtype(self.dtype).itemsize)
        of = dataclasses.replace
        return of(
            config,
            decode=of(config.decode, dtype=self.dtype, k=k),
            throughput=of(config.throughput, weight_bytes=width, cache_bytes=width),
        )


def measure(
    config: ExperimentConfig,
    weights: Mapping[str, Weights],
    point: Point,
    prompts: Sequence[np.ndarray],
    runs: Sequence[tuple[str, int]],
    tokens: int,
    repeats: int,
) -> list[Record]:
    """One record for each (method, k) of `runs`, all in turn; `tokens` per row, about."""
    programs = {
        (name, k): (make_decoder(point.config(config, max(k, 1)), name), weights[name],
                    rounds_of(k, tokens))
        for name, k in runs
    }  # fmt: skip
    width = point.context + room_for([k for _, k in runs], tokens)
    machine = {"copy": jax.jit(lambda x: x + 1, donate_argnums=0), "read": jax.jit(jnp.sum),
               "product": jax.jit(jnp.matmul)}  # fmt: skip
    copied = jnp.zeros(COPIED, jnp.float32)
    square = jnp.ones((PRODUCT, PRODUCT), point.dtype)
    seconds: dict[Any, list[float]] = {}
    counts: dict[Any, Any] = {}
    for repeat in range(repeats + 1):  # the first compiles
        for what, program in machine.items():
            given = (square, square) if what == "product" else (copied,)
            result, spent = _timed(program, *given)
            copied = result if what == "copy" else copied
            seconds.setdefault(what, []).append(spent)
        for key, (decoder, held, rounds) in programs.items():
            seeds = [1000 * repeat + row for row in range(point.batch)]
            budgets = [width - point.context - decoder.k] * point.batch
            state = start(decoder, held, prompts, budgets, seeds, width=width)
            jax.block_until_ready(state)
            state, spent = _timed(decode_rounds, decoder, held, state, rounds)
            found = np.asarray(state.counts).sum(axis=0)
            assert found.sum() == rounds * point.batch, "a row ended early"
            seconds.setdefault(key, []).append(spent / rounds)
            counts[key] = counts.get(key, 0) + (found if repeat else 0)
    rates = {
        "bytes_per_s": max(8.0 * COPIED / _median(seconds["copy"]),
                           4.0 * COPIED / _median(seconds["read"])),
        "flops_per_s": 2.0 * PRODUCT**3 / _median(seconds["product"]),
    }  # fmt: skip
    step = _median(seconds[AUTOREGRESSIVE, 0])
    return [
        record_of(config, point, name, k, _median(seconds[name, k]), counts[name, k], step, rates)
        for name, k in runs
    ]


def rounds_of(k: int, tokens: int) -> int:
    """Rounds of one run: half as many as autoregressive steps."""
    return tokens if k == 0 else max(tokens // 2, 1)


def room_for(ks: Sequence[int], tokens: int) -> int:
    """Positions that a run needs after the context, should everything be accepted."""
    return max(rounds_of(k, tokens) * (k + 1) + k + 1 for k in ks)


def record_of(
    config: ExperimentConfig,
    point: Point,
    name: str,
    k: int,
    seconds: float,
    counts: np.ndarray,
    step: float,
    rates: Mapping[str, float],
) -> Record:
    """A method's figures: measured, and the cost model's at this machine's own rates.

    Args:
        seconds: of a round; `step` of an autoregressive step.
        counts: rounds in which 0 .. k drafted tokens were accepted.
    """
    emitted, rounds = generation_lengths(counts)
    tau = float(mean_generation_length(emitted, rounds))
    cost = round_cost(
        point.config(config, max(k, 1)), name, batch=point.batch, context=point.context,
        k=k or None, hoi=rates["flops_per_s"] / rates["bytes_per_s"], variant=VARIANT,
    )  # fmt: skip
    modeled = cost.total / rates["flops_per_s"] if k else cost.target_step / rates["flops_per_s"]
    multiplier, predicted = tau * step / seconds, tau / cost.delta_t
    return {
        **dataclasses.asdict(point), **describe(), "method": name, "k": k, "tau": tau, **rates,
        "seconds_per_round": seconds, "tokens_per_s": point.batch * tau / seconds,
        "multiplier": multiplier, "predicted_multiplier": predicted,
        "share_of_prediction": multiplier / predicted,
        "modeled_seconds_per_round": modeled, "share_of_bandwidth": modeled / seconds,
    }  # fmt: skip


def _timed(program: Any, *arguments: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    result = jax.block_until_ready(program(*arguments))
    return result, time.perf_counter() - begin


def _median(values: Sequence[float]) -> float:
    return statistics.median(values[1:])


# --- other programs ----------------------------------------------------------------------------


def peers(
    config: ExperimentConfig, point: Point, prompts: Sequence[np.ndarray], tokens: int, repeats: int
) -> list[Record]:
    """Tokens per second of transformers and llama.cpp on the same prompts; why not, on stderr."""
    with tempfile.TemporaryDirectory() as folder:
        job = {
            **dataclasses.asdict(point), "gguf": config.pretrained.path, "tokens": tokens,
            "k": config.decode.k, "repeats": repeats, "threads": len(os.sched_getaffinity(0)),
            "prompts": [prompt.tolist() for prompt in prompts],
        }  # fmt: skip
        path = pathlib.Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        done = subprocess.run(
            [str(PEERS_PYTHON), "launch/bench/peers.py", str(path)],
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        print(f"launch/bench/peers.py ended with status {done.returncode}: what it had not printed "
              f"is missing", file=sys.stderr)  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [dataclasses.asdict(point) | describe() | {"k": 0} | line for line in lines]


# --- command line ------------------------------------------------------------------------------


def add(out: pathlib.Path, records: Sequence[Record]) -> list[Record]:
    """Add records to OUT/decode.json; those of the same point and method are replaced."""
    path = out / "decode.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    place = ("dtype", "batch", "context", "method", "k")
    by_place = {tuple(r[p] for p in place): r for r in [*kept, *records]}
    rows = [by_place[key] for key in sorted(by_place)]
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(rows, indent=1) + "\n")
    return rows


def print_table(records: Sequence[Record]) -> None:
    """One row a record; for other programs only their speed."""
    console = rich.console.Console(highlight=False)
    console = console if console.is_terminal else rich.console.Console(width=140, highlight=False)
    columns = ("type", "B", "L", "method", "k", "tau", "tokens/s", "multiplier", "predicted",
               "share", "of bandwidth")  # fmt: skip
    table = rich.table.Table(title="decoding, measured and modeled", title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("type", "method") else "right")
    for r in records:
        figures = [f"{r[key]:.2f}" if key in r else "-" for key in SHARES]
        tau = f"{r['tau']:.2f}" if "tau" in r else "-"
        table.add_row(r["dtype"], str(r["batch"]), str(r["context"]), r["method"], str(r["k"]), tau,
                      f"{r['tokens_per_s']:.1f}", *figures)  # fmt: skip
    table.caption = (
        "multiplier: over autoregressive decoding in the same turns; predicted: tau / delta_t of "
        "the cost model at this machine's rates; share: their ratio; of bandwidth: the model's "
        "time of a round over the clock's"
    )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m launch.bench.decode", None,
                                     __doc__.split("\n", 1)[0])  # fmt: skip
    parser.add_argument("--workdir", type=path_or_url, required=True,
                        help="where the drafts were trained")  # fmt: skip
    parser.add_argument("--methods", help="comma-separated; by default every draft")
    for name, default in (("batch", "1,4,16"), ("context", "128,1024,4096"), ("k", "4")):
        parser.add_argument(f"--{name}", type=sizes, default=sizes(default))
    parser.add_argument("--dtype", default="float32,bfloat16", help="comma-separated")
    parser.add_argument("--tokens", type=count, default=32, help="per row and run, about")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--peers", action="store_true", help="transformers and llama.cpp too")
    parser.add_argument("--out", type=local_path, default=pathlib.Path("runs/bench_decode"))
    args, config = command_line(parser, argv)
    try:
        if args.peers and not (PEERS_PYTHON.exists() and is_gguf(config.pretrained.path)):
            raise ConfigError("--peers needs a GGUF target (pretrained.path) and an environment "
                              "that bash launch/bench/peers.sh makes; use that")  # fmt: skip
        run(args, config)
    except ERRORS as error:
        exit_with_error(error)


def run(args: argparse.Namespace, config: ExperimentConfig) -> None:
    """Measure the grid, print the table, write OUT/decode.json."""
    at = WorkDir(config, args.workdir)
    names = [name for name, _ in config.drafts]
    methods = args.methods.split(",") if args.methods else names
    drafting = [name for name in methods if name != AUTOREGRESSIVE]
    if unknown := set(drafting) - set(names):
        raise ConfigError(f"--methods: unknown {sorted(unknown)}; there are {names}")
    runs = [(AUTOREGRESSIVE, 0), *itertools.product(drafting, args.k)]
    room = room_for([0, *args.k], args.tokens)
    contexts = cut_contexts(
        at.corpus, n_contexts=max(args.batch), context_length=max(args.context), room=room,
        seed=config.seed,
    )  # fmt: skip
    target = at.target()
    drafts = {name: at.draft(name, target) for name in drafting}
    records: list[Record] = []
    with jax.set_mesh(at.mesh):
        for dtype in args.dtype.split(","):
            cast, cast_drafts = for_decoding(
                Point(dtype, 1, 1).config(config, max(args.k)), target, drafts
            )
            weights = {AUTOREGRESSIVE: Weights(cast)}
            weights |= {name: Weights(cast, cast_drafts[name]) for name in drafting}
            for batch, context in itertools.product(args.batch, args.context):
                point = Point(dtype, batch, context)
                prompts = [c.last(context) for c in contexts[:batch]]
                found = measure(config, weights, point, prompts, runs, args.tokens, args.repeats)
                if args.peers:
                    found += peers(config, point, prompts, args.tokens, args.repeats)
                print_table(found)
                records = add(args.out, found)
    print_table(records)
    print(f"{args.out}: decode.json")


if __name__ == "__main__":
    main()

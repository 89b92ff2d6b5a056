"""A traffic mix on this machine: the serving loop per method, beside what the cost model says.

    python -m launch.bench.mix --config=configs/quickstart.py --workdir=runs/quickstart \
        --mix=mix.json --methods=spire:4,magicdec:4 --out=runs/quickstart/mix

In every cell of the mix (spire_jax/results/mix.py) a server of its batch gets held-out prompts
whose lengths are drawn from its spread, more than it has slots for, so that rows of all lengths and
ages share each round. All methods take turns, the same prompts and seeds for all. Tokens per second
are counted over the time that is not spent reading prompts, which the model leaves out (`whole`:
over all of it).

Predicted are multipliers over autoregressive decoding of the same cell: the cost model's at this
machine's own bytes/s and FLOP/s, with the tau that the method had; and once more with the constant
per pass (`launch_us`) that explains its autoregressive step. Over the mix: `share` of the tokens at
each cell's rate.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from launch.bench.command_line import count
from launch.bench.decode import COPIED, PRODUCT, VARIANT
from spire_jax.config.files import command_line, exit_with_error
from spire_jax.config.paths import local_path, path_or_url
from spire_jax.config.schema import AUTOREGRESSIVE, ConfigError, ExperimentConfig
from spire_jax.costs.chips import Chip
from spire_jax.costs.hardware import describe
from spire_jax.costs.throughput import round_cost
from spire_jax.data.pipeline import Context, cut_contexts
from spire_jax.decoding import Weights
from spire_jax.decoding.build import for_decoding, make_decoder
from spire_jax.results.mix import Cell, read_mix
from spire_jax.serving.batching import Server, Serving
from spire_jax.serving.records import Request, Result
from spire_jax.storage.metrics import write_whole
from spire_jax.training.workdir import ERRORS, WorkDir

Method = tuple[str, int]  # a draft and its depth; 0: autoregressive


class TimedServer(Server):
    """A server that knows how long it has read prompts."""

    reading = 0.0

    def _prefill(self) -> bool:
        begin = time.perf_counter()
        found = super()._prefill()
        if found:
            jax.block_until_ready(self._state.lengths)
            self.reading += time.perf_counter() - begin
        return found


def machine(dtype: str) -> Chip:
    """This machine as a chip: bytes/s of a large copy or read, FLOP/s of a large product in dtype.

    Its one peak is at the width that weights and caches have in that type.
    """
    copied = np.ones(COPIED, np.float32)
    square = jax.numpy.ones((PRODUCT, PRODUCT), dtype)
    copy, read = jax.jit(lambda x: x + 1), jax.jit(jax.numpy.sum)
    rates = {
        "copy": 8.0 * COPIED / _seconds(copy, jax.device_put(copied)),
        "read": 4.0 * COPIED / _seconds(read, jax.device_put(copied)),
        "product": 2.0 * PRODUCT**3 / _seconds(jax.jit(jax.numpy.matmul), square, square),
    }
    memory = max(rates["copy"], rates["read"])
    peak = {square.dtype.itemsize: rates["product"]}
    return Chip("this machine", peak, memory, float("inf"), 1.0, 1, "measured")


def _seconds(program: Any, *arguments: Any) -> float:
    found = []
    for _ in range(6):  # the first compiles
        begin = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        found.append(time.perf_counter() - begin)
    return statistics.median(found[1:])


def requests_of(cell: Cell, contexts: Sequence[Context], n: int, tokens: int) -> list[Request]:
    """n prompts, their lengths drawn from the cell's spread; the same for every method."""
    lengths = np.random.default_rng(0).choice(np.array(cell.contexts), n)
    return [
        Request(i, contexts[i % len(contexts)].last(round(length)), tokens, seed=i)
        for i, length in enumerate(lengths)
    ]


def measure(
    config: ExperimentConfig,
    weights: dict[str, Weights],
    cell: Cell,
    contexts: Sequence[Context],
    methods: Sequence[Method],
    tokenizer: Any,
    *,
    tokens: int,
    waves: int,
    repeats: int,
) -> dict[Method, dict[str, Any]]:
    """Tokens/s and tau of every method in one cell, medians over repeats in turn.

    Args:
        tokens: that each request gets.
        waves: requests per slot.
    """
    room = max(k for _, k in methods) + 1
    serving = Serving(batch=cell.batch, width=round(max(cell.contexts)) + tokens + room,
                      chunk=128, rounds_per_call=config.decode.rounds_per_call)  # fmt: skip
    asked = requests_of(cell, contexts, waves * cell.batch, tokens)
    servers = {}
    for name, k in methods:
        at = dataclasses.replace(config, decode=dataclasses.replace(config.decode, k=max(k, 1)))
        servers[name, k] = TimedServer(make_decoder(at, name), weights[name], tokenizer, serving)
    rates: dict[Method, list[float]] = {method: [] for method in methods}
    wholes: dict[Method, list[float]] = {method: [] for method in methods}
    emitted = dict.fromkeys(methods, 0)
    rounds = dict.fromkeys(methods, 0)
    for _ in range(repeats):
        for method, server in servers.items():
            server.reading, begin = 0.0, time.perf_counter()
            results = [r for r in server.serve(iter(asked)) if isinstance(r, Result)]
            spent = time.perf_counter() - begin
            assert len(results) == len(asked), "a request failed"
            n = sum(len(r.tokens) for r in results)
            rates[method].append(n / (spent - server.reading))
            wholes[method].append(n / spent)
            emitted[method] += sum(map(sum, (r.generation_lengths for r in results)))
            rounds[method] += sum(len(r.generation_lengths) for r in results)
    return {
        method: {"tokens_per_s": statistics.median(rates[method]),
                 "whole_tokens_per_s": statistics.median(wholes[method]),
                 "tau": emitted[method] / rounds[method]}
        for method in methods
    }  # fmt: skip


def predicted(
    config: ExperimentConfig, cell: Cell, method: Method, tau: float, chip: Chip, launch_us: float,
    tokens: int,
) -> float:  # fmt: skip
    """Modeled tokens/s of a cell, its rows on average half way through their output."""
    (name, k), ((width, peak),) = method, chip.peak_flops.items()
    at = dataclasses.replace(config.throughput, weight_bytes=float(width), compute_bytes=width,
                             cache_bytes=float(width), launch_us=launch_us)  # fmt: skip
    cost = round_cost(
        dataclasses.replace(config, throughput=at), name, batch=cell.batch, k=k or None,
        context=[n + tokens / 2 for n in cell.contexts], hoi=chip, variant=VARIANT,
    )  # fmt: skip
    return cell.batch * tau * peak / cost.total


def records_of(
    config: ExperimentConfig, cells: Sequence[Cell], found: Sequence[dict[Method, dict[str, Any]]],
    chip: Chip, tokens: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """One record per cell and method, then one per method for the whole mix."""
    alone, records = (AUTOREGRESSIVE, 0), []
    rates: dict[Method, dict[str, list[float]]] = {}
    for cell, by_method in zip(cells, found, strict=True):
        measured = by_method[alone]["tokens_per_s"]
        bare = predicted(config, cell, alone, 1.0, chip, 0.0, tokens)
        launch_us = 1e6 * max(cell.batch / measured - cell.batch / bare, 0.0)
        for method, of in by_method.items():
            model, launched = (
                predicted(config, cell, method, of["tau"], chip, us, tokens)
                for us in (0.0, launch_us)
            )
            base = predicted(config, cell, alone, 1.0, chip, launch_us, tokens)
            record = {
                "cell": cell.name, "share": cell.share, "method": method[0], "k": method[1], **of,
                "multiplier": of["tokens_per_s"] / measured, "predicted": model / bare,
                "predicted_with_launch": launched / base, "launch_us": launch_us,
            }  # fmt: skip
            records.append(record)
            by_key = rates.setdefault(method, {})
            for key, rate in (("tokens_per_s", of["tokens_per_s"]), ("model", model),
                              ("launched", launched), ("base", base), ("bare", bare),
                              ("whole_tokens_per_s", of["whole_tokens_per_s"])):  # fmt: skip
                by_key.setdefault(key, []).append(cell.share / rate)
    totals = {m: {key: 1 / sum(of) for key, of in by_key.items()} for m, by_key in rates.items()}
    records += [
        {"cell": "the mix", "share": 1.0, "method": m[0], "k": m[1],
         "tokens_per_s": of["tokens_per_s"], "whole_tokens_per_s": of["whole_tokens_per_s"],
         "multiplier": of["tokens_per_s"] / totals[alone]["tokens_per_s"],
         "predicted": of["model"] / of["bare"],
         "predicted_with_launch": of["launched"] / of["base"]}
        for m, of in totals.items()
    ]  # fmt: skip
    return records


def print_table(records: Sequence[dict[str, Any]]) -> None:
    console = rich.console.Console(highlight=False)
    console = console if console.is_terminal else rich.console.Console(width=120, highlight=False)
    table = rich.table.Table(title="a mix, measured and modeled", title_justify="left")
    for column in ("cell", "method", "k", "tau", "tokens/s", "whole", "multiplier", "predicted",
                   "with launch"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("cell", "method") else "right")
    for before, r in zip([None, *records], records, strict=False):
        if before and before["cell"] != r["cell"]:
            table.add_section()
        tau = f"{r['tau']:.2f}" if "tau" in r else ""
        table.add_row(r["cell"], r["method"], str(r["k"] or ""), tau, f"{r['tokens_per_s']:,.0f}",
                      f"{r['whole_tokens_per_s']:,.0f}", f"{r['multiplier']:.2f}",
                      f"{r['predicted']:.2f}", f"{r['predicted_with_launch']:.2f}")  # fmt: skip
    table.caption = (
        "whole: with the time in which prompts were read; multiplier: over autoregressive "
        "decoding; predicted: the cost model's at this machine's rates; with launch: and the "
        "constant per pass that explains its step"
    )
    console.print(table)


def methods_of(text: str | None, config: ExperimentConfig) -> list[Method]:
    """spire:4,block:8 as methods, autoregressive decoding first.

    Raises:
        ConfigError: a draft that the config does not have, or no depth.
    """
    given = text or ",".join(f"{name}:{config.decode.k}" for name, _ in config.drafts)
    found = [(AUTOREGRESSIVE, 0)]
    for part in given.split(","):
        name, _, k = part.partition(":")
        config.draft(name)
        if not k.isdecimal() or not int(k):
            raise ConfigError(f"--methods: {part!r} is no draft with its depth, such as {name}:4")
        found.append((name, int(k)))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m launch.bench.mix", None,
                                     __doc__.split("\n", 1)[0])  # fmt: skip
    parser.add_argument("--workdir", type=path_or_url, required=True, help="a finished run")
    parser.add_argument("--mix", type=local_path, required=True, help="the traffic, a JSON file")
    parser.add_argument("--methods", help="NAME:K,NAME:K; by default every draft at decode.k")
    parser.add_argument("--tokens", type=count, default=64, help="per request")
    parser.add_argument("--waves", type=count, default=3, help="requests per slot")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--out", type=local_path, default=pathlib.Path("runs/bench_mix"))
    args, config = command_line(parser, argv)
    try:
        cells = read_mix(args.mix, config.target.max_len)
        run(args, config, cells, methods_of(args.methods, config))
    except ERRORS as error:
        exit_with_error(error)


def run(
    args: argparse.Namespace, config: ExperimentConfig, cells: Sequence[Cell],
    methods: Sequence[Method],
) -> None:  # fmt: skip
    """Measure every cell, print the table, write OUT/measured.json."""
    at = WorkDir(config, args.workdir)
    longest = round(max(max(cell.contexts) for cell in cells))
    contexts = cut_contexts(
        at.corpus, n_contexts=max(cell.batch for cell in cells), context_length=longest,
        room=args.tokens + max(k for _, k in methods), seed=config.seed,
    )  # fmt: skip
    target = at.target()
    drafts = {name: at.draft(name, target) for name, k in methods if k}
    with jax.set_mesh(at.mesh):
        target, drafts = for_decoding(config, target, drafts)
        weights = {AUTOREGRESSIVE: Weights(target)}
        weights |= {name: Weights(target, of) for name, of in drafts.items()}
        chip = machine(config.decode.dtype)
        found = [
            measure(config, weights, cell, contexts, methods, at.corpus.tokenizer,
                    tokens=args.tokens, waves=args.waves, repeats=args.repeats)
            for cell in cells
        ]  # fmt: skip
    records = records_of(config, cells, found, chip, args.tokens)
    print_table(records)
    args.out.mkdir(parents=True, exist_ok=True)
    (flops,) = chip.peak_flops.values()
    about = {**describe(), "dtype": config.decode.dtype, "bytes_per_s": chip.hbm_bytes_per_s,
             "flops_per_s": flops}  # fmt: skip
    write_whole(
        args.out / "measured.json", json.dumps({"machine": about, "records": records}, indent=1)
    )
    print(f"{args.out}: measured.json")


if __name__ == "__main__":
    main()

"""What `round.py` measures, and its times beside the cost model's: predictions, goals, tables.

A record is one point of the grid (batch B, context L, depth k), as `round.py` measures it:

    seconds          of one pass of each piece
    bytes_per_s, flops_per_s    the machine's, timed in turn with the pieces
    predicted        by variant of `spire_jax.costs.roofline`: seconds of step, draft_step and
                     verification at those speeds, and delta_t
    cache_bytes, temporary_bytes    of the round
"""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import rich.console
import rich.table
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spire_jax.config.schema import (
    DecodeConfig,
    ExperimentConfig,
    ModelConfig,
    ThroughputConfig,
    TrainConfig,
)
from spire_jax.costs.chips import device_chip
from spire_jax.costs.roofline import VARIANTS, visible_rows
from spire_jax.costs.throughput import round_cost
from spire_jax.drafting.spire import SpireOptions
from spire_jax.storage.metrics import write_whole

Record = dict[str, Any]

DRAFT = "spire"
HONEST = "with_head"  # the variant that the goals are held against: per operator, with the head
GOAL_CHIP, GOAL_SHAPE = "h200", "llama3_8b"
PIECES = ("step", "draft_step", "verification", "sampling", "refresh", "round")


# --- what is measured ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """A target's sizes, the grid, and the arrays that the machine's own speed is taken from."""

    name: str
    target: ModelConfig
    dtype: str
    copied: int  # bytes of the copied array
    product: int  # rows and columns of the multiplied matrices
    batch: tuple[int, ...]
    context: tuple[int, ...]
    k: tuple[int, ...]


LLAMA_3_8B = Shape(
    GOAL_SHAPE,
    ModelConfig(n_layers=32, d_model=4096, n_kv_heads=8, q_per_kv=4, d_head=128, d_ff=14336,
                vocab_size=128256, n_tokens=128256, rope_base=500000.0, norm_eps=1e-5),
    "bfloat16", copied=2**30, product=8192,
    batch=(8, 32, 64), context=(1024, 2048, 4096, 8192), k=(2, 4, 8),
)  # fmt: skip
# An eighth of the layers, width and vocabulary.
SMALL = Shape(
    "small",
    ModelConfig(n_layers=4, d_model=512, n_kv_heads=2, q_per_kv=4, d_head=64, d_ff=1792,
                vocab_size=16032, n_tokens=16032, rope_base=500000.0, norm_eps=1e-5),
    "float32", copied=2**28, product=2048,
    batch=(4, 16), context=(256, 1024), k=(2, 4),
)  # fmt: skip


def experiment(shape: Shape) -> ExperimentConfig:
    """The config of a shape: its target, and a SPIRe draft of the last quarter of its layers."""
    draft = SpireOptions(n_layers=max(1, shape.target.n_layers // 4))
    width = float(jnp.dtype(shape.dtype).itemsize)
    return ExperimentConfig(
        target=shape.target,
        drafts=((DRAFT, draft),),
        train=TrainConfig(dtype=shape.dtype),
        decode=DecodeConfig(dtype=shape.dtype),
        throughput=ThroughputConfig(weight_bytes=width, cache_bytes=width, compute_bytes=width),
    )


# --- predictions --------------------------------------------------------------------------------


def with_predictions(config: ExperimentConfig, record: Record) -> Record:
    """The record with what each variant of the cost model says at the measured speeds.

    Adds `delta_t`, `predicted`, `step_bytes` (weights, unembedding and cache that a step reads)
    and `operators`: seconds per operator of the target's passes over 1 and k + 1 tokens.
    """
    flops, bytes_per_s = record["flops_per_s"], record["bytes_per_s"]
    where = {name: record[name] for name in ("batch", "context", "k")}
    predicted = {}
    for variant in VARIANTS:
        cost = round_cost(config, DRAFT, **where, hoi=flops / bytes_per_s, variant=variant)
        predicted[variant] = {
            "step": cost.target_step / flops,
            "draft_step": cost.draft_step / flops,
            "verification": cost.verification / flops,
            "round": cost.total / flops,
            "delta_t": cost.delta_t,
        }
    target, at = config.target, config.throughput
    body, head = target.body_parameters(), target.d_model * target.vocab_size
    cached = visible_rows(target, float(record["context"])) * target.cache_row()
    cache_bytes = record["batch"] * cached * at.cache_bytes
    operators = {}
    for name, tokens in (("step", 1), ("verification", record["k"] + 1)):
        rows = record["batch"] * tokens
        for part, size in (("products", body), ("unembedding", head)):
            operators[f"{name}_{part}"] = max(
                2.0 * size * rows / flops, size * at.weight_bytes / bytes_per_s
            )
        operators[f"{name}_attention"] = cache_bytes / bytes_per_s
    seconds = record["seconds"]
    return {
        **record,
        "delta_t": seconds["round"] / seconds["step"],
        "predicted": predicted,
        "operators": operators,
        "step_bytes": (body + head) * at.weight_bytes + cache_bytes,
    }


# --- goals --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Goal:
    """Something asked of every record that it applies to."""

    name: str
    figure: Callable[[Record], float | None]  # None: not measured
    met: Callable[[float], bool]
    worst: Callable[[Sequence[float]], float]  # of several figures, the one farthest from it
    applies: Callable[[Record], bool] = lambda record: True


def _over(record: Record, piece: str) -> float:
    return record["seconds"][piece] / record["predicted"][HONEST][piece]


def _verification_ratio(record: Record) -> float:
    """verification / step, measured over predicted."""
    return _over(record, "verification") / _over(record, "step")


def _temporaries(record: Record) -> float | None:
    temporary = record["temporary_bytes"]
    return None if temporary is None else temporary / record["cache_bytes"]


def _farthest_from_1(figures: Sequence[float]) -> float:
    return max(figures, key=lambda x: abs(x - 1))


GOALS = (
    Goal("step: bytes/s over the copy's, at least 0.80",
         lambda r: r["step_bytes"] / r["seconds"]["step"] / r["bytes_per_s"],
         lambda x: x >= 0.8, min),
    Goal("verification of 5 tokens / step over its prediction, 0.95 to 1.05",
         _verification_ratio, lambda x: abs(x - 1) <= 0.05, _farthest_from_1,
         lambda r: r["k"] == 4),
    Goal("draft step over its bound, at most 1.3",
         lambda r: _over(r, "draft_step"), lambda x: x <= 1.3, max),
    Goal("sampling and acceptance, share of a round, at most 0.03",
         lambda r: r["seconds"]["sampling"] / r["seconds"]["round"], lambda x: x <= 0.03, max),
    Goal("temporaries over the caches' bytes, at most 0.02",
         _temporaries, lambda x: x <= 0.02, max),
    Goal("delta_t over its prediction, 0.90 to 1.10",
         lambda r: r["delta_t"] / r["predicted"][HONEST]["delta_t"],
         lambda x: abs(x - 1) <= 0.1, _farthest_from_1),
)  # fmt: skip


def judged(records: Sequence[Record], measured_here: bool) -> list[tuple[str, str, str]]:
    """Each goal, its figure (the worst point's, and the median), and its verdict.

    A goal is met where every point meets it. The goals are an H200's at the size of Llama 3 8B:
    on another machine or at another size the verdict is "not measured here".
    """
    rows = []
    for goal in GOALS:
        figures = [f for r in records if goal.applies(r) and (f := goal.figure(r)) is not None]
        shown, verdict = "-", "not measured here"
        if figures:
            worst = goal.worst(figures)
            shown = f"{worst:.3f} (median {statistics.median(figures):.3f})"
            if measured_here:
                verdict = "met" if goal.met(worst) else "not met"
        rows.append((goal.name, shown, verdict))
    return rows


# --- files and tables ---------------------------------------------------------------------------


def load(out: pathlib.Path) -> list[Record]:
    """The records of a folder; none where there is no file yet."""
    path = out / "rounds.json"
    return json.loads(path.read_text()) if path.exists() else []


def add(out: pathlib.Path, records: Sequence[Record]) -> None:
    """Add records to OUT/rounds.json; a point that was there before is replaced."""
    kept = {_key(record): record for record in [*load(out), *records]}
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps([kept[key] for key in sorted(kept)], indent=1)
    write_whole(out / "rounds.json", text + "\n")


def _key(record: Record) -> tuple[Any, ...]:
    return *(record[name] for name in ("shape", "dtype", "hardware", "devices")), *_point(record)


def _point(record: Record) -> tuple[int, int, int]:
    return record["batch"], record["context"], record["k"]


def line(records: Sequence[Record]) -> str:
    """A point's delta_t, measured and predicted, in a few words."""
    return ", ".join(
        f"k = {r['k']}: delta_t {r['delta_t']:.2f} (per operator "
        f"{r['predicted'][HONEST]['delta_t']:.2f}, paper {r['predicted']['paper']['delta_t']:.2f})"
        for r in records
    )


def write(out: pathlib.Path, described: Mapping[str, Any], left_out: Sequence[str]) -> None:
    """Print the tables of all records of this machine and shape, and draw OUT/delta_t.png."""
    records = [r for r in load(out) if all(r[key] == described[key] for key in
                                           ("shape", "dtype", "hardware", "devices"))]  # fmt: skip
    console = rich.console.Console(highlight=False)
    if not console.is_terminal:
        console = rich.console.Console(width=120, highlight=False)
    if not records:
        console.print("nothing was measured")
        return
    for name, unit in (("bytes_per_s", "GB/s copied"), ("flops_per_s", "GFLOP/s multiplied")):
        values = [r[name] / 1e9 for r in records]
        console.print(f"{unit}: {statistics.median(values):.1f} "
                      f"({min(values):.1f} to {max(values):.1f} over the points)")  # fmt: skip
    for table in (_times(records), _ratios(records), _operators(records)):
        if table is not None:
            console.print(table, "")
    chip = device_chip(str(described["devices"]).split(" x ", 1)[-1])
    here = chip is not None and chip.name == GOAL_CHIP and described["shape"] == GOAL_SHAPE
    table = _table("goals, of an H200 at the size of Llama 3 8B", "goal", "figure here", "verdict",
                   words=3)  # fmt: skip
    for row in judged(records, here):
        table.add_row(*row)
    console.print(table)
    for why in left_out:
        console.print(f"left out: {why}")
    figure(records).savefig(out / "delta_t.png", dpi=130)
    console.print(f"{out}: rounds.json, delta_t.png")


def _table(title: str, *columns: str, words: int = 0) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < words else "right")
    return table


def _times(records: Sequence[Record]) -> rich.table.Table:
    table = _table("measured, ms", "B", "L", "k", *PIECES, "rest", "temporaries")
    for r in records:
        s = r["seconds"]
        rest = s["round"] - r["k"] * s["draft_step"] - sum(
            s[name] for name in ("verification", "sampling", "refresh"))  # fmt: skip
        share = _temporaries(r)
        table.add_row(*map(str, _point(r)), *(f"{1e3 * s[name]:.2f}" for name in PIECES),
                      f"{1e3 * rest:.2f}", "-" if share is None else f"{share:.3f}")  # fmt: skip
    table.caption = ("rest: the round less k draft steps and the three other pieces; temporaries: "
                     "of the compiled round, over the caches' bytes")  # fmt: skip
    return table


def _ratios(records: Sequence[Record]) -> rich.table.Table:
    table = _table(
        "model against clock", "B", "L", "k", "step", "draft step", "verify/step", "model",
        "delta_t", "model", "(paper)", "clock/model", "sampling",
    )  # fmt: skip
    for r in records:
        s, honest, paper = r["seconds"], r["predicted"][HONEST], r["predicted"]["paper"]
        cells = [f"{_over(r, p):.2f} ({s[p] / paper[p]:.2f})" for p in ("step", "draft_step")]
        figures = (
            s["verification"] / s["step"], honest["verification"] / honest["step"],
            r["delta_t"], honest["delta_t"], paper["delta_t"], r["delta_t"] / honest["delta_t"],
            s["sampling"] / s["round"],
        )  # fmt: skip
        table.add_row(*map(str, _point(r)), *cells, *(f"{x:.2f}" for x in figures))
    table.caption = ("step, draft step: clock / model, per operator with head (the paper's); "
                     "model: per operator with head; sampling: share of the round")  # fmt: skip
    return table


def _operators(records: Sequence[Record]) -> rich.table.Table | None:
    """The parts of the target's two passes, where they were measured."""
    names = [name for name in records[0]["operators"] if all(name in r["seconds"] for r in records)]
    if not names:
        return None
    heads = [f"{part} {'1' if which == 'step' else 'k + 1'}"
             for which, part in (name.split("_", 1) for name in names)]  # fmt: skip
    table = _table("parts of the target's passes over 1 and k + 1 tokens: ms (clock / model)",
                   "B", "L", "k", *heads)  # fmt: skip
    for r in records:
        cells = [(r["seconds"][n], r["operators"][n]) for n in names]
        table.add_row(*map(str, _point(r)), *(f"{1e3 * s:.2f} ({s / p:.2f})" for s, p in cells))
    return table


def figure(records: Sequence[Record]) -> Figure:
    """delta_t over the context, a panel for each k and a color for each batch size."""
    ks = sorted({r["k"] for r in records})
    batches = sorted({r["batch"] for r in records})
    drawn = Figure(figsize=(1.2 + 3.4 * len(ks), 3.7), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(1, len(ks), squeeze=False)[0]
    for axes, k in zip(panels, ks, strict=True):
        for place, batch in enumerate(batches):
            rows = sorted((r for r in records if r["k"] == k and r["batch"] == batch), key=_point)
            x = [r["context"] for r in rows]
            style = {"color": f"C{place}", "markersize": 4}
            axes.plot(
                x, [r["delta_t"] for r in rows], "o-", label=f"B = {batch}, measured", **style
            )
            for variant, dashes in ((HONEST, "--"), ("paper", ":")):
                y = [r["predicted"][variant]["delta_t"] for r in rows]
                label = "per operator, with head" if variant == HONEST else "the paper's model"
                axes.plot(x, y, dashes, label=f"B = {batch}, {label}", **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(title=f"k = {k}", xlabel="context length")
    panels[0].set_ylabel("round / autoregressive step")
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, fontsize=7, frameon=False, loc="outside right center")
    first = records[0]
    title = f"delta_t: {first['shape']}, {first['dtype']}, {first['hardware']}, {first['devices']}"
    drawn.suptitle(title, fontsize=9)
    return drawn

"""The choice of a draft, its stride and its depth for a traffic: who wins where, and by how much.

Acceptance comes from an evaluation's records, by context and depth; time and memory from the cost
model. A method is a draft as the config decodes it: two methods may share trained weights
(`weights_of`) and differ in stride. What is compared is tokens/s of one chip.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from spire_jax.config.schema import AUTOREGRESSIVE, ConfigError, ExperimentConfig
from spire_jax.costs import throughput
from spire_jax.costs.acceptance import Acceptance
from spire_jax.costs.chips import Chip
from spire_jax.results.intervals import Interval
from spire_jax.results.mix import Cell
from spire_jax.results.records import Counts

RESERVE = 0.1  # share of a chip's memory that is kept for temporaries, as in costs/scaling.py
PAPER_K = 4  # the paper's SPIRe drafts so many tokens per round


@dataclasses.dataclass(frozen=True)
class Choice:
    """A method at a depth in one cell of traffic."""

    method: str
    k: int  # 0: autoregressive
    tau: float
    rate: Float[np.ndarray, " resamples"]  # tokens/s of one chip; first as measured
    memory_bytes: float
    fits: bool


def acceptances(
    counts: Mapping[str, Mapping[int, Counts]], resamples: int
) -> dict[str, Acceptance]:
    """Every draft's acceptance, and that of resampled documents: the same ones for all."""
    found = {}
    for name, by_context in counts.items():
        contexts = tuple(sorted(by_context))
        documents = len(by_context[contexts[0]].documents)
        drawn = np.random.default_rng(0).multinomial(
            documents, np.full(documents, 1 / documents), size=resamples if documents > 1 else 0
        )
        weights = np.concatenate([np.ones((1, documents)), drawn])
        taus = [weights @ by_context[n].lengths / (weights @ by_context[n].rounds)
                for n in contexts]  # fmt: skip
        # Sums of floats may end a hair outside of 1 .. k + 1, which the cost model refuses.
        found[name] = Acceptance(contexts, np.round(np.stack(taus, axis=1), 9))
    return found


def offers(
    config: ExperimentConfig,
    taus: Mapping[str, Acceptance],
    cell: Cell,
    chip: Chip,
    *,
    variant: str | None = None,
    reserve: float = RESERVE,
) -> list[Choice]:
    """All methods at all depths in one cell, autoregressive decoding first.

    A batch of several lengths reads the sum of its rows, and emits what each row's own context
    lets it accept. `reserve` is the share of the chip's memory that is kept for other things.
    """
    at: dict[str, Any] = {"batch": cell.batch, "context": cell.contexts}
    room = chip.hbm_bytes * (1 - reserve)
    peak = chip.peak(config.throughput.compute_bytes)
    resamples = max((len(of.tau) for of in taus.values()), default=1)
    depths = [(AUTOREGRESSIVE, 0), *((m, k) for m, of in taus.items()
                                     for k in range(1, of.deepest + 1))]  # fmt: skip
    found = []
    for method, k in depths:
        tau = taus[method].at(k, cell.contexts) if k else np.ones(resamples)
        cost = throughput.round_cost(config, method, **at, k=k or None, hoi=chip, variant=variant)
        memory = throughput.memory_bytes(config, method, **at, k=k or None)
        rate = cell.batch * tau * peak / cost.total
        found.append(Choice(method, k, float(tau[0]), rate, memory, memory <= room))
    return found


def best(offered: Sequence[Choice]) -> Choice | None:
    """The fastest that fits; None where none does."""
    return max((c for c in offered if c.fits), key=lambda c: c.rate[0], default=None)


# --- over batch and context ----------------------------------------------------------------------


def who_wins(
    config: ExperimentConfig,
    taus: Mapping[str, Acceptance],
    chip: Chip,
    *,
    baseline: str = "",
    among: Sequence[str] = (),
    variant: str | None = None,
    reserve: float = RESERVE,
) -> list[list[dict[str, Any]]]:
    """By batch and context of `throughput`: the winner, and its margin over the next method.

    `gain` is its rate over autoregressive decoding's, `over_baseline` over that of `baseline` at
    the paper's depth, whether or not that fits. `among` are the drafts that may win, by default
    all. Without a method that fits, `method` is
    None; `extrapolated` where the context lies outside those of the evaluation.
    """
    at, rows = config.throughput, []
    measured = {n for of in taus.values() for n in of.contexts}
    for batch, context in itertools.product(at.batch_sizes, at.context_lengths):
        cell = Cell(1.0, batch, (float(context),), "")
        offered = offers(config, _estimates(taus), cell, chip, variant=variant, reserve=reserve)
        row: dict[str, Any] = {"batch": batch, "context": context, "method": None}
        row["extrapolated"] = not min(measured) <= context <= max(measured)
        allowed = _among(offered, among)
        if won := best(allowed):
            next_best = best([c for c in allowed if c.method != won.method])
            row |= {"method": won.method, "k": won.k, "tau": won.tau,
                    "tokens_per_s": float(won.rate[0]),
                    "gain": float(won.rate[0] / offered[0].rate[0]),
                    "second": next_best and next_best.method,
                    "margin": next_best and float(won.rate[0] / next_best.rate[0] - 1)}  # fmt: skip
            for its in offered:
                if (its.method, its.k) == (baseline, PAPER_K):
                    row["over_baseline"] = float(won.rate[0] / its.rate[0])
        rows.append(row)
    width = len(at.context_lengths)
    return [rows[i : i + width] for i in range(0, len(rows), width)]


def _among(offered: Sequence[Choice], among: Sequence[str]) -> list[Choice]:
    return [c for c in offered if not among or c.method in (AUTOREGRESSIVE, *among)]


def _estimates(taus: Mapping[str, Acceptance]) -> dict[str, Acceptance]:
    return {name: dataclasses.replace(of, tau=of.tau[:1]) for name, of in taus.items()}


# --- a mix ---------------------------------------------------------------------------------------


def choose(
    config: ExperimentConfig,
    taus: Mapping[str, Acceptance],
    cells: Sequence[Cell],
    chip: Chip,
    *,
    baseline: str,
    among: Sequence[str] = (),
    variant: str | None = None,
    reserve: float = RESERVE,
) -> dict[str, Any]:
    """What to decode a mix with: cell by cell, and as a whole, by what may be chosen per cell.

    A whole's tokens/s is that of all cells' tokens, one cell after the other. `policies` are, from
    the most that may be chosen to the least: any draft; one draft's weights, with stride and depth
    per cell; one method, with its depth per cell; one method at one depth; and `baseline` at the
    paper's depth. Gains over each of the others have 95% intervals over resampled documents: of
    the choice that was made on all. `among` as of `who_wins`.

    Raises:
        ConfigError: a cell in which nothing fits the chip.
    """
    everything = [offers(config, taus, c, chip, variant=variant, reserve=reserve) for c in cells]
    offered = [_among(of, among) for of in everything]
    for cell, of in zip(cells, offered, strict=True):
        if best(of) is None:
            least = min(c.memory_bytes for c in of)
            raise ConfigError(f"nothing fits in the cell {cell.name}: weights and caches take "
                              f"{least / 1e9:,.1f} GB, and one {chip.name} has "
                              f"{chip.hbm_bytes * (1 - reserve) / 1e9:,.1f} for them; use a "
                              f"smaller batch, or another --chip")  # fmt: skip
    policies = {
        "any draft": _any(offered),
        "one draft's weights": _one_of(cells, offered, lambda c: _weights(config, c.method)),
        "one method": _one_of(cells, offered, lambda c: c.method),
        "one method, one depth": _one_of(cells, offered, lambda c: (c.method, c.k)),
        AUTOREGRESSIVE: _only(offered, lambda c: not c.k),
        f"{baseline}, k = {PAPER_K}": _only(
            everything, lambda c: (c.method, c.k) == (baseline, PAPER_K)
        ),
    }
    rates = {name: _rate(cells, of) for name, of in policies.items() if of}
    return {
        "chip": chip.name,
        "cells": [_cell_record(*pair) for pair in zip(cells, offered, strict=True)],
        "policies": {
            name: {
                "tokens_per_s": float(rates[name][0]),
                "choices": [{"method": c.method, "k": c.k} for c in of],
                "over": {other: _ratio(rates[name], rate) for other, rate in rates.items()
                         if other != name},
            }
            for name, of in policies.items() if of
        },
    }  # fmt: skip


def _weights(config: ExperimentConfig, method: str) -> str:
    """Whose trained weights a method uses; its own name where there are none."""
    return (config.weights(method) if method != AUTOREGRESSIVE else "") or method


def _any(offered: Sequence[Sequence[Choice]]) -> list[Choice]:
    return [found for of in offered if (found := best(of))]


def _only(offered: Sequence[Sequence[Choice]], keep: Any) -> list[Choice] | None:
    """The best of some in every cell; None where none of them fits a cell."""
    found = [best([c for c in of if keep(c)]) for of in offered]
    return None if None in found else [c for c in found if c]


def _one_of(
    cells: Sequence[Cell], offered: Sequence[Sequence[Choice]], key: Any
) -> list[Choice] | None:
    """The best, over the mix, of the choices that agree in `key` in all cells."""
    keys = list(dict.fromkeys(key(c) for c in offered[0]))
    wholes = [_only(offered, lambda c, k=k: key(c) == k) for k in keys]
    usable = [of for of in wholes if of]
    return max(usable, key=lambda of: _rate(cells, of)[0], default=None)


def _rate(cells: Sequence[Cell], of: Sequence[Choice]) -> Float[np.ndarray, " resamples"]:
    """Tokens/s over the mix: `share` of the tokens at each cell's own rate."""
    return 1 / np.sum([cell.share / c.rate for cell, c in zip(cells, of, strict=True)], axis=0)


def _ratio(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """a / b, and its 95% interval where there are resamples."""
    ratio = a / b
    ci95: Interval = None
    if len(ratio) > 1:
        low, high = np.percentile(ratio[1:], [2.5, 97.5])
        ci95 = float(low), float(high)
    return {"ratio": float(ratio[0]), "ci95": ci95}


def _cell_record(cell: Cell, offered: Sequence[Choice]) -> dict[str, Any]:
    """A cell with the best of every method, the fastest first."""
    by_method = [best([c for c in offered if c.method == m]) for m in _methods(offered)]
    ranked = sorted((c for c in by_method if c), key=lambda c: -c.rate[0])
    return {
        "name": cell.name,
        "share": cell.share,
        "batch": cell.batch,
        "mean_context": float(np.mean(cell.contexts)),
        "methods": [
            {"method": c.method, "k": c.k, "tau": c.tau, "tokens_per_s": float(c.rate[0]),
             "gain": float(c.rate[0] / offered[0].rate[0]), "memory_bytes": c.memory_bytes}
            for c in ranked
        ],
        "do_not_fit": [m for m, c in zip(_methods(offered), by_method, strict=True) if not c],
    }  # fmt: skip


def _methods(offered: Sequence[Choice]) -> Iterator[str]:
    return iter(dict.fromkeys(c.method for c in offered))

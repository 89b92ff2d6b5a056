"""From records to results: ``summary.json``, the terminal's table and one self-contained page.

The inputs are the files that training and evaluation leave in the work directory:
``metrics/<model>.jsonl``, ``eval/<method>.jsonl`` and ``eval/evaluation.json``. Two kinds of
throughput stand side by side and are never mixed: *modeled* (the cost model of method.md
section 5, fed with the acceptance length found here) and *measured* (wall time on the machine
that is named beside it).

Nothing is written before everything has been read, computed and rendered.
"""

import itertools
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

from spire_jax.config import schema
from spire_jax.config.identity import made_with
from spire_jax.config.values import to_dict
from spire_jax.costs import chips, throughput
from spire_jax.costs.acceptance import Tau, at_context
from spire_jax.results import report_page
from spire_jax.results.choice import acceptances, who_wins
from spire_jax.results.intervals import (
    Interval,
    difference_interval,
    mean_generation_length,
    ratio_interval,
)
from spire_jax.results.records import (
    AUTOREGRESSIVE,
    EVALUATE_AGAIN,
    Counts,
    Inputs,
    ReportError,
    read_inputs,
)
from spire_jax.results.report_page import number, spread
from spire_jax.storage.paths import locate, write_whole

# --- summary -----------------------------------------------------------------------------------


def summarize(
    workdir: str | os.PathLike[str],
    config: schema.ExperimentConfig,
    *,
    stages: Mapping[str, str],
) -> dict[str, Any]:
    """The content of ``summary.json``: acceptance, modeled and measured throughput, provenance.

    `stages` maps each stage to its hash. Keys are strings throughout, so that the result equals
    what is read back from the file. Raises ReportError as `read_inputs` does.
    """
    return _summary(read_inputs(locate(workdir), config), config, stages)


def _summary(
    inputs: Inputs, config: schema.ExperimentConfig, stages: Mapping[str, str]
) -> dict[str, Any]:
    modeled, headline = config.throughput, max(config.eval.context_lengths)
    names = list(inputs.counts)
    assumptions = {
        "chip": modeled.chip, "hoi": modeled.hoi, "variant": modeled.variant,
        "weight_bytes": modeled.weight_bytes, "cache_bytes": modeled.cache_bytes,
        "compute_bytes": modeled.compute_bytes, "batch_size": modeled.batch_size,
        "context_length": modeled.context_length, "k": config.decode.k,
        "launch_us": modeled.launch_us,
        "tau": "found here: at each context what was found there, between two by the logarithm of "
               "the context, beyond them the nearest's; the same at every batch",
        "variants": dict(throughput.VARIANTS),
        "chips": {name: {"hoi": chip.hoi(modeled.compute_bytes), "source": chip.source}
                  for name, chip in throughput.CHIPS.items()},
    }  # fmt: skip
    return {
        "methods": {name: _method(name, inputs, config) for name in names},
        "paired_differences": {
            f"{a} - {b}": _difference(inputs.counts[a], inputs.counts[b], config)
            for a, b in itertools.combinations(names[1:], 2)
        },
        "context_length": headline,
        "choice": _choice(inputs, config),
        "assumptions": assumptions,
        "training": {name: _training(rows) for name, rows in inputs.metrics.items()},
        "heldout_bits_per_byte": inputs.evaluation["heldout_bits_per_byte"],
        "heldout_alpha": inputs.evaluation.get("heldout_alpha", {}),
        "corpus": inputs.evaluation["corpus"],
        "machine": inputs.evaluation["machine"],
        "seconds": inputs.evaluation.get("seconds", {}),
        "peak_memory_bytes": inputs.evaluation.get("peak_memory_bytes"),
        "config": to_dict(config),
        "made_with": made_with(config),
        "stages": dict(stages),
    }


def _method(name: str, inputs: Inputs, config: schema.ExperimentConfig) -> dict[str, Any]:
    headline, k = max(config.eval.context_lengths), config.decode.k
    if name == AUTOREGRESSIVE:
        k, one = 0, [1.0, 1.0]
        fixed = {"tau": 1.0, "tau_ci95": one, "tau_decoder": 1.0, "tau_decoder_ci95": one,
                 "tau_source": "by definition", "tau_by_k": {}, "tau_by_k_ci95": {},
                 "acceptance_by_depth": [], "acceptance_source": "by definition"}  # fmt: skip
        by_context = {n: fixed | _sizes(c) for n, c in inputs.counts[name].items()}
    else:
        by_context = {
            n: _acceptance(c, k, config.eval.bootstrap) | _sizes(c)
            for n, c in inputs.counts[name].items()
        }
    taus: dict[int, float] = {}
    for length, row in by_context.items():
        if (tau := _tau(row)) is None:
            raise ReportError(
                f"eval/{name}.jsonl: neither the oracle (up to k={k}) nor the decoder has rounds "
                f"at context {length}; {EVALUATE_AGAIN}"
            )
        taus[length] = tau
        row["modeled_multiplier"] = _multiplier(config, name, tau, context=length)
    # Some drafts are rolled out in training; others have no depth that they were trained to.
    learned = 0 if name == AUTOREGRESSIVE else config.draft(name).rollout(config.train)
    return {
        **by_context[headline],
        "context_length": headline, "output_length": config.eval.output_length, "k": k,
        "extrapolated": 0 < learned < k,
        **_modeled(name, taus, config),
        **_measured(name, inputs.evaluation["timing"]),
        "by_context": {str(n): row for n, row in sorted(by_context.items())},
    }  # fmt: skip


def _sizes(counts: Counts) -> dict[str, int]:
    return {"contexts": len(counts.places), "documents": len(counts.documents)}


def _tau(row: Mapping[str, Any]) -> Any:
    """The oracle's acceptance length, or the decoder's for depths beyond the oracle's."""
    tau = row["tau"] if row["tau"] is not None else row["tau_decoder"]
    # Sums of floats may end a hair outside of 1 .. k + 1, which the cost model refuses.
    return None if tau is None else round(tau, 9)


def _acceptance(counts: Counts, k: int, resamples: int) -> dict[str, Any]:
    """Acceptance lengths (method.md section 4) and acceptance by depth of one context length."""
    depths = range(1, counts.rounds.shape[1] + 1)
    by_k = {d: (counts.lengths[:, d - 1], counts.rounds[:, d - 1]) for d in depths}
    tau = {d: float(mean_generation_length(*pair)) for d, pair in by_k.items()}
    interval = {d: _listed(ratio_interval(*p, resamples=resamples)) for d, p in by_k.items()}
    decoder = counts.decoder_lengths, counts.decoder_rounds
    decoded = bool(counts.decoder_rounds.sum())
    if by_k:
        reached, accepted = counts.reached.sum(0), counts.accepted.sum(0)
    else:  # a round that accepted n drafts reached depths 1 .. n + 1 and accepted 1 .. n
        at_least = counts.accepted_counts[::-1].cumsum()[::-1]
        reached, accepted = at_least[:-1], at_least[1:]
    return {
        "tau": tau.get(k),
        "tau_ci95": interval.get(k),
        "tau_decoder": float(mean_generation_length(*decoder)) if decoded else None,
        "tau_decoder_ci95": _listed(ratio_interval(*decoder, resamples=resamples))
        if decoded
        else None,
        "tau_source": "oracle" if k in tau else "decoder",
        "tau_by_k": {str(d): value for d, value in tau.items()},
        "tau_by_k_ci95": {str(d): value for d, value in interval.items()},
        "acceptance_by_depth": [
            float(a / r) if r else None for a, r in zip(accepted, reached, strict=True)
        ],
        "acceptance_source": "oracle" if by_k else "decoder",
    }


def _listed(interval: Interval) -> list[float] | None:
    return None if interval is None else list(interval)


def _difference(
    a: dict[int, Counts], b: dict[int, Counts], config: schema.ExperimentConfig
) -> dict[str, Any] | None:
    """tau_a - tau_b at the longest context; both by the oracle, or both by the decoder."""
    headline, k = max(config.eval.context_lengths), config.decode.k
    sides = a[headline], b[headline]
    if all(k <= side.rounds.shape[1] for side in sides):
        source, pairs = "oracle", [(s.lengths[:, k - 1], s.rounds[:, k - 1]) for s in sides]
    elif all(side.decoder_rounds.sum() for side in sides):
        source, pairs = "decoder", [(s.decoder_lengths, s.decoder_rounds) for s in sides]
    else:
        return None
    interval = difference_interval(pairs[0], pairs[1], resamples=config.eval.bootstrap)
    return {
        "difference": float(mean_generation_length(*pairs[0]) - mean_generation_length(*pairs[1])),
        "ci95": _listed(interval),
        "resolved": interval is not None and not interval[0] <= 0 <= interval[1],
        "source": source,
        "documents": len(sides[0].documents),
    }


def _measured(name: str, timing: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens/s on this machine, median and range over the repeats; None where not timed."""
    keys = ("measured_tokens_per_s", "measured_tokens_per_s_range", "measured_multiplier",
            "measured_multiplier_range", "measured_repeats", "measured_context_length",
            "measured_batch_size")  # fmt: skip
    where = f"eval/evaluation.json: timing of {name}"
    if not (row := timing.get(name)):
        return dict.fromkeys(keys)
    base = timing.get(AUTOREGRESSIVE) or {}
    rates, its = row["tokens_per_s"], base.get("tokens_per_s", [])
    same = all(row[key] == base.get(key) for key in ("context_length", "batch_size"))
    if not rates or not same or len(rates) != len(its):
        raise ReportError(
            f"{where}: its batch, context and repeats are not those of {AUTOREGRESSIVE}, so that "
            f"no ratio can be taken; {EVALUATE_AGAIN}"
        )
    ratios = [mine / other for mine, other in zip(rates, its, strict=True)]
    multiplier = statistics.median(rates) / statistics.median(its)
    values = (statistics.median(rates), [min(rates), max(rates)], multiplier,
              [min(ratios), max(ratios)], len(rates), row["context_length"],
              row["batch_size"])  # fmt: skip
    return dict(zip(keys, values, strict=True))


def _training(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last step's values, and the median speed: the first steps compile."""
    last = rows[-1]
    # A step that compiled, after a start or a resumption, has no speed.
    rates, shares = ([row[key] for row in rows if row.get(key) is not None]
                     for key in ("tokens_per_s", "peak_share"))  # fmt: skip
    return {
        **{key: last.get(key) for key in ("step", "tokens", "loss", "alpha", "alpha_by_depth")},
        "tokens_per_s": statistics.median(rates) if rates else None,
        "peak_share": statistics.median(shares) if shares else None,
    }


# --- modeled throughput ------------------------------------------------------------------------


def _multiplier(config: schema.ExperimentConfig, method: str, tau: Tau, **over: Any) -> float:
    """The modeled multiplier at the headline batch, context and variant, or as in `over`."""
    given = config.throughput
    at: dict[str, Any] = {"batch": given.batch_size, "context": given.context_length,
                          "variant": given.variant} | over  # fmt: skip
    tau = at_context(tau, at["context"])
    return float(throughput.multiplier(config, method, tau=tau, **at))


def _modeled(method: str, tau: Tau, config: schema.ExperimentConfig) -> dict[str, Any]:
    at = config.throughput
    return {
        "modeled_multiplier": _multiplier(config, method, tau),
        "modeled_tokens_per_s_per_chip": _rate(config, method, tau, at.chip, at.variant),
        "modeled_by_context": {
            str(n): _multiplier(config, method, tau, context=n) for n in at.context_lengths
        },
        "modeled_by_batch": {
            str(n): _multiplier(config, method, tau, batch=n) for n in at.batch_sizes
        },
        "modeled_by_variant": {
            variant: {
                "multiplier": _multiplier(config, method, tau, variant=variant),
                "tokens_per_s_per_chip": {
                    chip: _rate(config, method, tau, chip, variant) for chip in throughput.CHIPS
                },
            }
            for variant in throughput.VARIANTS
        },
        "fits": {  # the target, its cache and the draft's, in one chip's memory
            name: throughput.memory_bytes(
                config, method, batch=at.batch_size, context=at.context_length
            )
            <= chip.hbm_bytes
            for name, chip in throughput.CHIPS.items()
        },
    }


def _choice(inputs: Inputs, config: schema.ExperimentConfig) -> dict[str, Any] | None:
    """Who wins where, on throughput.chip; None without an oracle's depths."""
    of = {n: c for n, c in inputs.counts.items() if n != AUTOREGRESSIVE}
    if not of or not all(
        c.lengths.shape[1] for by_length in of.values() for c in by_length.values()
    ):
        return None
    found = who_wins(config, acceptances(of, 0), chips.chip(config.throughput.chip))
    return {"chip": config.throughput.chip, "cells": found}


def _rate(config: schema.ExperimentConfig, method: str, tau: Tau, chip: str, variant: str) -> float:
    batch, context = config.throughput.batch_size, config.throughput.context_length
    return float(
        throughput.tokens_per_s_per_chip(
            config,
            method,
            tau=at_context(tau, context),
            batch=batch,
            context=context,
            chip=chip,
            variant=variant,
        )
    )


# --- output ------------------------------------------------------------------------------------


def write_report(
    workdir: str | os.PathLike[str],
    config: schema.ExperimentConfig,
    *,
    stages: Mapping[str, str],
) -> dict[str, Any]:
    """Write ``report/index.html`` and ``report/summary.json``; return the summary.

    Each is replaced as a whole; a kill between them leaves no stamp, so that both are made again.
    Raises ReportError for unusable records and OSError where the directory takes no file.
    """
    inputs = read_inputs(locate(workdir), config)
    summary = _summary(inputs, config, stages)
    page = report_page.render(summary, inputs.metrics, inputs.evaluation["examples"])
    texts = {"index.html": page, "summary.json": json.dumps(summary, indent=1, allow_nan=False)}
    folder = locate(workdir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(folder / name, text)
    return summary


def print_table(summary: Mapping[str, Any], console: rich.console.Console) -> None:
    """Print one line per method, with what modeled and measured figures stand for below."""
    at = summary["assumptions"]
    table = rich.table.Table(
        title=f"Context {summary['context_length']}, k = {at['k']}", box=rich.box.SIMPLE_HEAD
    )
    table.add_column("method", overflow="fold")
    for title in ("tau [95%]", "decoder", "modeled", "measured", "tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in summary["methods"].items():
        table.add_row(
            name,
            number(row["tau"]) + (spread(row["tau_ci95"], 2) if name != AUTOREGRESSIVE else ""),
            number(row["tau_decoder"]),
            number(row["modeled_multiplier"]),
            number(row["measured_multiplier"]),
            number(row["measured_tokens_per_s"], 0),
        )
    console.print(table)
    console.print(
        f"tau: tokens per round, by the oracle and by the decoder. modeled: multiplier by the "
        f"{at['variant']} cost model at HOI {at['hoi']:g}, batch {at['batch_size']}, context "
        f"{at['context_length']}. measured: multiplier and tokens/s. {report_page.timed(summary)}",
        highlight=False,
        markup=False,
    )

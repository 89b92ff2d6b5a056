"""The paper's figures, from its acceptance lengths or from your own, under every cost variant.

    python -m spire_jax.figures --config=configs/paper_67m.py --out=runs/figures
    python -m spire_jax.figures --config=configs/paper_llama3_70b.py --out=runs/figures_70b
    python -m spire_jax.figures --config=configs/study.py --workdir=runs/study --out=runs/mine

The first two use the config's ``throughput.tau`` (the paper's), the third what a finished run
found. Every figure is a PNG with its assumptions written below it; all of them are modeled but
acceptance, which is measured. About ten seconds.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from spire_jax.config.files import command_line, ends_in_a_line
from spire_jax.config.paths import local_path, path_or_url
from spire_jax.config.schema import ConfigError, ExperimentConfig
from spire_jax.config.variants import ABLATIONS, FULL_PAPER_TAU
from spire_jax.costs import throughput
from spire_jax.costs.acceptance import Tau, at_context
from spire_jax.costs.roofline import VARIANTS, visible_rows
from spire_jax.results import plots
from spire_jax.results.figure_inputs import Given, own_inputs, paper_inputs, with_ablations
from spire_jax.storage.paths import locate

# The paper's Table 1: tau by context, of sequences of 1024 tokens (method.md section 6).
PAPER_TAU = {"vanilla": {256: 2.637, 512: 2.647, 960: 2.644},
             "magicdec": {256: 4.005, 512: 3.891, 960: 3.793},
             "spire": {256: 3.427, 512: FULL_PAPER_TAU, 960: 3.382}}  # fmt: skip
DECODE_TO_TRAIN = (0.1, 1000.0)  # shown; the target's training is 1
INTENSITY_BATCHES = tuple(2**n for n in range(13))


# --- the figures -------------------------------------------------------------------------------


def figures(config: ExperimentConfig, given: Given) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of all figures."""
    yield "speedup_over_context", _over_context(config, given)
    for variant in VARIANTS:
        yield f"heat_map_{variant}", _heat_maps(config, given, variant)
    yield "operational_intensity", _intensity(config)
    yield "cost_analysis", _cost_analysis(config, given)
    yield "alternative_metric", _alternative(config, given)
    yield "ablations", _ablations(config, given)
    if given.by_context:
        yield "tau_over_context", _tau_over_context(given.by_context)
    if given.study:
        yield "tau_over_k", _tau_over_k(given)
        yield "acceptance_by_depth", _by_depth(given)


def _over_context(config: ExperimentConfig, given: Given) -> Figure:
    """Figures 1 and 6."""
    at = config.throughput
    figure, panels = plots.panels(len(VARIANTS), share=True)
    for axes, variant in zip(panels, VARIANTS, strict=True):
        rows = throughput.grid(config, given.tau, batch_sizes=[at.batch_size], variant=variant)
        for i, (method, by_batch) in enumerate(rows.items()):
            row = by_batch[at.batch_size]
            axes.plot(list(row), list(row.values()), **plots.style(method, i))
    for axes, variant in zip(panels, VARIANTS, strict=True):  # one scale: when all is drawn
        plots.multiplier_axes(axes, variant)
    plots.legend(panels[0])
    return plots.finish(
        figure, f"Throughput multiplier over context, batch {at.batch_size}",
        f"{_roofline(config)} {given.source}. {_variants(VARIANTS)}",
    )  # fmt: skip


def _heat_maps(config: ExperimentConfig, given: Given, variant: str) -> Figure:
    """Figure 4 and the appendix: every batch and context."""
    at = config.throughput
    figure, panels = plots.panels(len(given.tau))
    found = throughput.grid(config, given.tau, variant=variant)
    most = max(v for rows in found.values() for row in rows.values() for v in row.values())
    norm = TwoSlopeNorm(1.0, min(0.5, 2 - most), max(most, 1.01))
    for axes, (method, rows) in zip(panels, found.items(), strict=True):
        values = np.array([list(row.values()) for row in rows.values()])
        axes.imshow(values, cmap="RdBu", norm=norm, origin="lower", aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            dark = abs(norm(value) - 0.5) > 0.32
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6.5,
                      color="white" if dark else "black")  # fmt: skip
        axes.set(title=method, xlabel="context length", ylabel="batch")
        axes.set_xticks(range(len(at.context_lengths)), list(map(plots.short, at.context_lengths)))
        axes.set_yticks(range(len(at.batch_sizes)), list(map(str, at.batch_sizes)))
    return plots.finish(
        figure, f"Throughput multiplier by batch and context ({variant})",
        f"{_roofline(config)} {given.source}. {_variants([variant])}",
    )  # fmt: skip


def _intensity(config: ExperimentConfig) -> Figure:
    """Figure 3: FLOPs per byte of verifying k tokens, over the batch."""
    at, k, target = config.throughput, config.decode.k, config.target
    figure, (axes,) = plots.panels(1)
    weights, batches = target.body_parameters(), np.array(INTENSITY_BATCHES)
    for i, context in enumerate(at.context_lengths):
        rows = visible_rows(target, float(context))
        read = weights * at.weight_bytes + batches * rows * target.cache_row() * at.cache_bytes
        shade = 0.1 + 0.8 * i / max(len(at.context_lengths) - 1, 1)
        axes.plot(batches, 2 * weights * k * batches / read, label=f"L = {plots.short(context)}",
                  color=str(shade))  # fmt: skip
    axes.axhline(at.hoi, color="#c2571a", linestyle="--", label=f"HOI {at.hoi:g}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="batch", ylabel="FLOPs per byte of verification")
    axes.legend(fontsize=7, ncols=2)
    critical = "" if any(view.window for view in target.views()) else (
        f" Above the line verification is compute-bound: up to L_crit = "
        f"{plots.short(throughput.critical_context(config))} at some batch.")  # fmt: skip
    return plots.finish(
        figure, f"Operational intensity of verifying {k} tokens",
        f"Body parameters only ({weights / 1e6:,.1f}M), {at.weight_bytes:g}-byte weights, "
        f"{at.cache_bytes:g}-byte cache; k tokens are verified, as in the paper's figure (the "
        f"multipliers count k + 1).{critical}",
    )  # fmt: skip


def _cost_analysis(config: ExperimentConfig, given: Given) -> Figure:
    """What is saved in all, over how much decoding is to come."""
    at = config.throughput
    figure, panels = plots.panels(len(VARIANTS), share=True)
    decoding = np.geomspace(*DECODE_TO_TRAIN, 200)
    for axes, variant in zip(panels, VARIANTS, strict=True):
        for i, (method, tau) in enumerate(given.tau.items()):
            multiplier = _multiplier(config, method, tau, variant)
            share = [throughput.net_saving(multiplier, d, given.training[method]) / d
                     for d in decoding]  # fmt: skip
            axes.plot(decoding, share, **plots.style(method, i) | {"marker": ""})
        axes.axhline(0, color="0.5", linewidth=0.8)
        axes.axvline(at.decode_to_train, color="0.5", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_ylim(-0.6, 1)
        axes.set(title=variant, xlabel="decoding / training the target", ylabel="net share saved")
    plots.legend(panels[0])
    costs = ", ".join(f"{n} {c:.2f}" for n, c in given.training.items())
    stated = [name for name, cost in at.training_cost if cost and name in given.training]
    known = f"by FLOPs, {' and '.join(stated)} as given" if stated else "by FLOPs"
    return plots.finish(
        figure, f"Net saving at batch {at.batch_size}, context {at.context_length}",
        f"{_roofline(config)} {given.source}. Training a draft costs, of the target's training "
        f"({known}): {costs}. Dotted: throughput.decode_to_train = {at.decode_to_train:g}, where "
        f"the net savings are {_savings(config, given)}. {_variants(VARIANTS)}",
    )  # fmt: skip


def _savings(config: ExperimentConfig, given: Given) -> str:
    at = config.throughput
    found = []
    for method, tau in given.tau.items():
        multiplier = _multiplier(config, method, tau, at.variant)
        saved = throughput.net_saving(multiplier, at.decode_to_train, given.training[method])
        found.append(f"{method} {saved:.2f}")
    return f"{', '.join(found)} (variant {at.variant})"


def _alternative(config: ExperimentConfig, given: Given) -> Figure:
    """The metric that sums over the generated tokens, beside the other one."""
    at, tokens = config.throughput, config.eval.output_length
    figure, (axes,) = plots.panels(1)
    for i, (method, tau) in enumerate(given.tau.items()):
        style = plots.style(method, i)
        summed, plain = [], []
        for context in at.context_lengths:
            summed.append(
                throughput.multiplier_over_generation(
                    config,
                    method,
                    tau=at_context(tau, context),
                    batch=at.batch_size,
                    context=context,
                    tokens=tokens,
                )
            )
            plain.append(throughput.multiplier(
                config, method, tau=at_context(tau, context), batch=at.batch_size, context=context
            ))  # fmt: skip
        axes.plot(at.context_lengths, summed, **style)
        axes.plot(at.context_lengths, plain, **style | {"label": None, "linestyle": ":"})
    plots.multiplier_axes(axes, at.variant)
    plots.legend(axes)
    return plots.finish(
        figure, f"Summed over {tokens} generated tokens",
        f"{_roofline(config)} {given.source}. The context grows while {tokens} tokens are "
        f"generated and the last round counts whole; dotted: the multiplier at the first context. "
        f"{_variants([at.variant])}",
    )  # fmt: skip


def _ablations(config: ExperimentConfig, given: Given) -> Figure:
    """Figure 5: what each part of the draft brings, in tokens per round and in throughput."""
    at, base = config.throughput, given.study["of"] if given.study else config.study.of
    if given.study:
        rows = {name.removeprefix(f"{base}-"): row for name, row in given.study["methods"].items()}
        taus = {n: (rows[n]["tau"], rows[n]["tau_ci95"]) for n in (base, *ABLATIONS) if n in rows}
        says = (f"tau by the oracle at context {given.study['context_length']}, k = "
                f"{given.study['k']} (black: the paper's); intervals (95%) are over documents: "
                f"differences between two drafts are paired, and known better.")  # fmt: skip
    else:
        taus = {base: (FULL_PAPER_TAU, None)} | {
            n: (a.paper, None) for n, a in ABLATIONS.items() if a.paper is not None
        }  # fmt: skip
        says = "tau of the paper at context 512, k = 4; for the dense cache it assumes the same."
    figure, (left, right) = plots.panels(2, width=4.6)
    for place, (name, (tau, interval)) in enumerate(taus.items()):
        color = plots.STUDIED if name == base else "0.55"
        error = None if interval is None else np.abs(np.array(interval)[:, None] - tau)
        left.barh(place, tau, color=color, xerr=error, height=0.7)
        if given.study and (paper := _paper_tau(name, base)):
            left.plot(paper, place, "|k", markersize=12)
        left.text(1.03, place, f"{tau:.3f}", va="center", fontsize=8, color="white")
        for i, variant in enumerate(VARIANTS):
            method = base if name == base else f"{base}-{name}"
            value = _multiplier(config, method, round(tau, 9), variant)
            label = variant if place == 0 else None
            right.plot(value, place + 0.12 * (i - 1.5), "os^D"[i], color=f"C{i}", markersize=5,
                       label=label)  # fmt: skip
    for axes in (left, right):
        axes.set_yticks(range(len(taus)), list(taus) if axes is left else [""] * len(taus))
        axes.set_ylim(len(taus) - 0.4, -0.6)
    left.set(xlabel="tokens per round", xlim=(1, config.decode.k + 1))
    right.set(xlabel=f"multiplier, batch {at.batch_size}, context {at.context_length}")
    right.grid(axis="x", color="0.9")
    right.legend(fontsize=8, frameon=False)
    return plots.finish(figure, "Ablations", f"{says} {_roofline(config)} {_variants(VARIANTS)}")


def _paper_tau(name: str, base: str) -> float | None:
    return FULL_PAPER_TAU if name == base else ABLATIONS[name].paper


def _tau_over_context(by_context: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Figure:
    """The twin of the paper's Table 1, and the table."""
    figure, (left, right) = plots.panels(2, share=True)
    for i, (method, rows) in enumerate(by_context.items()):
        contexts = sorted(rows)
        taus = np.array([rows[n]["tau"] for n in contexts])
        spread = [rows[n]["tau_ci95"] or (rows[n]["tau"],) * 2 for n in contexts]
        error = np.abs(np.array(spread).T - taus)
        left.errorbar(contexts, taus, error, capsize=2, **plots.style(method, i))
        if method in PAPER_TAU:
            paper = PAPER_TAU[method]
            right.plot(list(paper), list(paper.values()), **plots.style(method, i))
    left.set(title="here", xlabel="context length", ylabel="tokens per round", ylim=(1, None))
    right.set(title="the paper", xlabel="context length")
    plots.legend(left)
    return plots.finish(
        figure, "Acceptance length over context",
        "Measured, by the oracle; intervals (95%) over documents. The paper's: 67M body "
        "parameters, sequences of 1024 tokens, 65,536 contexts, intervals of 0.004.",
    )  # fmt: skip


def _tau_over_k(given: Given) -> Figure:
    assert given.study is not None
    figure, (axes,) = plots.panels(1)
    for i, (name, taus) in enumerate(given.study["by_k"].items()):
        axes.plot(range(1, len(taus) + 1), taus, **plots.style(name, i) | {"marker": "."})
    axes.plot([1, 16], [2, 17], color="0.8", linewidth=0.8)
    most = max(len(taus) for taus in given.study["by_k"].values())
    top = max(max(taus) for taus in given.study["by_k"].values())
    axes.set(xlabel="drafted tokens per round, k", ylabel="tokens per round",
             xlim=(0.5, most + 0.5), ylim=(1, top + 0.5))  # fmt: skip
    plots.legend(axes)
    return plots.finish(
        figure, "Acceptance length over k",
        f"Measured by the oracle at context {given.study['context_length']}. A draft -k8 was "
        f"rolled out to depth 8 in training; deeper than in training is extrapolation. Grey: all "
        f"drafts accepted.",
    )  # fmt: skip


def _by_depth(given: Given) -> Figure:
    assert given.study is not None
    figure, (axes,) = plots.panels(1)
    for i, name in enumerate(given.study["by_k"]):
        values = given.study["methods"][name]["acceptance_by_depth"]
        axes.plot(range(1, len(values) + 1), values, **plots.style(name, i) | {"marker": "."})
    axes.set(xlabel="depth of the drafted token", ylabel="acceptance", ylim=(0, 1.02))
    plots.legend(axes)
    return plots.finish(
        figure, "Acceptance by depth",
        f"Measured by the oracle at context {given.study['context_length']}; given that the depth "
        f"is reached.",
    )  # fmt: skip


# --- parts -------------------------------------------------------------------------------------


def _multiplier(config: ExperimentConfig, method: str, tau: Tau, variant: str) -> float:
    """At the config's own batch and context."""
    at = config.throughput
    return throughput.multiplier(
        config,
        method,
        tau=at_context(tau, at.context_length),
        batch=at.batch_size,
        context=at.context_length,
        variant=variant,
    )


def _roofline(config: ExperimentConfig) -> str:
    at = config.throughput
    launch = f", {at.launch_us:g} us besides of every pass" if at.launch_us else ""
    return (f"Modeled, not measured: HOI {at.hoi:g} FLOPs per byte, {at.weight_bytes:g}-byte "
            f"weights, {at.cache_bytes:g}-byte cache, k = {config.decode.k}{launch};")  # fmt: skip


def _variants(names: Sequence[str] | Mapping[str, str]) -> str:
    return " ".join(f"{name}: {VARIANTS[name]}." for name in names)


# --- command line ------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m spire_jax.figures", None, __doc__,
                                     formatter_class=raw)  # fmt: skip
    parser.add_argument("--out", type=local_path, required=True, help="folder of the figures")
    parser.add_argument("--workdir", type=path_or_url, help="a finished run of the same config")
    args, config = command_line(parser, argv)
    with ends_in_a_line(ConfigError):
        given = own_inputs(config, locate(args.workdir)) if args.workdir else paper_inputs(config)
        config = with_ablations(config)
        drawn = dict(figures(config, given))
        args.out.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            figure.savefig(args.out / f"{name}.png", dpi=130)
    print(f"{args.out}: {', '.join(drawn)}")
    return 0

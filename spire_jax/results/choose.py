"""The best draft, stride and depth for a traffic mix, and who wins where, from a finished run.

    python -m spire_jax.choose --workdir=runs/quickstart --chip=v6e
    python -m spire_jax.choose --workdir=runs/quickstart --chip=v6e --mix=mix.json

Acceptance is the run's own, by context and depth; time and memory are modeled (costs/), for one
chip. --sizes=configs/paper_67m.py asks what the same drafts would do on that config's target, and
--tau=3.4 scales all acceptances alike, until the baseline has that many tokens per round at a depth
of 4. A mix is described in results/mix.py.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
from matplotlib.figure import Figure

from spire_jax.config.files import command_line, ends_in_a_line, load
from spire_jax.config.paths import local_path, path_or_url
from spire_jax.config.schema import AUTOREGRESSIVE, ConfigError, ExperimentConfig
from spire_jax.costs import chips
from spire_jax.costs.acceptance import Acceptance
from spire_jax.costs.chips import Chip
from spire_jax.costs.roofline import VARIANTS
from spire_jax.results import plots
from spire_jax.results.choice import PAPER_K, RESERVE, acceptances, choose, who_wins
from spire_jax.results.figure_inputs import read_summary
from spire_jax.results.mix import read_mix
from spire_jax.results.records import ReportError, read_counts
from spire_jax.storage.paths import Place, locate, write_whole


def run_acceptances(
    config: ExperimentConfig, workdir: Place, resamples: int | None = None
) -> dict[str, Acceptance]:
    """What a finished run of this config found of its drafts, by context and depth.

    Raises:
        ConfigError: no report there, one of another config, or a draft that no oracle judged.
        ReportError: records that are missing or damaged.
    """
    read_summary(config, workdir)
    counts = read_counts(workdir / "eval", [name for name, _ in config.drafts], config)
    for name, by_context in counts.items():
        if not all(of.lengths.shape[1] for of in by_context.values()):
            raise ConfigError(f"--workdir={workdir}: {name} was evaluated without the oracle, "
                              f"which tells its acceptance by depth")  # fmt: skip
    return acceptances(counts, config.eval.bootstrap if resamples is None else resamples)


def on_sizes(config: ExperimentConfig, of: ExperimentConfig) -> ExperimentConfig:
    """The config's drafts on another's target, with its cost model; drafts that it has are its.

    Raises:
        ConfigError: a draft that does not fit that target.
    """
    its = dict(of.drafts)
    drafts = tuple((name, its.get(name, draft)) for name, draft in config.drafts)
    found = dataclasses.replace(
        config, target=of.target, throughput=of.throughput, drafts=drafts, variants=()
    )
    for name, draft in drafts:
        draft.check(f"drafts.{name}", found)
    return found


def choice_figure(
    cells: Sequence[Sequence[Mapping[str, Any]]], config: ExperimentConfig, chip: Chip,
    variant: str,
) -> Figure:  # fmt: skip
    """Who wins where on (B, L): `cells` are those of `who_wins`."""
    width = max(4.2, 0.55 * len(cells[0]) + 1.4)
    figure, (axes,) = plots.panels(1, width=width)
    names = [name for name, _ in config.drafts]
    colors = {name: plots.style(name, i)["color"] for i, name in enumerate(names)}
    plots.winners(axes, cells, {AUTOREGRESSIVE: "0.6", **colors})
    figure.legend(loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    return plots.finish(
        figure, "",
        f"The fastest method on one {chip.name}, the depth it does best at, and its margin over "
        f"the next method; *: beyond the contexts that were measured. Modeled from measured "
        f"acceptance ({variant}: {VARIANTS[variant]}).",
    )  # fmt: skip


# --- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m spire_jax.choose", None, __doc__,
                                     formatter_class=raw, allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    add("--workdir", type=path_or_url, required=True, help="a finished run")
    add("--chip", help="the accelerator; default: throughput.chip")
    add("--mix", type=local_path, help="the traffic, a JSON file")
    add("--baseline", help="the draft to compare with, at a depth of 4; default: the first SPIRe")
    add("--methods", help="the drafts to choose from, comma-separated; default: all")
    add("--variant", choices=tuple(VARIANTS), help="of the cost model; default: throughput.variant")
    add("--reserve", type=float, default=RESERVE, help="share of the memory kept for temporaries")
    add("--sizes", type=local_path, help="a config whose target and cost model to take instead")
    add(
        "--tau", type=float, help="scale acceptance until the baseline has this tau at a depth of 4"
    )
    add("--out", type=local_path, help="a folder for choice.json and choice.png")
    add("--format", choices=("table", "json"), default="table")
    args, config = command_line(parser, argv, recorded="workdir")
    with ends_in_a_line(ConfigError, ReportError):
        found, of, chip = _choose(args, config)
        if args.out:
            figure = choice_figure(found["who_wins"], of, chip, found["variant"])
            args.out.mkdir(parents=True, exist_ok=True)
            figure.savefig(args.out / "choice.png", dpi=130)
            write_whole(args.out / "choice.json", json.dumps(found, indent=1))
    if args.format == "json":
        print(json.dumps(found))
    else:
        print_choice(found, _console())
        if args.out:
            print(f"{args.out}{os.sep}: choice.json, choice.png")
    return 0


def _choose(
    args: argparse.Namespace, config: ExperimentConfig
) -> tuple[dict[str, Any], ExperimentConfig, Chip]:
    if not 0 <= args.reserve < 1:
        raise ConfigError(f"--reserve={args.reserve} must lie in [0, 1)")
    sized = on_sizes(config, load(args.sizes)) if args.sizes else config
    chip = chips.chip(args.chip or sized.throughput.chip)
    cells = read_mix(args.mix, sized.target.max_len) if args.mix else ()
    baseline = _baseline(args.baseline, config)
    taus = run_acceptances(config, locate(args.workdir))
    if args.tau:
        powers = taus[baseline].exponents_for(args.tau, PAPER_K)
        taus = {name: of.raised(powers) for name, of in taus.items()}
    among = tuple(args.methods.split(",")) if args.methods else ()
    for name in among:
        config.draft(name)  # or ConfigError
    how: dict[str, Any] = {"baseline": baseline, "among": among, "variant": args.variant,
                           "reserve": args.reserve}  # fmt: skip
    found = {
        "chip": chip.name,
        "variant": args.variant or sized.throughput.variant,
        "baseline": baseline,
        "scaled_to": args.tau,
        "contexts": list(next(iter(taus.values())).contexts),
        "who_wins": who_wins(sized, taus, chip, **how),
        "mix": choose(sized, taus, cells, chip, **how) if cells else None,
    }
    return found, sized, chip


def _baseline(given: str | None, config: ExperimentConfig) -> str:
    if given:
        config.draft(given)
        return given
    for name, draft in config.drafts:
        if draft.kind in ("spire", "stride") and getattr(draft, "stride", 1) == 1:
            return name
    raise ConfigError(f"no draft is a SPIRe of one token a pass, to compare with; name one with "
                      f"--baseline, of {[name for name, _ in config.drafts]}")  # fmt: skip


def _console() -> rich.console.Console:
    console = rich.console.Console(highlight=False)
    return console if console.is_terminal else rich.console.Console(width=110, highlight=False)


def print_choice(found: Mapping[str, Any], console: rich.console.Console) -> None:
    """Who wins where; for a mix, what to decode each cell with, and what choosing brings."""
    contexts = [cell["context"] for cell in found["who_wins"][0]]
    table = _table(f"the fastest on one {found['chip']} ({found['variant']}): method, k, margin "
                   f"over the next method", "B", *map(str, contexts))  # fmt: skip
    for row in found["who_wins"]:
        table.add_row(str(row[0]["batch"]), *(_cell(cell) for cell in row))
    console.print(table)
    if mix := found["mix"]:
        _print_mix(mix, console)
    scaled = (f", scaled until {found['baseline']} has {found['scaled_to']:g} at k = {PAPER_K}"
              if found["scaled_to"] else "")  # fmt: skip
    console.print(f"Modeled from acceptance measured at contexts {found['contexts']}"
                  f"{scaled}; between them by the logarithm, beyond them the nearest's.",
                  soft_wrap=True)  # fmt: skip


def _cell(cell: Mapping[str, Any]) -> str:
    if cell["method"] is None:
        return "too large"
    k = f" {cell['k']}" if cell["k"] else ""
    margin = "" if cell["margin"] is None else f" +{100 * cell['margin']:.0f}%"
    return f"{cell['method']}{k}{margin}"


def _print_mix(mix: Mapping[str, Any], console: rich.console.Console) -> None:
    table = _table("the mix", "cell", "share", "mean L", "method", "k", "tau", "tokens/s", "gain",
                   "the next")  # fmt: skip
    for cell in mix["cells"]:
        first, *others = cell["methods"]
        following = "" if not others else f"{others[0]['method']} {others[0]['gain']:.2f}"
        table.add_row(cell["name"], f"{cell['share']:.0%}", f"{cell['mean_context']:,.0f}",
                      first["method"], str(first["k"]), f"{first['tau']:.2f}",
                      f"{first['tokens_per_s']:,.0f}", f"{first['gain']:.2f}",
                      following)  # fmt: skip
    console.print(table)
    beside = list(mix["policies"])[3:]  # one method at one depth, and those that choose nothing
    table = _table("the whole mix: tokens/s, and how many times those of others [95%]",
                   "chosen per cell", "tokens/s", "what", *beside)  # fmt: skip
    for name, policy in mix["policies"].items():
        chosen = dict.fromkeys(f"{c['method']} {c['k'] or ''}".strip() for c in policy["choices"])
        ratios = [_interval(policy["over"].get(other)) for other in beside]
        table.add_row(name, f"{policy['tokens_per_s']:,.0f}", ", ".join(chosen), *ratios)
    console.print(table)


def _interval(of: Mapping[str, Any] | None) -> str:
    if of is None:
        return ""
    low_high = f" [{of['ci95'][0]:.2f}, {of['ci95'][1]:.2f}]" if of["ci95"] else ""
    return f"{of['ratio']:.3f}{low_high}"


def _table(title: str, *columns: str) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for column in columns:
        words = column in ("cell", "method", "what", "chosen per cell", "the next")
        table.add_column(column, justify="left" if words else "right")
    return table

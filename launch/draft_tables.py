"""The tables of docs/drafts.md from a finished run: acceptance, pairs, training, the choice.

    python -m launch.draft_tables --workdir=runs/study_drafts --ks=4,8,12 --baseline=spire \
        --family=all,all-s2,all-s4 [--pairs=fused:all,one4:all-s4]

Markdown on standard output. tau is by the oracle, with 95% intervals over documents; pairs are the
difference of the first to the second on the same documents. Where WORKDIR/tau_by_tokens.json lies
(launch/bench/tau_by_tokens.py), tau over training is a table, too. `--family` are the methods of
one trained draft; what it gains over the baseline by the choice of stride and depth per cell stands
last, as the run is and on the paper's sizes with acceptances scaled to the paper's.
"""

import argparse
from collections.abc import Sequence

from launch.bench.command_line import sizes
from spire_jax.config.files import command_line, ends_in_a_line, load
from spire_jax.config.paths import path_or_url
from spire_jax.config.schema import ConfigError, ExperimentConfig
from spire_jax.config.variants import FULL_PAPER_TAU
from spire_jax.costs import chips
from spire_jax.costs.acceptance import Acceptance
from spire_jax.results.choice import PAPER_K, who_wins
from spire_jax.results.choose import on_sizes, run_acceptances
from spire_jax.results.intervals import difference_interval, mean_generation_length, ratio_interval
from spire_jax.results.records import Counts, ReportError, read_counts
from spire_jax.storage.paths import Place, locate, read_record

PAPER = "configs/paper_67m.py"
GOAL_BATCH, GOAL_CONTEXTS = 64, (32, 512, 4096)
GOAL_VARIANTS = ("per_operator", "with_head")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def by_depth(counts: dict[str, dict[int, Counts]], ks: Sequence[int], resamples: int) -> str:
    """tau of every method at each k and context."""
    contexts, rows = sorted(next(iter(counts.values()))), []
    for name, of in counts.items():
        row = [name]
        for k in ks:
            for n in contexts:
                pair = of[n].lengths[:, k - 1], of[n].rounds[:, k - 1]
                interval = ratio_interval(*pair, resamples=resamples)
                spread = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
                row.append(f"{mean_generation_length(*pair):.3f}{spread}")
        rows.append(row)
    return table(["method", *(f"k = {k}, L = {n}" for k in ks for n in contexts)], rows)


def acceptance(counts: dict[str, dict[int, Counts]]) -> str:
    """Acceptance by depth, given that it is reached, over all contexts."""
    rows, most = [], 0
    for name, of in counts.items():
        reached, accepted = (sum(getattr(c, key).sum(axis=0) for c in of.values())
                             for key in ("reached", "accepted"))  # fmt: skip
        rows.append([name, *(f"{a / r:.3f}" if r else "" for a, r in zip(
            accepted, reached, strict=True))])  # fmt: skip
        most = max(most, len(rows[-1]))
    return table(["method", *map(str, range(1, most))], rows)


def differences(
    counts: dict[str, dict[int, Counts]], pairs: Sequence[str], ks: Sequence[int], resamples: int
) -> str:
    """tau of a method less that of another, on the same documents."""
    contexts, rows = sorted(next(iter(counts.values()))), []
    for pair in pairs:
        a, _, b = pair.partition(":")
        if unknown := {a, b} - set(counts):
            raise ConfigError(f"--pairs: {sorted(unknown)} are no drafts of the run")
        row = [f"{a} less {b}"]
        for k in ks:
            for n in contexts:
                sides = [(of.lengths[:, k - 1], of.rounds[:, k - 1])
                         for of in (counts[a][n], counts[b][n])]  # fmt: skip
                apart = mean_generation_length(*sides[0]) - mean_generation_length(*sides[1])
                interval = difference_interval(*sides, resamples=resamples)
                spread = "" if interval is None else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]"
                row.append(f"{apart:+.3f}{spread}")
        rows.append(row)
    return table(["", *(f"k = {k}, L = {n}" for k in ks for n in contexts)], rows)


def over_training(path: Place, ks: Sequence[int]) -> str:
    """tau at the middle context over training tokens."""
    found = read_record(path)
    contexts = sorted({r["context_length"] for r in found})
    middle = contexts[len(contexts) // 2]
    tokens = sorted({r["tokens"] for r in found if r["tokens"] is not None})
    rows = []
    for name in dict.fromkeys(r["method"] for r in found):
        at = {r["tokens"]: r["tau"] for r in found
              if r["method"] == name and r["context_length"] == middle}  # fmt: skip
        if None not in at:
            rows.append([name, *(" / ".join(f"{at[t][k - 1]:.2f}" for k in ks) if t in at else ""
                                 for t in tokens)])  # fmt: skip
    titles = ["method", *(f"{t / 1e6:.1f}M" for t in tokens)]
    says = f"tau at context {middle}, k = {' / '.join(map(str, ks))}, by training tokens."
    return f"{says}\n\n{table(titles, rows)}"


def gains(
    config: ExperimentConfig, taus: dict[str, Acceptance], baseline: str, family: Sequence[str]
) -> str:
    """What one trained draft gains by stride and depth per cell."""
    rows = []
    for says, tau in (("as found", None), (f"{baseline} scaled to {FULL_PAPER_TAU}",
                                           FULL_PAPER_TAU)):  # fmt: skip
        if tau:
            powers = taus[baseline].exponents_for(tau, PAPER_K)
            taus = {name: of.raised(powers) for name, of in taus.items()}
        for variant in GOAL_VARIANTS:
            found = who_wins(
                config, taus, chips.chip(config.throughput.chip), baseline=baseline, among=family,
                variant=variant,
            )  # fmt: skip
            cells = {(c["batch"], c["context"]): c for row in found for c in row}
            for n in GOAL_CONTEXTS:
                cell = cells[GOAL_BATCH, n]
                rows.append([says, variant, str(n), f"{cell['method']}, {cell['k']}",
                             f"{cell['tau']:.2f}", f"{cell['gain']:.2f}",
                             f"{cell['over_baseline']:.3f}"])  # fmt: skip
    return table(["acceptance", "variant", "L", "stride and k", "tau", "over autoregressive",
                  f"over {baseline} at k = {PAPER_K}"], rows)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m launch.draft_tables", None, __doc__,
                                     formatter_class=raw)  # fmt: skip
    parser.add_argument("--workdir", type=path_or_url, required=True, help="a finished run")
    parser.add_argument("--ks", type=sizes, default=(4,), help="depths, such as 4,8,12")
    parser.add_argument("--baseline", default="spire")
    parser.add_argument("--family", required=True, help="the methods of one trained draft")
    parser.add_argument("--pairs", default="", help="a:b,c:d, differences to print")
    args, config = command_line(parser, argv, recorded="workdir")
    workdir, resamples = locate(args.workdir), config.eval.bootstrap
    with ends_in_a_line(ConfigError, ReportError):
        taus = run_acceptances(config, workdir, 0)
        counts = read_counts(workdir / "eval", [name for name, _ in config.drafts], config)
        deepest = min(of.deepest for of in taus.values())
        if max(args.ks) > deepest:
            raise ConfigError(f"--ks={args.ks}: the run's oracle went to {deepest}")
        parts = [by_depth(counts, args.ks, resamples), acceptance(counts)]
        if args.pairs:
            parts.append(differences(counts, args.pairs.split(","), args.ks, resamples))
        training = workdir / "tau_by_tokens.json"
        if training.exists():
            parts.append(over_training(training, args.ks))
        sized = on_sizes(config, load(PAPER))
        parts.append(gains(sized, taus, args.baseline, args.family.split(",")))
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()

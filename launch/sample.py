"""The README's table and picture, and the table of configs/quickstart.py, from one finished run.

    bash launch/quickstart.sh
    python -m launch.sample --workdir=runs/quickstart

All of it comes from the one report/summary.json of that work directory, whose hash goes into a
comment of the README beside the table. A work directory without a report, or of other values than
configs/quickstart.py has, is refused before anything is written.
"""

import argparse
import io
import pathlib
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
from matplotlib.figure import Figure

from spire_jax.config.files import ends_in_a_line, load
from spire_jax.config.paths import path_or_url
from spire_jax.config.schema import AUTOREGRESSIVE, ConfigError, ExperimentConfig
from spire_jax.results import plots
from spire_jax.results.figure_inputs import read_summary
from spire_jax.results.report import print_table
from spire_jax.results.report_page import number, spread, timed
from spire_jax.storage.paths import Place, locate

ROOT = pathlib.Path(__file__).parents[1]
CONFIG, README, PICTURE = "configs/quickstart.py", "README.md", "docs/quickstart.png"
# What stands between two marks is replaced: of the README, and of the config's docstring.
IN_README = "<!-- sample -->", "<!-- /sample -->"
IN_CONFIG = "printed (python -m launch.sample)\n", '"""\n'


def write(root: pathlib.Path, config: ExperimentConfig, workdir: Place) -> None:
    """Replace the README's sample, the config's and the picture under `root`; all or none.

    Raises:
        ConfigError: no report, one of another config, or a file without the marks.
    """
    summary = read_summary(config, workdir)
    texts = {
        README: _between(root / README, IN_README, f"\n{in_readme(summary)}\n"),
        CONFIG: _between(root / CONFIG, IN_CONFIG, f"\n{in_config(summary)}\n"),
    }
    drawn = io.BytesIO()
    picture(summary).savefig(drawn, dpi=100, format="png")
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")
    (root / PICTURE).write_bytes(drawn.getvalue())


def _between(path: pathlib.Path, marks: tuple[str, str], new: str) -> str:
    """The file's text with `new` between the marks."""
    text, (begin, end) = path.read_text(encoding="utf-8"), marks
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed or begin in tail:
        raise ConfigError(f"{path} must have {begin.strip()!r} once, and {end.strip()!r} after it")
    return head + begin + new + end + tail


# --- text --------------------------------------------------------------------------------------


def table(summary: Mapping[str, Any]) -> str:
    """What the pipeline prints at its end."""
    console = rich.console.Console(file=(out := io.StringIO()), width=88, color_system=None)
    print_table(summary, console)
    return re.sub(" +$", "", out.getvalue(), flags=re.MULTILINE).strip("\n")


def machine(summary: Mapping[str, Any]) -> str:
    """Where the run ran, in a line."""
    at, peak = summary["machine"], summary.get("peak_memory_bytes")
    memory = f", {peak / 2**30:.1f} GiB of memory" if peak else ""
    return f"{at['hardware']}, Python {at['python']}, jax {at['jax']}{memory}"


def differences(summary: Mapping[str, Any]) -> str:
    """What SPIRe emits more or less than the others, paired, in a sentence."""
    rows = [
        f"{pair.replace(' - ', ' less ')} {number(row['difference'])}{spread(row['ci95'], 2)}"
        for pair, row in summary["paired_differences"].items()
        if row and "spire" in pair.split(" - ")
    ]  # fmt: skip
    return f"Differences in `tau`, paired: {'; '.join(rows)}." if rows else ""


def in_readme(summary: Mapping[str, Any]) -> str:
    """The README's sample, as Markdown."""
    bits = summary["heldout_bits_per_byte"].get("target")
    text = f"{machine(summary)}. {differences(summary)}"
    if bits is not None:
        text += f" The target: {number(bits)} bits per byte on held-out files."
    said = textwrap.fill(text, 100, break_on_hyphens=False)
    begin = f"<!-- the run {_identity(summary)}, by python -m launch.sample -->"
    return f"{begin}\n```\n{table(summary)}\n```\n\n{said}"


def in_config(summary: Mapping[str, Any]) -> str:
    """The config's sample: the table, the machine below it."""
    said = textwrap.indent(table(summary), "    ")
    return f"{said}\n\non {machine(summary)}: the run {_identity(summary)}."


def _identity(summary: Mapping[str, Any]) -> str:
    """The report's hash: of the config, the data and all stages before it."""
    return summary["stages"]["report"]


# --- the picture -------------------------------------------------------------------------------


def picture(summary: Mapping[str, Any]) -> Figure:
    """Acceptance over context; modeled over context and by variant; and what was measured."""
    methods = {n: row for n, row in summary["methods"].items() if n != AUTOREGRESSIVE}
    at = summary["assumptions"]
    figure, (taus, over, variants, measured) = plots.panels(4)
    for i, (name, row) in enumerate(methods.items()):
        look = plots.style(name, i)
        contexts = [int(n) for n in row["by_context"]]
        found = [(of["tau"], of["tau_ci95"]) if of["tau"] is not None
                 else (of["tau_decoder"], of["tau_decoder_ci95"])
                 for of in row["by_context"].values()]  # fmt: skip
        tau = np.array([value for value, _ in found])
        ends = np.array([interval or (value, value) for value, interval in found]).T
        taus.errorbar(contexts, tau, np.abs(ends - tau), capsize=2, **look)
        modeled = row["modeled_by_context"]
        over.plot([int(n) for n in modeled], list(modeled.values()), **look)
        by_variant = row["modeled_by_variant"]
        places = np.arange(len(by_variant)) + 0.8 * (i + 0.5) / len(methods) - 0.4
        variants.bar(places, [of["multiplier"] for of in by_variant.values()],
                     0.8 / len(methods), color=look["color"])  # fmt: skip
        if (value := row["measured_multiplier"]) is not None:
            reach = np.abs(np.array(row["measured_multiplier_range"])[:, None] - value)
            measured.bar(i, value, 0.6, yerr=reach, capsize=3, color=look["color"])
    taus.set(title="acceptance (oracle)", xlabel="context length", ylabel="tokens per round, tau",
             ylim=(1, at["k"] + 1))  # fmt: skip
    plots.legend(taus)
    plots.multiplier_axes(over, f"modeled, batch {at['batch_size']}")
    variants.set_title(f"modeled, context {at['context_length']}, by variant")
    variants.set_xticks(range(len(at["variants"])), list(at["variants"]), fontsize=8)
    measured.set_title("measured here")
    measured.set_xticks(range(len(methods)), list(methods), fontsize=8)
    for axes in (variants, measured):
        axes.axhline(1, color="0.5", linewidth=0.8)
        axes.set_ylabel("multiplier")
    return plots.finish(
        figure, f"The quickstart's run, k = {at['k']}",
        f"Intervals (95%) of tau are over documents. Modeled: HOI {at['hoi']:g} FLOPs per byte, "
        f"tau by context, beyond those of the run the nearest's; above right the variant "
        f"{at['variant']}. {timed(summary)} The bars' ends: the least and the largest ratio.",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m launch.sample", None, __doc__, formatter_class=raw)
    parser.add_argument("--workdir", type=path_or_url, required=True,
                        help="a finished run of configs/quickstart.py")  # fmt: skip
    args = parser.parse_args(argv)
    with ends_in_a_line(ConfigError):
        write(ROOT, load(ROOT / CONFIG), locate(args.workdir))
    print(f"written: {README}, {CONFIG}, {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

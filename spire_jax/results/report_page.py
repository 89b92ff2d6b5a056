"""The report's page: tables, figures and generated text, as one self-contained HTML file.

Figures are matplotlib SVGs, put into the page: their colours become CSS variables, so that they
follow the page into the dark, and their ids are made unique, since all of them share one document.
The page loads nothing and runs no script.
"""

import io
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from spire_jax.results.plots import winners

TEMPLATE = "report_page.html.jinja"
SERIES = 8  # colours in the style sheet: --series-0 (the target, neutral) .. --series-7
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
CONTEXT_SHOWN = 400  # characters of an example's context, its end
NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
POINTS = 300  # of a learning curve; more are averaged
# Colours that matplotlib writes and the page replaces; nothing else is drawn in them.
INK, GRID = "#00fe01", "#00fe02"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 10, "lines.linewidth": 1.8, "lines.markersize": 5,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.titlesize": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7,
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 9,
    "legend.handlelength": 2.6,
}  # fmt: skip


# --- text --------------------------------------------------------------------------------------


def number(value: int | float | None, digits: int = 2) -> str:
    """A number with thousands separators, or a dash where there is none."""
    return NONE if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def spread(interval: Sequence[float] | None, digits: int = 3) -> str:
    """[low, high], after a space, or nothing where there is no interval."""
    return f" [{number(interval[0], digits)}, {number(interval[1], digits)}]" if interval else ""


def timed(summary: Mapping[str, Any]) -> str:
    """What the measured figures were measured on, in one sentence."""
    rows = [r for r in summary["methods"].values() if r["measured_tokens_per_s"] is not None]
    if not rows:
        return "Measured: nothing was timed."
    return (
        f"Measured: {summary['machine'].get('hardware', 'unnamed hardware')}, batch "
        f"{rows[0]['measured_batch_size']}, context {rows[0]['measured_context_length']}, "
        f"median of {rows[0]['measured_repeats']} alternating repeats."
    )


def _machine(summary: Mapping[str, Any]) -> dict[str, Any]:
    peak = summary["peak_memory_bytes"]
    return summary["machine"] | ({"peak_memory": f"{peak / 2**20:,.0f} MiB"} if peak else {})


def _shown(text: str) -> str:
    """Text as it can be shown: control characters as their pictures, carriage returns too."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "␡" if c == "\x7f" else c
        for c in text
    )


def _pieces(pieces: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    """(kind, text), neighbours of one kind joined; line ends outside accepted runs are marked."""
    for kind, run in itertools.groupby(pieces, key=lambda piece: piece[0]):
        text = _shown("".join(text for _, text in run))
        yield kind, text.replace("\n", "⏎\n") if kind in ("correction", "bonus") else text


def _examples(examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Examples grouped by context: {"document", "context", "cut", "outputs"}."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for example in examples:
        groups.setdefault((example["document"], example["context_text"]), []).append(example)
    return [
        {
            "document": _shown(document),
            "context": _shown(context[-CONTEXT_SHOWN:]),
            "hidden": max(0, len(context) - CONTEXT_SHOWN),
            "outputs": [(e["method"], list(_pieces(e["pieces"]))) for e in group],
        }
        for (document, context), group in groups.items()
    ]


# --- figures -----------------------------------------------------------------------------------


def _styles(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Line style by name, the same in all figures; told apart by dash and marker too."""
    names = [name for name in summary["methods"] if name != "autoregressive"]
    styles: dict[str, dict[str, Any]] = {"target": {"color": "#00fd00", "linestyle": "-"}}
    for i, name in enumerate(names):
        styles[name] = {
            "color": f"#00fd{1 + i % (SERIES - 1):02x}",
            "linestyle": DASHES[i % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
        }
    return styles


def _svg(figure: Figure, key: str, title: str) -> markupsafe.Markup:
    """The figure as an <svg> element whose ids start with `key`, in the page's colours."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": key, **_STYLE}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{key}-', text)
    text = text.replace("url(#", f"url(#{key}-")
    text = re.sub(r"#00fd0(\d)", r"var(--series-\1)", text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    # The size in points goes, the viewBox stays: the style sheet sets the width.
    head = f'<svg role="img" aria-labelledby="{key}-title" '
    text = re.sub(r'^<svg( (?:width|height)="[^"]*")*', head, text)
    name = f'<title id="{key}-title">{markupsafe.escape(title)}</title>'
    return markupsafe.Markup(re.sub(r"^(<svg[^>]*>)", lambda m: m[1] + name, text))


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 3.3), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    if len(axes.get_legend_handles_labels()[1]):
        figure.legend(loc="outside upper left", ncols=3, borderaxespad=0.2)


def _figures(
    summary: Mapping[str, Any], metrics: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Figure key -> {"svg", "caption"}; a figure without data is left out."""
    with mpl.rc_context(_STYLE):
        figures = dict(_all_figures(summary, metrics, _styles(summary)))
        return {
            key: {"svg": _svg(figure, f"figure-{key}", caption), "caption": caption}
            for key, (figure, caption) in figures.items()
        }


def _all_figures(
    summary: Mapping[str, Any],
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    styles: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, tuple[Figure, str]]]:
    methods = {n: r for n, r in summary["methods"].items() if n != "autoregressive"}
    at = summary["assumptions"]
    length = summary["context_length"]

    figure, axes = _axes("depth of the drafted token", "acceptance")
    for name, row in methods.items():
        values = [np.nan if v is None else v for v in row["acceptance_by_depth"]]
        axes.plot(range(1, len(values) + 1), values, label=name, **styles[name])
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes)
    caption = f"Acceptance of a drafted token, given that its depth is reached (context {length})"
    yield "acceptance", (figure, caption)

    if any(row["tau_by_k"] for row in methods.values()):
        figure, axes = _axes("drafted tokens per round, k", "tokens per round, τ")
        for name, row in methods.items():
            if not row["tau_by_k"]:
                continue
            ks = list(row["tau_by_k"])
            taus = np.array(list(row["tau_by_k"].values()))
            ranges = [row["tau_by_k_ci95"][k] or (t, t) for k, t in zip(ks, taus, strict=True)]
            errors = np.abs(np.array(ranges).T - taus)
            axes.errorbar([int(k) for k in ks], taus, errors, capsize=3, label=name,
                          **styles[name])  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=1)
        _legend(figure, axes)
        caption = f"Acceptance length by speculation depth, 95% intervals (context {length})"
        yield "tau", (figure, caption)

    for key, xlabel, fixed in (
        ("context", "context length L", f"batch {at['batch_size']}"),
        ("batch", "batch B", f"context {at['context_length']}"),
    ):
        figure, axes = _axes(xlabel, "modeled multiplier")
        for name, row in methods.items():
            points = row[f"modeled_by_{key}"]
            axes.plot([int(x) for x in points], list(points.values()), label=name, **styles[name])
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.axhline(1, color=INK, linewidth=1, linestyle=":")
        axes.set_ylim(bottom=0)
        _legend(figure, axes)
        over = "context" if key == "context" else "batch"
        caption = (
            f"Modeled throughput multiplier over {over} ({fixed}, {at['variant']} cost model, "
            f"HOI {at['hoi']:g}); dotted: autoregressive decoding"
        )
        yield key, (figure, caption)

    if choice := summary["choice"]:
        figure, axes = _axes("context length L", "batch B")
        colors = {name: style["color"] for name, style in styles.items()}
        colors["autoregressive"] = colors["target"]
        winners(axes, choice["cells"], colors, INK, GRID)
        _legend(figure, axes)
        caption = (
            f"The fastest method by batch and context, the depth it does best at, and its margin "
            f"over the next one; *: beyond the contexts evaluated (modeled: one {choice['chip']}, "
            f"{at['variant']} cost model)"
        )
        yield "choice", (figure, caption)

    figure, axes = _axes("training tokens", "training loss, nats per token")
    for name, rows in metrics.items():
        x, y = _thinned(rows, "loss")
        axes.plot(x, y, label=name, **(dict(styles[name]) | {"marker": ""}))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _legend(figure, axes)
    yield "loss", (figure, "Training loss; a mixed loss is not comparable with a cross-entropy")

    drafts = {n: rows for n, rows in metrics.items() if any("alpha" in row for row in rows)}
    if drafts:
        figure, axes = _axes("training tokens", "acceptance, all depths")
        for name, rows in drafts.items():
            x, y = _thinned(rows, "alpha")
            axes.plot(x, y, label=name, **(dict(styles[name]) | {"marker": ""}))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylim(0, 1.02)
        _legend(figure, axes)
        yield "alpha", (figure, "Expected acceptance on training batches")


def _thinned(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, values) of a curve, averaged in at most POINTS neighbouring groups."""
    known = [(row["tokens"], row[key]) for row in rows if row.get(key) is not None]
    groups = np.array_split(np.array(known, float), min(POINTS, len(known)))
    tokens, values = np.array([group.mean(axis=0) for group in groups]).T
    return tokens, values


# --- page --------------------------------------------------------------------------------------


def render(
    summary: Mapping[str, Any],
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    examples: Sequence[Mapping[str, Any]],
) -> str:
    """The whole page as HTML, for `summary` (report.summarize), training records and examples.

    Every text that comes from the corpus or the config is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "spread": spread}
    return environment.get_template(TEMPLATE).render(
        summary=summary,
        methods=summary["methods"],
        speculative={n: r for n, r in summary["methods"].items() if n != "autoregressive"},
        at=summary["assumptions"],
        measured_on=timed(summary),
        machine=_machine(summary),
        figures=_figures(summary, metrics),
        examples=_examples(examples),
        config_text=json.dumps(summary["config"], indent=2),
    )

"""What figures share: panels, a colour and a line for each method, the words below."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Drafts by the names that the paper's have in configs/; others take the next of the cycle.
STUDIED = "#1b7f5c"
COLORS = {"vanilla": "#c2571a", "magicdec": "#5b6fb5", "spire": STUDIED, "snapkv": "#8a5fb0"}
STYLES = ("-", "--", "-.", ":")


def panels(count: int, *, share: bool = False, width: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, two in a row, at most."""
    columns = min(count, 2)
    rows = -(-count // columns)
    size = (width * columns if count > 1 else max(width, 5.2), 3.2 * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share)
    for place, axes in enumerate(found := list(grid.flat)):
        axes.set_visible(place < count)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found[:count]


def style(method: str, place: int) -> dict[str, Any]:
    """How a method's line looks: what `Axes.plot` takes."""
    color = COLORS.get(method) or f"C{place}"
    return {"label": method, "color": color, "linestyle": STYLES[place % len(STYLES)],
            "marker": "o", "markersize": 3.5}  # fmt: skip


def multiplier_axes(axes: Axes, title: str) -> None:
    """Multipliers over the context length."""
    axes.axhline(1, color="0.5", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: short(x))
    axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel="context length", ylabel="multiplier")


def winners(
    axes: Axes, cells: Sequence[Sequence[Mapping[str, Any]]], colors: Mapping[str, str],
    ink: str = "black", faint: str = "0.9",
) -> None:  # fmt: skip
    """Who wins where (results/choice.py): a field for each batch and context, in its colour.

    In it the depth, and by how much it is faster than the next method; * where acceptance was not
    measured so far out.
    """
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            method = cell["method"]
            color = colors[method] if method else faint
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor=faint,
                                     alpha=0.45))  # fmt: skip
            said = "too large" if method is None else f"k = {cell['k']}" if cell["k"] else ""
            said += "*" if cell["extrapolated"] else ""
            if cell.get("margin") is not None:
                said += f"\n+{100 * cell['margin']:.0f}%"
            axes.text(x, y, said, ha="center", va="center", fontsize=6.5, color=ink)
    won = dict.fromkeys(cell["method"] for row in cells for cell in row if cell["method"])
    for method in won:
        axes.plot([], [], "s", color=colors[method], alpha=0.6, markersize=8, label=method)
    contexts = [cell["context"] for cell in cells[0]]
    axes.set(xlim=(-0.5, len(contexts) - 0.5), ylim=(-0.5, len(cells) - 0.5),
             xlabel="context length", ylabel="batch")  # fmt: skip
    axes.set_xticks(range(len(contexts)), [short(n) for n in contexts])
    axes.set_yticks(range(len(cells)), [str(row[0]["batch"]) for row in cells])
    axes.grid(visible=False)


def legend(axes: Axes) -> None:
    """The names of what is drawn, small."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, labels, fontsize=8, frameon=False)


def finish(figure: Figure, title: str, assumptions: str) -> Figure:
    """Its title above, and below it, wrapped, what it stands on."""
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    width = int(figure.get_figwidth() * 17)
    figure.supxlabel("\n".join(textwrap.wrap(assumptions, width)), fontsize=7, x=0.02, ha="left")
    return figure


def short(n: int | float) -> str:
    """4096 as 4k."""
    return f"{n / 1024:g}k" if n >= 1024 and n % 1024 == 0 else f"{n:g}"

"""What the notebook's figures have in common."""

import io

from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 100


def panels(count: int, width: float = 4.2, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side, each `width` by `height` inches.

    Without pyplot, whose state the threads of a notebook would share.
    """
    figure = Figure(figsize=(width * count, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, count, squeeze=False).flat)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def image(figure: Figure) -> Image:
    """A figure as a PNG that a notebook displays."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return Image(content.getvalue())

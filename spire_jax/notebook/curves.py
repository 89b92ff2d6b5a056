"""Training in a notebook: `spire_jax.run` in this process, its metrics drawn while it goes on."""

import contextlib
import contextvars
import io
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spire_jax import run
from spire_jax.notebook.parts import image, panels
from spire_jax.storage.metrics import read_metrics

INTERRUPTED = 130
COLORS = {"target": "#37474f", "spire": "#1b7f5c", "vanilla": "#c2571a"}
SAID = 2000  # characters of a failed run's last words


def train(arguments: Sequence[str]) -> None:
    """`python -m spire_jax.run` with these arguments, in this process, which holds the devices.

    Raises:
        RuntimeError: it failed; with what it said.
        KeyboardInterrupt: it was interrupted; again, it goes on from the last checkpoint.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            status: Any = run.main(arguments)
        except SystemExit as stopped:  # a bad command line
            status = stopped.code
    if status == INTERRUPTED:
        raise KeyboardInterrupt("interrupted; run the cell again and it goes on")
    if status:
        raise RuntimeError(f"the run ended with status {status}: {said.getvalue()[-SAID:]}")


@contextlib.contextmanager
def live_curves(workdir: str, models: Sequence[str], seconds: float = 3.0) -> Iterator[None]:
    """Display the metrics of `models` in a work directory, drawn anew while the block runs.

    The block keeps the main thread, where an interruption arrives; a thread draws what is in the
    files, so that what an earlier execution trained is there too.
    """
    handle = display(image(curves(workdir, models)), display_id=True)
    done = threading.Event()

    def follow() -> None:
        while not done.wait(seconds):
            handle.update(image(curves(workdir, models)))

    # With the cell's context, by which IPython knows where output belongs.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(follow,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        handle.update(image(curves(workdir, models)))


def curves(workdir: str, models: Sequence[str]) -> Figure:
    """Loss over tokens, model by model, and the acceptance of those that are drafts."""
    figure, axes = panels(2)
    for name in models:
        try:
            records = read_metrics(f"{workdir}/metrics/{name}.jsonl")
        except FileNotFoundError:  # nothing is logged yet
            records = []
        at = f", step {records[-1]['step']}" if records else ", waiting"
        _curve(axes[0], records, "loss", name, f"{name}{at}")
        if name != "target":
            _curve(axes[1], records, "alpha", name, _final(name, records))
    axes[0].set(title="loss", xlabel="tokens", ylabel="target: nats per token")
    axes[1].set(title="acceptance of a drafted token", xlabel="tokens", ylim=(0, 1))
    for one in axes:
        one.grid(color="0.92")
        one.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
        if one.get_legend_handles_labels()[1]:
            one.legend(fontsize=8, frameon=False)
    return figure


def _curve(axes: Axes, records: list[dict[str, Any]], value: str, name: str, label: str) -> None:
    points = [(r["tokens"], r[value]) for r in records if r.get(value) is not None]
    tokens, values = zip(*points, strict=True) if points else ((), ())
    axes.plot(tokens, values, label=label, color=COLORS.get(name), linewidth=1.5)


def _final(name: str, records: list[dict[str, Any]]) -> str:
    return f"{name}: {records[-1]['alpha']:.2f}" if records and "alpha" in records[-1] else name

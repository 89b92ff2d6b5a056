"""The cost model under one's hands: k, window, sink, batch and context as sliders."""

import dataclasses
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import brentq

from spire_jax.config.schema import AUTOREGRESSIVE, ConfigError, ExperimentConfig
from spire_jax.costs.acceptance import Acceptance
from spire_jax.costs.chips import CHIPS, chip
from spire_jax.costs.roofline import VARIANTS
from spire_jax.costs.throughput import (
    given_tau,
    memory_bytes,
    multiplier,
    tokens_per_s_per_chip,
)
from spire_jax.notebook.parts import image, panels
from spire_jax.results.choice import who_wins
from spire_jax.results.choose import choice_figure, run_acceptances
from spire_jax.results.plots import COLORS
from spire_jax.storage.paths import locate


def tau_at(tau: float, k: int, new_k: int) -> float:
    """The average generation length at another depth, were acceptance the same at every depth.

    `tau` tokens per round at depth `k`, from 1 to k + 1. With an acceptance of a, tau = 1 + a +
    ... + a^k.
    """
    if not 1 <= tau <= k + 1:
        raise ConfigError(f"tau={tau} must lie between 1 and k + 1 = {k + 1}")

    def length(a: float, depth: int) -> float:
        return sum(a**i for i in range(depth + 1))

    acceptance = brentq(lambda a: length(a, k) - tau, 0.0, 1.0)
    return length(acceptance, new_k)


def with_settings(config: ExperimentConfig, *, k: int, window: int, sink: int) -> ExperimentConfig:
    """The config with this depth, and this window and sink in every draft that has a window."""
    drafts = tuple(
        (name, dataclasses.replace(draft, window=window, sink=sink))  # type: ignore[call-arg]
        if getattr(draft, "window", 0)
        else (name, draft)
        for name, draft in config.drafts
    )
    decode = dataclasses.replace(config.decode, k=k)
    return dataclasses.replace(config, drafts=drafts, decode=decode)


def cost_figure(
    config: ExperimentConfig,
    *,
    k: int,
    window: int,
    sink: int,
    batch: int,
    context: int,
    variant: str = "fixed_window",
    on: str = "",
) -> Figure:
    """Modeled: multiplier over the context, tokens/s per chip over the batch.

    Args:
        config: one that gives acceptance lengths (throughput.tau), at its own decode.k.
        window, sink: of every draft that has a window, in tokens; the variant "paper" takes an
            eighth of the context in place of the window.
        variant: a key of VARIANTS.
        on: a key of CHIPS; "" = the config's.
    """
    given = given_tau(config)
    at = with_settings(config, k=k, window=window, sink=sink)
    taus = {name: tau_at(tau, config.decode.k, k) for name, tau in given.items()}
    colors = {name: COLORS.get(name) or f"C{i}" for i, name in enumerate(taus)}
    colors[AUTOREGRESSIVE] = "#78909c"
    on = on or config.throughput.chip
    figure, axes = panels(2, width=4.8, height=4.0)
    contexts = config.throughput.context_lengths
    for method, tau in taus.items():
        values = [multiplier(at, method, tau=tau, batch=batch, context=n, variant=variant)
                  for n in contexts]  # fmt: skip
        here = multiplier(at, method, tau=tau, batch=batch, context=context, variant=variant)
        label = f"{method}: {here:.2f} (tau {tau:.2f})"
        axes[0].plot(contexts, values, label=label, color=colors[method])
        axes[0].plot(context, here, "o", color=colors[method])
    axes[0].axhline(1, color="0.5", linewidth=0.8)
    axes[0].set(title=f"multiplier at batch {batch}, HOI {at.throughput.hoi:g}", xlabel="context")
    for method, tau in {AUTOREGRESSIVE: 1.0, **taus}.items():
        _over_batch(axes[1], colors[method], at, method, tau, batch, context, variant, on)
    axes[1].set(title=f"tokens/s per {on} at context {context}", xlabel="batch", yscale="log")
    for one in axes:
        one.set_xscale("log", base=2)
        one.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        one.grid(color="0.92")
        one.legend(fontsize=7, frameon=False)
    figure.supxlabel(
        f"Modeled, not measured ({VARIANTS[variant]}). tau is the config's at k = "
        f"{config.decode.k};\nat another k as if every depth were accepted alike; it does not "
        f"follow the window. Dotted: does not fit the chip's memory.",
        fontsize=7, x=0.02, ha="left",
    )  # fmt: skip
    return figure


def winners_figure(
    config: ExperimentConfig,
    workdir: str = "",
    *,
    on: str = "",
    variant: str = "with_head",
    deepest: int = 8,
) -> Figure:
    """Who wins where on (B, L), at its best depth: by a finished run, or by what a config gives.

    Args:
        workdir: the run of this config; "" = the config's throughput.tau, as if every depth, up to
            the `deepest`, were accepted alike.
        on: a key of CHIPS; "" = the config's.
        variant: a key of VARIANTS.
    """
    at = chip(on or config.throughput.chip)
    if workdir:
        taus = run_acceptances(config, locate(workdir), 0)
    else:
        k, where = config.decode.k, (config.throughput.context_length,)
        depths = range(1, deepest + 1)
        taus = {name: Acceptance(where, np.array([[[tau_at(tau, k, d) for d in depths]]]))
                for name, tau in given_tau(config).items()}  # fmt: skip
    return choice_figure(who_wins(config, taus, at, variant=variant), config, at, variant)


def _over_batch(axes, color, config, method, tau, batch, context, variant, on) -> None:
    """Tokens/s of one chip by batch size, dotted where weights and caches do not fit it."""

    def speed(n: int) -> float:
        return tokens_per_s_per_chip(
            config, method, tau=tau, batch=n, context=context, chip=on, variant=variant
        )

    batches = np.array(config.throughput.batch_sizes)
    values = np.array([speed(n) for n in batches.tolist()])
    fits = [memory_bytes(config, method, batch=n, context=context) <= chip(on).hbm_bytes
            for n in batches.tolist()]  # fmt: skip
    axes.plot(batches, values, ":", color=color)
    axes.plot(batches, np.where(fits, values, np.nan), color=color,
              label=f"{method}: {speed(batch):,.0f}")  # fmt: skip
    axes.plot(batch, speed(batch), "o", color=color)


def cost_widgets(config: ExperimentConfig) -> Any:
    """`cost_figure` with a slider for each argument, drawn anew when one is let go (ipywidgets)."""
    import ipywidgets as widgets

    at = config.throughput
    sparse = [draft.kept() for _, draft in config.drafts if draft.kept()[0]]
    window, sink = sparse[0] if sparse else (64, 1)

    def powers(values, value):
        return widgets.SelectionSlider(
            options=sorted({*values, value}), value=value, continuous_update=False
        )

    controls = {
        "k": widgets.IntSlider(config.decode.k, 1, 16, continuous_update=False),
        "window": powers((2**n for n in range(4, 15)), window),
        "sink": widgets.IntSlider(sink, 0, 16, continuous_update=False),
        "batch": powers(at.batch_sizes, at.batch_size),
        "context": powers(at.context_lengths, at.context_length),
        "variant": widgets.Dropdown(options=list(VARIANTS), value="fixed_window"),
        "on": widgets.Dropdown(options=list(CHIPS), value=at.chip),
    }
    for name, control in controls.items():
        control.description = "chip" if name == "on" else name

    # Not an Output widget, which every front end treats a little differently.
    picture = widgets.Image(format="png")

    def draw(_: Any = None) -> None:
        values = {name: control.value for name, control in controls.items()}
        picture.value = image(cost_figure(config, **values)).data

    for control in controls.values():
        control.observe(draw, names="value")
    draw()
    return widgets.VBox([*controls.values(), picture])

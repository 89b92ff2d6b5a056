"""Who reads what, asked of the code that trains: masks, the draft's reads, its memory.

`reads` does not know the rules of method.md 3.3. It moves one thing at a time (a target
activation, a token) and looks which of the draft's predictions move.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from spire_jax.config.schema import ConfigError, ExperimentConfig, ModelConfig
from spire_jax.drafting.build import compute_for
from spire_jax.drafting.spire import SpireOptions, initial_mix, target_layers
from spire_jax.models.masks import may_attend
from spire_jax.models.transformer import Params
from spire_jax.notebook.parts import panels
from spire_jax.training.tasks import stream_key

NOTHING, TARGET, OWN, ITSELF = range(4)  # where a draft's query finds a token
MEANING = ("not read", "the target's activation", "the draft's own memory", "the token itself")
COLORS = ("#eceff1", "#5b6fb5", "#e08a3c", "#1b7f5c")
MOVED = 1e-3  # logits: far above rounding, far below what a token that is read does


def masks_figure(config: ExperimentConfig, draft: str, length: int = 24) -> Figure:
    """`may_attend` of the target and of a draft, as matrices of query by key."""
    sparse = config.draft(draft).kept()
    at = np.arange(length)
    figure, axes = panels(2)
    target = config.target
    of = [("the target", target.window, target.sink), (draft, *sparse)]
    for one, (name, window, sink) in zip(axes, of, strict=True):
        seen = may_attend(at[:, None], at, window, sink)
        kind = f"window {window}, sink {sink}" if window else "causal"
        _matrix(one, np.where(seen, TARGET, NOTHING), f"{name}: {kind}")
    return figure


def reads(config: ExperimentConfig, name: str, length: int = 24) -> Int[np.ndarray, "q k"]:
    """Where a draft of one layer finds token k when it predicts what follows token q.

    In training, with the config's mask and rollout depth: NOTHING, TARGET, OWN or ITSELF. `length`
    is a multiple of the depth; parameters and texts are random. ConfigError for a draft without
    rollouts.
    """
    draft = config.draft(name)
    if not isinstance(draft, SpireOptions):
        raise ConfigError(f"drafts.{name}: a {draft.kind} draft reads no target; use a spire draft")
    # Of one layer: through two a token reaches others that do not read it themselves.
    one_layer = dataclasses.replace(draft, n_layers=1)
    drafting = one_layer.strategy(config.target, compute_for(config.train, config.train))
    k = draft.rollout(config.train)
    if length % k:
        raise ConfigError(f"length={length} must be a multiple of the rollout depth {k}")
    model, rng = drafting.model, np.random.default_rng(0)
    n, first = model.config.n_tokens, rng.integers(model.config.n_tokens // 2, size=length)
    # Rows: each activation moved, each token moved, nothing moved.
    tokens = np.tile(first, (2 * length + 1, 1)).astype(np.int32)
    tokens[length + np.arange(length), np.arange(length)] += n // 2
    activations = np.tile(rng.normal(size=(length, model.config.d_model)), (len(tokens), 1, 1))
    activations[np.arange(length), np.arange(length)] *= -1
    params = jax.jit(model.init)(stream_key(config.seed, "what a draft reads"))
    if "memory_mix" in params:  # the embedding alone: else a memory passes on what it has read
        own = np.eye(1, 2, dtype=bool)
        params["memory_mix"] = jnp.where(own, 0.0, jnp.finfo(jnp.float32).min)
    predict = jax.jit(drafting.predict, static_argnums=3)
    given = (jnp.asarray(activations, jnp.float32),) * len(drafting.collect)
    logits = np.asarray(predict(params, jnp.asarray(tokens), given, k))[..., :n]
    moved = np.abs(logits - logits[-1]).max(axis=-1) > MOVED
    by_target, by_token = moved[:length].T, moved[length : 2 * length].T
    found = np.where(by_target, TARGET, np.where(by_token, OWN, NOTHING))
    return np.where(np.eye(length, dtype=bool) & by_token, ITSELF, found)


def reads_figure(config: ExperimentConfig, name: str, length: int = 24) -> Figure:
    """`reads` as a matrix of query by key."""
    figure, (axes,) = panels(1, width=5.8)
    k = config.draft(name).rollout(config.train)
    _matrix(axes, reads(config, name, length), f"{name}: rollouts of {k} tokens")
    kinds = [Patch(color=color, label=what) for color, what in zip(COLORS, MEANING, strict=True)]
    figure.legend(handles=kinds, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def layers_figure(config: ExperimentConfig, name: str, params: Params = None) -> Figure:
    """Which activations each draft layer takes its keys and values from.

    Left, of verified tokens: the target's. Right, of drafted ones: the draft's own, mixed; before
    training, or as the draft's `params` have learned it.
    """
    draft = config.draft(name)
    if not isinstance(draft, SpireOptions) or not draft.feedback:
        raise ConfigError(f"drafts.{name} has no feedback memory; use a spire draft with feedback")
    n, n_target = draft.n_layers, config.target.n_layers
    taken = np.zeros((n, n_target + 1))
    if draft.memory == "fused":  # by a matrix: how much of each is not a number
        fused = draft.fused or target_layers(n_target, n)
        taken[:, list(fused)] = 1 / len(fused)
    else:
        for i, layer in zip(range(n), _layers(config.target, n, draft.memory), strict=True):
            taken[i, layer] = 1
    mix = initial_mix(n, draft.memory, draft.memory_init)
    if params is not None:
        mix = np.asarray(params["memory_mix"], np.float32)
    learned = "before training" if params is None else "as learned"
    figure, axes = panels(2, width=4.6, height=2.6)
    _weights(axes[0], taken, "target layer", "verified tokens: the target's")
    own = np.asarray(jax.nn.softmax(mix, axis=-1))
    _weights(axes[1], own, "draft layer", f"drafted tokens: a mix, {learned}")
    return figure


def _layers(target: ModelConfig, n: int, memory: str) -> Sequence[int]:
    """The target's layer that each of a draft's n layers reads; the embedding is layer 0."""
    found = target_layers(target.n_layers, n, memory) or (0,)
    return found * (n // len(found))


def _matrix(axes: Axes, found: np.ndarray, title: str) -> None:
    axes.imshow(found, cmap=ListedColormap(COLORS), vmin=0, vmax=len(COLORS) - 1)
    n = len(found)
    axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set(title=title, xlabel="position that is read", ylabel="position that reads")


def _weights(axes: Axes, values: np.ndarray, layers: str, title: str) -> None:
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if value >= 0.005:
            color = "white" if value > 0.5 else "black"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(len(values)), [str(i + 1) for i in range(len(values))])
    axes.set_title(title, fontsize=10)
    axes.set(xlabel=f"activation after {layers} (0: the embedding)", ylabel="memory of layer")

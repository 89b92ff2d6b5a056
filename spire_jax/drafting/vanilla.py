"""Vanilla speculation: a plain transformer drafts from its own cache, dense or a ring."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spire_jax.config.drafts import TransformerOptions
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.drafting.strategy import Strategy
from spire_jax.models.attention import Compute
from spire_jax.models.caches import (
    LayerCache,
    full_cache,
    ring_cache,
    ring_positions,
)
from spire_jax.models.masks import View
from spire_jax.models.sampling import probability_of
from spire_jax.models.transformer import Model


@DRAFT_KINDS.register("vanilla")
@dataclasses.dataclass(frozen=True)
class VanillaOptions(TransformerOptions):
    """A plain transformer, which reads nothing of the target."""

    kind: str = "vanilla"

    def strategy(self, target, compute):
        sizes, views = self.model(target), self.views(target)
        return Vanilla(Model(sizes.module(), sizes, compute, (("views", views),)))


@dataclasses.dataclass(frozen=True)
class Vanilla(Strategy):
    """A draft that never sees the target's activations, only tokens (method.md 3.3, 3.5)."""

    catches_up = True

    def begin(self, params, prompt, lengths, k, capacity):
        if prompt.tokens.shape[1] == 0:
            return self.empty(params, prompt.tokens.shape[0], k, capacity)
        _, keys_values = self.model.bind(params).prefill(prompt.tokens)
        return tuple(
            held_of(*kv, lengths, view, k, capacity, self.model.compute)
            for view, kv in zip(self.views, keys_values, strict=True)
        )

    def read(self, params, state, chunk):
        module = self.model.bind(params)
        return module.extend_prompt(state, chunk.rows, chunk.tokens, chunk.positions)[1]

    def step(self, params, state, target, tokens, positions):
        newest = tokens.shape[1] - 1
        module = self.model.bind(params)
        logits, _, state = module.extend(state, tokens, positions, logits_from=newest)
        return logits[:, 0], state

    def along(self, params, tokens, activations, cache, read, starts, k, sampling):
        # What a plain transformer predicts does not depend on where drafting began.
        first = int(starts.min())
        logits, _ = self.model.bind(params).forward(tokens[:, :-1], logits_from=first)
        q = probability_of(logits, tokens[:, first + 1 :], sampling)
        return q[:, starts[:, None] - first + np.arange(k)]


def held_of(
    key: Float[Array, "B T K H"], value: Float[Array, "B T K H"], lengths: Int[Array, " B"],
    view: View, room: int, capacity: int, compute: Compute,
) -> LayerCache:  # fmt: skip
    """A layer's cache under its view, of the first `lengths` of T prompt tokens.

    Args:
        room: drafted tokens that a ring has room for.
    """
    if not view.window:
        return full_cache(key, value, capacity, compute)
    ring = view.window + room
    _, at = ring_positions(lengths, view.sink, ring)
    key, value = (jnp.take_along_axis(x, at[..., None, None], axis=1) for x in (key, value))
    return ring_cache(key, value, view.sink, ring, compute)

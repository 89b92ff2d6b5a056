"""The target as its own draft, with less of its cache (method.md 3.5); nothing is trained.

Drafted tokens are computed by the whole model, which reads the target's own keys and values of
what a policy keeps of the verified tokens, and its own of drafted ones. A policy says what it keeps
of a prompt (`begin`); what comes later is taken from the target's cache after each round.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from spire_jax.config.schema import ModelConfig
from spire_jax.drafting.spire import SpireDraft, of_family
from spire_jax.drafting.strategy import Strategy
from spire_jax.models.attention import Compute
from spire_jax.models.caches import KeysValues
from spire_jax.models.masks import View
from spire_jax.models.sampling import probability_of
from spire_jax.models.transformer import Model


@dataclasses.dataclass(frozen=True)
class SelfDrafting(Strategy):
    """A policy for the cache of a target that drafts; the draft's parameters are the target's."""

    def taken(self, cache, layer, positions, rows=None) -> KeysValues:
        """A layer's entries of the target's cache at positions that it holds."""
        config = self.model.config
        heads = config.n_kv_heads, config.d_head
        return cache[layer].entries(positions, heads, rows)

    def step(self, params, state, target, tokens, positions):
        # A drafted token's own memory is what it would be to the target: its layer's input.
        logits, _, state = self.model.bind(params).extend(state, tokens, positions)
        return logits[:, -1], state

    def commit(self, params, state, block):
        return tuple(
            cache.append(
                block.positions,
                *self.taken(block.cache, i, block.positions, block.rows),
                block.rows,
            )
            for i, cache in enumerate(state)
        )

    def rolled_out(self, params, tokens, cache, read, starts, k, sampling, selected=None):
        """`along` where all starts read the same keys and values, under the model's views."""
        at = jnp.tile(jnp.asarray(read), (tokens.shape[0], 1))
        memory = [self.taken(cache, i, at) for i in range(len(self.views))]
        module = self.model.bind(params)
        logits = module.rollout_over(memory, tokens[:, :-1], read, starts, k, selected)
        return probability_of(logits, tokens[:, starts[:, None] + np.arange(1, k + 1)], sampling)


def drafting_target(
    target: ModelConfig,
    compute: Compute,
    views: tuple[View, ...],
    module: type[SpireDraft] = SpireDraft,
) -> Model:
    """The target's structure as a draft: SPIRe's with nothing pruned and no mix."""
    options = (("views", views), ("feedback", False))
    return Model(of_family(target, module), target, compute, options)

"""SPIRe speculation: a ring of memories, refreshed from the target's activations."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from spire_jax.drafting import depth_keys
from spire_jax.models.caches import empty_ring, ring_cache, ring_positions, write_rows
from spire_jax.models.sampling import probability_of, sample, stream, transformed_logits
from spire_jax.models.spire import target_layers
from spire_jax.models.transformer import Model


@dataclasses.dataclass(frozen=True)
class Spire:
    """The feedback draft (method.md 3.3); `model` is a SpireDraft of a target of N layers."""

    model: Model
    target_depth: int  # N

    @property
    def collect(self) -> tuple[int, ...]:
        memory = dict(self.model.options).get("memory", "layers")
        return target_layers(self.target_depth, self.model.config.n_layers, memory)

    def reads(self, start):
        config = self.model.config
        return config.sink, max(start - config.window + 1, 0) if config.window else 0

    def prefill(self, params, tokens, lengths, activations, k, capacity):
        config = self.model.config
        if tokens.shape[1] == 0:
            return empty_ring(config, tokens.shape[0], k, self.model.compute, capacity)
        # Each slot gathers the position it should hold: only the activations that the window
        # and the sinks need are projected.
        ring = config.window + k if config.window else capacity
        positions, gather = ring_positions(lengths, config.sink, ring)
        held = tuple(jnp.take_along_axis(y, gather[..., None], axis=1) for y in activations)
        read = jnp.take_along_axis(tokens, gather, axis=1)
        keys_values = self.model.bind(params).read_target(read, held, gather)
        return ring_cache(keys_values, positions, config.sink, ring, self.model.compute)

    def prefill_chunk(self, params, cache, rows, tokens, activations, positions):
        keys_values = self.model.bind(params).read_target(tokens, activations, positions)
        return write_rows(cache, rows, positions, keys_values)

    def propose(self, params, cache, previous, last, positions, keys, k, sampling):
        module = self.model.bind(params)
        keys = stream(keys, "draft")
        token, drafts, qs = last, [], []
        for depth in range(k):
            logits, cache = module.step(cache, token, positions + depth)
            qs.append(transformed_logits(logits, sampling))
            token = sample(depth_keys(keys, depth), qs[-1])
            drafts.append(token)
        return jnp.stack(drafts, axis=1), jnp.stack(qs, axis=1), cache

    def commit(self, params, cache, tokens, activations, positions):
        return self.model.bind(params).refresh(cache, tokens, activations, positions)

    def probabilities_along(self, params, tokens, activations, read, starts, k, sampling):
        logits = self.model.bind(params).rollout(tokens[:, :-1], activations, starts, k, read)
        return probability_of(logits, tokens[:, starts[:, None] + np.arange(1, k + 1)], sampling)

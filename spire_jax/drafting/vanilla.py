"""Vanilla speculation: a plain transformer drafts from its own cache, dense or a ring."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from spire_jax.drafting import depth_keys
from spire_jax.models.caches import empty_full, empty_ring, full_cache, ring_cache, ring_positions
from spire_jax.models.prompt import extend_prompt
from spire_jax.models.sampling import probability_of, sample, stream, transformed_logits
from spire_jax.models.transformer import Model


@dataclasses.dataclass(frozen=True)
class Vanilla:
    """A draft that never sees the target's activations, only tokens.

    After full acceptance its cache lacks the k-th drafted token, which it proposed but never
    read: so the first step of every round ingests the last two tokens (method.md 3.3).
    """

    model: Model
    collect: tuple[int, ...] = ()

    def reads(self, start):
        return 0, start

    def prefill(self, params, tokens, lengths, activations, k, capacity):
        config, compute = self.model.config, self.model.compute
        batch, length = tokens.shape
        if length == 0 and config.window:
            return empty_ring(config, batch, k, compute)
        if length == 0:
            return empty_full(config, batch, capacity, compute)
        _, keys_values = self.model.bind(params).prefill(tokens)
        if not config.window:
            return full_cache(keys_values, capacity, compute)
        ring = config.window + k
        positions, gather = ring_positions(lengths, config.sink, ring)
        at = gather[..., None, None]
        held = [
            (jnp.take_along_axis(key, at, axis=1), jnp.take_along_axis(value, at, axis=1))
            for key, value in keys_values
        ]
        return ring_cache(held, positions, config.sink, ring, compute)

    def prefill_chunk(self, params, cache, rows, tokens, activations, positions):
        return extend_prompt(self.model.bind(params), cache, rows, tokens, positions)[1]

    def propose(self, params, cache, previous, last, positions, keys, k, sampling):
        module = self.model.bind(params)
        keys = stream(keys, "draft")
        # A row that waits (previous < 0) keeps its entry bit for bit: the chunk that wrote it and
        # this step differ in rounding, and how many rounds pass meanwhile is its neighbours' doing.
        tokens = jnp.stack([jnp.maximum(previous, 0), last], axis=1)
        pos = jnp.stack([jnp.where(previous < 0, -1, positions - 1), positions], axis=1)
        drafts, qs = [], []
        for depth in range(k):
            logits, _, cache = module.extend(cache, tokens, pos)
            qs.append(transformed_logits(logits[:, -1], sampling))
            drafts.append(sample(depth_keys(keys, depth), qs[-1]))
            tokens, pos = drafts[-1][:, None], pos[:, -1:] + 1
        return jnp.stack(drafts, axis=1), jnp.stack(qs, axis=1), cache

    def commit(self, params, cache, tokens, activations, positions):
        return cache

    def probabilities_along(self, params, tokens, activations, read, starts, k, sampling):
        # What a plain transformer predicts does not depend on where drafting began.
        first = int(starts.min())
        logits, _ = self.model.bind(params).forward(tokens[:, :-1], logits_from=first)
        q = probability_of(logits, tokens[:, first + 1 :], sampling)
        return q[:, starts[:, None] - first + np.arange(k)]

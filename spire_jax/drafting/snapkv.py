"""MagicDec with SnapKV's selection: the target drafts for itself from the tokens it attended to.

After prefill each KV head of each layer keeps the prompt tokens that the last 32 queries attended
to most, and those 32 (Li et al. 2024, arXiv 2404.14469); tokens that come later are all kept.
Positions are those of the text. With a budget of the whole text the draft is the dense target.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spire_jax.config.schema import SNAPKV_OBSERVED, ModelConfig
from spire_jax.drafting.spire import Spire
from spire_jax.models.attention import Compute, packed
from spire_jax.models.caches import SelectedCache
from spire_jax.models.layers import Block
from spire_jax.models.masks import EMPTY
from spire_jax.models.sampling import probability_of
from spire_jax.models.spire import SpireDraft
from spire_jax.models.transformer import Model

POOL = 5  # votes are averaged over so many neighbours


def snapkv(
    target: ModelConfig, budget: int, compute: Compute, observed: int = SNAPKV_OBSERVED
) -> "SnapKv":
    """The strategy; its draft's parameters are the target's own."""
    sizes = dataclasses.replace(target, window=0, sink=0)
    model = Model(SpireDraft, sizes, compute, (("feedback", False),))
    return SnapKv(model, target.n_layers, budget, observed)


@dataclasses.dataclass(frozen=True)
class SnapKv(Spire):
    """`budget` prompt tokens are kept, the observed ones included."""

    budget: int = 0
    observed: int = SNAPKV_OBSERVED

    def reads(self, start):
        return 0, 0

    def prefill(self, params, tokens, lengths, activations, k, capacity):
        module, config = self.model.bind(params), self.model.config
        batch, prompt = tokens.shape
        kept = min(self.budget, prompt)
        # The tokens after the longest prompt have room for themselves.
        shape = batch, kept + capacity - prompt, config.n_kv_heads, config.d_head
        rows = jnp.arange(batch)[:, None, None]
        heads = jnp.arange(config.n_kv_heads)[None, :, None]
        keys, values, positions = [], [], []
        for i, block in enumerate(module.blocks):
            k_held = v_held = jnp.zeros(shape, self.model.compute.dtype)
            held = jnp.full((batch, shape[2], shape[1]), EMPTY, jnp.int32)
            if kept:
                y = activations[i].astype(self.model.compute.dtype)
                chosen = select(block, y, lengths, kept, self.observed)
                at = rows, jnp.maximum(chosen, 0), heads
                k_held, v_held = (
                    jnp.zeros(shape, x.dtype).at[:, :kept].set(jnp.moveaxis(x[at], 1, 2))
                    for x in block.keys_values(y, np.arange(prompt))
                )
                held = held.at[:, :, :kept].set(chosen)
            width = shape[2] * shape[3]
            keys.append(packed(k_held, width))
            values.append(packed(v_held, width))
            positions.append(held)
        used = jnp.minimum(lengths, kept)
        return SelectedCache(tuple(keys), tuple(values), tuple(positions), lengths, used)

    def prefill_chunk(self, params, cache, rows, tokens, activations, positions):
        # What a prompt's last tokens select among all of it is known only when all of it is there.
        raise ValueError("SnapKV selects over the whole prompt at once, which cannot be prefilled "
                         "in chunks; decode with another method")  # fmt: skip

    def probabilities_along(self, params, tokens, activations, read, starts, k, sampling):
        module, prompt = self.model.bind(params), int(starts.min())
        selected = None
        if prompt:
            lengths, budget = jnp.full(tokens.shape[0], prompt), min(self.budget, prompt)
            inputs = (y[:, :prompt].astype(self.model.compute.dtype) for y in activations)
            selected = [
                _mark(select(block, y, lengths, budget, self.observed), read, prompt)
                for block, y in zip(module.blocks, inputs, strict=True)
            ]
        logits = module.rollout(tokens[:, :-1], activations, starts, k, read, selected)
        return probability_of(logits, tokens[:, starts[:, None] + np.arange(1, k + 1)], sampling)


def select(
    block: Block,
    y: Float[Array, "B T D"],
    lengths: Int[Array, " B"],
    budget: int,
    observed: int,
) -> Int[Array, "B K budget"]:
    """The positions that each KV head keeps of the first `lengths` of each row.

    Args:
        y: the layer's inputs over the prompt.
        budget: how many, at most T; EMPTY where a row has fewer.
        observed: the last tokens, which vote and are kept; the first of the result.
    """
    length, first = y.shape[1], min(observed, budget)
    last = lengths[:, None] - 1 - jnp.arange(observed)  # newest first; negative: there is none
    at = jnp.maximum(last, 0)
    queries = block.queries(jnp.take_along_axis(y, at[..., None], axis=1), at)
    keys, _ = block.keys_values(y, np.arange(length))
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", queries, keys, preferred_element_type=jnp.float32)
    places = jnp.arange(length)
    causal = (places <= last[..., None])[:, None, None]
    weight = jax.nn.softmax(jnp.where(causal, logits * block.scale, -jnp.inf))
    weight = jnp.where(causal, weight, 0.0)  # nan where there is no query
    # Queries of one KV head vote together; what is observed is kept anyway, without votes.
    older = (places < lengths[:, None] - observed)[:, None]
    votes = jnp.where(older, weight.mean(axis=2).sum(axis=2), 0.0)
    around = ((0, 0), (0, 0), (POOL // 2, POOL // 2))
    pooled = jax.lax.reduce_window(votes, 0.0, jax.lax.add, (1, 1, POOL), (1, 1, 1), around) / POOL
    score, chosen = jax.lax.top_k(jnp.where(older, pooled, -1.0), budget - first)
    newest = jnp.where(last >= 0, last, EMPTY)[:, None, :first]
    newest = jnp.broadcast_to(newest, (*chosen.shape[:2], first))
    voted = jnp.where(score >= 0, chosen, EMPTY)
    return jnp.concatenate([newest, voted], axis=-1).astype(jnp.int32)


def _mark(
    chosen: Int[Array, "B K budget"], read: Int[np.ndarray, " M"], prompt: int
) -> Bool[Array, "B K M"]:
    """Which of the positions 0 .. M - 1 are kept: those chosen, and all after the prompt."""
    batch, heads, _ = chosen.shape
    kept = jnp.broadcast_to(jnp.asarray(read >= prompt), (batch, heads, len(read)))
    at = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    return kept.at[(*at, jnp.where(chosen < 0, len(read), chosen))].set(True, mode="drop")

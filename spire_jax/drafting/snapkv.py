"""MagicDec with SnapKV's selection: the target drafts for itself from the tokens it attended to.

After prefill each KV head of each layer keeps the prompt tokens that the last queries attended to
most, and those themselves (Li et al. 2024, arXiv 2404.14469); tokens that come later are all kept.
Positions are those of the text. With a budget of the whole text the draft is the dense target.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spire_jax.config.checks import check, positive
from spire_jax.config.drafts import DraftCost, DraftOptions, Pass, over_layers
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.config.schema import ModelConfig
from spire_jax.drafting.magicdec import check_budget, check_target
from spire_jax.drafting.self_drafting import SelfDrafting, drafting_target
from spire_jax.models.attention import Compute, capped
from spire_jax.models.caches import SelectedCache, allocated
from spire_jax.models.layers import Block
from spire_jax.models.masks import EMPTY, View

POOL = 5  # votes are averaged over so many neighbours


@DRAFT_KINDS.register("snapkv")
@dataclasses.dataclass(frozen=True)
class SnapKvOptions(DraftOptions):
    """The target as its own draft, reading what its last queries chose; nothing is trained."""

    kind: str = "snapkv"
    budget: int = 65  # prompt tokens that are kept, the observed ones included
    observed: int = 32  # the last tokens of a prompt: they are kept and asked for the others

    # What a prompt's last tokens select among all of it is known only when all of it is there.
    whole_prompt = True

    def strategy(self, target, compute):
        return snapkv(target, self.budget, compute, self.observed)

    def kept(self):
        return self.budget, 0

    def views(self, target):
        return target.views()  # of what is kept, everything

    def cost(self, target, context, k):
        # The query's own entry counts as one of the budget, as it does in MagicDec's.
        kept = float(min(self.budget, context))
        rows = over_layers(self.views(target), lambda v: min(kept, v.window + v.sink), kept)
        return DraftCost(
            rows=rows, slots=float(min(self.budget + k, context)), passes=(Pass(),) * k
        )

    def check(self, at, config):
        positive(self, at, "budget observed")
        check(self.budget > self.observed,
              f"{at}.budget={self.budget}: the last {self.observed} tokens ({at}.observed) are "
              f"kept anyway; keep more")  # fmt: skip
        check_target(at, config)

    def check_run(self, at, config):
        check_budget(at, self.budget, config)


@dataclasses.dataclass(frozen=True)
class SnapKv(SelfDrafting):
    """`budget` prompt tokens are kept, the `observed` last ones included."""

    budget: int
    observed: int

    @property
    def collect(self):
        return tuple(range(self.model.config.n_layers))  # what queries are made of

    def empty(self, params, batch, k, capacity):
        config = self.model.config
        none = jnp.zeros((batch, 0, config.n_kv_heads, config.d_head), self.model.compute.dtype)
        begin, chosen = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, config.n_kv_heads, 0), int)
        arrays = allocated(none, none, capacity, self.model.compute)
        return tuple(SelectedCache(*arrays, chosen, begin, begin) for _ in self.views)

    def begin(self, params, prompt, lengths, k, capacity):
        batch, length = prompt.tokens.shape
        kept = min(self.budget, length)
        if not kept:
            return self.empty(params, batch, k, capacity)
        module, compute = self.model.bind(params), self.model.compute
        used, caches = jnp.minimum(lengths, kept), []
        for i, block in enumerate(module.blocks):
            keys, values = self.taken(prompt.cache, i, prompt.positions)
            y = prompt.activations[i].astype(compute.dtype)
            chosen = select(block, self.views[i], y, keys, lengths, kept, self.observed)
            at = jnp.arange(batch)[:, None, None], jnp.maximum(chosen, 0), (
                jnp.arange(keys.shape[2])[None, :, None])  # fmt: skip
            held = (jnp.moveaxis(x[at], 1, 2) for x in (keys, values))
            # The tokens after the longest prompt have room for themselves.
            arrays = allocated(*held, kept + capacity - length, compute)
            caches.append(SelectedCache(*arrays, chosen, lengths, used))
        return tuple(caches)

    def read(self, params, state, chunk):
        # What a prompt's last tokens select among all of it is known only when all of it is there.
        raise ValueError("SnapKV selects over the whole prompt at once, which cannot be prefilled "
                         "in chunks; decode with another method")  # fmt: skip

    def along(self, params, tokens, activations, cache, read, starts, k, sampling):
        module, prompt = self.model.bind(params), int(starts.min())
        everything = np.arange(tokens.shape[1] - 1)
        selected = None
        if prompt:
            batch, budget = tokens.shape[0], min(self.budget, prompt)
            lengths, at = jnp.full(batch, prompt), jnp.tile(jnp.arange(prompt), (batch, 1))
            selected = []
            for i, block in enumerate(module.blocks):
                y = activations[i][:, :prompt].astype(self.model.compute.dtype)
                keys, _ = self.taken(cache, i, at)
                chosen = select(block, self.views[i], y, keys, lengths, budget, self.observed)
                selected.append(_mark(chosen, everything, prompt))
        return self.rolled_out(params, tokens, cache, everything, starts, k, sampling, selected)


def snapkv(target: ModelConfig, budget: int, compute: Compute, observed: int) -> SnapKv:
    """The strategy; its draft's parameters are the target's own."""
    return SnapKv(drafting_target(target, compute, target.views()), budget, observed)


def select(
    block: Block,
    view: View,
    y: Float[Array, "B T D"],
    keys: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    budget: int,
    observed: int,
) -> Int[Array, "B K budget"]:
    """The positions that each KV head keeps of the first `lengths` of each row.

    Args:
        y: the layer's inputs over the prompt.
        keys: the layer's keys over the prompt.
        budget: how many, at most T; EMPTY where a row has fewer.
        observed: the last tokens, which vote and are kept; the first of the result.
    """
    length, first = y.shape[1], min(observed, budget)
    last = lengths[:, None] - 1 - jnp.arange(observed)  # newest first; negative: there is none
    at = jnp.maximum(last, 0)
    queries = block.queries(jnp.take_along_axis(y, at[..., None], axis=1), at)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", queries, keys, preferred_element_type=jnp.float32)
    places = jnp.arange(length)
    logits = capped(logits, view)
    seen = view.sees(last[..., None], places)[:, None, None]
    weight = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
    weight = jnp.where(seen, weight, 0.0)  # nan where there is no query
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

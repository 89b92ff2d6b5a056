"""SPIRe with a stride: a pass drafts s tokens, and one draft serves every s (method.md section 8).

    pass 0 reads      the last token                        and s - 1 masks after it
    pass p > 0 reads  the s tokens of the pass before it     and s - 1 masks after them

It drafts s tokens, from its last known token and from each mask. Inputs of a pass see the target's
memories of positions before the round, the draft's own memories of tokens known in earlier passes,
and each other causally. Known tokens leave memories as in SPIRe, masks leave none: s = 1 is SPIRe,
s = k a block draft with SPIRe's memories. Weights, unembedding and launch are paid k / s times.

A head on top of the slots (`head`) adds to a slot's logits what follows from the tokens before it,
drafted or known, so that slot by slot only a small product is left to do, and q is the distribution
that the tokens are jointly drawn from:

    markov     z_j += W1[x_(j-1)] W2                     (as DSpark, arXiv 2607.05147)
    recurrent  h_j = tanh(W1[x_(j-1)] + h_(j-1) U)       (ours; h = 0 before every pass)
               z_j += h_j W2

W2 is 0 at first. Without a head the slots of a pass are drawn independently of each other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spire_jax.config.checks import check, choice, positive
from spire_jax.config.drafts import Pass
from spire_jax.config.readers import EVALUATE, STUDY, read_by
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.config.schema import head_size
from spire_jax.drafting.spire import Spire, SpireDraft, SpireOptions, of_family
from spire_jax.drafting.strategy import Proposal
from spire_jax.models.attention import attention, merge_attention
from spire_jax.models.caches import Caches, KeysValues
from spire_jax.models.layers import Block, parameter, truncated_normal
from spire_jax.models.sampling import Sampling, probability_of, transformed_logits

HEADS = ("none", "markov", "recurrent")
GREEDY = Sampling(0.0)


@DRAFT_KINDS.register("stride")
@dataclasses.dataclass(frozen=True)
class StrideOptions(SpireOptions):
    """SPIRe whose passes draft several tokens."""

    kind: str = "stride"
    strides: tuple[int, ...] = (1, 2, 4)  # each batch of training draws one of them
    stride: int = read_by(1, EVALUATE, STUDY)  # tokens that a pass drafts, in decoding
    head: str = "none"  # over the slots of a pass: "markov", "recurrent"
    head_rank: int = 64
    # What is drawn of a slot's logits: "sampled", or the "argmax", whose q is one-hot.
    draws: str = read_by("sampled", EVALUATE, STUDY)

    def strategy(self, target, compute):
        model = super().strategy(target, compute).model
        options = (("head", self.head), ("head_rank", self.head_rank))
        module = of_family(model.config, StridedDraft)
        model = dataclasses.replace(model, module=module, options=(*model.options, *options))
        return Strided(model, target.n_layers, self.stride, self.strides, self.draws)

    def initial(self, target, fresh):
        params = super().initial(target, fresh)
        table = params["embedding"] if "embedding" in params else target["embedding"]
        return params | {"mask": jnp.mean(table, axis=0).astype(fresh["mask"].dtype)}

    def cost(self, target, context, k):
        sizes = self.model(target)
        twice = int(self.feedback)  # memories beside layer inputs, of the known tokens
        out = self.head_rank * head_size(sizes) if self.head != "none" else 0
        mix = self.head_rank**2 if self.head == "recurrent" else 0
        table = self.head_rank * sizes.vocab_size if self.head != "none" else 0
        of_passes = tuple(Pass(known + slots - 1, slots, twice * known, out + mix)
                          for known, slots in passes(k, self.stride))  # fmt: skip
        more = sizes.d_model + table + out + mix
        return dataclasses.replace(super().cost(target, context, k), passes=of_passes, more=more)

    def check(self, at, config):
        super().check(at, config)
        positive(self, at, "stride head_rank")
        choice(f"{at}.head", self.head, HEADS)
        choice(f"{at}.draws", self.draws, "sampled argmax")
        check(self.attend_self, f"{at}.attend_self: the tokens of a pass see each other; leave it "
                                f"out, or use kind 'spire'")  # fmt: skip
        check(bool(self.strides) and all(s >= 1 for s in self.strides),
              f"{at}.strides={self.strides} must be one or more, each 1 or more")  # fmt: skip
        depths = (config.decode.k, *config.decode.depths)
        wide = [k for k in depths if self.stride > k]
        check(not wide, f"{at}.stride={self.stride} is more than the {min(wide, default=0)} tokens "
                        f"that a round drafts (decode.k, decode.depths)")  # fmt: skip

    def check_run(self, at, config):
        super().check_run(at, config)
        k = self.rollout(config.train)
        odd = [s for s in self.strides if k % s]
        own = f"{at}.k" if self.k else "train.k"
        check(not odd, f"{at}.strides: {odd} do not divide {own}={k}")


def passes(k: int, stride: int) -> list[tuple[int, int]]:
    """Of every pass of a round of k, how many known tokens it reads and how many it drafts."""
    slots = [min(stride, k - begin) for begin in range(0, k, stride)]
    return list(zip([1] + [stride] * (len(slots) - 1), slots, strict=True))


class StridedDraft(SpireDraft):
    """A SPIRe draft with a mask token's embedding, and a head over the slots of a pass."""

    def __init__(
        self, config, compute, *, rngs, head: str = "none", head_rank: int = 64, **options
    ):
        super().__init__(config, compute, rngs=rngs, **options)
        self.head = head
        self.mask = parameter(rngs, (config.d_model,), (None,), nnx.initializers.zeros)
        if head != "none":
            size = config.head_tokens or config.vocab_size
            self.head_in = parameter(
                rngs, (config.vocab_size, head_rank), ("vocab", None), truncated_normal(head_rank)
            )
            self.head_out = parameter(
                rngs, (head_rank, size), (None, "vocab"), nnx.initializers.zeros
            )
        if head == "recurrent":
            self.head_mix = parameter(
                rngs, (head_rank, head_rank), (None, None), truncated_normal(head_rank)
            )

    # --- the head ------------------------------------------------------------------------------

    def head_start(self, *rows: int) -> Float[Array, "*rows r"]:
        """The head's state before the first slot of a pass."""
        rank = self.head_mix.shape[0] if self.head == "recurrent" else 0
        return jnp.zeros((*rows, rank))

    def with_head(
        self,
        logits: Float[Array, "*rows Vh"],
        previous: Int[Array, "*rows"],
        state: Float[Array, "*rows r"],
    ) -> tuple[Float[Array, "*rows Vh"], Float[Array, "*rows r"]]:
        """A slot's logits, given the token before it, and the head's state after it."""
        if self.head == "none":
            return logits, state
        h = self.head_in[...][previous].astype(jnp.float32)
        if self.head == "recurrent":
            h = state = jnp.tanh(h + state @ self.head_mix[...].astype(jnp.float32))
        return logits + h @ self.head_out[...].astype(jnp.float32), state

    # --- training and the oracle ---------------------------------------------------------------

    def strided_rollout(
        self,
        tokens: Int[Array, "B T"],
        activations: tuple[Float[Array, "B M D"], ...],
        starts: Int[np.ndarray, " R"],
        k: int,
        stride: int,
        read: Int[np.ndarray, " M"] | None = None,
        *,
        in_head: bool = False,
    ) -> Float[Array, "B R k V"] | Float[Array, "B R k Vh"]:
        """Logits of k teacher-forced slots from every start, all starts in parallel.

        Slot j (0-based) from start s predicts token s + j + 1. Arguments as of `rollout`.
        """
        memory, read = self.of_text(tokens, activations, read)
        own: list[list[KeysValues]] = [[] for _ in self.blocks]
        one_pass = self._strided_pass
        if self.compute.remat:
            one_pass = jax.checkpoint(one_pass, static_argnums=0)
        x, begin = [], 0
        for known, slots in passes(k, stride):
            at = _Pass(starts, begin, known, slots, read)
            drafted, memories = one_pass(at, tokens, memory, own)
            x.append(drafted)
            begin += known
            for layer, kv in zip(own, memories, strict=True):
                layer.append(kv)
        logits = self.unembed_head(jnp.concatenate(x, axis=2))
        logits = self._with_heads(logits, tokens[:, starts[:, None] + np.arange(k)], stride)
        return logits if in_head else self.widened(logits)

    def _strided_pass(self, at: "_Pass", tokens, memory, own):
        """What a pass drafts from, [B, R, slots, D], and keys and values of its known tokens."""
        batch, rollouts = len(tokens), len(at.starts)
        positions, limit = at.positions(at.offsets).ravel(), np.repeat(at.starts, len(at.offsets))
        x = self.embed(tokens[:, positions])
        masked = np.tile(np.arange(len(at.offsets)) >= at.known, rollouts)
        x = jnp.where(masked[:, None], self.mask[...].astype(x.dtype), x)

        def of_starts(x: Array) -> Array:
            """Each start of each row by itself."""
            return x.reshape(batch * rollouts, -1, *x.shape[2:])

        def attend(i: int, block: Block, x: Array):
            q = block.queries(x, positions)
            parts = self.over_text(i, q, memory[i], positions, at.read, limit)
            recent = [*own[i], block.keys_values(x, positions)]
            k, v = (
                jnp.concatenate([*map(of_starts, y)], axis=1) for y in zip(*recent, strict=True)
            )
            q_pos, k_pos = (jnp.tile(at.positions(offsets), (batch, 1))
                            for offsets in (at.offsets, np.arange(at.end)))  # fmt: skip
            out, lse = attention(of_starts(q), k, v, q_pos, k_pos, self.views[i])
            parts.append((out.reshape(q.shape), lse.reshape(q.shape[:-1])))
            return merge_attention(parts), None

        xs, _ = self.run(x, attend, remat=False)
        each = (batch, rollouts, len(at.offsets), -1)
        known = at.positions(at.offsets[: at.known]).ravel()
        memories = [m.reshape(each)[:, :, : at.known].reshape(batch, len(known), -1)
                    for m in self.memories(xs)]  # fmt: skip
        kept = [block.keys_values(m, known) for block, m in zip(self.blocks, memories, strict=True)]
        return xs[-1].reshape(each)[:, :, at.known - 1 :], kept

    def _with_heads(self, logits, previous, stride):
        """The logits of all slots of all passes, given the tokens before them."""
        if self.head == "none":
            return logits
        slots = []
        for j in range(logits.shape[2]):
            if j % stride == 0:
                state = self.head_start(*logits.shape[:2])
            z, state = self.with_head(logits[:, :, j], previous[:, :, j], state)
            slots.append(z)
        return jnp.stack(slots, axis=2)

    # --- decoding ------------------------------------------------------------------------------

    def strided_step(
        self,
        caches: Caches,
        tokens: Int[Array, "B m"],
        positions: Int[Array, "B m"],
        slots: int,
    ) -> tuple[Float[Array, "B slots Vh"], Caches]:
        """A pass over known tokens and `slots` - 1 masks after them: logits before the head."""
        known = tokens.shape[1]
        x = self.embed(tokens)
        mask = jnp.broadcast_to(self.mask[...].astype(x.dtype), (len(x), slots - 1, x.shape[2]))
        x = jnp.concatenate([x, mask], axis=1)
        after = positions[:, -1:] + np.arange(1, slots)
        at = jnp.concatenate([positions, after], axis=1)

        def attend(i: int, block: Block, x: Array):
            # What the pass sees of itself lies in the cache until memories take its place, or, of
            # masks, the next pass does: after all that a query of then may see.
            q, cache = block.queries(x, at), caches[i].append(at, *block.keys_values(x, at))
            return merge_attention(self.over_cache(i, q, cache, at)), cache

        xs, written = self.run(x, attend)
        memories = (m[:, :known] for m in self.memories(xs))
        layers = zip(written, self.blocks, memories, strict=True)
        caches = tuple(
            cache.append(positions, *block.keys_values(m, positions)) for cache, block, m in layers
        )
        return self.unembed_head(xs[-1][:, known - 1 :]), caches


class _Pass:
    """What a pass of a rollout knows while tracing, hashable by identity for `jax.checkpoint`."""

    def __init__(self, starts: np.ndarray, begin: int, known: int, slots: int, read: np.ndarray):
        self.starts, self.known, self.read = starts, known, read
        self.end = begin + known + slots - 1
        self.offsets = np.arange(begin, self.end)  # of its tokens and masks, from a start

    def positions(self, offsets: np.ndarray) -> np.ndarray:
        return self.starts[:, None] + offsets


@dataclasses.dataclass(frozen=True)
class Strided(Spire):
    """SPIRe's ring of memories; `model` is a StridedDraft."""

    stride: int = 1
    strides: tuple[int, ...] = (1,)  # in training
    draws: str = "sampled"

    def step(self, params, state, target, tokens, positions):
        """A pass that drafts one token: what a stride of 1 is made of."""
        module = self.model.bind(params)
        logits, state = module.strided_step(state, tokens, positions, 1)
        logits, _ = module.with_head(logits[:, 0], tokens[:, -1], module.head_start(len(tokens)))
        return module.widened(self._drawn(logits)), state

    def propose(self, params, state, target, previous, last, positions, k, draw):
        module, sizes = self.model.bind(params), passes(k, self.stride)

        def one_pass(state, tokens, begin, slots):
            """After `tokens`, of which the last is `begin` behind the round's first."""
            known = tokens.shape[1]
            at = (positions + begin)[:, None] + np.arange(1 - known, 1)
            logits, state = module.strided_step(state, tokens, at, slots)

            def one_slot(carry, slot):
                token, of_head = carry
                j, z = slot
                z, of_head = module.with_head(z, token, of_head)
                token, q = draw(begin + j, self._drawn(module.widened(z)))
                return (token, of_head), (token, q)

            carry = tokens[:, -1], module.head_start(len(tokens))
            slots_first = jnp.moveaxis(logits, 1, 0)
            _, drawn = jax.lax.scan(one_slot, carry, (jnp.arange(slots), slots_first))
            tokens, q = (jnp.moveaxis(x, 0, 1) for x in drawn)
            return state, tokens, q

        state, tokens, q = one_pass(state, last[:, None], 0, sizes[0][1])
        drafted = [(tokens, q)]
        even = sum(slots == self.stride for _, slots in sizes[1:])
        if even:

            def again(carry, begin):
                state, tokens = carry
                state, tokens, q = one_pass(state, tokens, begin, self.stride)
                return (state, tokens), (tokens, q)

            begins = self.stride * jnp.arange(1, even + 1)
            (state, tokens), drawn = jax.lax.scan(again, (state, tokens), begins)
            # [passes, B, s, ...] -> [B, passes * s, ...]
            drafted.append(tuple(jnp.concatenate(list(x), axis=1) for x in drawn))
        if len(sizes) > 1 + even:
            state, *drawn = one_pass(state, tokens, k - sizes[-1][1], sizes[-1][1])
            drafted.append(tuple(drawn))
        tokens, q = (jnp.concatenate(x, axis=1) for x in zip(*drafted, strict=True))
        return Proposal(tokens, q), state

    def _drawn(self, logits: Float[Array, "*rows V"]) -> Float[Array, "*rows V"]:
        """What is drawn from: the logits, or all on the most likely token."""
        return transformed_logits(logits, GREEDY) if self.draws == "argmax" else logits

    def along(self, params, tokens, activations, cache, read, starts, k, sampling):
        module = self.model.bind(params)
        logits = module.strided_rollout(tokens[:, :-1], activations, starts, k, self.stride, read)
        of_text = tokens[:, starts[:, None] + np.arange(1, k + 1)]
        return probability_of(self._drawn(logits), of_text, sampling)

    def predict(self, params, tokens, activations, k):
        """Of one of `strides`, which the batch's own tokens draw: the same for every run of it."""
        starts = np.arange(0, tokens.shape[1], k)

        def of_stride(stride: int):
            logits = self.model.bind(params).strided_rollout(
                tokens, activations, starts, k, stride, in_head=True
            )
            return logits.reshape(*tokens.shape, -1)

        if len(self.strides) == 1:
            return of_stride(self.strides[0])
        drawn = jnp.sum(tokens) % len(self.strides)
        return jax.lax.switch(drawn, [functools.partial(of_stride, s) for s in self.strides])

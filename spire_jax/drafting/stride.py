"""SPIRe with a stride: a pass drafts s tokens, and one draft serves every s (method.md section 8).

    pass 0 reads      the last token                        and s - 1 masks after it
    pass p > 0 reads  the s tokens of the pass before it     and s - 1 masks after them

It drafts s tokens, from its last known token and from each mask. Inputs of a pass see the target's
memories of positions before the round, the draft's own memories of tokens known in earlier passes,
and each other causally. Known tokens leave memories as in SPIRe, masks leave none: s = 1 is SPIRe,
s = k a block draft with SPIRe's memories. Weights, unembedding and launch are paid k / s times.
What is on top of the slots, a head and confidences, is slots.py's.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spire_jax.config.checks import check, positive
from spire_jax.config.readers import EVALUATE, STUDY, read_by
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.drafting.slots import SlotDraft, SlotOptions
from spire_jax.drafting.spire import Spire
from spire_jax.drafting.strategy import Draw, Proposal, peaked
from spire_jax.models.attention import Attended, attention, merge_attention
from spire_jax.models.caches import Caches, KeysValues
from spire_jax.models.layers import Block
from spire_jax.models.sampling import probability_of
from spire_jax.models.transformer import Activations, Params


@DRAFT_KINDS.register("stride")
@dataclasses.dataclass(frozen=True)
class StrideOptions(SlotOptions):
    """SPIRe whose passes draft several tokens."""

    kind: str = "stride"
    strides: tuple[int, ...] = (1, 2, 4)  # each batch of training draws one of them
    # Tokens that a pass drafts, in decoding; the last one of a round what is left of k.
    stride: int = read_by(1, EVALUATE, STUDY)

    def strategy(self, target, compute):
        model = self.slots_model(target, compute, StridedDraft)
        return Strided(model, target.n_layers, self.draws, self.stride, self.strides)

    def cost(self, target, context, k):
        # Memories beside layer inputs, of the known tokens; without feedback they are the same.
        return self.cost_of(target, context, k, passes(k, self.stride), int(self.feedback))

    def check(self, at, config):
        super().check(at, config)
        positive(self, at, "stride")
        check(bool(self.strides) and all(s >= 1 for s in self.strides),
              f"{at}.strides={self.strides} must be one or more, each 1 or more")  # fmt: skip


def passes(k: int, stride: int) -> list[tuple[int, int]]:
    """Of every pass of a round of k, how many known tokens it reads and how many it drafts.

    The last one drafts what is left, where the stride does not divide k.
    """
    slots = [min(stride, k - begin) for begin in range(0, k, stride)]
    return list(zip([1] + [stride] * (len(slots) - 1), slots, strict=True))


class StridedDraft(SlotDraft):
    """A SPIRe draft whose passes go on over masks."""

    def seen_ahead(
        self, i: int, q: Float[Array, "B T K G H"], at: Int[Array, "B T"], k: Array, v: Array
    ) -> list[Attended]:
        """What layer i attends to of the inputs of a pass beyond those up to each: nothing.

        `at` are the positions of all of them.
        """
        return []

    # --- training and the oracle ---------------------------------------------------------------

    def strided_rollout(
        self,
        tokens: Int[Array, "B T"],
        activations: tuple[Float[Array, "B M D"], ...],
        starts: Int[np.ndarray, " R"],
        k: int,
        stride: int,
        read: Int[np.ndarray, " M"] | None = None,
    ) -> Float[Array, "B R k V"]:
        """Logits of k teacher-forced slots from every start, all starts in parallel.

        Slot j (0-based) from start s predicts token s + j + 1. Arguments as of `rollout`.
        """
        x = self.strided_slots(tokens, activations, starts, k, stride, read)
        return self.widened(self.slot_logits(x, self.heads_along(tokens, starts, k, stride)))

    def strided_slots(
        self,
        tokens: Int[Array, "B T"],
        activations: tuple[Float[Array, "B M D"], ...],
        starts: Int[np.ndarray, " R"],
        k: int,
        stride: int,
        read: Int[np.ndarray, " M"] | None = None,
    ) -> Float[Array, "B R k D"]:
        """`strided_rollout` up to the slots' final activations.

        A start needs a text up to the known tokens of its last pass.
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
        return jnp.concatenate(x, axis=2)

    def _strided_pass(self, at: "_Pass", tokens, memory, own):
        """What a pass drafts from, [B, R, slots, D], and keys and values of its known tokens."""
        batch, rollouts = len(tokens), len(at.starts)
        positions, limit = at.positions(at.offsets).ravel(), np.repeat(at.starts, len(at.offsets))
        x = self.embed(tokens[:, at.positions(at.offsets[: at.known])])
        masks = len(at.offsets) - at.known
        mask = jnp.broadcast_to(self.mask[...].astype(x.dtype), (*x.shape[:2], masks, x.shape[3]))
        x = jnp.concatenate([x, mask], axis=2).reshape(batch, len(positions), -1)

        def of_starts(x: Array) -> Array:
            """Each start of each row by itself."""
            return x.reshape(batch * rollouts, -1, *x.shape[2:])

        def attend(i: int, block: Block, x: Array):
            q = block.queries(x, positions)
            parts = self.over_text(i, q, memory[i], positions, at.read, limit)
            inputs = block.keys_values(x, positions)
            k, v = (jnp.concatenate([*map(of_starts, y)], axis=1)
                    for y in zip(*own[i], inputs, strict=True))  # fmt: skip
            q_pos, k_pos = (jnp.tile(at.positions(offsets), (batch, 1))
                            for offsets in (at.offsets, np.arange(at.end)))  # fmt: skip
            beside = [attention(of_starts(q), k, v, q_pos, k_pos, self.views[i])]
            now = (of_starts(y) for y in inputs)
            beside += self.seen_ahead(i, of_starts(q), q_pos, *now)
            for out, lse in beside:
                parts.append((out.reshape(q.shape), lse.reshape(q.shape[:-1])))
            return merge_attention(parts), None

        xs, _ = self.run(x, attend, remat=False)
        each = (batch, rollouts, len(at.offsets), -1)
        known = at.positions(at.offsets[: at.known]).ravel()
        memories = [m.reshape(each)[:, :, : at.known].reshape(batch, len(known), -1)
                    for m in self.memories(xs)]  # fmt: skip
        kept = [block.keys_values(m, known) for block, m in zip(self.blocks, memories, strict=True)]
        return xs[-1].reshape(each)[:, :, at.known - 1 :], kept

    # --- decoding ------------------------------------------------------------------------------

    def strided_step(
        self,
        caches: Caches,
        tokens: Int[Array, "B m"],
        positions: Int[Array, "B m"],
        slots: int,
        remember: bool = True,
    ) -> tuple[Float[Array, "B slots D"], Caches]:
        """A pass over known tokens and `slots` - 1 masks after them: the slots' final activations.

        Without `remember` the known tokens leave no memories: no other pass comes before the
        target has processed them.
        """
        known = tokens.shape[1]
        x = self.embed(tokens)
        mask = jnp.broadcast_to(self.mask[...].astype(x.dtype), (len(x), slots - 1, x.shape[2]))
        x = jnp.concatenate([x, mask], axis=1)
        after = positions[:, -1:] + np.arange(1, slots)
        at = jnp.concatenate([positions, after], axis=1)

        def attend(i: int, block: Block, x: Array):
            # What the pass sees of itself lies in the cache until memories take its place, or, of
            # masks, the next pass does: after all that a query of then may see.
            q, (k, v) = block.queries(x, at), block.keys_values(x, at)
            cache = caches[i].append(at, k, v)
            parts = self.over_cache(i, q, cache, at) + self.seen_ahead(i, q, at, k, v)
            return merge_attention(parts), cache

        xs, written = self.run(x, attend)
        caches = tuple(written)
        if remember:
            memories = (m[:, :known] for m in self.memories(xs))
            layers = zip(written, self.blocks, memories, strict=True)
            caches = tuple(
                cache.append(positions, *block.keys_values(m, positions))
                for cache, block, m in layers
            )
        return xs[-1][:, known - 1 :], caches


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

    draws: str = "sampled"
    stride: int = 1
    strides: tuple[int, ...] = (1,)  # in training

    def step(self, params, state, target, tokens, positions):
        """A pass that drafts one token: what a stride of 1 is made of."""
        module = self.model.bind(params)
        x, state = module.strided_step(state, tokens, positions, 1)
        logits = module.unembed_head(x)[:, 0]
        logits, _ = module.with_head(logits, tokens[:, -1], module.head_start(len(tokens)))
        return module.widened(peaked(logits, self.draws)), state

    def propose(self, params, state, target, previous, last, positions, k, draw):
        module, sizes = self.model.bind(params), passes(k, self.stride)

        def one_pass(state, tokens, begin, slots):
            """After `tokens`, of which the last is `begin` behind the round's first."""
            known = tokens.shape[1]
            at = (positions + begin)[:, None] + np.arange(1 - known, 1)
            x, state = module.strided_step(state, tokens, at, slots)
            return state, self.drawn_slots(module, x, tokens[:, -1], begin, draw)

        state, drawn = one_pass(state, last[:, None], 0, sizes[0][1])
        drafted = [drawn]
        even = sum(slots == self.stride for _, slots in sizes[1:])
        if even:

            def again(carry, begin):
                state, tokens = carry
                state, drawn = one_pass(state, tokens, begin, self.stride)
                return (state, drawn[0]), drawn

            begins = self.stride * jnp.arange(1, even + 1)
            (state, tokens), drawn = jax.lax.scan(again, (state, drawn[0]), begins)
            # [passes, B, s, ...] -> [B, passes * s, ...]
            drafted.append(jax.tree.map(lambda x: jnp.concatenate(list(x), axis=1), drawn))
        else:
            tokens = drawn[0]
        if len(sizes) > 1 + even:
            state, drawn = one_pass(state, tokens, k - sizes[-1][1], sizes[-1][1])
            drafted.append(drawn)
        return proposal(*jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *drafted)), state

    def drawn_slots(
        self,
        module: StridedDraft,
        x: Float[Array, "B slots D"],
        token: Int[Array, " B"],
        begin: int | Int[Array, ""],
        draw: Draw,
    ) -> tuple[Array, Array, Array | None]:
        """Tokens of a pass's slots, slot by slot, from `begin` deep; their q and confidence.

        `token` is the one before the first. A slot's confidence is of its activations alone, which
        know nothing of what is drawn there, nor of what the pass draws before or after it.
        """

        def one_slot(carry, slot):
            token, of_head = carry
            j, z = slot
            z, of_head = module.with_head(z, token, of_head)
            token, q = draw(begin + j, peaked(module.widened(z), self.draws))
            return (token, of_head), (token, q)

        slots_first = jnp.moveaxis(module.unembed_head(x), 1, 0)
        each = jnp.arange(x.shape[1]), slots_first
        _, drawn = jax.lax.scan(one_slot, (token, module.head_start(len(token))), each)
        tokens, q = (jnp.moveaxis(y, 0, 1) for y in drawn)
        return tokens, q, module.confidence(x)

    def along(self, params, tokens, activations, cache, read, starts, k, sampling):
        module = self.model.bind(params)
        logits = module.strided_rollout(tokens[:, :-1], activations, starts, k, self.stride, read)
        of_text = tokens[:, starts[:, None] + np.arange(1, k + 1)]
        return probability_of(peaked(logits, self.draws), of_text, sampling)

    def predict(self, params, tokens, activations, k):
        return self.predict_slots(params, tokens, activations, k)[0]

    def predict_slots(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        activations: Activations,
        k: int,
    ) -> tuple[Float[Array, "B T Vh"], Float[Array, "B T"] | None]:
        """`predict`, and the logits of confidences."""
        module = self.model.bind(params)
        x, heads = self.slots_along(module, tokens, activations, k)
        return module.slot_logits(x, heads), module.confidence(x)

    def slots_along(
        self,
        module: StridedDraft,
        tokens: Int[Array, "B T"],
        activations: Activations,
        k: int,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T r"] | None]:
        """The slots that predict what follows each token, and what the head makes of the text.

        Of one of `strides`, which the batch's own tokens draw: the same for every run of it.
        """
        starts = np.arange(0, tokens.shape[1], k)

        def of_stride(stride: int):
            found = (module.strided_slots(tokens, activations, starts, k, stride),
                     module.heads_along(tokens, starts, k, stride))  # fmt: skip
            return jax.tree.map(lambda y: y.reshape(*tokens.shape, y.shape[3]), found)

        return one_of(tokens, [functools.partial(of_stride, s) for s in self.strides])


def drawn_by(tokens: Int[Array, "B T"], n: int) -> Int[Array, ""]:
    """One of 0 .. n - 1 that a batch's own tokens draw: the same for every run of it."""
    return jnp.sum(tokens) % n


def one_of(tokens: Int[Array, "B T"], branches: Sequence[Callable[[], Any]]) -> Any:
    """What one of the branches makes, which the batch's own tokens draw."""
    if len(branches) == 1:
        return branches[0]()
    return jax.lax.switch(drawn_by(tokens, len(branches)), branches)


def proposal(
    tokens: Int[Array, "B k"], q: Float[Array, "B k V"], confidence: Float[Array, "B k"] | None
) -> Proposal:
    """With the running product of confidences, given as logits."""
    survival = None
    if confidence is not None:
        survival = jnp.cumprod(jax.nn.sigmoid(confidence), axis=1)
    return Proposal(tokens, q, survival=survival)

"""Block drafts: one pass over the last token and masks drafts k (DFlash, DSpark).

    it reads    the last token (the anchor)    and k - 1 masks after it
    it drafts   k tokens, from the anchor and from each mask, in order

Keys and values of tokens that the target has processed come by default from "fused" memories
(drafting/spire.py). Nothing is fed back: the pass is the first one of a stride of k
(drafting/stride.py), whose mask token, heads, draws and confidence these are. As in DSpark (arXiv
2607.05147, code: DeepSpec) the slot after the anchor is predicted from the anchor itself; in DFlash
(arXiv 2602.06036) every mask predicts its own place, and the anchor nothing.

Within a block inputs see each other, as in both papers (`bidirectional`), or causally. A causal
block's slot j knows nothing of how many masks follow, so that a round of 4 is the beginning of one
of 8, and one draft serves every k (beyond `k` by extrapolation, as everywhere). A bidirectional one
is what it was trained as: `k` masks, whatever a round asks for. A round of fewer computes all of
them and keeps the first (its cost says so), and one of more is refused.

Training cuts a text into blocks of `k`, where the first is as long as an offset that the batch's
own tokens draw of `offsets`: so the anchors are not always the same places of a text. Each token is
predicted once. Losses weigh depths by `gamma`; the papers' 0.1 CE + 0.9 |p - q| is loss="dspark".
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from spire_jax.config.checks import check, not_negative, positive
from spire_jax.config.readers import DRAFT, read_by
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.drafting.slots import SlotLoss, SlotOptions
from spire_jax.drafting.strategy import peaked
from spire_jax.drafting.stride import Strided, StridedDraft, drawn_by, one_of, proposal
from spire_jax.models.attention import attention
from spire_jax.models.masks import View
from spire_jax.models.sampling import probability_of


@DRAFT_KINDS.register("block")
@dataclasses.dataclass(frozen=True)
class BlockOptions(SlotOptions):
    """One pass that drafts all tokens of a round."""

    kind: str = "block"
    k: int = 4  # slots of a block in training
    bidirectional: bool = True  # inputs of a block see later ones too
    memory: str = "fused"
    feedback: bool = False  # there is nothing to feed back
    # Depth j counts exp(-(j - 1) / gamma) in training (DFlash: 4 for blocks of 8, 7 for 16); 0: 1
    gamma: float = read_by(0.0, DRAFT)
    # Where the first whole block of a text may begin, under k; each batch draws one. () = anywhere
    offsets: tuple[int, ...] = read_by((), DRAFT)

    def strategy(self, target, compute):
        model = self.slots_model(target, compute, BlockDraft)
        model = dataclasses.replace(
            model, options=(*model.options, ("bidirectional", self.bidirectional))
        )
        return BlockDrafting(
            model, target.n_layers, self.draws, slots=self.k, bidirectional=self.bidirectional,
            offsets=self.offsets or tuple(range(self.k)),
        )  # fmt: skip

    def learns(self, strategy, k):
        weight = self.confidence_weight
        return SlotLoss(strategy, self.loss, self.omega, k, gamma=self.gamma, confidence=weight)

    def cost(self, target, context, k):
        width = self.k if self.bidirectional else k
        cost = self.cost_of(target, context, k, [(1, width)], 0)
        # What it drafts beyond k has no logits, but room.
        passes = tuple(one._replace(drafted=k) for one in cost.passes)
        room = self.cost_of(target, context + width - k, width, [(1, width)], 0).slots
        return dataclasses.replace(cost, passes=passes, slots=room)

    def check(self, at, config):
        positive(self, at, "k")
        super().check(at, config)
        not_negative(self, at, "gamma")
        check(not self.feedback, f"{at}.feedback: a block feeds nothing back; leave it out, or use "
                                 f"kind 'stride'")  # fmt: skip
        check(all(0 <= offset < self.k for offset in self.offsets)
              and len(set(self.offsets)) == len(self.offsets),
              f"{at}.offsets={self.offsets} must be different ones of 0 to {at}.k - 1 = "
              f"{self.k - 1}")  # fmt: skip
        deepest = max(config.decode.k, *config.decode.depths, 0)
        check(not self.bidirectional or deepest <= self.k,
              f"{at}.k={self.k} slots are all that a bidirectional block has been trained for, but "
              f"a round drafts {deepest} tokens (decode.k, decode.depths); train it with "
              f"{at}.k={deepest}, or with {at}.bidirectional=false")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Later(View):
    """What comes after the query, and only that."""

    def sees(self, q_pos, k_pos):
        return k_pos > q_pos


class BlockDraft(StridedDraft):
    """A strided draft of one pass, whose inputs may see later ones."""

    def __init__(self, config, compute, *, rngs, bidirectional: bool = True, **options):
        super().__init__(config, compute, rngs=rngs, **options)
        self.bidirectional = bidirectional

    def seen_ahead(self, i, q, at, k, v):
        if not self.bidirectional or at.shape[1] == 1:
            return []
        view = self.views[i]
        return [attention(q, k, v, at, at, Later(scale=view.scale, softcap=view.softcap))]


@dataclasses.dataclass(frozen=True)
class BlockDrafting(Strided):
    """One pass a round; `model` is a BlockDraft."""

    slots: int = 1  # of a block in training
    bidirectional: bool = True
    offsets: tuple[int, ...] = (0,)  # in training

    def width(self, k: int) -> int:
        """Slots that the pass of a round of k has; ValueError for more than there are."""
        if not self.bidirectional:
            return k
        if k > self.slots:
            raise ValueError(f"a bidirectional block of {self.slots} slots cannot draft {k} tokens")
        return self.slots

    # What a round writes goes as far as the pass does, which may be beyond its k tokens.

    def empty(self, params, batch, k, capacity):
        width = self.width(k)
        return super().empty(params, batch, width, capacity + width - k)

    def begin(self, params, prompt, lengths, k, capacity):
        width = self.width(k)
        return super().begin(params, prompt, lengths, width, capacity + width - k)

    def step(self, params, state, target, tokens, positions):
        """A round's first token."""
        last = tokens[:, -1]
        first, state = self.propose(
            params, state, target, last, last, positions[:, -1], 1, lambda _, logits: (last, logits)
        )
        return first.q[:, 0], state

    def propose(self, params, state, target, previous, last, positions, k, draw):
        module = self.model.bind(params)
        x, state = module.strided_step(
            state, last[:, None], positions[:, None], self.width(k), remember=False
        )
        return proposal(*self.drawn_slots(module, x[:, :k], last, 0, draw)), state

    def along(self, params, tokens, activations, cache, read, starts, k, sampling):
        module, kept = self.model.bind(params), k
        if self.bidirectional:
            kept = min(k, self.slots)
        x = module.strided_slots(
            tokens[:, :-1], activations, starts, self.width(kept), self.width(kept), read
        )
        heads = module.heads_along(tokens[:, :-1], starts, kept, kept)
        logits = module.widened(module.slot_logits(x[:, :, :kept], heads))
        of_text = tokens[:, starts[:, None] + np.arange(1, kept + 1)]
        q = probability_of(peaked(logits, self.draws), of_text, sampling)
        # A round of more than there are slots drafts these alone: nothing deeper is kept.
        return jnp.pad(q, ((0, 0), (0, 0), (0, k - kept)))

    # --- training ------------------------------------------------------------------------------

    def slots_along(self, module, tokens, activations, k):
        """Of a grid of blocks that begins at one of `offsets`, which the batch's tokens draw."""
        length = tokens.shape[1]

        def of_offset(offset: int):
            starts, sizes = grid(length, k, offset)

            def in_order(y):
                """[B, R, k, ...] -> [B, T, ...]"""
                if len(sizes) == 1:
                    return y[:, 0]
                first, last = y[:, 0, : sizes[0]], y[:, -1, : sizes[-1]]
                inner = y[:, 1:-1].reshape(len(y), -1, *y.shape[3:])
                return jnp.concatenate([first, inner, last], axis=1)

            found = (module.strided_slots(tokens, activations, starts, k, k),
                     module.heads_along(tokens, starts, k, k))  # fmt: skip
            return jax.tree.map(in_order, found)

        return one_of(tokens, [functools.partial(of_offset, offset) for offset in self.offsets])

    def depths(self, tokens, k):
        of = [np.concatenate([np.arange(size) for size in grid(tokens.shape[1], k, offset)[1]])
              for offset in self.offsets]  # fmt: skip
        return jnp.asarray(np.stack(of))[drawn_by(tokens, len(of))]


def grid(length: int, k: int, offset: int) -> tuple[np.ndarray, list[int]]:
    """Where the blocks of a text of whole blocks of k begin, and how many tokens each predicts.

    The first is of `offset` tokens, if that is any, and what is missing there ends the text.
    """
    starts = np.arange(offset, length, k)
    if offset:
        starts = np.concatenate([[0], starts])
    return starts, np.diff([*starts, length]).tolist()

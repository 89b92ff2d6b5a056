"""What one forward pass and one speculation round cost, on a roofline (method.md section 5).

A pass over a few tokens of each of B requests computes C FLOPs and reads bytes of weights and
of KV cache. The paper lets the two overlap fully,

    cost(C, bytes) = max(C, bytes * HOI)                     in FLOP-equivalents

with HOI, the chip's peak FLOP/s over its bytes/s, and counts body parameters only. `VARIANTS`
drops the assumptions that flatter speculation, one after another. All of it is for one chip, or
for each of a `Group` that shares a model by tensor parallelism. No jax here.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from spire_jax.config.drafts import DraftCost, over_layers
from spire_jax.config.schema import ModelConfig, head_size

# Each variant keeps what the one before it changed.
VARIANTS: Mapping[str, str] = {
    "paper": "sparse drafts read their sinks and an eighth of the context; computing and "
    "reading memory overlap fully; body parameters only",
    "fixed_window": "sparse drafts read their sinks and their own window at every context",
    "per_operator": "and weight products and KV cache reads do not overlap with each other",
    "with_head": "and the unembedding is counted",
}


@dataclasses.dataclass(frozen=True)
class RoundCost:
    """One speculation round of the whole batch, in FLOP-equivalents."""

    target_step: float  # one autoregressive step of the target
    draft_step: float  # one pass of the draft, mean over a round's
    verification: float  # the target's pass over k + 1 tokens per request
    k: int  # drafted tokens; 0 = autoregressive decoding
    passes: int  # of the draft
    handover: float = 0.0  # what a group sends between drafting and verification

    @property
    def total(self) -> float:
        """Cost of the round: drafting, the verification and what is sent in between."""
        return self.passes * self.draft_step + self.verification + self.handover

    @property
    def delta_t(self) -> float:
        """Time of the round over the time of one autoregressive step."""
        return self.total / self.target_step


# What the chips of a group tell each other where the unembedding counts. Of every token's logits:
# a shard's largest (greedy, or with the noise of a draw), its token, and their log-sum-exp.
SHARD_BYTES = 12
# Of every token that a replicated draft proposes: the token and its probability.
PROPOSAL_BYTES = 8
LOGIT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Group:
    """Chips that share a model by tensor parallelism, as `sharding.py` shards, and their links.

    Query heads, d_ff and vocabulary are split over all chips, KV heads over as many as there are
    KV heads: beyond that, keys, values and their projections are repeated. Of the norms, which
    every chip holds whole, a part is counted. Costs are FLOP-equivalents of one chip, as in
    `Roofline`; a group of one sends nothing.
    """

    chips: int = 1
    byte_cost: float = 0.0  # of a byte that a chip sends: its peak FLOP/s over its links' bytes/s
    collective_cost: float = 0.0  # of a collective, however little it carries
    activation_bytes: float = 2.0  # per element of an all-reduce
    overlap: bool = False  # a pass computes, reads and sends at the same time
    replicated_draft: bool = False  # every chip drafts for its share of the requests, alone

    def cache_shards(self, model: ModelConfig) -> int:
        """Parts that the KV cache is split into."""
        return min(self.chips, model.n_kv_heads)

    def weights(self, model: ModelConfig) -> float:
        """Body parameters that each chip holds."""
        keys_values = _keys_values(model)
        others = model.body_parameters() - keys_values
        return others / self.chips + keys_values / self.cache_shards(model)

    def communication(
        self, model: ModelConfig, *, batch: int, tokens: int, drafted: int, with_head: bool
    ) -> float:
        """What a forward pass over `tokens` tokens of each request sends, `drafted` with logits.

        All-reduces of the activations, by a ring (each chip sends 2 (chips - 1) / chips of them):
        after attention and after the MLP of every layer and, where the unembedding counts, of the
        embeddings. For sampling an all-gather of `SHARD_BYTES` per token and shard; top-k and
        top-p need more.
        """
        if self.chips == 1:
            return 0.0
        all_reduces = 2 * model.n_layers + with_head
        activations = batch * tokens * model.d_model * self.activation_bytes
        sent = all_reduces * 2 * (self.chips - 1) / self.chips * activations
        if with_head:
            sent += (self.chips - 1) * batch * drafted * SHARD_BYTES
        return sent * self.byte_cost + (all_reduces + with_head) * self.collective_cost

    def handover(self, model: ModelConfig, *, batch: int, k: int) -> float:
        """What chips that drafted alone send before the target verifies.

        An all-gather of the proposals, and an all-to-all of one distribution per request, that of
        the depth where its round ends: the target's is split over the vocabulary.
        """
        others, rows = self.chips - 1, self.drafted(batch)
        proposals = others * rows * k * PROPOSAL_BYTES
        distributions = others / self.chips * rows * head_size(model) * LOGIT_BYTES
        return (proposals + distributions) * self.byte_cost + 2 * self.collective_cost

    @property
    def drafting(self) -> "Group":
        """The chips that share the draft."""
        return ALONE if self.replicated_draft and self.chips > 1 else self

    def drafted(self, batch: int) -> int:
        """Requests that `drafting` drafts for: all, or those of the chip that has most of them."""
        return math.ceil(batch / self.chips) if self.drafting is not self else batch


ALONE = Group()


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A chip's balance, what overlaps on it, the widths of what it reads, and its group."""

    hoi: float  # FLOPs per byte
    variant: str  # a key of VARIANTS
    weight_bytes: float  # per element
    cache_bytes: float
    group: Group = ALONE
    launch: float = 0.0  # of every pass, however little it does, in FLOP-equivalents

    def forward(
        self,
        model: ModelConfig,
        *,
        batch: int,
        tokens: int,
        rows: float,
        projections: int = 0,
        drafted: int | None = None,
        head: int = 0,
        more: int = 0,
        products: int = 0,
    ) -> float:
        """A forward pass over `tokens` tokens of each request, reading `rows` cached tokens.

        Of every chip in the group: `batch` is what the group decodes. Logits are computed of
        `drafted` tokens, by default all, each of which reads `head` more weights by itself;
        `projections` tokens become keys and values once more. `more` weights, which every chip
        holds, are read besides, for so many `products` of each request.
        """
        drafted = tokens if drafted is None else drafted
        weights, row = self.group.weights(model), model.cache_row()
        flops = 2.0 * weights * batch * tokens + 2.0 * products * batch
        shards = self.group.cache_shards(model)
        if projections:
            flops += 2 * projections * batch * _keys_values(model) / shards
        weight_reads = (weights + more) * self.weight_bytes * self.hoi
        cache_reads = batch * rows * row * self.cache_bytes * self.hoi / shards
        with_head = self.variant == "with_head"
        if self.variant in ("paper", "fixed_window"):
            cost = max(flops, weight_reads + cache_reads)
        else:
            cost = max(flops, weight_reads) + cache_reads
        if with_head:
            table = model.d_model * head_size(model) / self.group.chips
            cost += max(2 * table * batch * drafted, table * self.weight_bytes * self.hoi)
            cost += drafted * max(2 * head * batch, head * self.weight_bytes * self.hoi)
        sent = self.group.communication(
            model, batch=batch, tokens=tokens, drafted=drafted, with_head=with_head
        )
        return (max(cost, sent) if self.group.overlap else cost + sent) + self.launch

    def round(
        self,
        target: ModelConfig,
        draft: tuple[ModelConfig, DraftCost] | None,
        *,
        batch: int,
        k: int,
        contexts: Sequence[float],
    ) -> RoundCost:
        """A round of k drafted tokens; `draft` are its sizes and what it costs.

        `contexts` are how long the requests' texts are, by turns: what is read is their mean.
        """
        step, handover, passes, group = 0.0, 0.0, 0, self.group
        if draft:
            model, cost = draft
            passes, of_group = len(cost.passes), dataclasses.replace(self, group=group.drafting)
            step = sum(
                of_group.forward(model, batch=group.drafted(batch), rows=cost.rows, **one._asdict())
                for one in cost.passes
            ) / passes  # fmt: skip
            if group.drafting is not group and self.variant == "with_head":
                handover = group.handover(model, batch=batch, k=k)
        rows = math.fsum(visible_rows(target, n) for n in contexts) / len(contexts)
        return RoundCost(
            target_step=self.forward(target, batch=batch, tokens=1, rows=rows),
            draft_step=step,
            verification=self.forward(target, batch=batch, tokens=k + 1, rows=rows),
            k=k,
            passes=passes,
            handover=handover,
        )


def _keys_values(model: ModelConfig) -> int:
    """Parameters that make keys and values."""
    return 2 * model.n_layers * model.n_kv_heads * model.d_head * model.d_model


def visible_rows(model: ModelConfig, context: float) -> float:
    """Cached tokens that a layer reads under its own view, mean over layers: all, or a window."""
    return over_layers(model.views(), lambda v: min(context, v.sink + v.window), context)

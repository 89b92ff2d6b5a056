"""What one forward pass and one speculation round cost, on a roofline (method.md section 5).

A pass over a few tokens of each of B requests computes C FLOPs and reads bytes of weights and
of KV cache. The paper lets the two overlap fully,

    cost(C, bytes) = max(C, bytes * HOI)                     in FLOP-equivalents

with HOI, the chip's peak FLOP/s over its bytes/s, and counts body parameters only. `VARIANTS`
drops the assumptions that flatter speculation, one after another. No jax here.
"""

import dataclasses
from collections.abc import Mapping

from spire_jax.config import ModelConfig, body_parameters, head_size

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
    draft_step: float  # one drafted token per request
    verification: float  # the target's pass over k + 1 tokens per request
    k: int  # drafted tokens; 0 = autoregressive decoding

    @property
    def total(self) -> float:
        """Cost of the round: k draft steps and the verification."""
        return self.k * self.draft_step + self.verification

    @property
    def delta_t(self) -> float:
        """Time of the round over the time of one autoregressive step."""
        return self.total / self.target_step


@dataclasses.dataclass(frozen=True)
class Draft:
    """What the cost of drafting depends on."""

    model: ModelConfig
    window: int  # 0 = dense cache
    sink: int
    memory: bool  # projects keys and values from a memory vector too (SPIRe)

    def rows(self, context: int, variant: str) -> int:
        """Cached tokens that a draft step reads, per request."""
        if not self.window:
            return context
        # A context shorter than the window is charged in full *beside* the sinks: so counts the
        # table of method.md (L = 32).
        return self.sink + (context // 8 if variant == "paper" else min(context, self.window))


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A chip's balance, what overlaps on it, and the widths of what it reads."""

    hoi: float  # FLOPs per byte
    variant: str  # a key of VARIANTS
    weight_bytes: float  # per element
    cache_bytes: float

    def forward(
        self, model: ModelConfig, *, batch: int, tokens: int, rows: float, memory: bool = False
    ) -> float:
        """A forward pass over `tokens` tokens of each request, reading `rows` cached tokens."""
        weights, row = body_parameters(model), cache_row(model)
        flops = 2.0 * weights * batch * tokens
        if memory:
            flops += 2 * batch * tokens * row * model.d_model
        weight_reads = weights * self.weight_bytes * self.hoi
        cache_reads = batch * rows * row * self.cache_bytes * self.hoi
        if self.variant in ("paper", "fixed_window"):
            return max(flops, weight_reads + cache_reads)
        cost = max(flops, weight_reads) + cache_reads
        if self.variant == "per_operator":
            return cost
        head = model.d_model * head_size(model)
        return cost + max(2 * head * batch * tokens, head * self.weight_bytes * self.hoi)

    def round(
        self,
        target: ModelConfig,
        draft: Draft | None,
        *,
        batch: int,
        k: int,
        context: float,
        draft_rows: float,
    ) -> RoundCost:
        """A round of k drafted tokens, each reading `draft_rows` of the draft's cache."""
        step = 0.0
        if draft:
            step = self.forward(
                draft.model, batch=batch, tokens=1, rows=draft_rows, memory=draft.memory
            )
        rows = visible_rows(target, context)
        return RoundCost(
            target_step=self.forward(target, batch=batch, tokens=1, rows=rows),
            draft_step=step,
            verification=self.forward(target, batch=batch, tokens=k + 1, rows=rows),
            k=k,
        )


def cache_row(model: ModelConfig) -> int:
    """Elements of one token's keys and values over all layers."""
    return 2 * model.n_layers * model.n_kv_heads * model.d_head


def visible_rows(model: ModelConfig, context: float) -> float:
    """Cached tokens that a model reads at its own mask: all, or its sinks and its window."""
    return min(context, float(model.sink + model.window)) if model.window else context

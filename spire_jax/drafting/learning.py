"""What a draft learns from: a batch, and the frozen target's lesson on it.

A loss maps these to per-token values. Losses are compared by value: equal ones share a compiled
step.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from spire_jax.drafting.losses import draft_loss
from spire_jax.drafting.strategy import Strategy
from spire_jax.models.caches import KeysValues
from spire_jax.models.transformer import Params


class TrainBatch(NamedTuple):
    """What a loss sees of a batch, on the device."""

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]  # the token after each
    mask: Bool[Array, "B T"]  # False on padding


class Lesson(NamedTuple):
    """What the frozen target says of a batch; it serves memories, distillation and acceptance."""

    p: Float[Array, "B T V"]  # its distribution of the next token
    activations: dict[int, Float[Array, "B T D"]]  # y^l by l
    keys_values: dict[int, KeysValues]  # by layer, from 0: what its cache holds

    def only(self, activations: Iterable[int], layers: Iterable[int]) -> "Lesson":
        """What one draft reads of a lesson for several."""
        return Lesson(
            self.p,
            {y: self.activations[y] for y in activations},
            {layer: self.keys_values[layer] for layer in layers},
        )


@runtime_checkable
class Loss(Protocol):
    """Per-token loss in nats, and acceptance alpha where the target's distribution is at hand."""

    def __call__(
        self, params: Params, lesson: Lesson | None, batch: TrainBatch
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"] | None]: ...


@dataclasses.dataclass(frozen=True)
class DraftLoss:
    """A strategy's teacher-forced predictions under one of the losses of method.md 3.4."""

    strategy: Strategy
    loss: str  # a key of losses.LOSSES
    omega: float = 0.5  # weight of distillation in the mixed loss
    k: int = 1  # depth of rollouts

    def __call__(self, params, lesson, batch):
        logits = self.strategy.predict(params, batch.tokens, *self.given(lesson))
        return self.values(params, lesson, batch, logits)

    def given(self, lesson: Lesson | None) -> tuple[Any, ...]:
        """What a strategy predicts from besides tokens: of the lesson, and the depth."""
        if lesson is None:
            return (), self.k
        activations = tuple(lesson.activations[y] for y in self.strategy.collect)
        cached = tuple(lesson.keys_values[i] for i in self.strategy.collect_cache)
        return (activations, self.k, cached) if cached else (activations, self.k)

    def values(
        self,
        params: Params,
        lesson: Lesson | None,
        batch: TrainBatch,
        logits: Float[Array, "B T Vh"],
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"] | None]:
        """The loss and alpha of predictions."""
        p = None if lesson is None else lesson.p
        if p is not None and self.strategy.model.config.head_tokens:
            p = p[..., params["head_ids"]]
        return draft_loss(self.loss, self.omega, p, logits, batch.targets)

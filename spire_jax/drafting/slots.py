"""What drafts of several tokens a pass share: a mask token, a head over the slots, confidence.

A head on top of the slots (`head`) adds to a slot's logits what follows from the tokens before it,
drafted or known, so that slot by slot only a small product is left to do, and q is the distribution
that the tokens are jointly drawn from:

    markov     z_j += W1[x_(j-1)] W2                     (as DSpark, arXiv 2607.05147)
    recurrent  h_j = tanh(W1[x_(j-1)] + h_(j-1) U)       (ours; h = 0 before every pass)
               z_j += h_j W2

W2 is 0 at first. Without a head the slots of a pass are drawn independently of each other.

With `confidence` a slot's final activations also say, by a vector and a bias, how likely its token
is to be kept if all before it are (DSpark; there the token before the slot is read, too, which is
left out here).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spire_jax.config.checks import check, choice, not_negative, positive
from spire_jax.config.drafts import DraftCost, Pass, TransformerOptions
from spire_jax.config.readers import DRAFT, EVALUATE, STUDY, read_by
from spire_jax.config.schema import ModelConfig, head_size
from spire_jax.drafting.learning import DraftLoss
from spire_jax.drafting.spire import SpireDraft, SpireOptions, of_family
from spire_jax.models.attention import Compute
from spire_jax.models.layers import parameter, truncated_normal
from spire_jax.models.transformer import Model

HEADS = ("none", "markov", "recurrent")


@dataclasses.dataclass(frozen=True)
class SlotOptions(SpireOptions):
    """What passes that draft several tokens have, whatever they read."""

    head: str = "none"  # over the slots of a pass: "markov", "recurrent"
    head_rank: int = 64
    # What is drawn of a slot's logits: "sampled", or the "argmax", whose q is one-hot.
    draws: str = read_by("sampled", EVALUATE, STUDY)
    # Whether each slot says how likely its token is to be kept, given that all before it were; and
    # the weight of what that learns. (Of sampled tokens, at the temperature of training, 1.)
    confidence: bool = False
    confidence_weight: float = read_by(1.0, DRAFT, when=lambda of: of.confidence)

    def slots_model(
        self, target: ModelConfig, compute: Compute, module: "type[SlotDraft]"
    ) -> Model:
        """The structure of the draft's parameters; `module` is a SlotDraft."""
        model = SpireOptions.strategy(self, target, compute).model
        options = {name: getattr(self, name) for name in ("head", "head_rank", "confidence")}
        return dataclasses.replace(
            model,
            module=of_family(model.config, module),
            options=(*model.options, *options.items()),
        )

    def learns(self, strategy, k):
        return SlotLoss(strategy, self.loss, self.omega, k, confidence=self.confidence_weight)

    def initial(self, target, fresh):
        params = super().initial(target, fresh)
        table = params["embedding"] if "embedding" in params else target["embedding"]
        return params | {"mask": jnp.mean(table, axis=0).astype(fresh["mask"].dtype)}

    def head_weights(self, target: ModelConfig) -> int:
        """Weights that each slot is multiplied with in the head over the slots."""
        if self.head == "none":
            return 0
        mix = self.head_rank**2 if self.head == "recurrent" else 0
        return self.head_rank * head_size(self.model(target)) + mix

    def products(self, target, k):
        return super().products(target, k) + self.head_weights(target)

    def cost_of(
        self,
        target: ModelConfig,
        context: float | int,
        k: int,
        of: list[tuple[int, int]],
        twice: int,
    ) -> DraftCost:
        """A round of k by passes over so many known tokens that draft so many.

        `twice`: how often known tokens become keys and values besides as inputs.
        """
        sizes, head = self.model(target), self.head_weights(target)
        table = self.head_rank * sizes.vocab_size if self.head != "none" else 0
        of_passes = tuple(Pass(known + slots - 1, slots, twice * known, head)
                          for known, slots in of)  # fmt: skip
        more = sizes.d_model + table + head
        if self.confidence:
            more += sizes.d_model + 1
        plain = TransformerOptions.cost(self, target, context, k)
        plain = dataclasses.replace(plain, passes=of_passes, more=more)
        return self.with_fusion(target, k, plain)

    def check(self, at, config):
        super().check(at, config)
        positive(self, at, "head_rank")
        not_negative(self, at, "confidence_weight")
        choice(f"{at}.head", self.head, HEADS)
        choice(f"{at}.draws", self.draws, "sampled argmax")
        check(self.attend_self, f"{at}.attend_self: the tokens of a pass see each other; leave it "
                                f"out, or use kind 'spire'")  # fmt: skip


class SlotDraft(SpireDraft):
    """A SPIRe draft with a mask token's embedding, and what reads its slots: head, confidence."""

    def __init__(
        self,
        config,
        compute,
        *,
        rngs,
        head: str = "none",
        head_rank: int = 64,
        confidence: bool = False,
        **options,
    ):
        super().__init__(config, compute, rngs=rngs, **options)
        self.head, self.confident, zeros = head, confidence, nnx.initializers.zeros
        self.mask = parameter(rngs, (config.d_model,), (None,), zeros)
        if head != "none":
            size = config.head_tokens or config.vocab_size
            self.head_in = parameter(
                rngs, (config.vocab_size, head_rank), ("vocab", None), truncated_normal(head_rank)
            )
            self.head_out = parameter(rngs, (head_rank, size), (None, "vocab"), zeros)
        if head == "recurrent":
            self.head_mix = parameter(
                rngs, (head_rank, head_rank), (None, None), truncated_normal(head_rank)
            )
        if confidence:
            self.confidence_vector = parameter(rngs, (config.d_model,), (None,), zeros)
            self.confidence_bias = parameter(rngs, (1,), (None,), zeros)

    def head_start(self, *rows: int) -> Float[Array, "*rows r"]:
        """The head's state before the first slot of a pass."""
        rank = self.head_mix.shape[0] if self.head == "recurrent" else 0
        return jnp.zeros((*rows, rank))

    def head_step(
        self, previous: Int[Array, "*rows"], state: Float[Array, "*rows s"]
    ) -> tuple[Float[Array, "*rows r"], Float[Array, "*rows s"]]:
        """What the head makes of the token before a slot, and its state after it (s is r or 0)."""
        h = self.head_in[...][previous].astype(jnp.float32)
        if self.head == "recurrent":
            h = state = jnp.tanh(h + state @ self.head_mix[...].astype(jnp.float32))
        return h, state

    def with_head(
        self,
        logits: Float[Array, "*rows Vh"],
        previous: Int[Array, "*rows"],
        state: Float[Array, "*rows r"],
    ) -> tuple[Float[Array, "*rows Vh"], Float[Array, "*rows r"]]:
        """A slot's logits, given the token before it, and the head's state after it."""
        if self.head == "none":
            return logits, state
        h, state = self.head_step(previous, state)
        return logits + h @ self.head_out[...].astype(jnp.float32), state

    def heads_along(
        self, tokens: Int[Array, "B T"], starts: Int[np.ndarray, " R"], k: int, stride: int
    ) -> Float[Array, "B R k r"] | None:
        """What the head makes of the text before each slot; None without a head.

        Beyond the text these are any: what is there counts for nothing.
        """
        if self.head == "none":
            return None
        before = np.minimum(starts[:, None] + np.arange(k), tokens.shape[1] - 1)
        previous, slots = tokens[:, before], []
        for j in range(k):
            if j % stride == 0:
                state = self.head_start(len(tokens), len(starts))
            h, state = self.head_step(previous[:, :, j], state)
            slots.append(h)
        return jnp.stack(slots, axis=2)

    def slot_logits(
        self, x: Float[Array, "*rows D"], heads: Float[Array, "*rows r"] | None
    ) -> Float[Array, "*rows Vh"]:
        """Logits of slots' final activations, with what `heads_along` made of the text."""
        logits = self.unembed_head(x)
        if heads is None:
            return logits
        return logits + heads @ self.head_out[...].astype(jnp.float32)

    def confidence(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows"] | None:
        """Of slots' final activations, the logit of the estimate that their tokens are kept."""
        if not self.confident:
            return None
        x = self.norm_final(x).astype(jnp.float32)
        return x @ self.confidence_vector[...] + self.confidence_bias[0]


@dataclasses.dataclass(frozen=True)
class SlotLoss(DraftLoss):
    """A loss by depth, with what confidences learn.

    Depth j (1-based) counts exp(-(j - 1) / gamma) with a `gamma` (DFlash, arXiv 2602.06036), over
    the mean of these weights, so that a step stays as long. A confidence c learns by binary
    cross-entropy against alpha, the probability that its token is kept after those before it
    (DSpark, arXiv 2607.05147; no gradient reaches alpha, those of c go on into the body, as in
    DeepSpec's code: there too the slot's activations are not cut off).
    """

    strategy: Any  # a Strided, which predicts slots
    gamma: float = 0.0  # 0: all depths alike
    confidence: float = 1.0  # weight

    def __call__(self, params, lesson, batch):
        logits, confidence = self.strategy.predict_slots(params, batch.tokens, *self.given(lesson))
        values, alpha = self.values(params, lesson, batch, logits)
        if confidence is not None:
            kept = jax.lax.stop_gradient(alpha)
            values += self.confidence * (jax.nn.softplus(confidence) - kept * confidence)
        if self.gamma:
            weights = np.exp(-np.arange(self.k) / self.gamma)
            depths = self.strategy.depths(batch.tokens, self.k)
            values *= jnp.asarray(weights / weights.mean(), values.dtype)[depths]
        return values, alpha

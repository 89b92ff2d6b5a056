"""LongSpec: one layer that reads the target's last layer's cache where it lies (arXiv 2502.17421).

    x^0 = the target's embedding of the token
    x'  = x^0 + self-attention(norm x^0)       own q, k, v (biased), the last `window` tokens
    x'' = x'  + cross-attention(norm x')       own q (biased) and output; keys and values are those
                                               that the target's last layer has of the tokens before
                                               the round
    logits = the target's head of x'' + MLP(norm x''), without a final norm

Of its own it keeps a window alone, however long the text is; embedding and head are the frozen
target's. All queries of a round see the same of the target: what the target's own query at the
round's start would see of the tokens before it, under that layer's view. Facts are those of the
authors' code (sail-sg/LongSpec); a window of 512 besides the query there is 513 here.

Training: the code draws j from 1..4 for each batch, and a query at t sees the target's keys up to
t - j. Here starts 0, k, 2k, ... give every j from 1 to k, each its own: the query at start s + d
(d = j - 1) sees positions before s, as it will in decoding. Left out is their trick for short
texts, random offsets of all positions but the first few: the target's pass would have them too, and
here it serves all drafts at once.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spire_jax.config.checks import check, not_negative
from spire_jax.config.drafts import Pass, TrainedOptions, over_layers
from spire_jax.config.readers import DRAFT, read_by
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.config.schema import ModelConfig
from spire_jax.drafting.spire import Memory, begin_windowed, of_family
from spire_jax.drafting.strategy import Strategy
from spire_jax.models.attention import Attended, Compute, Positions, attention
from spire_jax.models.caches import KeysValues, LayerCache
from spire_jax.models.layers import Block
from spire_jax.models.masks import View
from spire_jax.models.records import record
from spire_jax.models.sampling import probability_of
from spire_jax.models.transformer import Model, Transformer


@DRAFT_KINDS.register("longspec")
@dataclasses.dataclass(frozen=True)
class LongSpecOptions(TrainedOptions):
    """One layer of a small window of its own that attends to the target's last layer's cache."""

    kind: str = "longspec"
    loss: str = "hard"
    k: int = read_by(0, DRAFT, as_train=True)  # rollout depth in training; 0 = train.k
    window: int = 513  # visible keys of its own, the query included; 0 = all earlier ones
    d_ff: int = 0  # 0 = the target's

    @property
    def shared(self):
        return ("embedding", "unembedding")

    def strategy(self, target, compute):
        sizes, views = self.model(target), self.views(target)
        module, options = of_family(sizes, LongSpecDraft), (("views", views),)
        return LongSpec(Model(module, sizes, compute, options), target.n_layers, target.views()[-1])

    def model(self, target):
        return dataclasses.replace(target, n_layers=1, d_ff=self.d_ff or target.d_ff, qkv_bias=True)

    def rollout(self, train):
        return self.k or train.k

    def kept(self):
        return self.window, 0

    def views(self, target):
        last = target.views()[-1]
        return (View(self.window, 0, last.scale, last.softcap),)

    def products(self, target, k):
        """The cross-attention's: a query, an output, the query's bias and the norms."""
        own = self.model(target)
        heads, h = own.n_kv_heads * own.q_per_kv, own.d_head
        return 2 * own.d_model * heads * h + heads * h + own.d_model + h * own.qk_norm

    def cost(self, target, context, k):
        cross = self.products(target, k)
        last = over_layers(target.views()[-1:], lambda v: min(context, v.sink + v.window), context)
        return dataclasses.replace(
            super().cost(target, context, k),
            more=cross,
            target_rows=last,
            passes=(Pass(weights=cross, products=cross),) * k,
        )

    def check(self, at, config):
        super().check(at, config)
        not_negative(self, at, "k d_ff")
        check(self.window >= 0, f"{at}.window={self.window} is under 1; the window counts the "
                                f"query itself (0 = dense)")  # fmt: skip


class CrossAttention(Block):
    """A block's attention, with keys and values that are not its own, and no MLP."""

    def __init__(self, config: ModelConfig, compute: Compute, *, rngs: nnx.Rngs):
        super().__init__(config, compute, rngs=rngs)
        for name in ("key", "value", "key_bias", "value_bias", "norm_mlp", "gate", "up", "down"):
            delattr(self, name)
        if config.qk_norm:
            del self.norm_key


Attend = Callable[[Array], Attended]  # of queries; what they see is in it


class LongSpecDraft(Transformer):
    """The layer, between the target's embedding and its head."""

    def __init__(self, config, compute, *, rngs, views: tuple[View, ...]):
        super().__init__(config, compute, rngs=rngs, views=views)
        del self.norm_final
        self.cross = CrossAttention(config, compute, rngs=rngs)

    def norm_final(self, x):
        return x

    def entries(self, tokens: Int[Array, "B T"], positions: Positions) -> KeysValues:
        """The self-attention's keys and values, which follow from the tokens alone."""
        return self.blocks[0].keys_values(self.embed(tokens), positions)

    def near(
        self, tokens: Int[Array, "B T"], positions: Positions, attend: Attend
    ) -> Float[Array, "B T D"]:
        """The residual stream after the self-attention, which `attend` computes of queries."""
        block, x = self.blocks[0], self.embed(tokens)
        return block.add(x, attend(block.queries(x, positions))[0])

    def far(
        self, x: Float[Array, "B T D"], positions: Positions, attend: Attend
    ) -> Float[Array, "B T D"]:
        """The final activations, from what `near` gives, after attention to the target's cache."""
        x = self.cross.add(x, attend(self.cross.queries(x, positions))[0])
        return self.blocks[0].feed_forward(x)

    def rollout(
        self,
        tokens: Int[Array, "B T"],
        of_target: Memory,
        view: View,
        starts: Int[np.ndarray, " R"],
        k: int,
        *,
        in_head: bool = False,
    ) -> Float[Array, "B R k V"] | Float[Array, "B R k Vh"]:
        """Logits of k teacher-forced steps from every start, all at once.

        Step d (0-based) from start s processes token s + d and predicts the one after it. It sees
        its own keys and values of the window, and the target's of positions < s.

        Args:
            tokens: a text from position 0.
            of_target: the keys and values of its last layer over the text, from position 0 to the
                last start or beyond; `view` is that layer's.
            starts: static start positions, ascending, with s + k <= T.
        """
        first, text = int(starts[0]), np.arange(tokens.shape[1])
        begin = max(first - self.views[0].window + 1, 0) if self.views[0].window else 0
        seen, late = text[begin:], text[first:]
        at, limit = (starts[:, None] + np.arange(k)).ravel(), np.repeat(starts, k)
        over = np.arange(of_target[0].shape[1])

        def layer(tokens: Array, of_target: Memory):
            own, compute = self.entries(tokens[:, begin:], seen), self.compute
            x = self.near(tokens[:, first:], late, lambda q: attention(
                q, *own, late, seen, self.views[0], compute=compute))  # fmt: skip
            return self.far(x[:, at - first], at, lambda q: attention(
                q, *of_target, limit, over, view, limit=limit, compute=compute))  # fmt: skip

        layer = jax.checkpoint(layer) if self.compute.remat else layer
        logits = (self.unembed_head if in_head else self.unembed)(layer(tokens, of_target))
        return logits.reshape(len(tokens), len(starts), k, -1)


@record()
@dataclasses.dataclass(frozen=True)
class Before:
    """The target's last layer, of which a round sees what lies before its start."""

    cache: LayerCache
    start: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class LongSpec(Strategy):
    """A ring of its own keys and values; `model` is a LongSpecDraft."""

    target_depth: int  # N
    target_view: View  # of the target's last layer

    @property
    def collect_cache(self):
        return (self.target_depth - 1,)

    def begin(self, params, prompt, lengths, k, capacity):
        if prompt.tokens.shape[1] == 0:
            return self.empty(params, prompt.tokens.shape[0], k, capacity)
        module = self.model.bind(params)

        def entries(at):
            return module.entries(jnp.take_along_axis(prompt.tokens, at, axis=1), at)

        of = prompt.tokens, lengths, self.views[0], k, capacity, self.model.compute
        return (begin_windowed(entries, *of),)

    def of_round(self, target, positions):
        return Before(target[-1], positions)

    def step(self, params, state, target, tokens, positions):
        """As the strategy's; a target's cache by itself is that of a round that begins here."""
        if not isinstance(target, Before):
            target = self.of_round(target, positions[:, 0])
        module, (cache,), compute = self.model.bind(params), state, self.model.compute
        cache = cache.append(positions, *module.entries(tokens, positions))
        x = module.near(tokens, positions, lambda q: cache.attend(
            q, positions, self.views[0], compute))  # fmt: skip
        x = module.far(x, positions, lambda q: target.cache.attend(
            q, target.start[:, None], self.target_view, compute, include_self=False
        ))  # fmt: skip
        return module.unembed(x)[:, 0], (cache,)

    def commit(self, params, state, block):
        # A round's last token has no entry yet.
        entries = self.model.bind(params).entries(block.tokens, block.positions)
        return (state[0].append(block.positions, *entries, block.rows),)

    def along(self, params, tokens, activations, cache, read, starts, k, sampling):
        module, config = self.model.bind(params), self.model.config
        before = jnp.tile(jnp.arange(max(int(starts[-1]), 1)), (len(tokens), 1))
        of_target = cache[-1].entries(before, (config.n_kv_heads, config.d_head))
        logits = module.rollout(tokens[:, :-1], of_target, self.target_view, starts, k)
        return probability_of(logits, tokens[:, starts[:, None] + np.arange(1, k + 1)], sampling)

    def predict(self, params, tokens, activations, k, keys_values=()):
        starts, module = np.arange(0, tokens.shape[1], k), self.model.bind(params)
        (of_target,) = keys_values
        logits = module.rollout(tokens, of_target, self.target_view, starts, k, in_head=True)
        return logits.reshape(*tokens.shape, -1)

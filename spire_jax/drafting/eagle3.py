"""EAGLE-3: one layer that drafts from three of the target's activations (arXiv 2503.01840).

One matrix fuses the target's activations y^l of a token, of a few layers l, to its *feature* h. The
layer's input is a pair, the embedding of a token beside the feature of the token before it:

    input   [norm(embedding x_(t+1)), norm(h_t)]    2D wide, of which q, k and v are made
    output  g_t = h_t + attention + MLP             its head predicts x_(t+2)

The pair of h_t and x_(t+1) has index t, in the text (for RoPE, window and sinks) as in the cache:
one less than its token's position. The first token is in no pair; one that opens a round by itself
has no feature, and sees nothing.

A round whose last token is x_a begins with index a - 1: the target has processed all tokens before
x_a, so that h_(a-1) is known, and nothing is to be caught up. After that the chain is fed its own
output: g_t stands in for h_(t+1). Once a round is verified, all pairs are made anew from the
target's activations. That is what the authors' next round does first, over the tokens accepted;
keys and values depend on the pairs alone, so that attention and MLP can be left out.

Training rolls out k steps from every token ("training-time test", section 3.2), over the text's own
tokens. Step j from token s sees the pairs of the target's features up to index s - 1, which are
step 0's, and its own chain's: in the authors' code all keys of step 0 and a diagonal of each step
after it. The loss is cross entropy with the target's distribution, step j weighs 0.8^j.

Ours: windows and sinks; the pruned start; verification of one chain, not of a tree.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spire_jax.config.checks import check, choice, not_negative
from spire_jax.config.drafts import Pass, TransformerOptions
from spire_jax.config.readers import DRAFT, EVALUATE, STUDY, read_by
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.config.schema import ModelConfig
from spire_jax.drafting.losses import draft_loss
from spire_jax.drafting.pruning import prune
from spire_jax.drafting.spire import of_family
from spire_jax.drafting.strategy import Strategy, peaked
from spire_jax.models.attention import Attended, Compute, attention, capped, merge_attention
from spire_jax.models.caches import KeysValues, LayerCache
from spire_jax.models.layers import Block, RMSNorm, parameter, product, truncated_normal
from spire_jax.models.masks import View
from spire_jax.models.records import record
from spire_jax.models.sampling import probability_of
from spire_jax.models.sharding import constrain
from spire_jax.models.transformer import Model, Transformer

FEWEST = 7  # layers of a target that has the paper's three


@DRAFT_KINDS.register("eagle3")
@dataclasses.dataclass(frozen=True)
class Eagle3Options(TransformerOptions):
    """One layer over pairs of a token and the target's feature of the token before it."""

    kind: str = "eagle3"
    n_layers: int = 1
    loss: str = "distillation"
    share_embedding: bool = True  # as the authors'
    layers: tuple[int, ...] = ()  # the l of the y^l that are fused; () = `fused_layers`
    k: int = read_by(0, DRAFT, as_train=True)  # steps of training; 0 = train.k; the paper's 7
    decay: float = 0.8  # weight of a step's loss, of the one's before it
    # What is drawn of a step's logits: "sampled", or the "argmax", whose q is one-hot.
    draws: str = read_by("sampled", EVALUATE, STUDY)

    every_start: ClassVar[bool] = True

    def strategy(self, target, compute):
        sizes, layers = self.model(target), self.fused(target)
        options = (("inputs", len(layers) * target.d_model), ("views", self.views(target)))
        model = Model(of_family(sizes, Eagle3Draft), sizes, compute, options)
        return Eagle3(model, layers, self.draws)

    def fused(self, target: ModelConfig) -> tuple[int, ...]:
        """The l of the activations y^l that are fused."""
        return self.layers or fused_layers(target.n_layers)

    def model(self, target):
        """The head is its own, whether or not the target's is tied."""
        return dataclasses.replace(super().model(target), tied=False)

    def rollout(self, train):
        return self.k or train.k

    def learns(self, strategy, k):
        return Eagle3Loss(strategy, self.loss, self.omega, k, self.decay)

    def initial(self, target, fresh):
        if self.init == "random":
            return fresh
        return pruned(target, fresh)

    def beside(self, target: ModelConfig) -> tuple[int, int]:
        """Weights of the pair's other half, projections and a norm, and of what fuses."""
        sizes = self.model(target)
        heads = sizes.n_kv_heads * sizes.d_head * (sizes.q_per_kv + 2)
        fc = len(self.fused(target)) * target.d_model * sizes.d_model
        return sizes.d_model * (heads + 1), fc

    def products(self, target, k):
        wide, fc = self.beside(target)
        return k * wide + fc  # k steps from every token, whose feature is made once

    def cost(self, target, context, k):
        sizes, base = self.model(target), super().cost(target, context, k)
        wide, fc = self.beside(target)
        # Of the tokens verified the features are fused, and the pairs projected, once a round.
        first = Pass(projections=2 * (k + 1), weights=wide + fc, products=wide + (k + 1) * fc)
        others = (Pass(weights=wide, products=wide),) * (k - 1)
        features = (k + 2) * sizes.d_model / sizes.cache_row()
        return dataclasses.replace(
            base, slots=base.slots + features, passes=(first, *others), more=wide + fc
        )

    def check(self, at, config):
        super().check(at, config)
        deep = config.target.n_layers
        check(self.n_layers == 1, f"{at}.n_layers={self.n_layers}: it is one layer; use 1")
        outside = [layer for layer in self.layers if not 0 <= layer <= deep]
        check(not outside, f"{at}.layers: {outside} are no activations of the target, which has "
                           f"0 (its embeddings) to {deep} (its last layer's)")  # fmt: skip
        check(len(set(self.layers)) == len(self.layers),
              f"{at}.layers={self.layers} names one twice; leave it out")  # fmt: skip
        check(0 < self.decay <= 1, f"{at}.decay={self.decay} must lie in (0, 1]")
        choice(f"{at}.draws", self.draws, "sampled argmax")
        not_negative(self, at, "k")

    def check_run(self, at, config):
        super().check_run(at, config)
        k, own = self.rollout(config.train), f"{at}.k" if self.k else "train.k"
        check(k < config.train.seq_len,
              f"{own}={k} must be below train.seq_len={config.train.seq_len}")  # fmt: skip


def fused_layers(n: int) -> tuple[int, ...]:
    """The l of the y^l that are fused, of a target of n layers: 2, n / 2 and n - 3.

    That is the authors' code and the engines'; of fewer than 7 layers, where these are not three:
    the first layer's, the middle one and the last layer's input, as many as there are (ours).
    """
    layers = (2, n // 2, n - 3) if n >= FEWEST else (1, n // 2, n - 1)
    return tuple(sorted(set(layers)))


def pruned(target, fresh):
    """A start from the target (ours; the authors' is random but for the embedding).

    Of the target: the embedding, the final norm, the unembedding and, of its last block, all but
    what projects the pair. Of that, what belongs to the feature is the last block's, too, and the
    feature begins as the last of the activations that are fused. What reads the token stays random.
    """
    last, block = target["blocks"][len(target["blocks"]) - 1], fresh["blocks"][0]
    d = block["query"].shape[0] // 2
    start = {name: last.get(name, value) for name, value in block.items()}
    for name in ("query", "key", "value"):
        start[name] = block[name].at[d:].set(last[name])
    scale = block["norm_attention"]["scale"].at[1].set(last["norm_attention"]["scale"])
    start["norm_attention"] = {"scale": scale}
    if "unembedding" not in target:
        target = target | {"unembedding": target["embedding"].T}
    out = prune(target, fresh | {"blocks": {}})
    out["blocks"] = {0: jax.tree.map(lambda x, of: jnp.array(x, of.dtype), start, block)}
    return out | {"fc": jnp.eye(*fresh["fc"].shape, d - fresh["fc"].shape[0])}


class PairNorm(RMSNorm):
    """An RMSNorm of either half of a pair; `scale` (2, D): the embedding's and the feature's."""

    def __init__(self, size: int, eps: float, *, rngs: nnx.Rngs):
        super().__init__(size, eps, rngs=rngs)
        self.scale = parameter(rngs, (2, size), (None, None), nnx.initializers.ones)

    def __call__(self, x: Float[Array, "*rows D2"]) -> Float[Array, "*rows D2"]:
        return super().__call__(x.reshape(*x.shape[:-1], 2, -1)).reshape(x.shape)


class PairBlock(Block):
    """A block whose queries, keys and values are made of pairs, 2D wide."""

    def __init__(self, config: ModelConfig, compute: Compute, *, rngs: nnx.Rngs):
        super().__init__(config, compute, rngs=rngs)
        c = config
        self.norm_attention = PairNorm(c.d_model, c.norm_eps, rngs=rngs)
        for name in ("query", "key", "value"):
            narrow = getattr(self, name)
            shape = (2 * c.d_model, *narrow.shape[1:])
            scale = c.d_head**-0.5 if name == "query" and c.scale_in_init else 1.0
            init = truncated_normal(shape[0], scale)
            setattr(self, name, parameter(rngs, shape, narrow.axes, init))


class Eagle3Draft(Transformer):
    """The layer, the matrix `fc` (inputs, D) that fuses activations, embedding and head."""

    def __init__(
        self,
        config: ModelConfig,
        compute: Compute,
        *,
        rngs: nnx.Rngs,
        inputs: int,
        views: tuple[View, ...] | None = None,
    ):
        """`inputs`: numbers of all the activations that are fused."""
        super().__init__(config, compute, rngs=rngs, views=views)
        self.blocks = nnx.List([PairBlock(config, compute, rngs=rngs)])
        self.fc = parameter(
            rngs, (inputs, config.d_model), ("embed", None), truncated_normal(inputs)
        )

    def fuse(self, activations: tuple[Float[Array, "B T Dt"], ...]) -> Float[Array, "B T D"]:
        """The features h of tokens, from the target's activations, Dt wide."""
        y, dtype = jnp.concatenate(activations, axis=-1), self.compute.dtype
        h = product(y.astype(dtype), self.fc[...].astype(dtype), compute=self.compute)
        return constrain(h, "batch", None, None)

    def pairs(
        self, tokens: Int[Array, "B T"], features: Float[Array, "B T D"]
    ) -> Float[Array, "B T D2"]:
        """Inputs of the layer: tokens, each beside the feature of the one before it."""
        return jnp.concatenate([self.embed(tokens), features], axis=-1)

    def step(
        self,
        cache: LayerCache,
        tokens: Int[Array, "B T"],
        features: Float[Array, "B T D"],
        at: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """The layer's output for pairs of the indices `at`, and the cache with them."""
        block, x = self.blocks[0], self.pairs(tokens, features)
        q, cache = block.queries(x, at), cache.append(at, *block.keys_values(x, at))
        attended = merge_attention(self.over_cache(0, q, cache, at))
        return block.finish(features, attended), cache

    def rollout(
        self,
        tokens: Int[Array, "B T"],
        activations: tuple[Float[Array, "B M Dt"], ...],
        starts: Int[np.ndarray, " R"],
        k: int,
        read: Int[np.ndarray, " M"] | None = None,
    ) -> Iterator[Float[Array, "B R D"]]:
        """Of each of k teacher-forced steps the layer's output, all starts in parallel.

        Step j (0-based) from start s predicts token s + j + 1; beyond the text it is meaningless.

        Args:
            activations: the target's at the positions `read`, static; all unless given.
            starts: static; each token, in training.
        """
        length, block, view = tokens.shape[1], self.blocks[0], self.views[0]
        read = np.arange(length) if read is None else read
        x = features = self.fuse(activations)
        x = jnp.where(starts[:, None] > 0, features[:, np.searchsorted(read, starts - 1)], 0)
        read, features = read[read < length - 1], features[:, read < length - 1]
        text = block.keys_values(self.pairs(tokens[:, read + 1], features), read)
        own: list[KeysValues] = []  # pairs of the chain's own outputs

        def one_step(j: int, x: Array, own: list[KeysValues]) -> tuple[Array, KeysValues]:
            at, pair = starts - 1 + j, self.pairs(tokens[:, np.minimum(starts + j, length - 1)], x)
            q, kv = block.queries(pair, at), block.keys_values(pair, at)
            parts = [attention(q, *text, at, read, view, limit=starts, compute=self.compute)]
            if j:
                parts.append(attend_own(q, [*own, kv], at, starts[:, None] + np.arange(j), view))
            return block.finish(x, merge_attention(parts)), kv

        step = jax.checkpoint(one_step, static_argnums=0) if self.compute.remat else one_step
        for j in range(k):
            x, kv = step(j, x, own)
            own += [kv] if j else []  # step 0's pair is in the text
            yield x


def attend_own(
    q: Float[Array, "B R K G H"],
    keys_values: Sequence[KeysValues],
    positions: Int[np.ndarray, " R"],
    k_pos: Int[np.ndarray, "R n"],
    view: View,
) -> Attended:
    """Attention of each start's query to n keys of its own.

    As sums over heads: products of matrices of one row and n columns would be of every start.
    """
    q32 = q.astype(jnp.float32)
    each = [jnp.sum(q32 * k[..., None, :], axis=-1) for k, _ in keys_values]
    sees = view.sees(positions[:, None], k_pos)[:, None, None]
    logits = jnp.where(sees, capped(jnp.stack(each, axis=-1), view), -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - lse[..., None])
    parts = [weights[..., i, None] * v[..., None, :] for i, (_, v) in enumerate(keys_values)]
    out = sum(parts, start=jnp.zeros((), jnp.float32))
    return out.astype(q.dtype), lse


@record()
@dataclasses.dataclass(frozen=True)
class Eagle3State:
    """Keys and values of pairs; and the features of the last k + 2 tokens, p at p mod (k + 2).

    Drafted tokens have the chain's own outputs there. A round writes over none that the next one,
    or the next chunk of a prompt, begins with.
    """

    cache: LayerCache
    features: Float[Array, "B F D"]

    def before(
        self, positions: Int[Array, "R T"], rows: Int[Array, " R"] | None = None
    ) -> Float[Array, "R 1 D"]:
        """The feature of the token before each row's first; 0 before a text."""
        first = positions[:, :1]
        of = self.features if rows is None else self.features.at[rows].get(mode="clip")
        found = jnp.take_along_axis(of, ((first - 1) % of.shape[1])[..., None], axis=1)
        return jnp.where(first[..., None] > 0, found, 0)

    def put(
        self,
        positions: Int[Array, "R T"],
        features: Float[Array, "R T D"],
        rows: Int[Array, " R"] | None = None,
    ) -> Float[Array, "B F D"]:
        """`features` with those at `positions`; of -1, and of rows beyond the batch, nothing."""
        size, last = self.features.shape[1], jnp.max(positions, axis=1, keepdims=True)
        kept = (positions >= 0) & (positions > last - size)
        slots = jnp.where(kept, positions % size, size)
        new = features.astype(self.features.dtype)
        if rows is not None:
            new = self.features.at[rows[:, None], slots].set(new, mode="drop")
        else:  # row by row: told so, no device of a mesh asks the others for theirs
            write = jax.vmap(lambda old, at, new: old.at[at].set(new, mode="drop"))
            new = write(self.features, slots, new)
        return constrain(new, "batch", None, None)


@dataclasses.dataclass(frozen=True)
class Eagle3(Strategy):
    """A chain of steps over a cache of pairs; `model` is an Eagle3Draft."""

    layers: tuple[int, ...]  # the l of the y^l that are fused
    draws: str = "sampled"

    @property
    def collect(self):
        return self.layers

    def reads(self, start):
        (view,) = self.views  # a round's first query has index start - 1, and sees itself
        return view.sink, max(start - view.window, 0) if view.window else 0

    def empty(self, params, batch, k, capacity):
        (cache,), model = super().empty(params, batch, k, capacity), self.model
        features = jnp.zeros((batch, k + 2, model.config.d_model), model.compute.dtype)
        return Eagle3State(cache, features)

    def begin(self, params, prompt, lengths, k, capacity):
        state = self.empty(params, prompt.tokens.shape[0], k, capacity)
        if prompt.tokens.shape[1] == 0:
            return state
        positions = jnp.where(prompt.positions < lengths[:, None], prompt.positions, -1)
        return self.commit(params, state, dataclasses.replace(prompt, positions=positions))

    def step(self, params, state, target, tokens, positions):
        module, before = self.model.bind(params), state.before(positions)
        x, cache = module.step(state.cache, tokens, before, positions - 1)
        logits = peaked(module.unembed(x)[:, 0], self.draws)
        return logits, Eagle3State(cache, state.put(positions, x))

    def commit(self, params, state, block):
        module, at, rows = self.model.bind(params), block.positions, block.rows
        features = module.fuse(block.activations)
        before = jnp.concatenate([state.before(at, rows), features[:, :-1]], axis=1)
        index = jnp.maximum(at - 1, -1)  # of a first token, too, there is none
        keys_values = module.blocks[0].keys_values(module.pairs(block.tokens, before), index)
        cache = state.cache.append(index, *keys_values, rows)
        return Eagle3State(cache, state.put(at, features, rows))

    def along(self, params, tokens, activations, cache, read, starts, k, sampling):
        module = self.model.bind(params)
        xs = jnp.stack([*module.rollout(tokens, activations, starts, k, read)], axis=2)
        of_text = tokens[:, starts[:, None] + np.arange(1, k + 1)]
        return probability_of(peaked(module.unembed(xs), self.draws), of_text, sampling)


@dataclasses.dataclass(frozen=True)
class Eagle3Loss:
    """A loss of method.md 3.4 of every step from every token, step j weighing decay^j.

    A token's value is the sum over the steps that predict it. Its alpha is that of the step that
    others than this kind would have: of rollouts from tokens 0, k, 2k, ...
    """

    strategy: Eagle3
    loss: str
    omega: float
    k: int
    decay: float

    def __call__(self, params, lesson, batch):
        module, (rows, length) = self.strategy.model.bind(params), batch.tokens.shape
        p = lesson.p[..., params["head_ids"]] if module.config.head_tokens else lesson.p
        activations = tuple(lesson.activations[y] for y in self.strategy.collect)
        steps = module.rollout(batch.tokens, activations, np.arange(length), self.k)

        @jax.checkpoint  # else the logits of all steps would be kept
        def of_step(x, p, targets):
            return draft_loss(self.loss, self.omega, p, module.unembed_head(x), targets)

        values = alphas = jnp.zeros((rows, length))
        for j, x in enumerate(steps):
            found = of_step(x[:, : length - j], p[:, j:], batch.targets[:, j:])
            value, alpha = (jnp.pad(y, ((0, 0), (j, 0))) for y in found)
            values += self.decay**j * value
            alphas = jnp.where(np.arange(length) % self.k == j, alpha, alphas)
        return values, alphas

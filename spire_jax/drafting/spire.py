"""SPIRe: a pruned transformer whose layers attend to memory vectors (method.md section 3).

Keys and values of layer i (1-based) come from memories m^i, not from the layer's own inputs:
the frozen target's activations y^(N - n + i - 1) for tokens that the target has processed, a
learned mix of all the draft's layers for drafted ones (and other choices, for comparison: the
option `memory`). One stack serves training (`rollout`: k passes, parallel over all starts) and
decoding (`step`).

"fused" memories are DFlash's (arXiv 2602.06036): RMSNorm(concat(y^l for l in `fused`) F) with one
matrix F, the same vector for all layers, of which each makes its own keys and values. (There a
layer's pre-attention norm is not applied to it; here it is, as to every memory.)
"""

import dataclasses
import functools
import types
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from spire_jax.config.checks import check, choice, not_negative
from spire_jax.config.drafts import DraftCost, Pass, TransformerOptions
from spire_jax.config.readers import DRAFT, read_by
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.config.schema import ModelConfig
from spire_jax.drafting.strategy import Processed, Strategy
from spire_jax.models.attention import (
    Attended,
    Compute,
    Positions,
    attention,
    merge_attention,
)
from spire_jax.models.caches import (
    Caches,
    KeysValues,
    LayerCache,
    full_cache,
    ring_cache,
    ring_positions,
)
from spire_jax.models.layers import Block, RMSNorm, parameter, product, truncated_normal
from spire_jax.models.masks import EMPTY, View
from spire_jax.models.sampling import probability_of
from spire_jax.models.sharding import constrain
from spire_jax.models.transformer import Activations, Model, Transformer


@DRAFT_KINDS.register("spire")
@dataclasses.dataclass(frozen=True)
class SpireOptions(TransformerOptions):
    """A pruned transformer with feedback memory, which reads the target's activations."""

    kind: str = "spire"
    k: int = read_by(0, DRAFT, as_train=True)  # rollout depth in training; 0 = train.k
    attend_self: bool = True  # also attend to the token's own layer input
    feedback: bool = True  # memories mix all layers; False: each layer's own input
    memory: str = "layers"  # what the memories of tokens the target has processed are:
    # "layers": the target's activations, layer by layer; "final": its last one for all layers,
    # with one mix for all; "embedding": none of it, the draft's own embeddings of the tokens;
    # "fused": several of its activations as one for all layers, by a matrix and a norm
    fused: tuple[int, ...] = ()  # the l of these y^l, 0 to N; () = those of "layers"
    memory_init: float = 0.95  # initial softmax weight of the layer's own input

    def strategy(self, target, compute):
        names = ("feedback", "attend_self", "memory", "memory_init")
        options = {"views": self.views(target)} | {n: getattr(self, n) for n in names}
        if self.memory == "fused":
            options["fused"] = self.fused or target_layers(target.n_layers, self.n_layers)
        sizes = self.model(target)
        model = Model(of_family(sizes), sizes, compute, tuple(options.items()))
        return Spire(model, target.n_layers)

    def rollout(self, train):
        return self.k or train.k

    def initial(self, target, fresh):
        params = super().initial(target, fresh)
        if self.memory == "fused" and self.init == "pruned":
            # The mean of the activations. Those of a residual stream's neighbouring layers are
            # alike, and each layer's norm undoes their length: with the default layers the pruned
            # blocks make nearly the keys and values that they made in the target.
            params = params | {"fuse": mean_of_blocks(fresh["fuse"])}
        return params

    def cost(self, target, context, k):
        # A second projection, of memories beside layer inputs; without feedback they are the same.
        twice = int(self.attend_self and self.feedback)
        passes = (Pass(projections=twice),) * k
        return self.with_fusion(
            target, k, dataclasses.replace(super().cost(target, context, k), passes=passes)
        )

    def fusion(self, target: ModelConfig) -> int:
        """Weights of the matrix that fuses activations."""
        if self.memory != "fused":
            return 0
        return (len(self.fused) or self.n_layers) * target.d_model**2

    def products(self, target, k):
        return self.fusion(target)

    def with_fusion(self, target: ModelConfig, k: int, cost: DraftCost) -> DraftCost:
        """A round's cost with what fuses the activations of the k + 1 tokens that it verifies.

        It counts in the first pass.
        """
        if not self.fusion(target):
            return cost
        (first, *rest), matrix = cost.passes, self.fusion(target)
        first = first._replace(weights=matrix, products=(k + 1) * matrix)
        more = cost.more + matrix + target.d_model
        return dataclasses.replace(cost, passes=(first, *rest), more=more)

    def check(self, at, config):
        super().check(at, config)
        why = "reads the target's activations"
        self.check_against(config.target, at, "d_model", why)
        choice(f"{at}.memory", self.memory, "layers final embedding fused")
        deepest, fused = config.target.n_layers, f"{at}.fused={self.fused}"
        check(
            not self.fused or self.memory == "fused",
            f"{fused} is of memory='fused', not of memory={self.memory!r}; leave it out",
        )
        check(
            all(0 <= layer <= deepest for layer in self.fused),
            f"{fused}: the target has the activations y^0 (its embedding) to y^{deepest}",
        )
        check(len(set(self.fused)) == len(self.fused), f"{fused} names a layer twice; leave one "
                                                       f"out")  # fmt: skip
        check(0 < self.memory_init < 1,
              f"{at}.memory_init={self.memory_init} must lie in (0, 1)")  # fmt: skip
        not_negative(self, at, "k")

    def check_run(self, at, config):
        super().check_run(at, config)
        seq_len = config.train.seq_len
        check(seq_len > self.sink, f"{at}.sink={self.sink} fills train.seq_len")


# Keys and values of what was read of a text, a part of it or all.
Memory = tuple[Float[Array, "B M K H"], Float[Array, "B M K H"]]


class SpireDraft(Transformer):
    """A transformer with feedback memory; `memory_mix` (n, n + 1) are the logits of w.

    One memory for all layers (memory="final") has one row of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute: Compute,
        *,
        rngs: nnx.Rngs,
        views: tuple[View, ...] | None = None,
        feedback: bool = True,
        attend_self: bool = True,
        memory: str = "layers",
        memory_init: float = 0.95,
        fused: tuple[int, ...] = (),
    ):
        super().__init__(config, compute, rngs=rngs, views=views)
        self.feedback, self.attend_self, self.memory = feedback, attend_self, memory
        if memory == "fused":
            rows = len(fused) * config.d_model
            self.fuse = parameter(
                rngs, (rows, config.d_model), ("embed", None), truncated_normal(rows)
            )
            self.norm_fused = RMSNorm(config.d_model, config.norm_eps, rngs=rngs)
        if feedback:
            mix = initial_mix(config.n_layers, memory, memory_init)
            self.memory_mix = parameter(
                rngs, mix.shape, (None, None), lambda key, shape, dtype: jnp.asarray(mix, dtype)
            )

    def memories(self, xs: list[Float[Array, "*rows D"]]) -> list[Float[Array, "*rows D"]]:
        """m^1 .. m^n of a drafted token from its activations x^0 .. x^n."""
        if not self.feedback:
            return xs[:-1]
        weights = jax.nn.softmax(self.memory_mix[...], axis=-1).astype(xs[0].dtype)
        stacked = jnp.stack(xs)
        mixed = [jnp.einsum("l,l...->...", w, stacked) for w in weights]
        return mixed * (len(self.blocks) // len(mixed))

    def of_target(
        self, tokens: Int[Array, "B T"], activations: Activations
    ) -> tuple[Float[Array, "B T D"], ...]:
        """Each layer's memories of tokens that the target has processed."""
        depth, dtype = len(self.blocks), self.compute.dtype
        if self.memory == "embedding":
            return (self.embed(tokens),) * depth
        ys = tuple(y.astype(dtype) for y in activations)
        if self.memory == "fused":
            weight = self.fuse[...].astype(dtype)
            y = product(jnp.concatenate(ys, axis=-1), weight, compute=self.compute)
            ys = (self.norm_fused(constrain(y, "batch", None, None)),)
        return ys * (depth // len(ys))

    def read_target(
        self,
        layer: int,
        tokens: Int[Array, "B T"],
        activations: Activations,
        positions: Positions,
    ) -> KeysValues:
        """A layer's keys and values of tokens that the target has processed."""
        y = self.of_target(tokens, activations)[layer]
        return self.blocks[layer].keys_values(y, positions)

    def read_target_whole(
        self, tokens: Int[Array, "B T"], activations: Activations, positions: Positions
    ) -> list[KeysValues]:
        """`read_target` of every layer."""
        ys = self.of_target(tokens, activations)
        return [block.keys_values(y, positions) for block, y in zip(self.blocks, ys, strict=True)]

    def of_text(
        self,
        tokens: Int[Array, "B T"],
        activations: tuple[Float[Array, "B M D"], ...],
        read: Int[np.ndarray, " M"] | None,
    ) -> tuple[list[Memory], Int[np.ndarray, " M"]]:
        """Each layer's memories of a text at the positions `read`, and these; all unless given."""
        read = np.arange(tokens.shape[1]) if read is None else read
        return self.read_target_whole(tokens[:, read], activations, read), read

    def rollout(
        self,
        tokens: Int[Array, "B T"],
        activations: tuple[Float[Array, "B M D"], ...],
        starts: Int[np.ndarray, " R"],
        k: int,
        read: Int[np.ndarray, " M"] | None = None,
        *,
        in_head: bool = False,
    ) -> Float[Array, "B R k V"] | Float[Array, "B R k Vh"]:
        """`rollout_over` the memories of the target's activations at the positions `read`.

        These are all of 0 .. T - 1 unless given. A window sees fewer.
        """
        memory, read = self.of_text(tokens, activations, read)
        return self.rollout_over(memory, tokens, read, starts, k, in_head=in_head)

    def rollout_over(
        self,
        target_memory: Sequence[Memory],
        tokens: Int[Array, "B T"],
        read: Int[np.ndarray, " M"],
        starts: Int[np.ndarray, " R"],
        k: int,
        selected: Sequence[Bool[Array, "B K M"]] | None = None,
        *,
        in_head: bool = False,
    ) -> Float[Array, "B R k V"] | Float[Array, "B R k Vh"]:
        """Logits of k teacher-forced draft steps from every start, all starts in parallel.

        Step j (0-based) from start s processes token s + j, which predicts token s + j + 1. It
        sees the target's memories of positions < s, the draft's own memories of s .. s + j - 1,
        and itself. Training uses starts 0, k, 2k, ...; the oracle uses every position.

        Args:
            target_memory: layer by layer, keys and values at the positions `read`, static.
            tokens: a text from position 0.
            starts: static start positions, with s + k <= T.
            selected: layer by layer, which of `read` each KV head keeps; all unless given.
            in_head: logits of `unembed_head`.
        """
        own: list[list[KeysValues]] = [[] for _ in self.blocks]
        hidden = []
        for j in range(k):
            # The last pass leaves no memory behind: no pass comes after it.
            one_pass = jax.checkpoint(self._pass, static_argnums=(0, 4)) if (
                self.compute.remat) else self._pass  # fmt: skip
            at = _Static(starts, j, read)
            x, memory = one_pass(at, tokens, target_memory, own, j < k - 1, selected)
            hidden.append(x)
            for layer, kv in zip(own, memory, strict=False):
                layer.append(kv)
        return (self.unembed_head if in_head else self.unembed)(jnp.stack(hidden, axis=2))

    def _pass(self, at: "_Static", tokens, target_memory, own, keep_memory, selected):
        starts, positions = at.starts, at.starts + at.j

        def attend(i: int, block: Block, x: Array):
            q = block.queries(x, positions)
            k_pos = at.read if selected is None else jnp.where(selected[i], at.read, EMPTY)
            parts = self.over_text(i, q, target_memory[i], positions, k_pos, starts)
            recent = list(own[i])
            if self.attend_self:
                recent.append(block.keys_values(x, positions))
            if recent:
                offsets = np.arange(at.j + self.attend_self)
                parts.append(self._attend_recent(i, q, recent, starts, positions, offsets))
            return merge_attention(parts), None

        xs, _ = self.run(self.embed(tokens[:, positions]), attend, remat=False)
        if not keep_memory:
            return xs[-1], []
        memories = zip(self.blocks, self.memories(xs), strict=True)
        return xs[-1], [block.keys_values(m, positions) for block, m in memories]

    def _attend_recent(self, i, q, recent, starts, positions, offsets):
        """Attention of each start's query to that start's own few keys."""
        batch, rollouts = q.shape[:2]
        flat = batch * rollouts
        k, v = (jnp.stack(x, axis=2).reshape(flat, len(offsets), *x[0].shape[2:])
                for x in zip(*recent, strict=True))  # fmt: skip
        q_pos = jnp.tile(jnp.asarray(positions), batch)[:, None]
        k_pos = jnp.tile(jnp.asarray(starts[:, None] + offsets), (batch, 1))
        out, lse = attention(q.reshape(flat, 1, *q.shape[2:]), k, v, q_pos, k_pos, self.views[i])
        return out.reshape(q.shape), lse.reshape(q.shape[:-1])

    def step(
        self, caches: Caches, tokens: Int[Array, "B 1"], positions: Int[Array, "B 1"]
    ) -> tuple[Float[Array, "B V"], Caches]:
        """One draft step: logits after the token at `positions`; its memories enter the cache."""

        def attend(i: int, block: Block, x: Array):
            q = block.queries(x, positions)
            parts = self.over_cache(i, q, caches[i], positions, include_self=False)
            if self.attend_self:
                k, v = block.keys_values(x, positions)
                parts.append(attention(q, k, v, positions, positions, self.views[i]))
            return merge_attention(parts), None

        xs, _ = self.run(self.embed(tokens), attend)
        layers = zip(caches, self.blocks, self.memories(xs), strict=True)
        caches = tuple(
            cache.append(positions, *block.keys_values(m, positions)) for cache, block, m in layers
        )
        return self.unembed(xs[-1])[:, 0], caches

    def over_text(
        self,
        i: int,
        q: Float[Array, "B T K G H"],
        keys_values: Memory,
        positions: Int[np.ndarray, " T"],
        k_pos: Int[np.ndarray, " M"] | Int[Array, "B K M"],
        limit: Int[np.ndarray, " T"],
    ) -> list[Attended]:
        """Attention of layer i to keys and values of the target's tokens before `limit`."""
        return [attention(q, *keys_values, positions, k_pos, self.views[i], limit=limit,
                          compute=self.compute)]  # fmt: skip


@functools.cache
def of_family(config: ModelConfig, draft: type[Transformer] | None = None) -> type[Transformer]:
    """The draft's module, with what a model's family has of its own (embedding, head) in it."""
    module, draft = config.module(), draft or SpireDraft
    if issubclass(draft, module):
        return draft
    return types.new_class(f"{draft.__name__}Of{module.__name__}", (draft, module))


class _Static:
    """What a pass knows while tracing, hashable by identity for `jax.checkpoint`."""

    def __init__(self, starts: np.ndarray, j: int, read: np.ndarray):
        self.starts, self.j, self.read = starts, j, read


@dataclasses.dataclass(frozen=True)
class Spire(Strategy):
    """A ring of memories, refreshed from the target's activations; `model` is a SpireDraft."""

    target_depth: int  # N

    @property
    def collect(self) -> tuple[int, ...]:
        options, depth = dict(self.model.options), self.model.config.n_layers
        memory = options.get("memory", "layers")
        return options.get("fused") or target_layers(self.target_depth, depth, memory)

    def reads(self, start):
        begins = [max(start - view.window + 1, 0) if view.window else 0 for view in self.views]
        return max(view.sink for view in self.views), min(begins)

    def begin(self, params, prompt, lengths, k, capacity):
        if prompt.tokens.shape[1] == 0:
            return self.empty(params, prompt.tokens.shape[0], k, capacity)
        module = self.model.bind(params)
        return tuple(
            begin_windowed(
                lambda at, i=i: module.read_target(i, *_at(prompt, at)),
                prompt.tokens, lengths, view, k, capacity, self.model.compute,
            )
            for i, view in enumerate(self.views)
        )  # fmt: skip

    def step(self, params, state, target, tokens, positions):
        return self.model.bind(params).step(state, tokens, positions)

    def commit(self, params, state, block):
        module, at = self.model.bind(params), block.positions
        read = module.read_target_whole(block.tokens, block.activations, at)
        return tuple(
            cache.append(at, *kv, block.rows) for cache, kv in zip(state, read, strict=True)
        )

    def along(self, params, tokens, activations, cache, read, starts, k, sampling):
        module = self.model.bind(params)
        logits = module.rollout(tokens[:, :-1], activations, starts, k, read)
        return probability_of(logits, tokens[:, starts[:, None] + np.arange(1, k + 1)], sampling)

    def predict(self, params, tokens, activations, k):
        starts, module = np.arange(0, tokens.shape[1], k), self.model.bind(params)
        logits = module.rollout(tokens, activations, starts, k, in_head=True)
        return logits.reshape(*tokens.shape, -1)


def begin_windowed(
    entries, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], view: View, room: int,
    capacity: int, compute: Compute,
) -> LayerCache:  # fmt: skip
    """A layer's cache over the first `lengths` of T prompt tokens, under its view.

    Each slot of a ring gathers the position it should hold, so that only what the window and the
    sinks need is projected.

    Args:
        entries: of positions [B, P] that are all within the prompt: keys and values there.
        room: drafted tokens that a ring has room for.
    """
    if not view.window:
        k, v = entries(jnp.tile(jnp.arange(tokens.shape[1]), (tokens.shape[0], 1)))
        return full_cache(k, v, capacity, compute)
    ring = view.window + room
    k, v = entries(ring_positions(lengths, view.sink, ring)[1])
    return ring_cache(k, v, view.sink, ring, compute)


def _at(prompt: Processed, positions: Int[Array, "B P"]):
    """A prompt's tokens and activations at some of its positions, and these."""
    tokens = jnp.take_along_axis(prompt.tokens, positions, axis=1)
    ys = (jnp.take_along_axis(y, positions[..., None], axis=1) for y in prompt.activations)
    return tokens, tuple(ys), positions


def target_layers(n_target: int, n_draft: int, memory: str = "layers") -> tuple[int, ...]:
    """The l of the activations y^l that draft layers 1 .. n read: N - n + i - 1."""
    if memory == "embedding":
        return ()
    return (n_target,) if memory == "final" else tuple(range(n_target - n_draft, n_target))


def mean_of_blocks(fuse: Float[Array, "rows D"]) -> Float[Array, "rows D"]:
    """The matrix, of the size of `fuse`, that makes of several vectors in a row their mean."""
    rows, size = fuse.shape
    return jnp.tile(jnp.eye(size, dtype=fuse.dtype), (rows // size, 1)) / (rows // size)


def initial_mix(n: int, memory: str, own: float) -> np.ndarray:
    """Logits of w before training: a weight of `own` on what stands in for the target's
    activation (x^(i-1) for y^(N-n+i-1), x^n for y^N), the rest even."""
    at = np.array([n]) if memory == "final" else np.arange(n)
    mix = np.full((len(at), n + 1), np.log((1 - own) / n), np.float32)
    mix[np.arange(len(at)), at] = np.log(own)
    return mix

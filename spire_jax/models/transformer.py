"""The decoder-only transformer that targets and vanilla drafts are (method.md section 2)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spire_jax.config.schema import ModelConfig, head_size
from spire_jax.models.attention import Attended, Compute, attention, merge_attention
from spire_jax.models.caches import Caches, KeysValues, LayerCache, read_then_append, stored
from spire_jax.models.layers import Block, RMSNorm, parameter, product, truncated_normal
from spire_jax.models.masks import View
from spire_jax.models.sharding import constrain

Params = Any  # nested dict of float32 arrays, the pure form of a module's nnx.State
Activations = tuple[Float[Array, "B T D"], ...]


class Transformer(nnx.Module):
    """Embedding, blocks, final norm, unembedding; activations y^l on request."""

    def __init__(
        self,
        config: ModelConfig,
        compute: Compute,
        *,
        rngs: nnx.Rngs,
        views: tuple[View, ...] | None = None,
    ):
        """`views`: what each layer sees, where that is not what the config says of the model."""
        c = config
        self.config, self.compute = config, compute
        self.views = config.views() if views is None else views
        self.embedding = parameter(
            rngs, (c.vocab_size, c.d_model), ("vocab", "embed"), nnx.initializers.normal(1.0)
        )
        self.blocks = nnx.List([Block(c, compute, rngs=rngs) for _ in range(c.n_layers)])
        self.norm_final = RMSNorm(c.d_model, c.norm_eps, rngs=rngs)
        if not c.tied:
            self.unembedding = parameter(
                rngs, (c.d_model, head_size(c)), ("embed", "vocab"), truncated_normal(c.d_model)
            )
        if c.head_tokens:
            # Which tokens the columns of the unembedding stand for, in order; never trained.
            self.head_ids = nnx.Param(jnp.arange(c.head_tokens, dtype=jnp.int32), axes=(None,))

    def embed(self, tokens: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """x^0: the embeddings of tokens."""
        # Gathered over fsdp before the look-up: rows of a table split by d_model would come out
        # split by it too, and moving them to the batch's sharding costs XLA a full replication.
        table = constrain(self.embedding[...], "vocab", None)
        x = table[tokens].astype(self.compute.dtype)
        return constrain(x, "batch", *(None,) * (x.ndim - 1))

    def unembed(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Float32 logits of final activations; -inf for what cannot be drawn.

        That is the padding of the vocabulary, and all that a trimmed head leaves out.
        """
        return self.widened(self.unembed_head(x))

    def widened(self, logits: Float[Array, "*rows Vh"]) -> Float[Array, "*rows V"]:
        """Logits over the vocabulary from those of the head: -inf for what it leaves out."""
        if not self.config.head_tokens:
            return logits
        whole = jnp.full((*logits.shape[:-1], self.config.vocab_size), -jnp.inf)
        return whole.at[..., self.head_ids[...]].set(logits, unique_indices=True)

    def unembed_head(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows Vh"]:
        """`unembed`, of the tokens in `head_ids` alone where the head is trimmed."""
        x = self.norm_final(x)
        tied = self.config.tied
        w = (self.embedding if tied else self.unembedding)[...].astype(x.dtype)
        logits = product(x, w, dtype="float32", transposed=tied, compute=self.compute)
        logits = constrain(logits, "batch", *(None,) * (x.ndim - 2), "vocab")
        if not self.config.head_tokens and self.config.n_tokens < self.config.vocab_size:
            valid = np.arange(self.config.vocab_size) < self.config.n_tokens
            logits = jnp.where(valid, logits, -jnp.inf)
        return logits

    def run(
        self,
        x: Float[Array, "B T D"],
        attend: Callable[[int, Block, Array], tuple[Array, Any]],
        *,
        remat: bool | None = None,
    ) -> tuple[list[Float[Array, "B T D"]], list[Any]]:
        """The stack of blocks: x^0 .. x^N, and what each layer's attention leaves behind.

        Args:
            attend: of a layer's number, its block and its input; the attention's output, and
                whatever it leaves: keys and values, or the layer's cache.
            remat: recompute each layer in the backward pass; by default as `compute` says.
        """

        def layer(i: int, x: Array):
            attended, left = attend(i, self.blocks[i], x)
            return self.blocks[i].finish(x, attended), left

        if self.compute.remat if remat is None else remat:
            layer = jax.checkpoint(layer, static_argnums=0)
        xs, left = [x], []
        for i in range(len(self.blocks)):
            x, of_layer = layer(i, xs[-1])
            xs.append(x)
            left.append(of_layer)
        return xs, left

    def forward(
        self,
        tokens: Int[Array, "B T"],
        collect: tuple[int, ...] = (),
        *,
        logits_from: int = 0,
        in_head: bool = False,
    ) -> tuple[Float[Array, "B T1 V"] | Float[Array, "B T1 Vh"], Activations]:
        """Logits over a whole text from position 0, and y^l for each l in `collect`.

        y^l is the residual stream after layer l; y^0 is the embedding. Logits of the positions
        before `logits_from` are left out; with `in_head` they are those of `unembed_head`.
        """
        over_text = functools.partial(self._over_text, tokens)
        xs, _ = self.run(self.embed(tokens), lambda *layer: (over_text(*layer)[0], None))
        unembed = self.unembed_head if in_head else self.unembed
        return unembed(xs[-1][:, logits_from:]), tuple(xs[i] for i in collect)

    def prefill(
        self, tokens: Int[Array, "B T"], collect: tuple[int, ...] = ()
    ) -> tuple[Activations, list[KeysValues]]:
        """Activations as `forward`, and each layer's keys and values; no logits."""

        def kept(k: Array, v: Array) -> KeysValues:
            return stored(k, v, self.compute.dtype)

        over_text = functools.partial(self._over_text, tokens, kept=kept)
        xs, keys_values = self.run(self.embed(tokens), over_text)
        return tuple(xs[i] for i in collect), keys_values

    def _over_text(self, tokens, i: int, block: Block, x, kept=lambda k, v: (k, v)):
        positions = np.arange(x.shape[1])
        q, (k, v) = block.queries(x, positions), kept(*block.keys_values(x, positions))
        return self.within_text(i, q, k, v, tokens), (k, v)

    def within_text(
        self,
        i: int,
        q: Float[Array, "B T K G H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        tokens: Int[Array, "B T"],
    ) -> Float[Array, "B T K G H"]:
        """Attention of layer i within a whole text, whose tokens a mask may depend on."""
        at = np.arange(tokens.shape[1])
        return attention(q, k, v, at, at, self.views[i], compute=self.compute)[0]

    def extend(
        self,
        caches: Caches,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        collect: tuple[int, ...] = (),
        *,
        logits_from: int = 0,
    ) -> tuple[Float[Array, "B T1 V"], Activations, Caches]:
        """Process a few new tokens per row on top of a cache, at per-row positions in sequence.

        A token at position -1 is none: nothing is written for it and its logits are meaningless.
        Logits of the first `logits_from` tokens are left out.
        """

        def attend(i: int, block: Block, x: Array):
            q, cache = block.queries(x, positions), caches[i]
            cache = cache.append(positions, *block.keys_values(x, positions))
            return merge_attention(self.over_cache(i, q, cache, positions)), cache

        xs, left = self.run(self.embed(tokens), attend)
        return self.unembed(xs[-1][:, logits_from:]), tuple(xs[i] for i in collect), tuple(left)

    def over_cache(
        self,
        i: int,
        q: Float[Array, "B T K G H"],
        cache: LayerCache,
        positions: Int[Array, "B T"],
        *,
        include_self: bool = True,
    ) -> list[Attended]:
        """Attention of layer i over its cache, in parts that are one softmax."""
        view, compute = self.views[i], self.compute
        return [cache.attend(q, positions, view, compute, include_self=include_self)]

    def extend_prompt(
        self,
        caches: Caches,
        rows: Int[Array, " R"],
        tokens: Int[Array, "R T"],
        positions: Int[Array, "R T"],
        collect: tuple[int, ...] = (),
    ) -> tuple[Activations, Caches]:
        """Process the next T prompt tokens of some rows, whatever T is to a ring; no logits.

        Arguments as of `caches.read_then_append`; `collect` as of `forward`.
        """

        def attend(i: int, block: Block, x: Array):
            q, kv = block.queries(x, positions), block.keys_values(x, positions)
            return read_then_append(caches[i], rows, q, *kv, positions, self.views[i], self.compute)

        xs, left = self.run(self.embed(tokens), attend)
        return tuple(xs[i] for i in collect), tuple(left)


# --- modules as plain functions of parameters --------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """A module's structure, hashable and without arrays; parameters are passed to every use.

    ``model.bind(params)`` inside a jitted function gives the module back (`nnx.merge`).
    """

    module: Callable[..., nnx.Module]  # of (config, compute, rngs=) and the further arguments
    config: ModelConfig
    compute: Compute
    options: tuple[tuple[str, Any], ...] = ()  # further arguments of the module

    def _make(self, key: jax.Array) -> nnx.Module:
        return self.module(
            self.config, self.compute, rngs=nnx.Rngs(params=key), **dict(self.options)
        )

    @functools.cached_property
    def _abstract(self):
        return nnx.split(nnx.eval_shape(lambda: self._make(jax.random.key(0))))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters from a random key; jit with `out_shardings` to create them sharded."""
        return nnx.to_pure_dict(nnx.state(self._make(key)))

    def bind(self, params: Params) -> Any:
        """The module with these parameters."""
        return nnx.merge(self._abstract[0], params)

    def shapes(self) -> Params:
        """ShapeDtypeStructs of the parameters."""
        return nnx.to_pure_dict(self._abstract[1])

    def axes(self) -> Any:
        """Logical axes of the parameters, leaf by leaf."""
        flat = nnx.to_flat_state(self._abstract[1])
        out: dict[Any, Any] = {}
        for path, variable in flat:
            node = out
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = variable.axes
        return out

    def cast(self, params: Params) -> Params:
        """Parameters for decoding: matrices in the compute type, so that steps read no wider.

        Norm scales, biases without a sharded axis and SPIRe's memory mix stay float32.
        """
        dtype = self.compute.dtype
        return jax.tree.map(
            lambda axes, x: x.astype(dtype) if any(axes) else x,
            self.axes(),
            params,
            is_leaf=lambda x: type(x) is tuple,
        )

    @property
    def views(self) -> tuple[View, ...]:
        """What each layer sees."""
        return dict(self.options).get("views") or self.config.views()

    def count(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(self.shapes()))

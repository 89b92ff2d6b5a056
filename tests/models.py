"""Tiny models for tests: a target, drafts of every kind, and texts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from spire_jax.config.schema import ModelConfig
from spire_jax.decoding import Decoder, Weights
from spire_jax.drafting.anchor import AnchorOptions
from spire_jax.drafting.block import BlockOptions
from spire_jax.drafting.eagle3 import Eagle3Options
from spire_jax.drafting.longspec import LongSpecOptions
from spire_jax.drafting.magicdec import magicdec
from spire_jax.drafting.pruning import prune
from spire_jax.drafting.snapkv import snapkv
from spire_jax.drafting.spire import Spire, SpireDraft, initial_mix
from spire_jax.drafting.strategy import Strategy
from spire_jax.drafting.stride import StrideOptions
from spire_jax.drafting.vanilla import Vanilla
from spire_jax.models.attention import Compute
from spire_jax.models.caches import LayerCache
from spire_jax.models.sampling import Sampling
from spire_jax.models.transformer import Model, Params, Transformer

TINY = ModelConfig(
    n_layers=3, d_model=32, n_kv_heads=2, q_per_kv=2, d_head=8, d_ff=48, vocab_size=24, n_tokens=21
)
WINDOW, SINK = 6, 1
FUSED = (0, 2)  # activations that are fused
ANCHORS = (2, 9, 14)
HEAD_IDS = (0, 1, 2, 4, 5, 7, 10, 11, 12, 16, 18, 20)  # of TINY's 21 tokens


@dataclasses.dataclass(frozen=True)
class Pair:
    """A target and a draft with parameters."""

    target: Model
    target_params: Params
    strategy: Strategy
    draft_params: Params

    @property
    def weights(self) -> Weights:
        return Weights(self.target_params, self.draft_params)

    def decoder(self, k: int, temperature: float = 1.0, eos: int = -1, **sampling) -> Decoder:
        return Decoder(self.target, self.strategy, k, Sampling(temperature, **sampling), eos)

    def autoregressive(self, temperature: float = 1.0, eos: int = -1, **sampling) -> Decoder:
        return Decoder(self.target, None, 0, Sampling(temperature, **sampling), eos)


def init(model: Model, seed: int, sharpness: float = 1.0) -> Params:
    """Random parameters; `sharpness` scales the unembedding, so that distributions differ.

    Drawn by NumPy at the scales of the model's own initializers, which cost seconds of
    compilation; test_transformer.py holds the two against each other.
    """
    rng = np.random.default_rng(seed)
    sizes, options = model.config, dict(model.options)
    fan_in = {"out": sizes.n_kv_heads * sizes.q_per_kv * sizes.d_head, "down": sizes.d_ff}

    def draw(path, leaf):
        name = path[-1].key
        if name == "scale":
            value = np.ones(leaf.shape)
        elif name.endswith("_bias"):
            value = np.zeros(leaf.shape)
        elif name == "head_ids":
            value = np.arange(leaf.size)
        elif name == "memory_mix":
            memory, own = options.get("memory", "layers"), options.get("memory_init", 0.95)
            value = initial_mix(sizes.n_layers, memory, own)
        else:
            scale = fan_in.get(name, sizes.d_model) ** -0.5
            scale = {"embedding": 1.0, "unembedding": scale * sharpness}.get(name, scale)
            if name == "query" and sizes.scale_in_init:
                scale *= sizes.d_head**-0.5
            value = scale * rng.normal(size=leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.shapes())


@functools.cache
def target(config: ModelConfig = TINY, seed: int = 0) -> tuple[Model, Params]:
    model = Model(config.module(), config, Compute())
    return model, init(model, seed, sharpness=2.0)


@functools.cache
def pair(kind: str, config: ModelConfig = TINY) -> Pair:
    """kind: "spire", "spire_strict" (attend_self=False), "spire_plain" (no feedback),
    "spire_final", "spire_embedding" and "spire_fused" (other memories), "spire_dense" (no window),
    "spire_trimmed" (an unembedding of HEAD_IDS alone), "stride" (two tokens a pass, a Markov head),
    "stride_argmax" (its most likely tokens) and "stride_confident" (one a pass, which says how
    likely it is kept), "block" (five slots, a recurrent head and confidence) and "block_causal" (no
    head), "longspec", "anchor", "eagle3" and "eagle3_argmax", "vanilla"
    (another small model), "ring" (pruned, windowed, no activations), "self" (the target),
    "magicdec" (the target with a sparse cache), "snapkv" (... that attention selected)."""
    model, params = target(config)
    windowed = dataclasses.replace(config, window=WINDOW, sink=SINK, n_layers=2)
    if kind.startswith("spire"):
        memory = kind.removeprefix("spire_")
        options = {"attend_self": kind != "spire_strict", "feedback": kind != "spire_plain",
                   "memory": memory if memory in ("final", "embedding", "fused") else "layers",
                   } | ({"fused": FUSED} if memory == "fused" else {})  # fmt: skip
        if kind == "spire_dense":
            windowed = dataclasses.replace(windowed, window=0, sink=0)
        if kind == "spire_trimmed":
            windowed = dataclasses.replace(windowed, head_tokens=len(HEAD_IDS), tied=False)
        draft = Model(SpireDraft, windowed, Compute(), tuple(options.items()))
        fresh = init(draft, 1)
        if kind == "spire_trimmed":
            fresh["head_ids"] = jnp.asarray(HEAD_IDS, jnp.int32)
        draft_params = prune(params, fresh)
        return Pair(model, params, Spire(draft, config.n_layers), draft_params)
    if kind.startswith("stride"):
        of = StrideOptions(window=WINDOW, sink=SINK, stride=2, head="markov", head_rank=4,
                           draws="argmax" if kind == "stride_argmax" else "sampled")  # fmt: skip
        if kind == "stride_confident":
            of = StrideOptions(window=WINDOW, sink=SINK, confidence=True)
        strategy = of.strategy(config, Compute())
        return Pair(model, params, strategy, prune(params, init(strategy.model, 1)))
    if kind.startswith("block"):
        head, more = ("none", False) if kind == "block_causal" else ("recurrent", True)
        one_pass = BlockOptions(window=WINDOW, sink=SINK, k=5, head=head, head_rank=4,
                                bidirectional=more, confidence=more)  # fmt: skip
        strategy = one_pass.strategy(config, Compute())
        draft_params = prune(params, init(strategy.model, 1))
        if head != "none":  # that it is there must be seen in samples
            draft_params["head_out"] *= 8
        return Pair(model, params, strategy, draft_params)
    if kind == "anchor":
        anchor = AnchorOptions(anchors=ANCHORS, full_every=2, line=4, budget=2)
        strategy = anchor.strategy(config, Compute())
        return Pair(model, params, strategy, prune(params, init(strategy.model, 1)))
    if kind == "longspec":
        longspec = LongSpecOptions(window=WINDOW)
        strategy = longspec.strategy(config, Compute())
        lent = {name: params[name] for name in longspec.shared if name in params}
        return Pair(model, params, strategy, init(strategy.model, 1) | lent)
    if kind.startswith("eagle3"):
        eagle = Eagle3Options(window=WINDOW, sink=SINK, layers=tuple(range(1, config.n_layers + 1)),
                              draws="argmax" if kind == "eagle3_argmax" else "sampled")  # fmt: skip
        strategy = eagle.strategy(config, Compute())
        return Pair(model, params, strategy, eagle.initial(params, init(strategy.model, 1)))
    if kind == "magicdec":
        return Pair(model, params, magicdec(config, WINDOW, SINK, Compute()), params)
    if kind == "snapkv":
        return Pair(model, params, snapkv(config, 7, Compute(), observed=3), params)
    if kind == "self":
        return Pair(model, params, Vanilla(model), params)
    if kind == "ring":
        draft = Model(Transformer, windowed, Compute())
        return Pair(model, params, Vanilla(draft), prune(params, init(draft, 1)))
    assert kind == "vanilla"
    small = dataclasses.replace(config, n_layers=1, d_model=16, d_ff=24)
    draft = Model(Transformer, small, Compute())
    return Pair(model, params, Vanilla(draft), init(draft, 2, sharpness=2.0))


def caches_of(state) -> list[LayerCache]:
    """The layers' caches in a draft's state, or the target's."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, LayerCache))
    return [x for x in leaves if isinstance(x, LayerCache)]


def computed_by(attention: str, p: Pair) -> Pair:
    """The same pair, its attention computed by other code."""
    compute = Compute(attention=attention)
    model = dataclasses.replace(p.strategy.model, compute=compute)
    strategy = dataclasses.replace(p.strategy, model=model)
    return Pair(dataclasses.replace(p.target, compute=compute), p.target_params, strategy,
                p.draft_params)  # fmt: skip


def texts(rows: int, length: int, seed: int = 0, n_tokens: int = TINY.n_tokens) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n_tokens, (rows, length)).astype(np.int32)


def ragged(lengths, seed: int = 0, n_tokens: int = TINY.n_tokens) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, n_tokens, n).astype(np.int32) for n in lengths]

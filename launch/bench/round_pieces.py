"""The pieces of a speculation round that `round.py` times, and random values to run them on.

Each piece takes its buffers and gives them back changed, so that in a loop every pass depends on
the one before: caches are updated in place, and nothing is computed ahead of the loop.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from spire_jax.decoding import Decoder, DecodeState, Weights, speculation_round
from spire_jax.decoding.verification import VERIFICATIONS
from spire_jax.drafting.strategy import Processed, sampled
from spire_jax.models.sampling import round_keys, transformed_logits
from spire_jax.models.transformer import Model, Params

# --- random weights and caches, made where they stay --------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key: Array, shape: tuple[int, ...], dtype: Any, scale: float) -> Array:
    """Normal numbers of one standard deviation, made in their type."""
    return (scale * jax.random.normal(key, shape, dtype)).astype(dtype)


def random_like(structure: Any, seed: int, scale: Callable[[str], float]) -> Any:
    """Normal numbers in the shapes and types of `structure`, array by array on the device.

    `scale` gives the standard deviation from a leaf's name; integers are zero.
    """

    def draw(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        key = jax.random.fold_in(jax.random.key(seed), _checksum(name))
        return normal(key, leaf.shape, leaf.dtype, scale(name.rsplit(".", 1)[-1]))

    return jax.tree_util.tree_map_with_path(draw, structure)


def _checksum(name: str) -> int:
    return functools.reduce(lambda total, c: (total * 31 + ord(c)) % 2**31, name, 7)


def random_params(model: Model, seed: int) -> Params:
    """Parameters as `Model.cast` gives them, never wider on the way; activations of unit size."""
    c = model.config
    fan_in = {"out": c.n_kv_heads * c.q_per_kv * c.d_head, "down": c.d_ff, "embedding": 1}
    query = c.d_head**-0.5 if c.scale_in_init else 1.0

    def scale(name: str) -> float:
        return fan_in.get(name, c.d_model) ** -0.5 * (query if name == "query" else 1.0)

    return random_like(jax.eval_shape(model.cast, model.shapes()), seed, scale)


# --- the pieces of a round ----------------------------------------------------------------------

Buffers = dict[str, Any]


def run_round(decoder: Decoder, weights: Weights, i: Array, b: Buffers) -> Buffers:
    """A round of the decoder; the text stays as long as it is, its last token is the new one."""
    state = DecodeState(
        **b["text"], target_cache=b["target_cache"], draft_state=b.get("draft_state")
    )
    after = speculation_round(decoder, weights, state)
    rows, last = jnp.arange(after.lengths.shape[0]), state.lengths - 1
    text = {name: getattr(after, name) for name in b["text"]}
    text |= {
        "tokens": after.tokens.at[rows, last].set(after.tokens[rows, last + 1]),
        "lengths": state.lengths,
        "done": state.done,
    }
    caches = {name: getattr(after, name) for name in b if name != "text"}
    return {"text": text, **caches}


def run_draft_step(decoder: Decoder, weights: Weights, i: Array, b: Buffers) -> Buffers:
    """A step of the draft, at one depth after another."""
    assert decoder.strategy is not None
    token = _tokens(decoder, b["draft_logits"])[:, None]
    positions = (b["lengths"] - 1 + i % decoder.k)[:, None]
    logits, state = decoder.strategy.step(
        weights.draft, b["draft_state"], b["target_cache"], token, positions
    )
    return {**b, "draft_state": state, "draft_logits": logits}


def run_verification(decoder: Decoder, weights: Weights, i: Array, b: Buffers) -> Buffers:
    """The target's pass over a block of k + 1 tokens."""
    assert decoder.strategy is not None
    logits, activations, cache = decoder.target.bind(weights.target).extend(
        b["target_cache"], _tokens(decoder, b["logits"]), _positions(b), decoder.strategy.collect
    )
    return {**b, "target_cache": cache, "logits": logits, "activations": activations}


def run_sampling(decoder: Decoder, weights: Weights, i: Array, b: Buffers) -> Buffers:
    """From logits to drafted, accepted and following tokens, as a SPIRe round does it."""
    token = b["token"]

    def moved(logits: Array) -> Array:
        """The same distribution, so that no two passes and no two depths share it."""
        shift = 1e-6 * token.astype(jnp.float32)
        return logits + shift.reshape(-1, *(1,) * (logits.ndim - 1))

    keys = round_keys(b["seeds"], jnp.full_like(token, i))
    draw, drafts, qs = sampled(keys, decoder.sampling), [], []
    p = transformed_logits(moved(b["logits"]), decoder.sampling)
    for depth in range(decoder.k):
        token, q = draw(depth, moved(b["draft_logits"]))
        drafts.append(token)
        qs.append(q)
    accepted, following = VERIFICATIONS[decoder.verification](
        keys, jnp.stack(drafts, axis=1), jnp.stack(qs, axis=1), p
    )
    return {**b, "token": following + accepted}


def run_refresh(decoder: Decoder, weights: Weights, i: Array, b: Buffers) -> Buffers:
    """The draft's cached entries from the target's activations."""
    assert decoder.strategy is not None
    tokens = jnp.zeros(b["activations"][0].shape[:2], jnp.int32)
    moved = tuple(y + (i % 2).astype(y.dtype) for y in b["activations"])
    block = Processed(tokens, _positions(b), moved, b["target_cache"])
    return {**b, "draft_state": decoder.strategy.commit(weights.draft, b["draft_state"], block)}


def run_products(decoder: Decoder, weights: Weights, i: Array, b: Buffers) -> Buffers:
    """The weight products of the target's blocks, with nothing attended to."""
    x, positions = b["x"], _positions(b)
    for block in decoder.target.bind(weights.target).blocks:
        k, v = block.keys_values(x, positions)
        x = block.finish(x, block.queries(x, positions) + (k + v)[:, :, :, None])
    return {**b, "x": x / (1 + jnp.abs(x))}


def run_attention(decoder: Decoder, weights: Weights, i: Array, b: Buffers) -> Buffers:
    """The target's attention over its cache, all layers, into which each writes its new entries."""
    q, positions, caches = b["q"], _positions(b), []
    for cache, view in zip(b["target_cache"], decoder.target.views, strict=True):
        # Without new entries XLA would lay the keys and values out once, ahead of the loop.
        caches.append(cache.append(positions, q[:, :, :, 0], q[:, :, :, -1]))
        q, _ = caches[-1].attend(q, positions, view, decoder.target.compute)
    return {**b, "q": q, "target_cache": tuple(caches)}


def run_unembedding(decoder: Decoder, weights: Weights, i: Array, b: Buffers) -> Buffers:
    """The target's final norm and unembedding."""
    x = b["x"] + b["logits"][..., :1].astype(b["x"].dtype)
    return {**b, "logits": decoder.target.bind(weights.target).unembed(x)}


def run_copy(decoder: Decoder, weights: Weights, i: Array, b: Buffers) -> Buffers:
    """Reads and writes every byte of a large array."""
    return {"copied": b["copied"] + 1}


def run_product(decoder: Decoder, weights: Weights, i: Array, b: Buffers) -> Buffers:
    """A product of two large matrices."""
    return {**b, "product": jnp.matmul(b["product"], b["factor"])}


def _tokens(decoder: Decoder, logits: Array) -> Array:
    """Some valid tokens that depend on logits, without reading all of them."""
    bits = jax.lax.bitcast_convert_type(logits[..., 0], jnp.int32)
    return jnp.abs(bits // 8) % decoder.target.config.n_tokens


def _positions(b: Buffers) -> Array:
    return b["lengths"][:, None] - 1 + jnp.arange(b["block"].shape[1])


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def repeat(body, decoder: Decoder, weights: Weights, buffers: Buffers, times: Array) -> Buffers:
    """`times` passes of a piece, one after the other; `buffers` are donated."""
    return jax.lax.fori_loop(0, times, lambda i, b: body(decoder, weights, i, b), buffers)

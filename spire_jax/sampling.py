"""Logits -> the distribution that is sampled from -> a token; one path for draft and target.

The order of transforms is temperature, then top-k, then top-p, always in float32, so that the
draft's q and the target's p are the distributions that tokens really come from. What is passed on
are transformed *logits*: most of a distribution over the vocabulary is never asked for. Greedy
decoding is the limit temperature -> 0: a one-hot distribution, for which token verification
accepts exactly the argmax and nothing else needs to change.
"""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How logits become a distribution; static under jit."""

    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off


def transformed_logits(
    logits: Float[Array, "*rows V"], sampling: Sampling
) -> Float[Array, "*rows V"]:
    """Float32 logits of the distribution that is sampled from, -inf where it is 0.

    Ties at the top-k boundary are broken towards the lower token id; top-p keeps the smallest
    set of most likely tokens whose probability reaches `top_p` (at least one). Nothing is sorted
    unless one of the two asks for it.
    """
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
    logits = logits / sampling.temperature
    keep_k = 0 < sampling.top_k < logits.shape[-1]
    if not keep_k and sampling.top_p >= 1:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if keep_k:
        ranked = jnp.where(jnp.arange(logits.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
    if sampling.top_p < 1:
        p = jax.nn.softmax(ranked)
        before = jnp.cumsum(p, axis=-1) - p
        ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def probabilities(logits: Float[Array, "*rows V"], sampling: Sampling) -> Float[Array, "*rows V"]:
    """The transformed distribution, float32."""
    return jax.nn.softmax(transformed_logits(logits, sampling))


def probability_of(
    logits: Float[Array, "*rows V"], tokens: Int[Array, "*rows"], sampling: Sampling
) -> Float[Array, "*rows"]:
    """`probabilities` of one token per row; no distribution is written."""
    return share_of(transformed_logits(logits, sampling), tokens)


def share_of(logits: Float[Array, "*rows V"], tokens: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """softmax(logits) of one token per row."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))


def sample(keys: Key[Array, " B"], logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """One token per row from softmax(logits), one key per row; a logit of -inf is never drawn.

    First a run of about sqrt(V) tokens, by its share, then a token of it: two draws of sqrt(V)
    random numbers instead of V, which would be most of a round's sampling.
    """
    rows, size = logits.shape
    width = math.isqrt(size - 1) + 1
    runs = jnp.pad(logits, ((0, 0), (0, -size % width)), constant_values=-jnp.inf)
    runs = runs.reshape(rows, -1, width)
    draw = jax.vmap(jax.random.categorical)
    run = draw(stream(keys, "run"), jax.nn.logsumexp(runs, axis=-1))
    inside = jnp.take_along_axis(runs, run[:, None, None], axis=1)[:, 0]
    return (run * width + draw(stream(keys, "token"), inside)).astype(jnp.int32)


def stream(keys: Key[Array, " B"], name: str) -> Key[Array, " B"]:
    """The named stream of each row's round key; every use of randomness has a name of its own."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def round_keys(seeds: Key[Array, " B"], rounds: Int[Array, " B"]) -> Key[Array, " B"]:
    """Each request's key for its own next round (method.md section 4, keys)."""
    return jax.vmap(jax.random.fold_in)(seeds, rounds)

"""Logits -> the distribution that is sampled from -> a token; one path for draft and target.

The order of transforms is temperature, then top-k, then top-p, always in float32, so that the
draft's q and the target's p are the distributions that tokens really come from. Greedy decoding
is the limit temperature -> 0: a one-hot distribution, for which token verification accepts
exactly the argmax and nothing else needs to change.
"""

import dataclasses
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


def probabilities(logits: Float[Array, "*rows V"], sampling: Sampling) -> Float[Array, "*rows V"]:
    """The transformed distribution, float32; tokens with logit -inf have probability 0.

    Ties at the top-k boundary are broken towards the lower token id; top-p keeps the smallest
    set of most likely tokens whose probability reaches `top_p` (at least one).
    """
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    logits = logits / sampling.temperature
    keep_k = 0 < sampling.top_k < logits.shape[-1]
    if not keep_k and sampling.top_p >= 1:
        return jax.nn.softmax(logits)
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if keep_k:
        ranked = jnp.where(jnp.arange(logits.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
    p = jax.nn.softmax(ranked)
    if sampling.top_p < 1:
        before = jnp.cumsum(p, axis=-1) - p
        p = jnp.where(before < sampling.top_p, p, 0.0)
        p = p / jnp.sum(p, axis=-1, keepdims=True)
    return jnp.take_along_axis(p, jnp.argsort(order, axis=-1), axis=-1)


def probability_of(
    logits: Float[Array, "*rows V"], tokens: Int[Array, "*rows"], sampling: Sampling
) -> Float[Array, "*rows"]:
    """`probabilities` of one token per row; without a truncation no distribution is written."""
    plain = sampling.temperature > 0 and sampling.top_k == 0 and sampling.top_p >= 1
    if not plain:
        p = probabilities(logits, sampling)
        return jnp.take_along_axis(p, tokens[..., None], axis=-1)[..., 0]
    logits = logits.astype(jnp.float32) / sampling.temperature
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))


def sample(keys: Key[Array, " B"], p: Float[Array, "B V"]) -> Int[Array, " B"]:
    """One token per row from probabilities `p`, one key per row; probability 0 is never drawn."""
    return jax.vmap(lambda key, row: jax.random.categorical(key, jnp.log(row)))(keys, p)


def stream(keys: Key[Array, " B"], name: str) -> Key[Array, " B"]:
    """The named stream of each row's round key; every use of randomness has a name of its own."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def round_keys(seeds: Key[Array, " B"], rounds: Int[Array, " B"]) -> Key[Array, " B"]:
    """Each request's key for its own next round (method.md section 4, keys)."""
    return jax.vmap(jax.random.fold_in)(seeds, rounds)

"""Logits -> the distribution that is sampled from -> a token; one path for draft and target.

The order of transforms is temperature, then top-k, then top-p, always in float32, so that the
draft's q and the target's p are the distributions that tokens really come from. What is passed on
are transformed *logits*: most of a distribution over the vocabulary is never asked for. Greedy
decoding is the limit temperature -> 0: a one-hot distribution, for which token verification
accepts exactly the argmax and nothing else needs to change.

Logits with a nan or an inf among them, or with nothing but -inf, are of no distribution. Every
transform of them is none either, and the token that is drawn is NO_TOKEN.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key, UInt32

from spire_jax.models.sharding import RULES

NO_TOKEN = -1  # drawn where there is no distribution
GREEDY = 1e-5  # temperatures below it are greedy, as in vLLM: logits are not known any better
HOTTEST = 1e30  # higher ones are this: 1 / temperature stays a normal float32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How logits become a distribution; static under jit."""

    temperature: float = 1.0  # 0, and all below GREEDY: greedy
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
    logits, rank = logits.astype(jnp.float32), jnp.arange(logits.shape[-1])
    if sampling.temperature < GREEDY:
        best = rank == jnp.argmax(logits, axis=-1, keepdims=True)  # the first nan, if there is one
        top = jnp.sum(jnp.where(best, logits, 0.0), axis=-1, keepdims=True)
        return jnp.where(best, jnp.where(jnp.isfinite(top), 0.0, jnp.nan), -jnp.inf)
    keep_k = 0 < sampling.top_k < logits.shape[-1]
    keep_p = np.float32(sampling.top_p) < 1
    if sampling.temperature == 1 and not keep_k and not keep_p:
        return logits
    # Less the highest, so that no quotient overflows; inf less inf is nan.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / min(sampling.temperature, HOTTEST)
    if not keep_k and not keep_p:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    # A nan comes last, where it would be cut. (XLA's CPU may lose it in the highest.)
    ranked = jnp.where(jnp.isnan(ranked[..., -1:]), jnp.nan, ranked)
    if keep_k:
        ranked = jnp.where(rank < sampling.top_k, ranked, -jnp.inf)
    if keep_p:
        p = jax.nn.softmax(ranked)
        before = jnp.cumsum(p, axis=-1) - p
        # The first by its rank: a tiny top_p is 0 in float32.
        ranked = jnp.where((before < sampling.top_p) | (rank == 0), ranked, -jnp.inf)
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

    NO_TOKEN for a row whose logits are of no distribution.

    First a run of about sqrt(V) tokens, by its share, then a token of it: two draws of sqrt(V)
    random numbers instead of V, which would be most of a round's sampling. Where a mesh splits the
    vocabulary, devices exchange the runs' shares and the run drawn, never the logits.
    """
    width = math.isqrt(logits.shape[1] - 1) + 1
    draw = jax.vmap(jax.random.categorical)
    shares = _shares(logits, width)
    run = draw(stream(keys, "run"), shares)
    inside = _run_of(logits, run, width)
    token = (run * width + draw(stream(keys, "token"), inside)).astype(jnp.int32)
    return jnp.where(jnp.isfinite(jax.nn.logsumexp(shares, axis=-1)), token, NO_TOKEN)


def _shares(logits: Float[Array, "B V"], width: int) -> Float[Array, "B runs"]:
    """The log-sum-exp of each run of `width` tokens."""
    if not _split(logits):
        return jax.nn.logsumexp(_runs(logits, width), axis=-1)

    def of_devices(part, ids):
        runs, first = _own_runs(part, ids, width)
        mine = jnp.full((part.shape[0], n_runs + runs.shape[1]), -jnp.inf)
        mine = jax.lax.dynamic_update_slice(mine, jax.nn.logsumexp(runs, axis=-1), (0, first))
        mine = mine[:, :n_runs]
        # Exactly one device's share where a run is one's alone; only runs at its ends are not.
        top = jax.lax.pmax(mine, _VOCAB)
        finite = jnp.where(jnp.isfinite(top), top, 0.0)
        return jnp.log(jax.lax.psum(jnp.exp(mine - finite), _VOCAB)) + finite

    n_runs = -(-logits.shape[1] // width)
    return _on_vocabulary(of_devices)(logits, jnp.arange(logits.shape[1]))


def _run_of(
    logits: Float[Array, "B V"], run: Int[Array, " B"], width: int
) -> Float[Array, "B width"]:
    """The logits of one run per row."""

    def take(runs, at):
        return jnp.take_along_axis(runs, at[:, None, None], axis=1)[:, 0]

    if not _split(logits):
        return take(_runs(logits, width), run)

    def of_devices(part, ids, run):
        runs, first = _own_runs(part, ids, width)
        at = run - first
        own = (at >= 0) & (at < runs.shape[1])
        mine = take(runs, jnp.where(own, at, 0))
        return jax.lax.pmax(jnp.where(own[:, None], mine, -jnp.inf), _VOCAB)

    return _on_vocabulary(of_devices, 1)(logits, jnp.arange(logits.shape[1]), run)


def _runs(logits: Float[Array, "B V"], width: int) -> Float[Array, "B runs width"]:
    padding = ((0, 0), (0, -logits.shape[1] % width))
    return jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(len(logits), -1, width)


# --- a vocabulary that a mesh splits -----------------------------------------------------------
# XLA by itself gathers the logits: runs seldom end where a device's share does.

_VOCAB = RULES["vocab"]


def _split(logits: Float[Array, "B V"]) -> bool:
    devices = jax.sharding.get_abstract_mesh().shape.get(_VOCAB, 1)
    return devices > 1 and logits.shape[1] % devices == 0


def _on_vocabulary(function: Callable[..., Array], others: int = 0) -> Callable[..., Array]:
    """`function` of each device's share of (logits, token ids), and of `others` whole arrays."""
    specs = PartitionSpec(None, _VOCAB), PartitionSpec(_VOCAB), *(PartitionSpec(),) * others
    return jax.shard_map(
        function, in_specs=specs, out_specs=PartitionSpec(), axis_names={_VOCAB}, check_vma=False
    )


def _own_runs(
    part: Float[Array, "B W"], ids: Int[Array, " W"], width: int
) -> tuple[Float[Array, "B runs width"], Int[Array, ""]]:
    """The runs that a device's share of the logits has tokens of, and which the first one is."""
    first, shift = ids[0] // width, ids[0] % width
    n_runs = -(-(width - 1 + part.shape[1]) // width)
    room = jnp.full((part.shape[0], n_runs * width), -jnp.inf)
    room = jax.lax.dynamic_update_slice(room, part, (0, shift))
    return room.reshape(part.shape[0], n_runs, width), first


# --- random keys -------------------------------------------------------------------------------


def seed_words(seed: int | np.integer) -> UInt32[np.ndarray, "2"]:
    """The high and the low word of a seed of 64 bits; of a negative one, its two's complement."""
    return np.array(divmod(int(seed) % 2**64, 2**32), np.uint32)


def seed_keys(words: UInt32[np.ndarray | Array, "*rows 2"]) -> Key[Array, "*rows"]:
    """The keys of seeds, from their words: other words, other keys.

    `jax.random.key` keeps the low word alone, unless all of JAX computes in 64 bits.
    """
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def stream(keys: Key[Array, " B"], name: str) -> Key[Array, " B"]:
    """The named stream of each row's round key; every use of randomness has a name of its own."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def round_keys(seeds: Key[Array, " B"], rounds: Int[Array, " B"]) -> Key[Array, " B"]:
    """Each request's key for its own next round (method.md section 4, keys)."""
    return jax.vmap(jax.random.fold_in)(seeds, rounds)

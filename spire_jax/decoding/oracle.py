"""The oracle: tau, tau(k) and acceptance by depth without speculating (method.md 4.1).

If token verification emits x, the drafted token was accepted with probability exactly
min(1, q(x) / p(x)). So, along autoregressive samples of the target, teacher-forcing the draft
from every start gives those probabilities, and a dynamic program over start positions gives the
exact expectation over all the ways in which speculation could have produced the same text: the
same samples serve every draft, and the only noise left is that of the samples.

Block verification has such an evaluation too. It keeps at least the first i drafted tokens x with
probability b_i(x), so that P(at least i kept | the text is y) = b_i(y) prod_{l<=i} q(y_l) / p(y_l):
what is drafted, kept and followed by the target's own distribution, over what the target writes.
With w_i the product, b_i w_i = min(w_i, b_{i-1} w_{i-1}), hence min(1, w_1, .., w_i).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spire_jax.drafting.strategy import Strategy
from spire_jax.models.caches import Caches
from spire_jax.models.records import record
from spire_jax.models.sampling import Sampling, probability_of
from spire_jax.models.transformer import Model, Params


@dataclasses.dataclass(frozen=True)
class RoundStatistics:
    """Expectations over the rounds of each text; tau for depth k is lengths / rounds, summed."""

    lengths_by_k: Float[np.ndarray, "n k"]  # emitted tokens with depth 1 .. k
    rounds_by_k: Float[np.ndarray, "n k"]  # rounds with depth 1 .. k
    reached: Float[np.ndarray, "n k"]  # rounds of depth k in which depth d was tested
    accepted: Float[np.ndarray, "n k"]  # ... and passed


@record("sinks", "begin", "end")
@dataclasses.dataclass(frozen=True)
class TargetAlong:
    """One pass of the target along its own samples; it serves every draft."""

    p: Float[Array, "B O"]  # probability of each token after the context
    activations: dict[int, Float[Array, "B M D"]]  # y^l by l, at the positions `read`
    cache: Caches  # over the text
    sinks: int
    begin: int
    end: int

    @property
    def read(self) -> Int[np.ndarray, " M"]:
        return _read(self.sinks, self.begin, self.end)


def _read(sinks: int, begin: int, end: int) -> Int[np.ndarray, " M"]:
    """The first `sinks` positions, and `begin` to `end`."""
    return np.r_[: min(sinks, begin), begin:end]


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def target_along(
    target: Model,
    params: Params,
    cache: Caches,
    tokens: Int[Array, "B T"],
    context_length: int,
    strategies: tuple[Strategy, ...],
    sampling: Sampling,
) -> TargetAlong:
    """The target's probabilities of the tokens after a context, and what the drafts read of it.

    Args:
        cache: the target's, as sampling left it: it spares the pass most of the context.
        tokens: the sampled texts.
        strategies: of all drafts that the result is to serve.
    """
    first, end = context_length - 1, tokens.shape[1] - 1
    reads = [(0, first), *(strategy.reads(first) for strategy in strategies)]
    collect = tuple(sorted({layer for strategy in strategies for layer in strategy.collect}))
    sinks, begin = max(sinks for sinks, _ in reads), min(begin for _, begin in reads)
    read = _read(sinks, begin, end)
    positions = jnp.tile(read, (tokens.shape[0], 1))
    logits, activations, cache = target.bind(params).extend(
        cache, tokens[:, read], positions, collect, logits_from=len(read) - (end - first)
    )
    p = probability_of(logits, tokens[:, context_length:], sampling)
    of_layers = dict(zip(collect, activations, strict=True))
    return TargetAlong(p, of_layers, cache, sinks, begin, end)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def ratios_along(
    strategy: Strategy,
    params: Params,
    tokens: Int[Array, "B T"],
    along: TargetAlong,
    context_length: int,
    output_length: int,
    k: int,
    sampling: Sampling,
) -> Float[Array, "B R k"]:
    """q / p of the token that depth j of a round starting at each output position would emit.

    Args:
        params: the draft's.
        tokens: texts of context + output + k - 1 tokens, sampled from the target.
        along: the target's pass over them, made for this strategy among others.

    Returns:
        q(x) / p(x) for x the token j + 1 after start r: start 0 is the context's last token,
        R = output_length.
    """
    needed = context_length + output_length + k - 1
    if tokens.shape[1] != needed:
        raise ValueError(f"the oracle needs texts of {needed} tokens, not {tokens.shape[1]}")
    starts = np.arange(context_length - 1, context_length - 1 + output_length)
    activations = tuple(along.activations[layer] for layer in strategy.collect)
    q = strategy.along(params, tokens, activations, along.cache, along.read, starts, k, sampling)
    p = along.p[:, starts[:, None] + np.arange(k) - starts[0]]
    # Where the draft has no distribution, nothing that it drafts is kept.
    q = jnp.where(jnp.isnan(q), 0.0, q)
    # A sampled token has p > 0, but another pass may round it to 0.
    return q / jnp.maximum(p, jnp.finfo(jnp.float32).tiny)


def kept_at_least(
    ratios: Float[np.ndarray, "n R k"], verification: str = "token"
) -> Float[np.ndarray, "n R k"]:
    """P(a round keeps at least 1 .. k tokens | the text), from q / p of the text's tokens."""
    with np.errstate(divide="ignore"):
        logs = np.log(np.asarray(ratios, np.float64))
    if verification == "token":
        return np.exp(np.cumsum(np.minimum(logs, 0.0), axis=2))
    return np.exp(np.minimum(np.minimum.accumulate(np.cumsum(logs, axis=2), axis=2), 0.0))


def round_statistics(
    ratios: Float[np.ndarray, "n R k"], verification: str = "token"
) -> RoundStatistics:
    """The exact distribution of rounds along each text, by dynamic programming over starts.

    A round starting at r with depth k keeps exactly i tokens with probability
    P(at least i) - P(at least i + 1) (the second 0 after i = k) and hands over to start r + i + 1.
    Rounds start while output is left; the last one counts i + 1 even if the budget cuts it.
    """
    passes = kept_at_least(ratios, verification)
    n, starts, most = passes.shape
    tests = np.concatenate([np.ones((n, starts, 1)), passes[:, :, :-1]], axis=2)
    # For every depth at once: P(exactly i accepted), i = 0 .. k.
    exactly = np.zeros((n, starts, most, most + 1))
    for k in range(1, most + 1):
        exactly[:, :, k - 1, :k] = tests[:, :, :k] - passes[:, :, :k]
        exactly[:, :, k - 1, k] = passes[:, :, k - 1]
    begins = np.zeros((n, starts + most + 1, most))  # P(a round starts at r), by depth
    begins[:, 0] = 1
    for r in range(starts):
        handed_over = begins[:, r, :, None] * exactly[:, r]
        begins[:, r + 1 : r + most + 2] += handed_over.swapaxes(1, 2)
    begins = begins[:, :starts]
    rounds = begins.sum(axis=1)
    reached = np.einsum("nrk,nrd->nkd", begins, tests)
    accepted = np.einsum("nrk,nrd->nkd", begins, passes)
    within = np.tril(np.ones((most, most)))  # depth d <= k
    lengths = rounds + (accepted * within).sum(axis=2)
    return RoundStatistics(lengths, rounds, reached[:, -1], accepted[:, -1])

"""The oracle: tau, tau(k) and acceptance by depth without speculating (method.md 4.1).

If token verification emits x, the drafted token was accepted with probability exactly
min(1, q(x) / p(x)). So, along autoregressive samples of the target, teacher-forcing the draft
from every start gives those probabilities, and a dynamic program over start positions gives the
exact expectation over all the ways in which speculation could have produced the same text: the
same samples serve every draft, and the only noise left is that of the samples.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spire_jax.drafting import Strategy
from spire_jax.models.transformer import Model, Params
from spire_jax.records import record
from spire_jax.sampling import Sampling, probability_of


@dataclasses.dataclass(frozen=True)
class RoundStatistics:
    """Expectations over the rounds of each text; tau for depth k is lengths / rounds, summed."""

    lengths_by_k: Float[np.ndarray, "n k"]  # emitted tokens with depth 1 .. k
    rounds_by_k: Float[np.ndarray, "n k"]  # rounds with depth 1 .. k
    reached: Float[np.ndarray, "n k"]  # rounds of depth k in which depth d was tested
    accepted: Float[np.ndarray, "n k"]  # ... and passed


@record()
@dataclasses.dataclass(frozen=True)
class TargetAlong:
    """One forward pass of the target along its own samples; it serves every draft."""

    p: Float[Array, "B O"]  # probability of each token after the context
    activations: dict[int, Float[Array, "B T1 D"]]  # y^l by l, of all tokens but the last


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def target_along(
    target: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    context_length: int,
    collect: tuple[int, ...],
    sampling: Sampling,
) -> TargetAlong:
    """The target's probabilities of the tokens after a context, and the activations `collect`."""
    first = context_length - 1
    logits, activations = target.bind(params).forward(tokens[:, :-1], collect, logits_from=first)
    p = probability_of(logits, tokens[:, context_length:], sampling)
    return TargetAlong(p, dict(zip(collect, activations, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def acceptance_along(
    strategy: Strategy,
    params: Params,
    tokens: Int[Array, "B T"],
    along: TargetAlong,
    context_length: int,
    output_length: int,
    k: int,
    sampling: Sampling,
) -> Float[Array, "B R k"]:
    """Probability that depth j of a round starting at each output position is accepted.

    Args:
        params: the draft's.
        tokens: texts of context + output + k - 1 tokens, sampled from the target.
        along: the target's pass over them, with the activations that the strategy reads.

    Returns:
        min(1, q(x) / p(x)) for x the token j + 1 after start r: start 0 is the context's last
        token, R = output_length.
    """
    needed = context_length + output_length + k - 1
    if tokens.shape[1] != needed:
        raise ValueError(f"the oracle needs texts of {needed} tokens, not {tokens.shape[1]}")
    starts = np.arange(context_length - 1, context_length - 1 + output_length)
    activations = tuple(along.activations[layer] for layer in strategy.collect)
    q = strategy.probabilities_along(params, tokens, activations, starts, k, sampling)
    p = along.p[:, starts[:, None] + np.arange(k) - starts[0]]
    # A sampled token has p > 0; where another pass rounds it to 0, q / p is taken as 1 at most.
    return jnp.minimum(1.0, q / jnp.maximum(p, jnp.finfo(jnp.float32).tiny))


def round_statistics(acceptance: Float[np.ndarray, "n R k"]) -> RoundStatistics:
    """The exact distribution of rounds along each text, by dynamic programming over starts.

    A round starting at r with depth k accepts exactly i tokens with probability
    a_1 .. a_i (1 - a_{i+1}) (no factor after i = k) and hands over to start r + i + 1. Rounds
    start while output is left; the last one counts i + 1 even if the budget cuts it.
    """
    a = np.asarray(acceptance, np.float64)
    depths = a.shape[2]
    lengths, rounds = np.zeros((a.shape[0], depths)), np.zeros((a.shape[0], depths))
    for k in range(1, depths + 1):
        lengths[:, k - 1], rounds[:, k - 1], reached, accepted = _rounds(a[:, :, :k])
    return RoundStatistics(lengths, rounds, reached, accepted)


def _rounds(a: Float[np.ndarray, "n R k"]):
    n, starts, k = a.shape
    begins = np.zeros((n, starts + k + 1))
    begins[:, 0] = 1
    reached, accepted = np.zeros((n, k)), np.zeros((n, k))
    for r in range(starts):
        weight = begins[:, r, None]
        passes = np.cumprod(a[:, r], axis=1)  # P(at least 1 .. k accepted)
        tests = np.concatenate([np.ones((n, 1)), passes[:, :-1]], axis=1)
        exactly = np.concatenate([tests - passes, passes[:, -1:]], axis=1)  # 0 .. k accepted
        reached += weight * tests
        accepted += weight * passes
        begins[:, r + 1 : r + k + 2] += weight * exactly
    rounds = begins[:, :starts].sum(axis=1)
    return rounds + accepted.sum(axis=1), rounds, reached, accepted

"""How many tokens a round emits, by depth and context: what a cost model divides time by.

Acceptance is measured at a few contexts and for every depth; traffic has contexts of its own. No
jax here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq

from spire_jax.config.schema import ConfigError

Tau: TypeAlias = float | Mapping[int, float]  # the same at every context, or by context


def shares(measured: Sequence[int], contexts: Sequence[float]) -> Float[np.ndarray, " L"]:
    """What each measured context, ascending, counts for in the mean over requests of `contexts`.

    Between two measured ones acceptance is taken to change evenly with the logarithm of the
    context, before the first and after the last not at all.
    """
    if len(measured) == 1:
        return np.ones(1)
    at = np.interp(np.log(contexts), np.log(measured), np.arange(len(measured)))
    low = np.minimum(at.astype(int), len(measured) - 2)
    counts = np.zeros(len(measured))
    np.add.at(counts, low, 1 - (at - low))
    np.add.at(counts, low + 1, at - low)
    return counts / len(contexts)


def at_context(tau: Tau, context: float) -> float:
    """Tokens per round at a context, of what is given or was measured."""
    if isinstance(tau, float | int):
        return tau
    measured = sorted(tau)
    return float(shares(measured, [context]) @ np.array([tau[n] for n in measured]))


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """A draft's average generation lengths."""

    contexts: tuple[int, ...]  # those that were measured, ascending
    # Tokens per round of depth 1 .. k; first as measured, then of every resample of documents.
    tau: Float[np.ndarray, "resamples L k"]

    @property
    def deepest(self) -> int:
        return self.tau.shape[2]

    def at(self, k: int, contexts: Sequence[float]) -> Float[np.ndarray, " resamples"]:
        """tau of rounds of k, the mean over requests of these contexts."""
        return self.tau[:, :, k - 1] @ shares(self.contexts, contexts)

    def survival(self) -> Float[np.ndarray, "resamples L k"]:
        """The part of the rounds that keeps a drafted token of each depth."""
        return np.diff(self.tau, axis=2, prepend=1.0)

    def raised(self, exponents: Float[np.ndarray, " L"]) -> "Acceptance":
        """As if each token were accepted with this power of its probability, by context.

        That is how a draft's measured shape is carried over to a pair with another acceptance.
        """
        kept = np.clip(self.survival(), 0.0, 1.0) ** exponents[:, None]
        return dataclasses.replace(self, tau=1 + np.cumsum(kept, axis=2))

    def exponents_for(self, tau: float, k: int) -> Float[np.ndarray, " L"]:
        """The powers at which rounds of k emit `tau` tokens at every context.

        Raises:
            ConfigError: no power does.
        """
        survival = np.clip(self.survival()[0, :, :k], 0.0, 1.0)
        if not 1 < tau < k + 1 or not np.all((survival > 0) & (survival < 1)):
            raise ConfigError(f"acceptance cannot be scaled to tau={tau:g}, which must lie between "
                              f"1 and k + 1 = {k + 1}")  # fmt: skip
        return np.array([
            brentq(lambda x, s=s: 1 + np.sum(s**x) - tau, 1e-6, 1e6) for s in survival
        ])  # fmt: skip

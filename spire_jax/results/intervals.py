"""Bootstrap intervals of tau, a ratio of sums over documents; differences are paired."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

Interval = tuple[float, float] | None
PerDocument = Float[np.ndarray, " documents"]


def mean_generation_length(emitted: Any, rounds: Any, axis: int | None = None) -> Any:
    """`tau`: tokens emitted over rounds, each summed (method.md section 4); nan without a round."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sum(emitted, axis=axis) / np.sum(rounds, axis=axis)


def ratio_interval(numerator: PerDocument, denominator: PerDocument, *, resamples: int) -> Interval:
    """95% bootstrap interval of sum(numerator) / sum(denominator), over documents.

    Both arrays hold one sum per document, so that contexts of one text stay together. None with
    a single document: it says nothing about the spread between documents.
    """
    return _bootstrap((numerator, denominator), mean_generation_length, resamples)


def difference_interval(
    a: tuple[PerDocument, PerDocument], b: tuple[PerDocument, PerDocument], *, resamples: int
) -> Interval:
    """95% bootstrap interval of ratio(a) - ratio(b), both over the same resampled documents.

    `a` and `b` are (numerator, denominator); row i of all four arrays is the same document.
    None with a single document.
    """

    def difference(an: Any, ad: Any, bn: Any, bd: Any, axis: int) -> Any:
        return mean_generation_length(an, ad, axis) - mean_generation_length(bn, bd, axis)

    return _bootstrap((*a, *b), difference, resamples)


def _bootstrap(
    arrays: Sequence[PerDocument], statistic: Callable[..., Any], resamples: int
) -> Interval:
    documents = len(arrays[0])
    if documents < 2:
        return None
    # A fixed seed: every method sees the same resampled documents. The percentile interval
    # (not BCa) also holds for identical documents, and costs no jackknife over 65,536 of them.
    import scipy.stats  # half a second, which decoding need not wait for

    found = scipy.stats.bootstrap(
        arrays, statistic, n_resamples=resamples, batch=max(1, 2**22 // documents),
        vectorized=True, paired=True, confidence_level=0.95, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)

"""Combinations of settings: every pair of values in the fast tier, all of them in --full."""

import itertools
from typing import Any

import pytest
from allpairspy import AllPairs


def combinations(**values: list[Any]) -> list[Any]:
    """Parameters, each a dict: a pairwise cover, then the rest of the product, marked slow."""
    cover = [tuple(case) for case in AllPairs(list(values.values()))]
    rest = sorted(set(itertools.product(*values.values())) - set(cover), key=str)
    marked = [(case, ()) for case in cover] + [(case, pytest.mark.slow) for case in rest]
    return [
        pytest.param(dict(zip(values, case, strict=True)), id="-".join(map(str, case)), marks=marks)
        for case, marks in marked
    ]


def cycle(values: list[Any], case: dict[str, Any]) -> Any:
    """One of `values`, fixed by the case but unrelated to any one of its settings."""
    return values[sum(ord(c) * (i + 7) for i, c in enumerate(str(case))) % len(values)]

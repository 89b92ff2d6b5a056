"""Combinations of settings: every value in the fast tier, the whole product in --full."""

import itertools
from typing import Any

import pytest


def combinations(**values: list[Any]) -> list[Any]:
    """Parameters, each a dict: a few in which every value comes up, then the rest, marked slow."""
    few = [
        tuple(of[(i + i // len(of)) % len(of)] for of in values.values())
        for i in range(max(map(len, values.values())))
    ]
    rest = sorted(set(itertools.product(*values.values())) - set(few), key=str)
    marked = [(case, ()) for case in few] + [(case, pytest.mark.slow) for case in rest]
    return [
        pytest.param(dict(zip(values, case, strict=True)), id="-".join(map(str, case)), marks=marks)
        for case, marks in marked
    ]


def cycle(values: list[Any], case: dict[str, Any]) -> Any:
    """One of `values`, fixed by the case but unrelated to any one of its settings."""
    return values[sum(ord(c) * (i + 7) for i, c in enumerate(str(case))) % len(values)]

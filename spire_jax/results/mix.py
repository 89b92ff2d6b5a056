"""A traffic mix: what a server decodes, in cells of a batch size and the lengths of its requests.

    {"cells": [
      {"share": 0.5, "batch": 64, "context": 512},
      {"share": 0.3, "batch": 64, "context": {"uniform": [32, 4096]}},
      {"share": 0.1, "batch": 64, "context": {"bimodal": [32, 4096], "long": 0.25}},
      {"share": 0.1, "batch": 8, "context": {"zipf": [32, 8192], "exponent": 1.2}}
    ]}

`share` is the cell's part of the generated tokens; `context` the tokens that a request has when a
round starts: one number, or how they are spread over the requests of *one* batch. `{"requests":
"lengths.jsonl"}` takes real ones, a line each: a number, or an object with "tokens".
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import numpy as np

from spire_jax.config.checks import ConfigError, check
from spire_jax.config.values import known, parse_json

LENGTHS = 64  # a spread is stood for by so many lengths, of equally many requests each


@dataclasses.dataclass(frozen=True)
class Cell:
    """A part of the traffic."""

    share: float  # of all generated tokens
    batch: int  # requests that are decoded together
    contexts: tuple[float, ...]  # their lengths, by turns
    name: str


def read_mix(path: pathlib.Path, longest: int = 0) -> tuple[Cell, ...]:
    """The cells of a mix.

    Raises:
        ConfigError: a file that is none, shares that do not sum to 1, or a context beyond the
            `longest` that the model takes (0: no limit); names the cell and the remedy.
    """
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--mix={path} cannot be read as JSON: {error}") from None
    if not isinstance(values, Mapping) or not isinstance(values.get("cells"), list):
        raise ConfigError(f'--mix={path} has no list of cells: {{"cells": [{{"share": 1, "batch": '
                          f'64, "context": 512}}]}}')  # fmt: skip
    cells = tuple(_cell(cell, f"--mix={path}: cell {i}", path.parent, longest)
                  for i, cell in enumerate(values["cells"], 1))  # fmt: skip
    total = math.fsum(cell.share for cell in cells)
    check(bool(cells) and abs(total - 1) < 1e-6,
          f"--mix={path}: the shares of its {len(cells)} cells sum to {total:g}; "
          f"make it 1")  # fmt: skip
    return cells


def _cell(values: Any, at: str, folder: pathlib.Path, longest: int) -> Cell:
    check(isinstance(values, Mapping), f"{at} must be an object with share, batch and context")
    for name in values:
        known(name, ("share", "batch", "context", "name"), f"{at}: {name}")
    for name in ("share", "batch", "context"):
        check(name in values, f"{at} has no {name!r}")
    share, batch = values["share"], values["batch"]
    check(_is_number(share) and 0 < share <= 1, f"{at}: share={share!r} must lie in (0, 1]")
    check(type(batch) is int and batch > 0, f"{at}: batch={batch!r} must be a number of requests")
    contexts, name = _contexts(values["context"], at, folder)
    check(not longest or contexts.max() <= longest,
          f"{at} has a context of {contexts.max():g} tokens, but "
          f"target.max_len={longest}")  # fmt: skip
    name = str(values.get("name", f"{batch} x {name}"))
    return Cell(float(share), batch, _even(contexts), name)


def _contexts(value: Any, at: str, folder: pathlib.Path) -> tuple[np.ndarray, str]:
    """The lengths and what to call them."""
    if _is_number(value):
        check(value >= 1, f"{at}: context={value!r} must be 1 or more")
        return np.array([float(value)]), f"{value:g}"
    spreads: dict[str, Callable[..., np.ndarray]] = {
        "uniform": _uniform, "bimodal": _bimodal, "zipf": _zipf}  # fmt: skip
    kinds = [*spreads, "requests"]
    if not isinstance(value, Mapping) or len(found := [k for k in kinds if k in value]) != 1:
        raise ConfigError(f"{at}: context={value!r} must be a number of tokens, or an object with "
                          f"one of {kinds}")  # fmt: skip
    (kind,) = found
    more = {name: x for name, x in value.items() if name != kind}
    for name in more:
        takes = {"bimodal": ("long",), "zipf": ("exponent",)}.get(kind, ())
        known(name, takes, f"{at}: context.{name}")
    if kind == "requests":
        return _requests(folder / str(value[kind]), at), f"{value[kind]}"
    ends = value[kind]
    if not (isinstance(ends, list) and len(ends) == 2 and all(_is_number(x) for x in ends)
            and 1 <= ends[0] <= ends[1]):  # fmt: skip
        raise ConfigError(f"{at}: context.{kind}={ends!r} must be the shortest and the longest "
                          f"context, such as [32, 4096]")  # fmt: skip
    for name, x in more.items():
        most = 1.0 if name == "long" else math.inf
        check(_is_number(x) and 0 <= x <= most,
              f"{at}: context.{name}={x!r} must be a number, 0 or more")  # fmt: skip
    return spreads[kind](*ends, **more), f"{kind} {ends[0]:g} to {ends[1]:g}"


def _is_number(x: Any) -> TypeGuard[int | float]:
    return type(x) in (int, float) and math.isfinite(x)


def _uniform(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 4096)


def _bimodal(low: float, high: float, long: float = 0.5) -> np.ndarray:
    """A part `long` of the requests has the longer of the two."""
    n = round(4096 * long)
    return np.repeat([float(low), float(high)], [4096 - n, n])


def _zipf(low: float, high: float, exponent: float = 1.0) -> np.ndarray:
    """Probability in proportion to length ** -exponent: every quantile's middle, by its inverse."""
    u = (np.arange(4096) + 0.5) / 4096
    if exponent == 1:
        return low * (high / low) ** u
    a, b = low ** (1 - exponent), high ** (1 - exponent)
    return (a + (b - a) * u) ** (1 / (1 - exponent))


def _requests(path: pathlib.Path, at: str) -> np.ndarray:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{at}: the lengths of {path} cannot be read: {error}") from None
    lengths = []
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError:
            value = line
        value = value.get("tokens") if isinstance(value, Mapping) else value
        if not _is_number(value) or value < 1:
            raise ConfigError(f"{at}: {path}, line {i}: {line[:80]!r} is no number of tokens; "
                              f'give 512 or {{"tokens": 512}}')  # fmt: skip
        lengths.append(float(value))
    check(bool(lengths), f"{at}: {path} has no lengths")
    return np.array(lengths)


def _even(lengths: np.ndarray) -> tuple[float, ...]:
    """At most LENGTHS of them, with their mean: of the sorted ones, of equally many requests each.

    A length may reach into two groups.
    """
    lengths = np.sort(lengths)
    if len(lengths) <= LENGTHS:
        return tuple(lengths.tolist())
    edges = np.linspace(0, len(lengths), LENGTHS + 1)
    sums = np.interp(edges, np.arange(len(lengths) + 1), np.append(0, np.cumsum(lengths)))
    return tuple((np.diff(sums) / np.diff(edges)).tolist())

"""Which TPU slices exist, and their devices as the compiler describes them.

libtpu describes any grid of whole hosts, also ones that no cloud has (`v5e:16x32`, `v5p:2x2x3`), so
that what exists is written down here, after Google Cloud's documentation (docs.cloud.google.com):

    v5e, v6e     tpu/docs/v5e and tpu/docs/v6e, the tables of slice shapes: whole lists
    v5p          tpu/docs/v5p: the shapes under a cube of 4x4x4, and from there on A x B x C of
                 multiples of 4, A <= B <= C, up to 16x16x24; the page's table has "most (but not
                 all)" of these
    tpu7x        the same rule, up to the 9,216 chips of a pod (tpu/docs/tpu7x)
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

from launch.compile.tpu_compiler import describe, quiet
from spire_jax.config.schema import ConfigError

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_UNDER_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


def _cubes(most: int, longest: int) -> tuple[str, ...]:
    """A x B x C of multiples of 4, ascending, of at most `most` chips."""
    sides = range(4, longest + 1, 4)
    grids = itertools.combinations_with_replacement(sides, 3)
    by_size = sorted((math.prod(g), g[2], g) for g in grids if math.prod(g) <= most)
    return _UNDER_A_CUBE + tuple("x".join(map(str, grid)) for *_, grid in by_size)


SLICES: Mapping[str, tuple[str, ...]] = {
    "v5e": _FLAT,
    "v6e": _FLAT,
    "v5p": _cubes(6144, 24),
    "tpu7x": _cubes(9216, 36),
}


def check_topology(topology: str) -> None:
    """Raise ConfigError, with the slices that exist, unless `topology` is one: "v5e:16x16"."""
    generation, _, shape = topology.partition(":")
    if generation not in SLICES:
        every = "; ".join(f"{name}:{_listed(shapes)}" for name, shapes in SLICES.items())
        raise ConfigError(
            f"no topology {topology!r}: use GENERATION:SHAPE, as in v5e:16x16; there are {every}"
        )
    if shape not in SLICES[generation]:
        sides = shape.split("x")
        turned = "x".join(sorted(sides, key=int)) if all(s.isdigit() for s in sides) else ""
        hint = f"did you mean {generation}:{turned}? " if turned in SLICES[generation] else ""
        raise ConfigError(
            f"no topology {topology!r}; {hint}{generation} has {_listed(SLICES[generation])}"
        )


def devices(topology: str) -> list[Any]:
    """The devices of a slice that exists, which need not be here.

    Raises:
        ConfigError: there is no such slice; lists those that there are.
        NoCompiler: there is no libtpu.
    """
    check_topology(topology)
    one = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    with quiet():
        return describe(topology, **one)


def _listed(shapes: tuple[str, ...]) -> str:
    """All of a short list; of a long one the rule behind it."""
    if len(shapes) <= 12:
        return ", ".join(shapes)
    return (f"{', '.join(shapes[:12])} and on to {shapes[-1]}: from 4x4x4 on all A x B x C of "
            f"multiples of 4, A <= B <= C, of at most {_chips(shapes[-1])} chips")  # fmt: skip


def _chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))

"""Drafting strategies: what may differ between one speculative decoder and another.

A strategy holds a draft model's structure and says what the draft keeps, how it prefills, how
it proposes k tokens with their distributions, and how it takes in what verification kept. The
round, verification, sampling, evaluation and report are shared by all; what a step costs is in
`spire_jax.costs.throughput`.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from spire_jax.models.sampling import Sampling
from spire_jax.models.transformer import Activations, Model, Params

DraftCache = Any  # a pytree of the strategy's own


@runtime_checkable
class Strategy(Protocol):
    """One way of drafting. Instances are hashable and hold no arrays."""

    @property
    def model(self) -> Model:
        """The structure of the draft's parameters."""
        ...

    @property
    def collect(self) -> tuple[int, ...]:
        """Which activations y^l of the target the strategy reads."""
        ...

    def reads(self, start: int) -> tuple[int, int]:
        """Which activations drafting at or after the position `start` may need.

        Returns:
            (sinks, begin): the positions 0 .. sinks - 1, and those from `begin` on.
        """
        ...

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        activations: Activations,
        k: int,
        capacity: int,
    ) -> DraftCache:
        """The draft's cache over the first `lengths` of T prompt tokens of each row.

        `activations` are the target's over the same tokens; `capacity` positions will ever be
        needed. T may be 0.
        """
        ...

    def prefill_chunk(
        self,
        params: Params,
        cache: DraftCache,
        rows: Int[Array, " R"],
        tokens: Int[Array, "R T"],
        activations: Activations,
        positions: Int[Array, "R T"],
    ) -> DraftCache:
        """Take in the next T prompt tokens of some rows, on top of those before them.

        Positions are in sequence, -1 after a prompt's end; `activations` are the target's over
        the same tokens. Rows beyond the batch are none. After the last chunk a row is as
        `prefill` leaves it; entries of a request before it are dead, as they lie after all that
        it has written. A strategy that cannot do so raises ValueError.
        """
        ...

    def propose(
        self,
        params: Params,
        cache: DraftCache,
        previous: Int[Array, " B"],
        last: Int[Array, " B"],
        positions: Int[Array, " B"],
        keys: Key[Array, " B"],
        k: int,
        sampling: Sampling,
    ) -> tuple[Int[Array, "B k"], Float[Array, "B k V"], DraftCache]:
        """k drafted tokens, and the float32 logits that they were sampled from, transformed.

        `last` is the last emitted token, at `positions`; `previous` the one before it (any
        value where `positions` is 0; -1 in a row that waits, of which nothing before `positions`
        may change). Streams "draft", depth by depth, of `keys` are used.
        """
        ...

    def commit(
        self,
        params: Params,
        cache: DraftCache,
        tokens: Int[Array, "B k1"],
        activations: Activations,
        positions: Int[Array, "B k1"],
    ) -> DraftCache:
        """Take in a verified round: the tokens that the target processed, and its activations.

        Entries of rejected tokens lie after the row's last token, where no query sees them.
        """
        ...

    def probabilities_along(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        activations: tuple[Float[Array, "B M D"], ...],
        read: Int[np.ndarray, " M"],
        starts: Int[np.ndarray, " R"],
        k: int,
        sampling: Sampling,
    ) -> Float[Array, "B R k"]:
        """q of the tokens of a given text, k depths from every start; what the oracle reads.

        Depth j (0-based) from start s is the draft's probability of token s + j + 1, given the
        target's activations of the tokens before s; `activations` are those at positions `read`.
        """
        ...


def depth_keys(keys: Key[Array, " B"], depth: int) -> Key[Array, " B"]:
    """Keys of one draft depth within a round's "draft" stream."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, depth)

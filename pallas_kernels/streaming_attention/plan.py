"""Which (query block, key block) pairs streaming attention computes, decided while tracing.

Positions are known then, so that the list is exact: a pair is in it if and only if some query of
the one sees some key of the other. What a query sees is two runs of the sorted keys, the sinks
and the window, each found by binary search.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

UNSEEN = np.int32(2**30)  # position of a key that pads the last block

# Flags of an item.
FIRST, LAST, EMPTY, WHOLE = 1, 2, 4, 8


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What each query sees: keys at positions <= upper that are < sink or > lower."""

    upper: Int[np.ndarray, " T"]
    lower: Int[np.ndarray, " T"]
    sink: int


@dataclasses.dataclass(frozen=True)
class Items:
    """Pairs of blocks in the order in which they are computed; those of one output together."""

    outer: Int[np.ndarray, " items"]  # the block whose output is accumulated
    inner: Int[np.ndarray, " items"]
    flags: Int[np.ndarray, " items"]  # FIRST, LAST of its output; EMPTY: nothing seen; WHOLE: all


def bounds(
    q_positions: Int[np.ndarray, " T"],
    limits: Int[np.ndarray, " T"] | None,
    window: int | None,
    sink: int,
) -> Bounds:
    """Causality, limit and window as two numbers per query."""
    q_pos = q_positions.astype(np.int32)
    upper = q_pos if limits is None else np.minimum(q_pos, limits.astype(np.int32) - 1)
    lower = q_pos - window if window is not None else np.full_like(q_pos, -UNSEEN)
    return Bounds(upper, lower, sink)


def padded(seen: Bounds, to: int) -> Bounds:
    """With queries added that see nothing, up to a multiple of `to`."""
    more = (0, -len(seen.upper) % to)
    upper = np.pad(seen.upper, more, constant_values=-UNSEEN)
    return Bounds(upper, np.pad(seen.lower, more, constant_values=UNSEEN), seen.sink)


def pairs(
    seen: Bounds, k_positions: Int[np.ndarray, " S"], q_block: int, k_block: int
) -> tuple[Bool[np.ndarray, "nq nk"], Bool[np.ndarray, "nq nk"]]:
    """Which pairs of blocks hold a visible key, and which nothing but visible ones.

    Lengths are multiples of the blocks; `k_positions` is sorted, padded with UNSEEN.
    """
    n_q, n_k = len(seen.upper) // q_block, len(k_positions) // k_block
    find = np.searchsorted
    stop = find(k_positions, seen.upper, side="right")
    begin = np.maximum(find(k_positions, seen.lower, side="right"), 0)
    sink_stop = np.minimum(find(k_positions, seen.sink, side="left"), stop)
    edges = np.zeros((n_q, n_k + 1), np.int64)
    q_blocks = np.arange(len(seen.upper)) // q_block
    for first, last in ((begin, stop), (np.zeros_like(stop), sink_stop)):
        some = last > first
        np.add.at(edges, (q_blocks[some], first[some] // k_block), 1)
        np.add.at(edges, (q_blocks[some], -(-last[some] // k_block)), -1)
    visited = np.cumsum(edges, axis=1)[:, :n_k] > 0
    by_q, by_k = (n_q, q_block), (n_k, k_block)
    k_first, k_last = k_positions.reshape(by_k).min(axis=1), k_positions.reshape(by_k).max(axis=1)
    below = k_last <= seen.upper.reshape(by_q).min(axis=1)[:, None]
    near = (k_first > seen.lower.reshape(by_q).max(axis=1)[:, None]) | (k_last < seen.sink)
    return visited, below & near


def items(visited: Bool[np.ndarray, "a b"], whole: Bool[np.ndarray, "a b"]) -> Items:
    """The pairs row by row; a row without any gets one item that only writes its output."""
    outer, inner, flags = [], [], []
    fetched = 0
    for row, blocks in enumerate(visited):
        at = np.flatnonzero(blocks)
        flag = np.where(whole[row, at], WHOLE, 0)
        if not len(at):
            # The block that is there already: nothing is read for it.
            at, flag = np.array([fetched]), np.array([EMPTY])
        flag[0] |= FIRST
        flag[-1] |= LAST
        fetched = at[-1]
        outer.append(np.full(len(at), row))
        inner.append(at)
        flags.append(flag)
    return Items(*(np.concatenate(x).astype(np.int32) for x in (outer, inner, flags)))

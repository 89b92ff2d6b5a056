"""Slots of the caches by hand and by simulation, and what becomes of writes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY

from spire_jax.models.attention import Compute
from spire_jax.models.caches import empty_full, empty_ring, full_cache, ring_cache, ring_positions
from spire_jax.models.masks import EMPTY, may_attend

WINDOWED = dataclasses.replace(TINY, n_layers=2, window=4, sink=2)
K = 3  # the ring of WINDOWED has 2 + (4 + 3) slots


def ring(batch: int = 1):
    return empty_ring(WINDOWED, batch, K, Compute())


def entries(positions, layer: int = 0):
    """Keys that hold their own position (values its negative), so that a slot can be read back."""
    shape = (*positions.shape, TINY.n_kv_heads, TINY.d_head)
    keys = jnp.broadcast_to(positions[..., None, None] + 100.0 * layer, shape)
    return keys, -keys


def written(cache, positions, layers=(0, 1)):
    """The cache after `positions` (B, T) were placed and written in `layers`."""
    positions = jnp.asarray(positions, jnp.int32)
    slots, cache = cache.slots(positions), cache.place(positions)
    for layer in layers:
        cache = cache.write(layer, slots, *entries(positions, layer))
    return cache


def read(cache, layer: int = 0) -> np.ndarray:
    return np.asarray(cache.keys[layer])[:, :, 0]


def simulated(length: int, sink: int, size: int) -> list[int]:
    """Append tokens one by one: sinks to their own slots, the rest around the ring."""
    slots = [int(EMPTY)] * (sink + size)
    cursor = 0
    for position in range(length):
        if position < sink:
            slots[position] = position
        else:
            slots[sink + cursor] = position
            cursor = (cursor + 1) % size
    return slots


def test_ring_slots_by_hand():
    """slot(j) = j for j < sink, else sink + (j - sink) mod (window + k): sink 2, ring 7."""
    positions = jnp.arange(19)[None]
    by_hand = [0, 1, 2, 3, 4, 5, 6, 7, 8, 2, 3, 4, 5, 6, 7, 8, 2, 3, 4]
    np.testing.assert_array_equal(ring().slots(positions)[0], by_hand)
    assert int(ring().slots(jnp.asarray([[-1]]))[0, 0]) >= 9  # beyond the last slot


@pytest.mark.parametrize("sink, size", [(0, 1), (0, 5), (1, 1), (1, 7), (2, 7), (3, 4)])
def test_ring_positions_are_those_of_a_simulation(sink, size):
    lengths = np.arange(0, sink + 3 * size + 2)
    positions, gather = ring_positions(jnp.asarray(lengths), sink, size)
    expected = np.array([simulated(n, sink, size) for n in lengths])
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(gather, np.where(expected == EMPTY, 0, expected))


@pytest.mark.parametrize("sink, size", [(0, 5), (1, 7), (2, 7), (3, 4)])
def test_sinks_never_also_sit_in_the_ring(sink, size):
    lengths = jnp.arange(60)
    positions, _ = ring_positions(lengths, sink, size)
    for length, row in zip(lengths, np.asarray(positions), strict=True):
        held = row[row != EMPTY]
        assert len(set(held)) == len(held)
        newest = range(max(sink, int(length) - size), int(length))
        assert set(held) == {*range(min(sink, int(length))), *newest}
        assert (row[sink:] >= sink).all()


def test_writes_one_by_one_leave_what_prefill_gathers():
    cache = ring(batch=1)
    for length in range(1, 30):
        cache = written(cache, [[length - 1]])
        expected, gather = ring_positions(jnp.asarray([length]), cache.sink, cache.ring)
        np.testing.assert_array_equal(cache.positions, expected)
        live = np.asarray(expected)[0] != EMPTY
        for layer in (0, 1):
            kept = read(cache, layer)[0][live]
            np.testing.assert_array_equal(kept, np.asarray(gather)[0][live] + 100.0 * layer)


def test_a_block_of_k_plus_1_evicts_nothing_that_its_first_query_sees():
    cache = ring()
    for start in range(0, 40, 2):
        cache = written(cache, [range(start, start + K + 1)])
        held = np.asarray(cache.positions)[0]
        for query in range(start, start + K + 1):
            visible = set(held[np.asarray(may_attend(query, held, 4, 2))])
            window = set(range(max(0, query - 3), query + 1)) | {p for p in (0, 1) if p <= query}
            assert visible == window


def test_ring_writes_rows_at_their_own_positions_and_drops_those_at_minus_1():
    cache = written(ring(2), [[0, 1, 2], [9, 10, -1]])
    after = written(cache, [[-1, -1, 3], [-1, 11, 12]])
    e = int(EMPTY)
    np.testing.assert_array_equal(
        after.positions, [[0, 1, 2, 3, e, e, e, e, e], [e, e, 9, 10, 11, 12, e, e, e]]
    )
    np.testing.assert_array_equal(
        read(after), np.where(after.positions == EMPTY, 0, after.positions)
    )
    np.testing.assert_array_equal(read(cache)[0], [0, 1, 2, 0, 0, 0, 0, 0, 0])  # immutable


def test_full_cache_drops_writes_before_the_text_and_beyond_capacity():
    cache = empty_full(TINY, 2, 5, Compute())
    after = written(cache, [[1, 2], [-1, 3]], layers=(0,))
    after = written(after, [[4, 5], [6, 2**20]], layers=(0,))
    np.testing.assert_array_equal(read(after), [[0, 1, 2, 0, 4], [0, 0, 0, 3, 0]])
    np.testing.assert_array_equal(after.values[0], -after.keys[0])
    assert not read(after, 1).any() and not read(after, 2).any()
    np.testing.assert_array_equal(after.layer_positions(0), [[0, 1, 2, 3, 4]])


def test_prefilled_full_cache_is_padded_to_capacity():
    keys_values = [entries(jnp.arange(1, 4)[None], layer) for layer in range(3)]
    cache = full_cache(keys_values, 5, Compute())
    np.testing.assert_array_equal(read(cache, 2), [[201, 202, 203, 0, 0]])
    np.testing.assert_array_equal(cache.values[1][..., 0], [[-101, -102, -103, 0, 0]])
    assert read(full_cache(keys_values, 3, Compute())).shape == (1, 3)
    with pytest.raises(ValueError, match="3 prompt tokens do not fit a cache of 2 positions"):
        full_cache(keys_values, 2, Compute())


def test_prefilled_ring_goes_on_where_the_gather_left_off():
    positions, gather = ring_positions(jnp.asarray([13]), 2, 7)
    cache = ring_cache([entries(gather, layer) for layer in range(2)], positions, 2, 7, Compute())
    cache = written(cache, [[13, 14]])
    np.testing.assert_array_equal(cache.positions, [simulated(15, 2, 7)])
    np.testing.assert_array_equal(read(cache, 1), np.array([simulated(15, 2, 7)]) + 100)


def test_empty_slots_are_never_visible():
    cache = written(ring(), [[0, 1, 2]])
    for query in (0, 2, 5, 10**6):
        visible = np.asarray(may_attend(query, cache.positions, 4, 2))[0]
        assert not visible[3:].any()
    assert not np.asarray(may_attend(np.int32(2**30 - 1), ring().positions)).any()


def test_caches_store_the_compute_type():
    for dtype in ("float32", "bfloat16"):
        compute = Compute(dtype)
        for cache in (empty_full(TINY, 1, 4, compute), empty_ring(WINDOWED, 1, K, compute)):
            slots = jnp.asarray([[1]])
            cache = cache.write(0, slots, *entries(slots))
            assert cache.keys[0].dtype == cache.values[0].dtype == jnp.dtype(dtype)
    assert len(empty_full(TINY, 1, 4, Compute()).keys) == TINY.n_layers
    assert empty_ring(WINDOWED, 3, K, Compute()).keys[0].shape == (3, 9, 2 * 8)

"""Slots of the caches by hand and by simulation, and what becomes of writes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY

from spire_jax.config.schema import ModelConfig
from spire_jax.models import cpu
from spire_jax.models.attention import Compute
from spire_jax.models.caches import (
    FullCache,
    RingCache,
    SelectedCache,
    allocated,
    empty_full,
    empty_windowed,
    full_cache,
    read_then_append,
    ring_cache,
    ring_positions,
    windowed_cache,
)
from spire_jax.models.masks import EMPTY, View, may_attend

K = 3
VIEW = View(window=4, sink=2)  # its ring has 2 + (4 + 3) slots


def ring(batch: int = 1) -> RingCache:
    (cache,) = empty_windowed(TINY, [VIEW], batch, K, 99, Compute())
    assert isinstance(cache, RingCache)
    return cache


def entries(positions):
    """Keys that hold their own position (values its negative), so that a slot can be read back."""
    shape = (*positions.shape, TINY.n_kv_heads, TINY.d_head)
    keys = jnp.broadcast_to(jnp.asarray(positions, jnp.float32)[..., None, None], shape)
    return keys, -keys


def written(cache, positions):
    """The cache with entries at `positions` (B, T)."""
    positions = jnp.asarray(positions, jnp.int32)
    return cache.append(positions, *entries(positions))


def read(cache) -> np.ndarray:
    return np.asarray(cache.keys)[:, :, 0]


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
    positions = jnp.arange(19)[:, None]  # one each: of 19 at once the newest alone would go in
    by_hand = [0, 1, 2, 3, 4, 5, 6, 7, 8, 2, 3, 4, 5, 6, 7, 8, 2, 3, 4]
    np.testing.assert_array_equal(ring().slots(positions)[:, 0], by_hand)
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
        np.testing.assert_array_equal(cache.held(jnp.asarray([length - 1])), expected)
        live = np.asarray(expected)[0] != EMPTY
        np.testing.assert_array_equal(read(cache)[0][live], np.asarray(gather)[0][live])


def test_a_block_of_k_plus_1_evicts_nothing_that_its_first_query_sees():
    cache = ring()
    for start in range(0, 40, 2):
        cache = written(cache, [range(start, start + K + 1)])
        held = np.asarray(cache.held(jnp.asarray([start + K])))[0]
        for query in range(start, start + K + 1):
            seen = np.asarray(may_attend(query, held, 4, 2))
            window = set(range(max(0, query - 3), query + 1)) | {p for p in (0, 1) if p <= query}
            assert set(held[seen]) == window
            np.testing.assert_array_equal(read(cache)[0][seen], held[seen])


def test_ring_writes_rows_at_their_own_positions_and_drops_those_at_minus_1():
    cache = written(ring(2), [[0, 1, 2], [9, 10, -1]])
    after = written(cache, [[-1, -1, 3], [-1, 11, 12]])
    np.testing.assert_array_equal(
        read(after), [[0, 1, 2, 3, 0, 0, 0, 0, 0], [0, 0, 9, 10, 11, 12, 0, 0, 0]]
    )
    np.testing.assert_array_equal(after.values, -after.keys)
    np.testing.assert_array_equal(read(cache)[0], [0, 1, 2, 0, 0, 0, 0, 0, 0])  # immutable


@pytest.mark.parametrize("make", [ring, lambda n: empty_full(TINY, n, 9, Compute())[0]],
                         ids=["ring", "full"])  # fmt: skip
def test_entries_of_some_rows_go_to_these_and_come_back(make):
    """Row 2 and row 0 of three, and one beyond the batch."""
    before = written(make(3), [[0, 1]] * 3)
    rows, positions = jnp.asarray([2, 0, 3]), jnp.asarray([[2, 3], [4, -1], [5, 6]])
    after = before.append(positions, *entries(positions), rows)
    expected = np.zeros((3, 9))
    expected[:, :2] = [0, 1]
    expected[2, 2:4], expected[0, 4] = [2, 3], 4
    np.testing.assert_array_equal(read(after), expected)
    like = TINY.n_kv_heads, TINY.d_head
    k, v = after.entries(jnp.asarray([[1, 3], [4, 0]]), like, jnp.asarray([2, 0]))
    np.testing.assert_array_equal(k, entries(jnp.asarray([[1, 3], [4, 0]]))[0])
    np.testing.assert_array_equal(v, -k)
    k, _ = after.entries(jnp.asarray([[4], [1], [2]]), like)  # without rows: all of them
    np.testing.assert_array_equal(np.asarray(k)[:, 0, 0, 0], [4, 1, 2])


def test_of_more_positions_than_a_ring_holds_the_newest_are_written():
    cache = written(ring(2), [range(20), [*range(11), *[-1] * 9]])
    for row, length in enumerate((20, 11)):
        np.testing.assert_array_equal(read(cache)[row], simulated(length, 2, 7))


# --- what was rejected -------------------------------------------------------------------------

LENGTH = 60  # of the texts below; a head has as many dimensions


def one_hot(positions, right):
    """Keys of zeros, so that attention is a mean; values say which position they are of, and those
    of wrong tokens are negative."""
    sign = jnp.where(jnp.asarray(right), 1.0, -1.0)
    values = sign[..., None] * jax.nn.one_hot(jnp.asarray(positions), LENGTH)
    return jnp.zeros_like(values)[:, :, None], values[:, :, None]


def mean_of_the_seen(query: int, view: View, include_self: bool = True) -> np.ndarray:
    """What attention gives one query that sees the right entries and no others."""
    shown = [j for j in range(query + include_self) if j < view.sink or query - j < view.window]
    return np.isin(np.arange(LENGTH), shown) / max(len(shown), 1)


def empty_ring(view: View, k: int) -> RingCache:
    none = jnp.zeros((1, 0, 1, LENGTH))
    cache = windowed_cache(none, none, view, k, LENGTH, Compute())
    assert isinstance(cache, RingCache)
    return cache


VIEWS = [VIEW, View(window=1), View(window=5, sink=1)]


@pytest.mark.parametrize("view", VIEWS, ids=["4 and 2", "1 and 0", "5 and 1"])
@pytest.mark.parametrize("k", [1, 3])
def test_what_was_rejected_is_never_seen(view, k):
    """Rounds that keep every number of their k tokens, after every other number.

    A draft writes its tokens one by one, verification all k + 1 at once. A dictionary of slots,
    written along, is what must be stored; what must be seen is found from the definition.
    """
    cache, slots, ring = empty_ring(view, k), {}, view.window + k
    write = jax.jit(lambda cache, at, right: cache.append(at, *one_hot(at, right)))

    @functools.partial(jax.jit, static_argnums=2)
    def attend(cache, at, include_self):
        q = jnp.zeros((*at.shape, 1, 1, LENGTH))
        return cache.attend(q, at, view, Compute(), include_self=include_self)[0][0, :, 0, 0]

    def put(cache, positions, right):
        for j, good in zip(positions, right, strict=True):
            slot = j if j < view.sink else view.sink + (j - view.sink) % ring
            slots[slot] = (j + 1) * (1 if good else -1)
        return write(cache, jnp.asarray(positions, jnp.int32)[None], jnp.asarray(right)[None])

    def check(cache, queries, include_self, what):
        found = attend(cache, jnp.asarray(queries, jnp.int32)[None], include_self)
        for query, row in zip(queries, np.asarray(found), strict=True):
            if query <= start + kept:  # the others are wrong tokens' own
                np.testing.assert_allclose(
                    row,
                    mean_of_the_seen(query, view, include_self),
                    atol=1e-6,
                    err_msg=f"{what} at {query}: {slots}",
                )

    start, after = 0, set()
    rounds = [x for one in range(k + 1) for other in range(k + 1) for x in (one, other)]
    for count, kept in enumerate(rounds * 3):
        if start + k >= LENGTH:
            break
        after.add((rounds[(count - 1) % len(rounds)], kept))
        for query in range(start, start + k):
            check(cache, [query], False, "draft, before it is written,")
            cache = put(cache, [query], [query <= start + kept])
            check(cache, [query], True, "draft")
        block = list(range(start, start + k + 1))
        cache = put(cache, block, [j <= start + kept for j in block])
        check(cache, block, True, "verification")
        stored = np.asarray(cache.values)[0] @ np.arange(1, LENGTH + 1)
        np.testing.assert_array_equal(stored, [slots.get(j, 0) for j in range(view.sink + ring)])
        start += kept + 1
    assert len(after) == (k + 1) ** 2 and start > 2 * (view.sink + ring)


@pytest.mark.parametrize("view", VIEWS, ids=["4 and 2", "1 and 0", "5 and 1"])
@pytest.mark.parametrize("chunk", [1, 4, 13])
def test_a_prompt_is_read_over_what_rounds_left_while_it_waited(view, chunk):
    """Rounds that wait for the chunk at p leave wrong entries at p .. p + k."""
    cache, k, text = empty_ring(view, 3), 3, jnp.arange(LENGTH - 20)

    @jax.jit
    def step(cache, begin):
        waiting = begin + jnp.arange(k + 1)[None]
        cache = cache.append(waiting, *one_hot(waiting, False))
        at = begin + jnp.arange(chunk)[None]
        at = jnp.where(at < len(text), at, -1)
        q = jnp.zeros((*at.shape, 1, 1, LENGTH))
        return read_then_append(cache, jnp.zeros(1, jnp.int32), q, *one_hot(at, True), at, view,
                                Compute())  # fmt: skip

    for begin in range(0, len(text), chunk):
        found, cache = step(cache, begin)
        for i, query in enumerate(range(begin, min(begin + chunk, len(text)))):
            np.testing.assert_allclose(found[0, i, 0, 0], mean_of_the_seen(query, view), atol=1e-6,
                                       err_msg=f"query {query}")  # fmt: skip


# --- numbers that broke ------------------------------------------------------------------------

HEADS = ModelConfig(n_layers=1, n_kv_heads=2, q_per_kv=2, d_head=32)  # that the kernels take


def cache_of(kind: str, dead, compute: Compute):
    """Two rows of an earlier request that wrote `dead` to all slots; or a selection of prompts of
    3 and 2 tokens, whose longer one leaves the other a slot."""
    if kind == "selected":
        (k, v), e = normal(7, 3), int(EMPTY)
        k, v = (x.at[1, 2].set(y[1, 2]) for x, y in zip((k, v), dead, strict=True))
        chosen = jnp.asarray([[[2, 1, 0]] * 2, [[1, 0, e]] * 2])
        used = jnp.asarray([3, 2])
        return SelectedCache(*allocated(k, v, 20, compute), chosen, used, used)
    if kind == "full":
        (cache,) = empty_full(HEADS, 2, 20, compute)
    else:
        (cache,) = empty_windowed(HEADS, [VIEW], 2, K, 20, compute)
    return cache.append(jnp.tile(jnp.arange(20), (2, 1)), *dead)


def normal(seed: int, tokens: int = 20):
    """Keys and values, or, of other shapes, queries."""
    shape = 2, 2, tokens, HEADS.n_kv_heads, HEADS.d_head
    return tuple(jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32))


def broken(which: str):
    """Keys and values of which some, or all, of the numbers are nan or inf."""
    rng, (k, v) = np.random.default_rng(5), normal(1)
    bad = jnp.asarray(rng.choice([np.nan, np.inf, -np.inf], v.shape), jnp.float32)
    some = v.at[..., 3].set(bad[..., 3])
    return {"all": (bad, bad), "values": (k, bad), "a few": (k, some)}[which]


CACHES = [(kind, path) for kind in ("full", "ring", "selected")
          for path in ("where they are", "unpacked", "kernel")]  # fmt: skip


@pytest.mark.parametrize("kind, path", CACHES[:-1])  # no kernel has positions per KV head
def test_what_nobody_sees_may_be_nan(kind, path, monkeypatch):
    """Bit for bit the same, whatever an earlier request, rejected tokens and padding left."""
    compute = Compute(attention="interpret" if path == "kernel" else "xla")
    if path == "unpacked":
        monkeypatch.setattr(cpu, "SLOT_ROWS", 0)
    live, q = normal(0), normal(2)[0].reshape(2, -1, 2, 2, 32)
    text = np.where(np.arange(9) < np.array([[9], [7]]), np.arange(9), -1)
    after = np.array([[9], [7]]) + np.arange(3)

    def put(cache, positions, entries):
        at = np.maximum(positions, 0)[..., None, None]
        entries = (jnp.take_along_axis(x, at, axis=1) for x in entries)
        return cache.append(jnp.asarray(positions), *entries)

    @jax.jit
    def run(dead):
        cache, found = cache_of(kind, dead, compute), []
        if kind != "selected":
            chunk = jnp.asarray([[0, 1, 2, -1], [0, 1, 2, 3]])  # the first prompt ends
            new = (x[:, :4].at[0, 3].set(y[0, 3]) for x, y in zip(live, dead, strict=True))
            out, _ = read_then_append(cache, jnp.arange(2), q[:, :4], *new, chunk, VIEW, compute)
            found += [out[0, :3], out[1]]
        cache = put(cache, text, live)
        cache = put(cache, after, dead)  # drafted, and not kept
        cache = put(cache, after[:, :2], live)
        for include_self in (True, False):
            found += cache.attend(q[:, :2], jnp.asarray(after[:, :2]), VIEW, compute,
                                  include_self=include_self)  # fmt: skip
        return found

    expected = run(normal(3))
    for which in ("all", "values", "a few"):
        for one, other in zip(run(broken(which)), expected, strict=True):
            assert np.isfinite(one).all()
            np.testing.assert_array_equal(one, other, err_msg=which)


@pytest.mark.parametrize("dtype, number", [("float32", np.nan), ("float32", -np.inf),
                                           ("bfloat16", 3.4e38)])  # fmt: skip
def test_who_sees_what_broke_is_told(dtype, number):
    """nan, in the output of the queries that see the entry; others of the block have theirs."""
    compute = Compute(dtype)
    k, v = normal(0, 4)
    cache = empty_full(HEADS, 2, 8, compute)[0].append(
        jnp.tile(jnp.arange(4), (2, 1)), k, v.at[0, 2, 1, 5].set(number)
    )
    assert np.isfinite(cache.values).all()
    q = normal(1, 6)[0].reshape(2, 3, 2, 2, 32).astype(dtype)
    out, _ = cache.attend(q, jnp.asarray([[1, 2, 3]] * 2), View(), compute)
    finite = np.isfinite(out).all(axis=(3, 4))
    assert finite[0].tolist() != [[True] * 2] * 3 and finite[1].all()
    assert finite[0, 0].all() and not finite[0, 1:, 1].any()


# --- making them -------------------------------------------------------------------------------


def test_full_cache_drops_writes_before_the_text_and_beyond_capacity():
    untouched, cache = empty_full(TINY, 2, 5, Compute())[:2]
    after = written(cache, [[1, 2], [-1, 3]])
    after = written(after, [[4, 5], [6, 2**20]])
    np.testing.assert_array_equal(read(after), [[0, 1, 2, 0, 4], [0, 0, 0, 3, 0]])
    np.testing.assert_array_equal(after.values, -after.keys)
    assert not read(cache).any() and not read(untouched).any()
    np.testing.assert_array_equal(after.held(jnp.asarray([4, 3])), [[0, 1, 2, 3, 4]])


def test_prefilled_full_cache_is_padded_to_capacity():
    keys_values = entries(jnp.arange(1, 4)[None])
    cache = full_cache(*keys_values, 5, Compute())
    np.testing.assert_array_equal(read(cache), [[1, 2, 3, 0, 0]])
    np.testing.assert_array_equal(cache.values[..., 0], [[-1, -2, -3, 0, 0]])
    assert read(full_cache(*keys_values, 3, Compute())).shape == (1, 3)
    with pytest.raises(ValueError, match="3 prompt tokens do not fit a cache of 2 positions"):
        full_cache(*keys_values, 2, Compute())


def test_prefilled_ring_goes_on_where_the_gather_left_off():
    _, gather = ring_positions(jnp.asarray([13]), 2, 7)
    cache = written(ring_cache(*entries(gather), 2, 7, Compute()), [[13, 14]])
    np.testing.assert_array_equal(cache.held(jnp.asarray([14])), [simulated(15, 2, 7)])
    np.testing.assert_array_equal(read(cache), [simulated(15, 2, 7)])


def test_empty_slots_are_never_visible():
    cache = written(ring(), [[0, 1, 2]])
    held = cache.held(jnp.asarray([2]))
    for query in (0, 2, 5, 10**6):
        assert not np.asarray(may_attend(query, held, 4, 2))[0, 3:].any()
    nothing = ring().held(jnp.asarray([-1]))
    assert not np.asarray(may_attend(np.int32(2**30 - 1), nothing)).any()


def test_a_layer_has_the_cache_that_its_view_needs():
    """A ring under a window, every position without one; as many slots as rounds of k need."""
    views = [VIEW, View(), View(window=6)]
    caches = empty_windowed(dataclasses.replace(TINY, n_layers=3), views, 5, K, 40, Compute())
    assert [type(cache) for cache in caches] == [RingCache, FullCache, RingCache]
    assert [cache.keys.shape for cache in caches] == [(5, 9, 16), (5, 40, 16), (5, 9, 16)]
    assert [cache.live for cache in caches] == [9, 40, 9]


def test_tokens_after_a_selection_follow_it_and_start_over():
    """Two rows of 6 slots: 2 selected of a prompt of 4, and all 3 of a prompt of 3."""
    e = int(EMPTY)
    chosen = jnp.asarray([[[3, 0, e], [3, 1, e]], [[2, 1, 0]] * 2])
    arrays = (jnp.zeros((2, 6, TINY.n_kv_heads * TINY.d_head)),) * 2
    cache = SelectedCache(*arrays, chosen, jnp.asarray([4, 3]), jnp.asarray([2, 3]))
    np.testing.assert_array_equal(
        cache.held(jnp.asarray([6, 2])),
        [[[3, 0, 4, 5, 6, e], [3, 1, 4, 5, 6, e]], [[2, 1, 0, e, e, e]] * 2],
    )
    after = written(cache, [[3, 4, 5], [2, 3, 4]])  # tokens of the prompt are written nowhere
    np.testing.assert_array_equal(read(after), [[0, 0, 4, 5, 0, 0], [0, 0, 0, 3, 4, 0]])
    after = written(written(after, [[6, 7, 8]] * 2), [[-1, -1, 9], [-1, -1, -1]])
    np.testing.assert_array_equal(read(after), [[0, 0, 8, 9, 6, 7], [0, 0, 0, 6, 7, 8]])
    held = np.asarray(after.held(jnp.asarray([9, 8])))
    np.testing.assert_array_equal(held[:, 0], [[3, 0, 8, 9, 6, 7], [2, 1, 0, 6, 7, 8]])


def test_caches_store_the_compute_type():
    for dtype in ("float32", "bfloat16"):
        compute, views = Compute(dtype), [VIEW] * 3
        for cache in (empty_full(TINY, 1, 4, compute)[0],
                      empty_windowed(TINY, views, 1, K, 4, compute)[2]):  # fmt: skip
            cache = written(cache, [[1]])
            assert cache.keys.dtype == cache.values.dtype == jnp.dtype(dtype)
    assert len(empty_full(TINY, 1, 4, Compute())) == TINY.n_layers
    assert ring(3).keys.shape == (3, 9, 2 * 8)

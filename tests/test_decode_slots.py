"""Slots: a prompt read in chunks is a prompt read at once; rows that wait are left alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, Pair, caches_of, pair, ragged

from spire_jax.decoding import Decoder, DecodeState, start
from spire_jax.decoding.slots import admit, empty_slots, prefill_chunk, serve_rounds
from spire_jax.models.attention import Compute
from spire_jax.models.caches import RingCache, empty_windowed
from spire_jax.models.masks import EMPTY, View
from spire_jax.models.sampling import seed_words

SMALL = dataclasses.replace(TINY, n_layers=2)
WINDOWED = dataclasses.replace(SMALL, window=7, sink=2)
K, WIDTH = 3, 64
# One token, fewer than a chunk of 8, all of one or two (a prompt's last token is not read), more.
LENGTHS = (1, 2, 6, 8, 9, 17, 33, 40)


def fill(p: Pair, decoder: Decoder, prompts, chunk: int, at_once: int = 1) -> DecodeState:
    """Slots with every prompt read in chunks, `at_once` of them side by side."""
    batch = len(prompts)
    state = empty_slots(decoder, p.weights, batch, WIDTH)
    for row, prompt in enumerate(prompts):
        padded = np.zeros(WIDTH, np.int32)
        padded[: len(prompt)] = prompt
        state = admit(state, np.int32(row), padded, np.int32(len(prompt)),
                      np.int32(len(prompt) + 20), seed_words(row))  # fmt: skip
    read = np.zeros(batch, np.int32)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    while (left := np.flatnonzero(read < lengths - 1)).size:
        rows = left[:at_once]
        pad = (0, at_once - len(rows))
        state = prefill_chunk(
            decoder, p.weights, state, np.pad(rows, pad, constant_values=batch).astype(np.int32),
            np.pad(read[rows], pad), np.pad(lengths[rows], pad, constant_values=1), chunk,
        )  # fmt: skip
        read[rows] = np.minimum(read[rows] + chunk, lengths[rows] - 1)
    return state


def same_cache(found, expected, lengths) -> None:
    """Every entry that the prefix of a row still has in `expected`."""
    for ours, theirs in zip(caches_of(found), caches_of(expected), strict=True):
        assert type(ours) is type(theirs)
        if isinstance(theirs, RingCache):
            assert (ours.sink, ours.ring) == (theirs.sink, theirs.ring)
        held = np.asarray(theirs.held(jnp.asarray(lengths - 2)))
        live = (held != EMPTY) & (held < lengths[:, None] - 1)
        assert live.sum() >= (np.minimum(lengths - 1, 6)).sum()
        for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            one, other = (np.asarray(x)[live] for x in (one, other))
            np.testing.assert_allclose(one, other, atol=2e-5)


CASES = [(kind, SMALL, 8) for kind in ("spire", "spire_dense", "vanilla", "ring", "magicdec")]
CASES += [("ring", SMALL, 5), ("ring", SMALL, 40), ("spire", SMALL, 1), ("spire", WINDOWED, 8)]
CASES += [("self", WINDOWED, 20)]
EAGLE = pytest.param("eagle3", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "kind, config, chunk", [*CASES, pytest.param("eagle3", SMALL, 8, marks=pytest.mark.slow)]
)
def test_chunks_are_the_whole_prompt(kind, config, chunk):
    """Caches at all live slots, and all that decides what follows."""
    p, prompts = pair(kind, config), ragged(LENGTHS)
    decoder = p.decoder(K)
    at_once = start(decoder, p.weights, prompts, [20] * 8, range(8), width=WIDTH)
    state = fill(p, decoder, prompts, chunk)
    for name in ("lengths", "ends", "done", "rounds", "counts", "kinds", "tokens"):
        np.testing.assert_array_equal(getattr(state, name), getattr(at_once, name), err_msg=name)
    lengths = np.array(LENGTHS)
    same_cache(state.target_cache, at_once.target_cache, lengths)
    same_cache(state.draft_state, at_once.draft_state, lengths)


def test_several_prompts_at_once():
    p, prompts = pair("ring", SMALL), ragged(LENGTHS)
    decoder = p.decoder(K)
    one, three = (fill(p, decoder, prompts, 8, at_once) for at_once in (1, 3))
    for name in ("lengths", "done", "tokens"):
        np.testing.assert_array_equal(getattr(one, name), getattr(three, name))
    for cache in ("target_cache", "draft_state"):
        same_cache(getattr(three, cache), getattr(one, cache), np.array(LENGTHS))


@pytest.mark.parametrize("kind", ["ring", EAGLE])
def test_a_used_slot_is_as_new(kind):
    """Nothing of a longer request before, and of rounds while the row waits, is left to be seen."""
    p, prompts = pair(kind, SMALL), ragged(LENGTHS)
    decoder = p.decoder(K)
    fresh = fill(p, decoder, prompts, 8)
    nobody = np.zeros(8, bool)
    state, _ = serve_rounds(decoder, p.weights, fill(p, decoder, prompts[::-1], 8), nobody,
                            np.int32(4), 4)  # fmt: skip
    for row, prompt in enumerate(prompts):
        padded = np.zeros(WIDTH, np.int32)
        padded[: len(prompt)] = prompt
        state = admit(state, np.int32(row), padded, np.int32(len(prompt)),
                      np.int32(len(prompt) + 20), seed_words(row))  # fmt: skip
        for read in range(0, len(prompt) - 1, 8):
            state = prefill_chunk(decoder, p.weights, state, np.array([row], np.int32),
                                  np.array([read], np.int32), np.array([len(prompt)], np.int32),
                                  8)  # fmt: skip
            # Those before it go on while it waits.
            state, _ = serve_rounds(decoder, p.weights, state, nobody, np.int32(1), 4)
    logs = []
    for one in (fresh, state):
        while not np.asarray(one.done).all():
            one, _ = serve_rounds(decoder, p.weights, one, nobody, np.int32(4), 4)
        logs.append([np.asarray(one.tokens)[row, : n + 20] for row, n in enumerate(LENGTHS)])
    for one, other in zip(*logs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["ring", "spire", "magicdec"])
def test_what_pads_shorter_prompts_may_be_nan(kind):
    """`start` reads all prompts as long as the longest, padded with token 0: of no consequence,
    bit for bit."""
    p, prompts = pair(kind, SMALL), [np.maximum(prompt, 1) for prompt in ragged(LENGTHS)]
    decoder, states = p.decoder(K), []
    for number in (1.0, np.nan):
        target, draft = (params | {"embedding": params["embedding"].at[0].set(number)}
                         for params in p.weights)  # fmt: skip
        weights = p.weights._replace(target=target, draft=draft)
        states.append(start(decoder, weights, prompts, [20] * 8, range(8), width=WIDTH))
    lengths = np.array(LENGTHS)
    for name in ("target_cache", "draft_state"):
        for clean, other in zip(*(getattr(state, name) for state in states), strict=True):
            held = np.asarray(clean.held(jnp.asarray(lengths - 2)))
            live = (held != EMPTY) & (held < lengths[:, None] - 1)
            for of in ("keys", "values"):
                one, two = (np.asarray(getattr(cache, of)) for cache in (clean, other))
                np.testing.assert_array_equal(one[live], two[live])
            assert np.isfinite(other.values).all()


@pytest.mark.parametrize("kind", ["vanilla", "ring", "spire", EAGLE])
def test_a_neighbours_rounds_leave_a_waiting_row_as_it_is(kind):
    """Bit for bit what its prompt's chunks wrote, and what it is answered."""
    p, prompts = pair(kind, SMALL), ragged((9, 33))
    decoder, nobody, caches = p.decoder(K), np.zeros(2, bool), []
    for rounds in (0, 1):
        state = fill(p, decoder, prompts[:1] + prompts[:1], 8)
        padded = np.zeros(WIDTH, np.int32)
        padded[:33] = prompts[1]
        state = admit(state, np.int32(1), padded, np.int32(33), np.int32(40), seed_words(1))
        for read in range(0, 32, 8):
            state = prefill_chunk(decoder, p.weights, state, np.array([1], np.int32),
                                  np.array([read], np.int32), np.array([33], np.int32),
                                  8)  # fmt: skip
            if read < 24:
                state, _ = serve_rounds(decoder, p.weights, state, nobody, np.int32(rounds), 4)
        caches.append(caches_of(state.draft_state))
    assert not np.array_equal(*(np.asarray(cache[0].keys)[0] for cache in caches))
    for alone, beside in zip(*caches, strict=True):
        held = np.asarray(alone.held(jnp.asarray([31, 31])))[-1]
        live = (held >= 0) & (held < 32)
        assert live.sum() >= 6
        for of in ("keys", "values"):
            one, other = (np.asarray(getattr(cache, of))[1] for cache in (alone, beside))
            np.testing.assert_array_equal(one[live], other[live])


def test_what_a_round_gave_is_logged():
    """Tokens, rounds and acceptances of the log are those of the state."""
    p, prompts = pair("spire", SMALL), ragged(LENGTHS)
    decoder = p.decoder(K)
    state = fill(p, decoder, prompts, 8)
    halted = np.arange(8) == 5
    state, log = serve_rounds(decoder, p.weights, state, halted, np.int32(4), 6)
    log = np.asarray(log)
    assert (log[4:, :, 0] == -1).all() and (log[:, 5, 0] == -1).all()
    counts, tokens = np.asarray(state.counts), np.asarray(state.tokens)
    for row in set(range(8)) - {5}:
        given = [t for accepted, depth, n, *new in log[:4, row].tolist() for t in new[:n]]
        length = int(state.lengths[row])
        assert given == tokens[row, LENGTHS[row] : length].tolist()
        np.testing.assert_array_equal(np.bincount(log[:4, row, 0], minlength=K + 1), counts[row])
    assert int(state.lengths[5]) == LENGTHS[5] and bool(state.done[5])


@pytest.mark.parametrize("kind", ["spire", "ring"])
def test_a_chunk_is_written_in_place(kind):
    """All state is donated, and no second copy of the batch's caches is made."""
    p = pair(kind, dataclasses.replace(SMALL, n_layers=5))
    decoder = p.decoder(1)
    state = jax.eval_shape(lambda: empty_slots(decoder, p.weights, 16, 2048))
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    memory = prefill_chunk.lower(decoder, p.weights, state, one, one, one, 8).compile()
    memory = memory.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.target_cache))
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 2


def test_what_a_ring_keeps_of_a_chunk():
    """sink 2, ring 4 + 3: of positions 10 .. 29 the last seven, of 0 .. 9 the sinks too."""
    (ring,) = empty_windowed(TINY, [View(window=4, sink=2)], 2, 3, 99, Compute())
    positions = jnp.asarray([[*range(10, 30)], [*range(10), *[-1] * 10]])
    slots = np.asarray(ring.slots(positions))
    kept = np.where(slots < ring.size, positions, -1)
    assert kept[0].tolist() == [-1] * 13 + [*range(23, 30)]
    assert kept[1].tolist() == [0, 1, -1, *range(3, 10)] + [-1] * 10
    for row in (0, 1):
        used = slots[row][kept[row] >= 0]
        assert len(set(used)) == len(used)

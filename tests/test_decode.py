"""Decoding state by state: budgets, end of sequence, caches, random streams, compilation.

That the output is the target's is test_lossless.py's subject.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, pair, ragged

from spire_jax.decoding import (
    ACCEPTED,
    BONUS,
    CORRECTION,
    PROMPT,
    DecodeError,
    Decoder,
    DecodeState,
    Weights,
    decode_rounds,
    finish,
    generate,
    generation_lengths,
    start,
)
from spire_jax.models.sampling import Sampling

SMALL = dataclasses.replace(TINY, n_layers=2)  # its drafts are accepted often, at every depth
K, WIDTH = 3, 64
CONTEXTS = (1, 2, 5, 7, 8, 12, 16, 20)
BUDGETS = (40, 1, 2, 3, 4, 11, 29, 40)
SEEDS = (5, 6, 7, 8, 9, 10, 11, 12)


def run(prompts=None, budgets=BUDGETS, seeds=SEEDS, eos=-1, rounds_per_call=64) -> DecodeState:
    """Sampled SPIRe decoding to the end; one compiled program for every test that calls this."""
    p = pair("spire", SMALL)
    prompts = ragged(CONTEXTS) if prompts is None else prompts
    return generate(p.decoder(K, eos=eos), p.weights, prompts, budgets, seeds, width=WIDTH,
                    rounds_per_call=rounds_per_call)  # fmt: skip


def begin(budgets=BUDGETS) -> tuple[Decoder, Weights, DecodeState]:
    p = pair("spire", SMALL)
    decoder = p.decoder(K)
    return decoder, p.weights, start(decoder, p.weights, ragged(CONTEXTS), budgets, SEEDS,
                                     width=WIDTH)  # fmt: skip


def rows_of(state: DecodeState) -> list[np.ndarray]:
    """Each row's text, prompt and output."""
    tokens = np.asarray(state.tokens)
    return [row[:n] for row, n in zip(tokens, np.asarray(state.lengths), strict=True)]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for row, (one, other) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_array_equal(one, other, err_msg=f"row {row}")


@functools.cache
def free() -> DecodeState:
    """The run that others are held against; nobody donates it."""
    return run()


# --- where rows stop ---------------------------------------------------------------------------


def test_rows_stop_at_their_own_budgets():
    state = free()
    lengths, kinds = np.asarray(state.lengths), np.asarray(state.kinds)
    np.testing.assert_array_equal(lengths, np.add(CONTEXTS, BUDGETS))
    assert np.asarray(state.done).all()
    for row, prompt in enumerate(ragged(CONTEXTS)):
        np.testing.assert_array_equal(state.tokens[row, : len(prompt)], prompt)
        assert (kinds[row, : len(prompt)] == PROMPT).all()
        assert (kinds[row, len(prompt) : lengths[row]] != PROMPT).all()
        assert not np.asarray(state.tokens)[row, lengths[row] :].any()
        assert not kinds[row, lengths[row] :].any()


def test_a_round_counts_whole_even_if_the_budget_cuts_it():
    """counts has every round; kinds, token by token, has what was left of the last one."""
    state = free()
    counts, kinds = np.asarray(state.counts), np.asarray(state.kinds)
    np.testing.assert_array_equal(counts.sum(axis=1), state.rounds)
    whole = counts @ np.arange(1, K + 2)
    cut = whole - np.array(BUDGETS)
    assert (cut >= 0).all() and (cut <= K).all() and cut.any()
    for row, (context, budget) in enumerate(zip(CONTEXTS, BUDGETS, strict=True)):
        output = kinds[row, context : context + budget].tolist()
        found, run_of_accepted = np.zeros(K + 1, int), 0
        for kind in output:
            if kind == ACCEPTED:
                run_of_accepted += 1
                continue
            assert kind == (BONUS if run_of_accepted == K else CORRECTION)
            found[run_of_accepted] += 1
            run_of_accepted = 0
        rest = counts[row] - found  # the round that was cut, if its last token is not there
        assert (rest >= 0).all() and rest.sum() == (cut[row] > 0)
        assert run_of_accepted == 0 or rest[run_of_accepted:].sum() == 1


def test_generation_lengths_by_hand():
    assert generation_lengths(np.array([[1, 0, 2], [0, 3, 0]])) == (1 + 6 + 6, 6)
    assert generation_lengths(np.array([4])) == (4, 4)  # autoregressive: one token a round
    emitted, rounds = generation_lengths(np.asarray(free().counts))
    assert emitted > sum(BUDGETS) and 1 < emitted / rounds < K + 1


EOS = 18


def test_rows_end_with_the_first_end_of_sequence():
    """What came before it is as it was, nothing comes after it, the other rows go on."""
    state, without = run(eos=EOS), free()
    kinds, ended, inside = np.asarray(state.kinds), 0, 0
    for row, (text, context) in enumerate(zip(rows_of(without), CONTEXTS, strict=True)):
        at = np.flatnonzero(text[context:] == EOS)
        stop = context + at[0] + 1 if len(at) else len(text)
        np.testing.assert_array_equal(rows_of(state)[row], text[:stop])
        assert not np.asarray(state.tokens)[row, stop:].any() and not kinds[row, stop:].any()
        ended += stop < len(text)
        inside += len(at) > 0 and kinds[row, stop - 1] == ACCEPTED
        if stop < len(text):
            assert int(state.rounds[row]) <= int(without.rounds[row])
            assert int(state.counts[row].sum()) == int(state.rounds[row])
    assert np.asarray(state.done).all()
    assert 0 < ended < len(CONTEXTS) and inside > 0  # some in the middle of a block


def test_an_end_of_sequence_in_the_prompt_ends_nothing():
    prompts = [np.full(n, EOS, np.int32) for n in CONTEXTS]
    state = run(prompts, eos=EOS)
    assert (np.asarray(state.lengths) > CONTEXTS).all()


@pytest.mark.slow  # in the fast tier a server says so (test_decode_batching.py)
@pytest.mark.parametrize("kind", ["spire", "vanilla"])
def test_the_last_position_of_the_model_is_used(kind):
    """context + budget = max_len: as with room to spare; one position more is refused."""
    p = pair(kind, SMALL)
    longest = 31
    narrow = dataclasses.replace(p.target, config=dataclasses.replace(SMALL, max_len=longest))
    prompts, k, seeds = ragged((20, 4, *[24] * 14), seed=3), 2, range(16)
    budgets = [longest - len(prompt) for prompt in prompts]
    decoders = [Decoder(m, p.strategy, k, Sampling()) for m in (narrow, p.target)]
    tight, roomy = (
        generate(decoder, p.weights, prompts, budgets, seeds, width=width)
        for decoder, width in zip(decoders, (0, WIDTH), strict=True)
    )
    assert tight.tokens.shape[1] == longest + k
    same(rows_of(tight), rows_of(roomy))
    with pytest.raises(DecodeError, match=r"row 1: .* = 32 goes beyond the model's 31"):
        start(decoders[0], p.weights, prompts, [budgets[0], budgets[1] + 1, *budgets[2:]], seeds)


# --- numbers that broke ------------------------------------------------------------------------


def broken(params, token: int):
    """Parameters whose embedding of a token is nan."""
    return params | {"embedding": params["embedding"].at[token].set(jnp.nan)}


def test_logits_that_are_no_numbers_are_an_error_and_not_a_token():
    p, prompts = pair("spire", SMALL), ragged(CONTEXTS)
    prompts = [np.where(prompt == 4, 5, prompt) for prompt in prompts]
    prompts[6][3] = 4
    decoder, weights = p.decoder(K), Weights(broken(p.target_params, 4), p.draft_params)
    state = start(decoder, weights, prompts, [1] * 8, SEEDS, width=WIDTH)
    state = decode_rounds(decoder, weights, state, 1)
    assert np.asarray(state.done)[6] and state.tokens[6, CONTEXTS[6]] == -1
    others = np.arange(8) != 6
    assert (np.asarray(state.tokens)[others] >= 0).all()
    with pytest.raises(DecodeError, match=r"row 6: the target's logits are nan or inf: .*float32"):
        finish(decoder, weights, state)


def test_a_draft_of_no_numbers_drafts_nothing():
    """Its texts are the target's, a token a round."""
    p = pair("spire", SMALL)
    weights = p.weights._replace(draft=jax.tree.map(lambda x: x * jnp.nan, p.draft_params))
    state = generate(p.decoder(K), weights, ragged(CONTEXTS), BUDGETS, SEEDS, width=WIDTH)
    np.testing.assert_array_equal(state.counts[:, 0], BUDGETS)
    assert not np.asarray(state.counts)[:, 1:].any() and (np.asarray(state.tokens) >= 0).all()


def test_seeds_beyond_32_bits_are_seeds_of_their_own():
    found = rows_of(run(seeds=[5 + 2**32, 6 - 2**63, -7, 8, 9, 10, 11, 2**63 - 12]))
    same(found[3:7], rows_of(free())[3:7])
    for row in (0, 7):
        assert found[row].tolist() != rows_of(free())[row].tolist()


# --- requests that are refused -----------------------------------------------------------------

GOOD = [1, 2, 3]


@pytest.mark.parametrize(
    "prompt, budget, message",
    [
        ([], 4, "row 1: the prompt is empty"),
        ([1, TINY.n_tokens], 4, f"row 1: a token is outside the vocabulary of {TINY.n_tokens}"),
        ([-1, 2], 4, "row 1: a token is outside"),
        (GOOD, 0, "row 1: the budget is 0"),
        (GOOD, -3, "row 1: the budget is -3"),
        (GOOD, 15, r"row 1: context 3 \+ budget 15 \+ k 3 = 21 .* the decoder's 20 positions"),
        (GOOD, 98, r"row 1: context 3 \+ budget 98 = 101 .* the model's 100 positions"),
    ],
)
def test_bad_requests_name_their_row(prompt, budget, message):
    p = pair("vanilla")
    model = dataclasses.replace(p.target, config=dataclasses.replace(TINY, max_len=100))
    prompts = [np.array(GOOD, np.int32), np.array(prompt, np.int32)]
    with pytest.raises(DecodeError, match=message):
        start(Decoder(model, p.strategy, 3), p.weights, prompts, [4, budget], [0, 0], width=20)


def test_depth_and_draft_go_together():
    p = pair("vanilla")
    with pytest.raises(DecodeError, match="k=0: use 1 or more with a draft"):
        Decoder(p.target, p.strategy, 0)
    with pytest.raises(DecodeError, match=r"k=2: .* 0 without one"):
        Decoder(p.target, None, 2)


# --- requests do not disturb each other --------------------------------------------------------


def test_a_row_does_not_depend_on_the_others():
    """Other prompts, budgets and seeds beside four rows; then all rows at other places."""
    prompts, others = ragged(CONTEXTS), ragged((9, 1, 20, 3), seed=9)
    beside = run(prompts[:4] + others, (*BUDGETS[:4], 7, 30, 12, 2), (*SEEDS[:4], 1, 2, 3, 4))
    same(rows_of(beside)[:4], rows_of(free())[:4])
    order = [5, 2, 7, 0, 3, 1, 6, 4]
    moved = run(*([given[i] for i in order] for given in (prompts, BUDGETS, SEEDS)))
    same(rows_of(moved), [rows_of(free())[i] for i in order])
    np.testing.assert_array_equal(moved.counts, np.asarray(free().counts)[order])


def test_requests_differ_by_their_seeds_alone():
    prompt = ragged((6,))[0]
    state = run([prompt] * 8, [30] * 8, (1, 1, 2, 3, 2, 4, 5, 6))
    first = rows_of(state)
    same([first[0], first[2]], [first[1], first[4]])
    assert len({row.tobytes() for row in first}) == 6


def test_how_rounds_are_called_does_not_matter():
    state = run(rounds_per_call=1)
    same(rows_of(state), rows_of(free()))
    np.testing.assert_array_equal(state.counts, free().counts)
    np.testing.assert_array_equal(state.rounds, free().rounds)


def test_a_text_taken_up_again_goes_on_as_it_would_have():
    """Seed, round counter and text are all that a request is: caches built by rounds, with
    rejections in them, are worth those that a prefill of the same text gives."""
    budgets = [40] * 8
    decoder, weights, state = begin(budgets)
    state = decode_rounds(decoder, weights, state, 9)
    reached, rounds = rows_of(state), np.asarray(state.rounds)
    assert (rounds == 9).all() and len({len(row) for row in reached}) > 4
    left = np.asarray(state.ends) - np.asarray(state.lengths)
    again = start(decoder, weights, reached, left.tolist(), SEEDS, width=WIDTH)
    unlike = finish(decoder, weights, start(decoder, weights, reached, left.tolist(), SEEDS,
                                            width=WIDTH))  # fmt: skip
    again = finish(decoder, weights, dataclasses.replace(again, rounds=jnp.asarray(rounds)))
    state = finish(decoder, weights, state)
    same(rows_of(again), rows_of(state))
    for one, other in zip(rows_of(unlike), rows_of(state), strict=True):
        assert not np.array_equal(one, other)  # with the counter at 0 the draws are others


def test_prompts_of_one_token():
    """A whole batch of them has no prefill; they go as they do beside longer prompts."""
    prompts = ragged([1] * 8, seed=4)
    alone = run(prompts)
    beside = run([*prompts[:7], ragged((20,))[0]])
    same(rows_of(alone)[:7], rows_of(beside)[:7])
    assert (np.asarray(alone.lengths) == 1 + np.array(BUDGETS)).all()


# --- rounds ------------------------------------------------------------------------------------


def test_rounds_go_on_until_a_row_finishes_or_enough_have_passed():
    budgets = (40, 39, 30, 31, 40, 24, 36, 38)
    decoder, weights, state = begin(budgets)
    state = decode_rounds(decoder, weights, state, 0)
    np.testing.assert_array_equal(state.lengths, CONTEXTS)
    state = decode_rounds(decoder, weights, state, 2)
    assert (np.asarray(state.rounds) == 2).all() and not np.asarray(state.done).any()
    finished = 0
    while finished < 8:
        before = jax.tree.map(np.asarray, (state.done, state.rounds, state.lengths))
        state = decode_rounds(decoder, weights, state, 1000)
        done, rounds = np.asarray(state.done), np.asarray(state.rounds)
        assert done.sum() > finished, "it returned before a row had finished"
        new = done & ~before[0]
        went = rounds - before[1]
        np.testing.assert_array_equal(went[before[0]], 0)
        assert len(set(went[~before[0]])) == 1
        # One round earlier none of those that finished now had: they were at most k + 1 short.
        assert (np.asarray(state.ends) - before[2])[new].min() > 0
        np.testing.assert_array_equal(np.asarray(state.lengths)[before[0]], before[2][before[0]])
        finished = int(done.sum())
    ended = jax.tree.map(np.asarray, (state.tokens, state.rounds, state.counts))
    state = decode_rounds(decoder, weights, state, 5)  # nothing is left to do
    for one, other in zip(ended, (state.tokens, state.rounds, state.counts), strict=True):
        np.testing.assert_array_equal(one, other)


def compiled(caplog) -> list[str]:
    return [r.message for r in caplog.records if r.message.startswith("Compiling")]


def test_nothing_recompiles_between_rounds(caplog):
    """Other lengths, budgets, seeds and numbers of rounds run what is compiled."""
    free()
    decoder, weights, first = begin((1, 9, 17, 30, 2, 5, 40, 8))
    other = start(decoder, weights, ragged((20, 3, 1, 1, 9, 11, 2, 6), seed=8), [23] * 8, range(8),
                  width=WIDTH)  # fmt: skip
    programs = decode_rounds._cache_size()
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        for state, rounds in ((first, 64), (other, 3)):
            finish(decoder, weights, state, rounds)
        assert decode_rounds._cache_size() == programs
        assert not compiled(caplog)
        _, _, state = begin()
        caplog.clear()
        state = dataclasses.replace(state, **{
            name: jnp.pad(getattr(state, name), ((0, 0), (0, 1))) for name in ("tokens", "kinds")
        })  # fmt: skip
        decode_rounds(decoder, weights, state, 1)
    assert decode_rounds._cache_size() == programs + 1
    assert any("decode_rounds" in message for message in compiled(caplog))  # and it would be seen


@pytest.mark.parametrize("kind", ["spire", "vanilla"])
def test_caches_are_updated_in_place(kind):
    """Both caches are donated, and the loop keeps no second copy of them."""
    p = pair(kind, dataclasses.replace(SMALL, n_layers=5))  # more than one layer works with
    decoder = p.decoder(1)
    state = start(decoder, p.weights, ragged(CONTEXTS), BUDGETS, SEEDS, width=1024)
    held = sum(x.nbytes for x in jax.tree.leaves((state.target_cache, state.draft_state)))
    memory = decode_rounds.lower(decoder, p.weights, state, 64).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 2


def test_what_was_donated_is_gone():
    decoder, weights, before = begin()
    after = decode_rounds(decoder, weights, before, 1)
    assert all(x.is_deleted() for x in jax.tree.leaves((before.target_cache, before.draft_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(after))

"""SnapKV: which tokens are kept, by loops; drafting from them; the dense target as its limit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from models import TINY, pair, ragged, texts

from spire_jax import decoding
from spire_jax.drafting.snapkv import POOL, select, snapkv
from spire_jax.drafting.strategy import sampled
from spire_jax.models.attention import Compute
from spire_jax.models.masks import EMPTY
from spire_jax.models.sampling import Sampling, probabilities, round_keys

OBSERVED, BUDGET, K = 3, 7, 3


def layers_inputs(tokens):
    """y^0 .. y^(N-1) of the target."""
    return forward()(pair("snapkv").target_params, jnp.asarray(tokens))


def by_loops(block, view, y, length: int, budget: int) -> list[set[int]]:
    """The positions that each KV head keeps of one row, from the definition."""
    positions = np.arange(y.shape[1])
    q = np.asarray(block.queries(y, positions), np.float64)[0]  # T K G H
    k = np.asarray(block.keys_values(y, positions)[0], np.float64)[0]  # T K H
    kept = []
    for head in range(k.shape[1]):
        votes = np.zeros(length)
        for t in range(length - OBSERVED, length):
            for g in range(q.shape[2]):
                weight = np.exp(k[: t + 1, head] @ q[t, head, g] * view.scale)
                votes[: t + 1] += weight / weight.sum() / q.shape[2]
        votes = np.pad(votes[: length - OBSERVED], POOL // 2)
        pooled = [votes[i : i + POOL].sum() / POOL for i in range(length - OBSERVED)]
        best = np.argsort(pooled)[::-1][: budget - OBSERVED]
        kept.append({*best.tolist(), *range(length - OBSERVED, length)})
    return kept


def selected_of(block, view, y, lengths) -> np.ndarray:
    """What the product selects, given the layer's keys over the whole text."""
    keys, _ = block.keys_values(y, np.arange(y.shape[1]))
    return np.asarray(select(block, view, y, keys, jnp.asarray(lengths), BUDGET, OBSERVED))


@pytest.mark.parametrize("lengths", [(12, 12), (12, 9)])
def test_kept_tokens_are_those_of_the_definition(lengths):
    """For every layer and KV head, in rows of unlike lengths."""
    p, tokens = pair("snapkv"), texts(2, 12)
    module = p.strategy.model.bind(p.target_params)
    differ = False
    for block, view, y in zip(module.blocks, module.views, layers_inputs(tokens), strict=True):
        chosen = selected_of(block, view, y, lengths)
        for row, length in enumerate(lengths):
            expected = by_loops(block, view, y[row : row + 1], length, BUDGET)
            assert [set(head.tolist()) for head in chosen[row]] == expected
            assert (chosen[row, :, :OBSERVED] == length - 1 - np.arange(OBSERVED)).all()
            differ |= expected[0] != expected[1]
    assert differ, "each KV head chooses for itself"


def test_short_prompts_are_kept_whole():
    p, tokens = pair("snapkv"), texts(2, 12)
    module, y = p.strategy.model.bind(p.target_params), layers_inputs(tokens)[1]
    chosen = selected_of(module.blocks[1], module.views[1], y, (2, 5))
    for row, length in enumerate((2, 5)):
        for head in chosen[row].tolist():
            assert sorted(head[:length]) == list(range(length)), "the row's entries come first"
            assert head[length:] == [EMPTY] * (BUDGET - length)


def test_what_is_beyond_a_prompt_does_not_vote():
    """Keys that are nan, as those of broken values are."""
    p, lengths = pair("snapkv"), jnp.asarray([12, 9])
    module, y = p.strategy.model.bind(p.target_params), layers_inputs(texts(2, 12))[1]
    keys, _ = module.blocks[1].keys_values(y, np.arange(12))
    expected, found = (
        select(module.blocks[1], module.views[1], y, k, lengths, BUDGET, OBSERVED)
        for k in (keys, keys.at[1, 9:].set(jnp.nan))
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("budget", [BUDGET, pytest.param(64, marks=pytest.mark.slow)])
def test_rounds_draft_from_what_was_kept(budget):
    """Every q of 12 rounds is that of a full pass under a mask of the kept tokens.

    With a budget of the whole text that is the dense target's own distribution.
    """
    p = pair("snapkv")
    strategy = snapkv(TINY, budget, Compute(), observed=OBSERVED)
    weights, prompts = decoding.Weights(p.target_params, p.target_params), ragged((9, 14, 2, 1))
    decoder = decoding.Decoder(p.target, strategy, K)
    width = 14 + 30 + K
    state = decoding.start(decoder, weights, prompts, [30] * 4, range(4), width=width)

    @jax.jit
    def propose(state):
        positions = state.lengths - 1
        last = jnp.take_along_axis(state.tokens, positions[:, None], axis=1)[:, 0]
        keys = round_keys(state.seeds, state.rounds)
        proposal, _ = strategy.propose(
            p.target_params, state.draft_state, state.target_cache, last, last, positions, K,
            sampled(keys, decoder.sampling),
        )  # fmt: skip
        return proposal.tokens, proposal.q

    full_pass = jax.jit(lambda w, x: p.target.bind(w).forward(x)[0])
    compared = 0
    for _ in range(12):
        drafts, q = (np.asarray(x) for x in propose(state))
        q = scipy.special.softmax(q, axis=-1)
        for row, prompt in enumerate(prompts):
            length = int(state.lengths[row])
            if bool(state.done[row]):
                continue
            text = np.zeros((1, width), np.int32)
            text[0, :length] = state.tokens[row, :length]
            text[0, length : length + K] = drafts[row]
            if budget > width:
                logits = full_pass(p.target_params, text)[0, length - 1 : length - 1 + K]
                expected = probabilities(logits, decoder.sampling)
            else:
                expected = masked(p, strategy, text, len(prompt) - 1, length - 1)
            np.testing.assert_allclose(q[row], expected, atol=2e-5)
            compared += 1
        state = decoding.decode_rounds(decoder, weights, state, 1)
    assert compared > 30


def masked(p, strategy, text, prompt: int, start: int) -> np.ndarray:
    """q at K depths of one row, by SPIRe's rollout over the kept tokens, found by loops."""
    selected = []
    for kept in kept_of(tuple(text[0, :prompt].tolist())):
        marks = np.zeros((1, TINY.n_kv_heads, text.shape[1]), bool)
        for head, positions in enumerate(kept):
            marks[0, head, list(positions)] = True
        marks[..., prompt:] = True
        selected.append(jnp.asarray(marks))
    logits = rollouts(text.shape[1])(p.target_params, jnp.asarray(text), selected)
    return np.asarray(probabilities(logits[0, start], Sampling()))


@functools.cache
def kept_of(prompt: tuple[int, ...]) -> list[list[set[int]]]:
    """Layer by layer, head by head."""
    if len(prompt) <= BUDGET:
        return [[set(range(len(prompt)))] * TINY.n_kv_heads] * TINY.n_layers
    p = pair("snapkv")
    module = p.strategy.model.bind(p.target_params)
    layers = zip(module.blocks, module.views, layers_inputs([prompt]), strict=True)
    return [by_loops(*layer, len(prompt), BUDGET) for layer in layers]


@functools.cache
def forward():
    p = pair("snapkv")
    return jax.jit(lambda w, x: p.target.bind(w).forward(x, p.strategy.collect)[1])


@functools.cache
def rollouts(width: int):
    """From every start at once: one program for all rounds."""
    p, starts, everything = pair("snapkv"), np.arange(width - K + 1), np.arange(width)

    @jax.jit
    def run(params, text, selected):
        _, keys_values = p.target.bind(params).prefill(text)
        draft = p.strategy.model.bind(params)
        return draft.rollout_over(keys_values, text, everything, starts, K, selected)

    return run

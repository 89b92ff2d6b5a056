"""Decoding against what it should be, round by round: full passes, and scripted acceptance."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, pair, ragged, target, texts
from test_decode import K, rows_of

from spire_jax.decoding import ACCEPTED, BONUS, CORRECTION, Decoder, Weights, generate, start
from spire_jax.drafting.block import BlockDrafting
from spire_jax.drafting.eagle3 import Eagle3Draft
from spire_jax.drafting.longspec import LongSpec
from spire_jax.drafting.spire import SpireDraft
from spire_jax.drafting.strategy import Processed, Proposal, Strategy, sampled
from spire_jax.drafting.stride import Strided
from spire_jax.models.sampling import Sampling, round_keys

WINDOWED = dataclasses.replace(TINY, window=7, sink=2)


@pytest.mark.parametrize(
    "kind, config",
    [("spire", WINDOWED), ("vanilla", TINY), ("ring", TINY)]
    + [pytest.param(kind, TINY, marks=pytest.mark.slow)
       for kind in ("spire", "spire_strict", "spire_plain", "self", "stride", "block",
                    "block_causal", "longspec", "anchor", "eagle3")]
    + [pytest.param("longspec", WINDOWED, marks=pytest.mark.slow)],
)  # fmt: skip
def test_cached_steps_are_the_full_pass_after_rejections_at_every_depth(kind, config):
    check_rounds(kind, config)


def check_rounds(kind: str, config=TINY) -> None:
    """Rounds by hand, rejected where a script says: the target's logits are those of its forward
    pass over text and drafts, the draft's distributions those of its forward pass or rollout."""
    p, rows, rounds = pair(kind, config), 6, 14
    strategy, collect = p.strategy, p.strategy.collect
    prompts = ragged((1, 2, 6, 9, 14, 20), seed=5)
    width = 20 + rounds * (K + 1) + K
    state = start(p.decoder(K), p.weights, prompts, [width - 20 - K] * rows, range(rows),
                  width=width)  # fmt: skip
    starts = np.arange(width - K)
    every = starts[:, None] + np.arange(K)

    @jax.jit
    def one_round(caches, text, lengths, keys):
        target_cache, draft_state = caches
        positions = lengths - 1
        previous, last = (
            jnp.take_along_axis(text, jnp.maximum(positions - back, 0)[:, None], axis=1)[:, 0]
            for back in (1, 0)
        )
        drafted, draft_state = strategy.propose(
            p.draft_params, draft_state, target_cache, previous, last, positions, K,
            sampled(keys, Sampling()),
        )  # fmt: skip
        at = positions[:, None] + jnp.arange(K + 1)
        block = jnp.concatenate([last[:, None], drafted.tokens], axis=1)
        logits, ys, target_cache = p.target.bind(p.target_params).extend(
            target_cache, block, at, collect
        )
        processed = Processed(block, at, ys, target_cache)
        draft_state = strategy.commit(p.draft_params, draft_state, processed)
        return drafted.tokens, drafted.q, logits, (target_cache, draft_state)

    @jax.jit
    def full_pass(text):
        logits, ys = p.target.bind(p.target_params).forward(text, collect)
        draft = strategy.model.bind(p.draft_params)
        if isinstance(strategy, Strided):
            block = isinstance(strategy, BlockDrafting)
            slots = strategy.width(K) if block else K
            stride = slots if block else strategy.stride
            rollout = draft.strided_rollout(text, ys, starts, slots, stride)
            return logits, jax.nn.softmax(rollout[:, :, :K])
        if isinstance(draft, SpireDraft):
            return logits, jax.nn.softmax(draft.rollout(text, ys, starts, K))
        if isinstance(strategy, LongSpec):
            *_, last = p.target.bind(p.target_params).prefill(text)[1]
            rollout = draft.rollout(text, last, strategy.target_view, starts, K)
            return logits, jax.nn.softmax(rollout)
        if isinstance(draft, Eagle3Draft):
            steps = jnp.stack([*draft.rollout(text, ys, starts, K)], axis=2)
            return logits, jax.nn.softmax(draft.unembed(steps))
        return logits, jax.nn.softmax(draft.forward(text)[0][:, every])

    caches = state.target_cache, state.draft_state
    text, lengths = np.array(state.tokens), np.array(state.lengths)
    row = np.arange(rows)
    for count in range(rounds):
        keys = round_keys(state.seeds, jnp.full(rows, count, jnp.int32))
        drafts, q, logits, caches = one_round(caches, text, lengths, keys)
        drafts = np.asarray(drafts)
        text[row[:, None], lengths[:, None] + np.arange(K)] = drafts
        wanted, wanted_q = full_pass(text)
        at = lengths[:, None] - 1 + np.arange(K + 1)
        valid = slice(0, config.n_tokens)
        np.testing.assert_allclose(
            np.asarray(logits)[..., valid], np.asarray(wanted)[row[:, None], at][..., valid],
            atol=1e-4, err_msg=f"target, round {count}",
        )  # fmt: skip
        np.testing.assert_allclose(
            jax.nn.softmax(q), np.asarray(wanted_q)[row, lengths - 1], atol=2e-5,
            err_msg=f"draft, round {count}",
        )  # fmt: skip
        accepted = (count + row * 3 + count // 5) % (K + 1)
        other = (drafts[row, np.minimum(accepted, K - 1)] + 1 + count) % config.n_tokens
        text[row, lengths + accepted] = other
        lengths = lengths + accepted + 1
    assert (lengths - 20 > 0).all() and lengths.max() < width - K


@dataclasses.dataclass(frozen=True)
class Scripted(Strategy):
    """Proposes the right token to a depth that goes round from round to round, then wrong ones.

    Its parameters are the right texts, its state the number of rounds.
    """

    def empty(self, params, batch, k, capacity):
        return jnp.zeros(batch, jnp.int32)

    def propose(self, params, state, target, previous, last, positions, k, draw):
        right = jnp.take_along_axis(params, positions[:, None] + 1 + jnp.arange(k), axis=1)
        depth = depth_of(state, jnp.arange(len(state)), k)
        wrong = (right + 1) % self.model.config.n_tokens
        drafts = jnp.where(jnp.arange(k) < depth[:, None], right, wrong)
        return Proposal(drafts, jax.nn.one_hot(drafts, self.model.config.vocab_size)), state + 1


def depth_of(count, row, k: int):
    return (count + row) % (k + 1)


@pytest.mark.parametrize("k, config", [(4, TINY), (1, WINDOWED)], ids=["full", "windowed"])
def test_rounds_of_scripted_acceptance(k, config):
    """Text, kinds, counts and rounds are exactly those of the script."""
    model, params = target(config)
    prompts = [texts(1, n, seed=n)[0] for n in (1, 3, 8, 17, 24)]
    rows, budget, width = len(prompts), 30, 70
    reference = generate(Decoder(model, None, 0, Sampling(0.0)), Weights(params), prompts,
                         [budget + k] * rows, range(rows), width=width)  # fmt: skip
    right = np.asarray(reference.tokens)
    logits, _ = jax.jit(lambda x: model.bind(params).forward(x))(right)
    top = np.sort(np.asarray(logits), axis=-1)
    scripted = Decoder(model, Scripted(model), k, Sampling(0.0))
    state = generate(scripted, Weights(params, jnp.asarray(right)), prompts, [budget] * rows,
                     range(rows), width=width)  # fmt: skip
    for row, prompt in enumerate(prompts):
        end = len(prompt) + budget
        margin = top[row, len(prompt) - 1 : end - 1, -1] - top[row, len(prompt) - 1 : end - 1, -2]
        assert margin.min() > 1e-3, "a near-tie: take another seed"
        np.testing.assert_array_equal(rows_of(state)[row], right[row, :end])
        kinds, counts = [], np.zeros(k + 1, int)
        while len(kinds) < budget:
            depth = depth_of(counts.sum(), row, k)
            counts[depth] += 1
            kinds += [ACCEPTED] * depth + [BONUS if depth == k else CORRECTION]
        np.testing.assert_array_equal(state.kinds[row, len(prompt) : end], kinds[:budget])
        np.testing.assert_array_equal(state.counts[row], counts)
        assert int(state.rounds[row]) == counts.sum()

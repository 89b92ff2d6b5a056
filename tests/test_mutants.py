"""Planted bugs: each is caught by a check that passes without it.

Losslessness sees bugs of sampling, verification and of the target's cache. It is blind to bugs of
the draft's cache (catch-up, refresh, ring, sink, window, prefill), which only cost acceptance:
those are caught by holding every distribution that the decoder drafts from against the rollout
that training and the oracle use. Bugs are planted by monkeypatching; the product has no hooks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from end_to_end.test_lossless import SMALL, chi_square, joint_of_three, sampled_joint
from test_verification import decoded, tables, transformed

import spire_jax.decoding.rounds as decode
import spire_jax.decoding.verification as verification
import spire_jax.drafting.spire as spire_drafting
import spire_jax.drafting.strategy as drafting
import spire_jax.drafting.vanilla as vanilla_drafting
import spire_jax.models.masks as masks
from spire_jax.drafting.spire import Spire, SpireDraft
from spire_jax.models.caches import LayerCache, RingCache
from spire_jax.models.masks import EMPTY
from spire_jax.models.sampling import Sampling, round_keys, sample, transformed_logits
from spire_jax.models.transformer import Transformer


def forget_compiled() -> None:
    """Trace anew: what was compiled before a patch does not have it."""
    for function in (decode.decode_rounds, decode._prefill):
        function.clear_cache()  # type: ignore[attr-defined]


# --- the checks --------------------------------------------------------------------------------


def samples_follow_the_target(kind: str = "spire", temperature: float = 0.6) -> None:
    """The joint of the first three sampled tokens, by chi-square against enumeration."""
    pair = models.pair(kind, SMALL)
    prompt = models.texts(1, 9, seed=3, n_tokens=SMALL.n_tokens)[0]
    expected = joint_of_three(pair, prompt, Sampling(temperature))
    counts, _ = sampled_joint(pair, pair.decoder(2, temperature), prompt, 4096, 4)
    assert chi_square(counts, expected * counts.sum()) > 1e-4


def blocks_follow_the_target() -> None:
    """The joint of three tokens of a Markov chain, blocks of two, 200,000 times."""
    tokens, _ = decoded.__wrapped__(2, Sampling(), "block")
    p, counts = transformed(tables()[0], Sampling()), np.zeros((16, 16, 16))
    np.add.at(counts, tuple(tokens.T), 1)
    joint = p[0][:, None, None] * p[:, :, None] * p[None]
    assert chi_square(counts, joint * counts.sum()) > 1e-4


def drafts_follow_the_rollout(kind: str = "spire") -> None:
    """Every q that a round drafts from is the rollout's at that depth, along 14 rounds."""
    pair, k, rounds, width = models.pair(kind), 2, 14, 72
    decoder = pair.decoder(k)
    prompts = models.ragged((1, 2, 6, 9, 14, 20, 5, 12), seed=5)
    state = decode.start(decoder, pair.weights, prompts, [50] * 8, range(8), width=width)
    starts = np.arange(width - k)

    @jax.jit
    def propose(state):
        positions = state.lengths - 1
        last = decode._token(state.tokens, positions)
        previous = decode._token(state.tokens, jnp.maximum(positions - 1, 0))
        keys = round_keys(state.seeds, state.rounds)
        proposal, _ = pair.strategy.propose(
            pair.draft_params, state.draft_state, state.target_cache, previous, last, positions, k,
            drafting.sampled(keys, decoder.sampling),
        )  # fmt: skip
        return proposal.tokens, proposal.q

    @jax.jit
    def teacher_forced(texts):
        draft = pair.strategy.model.bind(pair.draft_params)
        if not isinstance(draft, SpireDraft):
            return jax.nn.softmax(draft.forward(texts)[0][:, starts[:, None] + np.arange(k)])
        target = pair.target.bind(pair.target_params)
        _, activations = target.forward(texts, pair.strategy.collect)
        return jax.nn.softmax(draft.rollout(texts, activations, starts, k))

    worst = 0.0
    for _ in range(rounds):
        drafts, q = propose(state)
        lengths = np.asarray(state.lengths)
        texts = np.array(state.tokens)
        for row, length in enumerate(lengths):
            texts[row, length : length + k] = drafts[row]
        wanted = np.asarray(teacher_forced(texts))[np.arange(8), lengths - 1]
        worst = max(worst, float(np.abs(wanted - np.asarray(jax.nn.softmax(q))).max()))
        state = decode.decode_rounds(decoder, pair.weights, state, 1)
    counts = np.asarray(state.counts).sum(axis=0)
    assert counts.min() > 0, "no rejection at some depth: the check would miss it"
    assert worst < 1e-4, f"q differs from the rollout's by {worst}"


def greedy_follows_the_target(kind: str = "spire") -> None:
    """Greedy speculation equals autoregressive decoding."""
    pair, prompts = models.pair(kind), models.ragged((1, 5, 9, 14), seed=2)
    texts = []
    for decoder in (pair.autoregressive(0.0), pair.decoder(3, 0.0)):
        state = decode.generate(decoder, pair.weights, prompts, [24] * 4, range(4), width=48)
        texts.append([np.asarray(state.tokens[i, : len(p) + 24]) for i, p in enumerate(prompts)])
    assert all(np.array_equal(a, b) for a, b in zip(*texts, strict=True))


def self_draft_fills_every_round() -> None:
    """The target as its own draft emits k + 1 tokens a round."""
    pair, prompts = models.pair("self"), models.ragged((3, 9), seed=2)
    state = decode.generate(pair.decoder(4, 0.0), pair.weights, prompts, [20] * 2, range(2))
    assert np.asarray(state.rounds).tolist() == [4, 4]


def rows_stop_at_the_end_of_sequence() -> None:
    """A row ends with its first end of sequence, wherever in a block that falls."""
    pair, prompts = models.pair("self"), models.ragged((3, 9, 6, 4), seed=2)
    free = decode.generate(pair.decoder(4, 0.0), pair.weights, prompts, [20] * 4, range(4))
    output = np.asarray(free.tokens)[0, len(prompts[0]) :].tolist()
    eos = output[6]  # in the middle of the first row's second block
    state = decode.generate(pair.decoder(4, 0.0, eos), pair.weights, prompts, [20] * 4, range(4))
    assert int(state.lengths[0]) == len(prompts[0]) + output.index(eos) + 1


def every_round_has_its_own_key() -> None:
    """A request's round counter counts its rounds: a position's draws are never used again."""
    pair, prompts = models.pair("spire"), models.ragged((3, 9), seed=2)
    state = decode.generate(pair.decoder(2), pair.weights, prompts, [20] * 2, range(2))
    assert np.array_equal(np.asarray(state.rounds), np.asarray(state.counts).sum(axis=1))


# --- the mutants -------------------------------------------------------------------------------


def key_shared_by_draft_and_residual(patch):
    def sampled(keys, sampling):
        def draw(depth, logits):
            q = transformed_logits(logits, sampling)
            return sample(verification.stream(keys, "next"), q), q

        return draw

    patch(decode, "sampled", sampled)


def residual_from_p_alone(patch):
    patch(verification, "residual_distribution", lambda p, q, b=1.0: p)


def residual_turned_round(patch):
    original = verification.residual_distribution
    patch(verification, "residual_distribution", lambda p, q, b=1.0: original(q, p))


def temperature_on_the_draft_only(patch):
    original, warm = decode.transformed_logits, Sampling(temperature=1.0)
    patch(decode, "transformed_logits", lambda logits, sampling: original(logits, warm))


def sampled_from_another_q_than_reported(patch):
    def flatter(keys, logits):
        return original(keys, logits / 2)

    original = drafting.sample
    patch(drafting, "sample", flatter)


def rejection_follows_the_inverse_ratio(patch):
    def verify(keys, drafts, q, p):
        k = drafts.shape[1]
        swapped = jnp.concatenate([q, p[:, k:]], axis=1)
        return original(keys, drafts, p[:, :k], swapped)

    original = verification.verify_tokens
    patch(decode, "VERIFICATIONS", {"token": verify})


def block_residual_without_b(patch):
    original = verification.residual_distribution
    patch(verification, "residual_distribution", lambda p, q, b=1.0: original(p, q))


def block_kept_as_often_as_it_could_be(patch):
    def acceptance(drafts, q, p):
        b, _ = original(drafts, q, p)
        return b, b[:, 1:]  # each h_i by itself, as if the longer prefixes had not been tried

    original = verification.block_acceptance
    patch(verification, "block_acceptance", acceptance)


def missing_catch_up_entry(patch):
    def extend(self, caches, tokens, positions, collect=(), **options):
        if tokens.shape[1] == 2:
            positions = positions.at[:, 0].set(-1)
        return original(self, caches, tokens, positions, collect, **options)

    original = Transformer.extend
    patch(Transformer, "extend", extend)


def refresh_skipped(patch):
    patch(Spire, "commit", lambda self, params, state, block: state)


def refresh_shifted_by_one(patch):
    def commit(self, params, state, block):
        block = dataclasses.replace(block, positions=block.positions + 1)
        return original(self, params, state, block)

    original = Spire.commit
    patch(Spire, "commit", commit)


def ring_off_by_one(patch):
    # The ring of window + k has one slot to spare: a draft writes up to position p + k - 1 while
    # its first query, at p, sees from p - window + 1 on. One fewer than that evicts live entries.
    def begin_windowed(entries, tokens, lengths, view, room, *rest):
        return original(entries, tokens, lengths, view, room - 2, *rest)

    original = spire_drafting.begin_windowed
    patch(spire_drafting, "begin_windowed", begin_windowed)


def sink_evicted(patch):
    def held_without_sinks(self, last):
        return original(self, last).at[:, : self.sink].set(EMPTY)

    original = RingCache.held
    patch(RingCache, "held", held_without_sinks)


def window_counted_without_the_query(patch):
    def may_attend(q_pos, k_pos, window=0, sink=0):
        decoding = not isinstance(q_pos, np.ndarray) and bool(window)
        return original(q_pos, k_pos, window + decoding, sink)

    original = masks.may_attend
    patch(masks, "may_attend", may_attend)


def stale_rejected_entry_visible(patch):
    def attend(*args, include_self=True):
        return original(*args)

    original = LayerCache.attend
    patch(LayerCache, "attend", attend)


def draft_position_off_by_one(patch):
    def propose(self, params, state, target, previous, last, positions, *rest):
        return original(self, params, state, target, previous, last, positions + 1, *rest)

    original = Spire.propose
    patch(Spire, "propose", propose)


def prefill_one_token_short(patch):
    def shorter(lengths, sink, ring):
        return original(jnp.maximum(lengths - 1, 0), sink, ring)

    original = spire_drafting.ring_positions
    patch(spire_drafting, "ring_positions", shorter)


def ring_prefill_unordered(patch):
    def rolled(lengths, sink, ring):
        positions, gather = original(lengths, sink, ring)
        return positions, jnp.maximum(gather - 1, 0)

    original = vanilla_drafting.ring_positions
    patch(vanilla_drafting, "ring_positions", rolled)


def q_recomputed_in_bfloat16(patch):
    def propose(self, *args):
        proposal, state = original(self, *args)
        q = proposal.q.astype(jnp.bfloat16).astype(jnp.float32)
        return dataclasses.replace(proposal, q=q), state

    original = Spire.propose
    patch(Spire, "propose", propose)


def bonus_token_skipped(patch):
    def verify(keys, drafts, q, p):
        accepted, following = original(keys, drafts, q, p)
        k = drafts.shape[1]
        following = jnp.where(accepted == k, drafts[:, -1], following)
        return jnp.minimum(accepted, k - 1), following

    original = verification.verify_tokens
    patch(decode, "VERIFICATIONS", {"token": verify})


def end_of_sequence_ignored_in_a_block(patch):
    original = decode._emit
    patch(decode, "_emit", lambda decoder, *rest: original(
        dataclasses.replace(decoder, eos=-1), *rest))  # fmt: skip


def round_counter_stands_still(patch):
    def emit(decoder, state, *rest):
        return dataclasses.replace(original(decoder, state, *rest), rounds=state.rounds)

    original = decode._emit
    patch(decode, "_emit", emit)


def target_writes_one_slot_late(patch):
    def extend(self, caches, tokens, positions, collect=(), **options):
        shifted = positions + 1 if tokens.shape[1] == 4 else positions
        return original(self, caches, tokens, shifted, collect, **options)

    original = Transformer.extend
    patch(Transformer, "extend", extend)


rollout_of_ring = functools.partial(drafts_follow_the_rollout, "ring")
MUTANTS = [
    (block_residual_without_b, blocks_follow_the_target),
    (block_kept_as_often_as_it_could_be, blocks_follow_the_target),
    (key_shared_by_draft_and_residual, samples_follow_the_target),
    (residual_from_p_alone, samples_follow_the_target),
    (residual_turned_round, samples_follow_the_target),
    (temperature_on_the_draft_only, samples_follow_the_target),
    (sampled_from_another_q_than_reported, samples_follow_the_target),
    (rejection_follows_the_inverse_ratio, samples_follow_the_target),
    (missing_catch_up_entry, rollout_of_ring),
    (ring_prefill_unordered, rollout_of_ring),
    (refresh_skipped, drafts_follow_the_rollout),
    (refresh_shifted_by_one, drafts_follow_the_rollout),
    (ring_off_by_one, drafts_follow_the_rollout),
    (sink_evicted, drafts_follow_the_rollout),
    (window_counted_without_the_query, drafts_follow_the_rollout),
    (stale_rejected_entry_visible, drafts_follow_the_rollout),
    (draft_position_off_by_one, drafts_follow_the_rollout),
    (prefill_one_token_short, drafts_follow_the_rollout),
    (q_recomputed_in_bfloat16, drafts_follow_the_rollout),
    (target_writes_one_slot_late, greedy_follows_the_target),
    (bonus_token_skipped, self_draft_fills_every_round),
    (end_of_sequence_ignored_in_a_block, rows_stop_at_the_end_of_sequence),
    (round_counter_stands_still, every_round_has_its_own_key),
]
CHECKS = list(dict.fromkeys(check for _, check in MUTANTS))
# In the full tier: a check that catches others of its kind has shown that it can.
LATER = {residual_turned_round, rejection_follows_the_inverse_ratio, refresh_shifted_by_one,
         ring_off_by_one, window_counted_without_the_query, draft_position_off_by_one,
         prefill_one_token_short}  # fmt: skip


def name_of(value) -> str:
    return getattr(value, "__name__", "drafts_follow_the_rollout_ring")


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_check_passes_without_a_bug(check):
    forget_compiled()
    check()


@pytest.mark.parametrize(
    "mutant,check",
    [pytest.param(*of, marks=pytest.mark.slow if of[0] in LATER else ()) for of in MUTANTS],
    ids=name_of,
)
def test_mutant_is_caught(mutant, check, monkeypatch):
    planted = []

    def patch(owner, name, value):
        planted.append(name)
        monkeypatch.setattr(owner, name, value)

    mutant(patch)
    assert planted
    forget_compiled()
    try:
        with pytest.raises(AssertionError):
            check()
    finally:
        monkeypatch.undo()
        forget_compiled()

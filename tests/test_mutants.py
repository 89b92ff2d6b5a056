"""Planted bugs: each is caught by a test that passes without it.

Losslessness sees bugs of sampling, verification and of the target's cache. It is blind to bugs of
the draft's cache (catch-up, refresh, ring, sink, window, prefill), which only cost acceptance:
those are caught by holding every distribution that the decoder drafts from against the rollout
that training and the oracle use. Bugs are planted by monkeypatching; the product has no hooks.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import test_anchor
import test_block
import test_decode
import test_decode_rounds
import test_eagle3
import test_longspec
import test_lossless
import test_spire
import test_strategies
import test_verification

import spire_jax.decoding.rounds as decode
import spire_jax.decoding.verification as verification
import spire_jax.drafting.anchor as anchor_drafting
import spire_jax.drafting.longspec as longspec_drafting
import spire_jax.drafting.spire as spire_drafting
import spire_jax.drafting.strategy as drafting
import spire_jax.drafting.vanilla as vanilla_drafting
import spire_jax.models.masks as masks
from spire_jax.drafting.anchor import AnchorCache, AnchorView
from spire_jax.drafting.block import BlockDraft, BlockDrafting
from spire_jax.drafting.eagle3 import Eagle3, Eagle3Draft, Eagle3Options
from spire_jax.drafting.longspec import Before, LongSpec, LongSpecDraft
from spire_jax.drafting.spire import Spire, SpireDraft
from spire_jax.drafting.stride import Strided, StridedDraft
from spire_jax.models.caches import LayerCache, RingCache
from spire_jax.models.layers import Block
from spire_jax.models.masks import EMPTY
from spire_jax.models.sampling import Sampling, sample, share_of, transformed_logits
from spire_jax.models.transformer import Transformer


def forget() -> None:
    """Trace and decode anew: what was made before a patch does not have it."""
    for function in (decode.decode_rounds, decode._prefill):
        function.clear_cache()  # type: ignore[attr-defined]
    for result in (
        test_decode.free, test_verification.decoded, test_block.plain, test_spire.reference,
        test_spire.rollout_of, test_longspec.compiled, test_anchor.made, test_anchor.steps,
    ):  # fmt: skip
        result.cache_clear()


# --- the checks: tests of other files, which pass without a bug ----------------------------------


def samples_follow_the_target() -> None:
    test_lossless.test_sampled_joint_equals_enumeration(*test_lossless.SAMPLED[0])


def blocks_follow_the_target() -> None:
    test_verification.test_output_follows_the_target_exactly("temperature 1", 2, "block")


def drafts_follow_the_rollout() -> None:
    test_decode_rounds.check_rounds("spire")


def ring_drafts_follow_the_full_pass() -> None:
    test_decode_rounds.check_rounds("ring")


def greedy_follows_the_target() -> None:
    test_lossless.test_greedy_equals_autoregressive("spire", test_lossless.FIRST["spire"])


def the_target_accepts_itself() -> None:
    test_lossless.test_dense_target_as_its_own_draft(4)


def rows_stop_at_the_end_of_sequence() -> None:
    test_decode.test_rows_end_with_the_first_end_of_sequence()


def every_round_is_counted() -> None:
    test_decode.test_a_round_counts_whole_even_if_the_budget_cuts_it()


def strides_follow_the_rollout() -> None:
    options = {"window": 6, "stride": 2, "head": "markov", "head_rank": 4}
    test_strategies.test_the_oracles_view_is_what_replaying_finds(
        "stride", options, test_strategies.models.TINY, 11
    )


def strides_samples_follow_the_target() -> None:
    test_lossless.test_sampled_joint_equals_enumeration("stride", 1.0, {})


def blocks_drafts_follow_the_rollout() -> None:
    options = {"window": 6, "k": 4, "head": "markov", "head_rank": 4, "fused": (0, 2)}
    test_strategies.test_the_oracles_view_is_what_replaying_finds(
        "block", options, test_strategies.models.TINY, 11
    )


def blocks_follow_the_rollout_after_rejections() -> None:
    test_decode_rounds.check_rounds("block")


def blocks_are_what_they_are_by_definition() -> None:
    test_block.test_a_block_is_the_last_token_and_masks_over_fused_memories(True)


def blocks_samples_follow_the_target() -> None:
    test_lossless.test_sampled_joint_equals_enumeration("block", 1.0, {})


def fused_memories_are_normalized() -> None:
    test_spire.test_fused_memories_are_one_vector_for_all_layers()


def depths_keep_the_targets_distribution() -> None:
    test_lossless.test_sampled_joint_equals_enumeration(
        "stride_confident", 1.0, {"prices": test_lossless.PRICES}
    )


def longspec_follows_the_rollout() -> None:
    test_strategies.test_the_oracles_view_is_what_replaying_finds(
        "longspec", {"window": 6}, test_strategies.models.TINY, 11
    )


def longspec_drafts_follow_the_rollout() -> None:
    test_decode_rounds.check_rounds("longspec")


def longspec_is_as_defined() -> None:
    test_longspec.test_a_rollout_is_the_layer_by_definition(test_strategies.WINDOWED)


def anchors_are_those_of_brute_force() -> None:
    test_anchor.test_a_text_is_read_under_the_mask()


def cached_anchors_are_those_of_brute_force() -> None:
    test_anchor.check_steps(0)


def eagles_follow_the_definition() -> None:
    test_eagle3.test_the_rollout_is_the_chain_by_definition()


def eagles_follow_their_rollout() -> None:
    test_strategies.test_the_oracles_view_is_what_replaying_finds(
        "eagle3", {"window": 6, "sink": 1}, test_strategies.models.TINY, 11
    )


def eagles_rounds_follow_their_rollout() -> None:
    test_decode_rounds.check_rounds("eagle3")


def eagles_steps_are_weighed() -> None:
    test_eagle3.test_the_loss_is_every_steps_of_every_token("distillation")


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
    def verify(keys, drafts, q, p, depth=None):
        accepted, following = original(keys, drafts, q, p, depth)
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


def a_step_of_stride(patch, change):
    """`change` of the arguments of a pass in decoding; the rollout stays as it is."""

    def strided_step(self, caches, tokens, positions, slots):
        return original(self, *change(self, caches, tokens, positions, slots))

    original = StridedDraft.strided_step
    patch(StridedDraft, "strided_step", strided_step)


def a_pass_one_position_on(patch):
    a_step_of_stride(patch, lambda _, caches, tokens, at, slots: (caches, tokens, at + 1, slots))


def mask_is_a_token(patch):
    def strided_step(self, caches, tokens, positions, slots):
        self.mask.value = self.embedding[...][0]
        return original(self, caches, tokens, positions, slots)

    original = StridedDraft.strided_step
    patch(StridedDraft, "strided_step", strided_step)


def masks_stay_in_the_cache(patch):
    """Where the tokens that became known should be, a pass sees the masks that stood there."""

    def strided_step(self, caches, tokens, positions, slots):
        written, known = [], tokens.shape[1]

        def append(cache, at, k, v, rows=None):
            written.append(cache)
            if known > 1 and len(written) <= len(caches):  # inputs, before the memories
                at = at.at[:, :known].set(-1)
            return kept(cache, at, k, v, rows)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(LayerCache, "append", append)
            return original(self, caches, tokens, positions, slots)

    original, kept = StridedDraft.strided_step, LayerCache.append
    patch(StridedDraft, "strided_step", strided_step)


def memory_one_layer_off(patch):
    def memories(self, xs):
        mixed = original(self, xs)
        return mixed[1:] + mixed[:1] if xs[0].shape[1] < 4 else mixed  # in decoding alone

    original = StridedDraft.memories
    patch(StridedDraft, "memories", memories)


def slots_shifted_by_one(patch):
    def strided_step(self, caches, tokens, positions, slots):
        logits, caches = original(self, caches, tokens, positions, slots)
        return jnp.roll(logits, 1, axis=1), caches

    original = StridedDraft.strided_step
    patch(StridedDraft, "strided_step", strided_step)


def head_fed_the_token_before_the_previous(patch):
    def drawn_slots(self, module, x, first, begin, draw):
        def with_head(module, logits, token, of_head):
            return original(module, logits, first, of_head)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(StridedDraft, "with_head", with_head)
            return whole(self, module, x, first, begin, draw)

    original, whole = StridedDraft.with_head, Strided.drawn_slots
    patch(Strided, "drawn_slots", drawn_slots)


def verified_with_the_q_before_the_head(patch, of=Strided):
    def propose(self, *arguments):
        proposal, state = original(self, *arguments)
        given = drafting.forced(proposal.tokens, Sampling())
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(
                StridedDraft, "with_head", lambda _, logits, token, state: (logits, state)
            )
            headless, _ = original(self, *arguments[:-1], given)
        return dataclasses.replace(proposal, q=headless.q), state

    original = of.propose
    patch(of, "propose", propose)


def blocks_verified_with_the_q_before_the_head(patch):
    verified_with_the_q_before_the_head(patch, BlockDrafting)


def masks_one_position_on(patch):
    """What a pass after the last token is rotated by."""

    def strided_step(self, *arguments, **options):
        def moved(of):
            return lambda block, x, at: of(block, x, at.at[:, 1:].add(1))

        with pytest.MonkeyPatch.context() as inner:
            for name in ("queries", "keys_values"):
                inner.setattr(Block, name, moved(getattr(Block, name)))
            return original(self, *arguments, **options)

    original = StridedDraft.strided_step
    patch(StridedDraft, "strided_step", strided_step)


def masks_stay_where_tokens_are_kept(patch):
    def commit(self, params, state, block):
        positions = block.positions.at[:, 1:].set(-1)
        return original(self, params, state, dataclasses.replace(block, positions=positions))

    original = Spire.commit
    patch(Spire, "commit", commit)


def activations_of_other_layers_are_read(patch):
    def commit(self, params, state, block):
        turned = block.activations[1:] + block.activations[:1]
        return original(self, params, state, dataclasses.replace(block, activations=turned))

    original = Spire.commit
    patch(Spire, "commit", commit)


def block_slots_shifted_by_one(patch):
    def strided_step(self, *arguments, **options):
        x, caches = original(self, *arguments, **options)
        return jnp.roll(x, 1, axis=1), caches

    original = StridedDraft.strided_step
    patch(StridedDraft, "strided_step", strided_step)


def a_block_sees_what_the_target_makes_of_it(patch):
    """In the rollout: its own tokens, and those of blocks after it."""

    def over_text(self, i, q, keys_values, positions, k_pos, limit):
        return original(self, i, q, keys_values, positions + 4, k_pos, limit + 4)

    original = StridedDraft.over_text
    patch(StridedDraft, "over_text", over_text)


def blocks_see_no_later_masks(patch):
    patch(BlockDraft, "seen_ahead", StridedDraft.seen_ahead)


def depth_of_the_drawn_tokens(patch):
    """A row has verified what the draft itself finds likely, token by token, as drawn."""

    def drawn_slots(self, *arguments):
        tokens, q, _ = original(self, *arguments)
        share = share_of(q, tokens)
        return tokens, q, jnp.log(share) - jnp.log1p(-jnp.minimum(share, 0.999))

    original = Strided.drawn_slots
    patch(Strided, "drawn_slots", drawn_slots)


def what_is_fused_is_not_normalized(patch):
    def of_target(self, tokens, activations):
        with pytest.MonkeyPatch.context() as inner:
            if self.memory == "fused":
                inner.setattr(self, "norm_fused", lambda y: y)
            return original(self, tokens, activations)

    original = SpireDraft.of_target
    patch(SpireDraft, "of_target", of_target)


def sees_the_target_at_the_start(patch):
    patch(LongSpec, "of_round", lambda _, target, at: Before(target[-1], at + 1))


def reads_the_layer_before_the_last(patch):
    patch(LongSpec, "of_round", lambda _, target, at: Before(target[-2], at))


def final_norm_before_the_head(patch):
    def norm_final(self, x):
        decoding = x.shape[1] == 1
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True)) if decoding else x

    patch(LongSpecDraft, "norm_final", norm_final)


def last_drafted_token_without_an_entry(patch):
    patch(LongSpec, "commit", lambda self, params, state, block: state)


def a_rollouts_limit_off_by_one(patch):
    def attention(*args, limit=None, **options):
        return original(*args, limit=None if limit is None else limit + 1, **options)

    original = longspec_drafting.attention
    patch(longspec_drafting, "attention", attention)


def a_rollout_rotates_by_its_start(patch):
    def far(self, x, positions, attend):
        return original(self, x, positions // test_longspec.K * test_longspec.K, attend)

    original = LongSpecDraft.far
    patch(LongSpecDraft, "far", far)


def final_norm_in_training(patch):
    def norm_final(self, x):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))

    patch(LongSpecDraft, "norm_final", norm_final)


def a_line_end_begins_the_next_line(patch):
    def lines_of(*arguments):
        lines = original(*arguments)
        begin = jnp.where(lines.ends, lines.positions, lines.begin)
        return dataclasses.replace(lines, begin=begin)

    original = anchor_drafting.lines_of
    patch(anchor_drafting, "lines_of", lines_of)


def one_anchor_more_than_the_budget(patch):
    def sees(self, q_pos, k_pos):
        return original(dataclasses.replace(self, budget=self.budget + 1), q_pos, k_pos)

    original = AnchorView.sees
    patch(AnchorView, "sees", sees)


def full_layers_counted_from_zero(patch):
    def views(self, target):
        found = original(self, target)
        return found[-1:] + found[:-1]

    original = anchor_drafting.AnchorOptions.views
    patch(anchor_drafting.AnchorOptions, "views", views)


def the_ring_sees_the_line_before(patch):
    def near(self, q, k_pos):
        cached = k_pos.shape != q.positions.shape
        begin = q.begin - 1 if cached else q.begin
        return original(self, dataclasses.replace(q, begin=begin), k_pos)

    original = AnchorView.near
    patch(AnchorView, "near", near)


def rejected_anchors_stay(patch):
    def continued(anchors, tokens, positions, ends):
        new = original(anchors, tokens, positions, ends)
        return dataclasses.replace(new, old=anchors)

    original = anchor_drafting.continued
    patch(anchor_drafting, "continued", continued)


def anchors_begin_in_the_first_slot(patch):
    def continued(anchors, tokens, positions, ends):
        new = original(anchors, tokens, positions, ends)
        size = anchors.shape[1]
        slots = jnp.where(new.slots < size, new.lines.before % size, size)
        return dataclasses.replace(new, slots=slots)

    original = anchor_drafting.continued
    patch(anchor_drafting, "continued", continued)


def no_room_for_drafted_anchors(patch):
    original = anchor_drafting.Anchor._room
    patch(anchor_drafting.Anchor, "_room", lambda self, k: original(self, k) - k)


def the_first_token_is_seen_twice(patch):
    def attend_and_append(self, rows, q, k, v, new, view):
        again = jnp.where(new.old == 0, 1, new.old)  # as if it were none of the sinks
        return original(self, rows, q, k, v, dataclasses.replace(new, old=again), view)

    original = AnchorCache.attend_and_append
    patch(AnchorCache, "attend_and_append", attend_and_append)


def a_rollout_of_eagle(patch, change):
    """`change` of the text and the activations of a rollout."""

    def rollout(self, tokens, activations, *rest):
        return original(self, *change(tokens, activations), *rest)

    original = Eagle3Draft.rollout
    patch(Eagle3Draft, "rollout", rollout)


def feature_shifted_by_one(patch):
    a_rollout_of_eagle(patch, lambda x, ys: (x, tuple(jnp.roll(y, 1, axis=1) for y in ys)))


def feature_beside_its_own_token(patch):
    a_rollout_of_eagle(patch, lambda x, ys: (jnp.roll(x, 1, axis=1), ys))


def chain_learns_from_the_targets_features(patch):
    """No training-time test: what the target made of drafted tokens, instead of the chain's own."""

    def rollout(self, tokens, activations, starts, k, read=None):
        for j in range(k):
            of = np.minimum(starts + j, tokens.shape[1] - 1)
            yield from original(self, tokens, activations, of, 1, read)

    original = Eagle3Draft.rollout
    patch(Eagle3Draft, "rollout", rollout)


def steps_weigh_alike(patch):
    def learns(self, strategy, k):
        return dataclasses.replace(original(self, strategy, k), decay=1.0)

    original = Eagle3Options.learns
    patch(Eagle3Options, "learns", learns)


def a_step_of_eagle(patch, change):
    """`change` of the state before and after a step in decoding; the rollout stays as it is."""

    def step(self, params, state, *rest):
        logits, after = original(self, params, state, *rest)
        return logits, change(state, after)

    original = Eagle3.step
    patch(Eagle3, "step", step)


def chain_forgets_its_own_output(patch):
    a_step_of_eagle(patch, lambda x, y: dataclasses.replace(y, features=x.features))


def drafted_pairs_unseen(patch):
    a_step_of_eagle(patch, lambda x, y: dataclasses.replace(y, cache=x.cache))


def pair_one_index_on(patch):
    def step(self, cache, tokens, features, at):
        return original(self, cache, tokens, features, at + 1)

    original = Eagle3Draft.step
    patch(Eagle3Draft, "step", step)


def a_commit_of_eagle(patch, keep):
    """What a round drafted stays, in the part of the state called `keep`."""

    def commit(self, params, state, block):
        after = original(self, params, state, block)
        drafted = block.tokens.shape[1] == test_decode_rounds.K + 1
        return dataclasses.replace(after, **{keep: getattr(state, keep)}) if drafted else after

    original = Eagle3.commit
    patch(Eagle3, "commit", commit)


def drafted_pairs_stay(patch):
    a_commit_of_eagle(patch, "cache")


def drafted_features_stay(patch):
    a_commit_of_eagle(patch, "features")


def committed_beside_the_wrong_token(patch):
    def commit(self, params, state, block):
        tokens = jnp.roll(block.tokens, 1, axis=1)
        return original(self, params, state, dataclasses.replace(block, tokens=tokens))

    original = Eagle3.commit
    patch(Eagle3, "commit", commit)


# The first of each check in the fast tier (nothing where it is None), the others in the full one.
CAUGHT: dict = {
    blocks_follow_the_target: (block_residual_without_b, block_kept_as_often_as_it_could_be),
    samples_follow_the_target: (
        key_shared_by_draft_and_residual, residual_from_p_alone, residual_turned_round,
        temperature_on_the_draft_only, sampled_from_another_q_than_reported,
        rejection_follows_the_inverse_ratio,
    ),
    ring_drafts_follow_the_full_pass: (missing_catch_up_entry, ring_prefill_unordered),
    drafts_follow_the_rollout: (
        stale_rejected_entry_visible, refresh_skipped, refresh_shifted_by_one, ring_off_by_one,
        sink_evicted, window_counted_without_the_query, draft_position_off_by_one,
        prefill_one_token_short, q_recomputed_in_bfloat16,
    ),
    strides_follow_the_rollout: (
        slots_shifted_by_one, a_pass_one_position_on, mask_is_a_token,
        masks_stay_in_the_cache, memory_one_layer_off, head_fed_the_token_before_the_previous,
    ),
    longspec_follows_the_rollout: (
        None, sees_the_target_at_the_start, reads_the_layer_before_the_last,
        final_norm_before_the_head,
    ),
    longspec_drafts_follow_the_rollout: (None, last_drafted_token_without_an_entry),
    longspec_is_as_defined: (
        a_rollouts_limit_off_by_one, a_rollout_rotates_by_its_start, final_norm_in_training,
    ),
    anchors_are_those_of_brute_force: (
        None, a_line_end_begins_the_next_line, one_anchor_more_than_the_budget,
        full_layers_counted_from_zero,
    ),
    cached_anchors_are_those_of_brute_force: (
        None, the_ring_sees_the_line_before, rejected_anchors_stay, anchors_begin_in_the_first_slot,
        no_room_for_drafted_anchors, the_first_token_is_seen_twice,
    ),
    strides_samples_follow_the_target: (None, verified_with_the_q_before_the_head),
    blocks_drafts_follow_the_rollout: (
        None, masks_one_position_on, block_slots_shifted_by_one,
        a_block_sees_what_the_target_makes_of_it, activations_of_other_layers_are_read,
        head_fed_the_token_before_the_previous,
    ),
    blocks_follow_the_rollout_after_rejections: (None, masks_stay_where_tokens_are_kept),
    blocks_are_what_they_are_by_definition: (None, blocks_see_no_later_masks),
    blocks_samples_follow_the_target: (None, blocks_verified_with_the_q_before_the_head),
    fused_memories_are_normalized: (None, what_is_fused_is_not_normalized),
    depths_keep_the_targets_distribution: (None, depth_of_the_drawn_tokens),
    eagles_follow_the_definition: (
        chain_learns_from_the_targets_features, feature_shifted_by_one,
        feature_beside_its_own_token,
    ),
    eagles_steps_are_weighed: (None, steps_weigh_alike),
    eagles_follow_their_rollout: (
        None, chain_forgets_its_own_output, drafted_pairs_unseen, pair_one_index_on,
    ),
    eagles_rounds_follow_their_rollout: (
        None, drafted_pairs_stay, drafted_features_stay, committed_beside_the_wrong_token,
    ),
    greedy_follows_the_target: (target_writes_one_slot_late,),
    the_target_accepts_itself: (bonus_token_skipped,),
    rows_stop_at_the_end_of_sequence: (end_of_sequence_ignored_in_a_block,),
    every_round_is_counted: (round_counter_stands_still,),
}  # fmt: skip


@pytest.mark.parametrize(
    "check,mutant",
    [
        pytest.param(check, mutant, id=mutant.__name__, marks=pytest.mark.slow if n else ())
        for check, mutants in CAUGHT.items()
        for n, mutant in enumerate(mutants)
        if mutant is not None
    ],
)
def test_mutant_is_caught(check, mutant, monkeypatch):
    planted = []

    def patch(owner, name, value):
        planted.append(name)
        monkeypatch.setattr(owner, name, value)

    mutant(patch)
    assert planted
    forget()
    try:
        with pytest.raises(AssertionError):
            check()
    finally:
        monkeypatch.undo()
        forget()

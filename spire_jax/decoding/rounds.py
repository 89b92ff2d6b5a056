"""Decoding: a state record, a pure speculation round, and a `while_loop` over rounds.

Autoregressive decoding is the case of no draft: a round of depth 0. Every row has its own
length, budget, round counter and random stream; nothing in the loop depends on them in shape.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from spire_jax.decoding.depth import chosen
from spire_jax.decoding.verification import VERIFICATIONS
from spire_jax.drafting.strategy import Processed, Proposal, State, Strategy, sampled
from spire_jax.models.caches import Caches, empty_full, full_cache
from spire_jax.models.records import record
from spire_jax.models.sampling import (
    NO_TOKEN,
    Sampling,
    round_keys,
    seed_keys,
    seed_words,
    transformed_logits,
)
from spire_jax.models.sharding import constrain, place_rows
from spire_jax.models.transformer import Model, Params

# What a token of the text is (`DecodeState.kinds`).
PROMPT, ACCEPTED, CORRECTION, BONUS = range(4)
# Why a text ends with NO_TOKEN.
NO_LOGITS = ("the target's logits are nan or inf: look for such numbers in its weights, or decode "
             "in float32 (decode.dtype)")  # fmt: skip


class DecodeError(ValueError):
    """A request that cannot be decoded; the message names the row and the remedy."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """All that is static about decoding; hashable, an argument of the jitted functions."""

    target: Model
    strategy: Strategy | None = None  # None: autoregressive
    k: int = 0  # drafted tokens per round; 0 without a strategy
    sampling: Sampling = Sampling()
    eos: int | tuple[int, ...] = ()  # the token, or tokens, that end a row; -1 = none
    verification: str = "token"  # a key of VERIFICATIONS
    # What a round costs that verifies 0 .. k drafted tokens, in any unit: with these each row
    # chooses how many of its own (depth.py), of a draft that estimates what survives. () = all.
    prices: tuple[float, ...] = ()
    # Then the target's pass takes in as many drafted tokens as the smallest of these that is enough
    # for every row; k is one of them. A row verifies at least the least of them. () = k alone, 0.
    widths: tuple[int, ...] = ()

    def __post_init__(self):
        if (self.strategy is None) != (self.k == 0):
            raise DecodeError(f"k={self.k}: use 1 or more with a draft, 0 without one")
        if self.prices and len(self.prices) != self.k + 1:
            raise DecodeError(
                f"prices are {len(self.prices)}: give those of 0 to k={self.k} tokens"
            )
        if self.widths and (max(self.widths) != self.k or min(self.widths) < 1 or not self.prices):
            raise DecodeError(f"widths={self.widths}: k={self.k} and less, with prices")

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a row."""
        eos = (self.eos,) if isinstance(self.eos, int) else self.eos
        return tuple(token for token in eos if token >= 0)

    @property
    def collect(self) -> tuple[int, ...]:
        """The activations y^l of the target that the strategy reads."""
        return self.strategy.collect if self.strategy is not None else ()


class Weights(NamedTuple):
    """Parameters of the target and of the draft (None without one)."""

    target: Params
    draft: Params = None


@record()
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch of requests between two rounds."""

    tokens: Int[Array, "B C"]  # the text so far: prompt, then output; NO_TOKEN ends it (NO_LOGITS)
    kinds: Int[Array, "B C"]  # PROMPT, ACCEPTED, CORRECTION or BONUS, token by token
    lengths: Int[Array, " B"]  # tokens in the text; the last one is not in the target's cache
    ends: Int[Array, " B"]  # length at which the row's budget is spent
    done: Bool[Array, " B"]
    rounds: Int[Array, " B"]  # the request's own round counter
    counts: Int[Array, "B k1"]  # rounds in which 0 .. k drafted tokens were accepted
    seeds: Key[Array, " B"]  # the request's random seed
    target_cache: Caches
    draft_state: State


def generation_lengths(counts: Int[np.ndarray, "*rows k1"]) -> tuple[int, int]:
    """Emitted tokens and rounds behind `counts`: a round of a acceptances emits a + 1.

    A budget that cuts the last round does not count.
    """
    counts = np.asarray(counts)
    return int((counts * np.arange(1, counts.shape[-1] + 1)).sum()), int(counts.sum())


# --- one round ---------------------------------------------------------------------------------


def speculation_round(decoder: Decoder, weights: Weights, state: DecodeState) -> DecodeState:
    """Draft k tokens, verify them in one pass of the target over k + 1, keep what is accepted."""
    return round_and_depths(decoder, weights, state)[0]


def round_and_depths(
    decoder: Decoder, weights: Weights, state: DecodeState
) -> tuple[DecodeState, Int[Array, " B"]]:
    """`speculation_round`, and how many drafted tokens each row had verified."""
    keys = round_keys(state.seeds, state.rounds)
    positions = state.lengths - 1
    last = _token(state.tokens, positions)
    strategy, draft_state = decoder.strategy, state.draft_state
    if strategy is None:
        none = jnp.zeros((last.shape[0], 0, decoder.target.config.vocab_size))
        drafted = Proposal(none[..., 0].astype(jnp.int32), none)
    else:
        previous = _token(state.tokens, jnp.maximum(positions - 1, 0))
        previous = jnp.where(state.done, -1, previous)  # what it would ingest stays as it is
        drafted, draft_state = strategy.propose(
            weights.draft, draft_state, state.target_cache, previous, last, positions, decoder.k,
            sampled(keys, decoder.sampling),
        )  # fmt: skip
    block = jnp.concatenate([last[:, None], drafted.tokens], axis=1)
    block_positions = positions[:, None] + jnp.arange(decoder.k + 1)
    depth = None
    if decoder.prices:
        if drafted.survival is None:
            raise DecodeError("prices: the draft makes no estimate of what survives "
                              "(drafts.NAME.confidence)")  # fmt: skip
        depth = chosen(drafted.survival, decoder.prices, min(decoder.widths, default=0))
    logits, activations, cache, block_positions = _target_pass(
        decoder, weights, state, block, block_positions, depth
    )
    p = transformed_logits(logits, decoder.sampling)
    verify = VERIFICATIONS[decoder.verification]
    accepted, following = verify(keys, drafted.tokens, drafted.q, p, depth)
    if strategy is not None:
        processed = Processed(block, block_positions, activations, cache)
        draft_state = strategy.commit(weights.draft, draft_state, processed)
    state = dataclasses.replace(state, target_cache=cache, draft_state=draft_state)
    depths = jnp.full_like(accepted, decoder.k) if depth is None else depth
    return _emit(decoder, state, drafted.tokens, accepted, following, depths), depths


def _target_pass(
    decoder: Decoder,
    weights: Weights,
    state: DecodeState,
    block: Int[Array, "B k1"],
    positions: Int[Array, "B k1"],
    depth: Int[Array, " B"] | None,
) -> tuple[Array, Any, Caches, Int[Array, "B k1"]]:
    """Logits, activations and cache of the target over a block, and positions: -1 where it has not
    looked, since no row that still decodes needs it."""
    extend, widths = decoder.target.bind(weights.target).extend, sorted(decoder.widths)
    if depth is None or len(widths) < 2:
        return *extend(state.target_cache, block, positions, decoder.collect), positions
    deepest = jnp.max(jnp.where(state.done, 0, depth))

    def of_width(width: int):
        logits, ys, cache = extend(
            state.target_cache, block[:, : width + 1], positions[:, : width + 1], decoder.collect
        )
        rest = decoder.k - width
        logits, ys = jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0), (0, rest), (0, 0))), (logits, tuple(ys))
        )
        seen = jnp.arange(decoder.k + 1) <= width
        return logits, ys, cache, jnp.where(seen, positions, -1)

    enough = jnp.searchsorted(jnp.asarray(widths), deepest)
    return jax.lax.switch(enough, [functools.partial(of_width, width) for width in widths])


def _emit(
    decoder: Decoder,
    state: DecodeState,
    drafts: Int[Array, "B k"],
    accepted: Int[Array, " B"],
    following: Int[Array, " B"],
    depths: Int[Array, " B"],
) -> DecodeState:
    """Append the accepted drafts and the token after them, up to the budget and to EOS."""
    k = decoder.k
    depth = jnp.arange(k + 1)[None]
    at_following = depth == accepted[:, None]
    new = jnp.where(at_following, following[:, None], jnp.pad(drafts, ((0, 0), (0, 1))))
    last = jnp.where(depth == depths[:, None], BONUS, CORRECTION)
    kinds = jnp.where(at_following, last, ACCEPTED)
    emitted = depth <= accepted[:, None]
    is_end = emitted & jnp.isin(new, jnp.array((*decoder.ends, NO_TOKEN)))
    emitted &= jnp.cumsum(is_end, axis=1) - is_end == 0  # up to and with the first
    ended = jnp.any(is_end & emitted, axis=1)
    active = ~state.done
    # A cut by the budget also cuts an EOS beyond it; the row is done either way.
    emitted &= active[:, None] & (state.lengths[:, None] + depth < state.ends[:, None])
    lengths = state.lengths + jnp.sum(emitted, axis=1, dtype=jnp.int32)
    columns = jnp.where(emitted, state.lengths[:, None] + depth, state.tokens.shape[1])
    # Row by row: told so, no device of a mesh asks the others for their rows' tokens.
    put = jax.vmap(lambda old, at, new: old.at[at].set(new, mode="drop"))
    return dataclasses.replace(
        state,
        tokens=put(state.tokens, columns, new),
        kinds=put(state.kinds, columns, kinds.astype(jnp.int8)),
        lengths=lengths,
        done=state.done | (active & ended) | (lengths >= state.ends),
        rounds=state.rounds + active,
        # The record may have room for deeper rounds than this one.
        counts=state.counts.at[:, : k + 1].add(at_following & active[:, None]),
    )


def _token(tokens: Int[Array, "B C"], positions: Int[Array, " B"]) -> Int[Array, " B"]:
    return jnp.take_along_axis(tokens, positions[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_rounds(
    decoder: Decoder, weights: Weights, state: DecodeState, max_rounds: int | Int[Array, ""]
) -> DecodeState:
    """Rounds until any row finishes, or `max_rounds` have passed; `state` is donated."""
    done_before = jnp.sum(state.done)

    def go_on(carry):
        i, state = carry
        return (i < max_rounds) & (jnp.sum(state.done) == done_before) & ~jnp.all(state.done)

    def body(carry):
        i, state = carry
        return i + 1, speculation_round(decoder, weights, state)

    return jax.lax.while_loop(go_on, body, (jnp.int32(0), state))[1]


# --- requests ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(decoder: Decoder, weights: Weights, tokens, lengths, capacity: int):
    """Caches over the first T - 1 tokens of each prompt; the last token opens round 1."""
    target, strategy = decoder.target, decoder.strategy
    tokens = constrain(tokens, "batch", None)
    activations: tuple[Any, ...] = ()
    if tokens.shape[1] == 0:
        cache = empty_full(target.config, tokens.shape[0], capacity, target.compute)
    else:
        activations, keys_values = target.bind(weights.target).prefill(tokens, decoder.collect)
        cache = tuple(full_cache(k, v, capacity, target.compute) for k, v in keys_values)
    if strategy is None:
        return cache, None
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    prompt = Processed(tokens, positions, activations, cache)
    return cache, strategy.begin(weights.draft, prompt, lengths, decoder.k, capacity)


def start(
    decoder: Decoder,
    weights: Weights,
    prompts: Sequence[Int[np.ndarray, " _"]],
    budgets: Sequence[int],
    seeds: Sequence[int],
    *,
    width: int = 0,
) -> DecodeState:
    """Check the requests and prefill them.

    Args:
        prompts: token ids, at least one each.
        budgets: tokens to generate for each.
        seeds: each request's own random seed, of 64 bits.
        width: positions to make room for: prompt, budget and k; 0 = what these need. A fixed
            width keeps the compiled shapes the same from batch to batch.

    Raises:
        DecodeError: an empty prompt, a token outside the vocabulary, a budget under 1, or a
            context + budget beyond the model, or with k beyond `width`.
    """
    config = decoder.target.config
    for row, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
        if len(prompt) == 0:
            raise DecodeError(f"row {row}: the prompt is empty; give at least one token")
        if budget < 1:
            raise DecodeError(f"row {row}: the budget is {budget}; ask for at least one token")
        if not 0 <= int(np.min(prompt)) <= int(np.max(prompt)) < config.n_tokens:
            raise DecodeError(f"row {row}: a token is outside the vocabulary of {config.n_tokens}")
        need = len(prompt) + budget
        of = f"row {row}: context {len(prompt)} + budget {budget}"
        # What is drafted beyond the end is never kept: it takes room in the caches alone.
        if config.max_len and need > config.max_len:
            raise DecodeError(f"{of} = {need} goes beyond the model's {config.max_len} positions; "
                              f"shorten one of them")  # fmt: skip
        if width and need + decoder.k > width:
            raise DecodeError(f"{of} + k {decoder.k} = {need + decoder.k} goes beyond the "
                              f"decoder's {width} positions; shorten one of them")  # fmt: skip
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    ends = lengths + np.array(budgets, np.int32)
    capacity = width or int(np.max(ends)) + decoder.k
    prompt_width = int(np.max(lengths))
    tokens = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    cached = np.maximum(lengths - 1, 0)
    cache, draft_state = _prefill(decoder, weights, tokens[:, : prompt_width - 1], cached, capacity)
    batch = len(prompts)
    return DecodeState(
        tokens=place_rows(tokens),
        kinds=place_rows(np.zeros((batch, capacity), np.int8)),
        lengths=place_rows(lengths),
        ends=place_rows(ends),
        done=place_rows(np.zeros(batch, bool)),
        rounds=place_rows(np.zeros(batch, np.int32)),
        counts=place_rows(np.zeros((batch, decoder.k + 1), np.int32)),
        seeds=seed_keys(place_rows(np.stack([seed_words(seed) for seed in seeds]))),
        target_cache=cache,
        draft_state=draft_state,
    )


def finish(
    decoder: Decoder, weights: Weights, state: DecodeState, rounds_per_call: int = 64
) -> DecodeState:
    """Decode until every row is done.

    Raises:
        DecodeError: a row whose text the target has no distribution for.
    """
    while not bool(jnp.all(state.done)):
        state = decode_rounds(decoder, weights, state, rounds_per_call)
    if int(jnp.min(state.tokens)) == NO_TOKEN:
        row = int(jnp.argmin(jnp.min(state.tokens, axis=1)))
        raise DecodeError(f"row {row}: {NO_LOGITS}")
    return state


def generate(
    decoder: Decoder,
    weights: Weights,
    prompts: Sequence[Int[np.ndarray, " _"]],
    budgets: Sequence[int],
    seeds: Sequence[int],
    *,
    width: int = 0,
    rounds_per_call: int = 64,
) -> DecodeState:
    """Decode requests to the end; the final state holds texts, lengths, kinds and counts."""
    state = start(decoder, weights, prompts, budgets, seeds, width=width)
    return finish(decoder, weights, state, rounds_per_call)

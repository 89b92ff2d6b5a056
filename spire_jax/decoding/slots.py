"""A batch of slots that requests pass through: pure functions of fixed shapes.

A slot is a row of a `DecodeState`. `admit` puts a request into one, `prefill_chunk` reads its
prompt a chunk at a time, `serve_rounds` decodes all rows that are ready. A row that is not ready
is `done`: rounds still compute it, at the position that its next prompt token will have, where
what they leave in the caches is what a rejected token leaves: dead until it is overwritten. What
it has before that position they leave as it is, bit for bit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from spire_jax.decoding.rounds import Decoder, DecodeState, Weights, round_and_depths
from spire_jax.drafting.strategy import Processed
from spire_jax.models.caches import empty_full
from spire_jax.models.sampling import seed_keys
from spire_jax.models.sharding import constrain


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def empty_slots(decoder: Decoder, weights: Weights, batch: int, width: int) -> DecodeState:
    """`batch` rows of `width` positions without a request.

    `decoder.k` is the deepest round that these slots will see: rings have room for it.
    """
    target, strategy = decoder.target, decoder.strategy
    zeros, draft_state = jnp.zeros(batch, jnp.int32), None
    if strategy is not None:
        draft_state = strategy.empty(weights.draft, batch, decoder.k, width)
    state = DecodeState(
        tokens=jnp.zeros((batch, width), jnp.int32),
        kinds=jnp.zeros((batch, width), jnp.int8),
        lengths=zeros + 1,
        ends=zeros + 1,
        done=jnp.ones(batch, bool),
        rounds=zeros,
        counts=jnp.zeros((batch, decoder.k + 1), jnp.int32),
        seeds=seed_keys(jnp.zeros((batch, 2), jnp.uint32)),
        target_cache=empty_full(target.config, batch, width, target.compute),
        draft_state=draft_state,
    )
    return _pinned(state)


@functools.partial(jax.jit, donate_argnums=0)
def admit(
    state: DecodeState,
    row: int | Int[Array, ""],
    prompt: Int[np.ndarray | Array, " C"],
    length: int | Int[Array, ""],
    end: int | Int[Array, ""],
    seed: UInt32[np.ndarray | Array, "2"],
) -> DecodeState:
    """The state with a request in `row`, still to be prefilled unless its prompt is one token.

    Caches stay: a position has one slot, so that what an earlier request left is overwritten, or
    lies after all that this one has written and is dead.

    Args:
        prompt: its tokens, `length` of them, padded to the width of the slots.
        end: the length at which its budget is spent.
        seed: the words of its random seed (`sampling.seed_words`).
    """
    state = dataclasses.replace(
        state,
        tokens=state.tokens.at[row].set(prompt),
        kinds=state.kinds.at[row].set(0),
        lengths=state.lengths.at[row].set(1),
        ends=state.ends.at[row].set(end),
        done=state.done.at[row].set(length > 1),
        rounds=state.rounds.at[row].set(0),
        counts=state.counts.at[row].set(0),
        seeds=state.seeds.at[row].set(seed_keys(seed)),
    )
    return _pinned(state)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
def prefill_chunk(
    decoder: Decoder,
    weights: Weights,
    state: DecodeState,
    rows: Int[np.ndarray | Array, " R"],
    starts: Int[np.ndarray | Array, " R"],
    lengths: Int[np.ndarray | Array, " R"],
    size: int,
) -> DecodeState:
    """The state after up to `size` more tokens of the prompts in `rows` were read.

    The last token of a prompt is not read: it opens the row's first round. With the chunk that
    reaches it the row is ready.

    Args:
        rows: those to work on; a row beyond the batch is none.
        starts: tokens read so far, a multiple of `size`.
        lengths: those of the prompts.
    """
    rows, starts, last = jnp.asarray(rows), jnp.asarray(starts), jnp.asarray(lengths) - 1
    positions = starts[:, None] + jnp.arange(size)
    positions = jnp.where(positions < last[:, None], positions, -1)
    at = rows[:, None], jnp.maximum(positions, 0)
    tokens = constrain(state.tokens.at[at].get(mode="clip"), "batch", None)
    activations, cache = decoder.target.bind(weights.target).extend_prompt(
        state.target_cache, rows, tokens, positions, decoder.collect
    )
    draft_state = state.draft_state
    if decoder.strategy is not None:
        chunk = Processed(tokens, positions, activations, cache, rows)
        draft_state = decoder.strategy.read(weights.draft, draft_state, chunk)
    read = jnp.minimum(starts + size, last)
    state = dataclasses.replace(
        state,
        lengths=state.lengths.at[rows].set(read + 1, mode="drop"),
        done=state.done.at[rows].set(read < last, mode="drop"),
        target_cache=cache,
        draft_state=draft_state,
    )
    return _pinned(state)


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def serve_rounds(
    decoder: Decoder,
    weights: Weights,
    state: DecodeState,
    halted: Bool[np.ndarray | Array, " B"],
    max_rounds: int | Int[Array, ""],
    room: int,
) -> tuple[DecodeState, Int[Array, "room B k4"]]:
    """Rounds of `decoder.k` until a row finishes, or `max_rounds` (at most `room`) have passed.

    Args:
        halted: rows to be done from now on.

    Returns:
        The state, and what each round gave each row: the drafted tokens accepted (-1: the row was
        not in it), those verified, the tokens emitted, and these tokens, up to k + 1.
    """
    batch = state.done.shape[0]
    state = dataclasses.replace(state, done=state.done | halted)
    before = jnp.sum(state.done)
    log = jnp.full((room, batch, decoder.k + 4), -1, jnp.int32)

    def go_on(carry):
        i, state, _ = carry
        finished = (jnp.sum(state.done) != before) | jnp.all(state.done)
        return (i < max_rounds) & (i < room) & ~finished

    def body(carry):
        i, old, log = carry
        new, depths = round_and_depths(decoder, weights, old)
        return i + 1, new, log.at[i].set(_entry(decoder.k, old, new, depths))

    _, state, log = jax.lax.while_loop(go_on, body, (jnp.int32(0), state, log))
    return _pinned(state), log


def _entry(
    k: int, old: DecodeState, new: DecodeState, depths: Int[Array, " B"]
) -> Int[Array, "B k4"]:
    accepted = jnp.where(old.done, -1, jnp.argmax(new.counts - old.counts, axis=1))
    emitted = new.lengths - old.lengths
    at = jnp.minimum(old.lengths[:, None] + jnp.arange(k + 1), new.tokens.shape[1] - 1)
    tokens = jnp.take_along_axis(new.tokens, at, axis=1)
    numbers = jnp.stack([accepted, depths, emitted], axis=1)
    return jnp.concatenate([numbers, tokens], axis=1)


def _pinned(state: DecodeState) -> DecodeState:
    """The state with its rows where the mesh wants them, so that every program gets it alike."""
    names = ("tokens", "kinds", "lengths", "ends", "done", "rounds", "counts", "seeds")
    rows = {name: getattr(state, name) for name in names}
    rows = {name: constrain(x, "batch", *(None,) * (x.ndim - 1)) for name, x in rows.items()}
    return dataclasses.replace(state, **rows)

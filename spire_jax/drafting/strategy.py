"""What a drafting strategy is: all that may differ between one speculative decoder and another.

A strategy holds a draft model's structure and says what the draft keeps, how it takes in a prompt,
how it drafts, and what it does with what verification kept. A new one needs `step` and `commit`
(or `read`); everything else has a default. The round, verification, sampling, the oracle,
evaluation and report are shared by all.

What a strategy may read of the target: the activations that it asks for (`collect`), and the
target's cache, whole.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from spire_jax.models.caches import Caches, empty_windowed
from spire_jax.models.masks import View
from spire_jax.models.records import record
from spire_jax.models.sampling import Sampling, sample, share_of, stream, transformed_logits
from spire_jax.models.transformer import Activations, Model, Params

State = Any  # a pytree of the strategy's own


@record()
@dataclasses.dataclass(frozen=True)
class Processed:
    """Tokens that the target has processed, and what a strategy may read of them."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]  # in sequence, row by row; -1: no token
    activations: Activations  # those of `Strategy.collect`, [B, T, D] each
    cache: Caches  # the target's, with these tokens in it
    # Which rows of the cache and of the strategy's state they belong to; None: all, in order. A
    # row beyond the batch is none.
    rows: Int[Array, " B"] | None = None


@record()
@dataclasses.dataclass(frozen=True)
class Proposal:
    """What a round drafted."""

    tokens: Int[Array, "B k"]
    q: Float[Array, "B k V"]  # float32 logits that each was drawn from, transformed
    parents: Int[Array, "B k"] | None = None  # of a tree: which one each follows; None: a chain
    # Estimates that tokens 1 .. j are all kept, by j; None: the draft makes none. Such a one, and
    # all before it, must be made of what was known before token j was drawn (`decoding.depth`).
    survival: Float[Array, "B k"] | None = None


# Of a depth and its logits: the token there, and the transformed logits that it is taken to be
# drawn from.
Draw: TypeAlias = Callable[
    [int | Int[Array, ""], Float[Array, "B V"]], tuple[Int[Array, " B"], Float[Array, "B V"]]
]


def sampled(keys: Key[Array, " B"], sampling: Sampling) -> Draw:
    """Draws from the logits, by each row's key of the round: its stream "draft", by depth."""
    keys = stream(keys, "draft")

    def draw(depth, logits):
        q = transformed_logits(logits, sampling)
        of_depth = jax.vmap(jax.random.fold_in, (0, None))(keys, depth)
        return sample(of_depth, q), q

    return draw


def peaked(logits: Float[Array, "*rows V"], draws: str) -> Float[Array, "*rows V"]:
    """Logits as a draft draws of them: as they are ("sampled"), or its "argmax", q one-hot."""
    return transformed_logits(logits, Sampling(0.0)) if draws == "argmax" else logits


def forced(tokens: Int[Array, "B k"], sampling: Sampling) -> Draw:
    """The tokens of a given text, whatever the logits are."""

    def draw(depth, logits):
        token = jax.lax.dynamic_index_in_dim(tokens, depth, axis=1, keepdims=False)
        return token, transformed_logits(logits, sampling)

    return draw


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way of drafting. Instances are hashable and hold no arrays."""

    model: Model  # the structure of the draft's parameters

    # Whether a round's first step takes the last two tokens: a draft that keeps entries of its own
    # passes alone lacks, after full acceptance, the k-th token, which it proposed but never read.
    catches_up = False

    @property
    def collect(self) -> tuple[int, ...]:
        """Which activations y^l of the target the strategy reads."""
        return ()

    @property
    def collect_cache(self) -> tuple[int, ...]:
        """The layers (from 0) whose keys and values of the target training needs (`predict`).

        Decoding and the oracle have the target's cache, whole.
        """
        return ()

    def reads(self, start: int) -> tuple[int, int]:
        """Which activations drafting at or after the position `start` may need.

        Returns:
            (sinks, begin): the positions 0 .. sinks - 1, and those from `begin` on.
        """
        return 0, 0 if self.collect else start

    # --- decoding ------------------------------------------------------------------------------

    def empty(self, params: Params, batch: int, k: int, capacity: int) -> State:
        """The state before any token, for rounds of at most k and texts of `capacity` tokens.

        As it stands a cache for each layer of the draft: all of a text, or a ring for a window and
        what is drafted.
        """
        config, compute = self.model.config, self.model.compute
        return empty_windowed(config, self.views, batch, k, capacity, compute)

    def begin(
        self,
        params: Params,
        prompt: Processed,
        lengths: Int[Array, " B"],
        k: int,
        capacity: int,
    ) -> State:
        """The state over the first `lengths` of T prompt tokens of each row; T may be 0."""
        state = self.empty(params, prompt.tokens.shape[0], k, capacity)
        if prompt.tokens.shape[1] == 0:
            return state
        positions = jnp.where(prompt.positions < lengths[:, None], prompt.positions, -1)
        rows = jnp.arange(prompt.tokens.shape[0])
        return self.read(params, state, dataclasses.replace(prompt, positions=positions, rows=rows))

    def read(self, params: Params, state: State, chunk: Processed) -> State:
        """Take in the next prompt tokens of some rows, on top of those before them.

        After the last chunk a row is as `begin` leaves it; entries of a request before it are
        dead, as they lie after all that it has written. A strategy that cannot do so raises
        ValueError.
        """
        return self.commit(params, state, chunk)

    def step(
        self,
        params: Params,
        state: State,
        target: Caches,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B V"], State]:
        """Logits after the last of T tokens per row: one, or two where a round catches up.

        `target` is the target's cache over all tokens before the round, or what `of_round` makes
        of it. A token at position -1 is none.
        """
        raise NotImplementedError

    def of_round(self, target: Caches, positions: Int[Array, " B"]) -> Any:
        """What the steps of a round that begins at `positions` are given as the target's cache."""
        return target

    def propose(
        self,
        params: Params,
        state: State,
        target: Caches,
        previous: Int[Array, " B"],
        last: Int[Array, " B"],
        positions: Int[Array, " B"],
        k: int,
        draw: Draw,
    ) -> tuple[Proposal, State]:
        """k drafted tokens, by `step` after `step`, and the state with them.

        Args:
            last: the last emitted token, at `positions`.
            previous: the one before it (any value where `positions` is 0; -1 in a row that waits,
                of which nothing before `positions` may change).
        """
        target = self.of_round(target, positions)
        first: list[tuple[Array, Array]] = []
        token = last
        if self.catches_up:
            # A row that waits keeps its entry bit for bit: the chunk that wrote it and this step
            # differ in rounding, and how many rounds pass meanwhile is its neighbours' doing.
            both = jnp.stack([jnp.maximum(previous, 0), last], axis=1)
            at = jnp.stack([jnp.where(previous < 0, -1, positions - 1), positions], axis=1)
            logits, state = self.step(params, state, target, both, at)
            token, q = draw(0, logits)
            first = [(token[:, None], q[:, None])]

        def one(carry, depth):
            state, token = carry
            at = (positions + depth)[:, None]
            logits, state = self.step(params, state, target, token[:, None], at)
            token, q = draw(depth, logits)
            return (state, token), (token, q)

        depths = jnp.arange(len(first), k)
        (state, _), rest = jax.lax.scan(one, (state, token), depths)
        drawn = [*first, tuple(jnp.moveaxis(x, 0, 1) for x in rest)]
        tokens, q = (jnp.concatenate(parts, axis=1) for parts in zip(*drawn, strict=True))
        return Proposal(tokens, q), state

    def commit(self, params: Params, state: State, block: Processed) -> State:
        """Take in a verified round: the tokens that the target processed.

        Entries of rejected tokens lie after the row's last token, where no query sees them.
        """
        return state

    # --- the oracle ----------------------------------------------------------------------------

    def along(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        activations: tuple[Float[Array, "B M D"], ...],
        cache: Caches,
        read: Int[np.ndarray, " M"],
        starts: Int[np.ndarray, " R"],
        k: int,
        sampling: Sampling,
    ) -> Float[Array, "B R k"]:
        """q of the tokens of a given text, k depths from every start; what the oracle reads.

        Depth j (0-based) from start s is the draft's probability of token s + j + 1 when a round
        starts at s: `replay`, unless a strategy knows a faster way to the same.

        Args:
            activations: the target's, those of `collect`, at the positions `read`.
            cache: the target's, over the text.
            starts: one after the other.
        """
        return self.replay(params, tokens, activations, cache, read, starts, k, sampling)

    def replay(self, params, tokens, activations, cache, read, starts, k, sampling):
        """`along` by decoding: a round from every start that drafts the text and keeps none of it.

        Slow, and exact whatever the strategy does.
        """
        batch, length = tokens.shape
        whole = tuple(
            jnp.zeros((batch, length, y.shape[2]), y.dtype).at[:, read].set(y) for y in activations
        )
        first = int(starts[0])

        def processed(begin, size):
            of = (jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1) for x in (tokens, *whole))
            at = jnp.tile(begin + jnp.arange(size), (batch, 1))
            token, *ys = of
            return Processed(token, at, tuple(ys), cache)

        prompt = jnp.full(batch, first, jnp.int32)
        state = self.begin(params, processed(0, first), prompt, k, length + k)

        def round_from(state, start):
            text = jax.lax.dynamic_slice_in_dim(tokens, start + 1, k, axis=1)
            previous = jax.lax.dynamic_index_in_dim(
                tokens, jnp.maximum(start - 1, 0), axis=1, keepdims=False
            )
            block = processed(start, 1)
            proposal, state = self.propose(
                params, state, cache, previous, block.tokens[:, 0], block.positions[:, 0], k,
                forced(text, sampling),
            )  # fmt: skip
            return self.commit(params, state, block), share_of(proposal.q, text)

        _, q = jax.lax.scan(round_from, state, jnp.asarray(starts, jnp.int32))
        return jnp.moveaxis(q, 0, 1)

    # --- training ------------------------------------------------------------------------------

    def predict(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        activations: Activations,
        k: int,
    ) -> Float[Array, "B T Vh"]:
        """Teacher-forced logits of the token after each, in the draft's own head.

        `activations` are the target's, those of `collect`; k is the depth of rollouts, of a
        strategy that learns by depth. One that has `collect_cache` is given their keys and values
        besides, layer by layer, as the target caches them.
        """
        return self.model.bind(params).forward(tokens, in_head=True)[0]

    def depths(self, tokens: Int[Array, "B T"], k: int) -> Int[Array, " T"]:
        """At which depth (0-based) of a rollout `predict` predicts what follows each token."""
        return jnp.arange(tokens.shape[1]) % k

    @property
    def views(self) -> tuple[View, ...]:
        """What each layer of the draft sees."""
        return self.model.views

"""AnchorCoder: a plain transformer that sees line ends and its own line (arXiv 2411.06680).

Some tokens are anchors: those that end a line (`anchors`). A query sees

    the first token of the text,
    the tokens of its own line up to itself, the last `line` of them,
    the anchors before its line, the last `budget` of them;

every `full_every`-th layer, counted from the draft's first (4, 8, ...), sees everything: a draft of
fewer layers has none that does. An anchor belongs to the line that it ends. No token is inserted,
and nothing of the target is read.

No code is published; budget and `line` are ours, so that a cache has a size: a layer keeps the
first token, a ring of the newest tokens and a ring of the newest anchors, whatever the text. Left
out are the paper's other two parts: "layer-wise anchors", which add an anchor's activations of
earlier layers to later ones' (how, the text alone does not settle), and its positional encoding by
heads. Costs charge what a layer keeps, however few anchors a text has.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spire_jax.config.checks import check, positive
from spire_jax.config.drafts import DraftCost, Pass, TransformerOptions, over_layers
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.drafting.spire import of_family
from spire_jax.drafting.vanilla import Vanilla, held_of
from spire_jax.models.attention import masked_attention, merge_attention, unpacked
from spire_jax.models.caches import (
    Caches,
    FullCache,
    LayerCache,
    RingCache,
    allocated,
    nothing,
    read_then_append,
    ring_positions,
    stored,
    windowed_cache,
)
from spire_jax.models.layers import Block
from spire_jax.models.masks import EMPTY, View, may_attend
from spire_jax.models.records import record
from spire_jax.models.transformer import Model, Transformer


@DRAFT_KINDS.register("anchor")
@dataclasses.dataclass(frozen=True)
class AnchorOptions(TransformerOptions):
    """A plain transformer, most layers of which see line ends and their own line."""

    kind: str = "anchor"
    anchors: tuple[int, ...] = ()  # tokens that end a line; of bytes, 10
    full_every: int = 4  # layers 4, 8, ... see everything
    line: int = 64  # tokens of its own line that a query sees, itself included
    budget: int = 64  # line ends before it that a query sees
    window: int = 0  # of the layers that see everything, as `sink`

    def strategy(self, target, compute):
        sizes = self.model(target)
        options = (("views", self.views(target)), ("anchors", self.anchors))
        return Anchor(Model(of_family(sizes, AnchorDraft), sizes, compute, options))

    def views(self, target):
        return tuple(
            view if i % self.full_every == 0
            else AnchorView(self.line, 1, view.scale, view.softcap, self.budget)
            for i, view in enumerate(super().views(target), 1)
        )  # fmt: skip

    def cost(self, target, context, k):
        def rings(view: View, room: int) -> int:
            """Slots of an anchored layer's two rings, which are read together, or of one."""
            more = view.budget + room if isinstance(view, AnchorView) else 0
            return view.window + room + more

        views, dense = self.views(target), float(context)
        return DraftCost(
            rows=over_layers(views, lambda v: v.sink + min(context, rings(v, 0)), dense),
            slots=over_layers(views, lambda v: v.sink + rings(v, k), dense),
            passes=(Pass(),) * k,
        )

    def check(self, at, config):
        super().check(at, config)
        positive(self, at, "full_every line budget")
        n_tokens = config.target.n_tokens
        check(bool(self.anchors), f"{at}.anchors is empty; name the tokens that end a line (of "
                                  f"bytes {at}.anchors=10)")  # fmt: skip
        beyond = [token for token in self.anchors if not 0 <= token < n_tokens]
        check(not beyond, f"{at}.anchors={self.anchors}: {beyond} are no tokens of the target's "
                          f"{n_tokens}")  # fmt: skip


# --- lines ---------------------------------------------------------------------------------------


@record()
@dataclasses.dataclass(frozen=True)
class Lines:
    """Where the lines of T tokens per row, in sequence, begin and end."""

    positions: Int[Array, "B T"]  # -1: no token
    ends: Bool[Array, "B T"]  # whether it is an anchor
    before: Int[Array, "B T"]  # how many of these T are, before it
    begin: Int[Array, "B T"]  # the first position of its line

    def part(self, tokens: slice) -> "Lines":
        return jax.tree.map(lambda x: x[:, tokens], self)


def lines_of(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    anchors: tuple[int, ...],
    begun: Int[Array, " B"],
) -> Lines:
    """The lines of tokens, the first of which began at `begun`."""
    ends = jnp.isin(tokens, jnp.array(anchors)) & (positions >= 0)
    after = jnp.where(ends, positions + 1, begun[:, None])
    begin = jnp.concatenate([begun[:, None], jax.lax.cummax(after, axis=1)[:, :-1]], axis=1)
    return Lines(positions, ends, jnp.cumsum(ends, axis=1) - ends, begin)


@dataclasses.dataclass(frozen=True)
class AnchorView(View):
    """The sinks, a query's own line (at most `window` of it) and `budget` anchors before it."""

    budget: int = 0

    def sees(self, q_pos: Lines, k_pos: Lines):
        """Which of the tokens `k_pos` are seen from the tokens `q_pos` of the same text, [B, T, S].

        What the others' rule finds in positions, this one finds in the lines.
        """
        own = self.near(q_pos, jnp.where(k_pos.positions < 0, EMPTY, k_pos.positions))
        newer = q_pos.before[..., None] - k_pos.before[:, None]
        earlier = k_pos.positions[:, None] <= q_pos.positions[..., None]
        return own | (k_pos.ends[:, None] & earlier & (newer <= self.budget))

    def near(self, q: Lines, k_pos: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
        """The sinks, and what is of the query's own line."""
        k = k_pos[:, None]
        own = (k < self.sink) | (k >= q.begin[..., None])
        return own & may_attend(q.positions[..., None], k, self.window, self.sink)


@dataclasses.dataclass(frozen=True)
class Continued:
    """New tokens of cached texts, and the anchors before them, by slot.

    An anchor's slot is the one after that of the anchor before it, round and round.
    """

    lines: Lines
    start: Int[Array, " B"]  # the first new position
    old: Int[Array, "B A"]  # positions; EMPTY where there is none
    newest: Int[Array, " B"]  # the newest one's slot
    slots: Int[Array, "B T"]  # where new anchors go; A: nowhere, as the other tokens

    @property
    def rank(self) -> Int[Array, "B A"]:
        """How many anchors before the new tokens are newer than a slot's."""
        return (self.newest[:, None] - jnp.arange(self.old.shape[1])) % self.old.shape[1]

    @property
    def anchors(self) -> Int[Array, "B A"]:
        """With the new ones."""
        put = jax.vmap(lambda old, slots, new: old.at[slots].set(new, mode="drop"))
        return put(self.old, self.slots, self.lines.positions)


def continued(
    anchors: Int[Array, "B A"],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    ends: tuple[int, ...],
) -> Continued:
    """What follows a text whose anchors are at `anchors`, some of them drafted and rejected since:
    those at the new positions or after them."""
    start = jnp.min(jnp.where(positions < 0, EMPTY, positions), axis=1)
    old, size = jnp.where(anchors < start[:, None], anchors, EMPTY), anchors.shape[1]
    last = jnp.max(jnp.where(old < EMPTY, old, -1), axis=1)
    newest = jnp.where(last < 0, size - 1, jnp.argmax(old == last[:, None], axis=1))
    lines = lines_of(tokens, positions, ends, last + 1)
    late = lines.ends & (lines.ends.sum(axis=1, keepdims=True) - lines.before <= size)
    slots = jnp.where(late, (newest[:, None] + 1 + lines.before) % size, size)
    return Continued(lines, start, old, newest, slots)


# --- what a draft keeps --------------------------------------------------------------------------


@record("ring")
@dataclasses.dataclass(frozen=True)
class AnchorCache(LayerCache):
    """The sinks, a ring of the newest tokens, and after these the anchors, slot by slot."""

    ring: int

    def attend_and_append(
        self,
        rows: Int[Array, " R"] | None,
        q: Float[Array, "R T K G H"],
        k: Float[Array, "R T K H"],
        v: Float[Array, "R T K H"],
        new: Continued,
        view: AnchorView,
    ) -> tuple[Float[Array, "R T K G H"], "AnchorCache"]:
        """Attention of new tokens of some rows, or of all, and the cache with them."""
        begin, size = view.sink + self.ring, new.old.shape[1]
        near = view.near(new.lines, ring_positions(new.start, view.sink, self.ring)[0])
        # What is a sink, too, is seen as that.
        old, rank = new.old[:, None], new.rank[:, None] + new.lines.before[..., None]
        far = (old >= view.sink) & (old <= new.lines.positions[..., None]) & (rank < view.budget)
        keys, values = (
            unpacked(x if rows is None else x.at[rows].get(mode="clip"), *k.shape[2:])
            for x in (self.keys[:, : begin + size], self.values[:, : begin + size])
        )
        mask = jnp.concatenate([near, far], axis=2)
        out = merge_attention([
            masked_attention(q, keys.astype(q.dtype), values.astype(q.dtype), mask, view),
            masked_attention(q, *stored(k, v, q.dtype), view.sees(new.lines, new.lines), view),
        ])  # fmt: skip
        ring = RingCache(self.keys, self.values, view.sink, self.ring).append(
            new.lines.positions, k, v, rows
        )
        slots = jnp.where(new.slots < size, begin + new.slots, -1)
        whole = FullCache(ring.keys, ring.values).append(slots, k, v, rows)
        return out, dataclasses.replace(self, keys=whole.keys, values=whole.values)


@record()
@dataclasses.dataclass(frozen=True)
class AnchorState:
    """Positions of the newest anchors by slot (EMPTY: none), and what each layer keeps."""

    anchors: Int[Array, "B A"]
    layers: Caches


class AnchorDraft(Transformer):
    """A plain transformer, of which some layers have an `AnchorView`."""

    def __init__(self, config, compute, *, rngs, views: tuple[View, ...], anchors: tuple[int, ...]):
        super().__init__(config, compute, rngs=rngs, views=views)
        self.anchors = anchors

    def within_text(self, i, q, k, v, tokens):
        view, chunk, length = self.views[i], self.compute.attention_chunk, tokens.shape[1]
        if not isinstance(view, AnchorView):
            return super().within_text(i, q, k, v, tokens)
        at = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        lines, parts = lines_of(tokens, at, self.anchors, jnp.zeros(len(tokens), int)), []
        for start in range(0, length, chunk):
            own, seen = slice(start, start + chunk), slice(start + chunk)
            mask = view.sees(lines.part(own), lines.part(seen))
            parts.append(masked_attention(q[:, own], k[:, seen], v[:, seen], mask, view)[0])
        return jnp.concatenate(parts, axis=1)

    def extend(self, state, tokens, positions, collect=(), *, logits_from=0):
        xs, state = self._continue(state, None, tokens, positions)
        return self.unembed(xs[-1][:, logits_from:]), tuple(xs[i] for i in collect), state

    def extend_prompt(self, state, rows, tokens, positions, collect=()):
        xs, state = self._continue(state, rows, tokens, positions)
        return tuple(xs[i] for i in collect), state

    def _continue(self, state: AnchorState, rows, tokens, positions):
        """The activations of new tokens of some rows, or of all, and the state with them."""
        anchors = state.anchors if rows is None else state.anchors.at[rows].get(mode="clip")
        new = continued(anchors, tokens, positions, self.anchors)

        def attend(i: int, block: Block, x: Array):
            q, (k, v) = block.queries(x, positions), block.keys_values(x, positions)
            cache, view = state.layers[i], self.views[i]
            if isinstance(cache, AnchorCache) and isinstance(view, AnchorView):
                return cache.attend_and_append(rows, q, k, v, new, view)
            if rows is not None:
                return read_then_append(cache, rows, q, k, v, positions, view, self.compute)
            cache = cache.append(positions, k, v)
            return merge_attention(self.over_cache(i, q, cache, positions)), cache

        xs, layers = self.run(self.embed(tokens), attend)
        anchors = new.anchors
        if rows is not None:
            anchors = state.anchors.at[rows].set(anchors, mode="drop")
        return xs, AnchorState(anchors, tuple(layers))


@dataclasses.dataclass(frozen=True)
class Anchor(Vanilla):
    """Rings of the newest tokens and of the newest anchors; `model` is an AnchorDraft."""

    def _room(self, k: int) -> int:
        """For anchors: as many as are seen, and what is drafted."""
        return k + max((v.budget for v in self.views if isinstance(v, AnchorView)), default=0)

    def empty(self, params, batch, k, capacity):
        compute, room = self.model.compute, self._room(k)
        key, value = nothing(self.model.config, batch, compute)

        def of(view: View) -> LayerCache:
            if not isinstance(view, AnchorView):
                return windowed_cache(key, value, view, k, capacity, compute)
            ring = view.window + k
            return AnchorCache(*allocated(key, value, view.sink + ring + room, compute), ring)

        return AnchorState(jnp.full((batch, room), EMPTY), tuple(map(of, self.views)))

    def begin(self, params, prompt, lengths, k, capacity):
        batch, length = prompt.tokens.shape
        if length == 0:
            return self.empty(params, batch, k, capacity)
        module, compute, room = self.model.bind(params), self.model.compute, self._room(k)
        at = jnp.where(prompt.positions < lengths[:, None], prompt.positions, -1)
        lines = lines_of(prompt.tokens, at, module.anchors, jnp.zeros_like(lengths))
        in_order = jnp.sort(jnp.where(lines.ends, at, EMPTY), axis=1)
        number, held = ring_positions(lines.ends.sum(axis=1), 0, room)
        anchors = jnp.take_along_axis(in_order, held, axis=1)
        anchors = jnp.where(number < EMPTY, anchors, EMPTY)

        def of(view: View, key: Array, value: Array) -> LayerCache:
            if not isinstance(view, AnchorView):
                return held_of(key, value, lengths, view, k, capacity, compute)
            ring = view.window + k
            _, near = ring_positions(lengths, view.sink, ring)
            at = jnp.concatenate([near, jnp.where(anchors < EMPTY, anchors, 0)], axis=1)
            key, value = (jnp.take_along_axis(x, at[..., None, None], axis=1) for x in (key, value))
            return AnchorCache(*allocated(key, value, at.shape[1], compute), ring)

        _, keys_values = module.prefill(prompt.tokens)
        layers = (of(view, *kv) for view, kv in zip(self.views, keys_values, strict=True))
        return AnchorState(anchors, tuple(layers))

"""The SPIRe draft: a pruned transformer whose layers attend to memory vectors (method.md 3.3).

Keys and values of layer i (1-based) come from memories m^i, not from the layer's own inputs:
the frozen target's activations y^(N - n + i - 1) for tokens that the target has processed, a
learned mix of all the draft's layers for drafted ones (and other choices, for comparison: see
`DraftConfig.memory`). One layer function serves training
(`rollout`: k passes, parallel over all starts) and decoding (`step`, `refresh`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from spire_jax.config.schema import ModelConfig
from spire_jax.models.attention import (
    Compute,
    Positions,
    attention,
    cached_attention,
    merge_attention,
    unpacked,
)
from spire_jax.models.caches import KeysValues, RingCache, SelectedCache
from spire_jax.models.layers import Block, parameter, rope
from spire_jax.models.masks import EMPTY
from spire_jax.models.transformer import Activations, Transformer


class SpireDraft(Transformer):
    """A transformer with feedback memory; `memory_mix` (n, n + 1) are the logits of w.

    One memory for all layers (memory="final") has one row of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute: Compute,
        *,
        rngs: nnx.Rngs,
        feedback: bool = True,
        attend_self: bool = True,
        memory: str = "layers",
        memory_init: float = 0.95,
        streaming: bool = False,
    ):
        super().__init__(config, compute, rngs=rngs)
        self.feedback, self.attend_self, self.streaming = feedback, attend_self, streaming
        self.memory = memory
        if feedback:
            mix = initial_mix(config.n_layers, memory, memory_init)
            self.memory_mix = parameter(
                rngs, mix.shape, (None, None), lambda key, shape, dtype: jnp.asarray(mix, dtype)
            )

    def memories(self, xs: list[Float[Array, "*rows D"]]) -> list[Float[Array, "*rows D"]]:
        """m^1 .. m^n of a drafted token from its activations x^0 .. x^n."""
        if not self.feedback:
            return xs[:-1]
        weights = jax.nn.softmax(self.memory_mix[...], axis=-1).astype(xs[0].dtype)
        stacked = jnp.stack(xs)
        mixed = [jnp.einsum("l,l...->...", w, stacked) for w in weights]
        return mixed * (len(self.blocks) // len(mixed))

    def rollout(
        self,
        tokens: Int[Array, "B T"],
        activations: tuple[Float[Array, "B M D"], ...],
        starts: Int[np.ndarray, " R"],
        k: int,
        read: Int[np.ndarray, " M"] | None = None,
        selected: Sequence[Bool[Array, "B K M"]] | None = None,
        *,
        in_head: bool = False,
    ) -> Float[Array, "B R k V"] | Float[Array, "B R k Vh"]:
        """Logits of k teacher-forced draft steps from every start, all starts in parallel.

        Step j (0-based) from start s processes token s + j, which predicts token s + j + 1. It
        sees the target's memories of positions < s, the draft's own memories of s .. s + j - 1,
        and itself. Training uses starts 0, k, 2k, ...; the oracle uses every position.

        Args:
            tokens: a text from position 0.
            activations: the target's, those of `target_layers`, at the positions `read`.
            starts: static start positions, with s + k <= T.
            read: static; all of 0 .. T - 1 unless given. A window sees fewer.
            selected: layer by layer, which of `read` each KV head keeps; all unless given.
            in_head: logits of `unembed_head`.
        """
        read = np.arange(tokens.shape[1]) if read is None else read
        target_memory = self.read_target(tokens[:, read], activations, read)
        own: list[list[tuple[Array, Array]]] = [[] for _ in self.blocks]
        hidden = []
        for j in range(k):
            # The last pass leaves no memory behind: no pass comes after it.
            one_pass = jax.checkpoint(self._pass, static_argnums=(0, 4)) if (
                self.compute.remat) else self._pass  # fmt: skip
            at = _Static(starts, j, read)
            x, memory = one_pass(at, tokens, target_memory, own, j < k - 1, selected)
            hidden.append(x)
            for layer, kv in zip(own, memory, strict=False):
                layer.append(kv)
        return (self.unembed_head if in_head else self.unembed)(jnp.stack(hidden, axis=2))

    def _pass(self, at: "_Static", tokens, target_memory, own, keep_memory, selected):
        starts, j = at.starts, at.j
        positions = starts + j
        x = self.embed(tokens[:, positions])
        xs = [x]
        for i, block in enumerate(self.blocks):
            (k, v), mine = target_memory[i], own[i]
            q = block.queries(x, positions)
            k_pos = at.read if selected is None else jnp.where(selected[i], at.read, EMPTY)
            sink = self._sink_in_window
            parts = [self._attend(block, q, k, v, positions, k_pos, limit=starts, sink=sink)]
            if self.streaming:
                sinks = slice((at.read < self.config.sink).sum())
                held = k[:, sinks], v[:, sinks]
                parts += self._attend_old_sinks(block, q, held, positions, at.read[sinks], starts)
            recent = list(mine)
            if self.attend_self:
                recent.append(block.keys_values(x, positions))
            if recent:
                offsets = np.arange(j + self.attend_self)
                parts.append(self._attend_recent(block, q, recent, starts, positions, offsets))
            x = block.finish(x, merge_attention(parts))
            xs.append(x)
        if not keep_memory:
            return x, []
        memories = zip(self.blocks, self.memories(xs), strict=True)
        return x, [block.keys_values(m, positions) for block, m in memories]

    def _attend_recent(self, block, q, recent, starts, positions, offsets):
        """Attention of each start's query to that start's own few keys."""
        batch, rollouts = q.shape[:2]
        flat = batch * rollouts
        k, v = (jnp.stack(x, axis=2).reshape(flat, len(offsets), *x[0].shape[2:])
                for x in zip(*recent, strict=True))  # fmt: skip
        q_pos = jnp.tile(jnp.asarray(positions), batch)[:, None]
        k_pos = jnp.tile(jnp.asarray(starts[:, None] + offsets), (batch, 1))
        out, lse = self._attend(block, q.reshape(flat, 1, *q.shape[2:]), k, v, q_pos, k_pos)
        return out.reshape(q.shape), lse.reshape(q.shape[:-1])

    def step(
        self,
        cache: RingCache | SelectedCache,
        tokens: Int[Array, " B"],
        positions: Int[Array, " B"],
    ) -> tuple[Float[Array, "B V"], RingCache | SelectedCache]:
        """One draft step: logits after the token at `positions`; its memories enter the cache."""
        pos = positions[:, None]
        x = self.embed(tokens[:, None])
        xs = [x]
        for i, block in enumerate(self.blocks):
            q = block.queries(x, pos)
            parts = [
                cached_attention(
                    q, cache, i, pos, window=self.config.window, sink=self._sink_in_window,
                    include_self=False, scale=block.scale, compute=self.compute,
                )
            ]  # fmt: skip
            if self.streaming:
                sinks = slice(cache.sink)
                held = (unpacked(c[i][:, sinks], *q.shape[2::2]).astype(x.dtype)
                        for c in (cache.keys, cache.values))  # fmt: skip
                at = cache.layer_positions(i)[..., sinks]
                parts += self._attend_old_sinks(block, q, tuple(held), pos, at, pos)
            if self.attend_self:
                k, v = block.keys_values(x, pos)
                parts.append(self._attend(block, q, k, v, pos, pos))
            x = block.finish(x, merge_attention(parts))
            xs.append(x)
        memories = zip(self.blocks, self.memories(xs), strict=True)
        cache = self._store(cache, [block.keys_values(m, pos) for block, m in memories], pos)
        return self.unembed(x)[:, 0], cache

    def read_target(
        self,
        tokens: Int[Array, "B T"],
        activations: Activations,
        positions: Int[np.ndarray, " T"] | Int[Array, "B T"],
    ) -> list[KeysValues]:
        """Each layer's keys and values of tokens that the target has processed."""
        n = len(self.blocks)
        if self.memory == "embedding":
            activations = (self.embed(tokens),) * n
        elif self.memory == "final":
            activations = activations * n
        return [
            block.keys_values(y.astype(self.compute.dtype), positions)
            for block, y in zip(self.blocks, activations, strict=True)
        ]

    def refresh(
        self,
        cache: RingCache | SelectedCache,
        tokens: Int[Array, "B T"],
        activations: Activations,
        positions: Int[Array, "B T"],
    ) -> RingCache | SelectedCache:
        """Recompute cached entries of tokens that the target has processed from its activations.

        Positions of rejected tokens may be among them: their entries come after the row's last
        token and are overwritten before any query sees them.
        """
        return self._store(cache, self.read_target(tokens, activations, positions), positions)

    def _store(self, cache, keys_values, positions):
        slots, cache = cache.slots(positions), cache.place(positions)
        for i, (k, v) in enumerate(keys_values):
            cache = cache.write(i, slots, k, v)
        return cache

    @property
    def _sink_in_window(self) -> int:
        """Sinks that are seen beyond the window, where they are; streaming, they are elsewhere."""
        return 0 if self.streaming else self.config.sink

    def _attend_old_sinks(self, block, q, held, q_pos, k_pos, limit):
        """Streaming: attention to the sinks that the window has left behind, if there are any.

        Positions are those within the cache once the window is full: a query then stands
        sink + window - 1 behind the first sink, however far it is in the text. That is a rotation
        of the query, for these keys alone.
        """
        if not k_pos.shape[-1]:
            return []
        xp = np if isinstance(q_pos, np.ndarray) else jnp
        moved = xp.maximum(q_pos - (self.config.sink + self.config.window - 1), 0)
        beyond = xp.minimum(limit, q_pos - self.config.window + 1)
        q_near = rope(q, -moved, self.config)
        return [self._attend(block, q_near, *held, q_pos, k_pos, limit=beyond, window=0, sink=0)]

    def _attend(
        self,
        block: Block,
        q: Float[Array, "B T K G H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        q_pos: Positions,
        k_pos: Int[np.ndarray, " S"] | Int[Array, "#B S"] | Int[Array, "#B K S"],
        **options,
    ):
        options = {"window": self.config.window, "sink": self.config.sink, **options}
        return attention(
            q, k, v, q_pos, k_pos, scale=block.scale, compute=self.compute, **options
        )  # fmt: skip


class _Static:
    """What a pass knows while tracing, hashable by identity for `jax.checkpoint`."""

    def __init__(self, starts: np.ndarray, j: int, read: np.ndarray):
        self.starts, self.j, self.read = starts, j, read


def target_layers(n_target: int, n_draft: int, memory: str = "layers") -> tuple[int, ...]:
    """The l of the activations y^l that draft layers 1 .. n read: N - n + i - 1."""
    if memory == "embedding":
        return ()
    return (n_target,) if memory == "final" else tuple(range(n_target - n_draft, n_target))


def initial_mix(n: int, memory: str, own: float) -> np.ndarray:
    """Logits of w before training: a weight of `own` on what stands in for the target's
    activation (x^(i-1) for y^(N-n+i-1), x^n for y^N), the rest even."""
    at = np.array([n]) if memory == "final" else np.arange(n)
    mix = np.full((len(at), n + 1), np.log((1 - own) / n), np.float32)
    mix[np.arange(len(at)), at] = np.log(own)
    return mix

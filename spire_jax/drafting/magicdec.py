"""MagicDec: the target drafts for itself, reading only sinks and a window (method.md 3.5)."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from spire_jax.config.checks import check, not_negative, positive
from spire_jax.config.drafts import DraftOptions
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.config.schema import ExperimentConfig, ModelConfig, oracle_depth
from spire_jax.drafting.self_drafting import SelfDrafting, drafting_target
from spire_jax.drafting.spire import SpireDraft, begin_windowed
from spire_jax.models.attention import Attended, Compute, attention, unpacked
from spire_jax.models.layers import rope


@DRAFT_KINDS.register("magicdec")
@dataclasses.dataclass(frozen=True)
class MagicDecOptions(DraftOptions):
    """The target as its own draft, reading a sparse cache; nothing is trained."""

    kind: str = "magicdec"
    window: int = 64
    sink: int = 1

    def strategy(self, target, compute):
        return magicdec(target, self.window, self.sink, compute)

    def kept(self):
        return self.window, self.sink

    def check(self, at, config):
        positive(self, at, "window")
        not_negative(self, at, "sink")
        self._check_depth(at, max(config.decode.k, *config.decode.depths, 0))
        check_target(at, config)

    def check_run(self, at, config):
        self._check_depth(at, oracle_depth(config))
        check_budget(at, self.sink + self.window, config)

    def _check_depth(self, at: str, k: int) -> None:
        check(self.window > k,
              f"{at}.window={self.window} must be above k = {k}: the drafted tokens stay "
              f"visible")  # fmt: skip


def check_target(at: str, config: ExperimentConfig) -> None:
    """ConfigError where the target has nothing to leave out as its own draft."""
    windows = [v.window for v in config.target.views()]
    check(not all(windows),
          f"{at}: the target has a window of its own in every layer ({max(windows)} at most); its "
          f"own cache is as small")  # fmt: skip


def check_budget(at: str, budget: int, config: ExperimentConfig) -> None:
    """ConfigError where the target as its own draft would leave nothing out in an evaluation."""
    longest = max(config.eval.context_lengths)
    check(budget <= longest,
          f"{at}: a budget of {budget} tokens is larger than the longest context ({longest} of "
          f"eval.context_lengths); lower it")  # fmt: skip


class StreamingDraft(SpireDraft):
    """The target with positions within the cache (StreamingLLM, arXiv 2309.17453).

    Once the window is full, a query stands sink + window - 1 behind the first sink, however far it
    is in the text. That is a rotation of the query, for the sinks that the window has left behind
    alone.
    """

    def over_text(self, i, q, keys_values, positions, k_pos, limit):
        view = self.views[i]
        near = [attention(q, *keys_values, positions, k_pos, _without_sinks(view), limit=limit,
                          compute=self.compute)]  # fmt: skip
        sinks = slice((k_pos < view.sink).sum())
        held = tuple(x[:, sinks] for x in keys_values)
        return near + self._old_sinks(view, q, held, positions, k_pos[sinks], limit)

    def over_cache(self, i, q, cache, positions, *, include_self=True):
        view, compute = _without_sinks(self.views[i]), self.compute
        near = cache.attend(q, positions, view, compute, include_self=include_self)
        sink = self.views[i].sink
        at = jnp.broadcast_to(jnp.arange(sink), (q.shape[0], sink))
        # Sink i is in slot i: a slice compiles faster than `entries`, layer by layer.
        held = tuple(unpacked(x[:, :sink], *q.shape[2::2]).astype(q.dtype)
                     for x in (cache.keys, cache.values))  # fmt: skip
        return [near, *self._old_sinks(self.views[i], q, held, positions, at, positions)]

    def _old_sinks(self, view, q, keys_values, q_pos, k_pos, limit) -> list[Attended]:
        """Attention to the sinks that the window has left behind, if there are any."""
        if not k_pos.shape[-1]:
            return []
        xp = np if isinstance(q_pos, np.ndarray) else jnp
        moved = xp.maximum(q_pos - (view.sink + view.window - 1), 0)
        beyond = xp.minimum(limit, q_pos - view.window + 1)
        all_of_them = dataclasses.replace(view, window=0, sink=0)
        k, v = keys_values
        return [
            attention(
                rope(q, -moved, self.config), k, v, q_pos, k_pos, all_of_them, limit=beyond,
                compute=self.compute,
            )
        ]  # fmt: skip


def _without_sinks(view):
    return dataclasses.replace(view, sink=0)


class MagicDec(SelfDrafting):
    """Sinks and a ring of the newest tokens, copied from the target's cache."""

    def begin(self, params, prompt, lengths, k, capacity):
        if prompt.tokens.shape[1] == 0:
            return self.empty(params, prompt.tokens.shape[0], k, capacity)
        return tuple(
            begin_windowed(lambda at, i=i: self.taken(prompt.cache, i, at), prompt.tokens, lengths,
                           view, k, capacity, self.model.compute)
            for i, view in enumerate(self.views)
        )  # fmt: skip

    def along(self, params, tokens, activations, cache, read, starts, k, sampling):
        sink = max(view.sink for view in self.views)
        begin = max(int(starts.min()) + 1 - max(view.window for view in self.views), 0)
        seen = np.r_[: min(sink, begin), begin : tokens.shape[1] - 1]
        return self.rolled_out(params, tokens, cache, seen, starts, k, sampling)


def magicdec(target: ModelConfig, window: int, sink: int, compute: Compute) -> MagicDec:
    """The strategy; its draft's parameters are the target's own."""
    views = tuple(view.keeping(window, sink) for view in target.views())
    return MagicDec(drafting_target(target, compute, views, StreamingDraft))

"""A cache policy for the target as its own draft, in one file: every n-th token of the text, and a
window.

What is kept has its own view, which is the rule of who sees whom, and its own cache, which has room
for just that. Drafting, the oracle, evaluation and report are those of every other draft.
"""

import dataclasses

import jax.numpy as jnp
import models
import pytest
import strangers
import test_strategies
from test_lossless import SMALL, check_joint

from spire_jax.config.checks import check, positive
from spire_jax.config.drafts import DraftCost, DraftOptions, Pass
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.config.schema import ConfigError
from spire_jax.drafting.self_drafting import SelfDrafting, drafting_target
from spire_jax.export import export
from spire_jax.models.attention import Compute
from spire_jax.models.caches import LayerCache, allocated, nothing
from spire_jax.models.masks import EMPTY, View
from spire_jax.models.records import record


@DRAFT_KINDS.register("strided")
@dataclasses.dataclass(frozen=True)
class StridedOptions(DraftOptions):
    kind: str = "strided"
    window: int = 8
    stride: int = 4

    def strategy(self, target, compute):
        views = self.views(target)
        return Strided(drafting_target(target, compute, views), self.window, self.stride)

    def views(self, target):
        return tuple(StridedView(self.window, 0, view.scale, view.softcap, self.stride)
                     for view in target.views())  # fmt: skip

    def cost(self, target, context, k):
        newest = min(context, self.window)
        return DraftCost(
            rows=float(newest + self._strided(context - newest)),
            slots=float(self._strided(context) + self.window + k),
            passes=(Pass(),) * k,
        )

    def _strided(self, tokens):
        """Of the first tokens of a text, those whose position the stride divides."""
        return -(-tokens // self.stride)

    def check(self, at, config):
        positive(self, at, "window stride")
        check(not any(view.window for view in config.target.views()),
              f"{at}: the target has layers with a window of their own")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StridedView(View):
    stride: int = 1

    def sees(self, q_pos, k_pos):
        return super().sees(q_pos, k_pos) | ((k_pos <= q_pos) & (k_pos % self.stride == 0))


@record("strided", "stride", "ring")
@dataclasses.dataclass(frozen=True)
class StridedCache(LayerCache):
    """Slot j < strided holds position j * stride; the others are a ring of the rest."""

    strided: int
    stride: int
    ring: int
    overwrites = True

    def slots(self, positions):
        newest = jnp.max(positions, axis=1, keepdims=True)
        kept = (positions >= 0) & (positions > newest - self.ring)
        ring = jnp.where(kept, self.strided + positions % self.ring, self.size)
        every = (positions >= 0) & (positions % self.stride == 0)
        return jnp.where(every, positions // self.stride, ring)

    def held(self, last):
        slot, last = jnp.arange(self.size)[None], last[:, None]
        newest = last - (last - (slot - self.strided)) % self.ring
        newest = jnp.where((newest >= 0) & (newest % self.stride != 0), newest, EMPTY)
        return jnp.where(slot < self.strided, slot * self.stride, newest)


@dataclasses.dataclass(frozen=True)
class Strided(SelfDrafting):
    window: int
    stride: int

    def empty(self, params, batch, k, capacity):
        none, compute = nothing(self.model.config, batch, self.model.compute), self.model.compute
        strided, ring = -(-capacity // self.stride), self.window + k
        return tuple(
            StridedCache(*allocated(*none, strided + ring, compute), strided, self.stride, ring)
            for _ in self.views
        )


# --- the proof -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    return strangers.finished(
        corpus, tmp_path_factory.mktemp("policy"), plugins=__name__, drafts__mine__kind="strided",
        drafts__mine__stride=3, drafts__mine__window=5,
    )  # fmt: skip


def test_it_is_set_on_the_command_line_and_nothing_is_trained(done):
    assert done.config.draft("mine") == StridedOptions(stride=3, window=5)
    assert not done.config.trained and not (done.folder / "drafts").exists()


def test_it_is_lossless(done):
    strangers.check_greedy(done, "mine")
    strategy = StridedOptions(window=2, stride=5).strategy(SMALL, Compute())
    target, params = models.target(SMALL)
    check_joint(models.Pair(target, params, strategy, params), 1.0)


def test_the_oracle_agrees_with_the_decoder_and_the_report_has_it(done):
    strangers.check_report(done, "mine")


def test_its_bytes_are_its_arrays(done):
    test_strategies.check_memory(done.config, "mine")
    test_strategies.check_slots(done.config.draft("mine"), done.config.target)


@pytest.mark.parametrize("context", [4, 20])
def test_its_rows_are_what_a_step_sees(done, context):
    test_strategies.check_rows(done.config.draft("mine"), models.TINY, context)


def test_there_is_nothing_to_export(done, tmp_path):
    with pytest.raises(ConfigError, match=r"of kind 'strided' nothing is trained"):
        export(done.config, str(done.folder), "mine", str(tmp_path / "draft"))

"""A model family in one file: layers of two kinds, with a window and without, and softcaps.

The target and its drafts are of it: drafts have its layers by its views, its head by its module.
"""

import dataclasses

import jax.numpy as jnp
import models
import numpy as np
import pytest
import strangers
import test_strategies
from test_lossless import SMALL, check_joint

from spire_jax.config.checks import check, positive
from spire_jax.config.registry import FAMILIES
from spire_jax.config.schema import ModelConfig
from spire_jax.drafting.magicdec import MagicDecOptions
from spire_jax.drafting.spire import SpireOptions
from spire_jax.drafting.vanilla import VanillaOptions
from spire_jax.models.attention import Compute
from spire_jax.models.masks import View
from spire_jax.models.transformer import Transformer


@FAMILIES.register("by_turns")
@dataclasses.dataclass(frozen=True)
class ByTurns(ModelConfig):
    family: str = "by_turns"
    near: int = 6  # the window of layers 1, 3, ...; the others see everything
    softcap: float = 3.0  # of attention's logits
    head_softcap: float = 8.0

    def views(self):
        (view, *_) = super().views()
        return tuple(dataclasses.replace(view, window=0 if i % 2 else self.near,
                                         softcap=self.softcap)
                     for i in range(self.n_layers))  # fmt: skip

    def module(self):
        return Capped

    def check(self, at, config):
        super().check(at, config)
        positive(self, at, "near head_softcap")
        check(self.n_layers % 2 == 0, f"{at}.n_layers={self.n_layers} is odd")


class Capped(Transformer):
    """A head whose logits stay within a bound."""

    def unembed_head(self, x):
        bound = self.config.head_softcap
        return jnp.where(jnp.isfinite(logits := super().unembed_head(x)),
                         bound * jnp.tanh(logits / bound), -jnp.inf)  # fmt: skip


# --- the proof -----------------------------------------------------------------------------------

DRAFTS = {
    "spire": SpireOptions(n_layers=1, window=8),
    "vanilla": VanillaOptions(n_layers=1, window=0),
    "sparse": MagicDecOptions(window=9),
}


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    drafts = {f"drafts__{name}__{key}": getattr(draft, key) for name, draft in DRAFTS.items()
              for key in ("kind", "window", "n_layers") if hasattr(draft, key)}  # fmt: skip
    return strangers.finished(
        corpus, tmp_path_factory.mktemp("family"), plugins=__name__, target__family="by_turns",
        target__near=5, **drafts,
    )  # fmt: skip


def test_it_is_set_on_the_command_line_and_learns(done):
    assert type(done.config.target) is ByTurns and dict(done.config.drafts) == DRAFTS
    assert [view.window for view in done.config.target.views()] == [5, 0]
    for name in ("target", "spire", "vanilla"):
        losses = done.losses(name)
        assert np.mean(losses[-3:]) < np.mean(losses[:3]), name


def test_drafts_have_what_the_family_has():
    target = ByTurns(n_layers=4)
    near, far = View(6, softcap=3.0), View(8, 1, softcap=3.0)
    assert SpireOptions(window=8).views(target) == (near, far)
    assert MagicDecOptions(window=8).views(target) == (near, far) * 2
    for options in DRAFTS.values():
        assert issubclass(options.strategy(target, Compute()).model.module, Capped)


@pytest.mark.parametrize(
    "name", ["spire", pytest.param("vanilla", marks=pytest.mark.slow), "sparse"]
)
def test_it_is_lossless(done, name):
    strangers.check_greedy(done, name)


def test_its_samples_are_the_targets():
    family = ByTurns(**{**dataclasses.asdict(SMALL), "family": "by_turns"})
    target, params = models.target(family)
    strategy = SpireOptions(n_layers=1, window=4).strategy(family, Compute())
    check_joint(models.Pair(target, params, strategy, models.init(strategy.model, 1)), 1.0)


@pytest.mark.parametrize("name", DRAFTS)
def test_the_oracle_agrees_with_the_decoder_and_the_report_has_it(done, name):
    strangers.check_report(done, name)


@pytest.mark.parametrize("name", DRAFTS)
def test_its_bytes_are_its_arrays(done, name):
    test_strategies.check_memory(done.config, name)
    test_strategies.check_slots(done.config.draft(name), done.config.target)


def test_its_drafts_are_exported_and_imported_or_refused(done, tmp_path, monkeypatch):
    folder = strangers.check_export(done, "spire", tmp_path / "draft")
    strangers.check_refused(done, folder, FAMILIES, "by_turns", monkeypatch)

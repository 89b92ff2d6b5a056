"""What the README and docs/ say: files and commands that exist, links that lead somewhere, and the
README's example of a strategy, which decodes."""

import importlib.util
import pathlib
import re

import models
import numpy as np
import pytest

from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.decoding import generate
from spire_jax.models.attention import Compute

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("", "spire_jax", "tests/end_to_end")  # that paths are told from


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    paths = set(re.findall(r"(?<![\w/.-])[\w/]+\.(?:py|sh|ipynb)(?!\w)", text))
    lost = {
        path
        for path in paths - {"mine.py"}
        if not any((ROOT / at / path).exists() for at in FOLDERS)
    }
    assert not lost
    modules = set(re.findall(r"python -m\s+((?:spire_jax|launch)[\w.]*\w)", text))
    assert not {module for module in modules if importlib.util.find_spec(module) is None}
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text)
    for link, anchor in links:
        to = page.parent / link if link else page
        assert to.exists(), link
        titles = re.findall(r"^#+ (.*)$", to.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-")
                                        for t in titles}, anchor  # fmt: skip


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readmes_strategy_writes_what_the_target_writes(monkeypatch):
    monkeypatch.setattr(DRAFT_KINDS, "_found", dict(DRAFT_KINDS.items()))  # not for other tests
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    exec(code, {"__name__": "mine"})
    target, params = models.target()
    options = DRAFT_KINDS.get("by_turns")(window=6)
    strategy = options.strategy(target.config, Compute())
    assert [view.window for view in strategy.views][:2] == [0, 6]
    pair, prompts = models.Pair(target, params, strategy, params), list(models.texts(2, 12))
    texts = []
    for decoder in (pair.autoregressive(0.0), pair.decoder(2, 0.0)):
        state = generate(decoder, pair.weights, prompts, [8] * 2, [0] * 2, width=24)
        texts.append(np.asarray(state.tokens)[:, :20])
    np.testing.assert_array_equal(*texts)
    assert (np.asarray(state.counts) @ np.arange(3)).sum() > 0, "no draft was accepted"

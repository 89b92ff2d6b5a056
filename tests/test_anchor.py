"""AnchorCoder's mask by brute force, in training and in a cache; its ends; its cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, init, texts

from spire_jax.config import files
from spire_jax.config.checks import ConfigError
from spire_jax.costs.throughput import round_cost
from spire_jax.drafting.anchor import AnchorOptions, AnchorState, AnchorView
from spire_jax.drafting.strategy import Processed
from spire_jax.drafting.vanilla import VanillaOptions
from spire_jax.models.attention import Compute
from spire_jax.models.masks import View

ENDS, T = (2, 9, 14), 26
DRAFT = AnchorOptions(anchors=ENDS, n_layers=3, full_every=3, line=5, budget=3)
ALL = dataclasses.replace(DRAFT, anchors=tuple(range(TINY.n_tokens)), budget=T)
VALID = slice(0, TINY.n_tokens)


def rows() -> np.ndarray:
    """Lines of all lengths, with ends at the borders: first and last token, two in a row."""
    x = texts(4, T, seed=3)
    x[1] = np.where(np.isin(x[1], ENDS), 3, x[1])  # one long line
    x[2, [0, 5, 6, 12, T - 1]] = ENDS[0]
    x[3, ::2] = ENDS[1]  # more ends than the budget
    return x


def seen(text: np.ndarray, draft: AnchorOptions = DRAFT) -> np.ndarray:
    """Which tokens an anchored layer sees from each, by going through the text."""
    out, begin = np.zeros((len(text), len(text)), bool), 0
    ends: list[int] = []
    for q, token in enumerate(text):
        out[q, [0, *ends[-draft.budget :], *range(max(begin, q - draft.line + 1), q + 1)]] = True
        if token in draft.anchors:
            ends.append(q)
            begin = q + 1
    return out


@functools.cache
def made(draft: AnchorOptions = DRAFT):
    strategy = draft.strategy(TINY, Compute(attention_chunk=8))
    return strategy, init(strategy.model, 1)


@functools.partial(jax.jit, static_argnums=0)
def plain(draft, own, text, mask):
    """A forward pass under a mask of each layer's, with the softmax written out."""
    module = made(draft)[0].model.bind(own)
    x, at = module.embed(text[None]), jnp.arange(len(text))[None]
    for block, sees in zip(module.blocks, mask, strict=True):
        k, v = block.keys_values(x, at)
        logits = jnp.einsum("btkgh,bskh->bkgts", block.queries(x, at), k)
        weights = jax.nn.softmax(jnp.where(sees, logits, -jnp.inf))
        x = block.finish(x, jnp.einsum("bkgts,bskh->btkgh", weights, v))
    return module.unembed(x)[0, :, VALID]


@functools.cache
def wanted(draft: AnchorOptions = DRAFT) -> np.ndarray:
    """Layers 1 and 2 see by lines, the third everything."""
    causal = np.tri(T, dtype=bool)
    own = made(draft)[1]
    masks = [np.stack([seen(x, draft)] * 2 + [causal]) for x in rows()]
    return np.stack([plain(draft, own, x, m) for x, m in zip(rows(), masks, strict=True)])


def test_a_text_is_read_under_the_mask():
    strategy, own = made()
    logits, _ = jax.jit(lambda w, x: strategy.model.bind(w).forward(x))(own, rows())
    np.testing.assert_allclose(logits[..., VALID], wanted(), atol=2e-5)


@functools.cache
def steps(draft: AnchorOptions):
    strategy = made(draft)[0]

    @jax.jit
    def extend(own, state, tokens, positions):
        logits, _, state = strategy.model.bind(own).extend(state, tokens, positions)
        return logits[..., VALID], state

    return extend


def check_steps(prompt: int) -> None:
    """Each token after a prompt, with a few that are rejected in between, anchors among them."""
    strategy, own = made()
    extend, text, room = steps(DRAFT), jnp.asarray(rows()), 4
    at = jnp.broadcast_to(jnp.arange(T), text.shape)
    given = Processed(text[:, :prompt], at[:, :prompt], (), ())
    state = jax.jit(lambda w, x: strategy.begin(w, x, jnp.full(4, prompt), room, T))(own, given)
    ends = jnp.full((4, 1), ENDS[0])
    for t in range(prompt, T):
        for ahead in range(1, 1 + t % room):  # as a round writes them, and more
            _, state = extend(own, state, ends, at[:, t : t + 1] + ahead - 1)
        logits, state = extend(own, state, text[:, t : t + 1], at[:, t : t + 1])
        np.testing.assert_allclose(logits[:, 0], wanted()[:, t], atol=2e-5, err_msg=str(t))


@pytest.mark.parametrize("prompt", [pytest.param(0, marks=pytest.mark.slow), 17])
def test_a_cache_gives_the_same_whatever_was_rejected(prompt):
    check_steps(prompt)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 16])
def test_prompts_in_chunks(size):
    """Of rows in another order, with rows beyond the batch, over what an earlier text left."""
    strategy, own = made()
    text, order = jnp.asarray(rows()), np.array([2, 0, 3, 1, 4])
    state = strategy.empty(own, 4, 4, T + 16)
    state = AnchorState(state.anchors.at[:].set(T + 9), state.layers)
    read = jax.jit(lambda w, s, x: strategy.read(w, s, x))
    for start in range(0, T - 1, size):
        at = start + np.arange(size)
        at = jnp.broadcast_to(jnp.where(at < T - 1, at, -1), (5, size))
        tokens = jnp.take_along_axis(text[np.minimum(order, 3)], jnp.maximum(at, 0), axis=1)
        state = read(own, state, Processed(tokens, at, (), (), jnp.asarray(order)))
    logits, _ = steps(DRAFT)(own, state, text[:, T - 1 :], jnp.full((4, 1), T - 1))
    np.testing.assert_allclose(logits[:, 0], wanted()[:, T - 1], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("draft", [ALL, dataclasses.replace(DRAFT, full_every=1)],
                         ids=["all anchors", "all layers full"])  # fmt: skip
def test_where_everything_is_seen_it_is_vanilla(draft):
    vanilla = VanillaOptions(window=0, n_layers=3).strategy(TINY, Compute())
    strategy, own = made(draft)
    found, expected = (
        np.asarray(jax.jit(lambda w, x, s=s: s.model.bind(w).forward(x)[0])(own, rows()))
        for s in (strategy, vanilla)
    )
    np.testing.assert_allclose(found[..., VALID], expected[..., VALID], atol=2e-5)
    assert np.abs(found[..., VALID] - wanted()).max() > 0.1


def test_every_so_many_layers_counted_from_the_first_one_sees_everything():
    for n, every, full in ((8, 4, [3, 7]), (3, 4, []), (5, 2, [1, 3]), (2, 1, [0, 1])):
        target = dataclasses.replace(TINY, n_layers=8)
        views = dataclasses.replace(DRAFT, n_layers=n, full_every=every).views(target)
        assert [i for i, view in enumerate(views) if view == View()] == full
        anchored = [view for view in views if view != View()]
        assert all(view == AnchorView(5, 1, budget=3) for view in anchored)


def test_the_cost_is_what_a_query_sees_at_most(pair):
    text = np.array([3] + [2, 4] * 8 + [3] * 8)  # more ends than the budget, then a long line
    cost = DRAFT.cost(TINY, 25, 4)
    assert cost.rows == (2 * seen(text)[-1].sum() + 25) / 3
    assert max(seen(x)[-1].sum() for x in rows()) <= seen(text)[-1].sum()
    # Two of eight layers full, the others small: 30% of the cache is read.
    draft = AnchorOptions(n_layers=8, anchors=(10,), line=17, budget=17)
    of = dataclasses.replace(pair, drafts=(("it", draft),))
    found = round_cost(of, "it", batch=64, context=512, k=4, variant="fixed_window")
    read = (2 * 512 + 6 * 35) / (8 * 512)
    wanted = 1 + 4 * (67.1 + read * 536.9) / (67.1 + 536.9)
    assert found.delta_t == pytest.approx(wanted, rel=1e-3) == pytest.approx(2.51, abs=0.01)


@pytest.mark.parametrize(
    "override, message",
    [
        ("line=8", "anchors is empty; name the tokens that end a line"),
        ("anchors=10,300", r"anchors=\(10, 300\): \[300\] are no tokens of the target's 257"),
        ("full_every=0", "full_every=0"),
        ("budget=0", "budget=0"),
        ("line=-1", "line=-1"),
    ],
)
def test_what_cannot_be_is_named(override, message):
    given = [] if override == "line=8" or "anchors" in override else ["drafts.it.anchors=10"]
    with pytest.raises(ConfigError, match=message):
        files.load("configs/quickstart.py",
                   ["drafts.it.kind=anchor", f"drafts.it.{override}", *given])  # fmt: skip

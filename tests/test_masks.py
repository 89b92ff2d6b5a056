"""The one definition of visibility, against matrices written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spire_jax.models.masks import EMPTY, View, may_attend

# Rows are queries 0 .. 5, columns keys 0 .. 5 (method.md 3.1).
MATRICES = {
    "causal": (dict(window=0, sink=0), """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 1 1 1 0 0
        1 1 1 1 1 0
        1 1 1 1 1 1"""),
    "window 1 is the query alone": (dict(window=1, sink=0), """
        1 0 0 0 0 0
        0 1 0 0 0 0
        0 0 1 0 0 0
        0 0 0 1 0 0
        0 0 0 0 1 0
        0 0 0 0 0 1"""),
    "window 3 counts the query": (dict(window=3, sink=0), """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        0 1 1 1 0 0
        0 0 1 1 1 0
        0 0 0 1 1 1"""),
    "window 3, sink 1": (dict(window=3, sink=1), """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 1 1 1 0 0
        1 0 1 1 1 0
        1 0 0 1 1 1"""),
    "window 3, sink 2": (dict(window=3, sink=2), """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 1 1 1 0 0
        1 1 1 1 1 0
        1 1 0 1 1 1"""),
    "window 1, sink 1": (dict(window=1, sink=1), """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 0 1 0 0 0
        1 0 0 1 0 0
        1 0 0 0 1 0
        1 0 0 0 0 1"""),
}  # fmt: skip


def literal(text: str) -> np.ndarray:
    return np.array([row.split() for row in text.strip().splitlines()], int).astype(bool)


@pytest.mark.parametrize("name", MATRICES)
def test_mask_is_the_literal_matrix(name):
    options, text = MATRICES[name]
    positions = np.arange(6)
    mask = may_attend(positions[:, None], positions, **options)
    np.testing.assert_array_equal(mask, literal(text))
    traced = jax.jit(lambda x: may_attend(x[:, None], x, **options))(jnp.asarray(positions))
    np.testing.assert_array_equal(traced, literal(text))


def test_a_window_shows_that_many_keys():
    positions = np.arange(40)
    for window in (1, 3, 7):
        mask = may_attend(positions[:, None], positions, window)
        np.testing.assert_array_equal(mask.sum(axis=1), np.minimum(positions + 1, window))


def test_order_of_keys_does_not_matter():
    """Visibility comes from positions, not from matrix indices: a ring is out of order."""
    keys = np.array([0, 7, 8, 3, 4, 5, 6, EMPTY])
    mask = may_attend(np.array([[6], [8]]), keys, window=3, sink=1)
    np.testing.assert_array_equal(mask, literal("1 0 0 0 1 1 1 0\n1 1 1 0 0 0 1 0"))


def test_empty_slot_is_visible_to_nobody():
    queries = np.array([-1, 0, 5, 2**29], np.int32)
    for options in (dict(), dict(window=4), dict(window=4, sink=2)):
        assert not may_attend(queries, EMPTY, **options).any()


def test_a_query_before_the_text_sees_nothing():
    assert not may_attend(-1, np.arange(5), 3, 1).any()


# --- views -------------------------------------------------------------------------------------

WIDE = np.arange(30)


def seen(view: View) -> np.ndarray:
    return np.asarray(view.sees(WIDE[:, None], WIDE))


@pytest.mark.parametrize("kept", [(0, 0), (4, 0), (4, 2), (7, 1), (29, 5)])
@pytest.mark.parametrize("of", [(0, 0), (5, 0), (5, 3), (9, 1)])
def test_what_is_kept_shows_what_the_model_sees_of_it(of, kept):
    """Both windows and both sinks: what a mask of the model shows, and one of what is kept."""
    found, both = seen(View(*of).keeping(*kept)), seen(View(*of)) & seen(View(*kept))
    (window, sink), (wider, more) = sorted((w or len(WIDE), s if w else len(WIDE))
                                           for w, s in (of, kept))  # fmt: skip
    if sink > more:
        # No view says this: sinks of the smaller window alone, seen as far as the wider one goes.
        # Beyond the smaller one they are not seen.
        near, shared = WIDE[:, None] - WIDE < window, np.isin(WIDE, range(more))
        assert (both & ~near & ~shared).any() == (window < wider)
        both &= near | shared
    np.testing.assert_array_equal(found, both)


def test_keeping_says_nothing_of_the_logits():
    view = View(0, 0, 0.3, 20.0)
    assert view.keeping(6, 1) == View(6, 1, 0.3, 20.0)
    assert view.keeping(0, 3) == view  # everything is kept: the first positions too
    assert View(6, 2, 0.3).keeping(0, 0) == View(6, 2, 0.3)

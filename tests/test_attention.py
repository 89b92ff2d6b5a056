"""Attention against a naive softmax in float64, whoever computes it; caches under the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spire_jax.config.schema import ModelConfig
from spire_jax.models.attention import (
    Compute,
    attention,
    cache_shape,
    cached_attention,
    merge_attention,
    unpacked,
)
from spire_jax.models.caches import empty_full, empty_windowed
from spire_jax.models.masks import View

B, KV_HEADS, H = 2, 2, 4
XLA = Compute()

# name: (queries' positions, keys' positions, options); limits are one per query.
CASES = {
    "causal": (np.arange(11), np.arange(11), dict()),
    "window": (np.arange(11), np.arange(11), dict(window=3)),
    "window and sink": (np.arange(11), np.arange(11), dict(window=3, sink=2)),
    "scaled": (np.arange(11), np.arange(11), dict(scale=0.3)),
    "limit": (np.arange(3, 11), np.arange(9), dict(limit=np.array([0, 0, 3, 3, 3, 6, 6, 6]))),
    "limit, window and sink": (
        np.arange(2, 14, 3), np.arange(12),
        dict(window=4, sink=1, limit=np.array([0, 3, 6, 9])),
    ),
    "keys out of order": (np.array([9, 4, 7]), np.array([4, 9, 0, 8, 6, 2, 7]), dict(window=4)),
    "late queries": (np.arange(20, 24), np.arange(24), dict(window=3)),
}  # fmt: skip


def arrays(n_queries: int, n_keys: int, group: int, seed: int = 0, h: int = H):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, n_queries, KV_HEADS, group, h)) * (H / h) ** 0.5
    k, v = rng.normal(size=(2, B, n_keys, KV_HEADS, h))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


def naive(q, k, v, q_pos, k_pos, window=0, sink=0, limit=None, scale=1.0):
    """One query at a time, from the definition; output and log-sum-exp in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.full(q.shape[:-1], -np.inf)
    for b, t, head, member in np.ndindex(q.shape[:-1]):
        p = q_pos[t]
        seen = [
            s for s, j in enumerate(k_pos)
            if j <= p and (not window or j < sink or p - j < window)
            and (limit is None or j < limit[t])
        ]  # fmt: skip
        if seen:
            weight = np.exp(k[b, seen, head] @ q[b, t, head, member] * scale)
            out[b, t, head, member] = weight @ v[b, seen, head] / weight.sum()
            lse[b, t, head, member] = np.log(weight.sum())
    return out, lse


def viewed(q, k, v, q_pos, k_pos, limit=None, compute=XLA, **view):
    """`attention` by the options of `naive`."""
    return attention(q, k, v, q_pos, k_pos, View(**view), limit=limit, compute=compute)


def traced(q, k, v, q_pos, k_pos, limit=None, **options):
    """`attention` with positions that are known only at run time, per row."""

    @jax.jit
    def run(q, k, v, q_pos, k_pos, limit):
        return viewed(q, k, v, q_pos, k_pos, limit, **options)

    rows = lambda x: None if x is None else jnp.tile(jnp.asarray(x), (B, 1))  # noqa: E731
    return run(q, k, v, rows(q_pos), rows(k_pos), rows(limit))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [4, 128])
def test_attention_is_the_naive_softmax(name, chunk):
    """Static positions, in chunks that do not divide the tokens and in one; run-time positions."""
    q_pos, k_pos, options = CASES[name]
    q, k, v = arrays(len(q_pos), len(k_pos), group=2)
    expected = naive(q, k, v, q_pos, k_pos, **options)
    compute = Compute(attention_chunk=chunk)
    static = jax.jit(
        lambda q, k, v: viewed(q, k, v, q_pos, k_pos, compute=compute, **options)
    )(q, k, v)  # fmt: skip
    at_run_time = traced(q, k, v, q_pos, k_pos, **options)
    for (out, lse), what in ((static, "static"), (at_run_time, "run time")):
        np.testing.assert_allclose(out, expected[0], atol=1e-5, err_msg=what)
        np.testing.assert_allclose(lse, expected[1], atol=1e-5, err_msg=what)


@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_query_heads_share_their_kv_head(group):
    q, k, v = arrays(7, 7, group)
    out, lse = jax.jit(
        lambda *x: attention(*x, np.arange(7), np.arange(7), compute=Compute(attention_chunk=3))
    )(q, k, v)
    expected = naive(q, k, v, np.arange(7), np.arange(7))
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)


def test_rows_have_their_own_positions():
    q, k, v = arrays(2, 6, group=1)
    q_pos = np.array([[3, 4], [8, 9]])
    k_pos = np.array([[0, 1, 2, 3, 4, 5], [0, 9, 8, 7, 6, 5]])
    out, _ = attention(q, k, v, jnp.asarray(q_pos), jnp.asarray(k_pos), View(3, 1))
    for row in range(B):
        alone = naive(
            *(x[row : row + 1] for x in (q, k, v)), q_pos[row], k_pos[row], window=3, sink=1
        )
        np.testing.assert_allclose(out[row], alone[0][0], atol=1e-5)


def test_blocks_of_keys_that_no_query_sees_are_not_read():
    """NaN in keys and values outside the window of every query of a chunk does not spread."""
    q, k, v = arrays(16, 16, group=2)
    positions = np.arange(16)
    expected = naive(q, k, v, positions, positions, window=3, sink=1)[0]
    for chunk in range(4):
        mine = slice(4 * chunk, 4 * chunk + 4)
        read = {0, chunk - 1, chunk} if chunk else {0}  # the sink's chunk, the window's
        is_read = np.isin(positions // 4, list(read))[:, None, None]
        poisoned = (jnp.where(is_read, x, jnp.nan) for x in (k, v))
        out, lse = attention(
            q, *poisoned, positions, positions, View(3, 1), compute=Compute(attention_chunk=4)
        )
        np.testing.assert_allclose(out[:, mine], expected[:, mine], atol=1e-5)
        assert np.isfinite(lse[:, mine]).all()


def test_a_query_that_sees_no_key_is_zero_and_has_finite_gradients():
    q, k, v = arrays(3, 3, group=2)
    positions, limit = np.arange(3), np.array([0, 0, 2])

    def static(q, k, v):
        return attention(q, k, v, positions, positions, limit=limit)

    def run_time(q, k, v):
        rows = (jnp.tile(jnp.asarray(x), (B, 1)) for x in (positions, positions, limit))
        q_pos, k_pos, row_limit = rows
        return attention(q, k, v, q_pos, k_pos, limit=row_limit)

    def merged(q, k, v):
        part = static(q, k, v)
        return merge_attention([part, part]), part[1]

    for function in (static, run_time, merged):
        out, lse = function(q, k, v)
        assert not np.asarray(out)[:, :2].any() and np.asarray(out)[:, 2].all()
        assert (np.asarray(lse)[:, :2] == -np.inf).all() and np.isfinite(lse[:, 2]).all()
        gradients = jax.grad(lambda *x, f=function: (f(*x)[0] ** 2).sum(), (0, 1, 2))(q, k, v)
        assert all(np.isfinite(g).all() for g in gradients)
        assert not np.asarray(gradients[0])[:, :2].any() and np.asarray(gradients[0])[:, 2].any()
        assert np.asarray(gradients[1])[:, :2].any() and not np.asarray(gradients[2])[:, 2].any()


def test_merged_parts_are_one_softmax():
    """Keys split into three, one of them empty for some queries, logits far apart."""
    q, k, v = arrays(8, 12, group=3)
    k = k.at[:, 4:8].multiply(20)
    q_pos, k_pos = np.arange(2, 10), np.arange(12)
    expected = naive(q, k, v, q_pos, k_pos)[0]

    def split(q, k, v):
        parts = [slice(0, 4), slice(4, 8), slice(8, 12)]
        return merge_attention([attention(q, k[:, s], v[:, s], q_pos, k_pos[s]) for s in parts])

    np.testing.assert_allclose(jax.jit(split)(q, k, v), expected, atol=1e-5)
    whole = jax.grad(lambda *x: (attention(*x, q_pos, k_pos)[0] ** 2).sum(), (0, 1, 2))(q, k, v)
    parts = jax.grad(lambda *x: (split(*x) ** 2).sum(), (0, 1, 2))(q, k, v)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


@pytest.mark.parametrize("name", ["causal", "window and sink", "limit, window and sink"])
def test_gradients_are_those_of_the_naive_softmax(name):
    """Directional derivatives, by central differences of the float64 definition."""
    q_pos, k_pos, options = CASES[name]
    inputs = arrays(len(q_pos), len(k_pos), group=2)
    rng = np.random.default_rng(1)
    weight = rng.normal(size=inputs[0].shape)

    def loss(q, k, v):
        return (
            weight * viewed(q, k, v, q_pos, k_pos, compute=Compute(attention_chunk=5), **options)[0]
        ).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)
    for i, gradient in enumerate(gradients):
        for _ in range(3):
            direction = rng.normal(size=inputs[i].shape)
            step = 1e-5 * direction
            ends = []
            for sign in (1, -1):
                moved = [np.asarray(x, np.float64) for x in inputs]
                moved[i] = moved[i] + sign * step
                ends.append((weight * naive(*moved, q_pos, k_pos, **options)[0]).sum())
            slope = (ends[0] - ends[1]) / 2e-5
            np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=2e-3, atol=2e-3)


# --- the kernels, interpreted ------------------------------------------------------------------

KERNEL = Compute(attention="interpret")


@pytest.mark.parametrize("name", [name for name in CASES if name != "keys out of order"])
def test_kernel_is_the_naive_softmax(name):
    q_pos, k_pos, options = CASES[name]
    q, k, v = arrays(len(q_pos), len(k_pos), group=2, h=32)
    out, lse = viewed(q, k, v, q_pos, k_pos, compute=KERNEL, **options)
    expected = naive(q, k, v, q_pos, k_pos, **options)
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("ring", [True, False])
def test_cached_kernel_is_the_naive_softmax(ring, include_self):
    """Rows of 1 and of 9 tokens, the last ones queries, over a cache that was written in turns."""
    config = ModelConfig(n_layers=1, n_kv_heads=2, q_per_kv=2, d_head=32)
    view = View(window=4, sink=1)
    tokens, (short, long) = 2, (1, 9)
    _, k, v = arrays(1, 12, group=1, h=32)
    q = arrays(tokens, 1, group=2, h=32, seed=1)[0]
    results = []
    for compute in (KERNEL, Compute()):
        (cache,) = (empty_windowed(config, [view], B, 3, 12, compute) if ring
                    else empty_full(config, B, 12, compute))  # fmt: skip
        for at in range(long):
            positions = jnp.array([[at if at < short else -1], [at]])
            cache = cache.append(positions, k[:, at : at + 1], v[:, at : at + 1])
        positions = jnp.array([short, long])[:, None] - tokens + jnp.arange(tokens)
        results.append(cached_attention(
            q, cache, positions, view, include_self=include_self, compute=compute,
        ))  # fmt: skip
    for row, length in enumerate((short, long)):
        q_pos = np.arange(length - tokens, length)
        one = slice(row, row + 1)
        expected = naive(
            q[one], k[one], v[one], q_pos, np.arange(12), window=4, sink=1,
            limit=None if include_self else q_pos,
        )  # fmt: skip
        for found in results:
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a[row], b[0], atol=1e-5)


def test_a_kernel_s_cache_is_laid_out_for_it():
    """Sixteen slots at a time, whole registers; XLA's as it is needed; heads come back the same."""
    assert cache_shape(KERNEL, 69, 3, 64) == (80, 256)
    assert cache_shape(Compute(), 69, 3, 64) == (69, 192)
    config = ModelConfig(n_layers=1, n_kv_heads=3, q_per_kv=1, d_head=32)
    (cache,) = empty_windowed(config, [View(window=4, sink=1)], 2, 4, 99, KERNEL)
    assert cache.keys.shape == (2, 16, 128) and cache.live == 9
    positions = jnp.array([[8, -1], [3, 9]])
    k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 32)), jnp.float32)
    cache = cache.append(positions, k, k)
    positions = np.asarray(cache.held(jnp.array([8, 30])))
    assert positions.shape == (2, 16) and (positions[:, cache.live :] == 2**30).all()
    held = unpacked(cache.keys, 3, 32)
    np.testing.assert_array_equal(held[0, 8], k[0, 0])
    np.testing.assert_array_equal(held[1, 1], k[1, 1])  # position 9 wraps around to slot 1
    assert np.count_nonzero(np.asarray(held).any(axis=(2, 3))) == 3


def test_the_choice_of_code():
    """Kernels by default on a TPU whose heads they take; here is none."""
    assert Compute().kernel(128, 4) == "" and KERNEL.kernel(128, 4) == "interpret"
    assert Compute(attention="xla").kernel(128, 4) == ""

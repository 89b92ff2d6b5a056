"""Attention against a naive softmax in float64; RoPE, RMSNorm and the blocks' options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import TINY, init, texts

from spire_jax.config import ModelConfig
from spire_jax.models.layers import Compute, RMSNorm, attention, merge_attention, rope
from spire_jax.models.layers import rope_frequencies as frequencies
from spire_jax.models.transformer import Model, Transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, KV_HEADS, H = 2, 2, 4

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


def arrays(n_queries: int, n_keys: int, group: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, n_queries, KV_HEADS, group, H))
    k, v = rng.normal(size=(2, B, n_keys, KV_HEADS, H))
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


def traced(q, k, v, q_pos, k_pos, limit=None, **options):
    """`attention` with positions that are known only at run time, per row."""

    @jax.jit
    def run(q, k, v, q_pos, k_pos, limit):
        return attention(q, k, v, q_pos, k_pos, limit=limit, **options)

    rows = lambda x: None if x is None else jnp.tile(jnp.asarray(x), (B, 1))  # noqa: E731
    return run(q, k, v, rows(q_pos), rows(k_pos), rows(limit))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [4, 128])
def test_attention_is_the_naive_softmax(name, chunk):
    """Static positions, in chunks that do not divide the tokens and in one; run-time positions."""
    q_pos, k_pos, options = CASES[name]
    q, k, v = arrays(len(q_pos), len(k_pos), group=2)
    expected = naive(q, k, v, q_pos, k_pos, **options)
    static = jax.jit(
        lambda q, k, v: attention(q, k, v, q_pos, k_pos, chunk=chunk, **options)
    )(q, k, v)  # fmt: skip
    at_run_time = traced(q, k, v, q_pos, k_pos, **options)
    for (out, lse), what in ((static, "static"), (at_run_time, "run time")):
        np.testing.assert_allclose(out, expected[0], atol=1e-5, err_msg=what)
        np.testing.assert_allclose(lse, expected[1], atol=1e-5, err_msg=what)


@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_query_heads_share_their_kv_head(group):
    q, k, v = arrays(7, 7, group)
    out, lse = jax.jit(lambda *x: attention(*x, np.arange(7), np.arange(7), chunk=3))(q, k, v)
    expected = naive(q, k, v, np.arange(7), np.arange(7))
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)


def test_rows_have_their_own_positions():
    q, k, v = arrays(2, 6, group=1)
    q_pos = np.array([[3, 4], [8, 9]])
    k_pos = np.array([[0, 1, 2, 3, 4, 5], [0, 9, 8, 7, 6, 5]])
    out, _ = attention(q, k, v, jnp.asarray(q_pos), jnp.asarray(k_pos), window=3, sink=1)
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
        out, lse = attention(q, *poisoned, positions, positions, window=3, sink=1, chunk=4)
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
        return (weight * attention(q, k, v, q_pos, k_pos, chunk=5, **options)[0]).sum()

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


# --- RoPE, norm --------------------------------------------------------------------------------


def test_rope_rotates_pairs_by_position_times_frequency():
    config = ModelConfig(d_head=4, rope_base=100.0)  # frequencies 1 and 1/10
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0])[None, None]
    rotated = rope(x, jnp.asarray([[3]]), config)[0, 0]
    (a, b), (c, d) = (np.cos(3.0), np.sin(3.0)), (np.cos(0.3), np.sin(0.3))
    np.testing.assert_allclose(
        rotated, [a - 3 * b, 2 * c - 4 * d, 3 * a + b, 4 * c + 2 * d], atol=1e-6
    )


def test_rope_depends_on_distance_alone():
    q, k, _ = arrays(1, 1, group=1)

    @jax.jit
    def product(q_pos, k_pos):
        config = dataclasses.replace(TINY, d_head=H)
        rotated_q = rope(q, jnp.full((B, 1), q_pos), config)
        return jnp.einsum("btkgh,btkh->b", rotated_q, rope(k, jnp.full((B, 1), k_pos), config))

    near = product(5, 3)
    for shift in (1, 100, 1000):
        np.testing.assert_allclose(product(5 + shift, 3 + shift), near, atol=5e-4)
    assert np.abs(product(6, 3) - near).min() > 1e-2


def test_rope_positions_may_be_static_or_per_row():
    q, _, _ = arrays(5, 1, group=2)
    config = dataclasses.replace(TINY, d_head=H)
    static = rope(q, np.arange(5), config)
    np.testing.assert_allclose(rope(q, jnp.tile(jnp.arange(5), (B, 1)), config), static, atol=1e-6)
    rows = rope(q, jnp.arange(5) + jnp.asarray([[0], [7]]), config)
    np.testing.assert_allclose(rows[0], static[0], atol=1e-6)
    np.testing.assert_allclose(rows[1], rope(q, np.arange(7, 12), config)[1], atol=1e-6)


def test_rope_scaling_is_llama_3s():
    """The published rule, with Llama 3.1's numbers, wavelength by wavelength."""
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    config = ModelConfig(
        d_head=128, rope_base=500000.0, rope_scaling=factor, rope_low_freq_factor=low,
        rope_high_freq_factor=high, rope_original_len=original,
    )  # fmt: skip
    branches = []
    for i, frequency in enumerate(frequencies(config)):
        plain = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * np.pi / plain
        if wavelength < original / high:
            branch, scaled = "kept", plain
        elif wavelength > original / low:
            branch, scaled = "divided", plain / factor
        else:
            smooth = (original / wavelength - low) / (high - low)
            branch, scaled = "between", (1 - smooth) * plain / factor + smooth * plain
        branches.append(branch)
        np.testing.assert_allclose(frequency, scaled, rtol=1e-6)
    assert set(branches) == {"kept", "between", "divided"}
    unscaled = dataclasses.replace(config, rope_scaling=1.0)
    np.testing.assert_allclose(
        frequencies(unscaled), 500000.0 ** (-np.arange(0, 128, 2) / 128), rtol=1e-6
    )


def test_rms_norm():
    x = np.random.default_rng(0).normal(3, 2, (4, 10)).astype(np.float32)
    norm = RMSNorm(10, 0.1, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.arange(10.0)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.1) * np.arange(10)
    np.testing.assert_allclose(norm(jnp.asarray(x)), exact, rtol=1e-5)
    half = norm(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, rtol=0.02)


# --- options of the blocks ---------------------------------------------------------------------

SMALL = dataclasses.replace(TINY, n_layers=1)


@functools.cache
def runner(**options):
    """A one-layer model with these options, its parameters, and its logits over a fixed text."""
    model = Model(Transformer, dataclasses.replace(SMALL, **options), Compute())
    tokens = jnp.asarray(texts(2, 9))
    logits = jax.jit(lambda params: model.bind(params).forward(tokens)[0])
    return init(model, 0), lambda params: np.asarray(logits(params))[..., : TINY.n_tokens]


def changed(params, **leaves):
    """`params` with leaves of the first block mapped by functions."""
    block = dict(params["blocks"][0])
    block |= {name: jax.tree.map(function, block[name]) for name, function in leaves.items()}
    return params | {"blocks": {0: block}}


def test_biases_are_added_before_rotation():
    plain, plain_logits = runner()
    params, logits = runner(qkv_bias=True)
    block = params["blocks"][0]
    assert block["query_bias"].shape == block["query"].shape[1:]
    assert block["key_bias"].shape == block["value_bias"].shape == block["key"].shape[1:]
    # The same model, given the same weights, while the biases are zero.
    zero = {name: block[name] for name in ("query_bias", "key_bias", "value_bias")}
    shared = plain | {"blocks": {0: plain["blocks"][0] | zero}}
    np.testing.assert_allclose(logits(shared), plain_logits(plain), atol=1e-6)
    for name in zero:
        moved = changed(
            shared, **{name: lambda x: x + jnp.linspace(0.3, 1, x.size).reshape(x.shape)}
        )
        assert np.abs(logits(moved) - logits(shared)).max() > 1e-2, name
    # A key bias is turned with its key; a value bias is added as it is.
    module = Model(Transformer, dataclasses.replace(SMALL, qkv_bias=True), Compute()).bind(
        changed(shared, key_bias=lambda x: x + 0.5, value_bias=lambda x: x + 2.0)
    )
    x = jnp.zeros((1, 6, TINY.d_model))
    keys, values = module.blocks[0].keys_values(x, np.arange(6))
    turned = rope(jnp.full((1, 6, 2, TINY.d_head), 0.5), np.arange(6), SMALL)
    np.testing.assert_allclose(keys, turned, atol=1e-6)
    np.testing.assert_array_equal(values, 2.0)


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys():
    plain, plain_logits = runner()
    params, logits = runner(qk_norm=True)
    for name in ("query", "key"):
        scaled = {name: lambda x: 3 * x}
        np.testing.assert_allclose(logits(changed(params, **scaled)), logits(params), atol=1e-4)
        assert np.abs(plain_logits(changed(plain, **scaled)) - plain_logits(plain)).max() > 1e-2
    for name in ("norm_query", "norm_key"):
        assert params["blocks"][0][name]["scale"].shape == (TINY.d_head,)
        sharper = changed(params, **{name: lambda x: 3 * x})
        assert np.abs(logits(sharper) - logits(params)).max() > 1e-3, name


def test_query_scale_sits_in_the_initializer_or_in_attention():
    params, logits = runner()
    _, scaled_logits = runner(scale_in_init=False)
    unscaled = changed(params, query=lambda x: x * TINY.d_head**0.5)
    np.testing.assert_allclose(scaled_logits(unscaled), logits(params), atol=1e-4)
    assert np.abs(scaled_logits(params) - logits(params)).max() > 1e-3

"""RoPE, RMSNorm and the blocks' options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from models import TINY, init, texts

from spire_jax.config.schema import ModelConfig
from spire_jax.models.attention import Compute
from spire_jax.models.layers import RMSNorm, rope
from spire_jax.models.layers import rope_frequencies as frequencies
from spire_jax.models.transformer import Model, Transformer

# --- RoPE, norm --------------------------------------------------------------------------------


def test_rope_rotates_pairs_by_position_times_frequency():
    config = ModelConfig(d_head=4, rope_base=100.0)  # frequencies 1 and 1/10
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0])[None, None]
    rotated = rope(x, jnp.asarray([[3]]), config)[0, 0]
    (a, b), (c, d) = (np.cos(3.0), np.sin(3.0)), (np.cos(0.3), np.sin(0.3))
    np.testing.assert_allclose(
        rotated, [a - 3 * b, 2 * c - 4 * d, 3 * a + b, 4 * c + 2 * d], atol=1e-6
    )


B, H = 2, 4


def vectors(tokens: int, group: int, seed: int = 0):
    shape = B, tokens, 2, group, H
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_rope_depends_on_distance_alone():
    q, k = vectors(1, 1), vectors(1, 1, seed=1)[:, :, :, 0]

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
    q = vectors(5, 2)
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

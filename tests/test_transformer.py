"""The transformer: counts, caches against whole texts, precision, padding, rematerialization."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import SINK, TINY, WINDOW, init, target, texts

from spire_jax.config.schema import ModelConfig
from spire_jax.drafting.spire import SpireDraft, SpireOptions
from spire_jax.drafting.vanilla import VanillaOptions
from spire_jax.models.attention import Compute
from spire_jax.models.caches import empty_full, empty_windowed
from spire_jax.models.transformer import Model, Transformer

T, K = 26, 3  # a text well beyond window + sink + k
WINDOWED = dataclasses.replace(TINY, window=WINDOW, sink=SINK)
VALID = slice(0, TINY.n_tokens)


# --- parameters --------------------------------------------------------------------------------

TARGET = ModelConfig(n_layers=8, d_model=512, n_kv_heads=8, q_per_kv=1, d_head=128, d_ff=4096,
                     vocab_size=64, n_tokens=64)  # fmt: skip
LLAMA = dataclasses.replace(TARGET, n_layers=80, d_model=8192, q_per_kv=8, d_ff=28672)
# method.md section 2: model, config, class of the draft, body parameters
TABLE = [
    ("target 67M", TARGET, Transformer, 67_117_056),
    ("vanilla draft", VanillaOptions(
        n_layers=4, d_model=256, d_head=64, d_ff=2048, window=0).model(TARGET),
     Transformer, 8_390_656),
    ("SPIRe draft", SpireOptions().model(TARGET), SpireDraft, 16_779_264),
    ("Llama 3 70B", LLAMA, Transformer, 68_452_352_000),
    ("Llama 3 8B", dataclasses.replace(LLAMA, n_layers=32, d_model=4096, q_per_kv=4, d_ff=14336),
     Transformer, 6_979_584_000),
    ("SPIRe draft of 70B", SpireOptions(n_layers=20).model(LLAMA), SpireDraft,
     17_113_088_000),
]  # fmt: skip


def count(shapes) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name, config, module, body", TABLE, ids=[row[0] for row in TABLE])
def test_body_parameters_are_the_papers(name, config, module, body):
    layers = min(config.n_layers, 8)  # tracing 80 takes seconds, and they are alike
    traced = dataclasses.replace(config, n_layers=layers)
    model = Model(module, traced, Compute())
    shapes = model.shapes()
    assert config.body_parameters() == body
    assert count(shapes["blocks"]) * config.n_layers == body * layers
    ends = 2 * config.vocab_size * config.d_model + config.d_model
    memory = layers * (layers + 1) if module is SpireDraft else 0
    assert count(shapes.get("memory_mix", ())) == memory
    assert model.count() == count(shapes) == traced.body_parameters() + ends + memory


@pytest.mark.parametrize("options", [dict(qkv_bias=True), dict(qk_norm=True), dict(tied=True)])
def test_body_parameters_count_the_options(options):
    config = dataclasses.replace(TINY, **options)
    shapes = Model(Transformer, config, Compute()).shapes()
    assert count(shapes["blocks"]) == config.body_parameters()
    assert ("unembedding" in shapes) == (not config.tied)


def test_every_parameter_has_an_axis_name_per_dimension():
    for module in (Transformer, SpireDraft):
        config = dataclasses.replace(TINY, qkv_bias=True, qk_norm=True)
        model = Model(module, config, Compute())
        ranks = jax.tree.map(lambda x: len(x.shape), model.shapes())
        names = jax.tree.map(len, model.axes(), is_leaf=lambda x: type(x) is tuple)
        assert ranks == names
        axes = model.axes()
        assert axes["embedding"] == ("vocab", "embed")
        assert axes["blocks"][0]["query"] == ("embed", "kv_heads", None, None)
        assert axes["blocks"][0]["down"] == ("mlp", "embed")


def test_initializers():
    """Fan-in truncated normals, the query's over sqrt(d_head), a unit-normal embedding."""
    config = dataclasses.replace(TINY, n_layers=1, d_model=48, d_ff=160, vocab_size=64)
    model = Model(SpireDraft, config, Compute())
    params = jax.jit(model.init)(jax.random.key(0, impl="unsafe_rbg"))
    ours = init(model, 0)  # the tests' own, of the same scales
    assert jax.tree.structure(params) == jax.tree.structure(ours)
    d, f, heads = 48, 160, 2 * 2 * 8
    deviations = {"query": (d * 8) ** -0.5, "key": d**-0.5, "value": d**-0.5, "out": heads**-0.5,
                  "gate": d**-0.5, "up": d**-0.5, "down": f**-0.5}  # fmt: skip
    for leaves in (params, ours):
        flat = leaves["blocks"][0] | leaves
        for name, deviation in (deviations | {"embedding": 1.0, "unembedding": d**-0.5}).items():
            np.testing.assert_allclose(np.std(flat[name]), deviation, rtol=0.1, err_msg=name)
        for norm in (flat["norm_attention"], flat["norm_mlp"], flat["norm_final"]):
            np.testing.assert_array_equal(norm["scale"], 1.0)
    for name, deviation in deviations.items():  # cut at two deviations of the untruncated
        assert np.abs(params["blocks"][0][name]).max() <= 2 * deviation / 0.879 + 1e-6
    np.testing.assert_allclose(params["memory_mix"], ours["memory_mix"], rtol=1e-6)
    np.testing.assert_allclose(jax.nn.softmax(params["memory_mix"]), [[0.95, 0.05]], rtol=1e-5)


# --- caches against whole texts ----------------------------------------------------------------


@functools.cache
def reference(config: ModelConfig):
    """A model, its parameters, a text of two rows, and `forward`'s logits and activations."""
    model, params = target(config)
    tokens = jnp.asarray(texts(2, T))
    forward = jax.jit(lambda params, x: model.bind(params).forward(x, (0, 1, 2, 3)))
    return model, params, tokens, *forward(params, tokens)


def feed(config, cache, steps):
    """`extend` over `steps` of positions (B, n), -1 for none; logits and y^2 by position."""
    model, params, tokens, logits, activations = reference(config)

    @functools.partial(jax.jit, donate_argnums=0)
    def extend(cache, positions):
        block = jnp.take_along_axis(tokens, jnp.maximum(positions, 0), axis=1)
        logits, (y,), cache = model.bind(params).extend(cache, block, positions, (2,))
        return logits, y, cache

    found = np.full((2, T, TINY.n_tokens), np.nan), np.full((2, T, TINY.d_model), np.nan)
    for positions in steps:
        *results, cache = extend(cache, jnp.asarray(positions, jnp.int32))
        for row, column in np.argwhere(np.asarray(positions) >= 0):
            for into, result in zip(found, results, strict=True):
                at = positions[row][column]
                into[row, at] = result[row, column, : into.shape[-1]]
    np.testing.assert_allclose(found[0], np.asarray(logits)[..., VALID], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found[1], activations[2], atol=1e-5, rtol=1e-5)


def ring():
    """An empty cache of two rows for the windowed model, with room for blocks of K + 1."""
    return empty_windowed(WINDOWED, WINDOWED.views(), 2, K, T, Compute())


def blocks(width: int, seed: int = 0) -> list[np.ndarray]:
    """Blocks of up to `width` positions, rows at their own pace, -1 in front of short ones."""
    rng, at, steps = np.random.default_rng(seed), np.zeros(2, int), []
    while (at < T).any():
        step = np.full((2, width), -1)
        for row in range(2):
            n = min(rng.integers(0, width + 1), T - at[row])
            step[row, width - n :] = np.arange(at[row], at[row] + n)
            at[row] += n
        steps.append(step)
    return steps


@pytest.mark.parametrize("config", [TINY, WINDOWED], ids=["dense", "windowed"])
@pytest.mark.parametrize("width", [1, K + 1])
def test_full_cache_is_the_whole_text(config, width):
    feed(config, empty_full(config, 2, T + K, Compute()), blocks(width))


@pytest.mark.parametrize("width", [1, K + 1])
def test_ring_cache_is_the_whole_text_under_the_window(width):
    """Far beyond window + sink + k, in blocks of up to the k + 1 tokens of a verification."""
    assert T > 2 * (WINDOW + SINK + K)
    feed(WINDOWED, ring(), blocks(width))


def test_a_block_overwrites_what_was_rejected():
    """Wrong tokens written ahead and never erased leave no trace, in either cache."""
    model, params, tokens, logits, _ = reference(WINDOWED)
    wrong = (tokens + 1) % TINY.n_tokens

    @jax.jit
    def extend(cache, block, positions):
        logits, _, cache = model.bind(params).extend(cache, block, positions)
        return logits, cache

    for cache in (empty_full(WINDOWED, 2, T + K, Compute()),
                  ring()):  # fmt: skip
        start, kept = 0, 0
        while start + K < T:
            positions = np.tile(np.arange(start, start + K + 1), (2, 1))
            good = np.arange(K + 1) <= kept  # depth 0 is the last emitted token, always right
            block = jnp.where(good, tokens[:, positions[0]], wrong[:, positions[0]])
            found, cache = extend(cache, block, jnp.asarray(positions))
            here = slice(start, start + kept + 1)
            np.testing.assert_allclose(
                found[:, : kept + 1, VALID], logits[:, here, VALID], atol=1e-5, rtol=1e-5
            )
            start, kept = start + kept + 1, (kept + 1) % (K + 1)
        assert start > WINDOW + SINK + K + 8


def test_prefill_gives_the_activations_and_entries_of_the_text():
    model, params, tokens, _, activations = reference(TINY)
    found, keys_values = jax.jit(lambda p: model.bind(p).prefill(tokens, (0, 3)))(params)
    np.testing.assert_array_equal(found[0], params["embedding"][tokens])  # y^0: the embedding
    np.testing.assert_allclose(found[1], activations[3], atol=1e-6)
    block = model.bind(params).blocks[2]
    for entry, expected in zip(
        keys_values[2], block.keys_values(activations[2], np.arange(T)), strict=True
    ):
        np.testing.assert_allclose(entry, expected, atol=1e-5)


# --- what is computed --------------------------------------------------------------------------


def test_no_token_sees_a_later_one():
    """Causality by gradients, and under a window no layer looks further back than it may."""
    for config, window, sink in ((TINY, T, 0), (dataclasses.replace(WINDOWED, n_layers=1), WINDOW,
                                                SINK)):  # fmt: skip
        model, params = target(config)
        tokens = jnp.asarray(np.arange(20)[None])  # distinct: one embedding row per position

        def logit_sums(embedding, model=model, params=params, tokens=tokens):
            logits = model.bind(params | {"embedding": embedding}).forward(tokens)[0]
            return logits[0, :, VALID] @ jnp.linspace(-1, 1, TINY.n_tokens)

        jacobian = jax.jit(jax.jacrev(logit_sums))(params["embedding"])[:, :20]
        depends = np.abs(jacobian).max(axis=-1) > 0
        query, key = np.arange(20)[:, None], np.arange(20)
        expected = (key <= query) & ((query - key < window) | (key < sink))
        np.testing.assert_array_equal(depends, expected)


def test_padding_of_the_vocabulary_is_minus_infinity():
    _, _, _, logits, _ = reference(TINY)
    assert TINY.n_tokens < TINY.vocab_size
    assert (np.asarray(logits)[..., TINY.n_tokens :] == -np.inf).all()
    assert np.isfinite(logits[..., VALID]).all()


def test_leading_logits_may_be_left_out():
    model, params, tokens, logits, activations = reference(TINY)
    late = jax.jit(lambda p: model.bind(p).forward(tokens, (2,), logits_from=20))
    found, (y,) = late(params)
    assert found.shape == (2, T - 20, TINY.vocab_size)
    np.testing.assert_allclose(found[..., VALID], logits[:, 20:, VALID], atol=1e-5)
    np.testing.assert_allclose(y, activations[2], atol=1e-6)


def test_tied_unembedding_is_the_embedding():
    config = dataclasses.replace(TINY, tied=True)
    model = Model(Transformer, config, Compute())
    _, untied = target()
    tied = {name: leaf for name, leaf in untied.items() if name != "unembedding"}
    tokens = jnp.asarray(texts(1, 7))
    logits, _ = model.bind(tied).forward(tokens)
    same, _ = Model(Transformer, TINY, Compute()).bind(
        untied | {"unembedding": untied["embedding"].T}
    ).forward(tokens)  # fmt: skip
    np.testing.assert_allclose(logits[..., VALID], same[..., VALID], atol=1e-4)


def test_bfloat16_is_close_to_float32_and_its_logits_are_float32():
    model, params, tokens, logits, activations = reference(TINY)
    half = dataclasses.replace(model, compute=Compute("bfloat16"))
    found, (y,) = jax.jit(lambda p: half.bind(p).forward(tokens, (3,)))(params)
    assert found.dtype == jnp.float32 and y.dtype == jnp.bfloat16
    error = np.abs(found - logits)[..., VALID].max() / np.std(np.asarray(logits)[..., VALID])
    assert 1e-4 < error < 0.2
    assert np.abs(y.astype(jnp.float32) - activations[3]).max() > 0


@pytest.mark.parametrize("chunk", [3, 8, 1000])
def test_attention_chunk_changes_rounding_alone(chunk):
    model, params, tokens, logits, _ = reference(WINDOWED)
    chunked = dataclasses.replace(model, compute=Compute(attention_chunk=chunk))
    found, _ = jax.jit(lambda p: chunked.bind(p).forward(tokens))(params)
    np.testing.assert_allclose(found[..., VALID], logits[..., VALID], atol=1e-5, rtol=1e-5)


def test_rematerialization_recomputes_and_changes_no_gradient():
    model, params, tokens, _, _ = reference(TINY)
    gradients, layers = [], []
    for compute in (Compute(), Compute(remat=True)):
        one = dataclasses.replace(model, compute=compute)

        def loss(params, one=one):
            return (one.bind(params).forward(tokens)[0][..., VALID] ** 2).mean()

        gradient = jax.grad(loss)
        layers.append(str(jax.make_jaxpr(gradient)(params)).count("= remat"))
        gradients.append(jax.jit(gradient)(params))
    assert layers[0] == 0 and layers[1] >= TINY.n_layers
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients[0]))

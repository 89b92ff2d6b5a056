"""The CPU's product of a few rows: against the reference, shape by shape, and where it is used."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import init

from spire_jax.config.schema import DecodeConfig, MeshConfig, ModelConfig, TrainConfig
from spire_jax.drafting.build import compute_for
from spire_jax.models import cpu
from spire_jax.models.attention import Compute
from spire_jax.models.caches import empty_full
from spire_jax.models.few_rows import api, build, reference
from spire_jax.models.sharding import make_mesh
from spire_jax.models.transformer import Model, Transformer

needs_kernel = pytest.mark.skipif(not api.available(), reason="no C++ compiler on this machine")
# Fewer columns and rows than a vector, pieces that end within one, one piece and many.
SHAPES = [(576, 192), (577, 133), (3, 7), (1, 1), (1536, 40), (64, 2050)]


def drawn(m, k, n, transposed, x_dtype, w_dtype):
    rng = np.random.default_rng(m * k + n)
    w = rng.normal(size=(n, k) if transposed else (k, n))
    return jnp.asarray(rng.normal(size=(m, k)), x_dtype), jnp.asarray(w, w_dtype)


@needs_kernel
@pytest.mark.parametrize("rows", [1, 2, 5, 15, 16, 17, 33, api.MAX_ROWS])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_reference(rows, transposed, dtype):
    for k, n in SHAPES[rows % 2 :: 2]:
        x, w = drawn(rows, k, n, transposed, dtype, dtype)
        found = jax.jit(api.product, static_argnums=2)(x, w, transposed)
        expected = reference.product(x, w, transposed)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(
            found, expected, atol=2e-6 * float(jnp.abs(expected).max()) + 1e-6
        )


@needs_kernel
def test_a_row_does_not_depend_on_the_others():
    """To the bit, whatever their number: a request's tokens hang on it."""
    x, w = drawn(40, 576, 192, False, "float32", "float32")
    whole = np.asarray(api.product(x, w))
    for rows in (slice(0, 1), slice(3, 8), slice(17, 40)):
        np.testing.assert_array_equal(api.product(x[rows], w), whole[rows])


@needs_kernel
def test_values_that_are_not_finite_stay_in_their_row_and_column():
    x, w = drawn(3, 20, 40, False, "float32", "float32")
    found = np.asarray(api.product(x.at[1].set(np.nan), w))
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()
    found = np.asarray(api.product(x, w.at[:, 5].set(np.inf)))
    assert not np.isfinite(found[:, 5]).any() and np.isfinite(np.delete(found, 5, axis=1)).all()


@needs_kernel
def test_small_numbers_are_not_rounded_to_zero():
    """Loading the library must not change how this process treats subnormal numbers."""
    api.product(jnp.ones((1, 2)), jnp.ones((2, 3)))
    assert np.float32(1e-40) * np.float32(0.5) > 0


@pytest.mark.parametrize(
    "x, w, transposed, message",
    [
        ((2, 3), (4, 5), False, "no two matrices for x @ w"),
        ((2, 3), (3, 5), True, "no two matrices for x @ w.T"),
        ((2, 3, 1), (3, 5), False, "no two matrices"),
        ((api.MAX_ROWS + 1, 3), (3, 5), False, "takes 1 to 64 rows"),
        ((2, 0), (0, 5), False, "no empty matrix"),
    ],
)
def test_bad_shapes_are_named(x, w, transposed, message, unchecked_shapes):
    with pytest.raises(ValueError, match=message):
        api.product(jnp.zeros(x), jnp.zeros(w), transposed)


def test_bad_types_are_named(unchecked_shapes):
    with pytest.raises(ValueError, match="takes float32 and bfloat16"):
        api.product(jnp.zeros((1, 2)), jnp.zeros((2, 3), jnp.float16))


def test_without_a_compiler_xla_computes(monkeypatch, caplog):
    build.library.cache_clear()
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.library() is None and "no C++ compiler" in caplog.text
    build.library.cache_clear()


def test_a_compiler_that_fails_is_reported(monkeypatch, caplog, tmp_path):
    build.library.cache_clear()
    monkeypatch.setenv("SPIRE_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("--no-such-flag",))
    assert build.library() is None and "cannot be compiled" in caplog.text
    assert not list(tmp_path.glob("*.so"))
    build.library.cache_clear()


# --- where it is used --------------------------------------------------------------------------

SIZES = ModelConfig(n_layers=2, d_model=32, n_kv_heads=2, q_per_kv=2, d_head=8, d_ff=48,
                    vocab_size=40, n_tokens=40, tied=True)  # fmt: skip


def calls(compute: Compute, rows: int) -> int:
    """Kernel calls in a step over `rows` rows."""
    model = Model(Transformer, SIZES, compute)

    def step(params, tokens):
        cache = empty_full(SIZES, rows, 4, compute)
        return model.bind(params).extend(cache, tokens, jnp.zeros((rows, 1), jnp.int32))[0]

    tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    return jax.jit(step).lower(model.shapes(), tokens).as_text().count("spire_jax_few_rows")


@needs_kernel
def test_decoding_takes_it_and_training_does_not():
    decode, train = DecodeConfig(), TrainConfig()
    assert calls(compute_for(decode, train), 2) == 2 * 7 + 1, "seven a layer, and the unembedding"
    assert calls(compute_for(dataclasses.replace(decode, products="xla"), train), 2) == 0
    assert calls(compute_for(train, train), 2) == 0
    assert calls(compute_for(decode, train), api.MAX_ROWS + 1) == 0


@needs_kernel
def test_a_mesh_of_several_devices_does_not_take_it():
    x, w = np.ones((2, 8), np.float32), np.ones((8, 4), np.float32)

    def taken() -> bool:
        return cpu.product(jnp.asarray(x), jnp.asarray(w), False, kernel=True) is not None

    assert taken()
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert taken(), "of one device"
    abstract = jax.sharding.AbstractMesh((2,), ("data",))
    with jax.sharding.use_abstract_mesh(abstract):
        assert not taken()


@needs_kernel
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_computes_the_same_with_it(dtype):
    tokens = np.random.default_rng(0).integers(0, 40, (2, 5))
    found = []
    for products in ("xla", "auto"):
        model = Model(Transformer, SIZES, Compute(dtype, products=products))
        params = model.cast(init(model, 0))
        forward = jax.jit(lambda p, x, model=model: model.bind(p).forward(x)[0])
        found.append(np.asarray(forward(params, jnp.asarray(tokens, jnp.int32))))
    np.testing.assert_allclose(*found, atol=1e-5 if dtype == "float32" else 0.06)

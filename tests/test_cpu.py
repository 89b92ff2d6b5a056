"""Forms of products and attention for XLA's CPU against the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spire_jax.config.schema import ModelConfig
from spire_jax.models import cpu, layers
from spire_jax.models.attention import Compute, cached_attention
from spire_jax.models.caches import empty_full
from spire_jax.models.cpu import SLOT_ROWS
from spire_jax.models.masks import View

K, G, H, S = 3, 2, 8, 24
CONFIG = ModelConfig(n_layers=1, d_model=K * G * H, n_kv_heads=K, q_per_kv=G, d_head=H, max_len=S)


def drawn(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_bfloat16_products_sum_in_float32(rows):
    x, w = (drawn(i, *shape).astype(jnp.bfloat16) for i, shape in enumerate([(rows, 96), (96, 40)]))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    wide = layers.product(x, w, dtype="float32")
    assert wide.dtype == jnp.float32 and wide.shape == (rows, 40)
    np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(layers.product(x, w), wide.astype(jnp.bfloat16))
    rows_first = layers.product(x, w.T, dtype="float32", transposed=True)
    np.testing.assert_allclose(rows_first, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_bfloat16_weights_are_not_converted_in_memory(rows, transposed):
    shape = (512, 256) if transposed else (256, 512)
    x, w = jnp.ones((rows, 256), jnp.bfloat16), jnp.ones(shape, jnp.bfloat16)
    compute = jax.jit(lambda x, w: layers.product(x, w, transposed=transposed))
    program = compute.lower(x, w).compile().as_text()
    assert "f32[{},{}]".format(*shape) not in program


def filled_cache(batch: int):
    (cache,) = empty_full(CONFIG, batch, S, Compute(attention="xla"))
    positions = jnp.tile(jnp.arange(S), (batch, 1))
    return cache.append(positions, drawn(1, batch, S, K, H), drawn(2, batch, S, K, H))


@pytest.mark.parametrize(
    "view, include_self",
    [(View(scale=0.3), True), (View(5, 2, 0.3), True), (View(scale=0.3), False),
     (View(scale=0.3, softcap=0.7), True)],
)  # fmt: skip
def test_reading_slots_in_place_changes_nothing(monkeypatch, view, include_self):
    cache, q = filled_cache(2), drawn(3, 2, 3, K, G, H)
    positions = jnp.array([[0, 1, 2], [9, 10, 11]])
    outs = []
    for rows in (SLOT_ROWS, 0):
        monkeypatch.setattr(cpu, "SLOT_ROWS", rows)
        assert (cpu.over_slots(q, cache.keys, cache.values) is not None) == bool(rows)
        outs.append(cached_attention(q, cache, positions, view, include_self=include_self))
    for here, there in zip(*outs, strict=True):
        np.testing.assert_allclose(here, there, rtol=2e-5, atol=2e-6)


def test_slots_are_read_in_place_for_few_rows():
    cache, q = filled_cache(1), drawn(3, 1, 1, K, G, H)
    for tokens, few in ((SLOT_ROWS // (K * G), True), (SLOT_ROWS // (K * G) + 1, False)):
        taken = cpu.over_slots(jnp.tile(q, (1, tokens, 1, 1, 1)), cache.keys, cache.values)
        assert (taken is not None) == few
    attend = jax.jit(lambda q, cache: cached_attention(q, cache, jnp.array([[7]])))
    moved = f"f32[1,{K},{S},{H}]"  # keys or values with heads before slots
    assert moved not in attend.lower(q, cache).compile().as_text()


@pytest.mark.parametrize("slot", [7, S])
def test_a_single_entry_is_written_alone_or_dropped(slot):
    cache, k = filled_cache(1), drawn(4, 1, 1, K, H)
    after = cache.append(jnp.array([[slot]]), k, 2 * k)
    expected = np.array(cache.keys)
    if slot < S:
        expected[0, slot] = np.asarray(k).ravel()
    np.testing.assert_array_equal(after.keys, expected)


def test_a_step_copies_no_layer_of_the_cache():
    cache, q = filled_cache(1), drawn(3, 1, 1, K, G, H)

    def step(i, carry):
        cache, q = carry
        at = jnp.full((1, 1), i, jnp.int32)
        cache = cache.append(at, q[:, :, :, 0], q[:, :, :, 1])
        return cache, cached_attention(q, cache, at)[0]

    loop = jax.jit(lambda *carry: jax.lax.fori_loop(3, 9, step, carry), donate_argnums=(0, 1))
    program = loop.lower(cache, q).compile().as_text()
    body = program[: program.index("ENTRY")]
    assert f"f32[1,{S},{K * H}]{{2,1,0}} copy(" not in body

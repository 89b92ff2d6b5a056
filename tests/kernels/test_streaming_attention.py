"""Streaming attention: kernels against reference, the plan against masks, reference against jax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.streaming_attention import plan, reference, specs, tpu
from pallas_kernels.streaming_attention.api import streaming_attention
from spire_jax.models.masks import may_attend
from tests.kernels.combinations import combinations, cycle

TOLERANCE = {"float32": dict(rtol=3e-5, atol=3e-5), "bfloat16": dict(rtol=2e-2, atol=3e-2)}

CASES = combinations(
    head_dim=[64, 128, 256],
    q_per_kv=[1, 2, 3, 8],
    window=[None, 1, 63, 64, 65, 4096],
    sink=[0, 1, 4],
    dtype=["float32", "bfloat16"],
)


def spec_of(case: dict) -> specs.Spec:
    stride, keys = cycle([0, 4, 3], case), cycle([300, 129, 1, 40], case)
    return specs.Spec(
        "case", batch=2, keys=keys, stride=stride,
        depth=cycle([1, 0], case) if stride and keys > 1 else 0, kv_heads=cycle([1, 3, 2], case),
        q_per_kv=case["q_per_kv"], head_dim=case["head_dim"], window=case["window"],
        sink=case["sink"] if case["window"] else 0, dtype=case["dtype"],
    )  # fmt: skip


def both(spec, **forced):
    """Kernel and reference as functions of q, k, v: output, log-sum-exp, and all gradients.

    Gradients are those of random sums of the output and of the log-sum-exps that are finite.
    """
    shape = spec.shapes[0].shape
    keys = jax.random.split(jax.random.key(9))
    d_out = jax.random.normal(keys[0], shape)
    d_lse = jax.random.normal(keys[1], shape[:-1])

    def with_gradients(attention, **options):
        def loss(q, k, v):
            out, lse = attention(q, k, v, *spec.positions, **spec.options, **options)
            finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
            return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(finite * d_lse), (out, lse)

        def run(*arrays):
            (_, outs), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arrays)
            return *outs, *gradients

        return jax.jit(run)

    kernel = with_gradients(tpu.streaming_attention, **{"interpret": True, **forced})
    return kernel, with_gradients(reference.streaming_attention)


def compare(spec, got, expected):
    names = "output", "log-sum-exp", "gradient of q", "gradient of k", "gradient of v"
    for name, a, b in zip(names, got, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # A bfloat16 rounding of a sum of hundreds of terms: relative to the largest.
        tolerance = dict(TOLERANCE[spec.dtype])
        tolerance["atol"] *= max(float(np.abs(b[np.isfinite(b)]).max(initial=0)), 1.0)
        np.testing.assert_allclose(a, b, **tolerance, err_msg=f"{name} of {spec}")


def upcast(arrays):
    return [x.astype(jnp.float32) for x in arrays]


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_reference(case):
    spec = spec_of(case)
    arrays = spec.arrays(jax.random.key(0))
    kernel, expected = both(spec, blocks=(128, 128))
    compare(spec, kernel(*arrays), expected(*upcast(arrays)))


LONG = specs.Spec("long", batch=1, keys=1500, kv_heads=2, q_per_kv=2, head_dim=64, window=200,
                  sink=1, dtype="float32")  # fmt: skip


@pytest.mark.parametrize(
    "change, blocks",
    [
        ({}, None),
        pytest.param({}, (128, 256), marks=pytest.mark.slow),
        ({"keys": 768, "window": 255, "kv_heads": 1, "sink": 0}, (128, 128)),  # ends with blocks
        pytest.param({"stride": 4, "depth": 3}, (256, 128), marks=pytest.mark.slow),
        ({"stride": 4, "window": 1, "sink": 0}, None),
        pytest.param(
            {"keys": 4500, "window": 4096, "sink": 4, "kv_heads": 1, "head_dim": 128},
            (512, 512),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_long_texts_twice(change, blocks):
    """Several blocks and a choice of them; the second run gives the same bits."""
    spec = dataclasses.replace(LONG, **change)
    arrays = spec.arrays(jax.random.key(1))
    kernel, expected = both(spec, blocks=blocks)
    got = kernel(*arrays)
    compare(spec, got, expected(*arrays))
    assert all(np.array_equal(a, b) for a, b in zip(got, kernel(*arrays), strict=True))


def test_blocks_that_no_query_sees_are_never_read():
    """nan in all key blocks that the plan leaves out: nothing of it comes through."""
    spec = dataclasses.replace(LONG, stride=4, sink=0, kv_heads=1)
    spec = dataclasses.replace(spec, keys=1408)
    starts = spec.starts[spec.starts >= 768]  # the others' keys are then seen by no query
    q, k, v = spec.arrays(jax.random.key(2))
    q = q[:, -len(starts) :]
    unseen = np.arange(1408) < 512
    k, v = (jnp.where(unseen[:, None, None], jnp.nan, x) for x in (k, v))
    options = dict(window=200, sink=0, limits=starts, scale=0.1)

    def loss(attention, k, v, **more):
        out, lse = attention(q, k, v, starts, np.arange(1408), **options, **more)
        return jnp.sum(out * out) + jnp.sum(lse)

    def run(attention, k, v, **more):
        return jax.jit(lambda k, v: jax.value_and_grad(loss, (1, 2))(attention, k, v, **more))(k, v)

    value, got = run(tpu.streaming_attention, k, v, blocks=(128, 128), interpret=True)
    expected, want = run(reference.streaming_attention, jnp.nan_to_num(k), jnp.nan_to_num(v))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(got, want, strict=True):
        assert not np.asarray(a[:, :512]).any()
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-4)


def test_keys_that_a_query_does_not_see_may_be_nan():
    """In a block that is read, for the queries that see them; the others' bits are the same."""
    spec = dataclasses.replace(LONG, keys=200, window=64)
    q, k, v = spec.arrays(jax.random.key(3))
    v = v.at[:, -3:].set(0)  # as a cache holds values that broke
    run = functools.partial(tpu.streaming_attention, interpret=True, **spec.options)
    found, expected = (run(q, keys, v, *spec.positions) for keys in (k.at[:, -3:].set(jnp.nan), k))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one[:, :-3], other[:, :-3])
    assert np.isnan(found[0][:, -3:]).all()


def test_whatever_is_asked_of_a_log_sum_exp_of_nothing_no_key_hears_of_it():
    """A gradient that is infinite there."""
    spec = dataclasses.replace(LONG, keys=6, window=None, sink=0)
    arrays = spec.arrays(jax.random.key(5))
    limits = np.array([0, 0, 2, 3, 4, 5])

    def loss(q, k, v):
        _, lse = tpu.streaming_attention(
            q, k, v, *spec.positions, limits=limits, scale=0.1, interpret=True
        )
        return jnp.sum(lse**2)

    assert all(np.isfinite(x).all() for x in jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays))


@pytest.mark.parametrize("window, sink, stride", [(None, 0, 0), (64, 1, 0), (64, 0, 4), (1, 4, 4),
                                                  (255, 0, -1)])  # fmt: skip
def test_plan_is_exact(window, sink, stride):
    """A pair of blocks is listed if and only if the mask has something in it."""
    rng = np.random.default_rng(0)
    k_pos = np.sort(rng.choice(3000, 1024, replace=False)).astype(np.int32)
    q_pos = np.sort(rng.choice(3000, 512, replace=False))
    if stride < 0:  # a text's own
        k_pos, q_pos, stride = np.arange(1024, dtype=np.int32), np.arange(512) + 256, 0
    limits = q_pos // stride * stride if stride else None
    seen = plan.bounds(q_pos, limits, window, sink)
    visited, whole = plan.pairs(seen, k_pos, 128, 128)
    mask = reference.visible(q_pos, k_pos, window=window, sink=sink, limits=limits)
    blocks = mask.reshape(4, 128, 8, 128)
    np.testing.assert_array_equal(visited, blocks.any(axis=(1, 3)))
    assert not (whole & ~blocks.all(axis=(1, 3))).any()
    for order in (visited, visited.T):
        listed = plan.items(order, np.zeros_like(order))
        pairs = {(a, b) for a, b, f in zip(*dataclasses.astuple(listed), strict=True)
                 if not f & plan.EMPTY}  # fmt: skip
        assert pairs == set(zip(*np.nonzero(order), strict=True))


@pytest.mark.parametrize("window", [64, 1024])
def test_work_is_linear_in_the_length(window):
    """Twice the text, twice the items: O(length x window)."""

    def count(length: int) -> int:
        positions = np.arange(length)
        seen = plan.bounds(positions, None, window, 1)
        visited, _ = plan.pairs(seen, positions, 128, 128)
        return int(visited.sum())

    small, large = count(8192), count(65536)
    assert 7.9 < large / small < 8.6
    assert small <= 64 * (window // 128 + 3)


@pytest.mark.parametrize("stride", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_no_races_and_nothing_uninitialized(stride, capfd):
    spec = specs.Spec("races", batch=1, keys=300, stride=stride, depth=stride // 2, kv_heads=2,
                      q_per_kv=1, head_dim=64, window=64, sink=1)  # fmt: skip
    arrays = spec.arrays(jax.random.key(3))
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    kernel, expected = both(spec, blocks=(128, 128), interpret=interpret)
    compare(spec, kernel(*arrays), expected(*upcast(arrays)))
    assert "RACE" not in capfd.readouterr().out  # of any kernel; the state is the last one's


@pytest.mark.parametrize("window, sink", [(None, 0), (1, 0), (64, 0), (64, 4)])
def test_reference_mask_is_the_library_s(window, sink):
    q_pos, k_pos = np.arange(0, 200, 3), np.arange(190)
    expected = may_attend(q_pos[:, None], k_pos, window or 0, sink)
    got = reference.visible(q_pos, k_pos, window=window, sink=sink)
    np.testing.assert_array_equal(got, expected)
    limits = q_pos // 4 * 4
    got = reference.visible(q_pos, k_pos, window=window, sink=sink, limits=limits)
    np.testing.assert_array_equal(got, expected & (k_pos < limits[:, None]))


@pytest.mark.parametrize("window", [1, 63, 64, 65, None])
def test_reference_equals_jax(window):
    spec = specs.Spec("jax", batch=2, keys=150, kv_heads=2, q_per_kv=3, window=window,
                      dtype="float32")  # fmt: skip
    q, k, v = spec.arrays(jax.random.key(4))
    expected = jax.nn.dot_product_attention(
        q.reshape(2, 150, 6, 128), k, v, scale=spec.options["scale"], is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
    got, _ = reference.streaming_attention(q, k, v, *spec.positions, **spec.options)
    np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=2e-5, atol=2e-5)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    "change, options, message",
    [
        ({0: (2, 9, 2, 4, 96), 1: (2, 9, 2, 96), 2: (2, 9, 2, 96)}, {}, "head dimension 96.*128"),
        ({0: (2, 9, 2, 17, 64)}, {}, "17 query heads"),
        ({1: (2, 9, 64)}, {}, r"twice \[B, S, K, H\]"),
        ({1: (2, 9, 3, 64), 2: (2, 9, 3, 64)}, {}, "expected"),
        ({0: (0, 9, 2, 4, 64), 1: (0, 9, 2, 64), 2: (0, 9, 2, 64)}, {}, "no axis may be empty"),
        ({}, {"window": 0}, "window=0.*at least 1"),
        ({}, {"sink": -1, "window": 3}, "sink=-1"),
        ({}, {"limits": np.arange(3)}, "limits must be a NumPy array of 9 integers"),
        ({}, {"limits": np.arange(9.0)}, "limits must be a NumPy array of 9 integers"),
        ({}, {"q_positions": jnp.arange(9)}, "q_positions must be a NumPy array"),
        ({}, {"k_positions": np.arange(9)[::-1]}, "k_positions must ascend"),
        ({}, {"implementation": "cuda"}, "'cuda'; there are tpu, interpret, reference"),
    ],
)
def test_bad_input(change, options, message):
    spec = specs.Spec("good", batch=2, keys=9, kv_heads=2, head_dim=64, dtype="float32")
    arrays = spec.arrays(jax.random.key(0))
    for at, shape in change.items():
        arrays[at] = jnp.zeros(shape)
    positions = dict(zip(("q_positions", "k_positions"), spec.positions, strict=True))
    with pytest.raises(ValueError, match=message):
        streaming_attention(*arrays, **{**positions, **options})


def test_bad_types():
    spec = specs.Spec("good", batch=2, keys=9, kv_heads=2, head_dim=64, dtype="float32")
    q, k, v = spec.arrays(jax.random.key(0))
    with pytest.raises(ValueError, match="one type for all"):
        streaming_attention(q, k.astype("bfloat16"), v, *spec.positions)

"""Decode attention: kernel against reference, reference against the library's mask and jax's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import reference, specs, tpu
from pallas_kernels.decode_attention.api import cache_shape, decode_attention
from spire_jax.models.masks import EMPTY, may_attend
from tests.kernels.combinations import combinations, cycle

TOLERANCE = {"float32": dict(rtol=2e-5, atol=2e-5), "bfloat16": dict(rtol=2e-2, atol=1e-2)}

# The sizes that the product below is taken over; the others are dealt out.
CASES = combinations(
    head_dim=[64, 128, 256],
    q_per_kv=[1, 2, 3, 8],
    window=[None, 1, 63, 64, 65, 4096],
    sink=[0, 1, 4],
    dtype=["float32", "bfloat16"],
)


def spec_of(case: dict) -> specs.Spec:
    window, sink = case["window"], case["sink"] if case["window"] else 0
    ring = window is not None and window < 4096 and cycle([True, False], case)
    slots = sink + window + 5 if ring else cycle([300, 129, 70, 515], case)
    return specs.Spec(
        "case", batch=4, tokens=cycle([5, 1, 2, 16], case), kv_heads=cycle([1, 3, 2], case),
        q_per_kv=case["q_per_kv"], head_dim=case["head_dim"], slots=slots, window=window,
        sink=sink, ring=ring, include_self=cycle([True, True, False], case), dtype=case["dtype"],
    )  # fmt: skip


def lengths_of(spec: specs.Spec, seed: int = 0) -> np.ndarray:
    """An empty row, a row of one token, a full one, and one at random."""
    rng = np.random.default_rng(seed)
    most = spec.slots * 3 if spec.ring else spec.slots
    return np.array([0, 1, most, rng.integers(2, most + 1)])[: spec.batch]


def poisoned(arrays: list) -> list:
    """Keys and values with nan wherever a row holds nothing."""
    q, k, v, lengths, *rest = arrays
    beyond = (jnp.arange(k.shape[1])[None] >= lengths[:, None])[..., None]
    return [q, *(jnp.where(beyond, jnp.nan, x).astype(x.dtype) for x in (k, v)), lengths, *rest]


def compare(spec, got, expected):
    """Out and log-sum-exp, the latter -inf in the same places."""
    tolerance = TOLERANCE[spec.dtype]
    for name, a, b in zip(("output", "log-sum-exp"), got, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, **tolerance, err_msg=f"{name} of {spec}")


def expected_of(spec, arrays):
    upcast = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays]
    upcast[1:3] = [x[..., : spec.kv_heads * spec.head_dim] for x in upcast[1:3]]
    return jax.jit(functools.partial(reference.decode_attention, **spec.options))(*upcast)


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_reference(case):
    """On slots that no block divides, poisoned beyond each row's length."""
    spec = spec_of(case)
    width = spec.kv_heads * spec.head_dim
    arrays = spec.arrays(jax.random.key(0), lengths_of(spec), spec.slots, width)
    got = tpu.decode_attention(
        *poisoned(arrays), **spec.options, block=128, cores=cycle([1, 2], case), interpret=True
    )
    compare(spec, got, expected_of(spec, arrays))
    assert not np.asarray(got[0][0]).any() and np.all(np.isneginf(got[1][0]))  # the empty row
    assert got[0].dtype == spec.dtype and got[1].dtype == jnp.float32


@pytest.mark.parametrize(
    "window, sink, cores",
    [(None, 0, 1), (4096, 4, 2),
     *(pytest.param(*case, marks=pytest.mark.slow)
       for case in ((None, 0, 2), (4096, 4, 1), (1024, 0, 1), (1024, 0, 2)))],
)  # fmt: skip
def test_long_rows(window, sink, cores):
    spec = specs.Spec("long", batch=3, kv_heads=1, slots=4500, window=window, sink=sink,
                      dtype="float32")  # fmt: skip
    arrays = spec.arrays(jax.random.key(1), np.array([4500, 3, 4400]))
    run = jax.jit(lambda *a: tpu.decode_attention(*a, **spec.options, cores=cores, interpret=True))
    got = run(*poisoned(arrays))
    compare(spec, got, expected_of(spec, arrays))
    again = run(*poisoned(arrays))
    assert all(np.array_equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("window", [None, 64])
def test_slots_in_any_order(window):
    """Blocks that are full, of positions before, in and after what the queries see."""
    spec = specs.Spec("ring", batch=4, tokens=2, kv_heads=1, head_dim=64, slots=300, window=window,
                      ring=True, dtype="float32")  # fmt: skip
    q, k, v, lengths, first, _ = spec.arrays(jax.random.key(6), np.array([1000, 150, 300, 777]))
    rng = np.random.default_rng(0)
    shuffled = np.array([rng.permutation(k.shape[1]) for _ in range(4)]) + 100
    first = jnp.array([200, 101, 350, 300], jnp.int32)
    arrays = [q, k, v, lengths, first, jnp.asarray(shuffled, jnp.int32)]
    got = tpu.decode_attention(*poisoned(arrays), **spec.options, block=128, interpret=True)
    compare(spec, got, expected_of(spec, arrays))


@pytest.mark.parametrize("include_self", [True, False])
def test_lengths_and_positions_have_nothing_to_do_with_each_other(include_self):
    """Queries far behind what the row holds, and far beyond it; at the end of a block."""
    spec = specs.Spec("apart", batch=4, tokens=2, kv_heads=1, head_dim=64, slots=384,
                      include_self=include_self, dtype="float32")  # fmt: skip
    q, k, v, lengths, _ = spec.arrays(jax.random.key(8), np.array([100, 256, 384, 300]))
    arrays = [q, k, v, lengths, jnp.array([200, 127, 255, 5], jnp.int32)]
    got = tpu.decode_attention(*poisoned(arrays), **spec.options, block=128, interpret=True)
    compare(spec, got, expected_of(spec, arrays))


def test_blocks_at_the_window_s_edge():
    """Every place of the edge around the beginning of a block that is otherwise seen whole."""
    lengths = np.arange(272, 290)  # the second block of 128 falls out of the window
    spec = specs.Spec("edge", batch=len(lengths), tokens=2, kv_heads=1, head_dim=64, slots=384,
                      window=150, dtype="float32")  # fmt: skip
    arrays = spec.arrays(jax.random.key(7), lengths)
    got = tpu.decode_attention(*arrays, **spec.options, block=128, interpret=True)
    compare(spec, got, expected_of(spec, arrays))


@pytest.mark.parametrize("ring", [False, True])
def test_blocks_that_no_query_sees_are_never_read(ring):
    """Beyond a row's length, and before its window: nan there, whole blocks of it."""
    spec = specs.Spec("poison", batch=3, kv_heads=1, head_dim=64, slots=640, window=65, sink=1,
                      dtype="float32", ring=ring)  # fmt: skip
    arrays = spec.arrays(jax.random.key(2), np.array([600, 129, 400]))
    q, k, v, lengths, first, *rest = poisoned(arrays)
    if not ring:
        unseen = jnp.arange(k.shape[1])[None] // 128 * 128 + 127 < first[:, None] - 64
        unseen = unseen.at[:, :128].set(False)[..., None]
        k, v = jnp.where(unseen, jnp.nan, k), jnp.where(unseen, jnp.nan, v)
        assert jnp.isnan(k[0, 128:500]).any()
    got = tpu.decode_attention(
        q, k, v, lengths, first, *rest, **spec.options, block=128, interpret=True
    )
    compare(spec, got, expected_of(spec, arrays))


@pytest.mark.parametrize(
    "lengths, window, sink, items",
    [
        ([1000, 1, 0, 129], None, 0, 8 + 1 + 0 + 2),  # the sum of the lengths, in blocks
        ([1000, 1, 0, 129], 64, 0, 1 + 1 + 0 + 2),
        ([1000, 1, 0, 129], 64, 1, 2 + 1 + 0 + 2),
        ([0, 0, 0, 0], None, 0, 0),
    ],
)
def test_work_follows_the_lengths(lengths, window, sink, items):
    lengths = jnp.array(lengths, jnp.int32)
    work = tpu.work_list(
        lengths, lengths - 1, tokens=1, slots=1024, block=128, window=window, sink=sink,
        include_self=True, ordered=True, cores=2,
    )  # fmt: skip
    assert int(work.bounds[1]) == items and int(work.bounds[0]) == max(-(-items // 2), 1)


@pytest.mark.parametrize(
    "ring, cores",
    [(False, 2), (True, 1), *(pytest.param(*case, marks=pytest.mark.slow)
                              for case in ((False, 1), (True, 2)))],
)  # fmt: skip
def test_no_races_and_nothing_uninitialized(ring, cores, capfd):
    spec = specs.Spec("races", batch=3, tokens=2, kv_heads=2, q_per_kv=2, head_dim=64,
                      slots=69 if ring else 300, window=64 if ring else None,
                      sink=1 if ring else 0, ring=ring)  # fmt: skip
    # Rows that fill all their blocks leave no room at the end of the list, which two cores halve.
    lengths = np.array([0, 200, 290] if ring or cores == 1 else [300, 300, 300])
    arrays = spec.arrays(jax.random.key(3), lengths)
    interpret = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", num_cores_or_threads=cores
    )
    got = tpu.decode_attention(
        *poisoned(arrays), **spec.options, block=128, cores=cores, interpret=interpret
    )
    compare(spec, got, expected_of(spec, arrays))
    assert "RACE" not in capfd.readouterr().out  # of any kernel; the state is the last one's


@pytest.mark.parametrize("window, sink", [(None, 0), (1, 0), (64, 0), (64, 4)])
@pytest.mark.parametrize("include_self", [True, False])
def test_reference_mask_is_the_library_s(window, sink, include_self):
    lengths = jnp.array([0, 1, 70, 200], jnp.int32)
    got = reference.visible(
        200, 5, lengths, lengths - 5, window=window, sink=sink, include_self=include_self
    )
    q_pos = np.asarray(lengths)[:, None, None] - 5 + np.arange(5)[:, None]
    k_pos = np.where(np.arange(200) < np.asarray(lengths)[:, None], np.arange(200), EMPTY)
    expected = may_attend(q_pos, k_pos[:, None], window or 0, sink)
    if not include_self:
        expected &= k_pos[:, None] < q_pos
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("window", [1, 63, 64, None])
def test_reference_equals_jax(window):
    """A row's last tokens are those of one long text under jax's local window."""
    spec = specs.Spec("jax", batch=2, tokens=16, kv_heads=2, q_per_kv=3, slots=160, window=window,
                      dtype="float32")  # fmt: skip
    lengths = np.array([160, 160])
    q, k, v, *rest = spec.arrays(jax.random.key(4), lengths)
    keys, values = (x.reshape(2, 160, 2, 128) for x in (k, v))
    text = jnp.concatenate([jnp.zeros((2, 144, 6, 128)), q.reshape(2, 16, 6, 128)], axis=1)
    out = jax.nn.dot_product_attention(
        text, keys, values, scale=spec.options["scale"], is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
    got, _ = reference.decode_attention(q, k, v, *rest, **spec.options)
    np.testing.assert_allclose(got.reshape(2, 16, 6, 128), out[:, -16:], rtol=2e-5, atol=2e-5)


# --- bad input ---------------------------------------------------------------------------------

GOOD = specs.Spec("good", batch=2, tokens=2, kv_heads=2, slots=64, dtype="float32")


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    "change, options, message",
    [
        ({0: (2, 17, 2, 4, 128)}, {}, "17 query tokens.*1 to 16"),
        ({0: (2, 2, 2, 4, 96), 1: (2, 64, 192), 2: (2, 64, 192)}, {}, "head dimension 96.*128"),
        ({0: (2, 2, 2, 17, 128)}, {}, "17 query heads"),
        ({0: (2, 2, 8, 128)}, {}, r"expected \[B, T, K, G, H\]"),
        ({1: (2, 64, 128), 2: (2, 64, 128)}, {}, "K \\* H = 256"),
        ({2: (2, 32, 256)}, {}, "keys.*values"),
        ({3: (3,)}, {}, r"lengths is int32\[3\]: expected int32\[2\]"),
        ({}, {"window": 0}, "window=0.*at least 1"),
        ({}, {"sink": 1}, "sink=1, window=None"),
        ({}, {"implementation": "cuda"}, "'cuda'; there are tpu, gpu, interpret, reference"),
    ],
)
def test_bad_input(change, options, message):
    arrays = list(GOOD.arrays(jax.random.key(0), np.array([3, 64])))
    for at, shape in change.items():
        arrays[at] = jnp.zeros(shape, arrays[at].dtype)
    with pytest.raises(ValueError, match=message):
        decode_attention(*arrays, **options)


def test_bad_types_and_lengths():
    q, k, v, lengths, first = GOOD.arrays(jax.random.key(0), np.array([3, 64]))
    with pytest.raises(ValueError, match=r"float32, keys bfloat16.*one type for all"):
        decode_attention(q, k.astype("bfloat16"), v, lengths, first)
    with pytest.raises(ValueError, match=r"float16.*bfloat16 or float32"):
        decode_attention(*(x.astype("float16") for x in (q, k, v)), lengths, first)
    with pytest.raises(ValueError, match="row 1 has length 65: expected 0 to 64"):
        decode_attention(q, k, v, lengths + 1, first)
    with pytest.raises(ValueError, match="row 0 has length -1"):
        decode_attention(q, k, v, lengths - 4, first)


def test_default_on_a_cpu_and_wide_slots():
    """The reference; what pads a slot to whole registers does not matter, whoever computes."""
    spec = specs.Spec("wide", batch=2, kv_heads=3, q_per_kv=2, head_dim=64, slots=40,
                      dtype="float32")  # fmt: skip
    assert cache_shape(40, 3, 64) == (48, 256)
    q, k, v, *rest = spec.arrays(jax.random.key(5), np.array([40, 7]))
    k, v = k.at[..., 192:].set(jnp.nan), v.at[..., 192:].set(jnp.nan)
    expected = decode_attention(q, k, v, *rest, **spec.options)
    assert np.isfinite(expected[0]).all()
    got = decode_attention(q, k, v, *rest, **spec.options, implementation="interpret")
    compare(spec, got, expected)

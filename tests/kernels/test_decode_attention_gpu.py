"""Decode attention's GPU kernel: interpreted against the reference, its plan, and lowered for CUDA.

Only newer releases of jax can do the one or the other: `launch/test.sh --newest` has one. The plan
is plain jnp and is tested with every release.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import gpu, reference, specs
from tests.kernels.combinations import combinations, cycle
from tests.kernels.test_decode_attention import compare, expected_of, lengths_of, poisoned

traced = pytest.mark.needs_jax("0.11")
interpreted = pytest.mark.needs_jax("0.11.1")

# (head dimension, query heads per KV head, window, sink): each takes seconds to interpret.
FEW = [(64, 3, None, 0), (64, 1, 65, 4), (128, 8, None, 0), (128, 2, 65, 1), (256, 1, 1, 4)]
NAMES = "head_dim", "q_per_kv", "window", "sink"
CASES = [pytest.param(dict(zip(NAMES, few, strict=True)), id=f"few-{few}") for few in FEW] + [
    pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
    for case in combinations(
        head_dim=[64, 128, 256], q_per_kv=[1, 2, 3, 8], window=[None, 1, 63, 64, 65, 4096],
        sink=[0, 1, 4],
    )
]  # fmt: skip


def spec_of(case: dict) -> specs.Spec:
    window, sink = case["window"], case["sink"] if case["window"] else 0
    ring = window is not None and window < 4096 and cycle([True, False], case)
    slots = sink + window + 5 if ring else cycle([200, 129, 70, 328], case)
    return specs.Spec(
        "case", batch=4, tokens=cycle([5, 1, 2, 16], case), kv_heads=cycle([1, 2], case),
        q_per_kv=case["q_per_kv"], head_dim=case["head_dim"], slots=slots, window=window,
        sink=sink, ring=ring, include_self=cycle([True, True, False], case),
    )  # fmt: skip


def run(spec, arrays, interpret=True, **options):
    return gpu.decode_attention(*arrays, **spec.options, interpret=interpret, **options)


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_reference(case):
    """Cut into few and many intervals, poisoned beyond each row's length."""
    spec = spec_of(case)
    arrays = spec.arrays(jax.random.key(0), lengths_of(spec))
    got = run(spec, poisoned(arrays), splits=cycle([3, 1, 7, None], case))
    compare(spec, got, expected_of(spec, arrays))
    assert not np.asarray(got[0][0]).any() and np.all(np.isneginf(got[1][0]))  # the empty row
    assert got[0].dtype == spec.dtype and got[1].dtype == jnp.float32


@interpreted
@pytest.mark.parametrize(
    "splits, window",
    [(5, None), *(pytest.param(5, w, marks=pytest.mark.slow) for w in (1024, 300))],
)
def test_long_rows_twice(splits, window):
    """The second run gives the same bits."""
    spec = specs.Spec("long", batch=3, kv_heads=1, slots=1504, window=window,
                      sink=4 if window else 0)  # fmt: skip
    arrays = spec.arrays(jax.random.key(1), np.array([1500, 3, 1400]))
    got = run(spec, poisoned(arrays), splits=splits)
    compare(spec, got, expected_of(spec, arrays))
    again = run(spec, poisoned(arrays), splits=splits)
    assert all(np.array_equal(a, b) for a, b in zip(got, again, strict=True))


@interpreted
def test_blocks_that_no_query_sees_are_never_read():
    """Beyond a row's length, and before its window: nan there, whole blocks of it."""
    spec = specs.Spec("poison", batch=3, kv_heads=1, slots=320, window=65, sink=1)
    arrays = spec.arrays(jax.random.key(2), np.array([310, 129, 200]))
    q, k, v, lengths, first = poisoned(arrays)
    block = jnp.arange(k.shape[1])[None] // 64
    unseen = (block > 0) & (block * 64 + 63 < first[:, None] - 64)
    k, v = (jnp.where(unseen[..., None], jnp.nan, x).astype(x.dtype) for x in (k, v))
    assert jnp.isnan(k[0, 64:192]).all()
    compare(spec, run(spec, (q, k, v, lengths, first), splits=2), expected_of(spec, arrays))


@interpreted
@pytest.mark.parametrize("ring", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_races_and_nothing_uninitialized(ring, capfd):
    """Races are printed, or raised by later releases; what is kept is the last kernel's only."""
    spec = specs.Spec("races", batch=3, tokens=2, kv_heads=1, q_per_kv=2, slots=69 if ring else 300,
                      window=64 if ring else None, sink=int(ring), ring=ring)  # fmt: skip
    arrays = spec.arrays(jax.random.key(3), np.array([5, 0, 290]))
    interpret = gpu.plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    got = run(spec, poisoned(arrays), interpret, splits=3)
    compare(spec, got, expected_of(spec, arrays))
    assert "RACE" not in capfd.readouterr().out


@interpreted
def test_sums_keep_more_than_bfloat16_has():
    """The mean of 301 ones is 1; 301 itself is no bfloat16. Slots wider than the heads."""
    q = jnp.zeros((1, 1, 1, 1, 128), jnp.bfloat16)
    ones = jnp.ones((1, 328, 256), jnp.bfloat16).at[..., 128:].set(jnp.nan)
    length = jnp.array([301], jnp.int32)
    out, lse = gpu.decode_attention(q, ones, ones, length, length - 1, splits=1, interpret=True)
    assert (out == 1).all()
    np.testing.assert_allclose(lse, math.log(301), rtol=1e-6)


# --- the plan ----------------------------------------------------------------------------------


def walk(plan: gpu.Plan) -> tuple[list[list[int]], list[list[int]]]:
    """As the kernel goes along the list: the blocks of each row, and the pieces it is left in."""
    rows, intervals, _ = (np.asarray(x) for x in plan)
    blocks: list[list[int]] = [[] for _ in rows]
    pieces: list[list[int]] = [[] for _ in rows]
    for n, (entry, stop, row) in enumerate(intervals):
        while entry < stop:
            begin, end, sinks, gap = rows[row, : gpu.GAP + 1]
            pieces[row].append(row + n)
            for entry in range(entry, min(end, stop)):  # noqa: B020
                local = entry - begin
                blocks[row].append(local + (gap if local >= sinks else 0))
            entry, row = min(end, stop), rows[row, gpu.NEXT]
    return blocks, pieces


@pytest.mark.parametrize("window, sink", [(None, 0), (1, 0), (64, 0), (65, 4), (10, 100)])
@pytest.mark.parametrize("splits", [1, 3, 7, 400])
@pytest.mark.parametrize("tokens", [1, 5])
def test_plan_holds_the_blocks_that_some_query_sees(window, sink, splits, tokens):
    """Each once, in order; in as many pieces as intervals cross the row, numbered without holes."""
    lengths = jnp.array([0, 5, 0, 64, 65, 1000, 700, 0], jnp.int32)
    first = lengths - tokens
    options = dict(window=window, sink=sink, include_self=True)
    plan = gpu.plan(lengths, first, shape=(8, tokens, 1, 1, 128), slots=1000, ordered=True,
                    splits=splits, **options)  # fmt: skip
    seen = reference.visible(1024, tokens, lengths, first, **options).any(axis=1)
    blocks, pieces = walk(plan)
    for row, visible in enumerate(np.asarray(seen).reshape(8, 16, 64).any(axis=2)):
        assert blocks[row] == np.nonzero(visible)[0].tolist()
        assert pieces[row] == list(range(*np.asarray(plan.pieces)[row]))
    numbers = [number for row in pieces for number in row]
    assert len(set(numbers)) == len(numbers) and max(numbers) < 8 + len(plan.intervals) - 1
    sizes = np.diff(np.asarray(plan.intervals)[:, :2], axis=1)
    assert sizes.max() - sizes[sizes > 0].min() <= 1  # equal work


def test_plan_of_a_ring_and_of_nothing():
    """A ring's order says nothing about visibility: all that the row holds."""
    lengths = jnp.array([0, 69, 30], jnp.int32)
    make = functools.partial(gpu.plan, shape=(3, 1, 8, 4, 128), slots=72, window=64, sink=1,
                             include_self=False, ordered=False)  # fmt: skip
    assert walk(make(lengths, lengths + 200))[0] == [[], [0, 1], [0]]
    blocks, pieces = walk(make(lengths * 0, lengths * 0))
    assert blocks == pieces == [[], [], []]


# --- compilation and bad input -----------------------------------------------------------------


def of_each_kind(all_specs: tuple[specs.Spec, ...]) -> list:
    """Those like an earlier one, but for the size of the cache and the batch, are slow."""
    kinds, params = set(), []
    for spec in all_specs:
        kind = spec.tokens * spec.q_per_kv > 64, spec.head_dim, spec.ring, spec.window, spec.dtype
        params.append(
            pytest.param(spec, id=spec.name, marks=pytest.mark.slow if kind in kinds else ())
        )
        kinds.add(kind)
    return params


@traced
@pytest.mark.parametrize("spec", of_each_kind(specs.PRODUCTION))
def test_lowers_for_cuda(spec):
    """Both kernels, on a machine without a GPU; what cannot be says why."""
    _, slots, width = spec.shapes[1].shape
    if reason := gpu.unsupported(spec.head_dim, slots, width, spec.dtype):
        assert spec.dtype == "float32" and reason == "float32: the GPU kernel takes bfloat16"
        return
    call = jax.jit(functools.partial(gpu.decode_attention, **spec.options))
    text = call.trace(*spec.shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2


GOOD = specs.Spec("good", batch=2, tokens=2, kv_heads=2, slots=64)


@traced
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    "head_dim, slots, width, dtype, message",
    [
        (128, 64, 256, "float32", "float32: the GPU kernel takes bfloat16"),
        (32, 64, 64, "bfloat16", "head dimension 32: the GPU kernel takes 64, 128, 256"),
        (128, 69, 256, "bfloat16", "69 slots of 256 numbers.*multiples of 8"),
        (128, 64, 260, "bfloat16", "64 slots of 260 numbers.*multiples of 8"),
    ],
)
def test_bad_input(head_dim, slots, width, dtype, message):
    q, k = jnp.zeros((2, 1, 2, 4, head_dim), dtype), jnp.zeros((2, slots, width), dtype)
    rows = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=message):
        gpu.decode_attention(q, k, k, rows, rows)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this jax has what the kernel needs")
def test_old_jax():
    arrays = GOOD.arrays(jax.random.key(0), np.array([3, 64]))
    with pytest.raises(ValueError, match=r"the GPU kernel needs 0\.11 or later"):
        gpu.decode_attention(*arrays, **GOOD.options)


@pytest.mark.skipif(
    not (0, 11) <= jax.__version_info__ < (0, 11, 1), reason="only jax 0.11.0 is between"
)
def test_jax_that_does_not_interpret():
    arrays = GOOD.arrays(jax.random.key(0), np.array([3, 64]))
    with pytest.raises(ValueError, match=r"interpreted from 0\.11\.1 on"):
        run(GOOD, arrays)

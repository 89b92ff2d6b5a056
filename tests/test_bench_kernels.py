"""The kernels' benchmark: what it times, what it lets pass, what it says of goals."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.bench import kernels as bench_kernels
from launch.bench.timing import Run, compared, compiled


@pytest.fixture
def run() -> Run:
    return Run("gpu", small=False, stop=time.perf_counter() + 100)


def test_all_calls_are_made():
    """On outputs of the call before and on the sets in turn; other outputs are kept."""

    def call(q, step, factor):
        return q * factor + step, q - 1.0

    sets, common = [[jnp.float32(1)], [jnp.float32(3)]], (jnp.float32(2),)
    program = compiled(call, jnp.float32(5), sets, common, 3)
    q, others = program(jnp.float32(5), sets, common)
    expected, before = 5.0, []
    for step in (1, 3) * 3:
        before.append(expected)
        expected = 2 * expected + step
    assert q == expected and [float(x[0]) for x in others] == [x - 1 for x in before[-2:]]


@pytest.mark.parametrize(
    "value, right",
    [(1.0, True), (1.01, True), (1.2, False), (np.nan, False), (np.inf, False), (-np.inf, False)],
)
def test_what_is_right(value, right):
    wanted = np.array([1.0, -np.inf])
    assert compared(lambda: [np.array([value, -np.inf])], [wanted])["right"] == right
    assert not compared(lambda: [np.array([1.0, value])], [wanted])["right"] or value == -np.inf


def test_unequal_runs_are_told():
    values = iter([1.0, 1.001])
    assert not compared(lambda: [np.array([next(values)])], [np.ones(1)])["same bits twice"]


def test_a_failure_is_recorded_and_the_run_goes_on(run, capsys):
    assert not run.attempt({"case": "a"}, lambda: {"x": 1 / 0})
    assert run.attempt({"case": "b"}, lambda: {"x": 1.0})
    run.stop = 0.0
    assert not run.attempt({"case": "c"}, lambda: {"x": 1.0})
    assert [r["case"] for r in run.found("x")] == ["b"]
    printed = capsys.readouterr().out.splitlines()
    assert "ZeroDivisionError: division by zero" in printed[0] and "the time is up" in printed[2]


def records(decode: float, cudnn: float, longest: float) -> list[dict]:
    """Of a GPU: every share of the copy, cuDNN's time, the XLA path's at the longest text."""
    found: list[dict] = [{"case": "check", "way": "xla", "right": True, "same bits twice": True}]
    for lengths in ("uniform", "ragged"):
        found += [
            {"case": "decode", "way": "gpu kernel", "lengths": lengths, "of copy": decode}
        ] * 6
    for part in ("forward", "forward+backward"):
        for keys, us in ((1, 9.0), (8, 10.0), (64, longest)):
            text = {"case": "streaming", "part": part, "L": keys}
            found += [text | {"way": "xla", "us": us}, text | {"way": "cudnn", "us": cudnn}]
    return found


def verdicts(run: Run) -> list[str]:
    return [said.split(" (")[0] for _, said in bench_kernels.summary(run)]


def test_goals(run):
    run.records = records(0.9, 20.0, 11.0)
    assert verdicts(run) == ["met"] * 7
    run.records = records(0.8, 8.0, 12.0)
    assert verdicts(run) == ["met", "not met", "met"] + ["not met"] * 4
    run.records = [dict(r, right=False) for r in records(0.9, 20.0, 11.0)[:-1]]
    assert verdicts(run)[:3] == ["not met", "met", "met"]
    run.records = [r for r in run.records if r.get("L") != 64][:10]
    assert verdicts(run)[1:] == ["met", *["not measured here"] * 5]
    assert verdicts(Run("cpu", small=True, stop=0.0)) == ["not measured here"] * 7


def test_xla_attends_to_a_text_as_the_kernel_does():
    """What is timed side by side computes the same."""
    text = bench_kernels.Text("", batch=1, keys=80, kv_heads=1, **bench_kernels.WINDOW)
    arrays = text.arrays(jax.random.key(0))
    ways = bench_kernels.streaming_ways("cpu", text)
    a, b = (np.asarray(ways[name](*arrays), np.float32) for name in ("tpu kernel", "xla"))
    np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-2)


def test_a_kernel_that_never_returns_costs_its_own_figures_only():
    assert list(bench_kernels.decode_ways("gpu", bench_kernels.Spec("", tokens=1))) == [
        "cudnn", "xla", "gpu kernel",
    ]  # fmt: skip


def test_xla_decodes_as_the_kernels_do():
    spec = bench_kernels.Spec("", batch=2, kv_heads=1, slots=64)
    arrays = spec.arrays(jax.random.key(0), np.array([64, 9]))
    ways = bench_kernels.decode_ways("cpu", spec)
    a, b = (np.asarray(ways[name](*arrays)[0], np.float32) for name in ("tpu kernel", "xla"))
    np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-2)

"""The TPU compiler without a TPU: what it says is read right, and our programs satisfy it.

Where libtpu does not install, the tests that need it are skipped (`launch/test.sh` says so).
"""

import dataclasses
import functools

import jax
import pytest

import launch.tpu_compiler as compiler
from launch.aot_compile import (
    Failed,
    _in_place,
    _on_chip,
    _round,
    _serving_step,
    _train_step,
    compile_all,
    compile_decode,
    compile_streaming,
    kernels,
    main,
)
from launch.tpu_compiler import CHIPS, NoCompiler, Report, compile_for, copies, one_device
from pallas_kernels.decode_attention import specs as decode_specs
from pallas_kernels.decode_attention import tpu
from pallas_kernels.platform import VMEM_LIMIT
from pallas_kernels.streaming_attention import specs as streaming_specs
from spire_jax.config_files import load

GOOD = Report(1.0, 2**20, 1, 0, aliased=100, largest_copy=0)


@pytest.fixture(scope="module")
def libtpu():
    try:
        compiler.find_libtpu()
    except NoCompiler as error:
        pytest.skip(str(error))


# --- without the compiler ----------------------------------------------------------------------

HLO = """
  %copy.3 = bf16[64,8192,1024]{2,1,0:T(8,128)(2,1)} copy(%cache)
  %copy-start.1 = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %copy-start.4 = (bf16[64,80]{1,0}, bf16[64,80]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%ring)
  %copy.9 = s32[64]{0:T(128)S(1)} copy(%prefetched)
  %transpose.2 = pred[4,2]{0,1} transpose(%mask), dimensions={1,0}
  %add.1 = f32[1000000]{0} add(%copy.3, %copy.3)
  %k = f32[8,128] custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"used_\
scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"5378048"}]}
  %scatter_fusion = f32[8] fusion(%x), backend_config={"used_scoped_memory_configs":[{"memory_\
space":"1","offset":"0","size":"7"}]}
"""


def test_copies_within_hbm_are_found():
    """Synchronous and asynchronous ones, not those from or to VMEM."""
    assert sorted(copies(HLO)) == [4 * 2, 8 * 128 * 4, 64 * 8192 * 1024 * 2]


def test_vector_memory_is_that_of_the_kernels():
    assert compiler.vector_memory(HLO) == [5378048]


def test_caches_must_be_updated_in_place():
    caches = [jax.ShapeDtypeStruct((2, 5, 5), "int8")] * 2
    assert _in_place(GOOD, caches) is GOOD
    with pytest.raises(Failed, match="99 bytes are aliased, but the caches have 100"):
        _in_place(dataclasses.replace(GOOD, aliased=99), caches)
    with pytest.raises(Failed, match="temporaries of 100 bytes"):
        _in_place(dataclasses.replace(GOOD, temporaries=100), caches)
    with pytest.raises(Failed, match="50 bytes is copied"):
        _in_place(dataclasses.replace(GOOD, largest_copy=50), caches)


def test_the_last_line_sums_up_and_failures_count(capsys):
    def fails():
        raise Failed("scoped vmem limit")

    assert compile_all("kernels", iter([("one", lambda: GOOD), ("two", lambda: GOOD)])) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "kernels: 2 of 2 compiled in 2 s, at most 1.0 MiB of VMEM"
    assert compile_all("steps", iter([("one", lambda: GOOD), ("two", fails)])) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "two" in lines[1] and "FAILED: scoped vmem limit" in lines[1]
    assert lines[-1].startswith("steps: 1 of 2") and lines[-1].endswith("failed: two")


def test_every_kernel_is_compiled_at_every_shape_for_every_chip():
    names = [name for name, _ in kernels(list(CHIPS))]
    shapes = len(decode_specs.PRODUCTION) + 2 * len(streaming_specs.PRODUCTION)
    assert len(set(names)) == len(names) == shapes * 4


def test_bad_input(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["kernels", "--chips=v5e,v9"])
    assert "no chip 'v9'; there are v5e, v5p, v6e, tpu7x" in capsys.readouterr().err

    def missing():
        raise NoCompiler("libtpu is not installed: bash launch/setup_libtpu.sh")

    monkeypatch.setattr(compiler, "find_libtpu", missing)
    with pytest.raises(SystemExit):
        main(["kernels", "--chips=v5e"])
    assert "error: libtpu is not installed: bash" in capsys.readouterr().err


# --- with it -----------------------------------------------------------------------------------


def spread(specs) -> list:
    """Each spec on one of the chips in turn, every sixth in the fast tier; the rest is slow."""
    chips, cases = list(CHIPS), []
    for i, spec in enumerate(specs):
        for j, chip in enumerate(chips):
            fast = i % 6 == 0 and j == i // 6 % 4
            marks = () if fast else pytest.mark.slow
            cases.append(pytest.param(spec, chip, id=f"{spec.name}-{chip}", marks=marks))
    return cases


@pytest.mark.parametrize("spec, chip", spread(decode_specs.PRODUCTION))
def test_decode_attention_compiles(libtpu, spec, chip):
    report = compile_decode(spec, chip)
    assert report.kernels == 1 and 0 < report.vmem < VMEM_LIMIT


@pytest.mark.parametrize("spec, chip", spread(streaming_specs.PRODUCTION))
def test_streaming_attention_compiles(libtpu, spec, chip):
    report = compile_streaming(spec, chip, backward=True)
    # XLA may fuse what pads an operand into a kernel, in VMEM beside the kernel's own.
    assert report.kernels == 3 and 0 < report.vmem < 1.5 * VMEM_LIMIT


def test_a_cache_of_odd_sizes_would_be_copied(libtpu):
    """What `cache_shape` is for, and what the check of copies finds."""
    place = one_device("v5e")
    shapes = list(decode_specs.Spec("odd", slots=4101).shapes)
    shapes[1:3] = [jax.ShapeDtypeStruct((64, 4101, 1024), "bfloat16")] * 2
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes]
    report = compile_for(jax.jit(tpu.decode_attention), *arguments)
    assert report.largest_copy >= 64 * 4101 * 1024 * 2


@pytest.fixture(scope="module")
def small():
    return load("configs/paper_67m.py", [
        "target.n_layers=2", "target.d_model=256", "target.d_ff=512", "target.n_tokens=1000",
        "drafts.spire.n_layers=1", "train.batch_size=8", "train.seq_len=256",
        "throughput.batch_size=8", "throughput.context_length=500", "decode.dtype=bfloat16",
        "eval.context_lengths=100",
    ])  # fmt: skip


@pytest.mark.parametrize(
    "which, n_kernels",
    [
        # Two layers, forward and twice backward; one layer, four passes. A minute each.
        pytest.param("target", 2 * 3, marks=pytest.mark.slow),
        pytest.param("spire", 4 * 3, marks=pytest.mark.slow),
        ("prefill", 1),  # nothing needs what the last layer attends to
        ("draft", 1),
        ("verify", 2),
        ("round", 4 * 1 + 2),
        ("autoregressive", 2),
    ],
)
def test_steps_compile_with_the_kernels_inside(libtpu, small, which, n_kernels):
    """By default, since the device is a TPU; the caches of serving steps are updated in place."""
    on_chip = functools.partial(_on_chip, "v5e")
    if which in ("target", "spire"):
        report = on_chip(_train_step, small, which)()
    elif which in ("round", "autoregressive"):
        report = on_chip(_round, small, "spire" if which == "round" else None)()
    else:
        report = on_chip(_serving_step, small, "spire", which)()
    assert report.kernels == n_kernels

"""The TPU compiler without a TPU: what it says is read right, and our programs satisfy it.

Where libtpu does not install, the tests that need it are skipped (`launch/test.sh` says so).
"""

import dataclasses

import jax
import pytest

import launch.compile.tpu_compiler as compiler
from launch.compile.__main__ import (
    compile_all,
    compile_decode,
    compile_on,
    compile_streaming,
    kernels,
    main,
)
from launch.compile.programs import Failed, Program, check_in_place, programs
from launch.compile.tpu_compiler import CHIPS, NoCompiler, Report, compile_for, copies, one_device
from pallas_kernels.decode_attention import specs as decode_specs
from pallas_kernels.decode_attention import tpu
from pallas_kernels.platform import VMEM_LIMIT
from pallas_kernels.streaming_attention import specs as streaming_specs
from spire_jax.config.files import load
from spire_jax.config.schema import MeshConfig
from spire_jax.models.sharding import make_mesh

GOOD = Report(
    1.0, 2**20, 1, temporaries=0, aliased=100, largest_copy=0, arguments=100, outputs=0, program=0,
    sends=(),
)  # fmt: skip


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
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    program = Program(None, (), {}, [jax.ShapeDtypeStruct((2, 5, 5), "int8", sharding=here)] * 2)
    small = dataclasses.replace(program, small=True)
    check_in_place(GOOD, program)
    for case in (program, small):
        with pytest.raises(Failed, match="99 bytes are aliased, but the caches have 100"):
            check_in_place(dataclasses.replace(GOOD, aliased=99), case)
    copied = dataclasses.replace(GOOD, largest_copy=50)
    for report, message in (
        (dataclasses.replace(GOOD, temporaries=100), "temporaries of 100 bytes"),
        (copied, "50 bytes is copied"),
    ):
        with pytest.raises(Failed, match=message):
            check_in_place(report, program)
        check_in_place(report, small)


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
        raise NoCompiler("libtpu is not installed: bash launch/setup/libtpu.sh")

    monkeypatch.setattr(compiler, "find_libtpu", missing)
    with pytest.raises(SystemExit):
        main(["kernels", "--chips=v5e"])
    assert "error: libtpu is not installed: bash" in capsys.readouterr().err


# --- with it -----------------------------------------------------------------------------------


def spread(specs, every: int = 6) -> list:
    """Each spec on all chips; one of `every` on one of them in the fast tier, the rest is slow."""
    chips, cases = list(CHIPS), []
    for i, spec in enumerate(specs):
        for j, chip in enumerate(chips):
            fast = i % every == 0 and j == i // every % 4
            marks = () if fast else pytest.mark.slow
            cases.append(pytest.param(spec, chip, id=f"{spec.name}-{chip}", marks=marks))
    return cases


@pytest.mark.parametrize("spec, chip", spread(decode_specs.PRODUCTION))
def test_decode_attention_compiles(libtpu, spec, chip):
    report = compile_decode(spec, chip)
    assert report.kernels == 1 and 0 < report.vmem < VMEM_LIMIT


@pytest.mark.parametrize("spec, chip", spread(streaming_specs.PRODUCTION, every=18))
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


SMALL = [
    "target.n_layers=2", "target.d_model=256", "target.d_ff=512", "target.n_tokens=1000",
    "drafts.spire.n_layers=1", "drafts.longspec.kind=longspec", "drafts.anchor.kind=anchor",
    "drafts.anchor.anchors=198", "drafts.anchor.full_every=2", "drafts.block.kind=block",
    "drafts.block.n_layers=1", "drafts.block.offsets=0,2", "drafts.block.confidence=true",
    "train.batch_size=8", "train.seq_len=256",
    "throughput.batch_size=8", "throughput.context_length=500", "decode.dtype=bfloat16",
    "eval.context_lengths=100",
]  # fmt: skip


@pytest.mark.parametrize(
    "name, n_kernels",
    [
        ("spire: prefill", 1),  # nothing needs what the last layer attends to
        ("spire: whole round", 1 + 2),  # the draft step is compiled once
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                # Two layers, forward and twice backward; one layer, four passes. A minute each.
                ("target's train step", 2 * 3),
                ("spire's train step", 4 * 3),
                ("teacher's pass", 2),
                ("spire: prefill of a chunk", 0),
                ("spire: draft step", 1),
                ("spire: verify step", 2),
                ("autoregressive step", 2),
                # Forward and twice backward; the target's keys and values have no gradient.
                ("longspec's train step", 3 + 2),
                ("longspec: draft step", 2),
                ("longspec: whole round", 2 + 2),
                # Of its two layers one is a kernel's; its first step takes two tokens.
                ("block's train step", 2 * 3),  # of two offsets
                ("block: draft step", 1),
                ("block: whole round", 1 + 2),
                ("anchor's train step", 3),
                ("anchor: whole round", 2 + 2),
            )
        ),
    ],
)
def test_steps_compile_with_the_kernels_inside(libtpu, name, n_kernels):
    """By default, since the device is a TPU; the caches of serving steps are updated in place."""
    check_step(name, n_kernels)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, n_kernels",
    [("spire's train step", 2 * 3), ("spire: draft step", 1), ("spire: whole round", 1 + 2)],
)
def test_eagles_steps_compile(libtpu, name, n_kernels):
    check_step(name, n_kernels, "drafts.spire.kind=eagle3", "drafts.spire.k=2")


def check_step(name: str, n_kernels: int, *overrides: str) -> None:
    mesh = make_mesh(MeshConfig(), [*one_device("v5e").device_set])
    with jax.set_mesh(mesh):
        steps = dict(programs(load("configs/paper_67m.py", [*SMALL, *overrides]), mesh))
    assert compile_on(mesh, steps[name]).kernels == n_kernels

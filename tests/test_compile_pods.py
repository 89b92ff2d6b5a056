"""Compiling for slices: what a round sends, and the report.

Four host-platform devices need a process of their own, which this file is run as
(`python tests/test_compile_pods.py RESULTS`). Where libtpu does not install, what needs it is
skipped.
"""

import json
import math
import pathlib
import re
import sys

import numpy as np
import pytest

if __name__ == "__main__":
    import conftest  # noqa: F401  (shapes are checked in this process too)

import devices as many_devices
import jax
import jax.numpy as jnp

import launch.compile.tpu_compiler as compiler
from launch.compile import __main__ as command
from launch.compile import pods
from launch.compile.hlo_collectives import Collective, collectives
from launch.compile.pods import StepReport, report
from launch.compile.programs import Program, bytes_per_device, programs
from launch.compile.topologies import SLICES, check_topology, devices
from launch.compile.tpu_compiler import OutOfMemory
from spire_jax.config.files import load
from spire_jax.config.schema import ExperimentConfig, MeshConfig
from spire_jax.models.sampling import Sampling, sample, transformed_logits
from spire_jax.models.sharding import make_mesh

# Small, but logits larger than activations; 31 runs of 32 tokens to sample from, which no number
# of devices divides (in gathering them XLA would send all logits).
SMALL = [
    "target.n_layers=2", "target.d_model=32", "target.n_kv_heads=4", "target.d_head=32",
    "target.d_ff=64", "target.n_tokens=968", "drafts.spire.n_layers=1", "drafts.spire.window=38",
    "drafts.magicdec.window=38",
    "train.batch_size=8", "train.seq_len=64", "throughput.batch_size=8",
    "throughput.context_length=90", "eval.output_length=10", "eval.context_lengths=50",
    "decode.k=1", "throughput.tau.vanilla=0", "throughput.tau.magicdec=0", "throughput.tau.spire=0",
]  # fmt: skip
ON_TPU = [*SMALL, "target.d_head=128", "decode.dtype=bfloat16"]
ROWS, VOCAB, WIDTH, RING = 8, 968, 90 + 10 + 1, 1 + 38 + 1
GREEDY, PLAIN, BLOCKS, TRUNCATED = "greedy", "plain temperature", "in blocks", "top-k"
SAMPLING = {
    GREEDY: ["decode.temperature=0"],
    PLAIN: ["decode.temperature=0.8"],
    BLOCKS: ["decode.temperature=0.8", "decode.verification=block"],
    TRUNCATED: ["decode.top_k=5"],
}
LATER = pytest.mark.slow
ROUND = "spire: whole round"


def small(*overrides: str, base: list[str] = SMALL) -> ExperimentConfig:
    return load("configs/paper_67m.py", [*base, *overrides])


def sends_logits(sends: list[Collective], rows: int, tensor: int) -> list[Collective]:
    """Collectives with an array as large as a device's logits of one token per row."""
    share = rows * VOCAB // tensor
    return [c for c in sends if any(numbers(shape) >= share for shape in c.shapes)]


def gathers_caches(sends: list[Collective], heads: int) -> list[Collective]:
    """All-gathers as large as a layer of the smallest cache, or with an axis of a cache's slots."""
    least = min(RING, WIDTH) * heads
    return [
        c for c in sends if c.kind == "all-gather"
        for shape in c.shapes if numbers(shape) >= least or {RING, WIDTH} & set(sizes(shape))
    ]  # fmt: skip


def sizes(shape: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", shape.partition("[")[2].partition("]")[0])]


def numbers(shape: str) -> int:
    return math.prod(sizes(shape))


# --- in the process of four devices ------------------------------------------------------------


def main(path: str, *names: str) -> None:
    found: dict = {"rounds": {}, "tokens": {}}
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    with jax.set_mesh(mesh):
        for name in names:
            program = dict(programs(small(*SAMPLING[name]), mesh))[ROUND]()
            text = program.function.lower(*program.arguments).compile().as_text()
            found["rounds"][name] = [vars(c) for c in collectives(text)]
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, VOCAB)).astype(np.float32) * 3
    logits[:, 900:] = -np.inf
    logits[:4, 1:] = -np.inf  # one token
    keys = jax.random.split(jax.random.key(1), 64)
    greedy = Sampling(temperature=0.0)
    for name, of in (("drawn", lambda x: x), ("greedy", lambda x: transformed_logits(x, greedy))):
        draw = jax.jit(lambda k, x, of=of: sample(k, of(x)))
        one = draw(keys, logits)
        for sizes_ in (MeshConfig(data=2, tensor=2), MeshConfig(data=1, tensor=4)):
            mesh = make_mesh(sizes_)
            with jax.set_mesh(mesh):
                rows = jax.sharding.NamedSharding(
                    mesh, jax.sharding.PartitionSpec("data", "tensor")
                )
                same = draw(keys, jax.device_put(logits, rows)) == one
            found["tokens"][f"{name} {sizes_.tensor}"] = np.asarray(same).tolist()
    found["different"] = len(set(np.asarray(one).tolist()))
    pathlib.Path(path).write_text(json.dumps(found))


# --- rounds ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory, request) -> dict:
    names = SAMPLING if request.config.getoption("--full") else [PLAIN]
    return many_devices.found_by(__file__, 4, tmp_path_factory.mktemp("pods"), *names)


@pytest.mark.parametrize(
    "name", [PLAIN, *(pytest.param(x, marks=LATER) for x in (GREEDY, BLOCKS, TRUNCATED))]
)
def test_a_round_sends_neither_caches_nor_logits(found, name):
    """Also not what a row has just written; but truncation needs all logits in one place."""
    sends = [Collective(**c | {"shapes": tuple(c["shapes"])}) for c in found["rounds"][name]]
    logits = sends_logits(sends, ROWS // 2, 2)
    if name == TRUNCATED:
        assert logits
        return
    assert sends and not logits
    assert {c.kind for c in sends} <= {"all-reduce", "all-gather"}
    assert not gathers_caches(sends, heads=4 * 32 // 2)
    # Without weights to gather (fsdp=1): the best token of each device, at most.
    gathered = [c for c in sends if c.kind == "all-gather"]
    assert all(numbers(shape) <= ROWS * 2 * 3 for c in gathered for shape in c.shapes), gathered


def test_tokens_are_those_of_one_device(found):
    """Also where the runs that tokens are drawn from lie on two devices."""
    assert found["different"] > 20
    assert set(found["tokens"]) == {"drawn 2", "drawn 4", "greedy 2", "greedy 4"}
    for name, same in found["tokens"].items():
        assert len(same) == 64 and all(same), name


# --- the report --------------------------------------------------------------------------------


def test_slices_that_exist():
    for good in ("v5e:16x16", "v5e:1x1", "v6e:8x16", "v5p:2x2x4", "v5p:4x8x12", "tpu7x:4x4x4"):
        check_topology(good)
    assert [SLICES[name][-1] for name in SLICES] == ["16x16", "16x16", "16x16x24", "16x16x36"]


@pytest.mark.parametrize(
    "topology, message",
    [
        ("v5e:16x32", "v5e has 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v5e:8x4", "did you mean v5e:4x8"),
        ("v5p:2x2x3", "v5p has 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8"),
        ("v5p:4x4x6", "multiples of 4, A <= B <= C, of at most 6144 chips"),
        ("v9:2x2", "there are v5e:1x1"),
        ("v5litepod-8", "use GENERATION:SHAPE, as in v5e:16x16"),
        ("v5e:", "v5e has 1x1"),
    ],
)
def test_slices_that_do_not(topology, message, capsys):
    """Without the compiler; libtpu itself would take some of them."""
    with pytest.raises(SystemExit) as end:
        command.main(["--config=configs/paper_67m.py", f"--topology={topology}"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and f"error: no topology {topology!r}" in error and message in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v5e:2x4", "--config.mesh.data=3"], "the product of mesh.data, mesh.fsdp and "
         "mesh.tensor must be 8"),
        (["--topology=v5e:2x4", "--config.mesh.tensor=8", "--config.target.n_kv_heads=4"],
         "target.n_kv_heads=4 is not a multiple of mesh.tensor=8"),
        (["--topology=v5e:2x4", "--steps=draught"], "no step's name has that in it; there are "
         "target's train step, "),
        (["steps", "--topology=v5e:2x4"], "--topology stands alone"),
        ([], "say what to compile"),
        (["--topology=v5e:2x4", "--reserve=1"], "--reserve=1.0 must be 0 or more, and under 1"),
        (["--topology=v5e:2x4", "--json=none/there.json"], "none is no folder"),
    ],
)  # fmt: skip
def test_bad_input(arguments, message, capsys, monkeypatch):
    device = jax.devices()[0]
    monkeypatch.setattr(command, "devices", lambda _: [device] * 8)
    monkeypatch.setattr(command, "hbm_bytes", lambda _: 16e9)
    monkeypatch.setattr(pods, "hbm_bytes", lambda _: 16e9)
    with pytest.raises(SystemExit) as end:
        command.main(["--config=configs/paper_67m.py", *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_arguments_that_do_not_fit_are_not_compiled(capsys, monkeypatch):
    monkeypatch.setattr(command, "devices", lambda _: jax.devices()[:1])
    for module in (command, pods):
        monkeypatch.setattr(module, "hbm_bytes", lambda _: 16e9)
    flags = [f"--config.{x}" for x in [*SMALL, "throughput.context_length=4000000"]]
    status = command.main([
        "--config=configs/paper_67m.py", "--topology=v5e:1x1", *flags, "--steps=auto",
    ])  # fmt: skip
    text = capsys.readouterr().out
    assert status == 1 and "0 of 1 steps compiled and fit" in text and "not compiled" in text
    # Keys and values of two layers, eight rows and four heads.
    used = float(re.findall(r"DOES NOT FIT: ([\d.]+) of", text)[0])
    assert 1 <= used / (2 * 2 * 8 * 4e6 * 4 * 32 * 4 / 2**30) < 1.2


def test_bytes_of_a_device():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tree = [jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=whole),
            jax.ShapeDtypeStruct((5,), jax.random.key(0).dtype, sharding=whole)]  # fmt: skip
    assert bytes_per_device(tree) == 8 * 3 * 2 + 5 * 8


OUT = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 24.50G of 15.75G hbm. Exceeded hbm capacity by 8.75G."
)


def test_memory_that_the_compiler_names():
    assert compiler._hbm_used(OUT) == 24.5 * 2**30
    assert compiler._hbm_used("Ran out of memory in memory space hbm.") == 0
    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (17.50G) exceeds available HBM (15.75G)."
    )
    assert compiler._hbm_used(temporaries, arguments=1000) == 17.5 * 2**30 + 1000


def test_a_step_that_fails_or_does_not_fit_does_not_end_the_report(monkeypatch, capsys):
    """Each is named in the end, and the status is 1."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # A program of 2 GiB of weights, beside which 3 GiB lie.
    held, resident = ({"of": jax.ShapeDtypeStruct((n, 2**30), "int8", sharding=place)}
                      for n in (2, 3))  # fmt: skip

    class Told(Program):
        def compile(self, quick=False):
            raise OutOfMemory(OUT, int(24.5 * 2**30))

    def broken():
        raise ValueError("no lowering")

    class Good(Program):
        def compile(self, quick=False):
            return compiler.Report(2.0, 0, 0, 2**29, 0, 0, 2 * 2**30 + 100, 2**28, 2**20, (
                Collective("all-gather", ("bf16[4,8]",), 64, 4, 6, True),))  # fmt: skip

    steps = [("broken", broken), ("large", lambda: Told(None, (), held, resident=resident)),
             ("good", lambda: Good(None, (), held, resident=resident))]  # fmt: skip
    monkeypatch.setattr(pods, "programs", lambda *_: iter(steps))
    monkeypatch.setattr(pods, "hbm_bytes", lambda _: 10 * 2.0**30)
    done = list(report(small(), mesh, reserve=0.1))
    assert [step.fits for step in done] == [False, False, True]
    assert "no lowering" in done[0].error and done[1].used == int(27.5 * 2**30)
    good = done[2]
    assert good.limit == 9 * 2**30 and good.padding == 100
    assert good.used == sum(good.held.values()) + 100 + 2**29 + 2**28 + 2**20
    assert good.held == {"of": 2 * 2**30, "(of)": 3 * 2**30}
    lines = "\n".join(line for step in done for line in step.lines())
    assert "FAILED: no lowering" in lines and "DOES NOT FIT: 27.50 of 9.00 GiB" in lines
    assert "all-gather            6 x      64 B  groups of 4" in lines and "Exceeded hbm" in lines
    tight = StepReport("tight", 1.0, {}, used=11, limit=10)
    assert not tight.fits and "DOES NOT FIT" in next(tight.lines())


# --- with the compiler -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [GREEDY, *(pytest.param(x, marks=LATER) for x in (PLAIN, BLOCKS))])
def test_a_round_on_a_slice_sends_neither_caches_nor_logits(libtpu, name, tmp_path, capsys):
    """By the command: all steps' memory and collectives, as text and as a file."""
    path = tmp_path / "report.json"
    flags = [f"--config.{x}" for x in [*ON_TPU, *SAMPLING[name]]]
    status = command.main([
        "--config=configs/paper_67m.py", "--topology=v5e:2x4", *flags,
        "--config.mesh.tensor=4", "--steps=spire: whole", f"--json={path}", "--quick",
    ])  # fmt: skip
    text, saved = capsys.readouterr().out, json.loads(path.read_text())
    assert status == 0 and "1 of 1 steps compiled and fit" in text and ROUND in text
    assert saved["devices"] == 8 and saved["mesh"] == {"data": 2, "fsdp": 1, "tensor": 4}
    (step,) = saved["steps"]
    held = step["held"]
    # Two layers' keys and values of 101 slots (a kernel reads 112), one layer's of 40 (48).
    assert held["target's cache"] == 2 * 2 * 4 * 112 * 128 * 2
    assert held["draft's cache"] == 2 * 4 * 48 * 128 * 2
    assert step["fits"] and 0 < step["used"] == sum(held.values()) + sum(
        step[part] for part in ("padding", "temporaries", "outputs", "program")
    )
    sends = []
    for values in step["sends"]:
        assert values.pop("sent") >= 0
        sends.append(Collective(**values | {"shapes": tuple(values["shapes"])}))
    assert sends and not sends_logits(sends, ROWS // 2, 4)
    assert {c.kind for c in sends} <= {"all-reduce", "all-gather"}
    assert not gathers_caches(sends, heads=128)


def test_a_mesh_axis_may_be_a_part_of_an_axis_of_the_torus(libtpu):
    mesh = make_mesh(MeshConfig(data=-1, tensor=8), devices("v6e:16x16"))
    assert dict(mesh.shape) == {"data": 32, "fsdp": 1, "tensor": 8}
    # Those that exchange most are neighbours: at most seven links apart.
    for group in mesh.devices.reshape(32, 8):
        coordinates = np.array([device.coords for device in group])
        assert np.ptp(coordinates, axis=0).sum() <= 7


def test_the_compiler_names_memory_that_is_too_much(libtpu):
    def outer(x):
        return jnp.sum(jax.lax.optimization_barrier(jnp.outer(x, x)))

    place = compiler.one_device("v5e")
    x = jax.ShapeDtypeStruct((2**16,), jnp.float32, sharding=place)
    with pytest.raises(OutOfMemory, match=r"(?i)ran out of memory") as error:
        compiler.compile_for(jax.jit(outer), x)
    assert 16 <= error.value.used / 2**30 < 17


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What a borrowed accelerator is asked: parts that end alone, training's share of the peak."""

import json
import os
import pathlib
import subprocess
import time

import jax
import pytest

from launch.bench import device, train_steps
from launch.bench.device import Part, run_parts
from launch.bench.timing import Run
from spire_jax.config.files import load
from spire_jax.models.sharding import make_mesh
from spire_jax.training.tasks import draft_task, forward_flops, target_task

ROOT = pathlib.Path(__file__).parent.parent
FOUND = "open('{}/found.json', 'w').write('[1]')"
ENDLESS = f"""
import subprocess, time
child = subprocess.Popen(['sleep', '60'])
open('{{}}/../../child', 'w').write(str(child.pid))
{FOUND}
time.sleep(60)
"""
# What an image with jax may lack.
BARE = f"""
import sys
sys.modules |= dict.fromkeys(['ml_collections', 'grain', 'gguf', 'tensorboardX'])
import launch.bench.device, launch.bench.kernels
{FOUND}
"""


def test_every_part_ends_and_the_others_results_stay(tmp_path, monkeypatch, capfd):
    """One that fails, one that never returns; the first two parts' modules need jax alone."""
    monkeypatch.setattr(device.tempfile, "tempdir", str(tmp_path))
    parts = [
        Part("wrong", 1, ("-c", "raise ValueError('no such device')")),
        Part("endless", 0.04, ("-c", ENDLESS)),
        Part("bare", 1, ("-c", BARE)),
    ]
    out, begin = tmp_path / "new folder/device.json", time.perf_counter()
    assert not run_parts(parts, out, {"jax": "0.11"}, seconds=90)
    assert time.perf_counter() - begin < 60
    found = json.loads(out.read_text())
    assert found["machine"] == {"jax": "0.11"}
    wrong, endless, bare = (found["parts"][part.name] for part in parts)
    assert wrong["ended"] == "ended with status 1" and wrong["found"] is None
    assert wrong["errors"][-1] == "ValueError: no such device"
    assert endless["ended"].startswith("stopped after its ") and endless["found"] == [1]
    assert bare["ended"] == "done" and bare["found"] == [1] and "errors" not in bare
    assert "no such device" in capfd.readouterr().err
    child = pathlib.Path("/proc", (tmp_path / "child").read_text(), "cmdline")
    assert not child.exists() or not child.read_bytes(), "what it had started runs on"


def test_all_parts_share_the_time():
    for small in (True, False):
        parts = device.parts(small)
        assert [part.name for part in parts] == ["kernels", "attention", "rounds", "training"]
        assert all(("--small" in part.command) == small for part in parts[:3])


def test_what_cannot_be_is_said_at_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(device, "describe_machine", lambda: {"platform": "cpu"})
    monkeypatch.setattr(device, "run_parts", lambda *_: pytest.fail("a part is run"))
    for given, says in (("--minutes=9", "which runs --small"), ("--parts=x", "unknown ['x']")):
        with pytest.raises(SystemExit):
            device.main([f"--out={tmp_path}/device.json", given])
        assert says in capsys.readouterr().err


def test_a_step_is_held_against_the_peak(monkeypatch):
    """What is trained, and the target's pass where a draft learns by it."""
    config = load("configs/quickstart.py", ["train.batch_size=2", "train.seq_len=8"])
    monkeypatch.setattr(train_steps, "training_steps", lambda config, mesh, names: {
        name: lambda batch: None for name in names})  # fmt: skip
    monkeypatch.setattr(train_steps, "interleaved", lambda work, _: dict.fromkeys(work, 4.0))
    monkeypatch.setattr(train_steps, "peak_flops", lambda dtype: (1e6, "a data sheet"))
    with jax.set_mesh(make_mesh(config.mesh)):
        records = train_steps.measure(config, train_steps.trained(config), repeats=1)
    found = {record["model"]: record for record in records}
    target = forward_flops(target_task(config).model, 8)
    own = {name: draft_task(config, name).flops_per_token for name in ("spire", "vanilla")}
    expected = own | {"target": 3 * target, "spire": own["spire"] + target}
    assert {name: record["tokens/s"] for name, record in found.items()} == dict.fromkeys(found, 4.0)
    for name, flops in expected.items():
        assert found[name]["of peak"] == pytest.approx(4.0 * flops / 1e6)


def test_figures_are_kept_as_they_are_found():
    kept: list[int] = []
    run = Run("cpu")
    run.keep = lambda: kept.append(len(run.records))
    run.attempt({}, lambda: {"x": 1})
    run.attempt({}, lambda: {"x": 1 / 0})
    assert kept == [1, 2]


@pytest.mark.slow
def test_small_run(tmp_path):
    """The script, on this CPU; every part leaves figures."""
    command = ["bash", "launch/bench/device.sh", "--small", "--minutes=8"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OUT": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "device.json").read_text())["parts"]
    assert {part["ended"] for part in parts.values()} == {"done"}
    checks = parts["kernels"]["found"]["figures"]
    assert len(checks) >= 8 and all(check["right"] for check in checks)
    rates = parts["attention"]["found"]["figures"]
    assert {r["way"] for r in rates} >= {"tpu kernel", "xla"} and all(r["of copy"] for r in rates)
    assert [r["context"] for r in parts["rounds"]["found"]] == [32, 64, 128]
    trained = parts["training"]["found"]["figures"]
    assert {r["model"] for r in trained} == {"target", "spire", "vanilla"}
    assert all(0 < r["of peak"] < 2 for r in trained)

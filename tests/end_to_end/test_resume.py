"""A run killed at any moment and started again ends as one that was not."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pipelines
import pytest

from spire_jax.storage.checkpoints import load_params
from spire_jax.storage.processes import PREEMPTED

TIMING = {"tokens_per_s", "peak_share", "data_wait_share"}
MODELS = {"target": "target", "spire": "drafts/spire", "vanilla": "drafts/vanilla"}


def leaves(tree, path=()):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, np.asarray(tree)


def check_equal(workdir, reference, models=tuple(MODELS)) -> None:
    """Bit-identical parameters; metrics without holes, repeats or torn lines, equal but timing."""
    for name in models:
        ours, theirs = (dict(leaves(load_params(w / MODELS[name] / "params")))
                        for w in (workdir, reference))  # fmt: skip
        assert ours.keys() == theirs.keys()
        for path, value in ours.items():
            assert value.tobytes() == theirs[path].tobytes(), (name, path)
        lines = [
            [{k: v for k, v in json.loads(line).items() if k not in TIMING}
             for line in (w / "metrics" / f"{name}.jsonl").read_text().splitlines()]
            for w in (workdir, reference)
        ]  # fmt: skip
        assert lines[0] == lines[1]


def finish(corpus, workdir, *more, env=None) -> str:
    process = pipelines.process(corpus, workdir, *more, env=env)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return error


def kill_after(corpus, workdir, seconds: float, *more) -> bool:
    """Start a run, kill it after a while; whether it was still going."""
    process = pipelines.process(corpus, workdir, *more)
    time.sleep(seconds)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return alive


def wait_for(path, process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not list(path.parent.glob(path.name)):
        assert process.poll() is None and time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.002)


def wait_for_a_record(workdir, process) -> None:
    metrics = workdir / "metrics" / "target.jsonl"
    wait_for(metrics, process)
    while not metrics.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)


def test_stopped_killed_torn_and_resumed(corpus, finished, tmp_path):
    """SIGTERM in the target; SIGKILL in a draft, whose newest checkpoint is torn besides."""
    workdir, stages = tmp_path / "stopped", "--stages=target,drafts"
    process = pipelines.process(corpus, workdir, stages, "--config.train.checkpoint_every=1000")
    wait_for_a_record(workdir, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    at = re.search(r"stopped by SIGTERM after step (\d+) of \d+, which is saved", error)
    assert process.returncode == PREEMPTED and at is not None, error
    assert (workdir / "target" / "checkpoints" / at[1]).is_dir()

    process, draft = pipelines.process(corpus, workdir, stages), workdir / "drafts" / "spire"
    wait_for(draft / "checkpoints" / "*9*", process)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate()
    assert "target: 1/24" not in error, "it began anew"
    assert not (draft / "params").exists(), "the kill came too late to test much"

    newest = max((p for p in (draft / "checkpoints").iterdir() if p.name.isdigit()),
                 key=lambda p: int(p.name))  # fmt: skip
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    error = finish(corpus, workdir, stages)
    assert newest.name in error and "unreadable" in error
    check_equal(workdir, finished)


@pytest.mark.slow
def test_killed_in_the_target_and_in_a_draft(corpus, finished, tmp_path):
    """As soon as checkpoints appear."""
    workdir = tmp_path / "killed"
    for folder in ("target", "drafts/spire"):
        process = pipelines.process(corpus, workdir)
        wait_for(workdir / folder / "checkpoints" / "*6*", process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (workdir / folder / "params").exists(), "the kill came too late to test much"
    finish(corpus, workdir)
    check_equal(workdir, finished)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own that can be filled."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk to be filled needs the right to mount one")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training(corpus, finished, small_disk):
    """The run ends with an error that says so, and goes on once there is room."""
    workdir, ballast = small_disk / "run", small_disk / "ballast"
    process = pipelines.process(corpus, workdir)
    wait_for(workdir / "target" / "checkpoints" / "*6*", process)
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert "\nerror: cannot write" in error and "No space left" in error and str(workdir) in error
    ballast.unlink()
    error = finish(corpus, workdir)
    assert "target: 1/24" not in error, "it began anew"
    check_equal(workdir, finished)


@pytest.mark.slow
def test_killed_at_ten_random_moments(corpus, finished, tmp_path):
    """Anywhere in a run: start-up, compilation, training, saving, evaluation, report."""
    begin = time.monotonic()
    finish(corpus, tmp_path / "timed")
    whole = time.monotonic() - begin
    shutil.rmtree(tmp_path / "timed")
    rng = random.Random(0)
    workdir, kills = tmp_path / "killed", 0
    while kills < 10:
        moment = rng.uniform(0.1, 0.9) * whole
        if kill_after(corpus, workdir, moment):
            kills += 1
        else:  # it got to its end: the next kills fall into a new run
            check_equal(workdir, finished)
            shutil.rmtree(workdir)
    finish(corpus, workdir)
    check_equal(workdir, finished)

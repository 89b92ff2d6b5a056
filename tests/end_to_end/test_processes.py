"""The pipeline in two processes; SIGTERM; workers that do not meet or do not agree."""

import json
import signal
import socket
import subprocess

import devices
import numpy as np
import pipelines
import pytest
from test_resume import MODELS, finish, leaves, wait_for, wait_for_a_record

from spire_jax.storage.checkpoints import load_params
from spire_jax.storage.processes import PREEMPTED

FSDP = ("--config.mesh.data=2", "--config.mesh.fsdp=2")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def together(corpus, workdir, *more, n=2, each=2, of=(), env=None) -> list[subprocess.Popen]:
    """`n` processes of `each` devices; `of[i]` are arguments of process i alone."""
    join = (f"--coordinator=localhost:{free_port()}", f"--num-processes={n}")
    return [
        pipelines.process(corpus, workdir, *FSDP, *join, f"--process-id={i}", *more,
                          *(of[i] if of else ()), env={**(env or {}), **devices.of(each)})
        for i in range(n)
    ]  # fmt: skip


def outcome(processes, timeout=400) -> tuple[list[int], list[str]]:
    errors = [process.communicate(timeout=timeout)[1] for process in processes]
    return [process.returncode for process in processes], errors


def compare(workdir, reference, models=tuple(MODELS)) -> None:
    """Losses and parameters, but for the order in which sums are taken."""
    for name in models:
        folder = MODELS[name]
        ours, theirs = (
            [
                json.loads(line)
                for line in (w / "metrics" / f"{name}.jsonl").read_text().splitlines()
            ]
            for w in (workdir, reference)
        )
        assert [r["step"] for r in ours] == [r["step"] for r in theirs]
        np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], 2e-4)
        mine, other = (dict(leaves(load_params(w / folder / "params")))
                       for w in (workdir, reference))  # fmt: skip
        for path, value in mine.items():
            np.testing.assert_allclose(value, other[path], atol=2e-3, err_msg=f"{name} {path}")


@pytest.mark.slow  # in the fast tier: meshes (test_sharding.py), and how processes meet (below)
def test_two_processes_train_what_one_does(corpus, finished, tmp_path):
    """Of two devices each, and what one device trains."""
    status, errors = outcome(together(corpus, tmp_path / "two", "--stages=target,spire"))
    assert status == [0, 0], errors
    compare(tmp_path / "two", finished, ("target", "spire"))


@pytest.mark.slow
def test_one_of_two_is_killed_and_one_alone_goes_on(corpus, finished, tmp_path):
    """Another number of processes, and a mesh whose devices lie elsewhere."""
    workdir = tmp_path / "killed"
    processes = together(corpus, workdir, "--stages=target,drafts")
    wait_for(workdir / "target" / "checkpoints" / "*6*", processes[0])
    processes[1].send_signal(signal.SIGKILL)
    status, _ = outcome(processes, 200)
    assert 0 not in status, "the other one does not go on alone, or hang"
    finish(corpus, workdir, *FSDP, "--stages=target,drafts", env=devices.of(4))
    compare(workdir, finished)


@pytest.mark.slow
def test_everything_in_two_processes(corpus, tmp_path):
    status, errors = outcome(together(corpus, tmp_path / "all"))
    assert status == [0, 0], errors
    assert (tmp_path / "all" / "report" / "index.html").is_file()


@pytest.mark.slow
def test_sigterm_to_one_of_two_stops_both(corpus, finished, tmp_path):
    workdir = tmp_path / "stopped"
    processes = together(corpus, workdir, "--stages=target,drafts")
    wait_for_a_record(workdir, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    status, errors = outcome(processes, 120)
    assert status == [PREEMPTED] * 2 and all("after step" in error for error in errors), errors
    assert outcome(together(corpus, workdir, "--stages=target,drafts"))[0] == [0, 0]
    compare(workdir, finished)


def test_workers_that_disagree_are_named(corpus, tmp_path):
    of = ((), ("--config.train.peak_lr=0.5",))
    status, errors = outcome(together(corpus, tmp_path / "w", of=of), 120)
    assert status == [2, 2]
    for error in errors:
        assert "worker 1 has config.train.peak_lr 0.5, not " in error
    assert not (tmp_path / "w" / "target").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--coordinator=localhost:1", "--num-processes=2", "--process-id=1"], "cannot be reached"),
        (["--coordinator=here", "--num-processes=2", "--process-id=1"], "HOST:PORT"),
        (["--coordinator=localhost:1", "--process-id=1"], "together"),
        (["--coordinator=localhost:1", "--num-processes=2", "--process-id=2"], "none of 0 to 1"),
    ],
)
def test_processes_that_cannot_meet(corpus, tmp_path, capsys, arguments, says):
    status = pipelines.main(corpus, tmp_path / "w", "--connect-timeout=1", *arguments)
    error = capsys.readouterr().err
    assert status == 2 and says in error and "Traceback" not in error

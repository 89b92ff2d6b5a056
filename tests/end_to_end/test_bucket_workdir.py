"""A work directory in a bucket: the pipeline as in a folder, killed, in two processes, cut off."""

import json
import pathlib
import signal
import threading
import time

import pipelines
import pytest
from buckets import MISSING, bucket
from test_processes import compare, outcome, together
from test_resume import check_equal, finish

from spire_jax.storage.checkpoint_files import COMMIT_FILE

WORKDIR = "gs://bucket/runs/tiny"
TIMED = {"machine", "seconds", "peak_memory_bytes", "training"}


def fetched(objects, folder: pathlib.Path) -> pathlib.Path:
    """The work directory as files."""
    for name, content in list(objects.items()):
        path = folder / name.removeprefix("runs/tiny/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def wait_for_object(served, process, name: str, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while f"runs/tiny/{name}" not in served.objects:
        assert process.poll() is None and time.monotonic() < deadline, f"{name} never came"
        time.sleep(0.002)


def figures(workdir: pathlib.Path) -> dict:
    """What a summary says, but for what the clock said."""
    summary = json.loads((workdir / "report" / "summary.json").read_text())
    for method in summary["methods"].values():
        for key in [key for key in method if key.startswith("measured")]:
            del method[key]
    return {key: value for key, value in summary.items() if key not in TIMED}


@pytest.mark.slow  # in the fast tier what it is made of: test_bucket.py
def test_killed_and_resumed_a_bucket_holds_what_a_folder_does(corpus, finished, tmp_path):
    with bucket() as served:
        process = pipelines.process(corpus, WORKDIR, env=served.environment)
        wait_for_object(served, process, f"target/checkpoints/9/{COMMIT_FILE}")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert f"runs/tiny/target/params/{COMMIT_FILE}" not in served.objects, "killed too late"
        error = finish(corpus, WORKDIR, env=served.environment)
        assert "target: 1/24" not in error, "it began anew"
        workdir = fetched(served.objects, tmp_path / "fetched")
    check_equal(workdir, finished)
    assert figures(workdir) == figures(finished)
    for path in (finished / "eval").glob("*.jsonl"):
        assert (workdir / "eval" / path.name).read_bytes() == path.read_bytes()
    assert (workdir / "config.json").exists() and (workdir / "report" / "index.html").exists()
    assert len(list((workdir / "tensorboard" / "target").iterdir())) == 1


@pytest.mark.slow
def test_every_stage_and_again(corpus, tmp_path):
    """Continuations and a study too; what is finished is not done again, old results are kept."""
    more = ("--config.continuations.rows=10", "--config.continuations.prompt=8",
            "--config.continuations.batch_size=4", "--config.study.of=spire",
            "--config.study.ablations=no_feedback", "--config.study.trained_k=",
            "--config.study.seeds=1", "--config.study.context_length=16",
            "--config.study.contexts=4", "--config.study.detectable=2")  # fmt: skip
    finish(corpus, tmp_path / "folder", *more)
    with bucket() as served:
        finish(corpus, WORKDIR, *more, env=served.environment)
        before = dict(served.objects)
        assert "runs/tiny/continuations/tokens.zarr/zarr.json" in before
        finish(corpus, WORKDIR, *more, env=served.environment)
        assert served.objects == before
        again = finish(corpus, WORKDIR, *more, "--config.decode.k=2",
                       "--stages=evaluate,report", env=served.environment)  # fmt: skip
        kept = {name.split("/")[2] for name in served.objects} - {n.split("/")[2] for n in before}
        assert {name.split("-")[0] for name in kept} == {"eval", "report"}
        assert all(name in again for name in kept)
    workdir = fetched(before, tmp_path / "fetched")
    check_equal(workdir, tmp_path / "folder")
    assert figures(workdir) == figures(tmp_path / "folder")
    studies = [json.loads((w / "study" / "study.json").read_text())
               for w in (workdir, tmp_path / "folder")]  # fmt: skip
    assert [study.pop("machine") for study in studies] and studies[0] == studies[1]


@pytest.mark.slow
def test_two_processes_and_one_bucket(corpus, finished, tmp_path):
    """One of them is killed after a while, both start again."""
    with bucket() as served:
        stages = "--stages=target,drafts"
        processes = together(corpus, WORKDIR, stages, env=served.environment)
        wait_for_object(served, processes[0], f"target/checkpoints/6/{COMMIT_FILE}")
        processes[1].send_signal(signal.SIGKILL)
        assert 0 not in outcome(processes, 200)[0]
        status, errors = outcome(together(corpus, WORKDIR, env=served.environment), 900)
        assert status == [0, 0], errors
        workdir = fetched(served.objects, tmp_path / "fetched")
        assert (workdir / "report" / "index.html").exists()
    compare(workdir, finished)


@pytest.mark.slow
def test_a_bucket_that_is_not_there_ends_both_processes(corpus):
    with bucket() as served:
        processes = together(corpus, f"gs://{MISSING}/tiny", env=served.environment)
        status, errors = outcome(processes, 120)
    assert status == [2, 2], errors
    assert f"worker 0: error: --workdir=gs://{MISSING}/tiny cannot be written" in errors[0]
    assert "worker 1: error: worker 0 cannot go on" in errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["silent", "dead"])
@pytest.mark.parametrize("at", [f"target/checkpoints/6/{COMMIT_FILE}",
                                "target/checkpoints/6/_CHECKPOINT_METADATA"])  # fmt: skip
def test_a_bucket_that_fails_in_the_middle(corpus, finished, tmp_path, how, at):
    """Between saves and within one: an error within a minute, and the run goes on later."""
    with bucket() as served:
        process = pipelines.process(corpus, WORKDIR, "--stages=target", env=served.environment)
        wait_for_object(served, process, at)
        setattr(served, how, True)
        begin = time.monotonic()
        _, error = process.communicate(timeout=200)
        assert time.monotonic() - begin < 90, "a minute, and an exit on busy cores"
        assert process.returncode == 2 and "Traceback" not in error, error
        assert "error: " in error and "gs://bucket/runs/tiny" in error
        setattr(served, how, False)
        served.gone.set()  # who waits, goes
        served.gone = threading.Event()
        error = finish(corpus, WORKDIR, "--stages=target", env=served.environment)
        assert "target: 1/24" not in error, "it began anew"
        check_equal(fetched(served.objects, tmp_path / "fetched"), finished, ("target",))

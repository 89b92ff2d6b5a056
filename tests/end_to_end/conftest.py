"""One finished run, shared by the tests that only look at it or copy it."""

import fcntl
import os

import pipelines
import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return pipelines.write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers: the first to come makes the run, the others wait
    workdir, done = base / "finished-run", base / "finished-run.ok"
    with open(base / "finished-run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            # In a process of its own, as those that are held against it to the bit.
            process = pipelines.process(corpus, workdir)
            assert process.wait() == 0, process.stderr and process.stderr.read()
            done.touch()
    return workdir

"""One finished run, shared by the tests that only look at it or copy it."""

import fcntl
import os
import pathlib
from collections.abc import Callable

import pipelines
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One file makes the finished run; those that would wait for it come after those that need not.

    xdist hands files out in this order.
    """
    needing = list(dict.fromkeys(
        item.path for item in items if "finished" in getattr(item, "fixturenames", ())
    ))  # fmt: skip
    items.sort(key=lambda item: ("end_to_end" not in item.path.parts, item.path in needing[1:]))


def made_once(tmp_path_factory, name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
    """A folder of all workers: the first to come makes it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name, base / f"{name}.ok"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    # One for all, since its path is in what a run writes.
    return made_once(tmp_path_factory, "corpus", pipelines.write_corpus)


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory):
    def make(workdir: pathlib.Path) -> None:
        # In a process of its own, as those that are held against it to the bit.
        process = pipelines.process(corpus, workdir)
        assert process.wait() == 0, process.stderr and process.stderr.read()

    return made_once(tmp_path_factory, "finished-run", make)

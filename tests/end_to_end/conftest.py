"""One finished run, shared by the tests that only look at it or copy it."""

import fcntl
import os
import pathlib
from collections.abc import Callable

import jax
import pipelines
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Of every program, however small; the names are jax's, for its options and for the environment.
KEPT = {"jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1}  # fmt: skip


def of_all_workers(tmp_path_factory):
    """A folder for what one worker makes and all use."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def programs(tmp_path_factory):
    """Where these tests, and the processes that they start, keep what they have compiled.

    It starts empty with every run of the tests. The same pipeline runs a dozen times, and half of
    its time is compilation.
    """
    folder = str(of_all_workers(tmp_path_factory) / "xla")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**KEPT, "jax_compilation_cache_dir": folder}.items():
            environment.setenv(name.upper(), str(value))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def kept_programs(programs):
    """This process reads and writes them too, while it runs tests of this folder."""
    before = {name: getattr(jax.config, name) for name in KEPT}
    for name, value in {**KEPT, "jax_compilation_cache_dir": programs}.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax looks once whether there is one
    yield
    for name, value in {**before, "jax_compilation_cache_dir": None}.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def made_once(tmp_path_factory, name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
    """A folder of all workers: the first to come makes it, the others wait."""
    base = of_all_workers(tmp_path_factory)
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
def finished(corpus, programs, tmp_path_factory):
    def make(workdir: pathlib.Path) -> None:
        # In a process of its own, as those that are held against it to the bit.
        process = pipelines.process(corpus, workdir)
        assert process.wait() == 0, process.stderr and process.stderr.read()

    return made_once(tmp_path_factory, "finished-run", make)

"""What holds for all tests: the CPU, shapes checked at run time, two tiers, how programs compile.

Programs are optimized as little as XLA can: most of the time goes into compiling them, and no test
hangs on more than rounding. JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs the tests as users compile.

There is one device; a test of a mesh starts a process of its own (`devices.py`), since more
devices here would split one CPU's threads for every other test.

Compiled programs are kept in a folder that begins empty with each run of the tests and ends with
it, and that all its workers and the processes that they start share. Beyond a run they are not
kept: programs of an earlier run, or of another CPU, should not lie under tests that ask for equal
bits.
"""

import atexit
import gc
import itertools
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "TESTS_PROGRAMS" not in os.environ:  # the first process; the others inherit
    os.environ["TESTS_PROGRAMS"] = programs = tempfile.mkdtemp(prefix="programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    # However small, where writing it takes less than compiling it again.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Packages before the hook, under which what they import would be compiled from its source.
import flax.nnx  # noqa: F401
import grain  # noqa: F401
import hypothesis
import jax
import jax.experimental.pallas.mosaic_gpu
import jaxtyping
import matplotlib.pyplot  # noqa: F401
import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import tensorboardX  # noqa: F401
import tokenizers  # noqa: F401

# Before the first import: annotated shapes and dtypes are checked at each call, where arrays are.
_ARRAYS = ("models", "pretrained", "data", "drafting", "decoding", "training", "serving")
jaxtyping.install_import_hook(
    ["pallas_kernels", *(f"spire_jax.{name}" for name in _ARRAYS)], "beartype.beartype"
)

from paper_numbers import PAPER_67M, PAPER_70B  # noqa: E402

from launch.compile.tpu_compiler import NoCompiler, find_libtpu  # noqa: E402
from spire_jax.config import files  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long tests too")


def pytest_configure(config: pytest.Config) -> None:
    full = config.getoption("--full")
    hypothesis.settings.register_profile(
        "tests", max_examples=1000 if full else 50, derandomize=not full, deadline=None,
        database=None, suppress_health_check=list(hypothesis.HealthCheck), print_blob=True,
    )  # fmt: skip
    hypothesis.settings.load_profile("tests")
    # A program in one piece: 32 for other threads cost a busy core a seventh more. And XLA's older
    # code generator compiles in 3/5 of the time; jax 0.11 has it no more.
    flags = ["--xla_cpu_parallel_codegen_split_count=1"]
    if jax.__version_info__ < (0, 11) and not full:
        flags.append("--xla_cpu_use_fusion_emitters=false")
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in flags if flag not in given)])
    # Tracing makes objects by the million, which the collector's own pace would walk all the time.
    gc.set_threshold(50_000, 20, 50)


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("--full"):
        return "tier: full"
    return "tier: fast; tests marked slow are left out (--full runs them)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs_jax"):
        (version,) = mark.args
        if jax.__version_info__ < tuple(map(int, version.split("."))):
            pytest.skip(f"jax {jax.__version__}: needs {version} or later")


@pytest.fixture(scope="module", autouse=True)
def released_programs():
    """Compiled programs go, at the end of a file, when there are many.

    XLA's CPU compiler maps memory for every function. A process may have 65,530 maps (Linux's
    vm.max_map_count); without this one worker reaches them, and the compiler ends in a
    segmentation fault.
    """
    yield
    release(15_000)


_FINISHED = itertools.count(1)


@pytest.hookimpl(trylast=True)  # when what the test has patched is as it was
def pytest_runtest_teardown() -> None:
    """... and within a file of hundreds of programs (the kernels' in the full tier)."""
    if next(_FINISHED) % 20 == 0:
        release(40_000)


def release(most: int) -> None:
    """Let all compiled programs go where they have mapped more than this."""
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > most:
        jax.clear_caches()


@pytest.fixture(scope="session")
def pair():
    """The paper's target of 67M parameters and its drafts."""
    return files.load(PAPER_67M)


@pytest.fixture(scope="session")
def llama():
    """The paper's Llama 3 70B and its drafts."""
    return files.load(PAPER_70B)


@pytest.fixture(scope="session")
def libtpu():
    """The TPU compiler; what needs it is skipped where it does not install."""
    try:
        find_libtpu()
    except NoCompiler as error:
        pytest.skip(str(error))

"""The lock files beside the ranges, and what the ranges promise."""

import pathlib
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = pathlib.Path(__file__).parent.parent
LOCKS = sorted((ROOT / "constraints").glob("python*.txt"))


def ranges(name: str) -> list[Requirement]:
    """The requirements of a list and of those it includes."""
    found: list[Requirement] = []
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("-r "):
            found += ranges(line.removeprefix("-r ").strip())
        elif line and not line.startswith("#"):
            found.append(Requirement(line))
    return found


def entries(lock: pathlib.Path) -> dict[str, tuple[Version, list[str]]]:
    """Package -> its version and hashes; a line that is neither a pin nor a hash is an error."""
    text = lock.read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9-]+)==(\S+)((?: +--hash=sha256:[0-9a-f]{64})+) *", line)
        assert match, f"{lock.name}: {line[:80]!r} is no pinned package with hashes"
        found[match[1]] = Version(match[2]), match[3].split()
    return found


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_there_is_a_lock_for_every_python_that_is_tested():
    assert [lock.name for lock in LOCKS] == [f"python3.{n}.txt" for n in (11, 12, 13)]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_meets_the_ranges(lock):
    found = entries(lock)
    for requirement in ranges("requirements-test.txt"):
        name = normalized(requirement.name)
        assert name in found, f"{lock.name} lacks {name}; run launch/lock.sh"
        version = found[name][0]
        assert requirement.specifier.contains(version), f"{lock.name}: {name}=={version}"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_names_no_place_to_fetch_from(lock):
    text = lock.read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text


def test_the_ranges_hold_from_the_oldest_jax_to_the_newest():
    """The lock of Python 3.11 is at jax 0.10, the last for it; the others are beyond."""
    jax = {lock.stem: entries(lock)["jax"][0] for lock in LOCKS}
    assert jax["python3.11"] in SpecifierSet("~=0.10.0")
    assert all(jax[python] >= Version("0.12") for python in ("python3.12", "python3.13"))


# --- our own warnings are errors -----------------------------------------------------------------


@pytest.mark.parametrize("package", ["spire_jax", "pallas_kernels", "launch"])
def test_a_warning_in_our_own_module_fails_a_test(tmp_path, package):
    """Whatever its category and however deep the module; one of another's module passes."""
    inner = tmp_path / package / "inner"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").touch()
    warn = "import warnings\n\ndef old():\n    warnings.warn('old', {}, stacklevel=1)\n"
    (inner / "module.py").write_text(warn.format("DeprecationWarning"))
    (tmp_path / "someone_elses.py").write_text(warn.format("DeprecationWarning"))
    (tmp_path / "test_it.py").write_text(
        f"import {package}.inner.module, someone_elses\n"
        f"def test_ours(): {package}.inner.module.old()\n"
        f"def test_theirs(): someone_elses.old()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:xdist",
         "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "test_it.py"],
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "FAILED test_it.py::test_ours - DeprecationWarning: old" in done.stdout

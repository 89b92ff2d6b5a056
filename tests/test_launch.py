"""The launch scripts, with stubs in place of Python and of the tools: no network."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
TOOLS = "bash sed cat mktemp rm mkdir find dirname sleep cp touch kill"

# Stands for every Python. It notes what it is asked to do; a file beside it, named after it with
# ".is", says what it lacks or how pip ends.
STUB = f"""#!/bin/bash
is="$(cat "$0.is" 2>/dev/null)"
case "$1 ${{2:-}}" in
  "-m venv")
    echo "venv" >>"$STUB_LOG"
    mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/pyvenv.cfg" "$3/has-pip" ;;
  "-m pip")
    [[ "$*" == *--require-hashes* ]] && hashed=" hashed"
    echo "pip ${{*: -1}}${{hashed:-}}" >>"$STUB_LOG"
    case "${{STUB_PIP:-}}" in
      fail) echo "ERROR: no network" >&2; exit 1 ;;
      killed) kill -9 $PPID; exit 1 ;;
      slow) sleep 1 ;;
    esac ;;
  "-m "*) echo "run $$ ${{JAX_PLATFORMS-unset}} $PWD ${{*:2}}" >>"$STUB_LOG"
    exit "${{STUB_STATUS:-0}}" ;;
  *)
    [[ "$is" != *broken* ]] || exit 127
    version="${{STUB_VERSION:-3.12.1}}"
    case "$2" in
      *'print("%d'*) [[ "$is" == *old* ]] && echo 3.9.1 || echo "$version" ;;
      *"version_info < "*) [[ "$is" != *old* ]] ;;
      *ensurepip*) [[ "$is" != *bare* ]] ;;
      *'distribution("pip")'*) [[ -e "$(dirname "$0")/../has-pip" ]] ;;
      *) exec "{sys.executable}" "$@" ;;
    esac ;;
esac
"""


class Place:
    """A copy of the scripts with requirements of its own, and a PATH of stubs alone."""

    def __init__(self, folder: pathlib.Path):
        self.root, self.bin, self.log = folder / "a repo", folder / "bin", folder / "log"
        self.venv = self.root / ".venv"
        for name in ("launch", ".ci", "constraints"):
            shutil.copytree(ROOT / name, self.root / name)
        (self.root / "requirements.txt").write_text("jax\n")
        (self.root / "requirements-test.txt").write_text("-r requirements.txt\npytest\n")
        self.bin.mkdir()
        for tool in TOOLS.split():
            (self.bin / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")

    def python(self, name="python3", lacks="", folder=None):
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUB)
        path.chmod(0o755)
        if lacks:
            pathlib.Path(f"{path}.is").write_text(lacks)
        return path

    def env(self, **more):
        return {"PATH": str(self.bin), "STUB_LOG": str(self.log), **more}

    def run(self, script, *arguments, cwd="/", **env):
        return subprocess.run(
            ["bash", str(self.root / script), *arguments],
            cwd=cwd, env=self.env(**env), capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def done(self):
        """What the stubs were asked to do since the last look."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def set_up(place, *arguments, **env):
    result = place.run("launch/setup.sh", *arguments, **env)
    assert result.returncode == 0, result.stderr
    return place.done()


def test_set_up_once(place):
    place.python()
    assert set_up(place) == ["venv", "pip requirements.txt"]
    again = place.run("launch/setup.sh")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert place.done() == []


def test_what_is_here_can_be_imported_from_anywhere(place):
    """Also by an environment that was made before, or of a folder that has moved; offline."""
    place.python()
    set_up(place)
    packages = place.venv / "lib/python3.12/site-packages"
    code = "import site, sys; site.addsitedir(sys.argv[1]); import launch; print(*launch.__path__)"
    for before in (None, "", "/elsewhere\n"):
        if before is not None:
            (packages / "spire_jax.pth").write_text(before)
            assert place.run("launch/setup.sh", STUB_PIP="fail").returncode == 0
            assert place.done() == []
        found = subprocess.run([sys.executable, "-I", "-S", "-c", code, packages], cwd="/",
                               capture_output=True, text=True)  # fmt: skip
        assert found.stdout == f"{place.root}/launch\n", found.stderr


def test_installs_again_when_a_list_or_python_has_changed(place):
    place.python()
    set_up(place)
    assert set_up(place, "requirements-test.txt") == ["pip requirements-test.txt"]
    assert set_up(place) == set_up(place, "requirements-test.txt") == []
    (place.root / "requirements-test.txt").write_text("-r requirements.txt\npytest>9\n")
    assert set_up(place) == []
    assert set_up(place, "requirements-test.txt") == ["pip requirements-test.txt"]
    (place.root / "requirements.txt").write_text("jax>0.10\n")  # part of both lists
    assert set_up(place, "requirements-test.txt") == ["pip requirements-test.txt"]
    assert set_up(place) == []
    assert set_up(place, STUB_VERSION="3.12.2") == ["pip requirements.txt"]


@pytest.mark.parametrize("what", ["no pip", "no python", "empty", "broken link"])
def test_a_half_made_environment_is_made_again(place, what):
    place.python()
    set_up(place)
    if what == "no pip":
        (place.venv / "has-pip").unlink()
    elif what == "no python":
        (place.venv / "bin/python").unlink()
    elif what == "empty":
        shutil.rmtree(place.venv)
        place.venv.mkdir()
    else:  # Python itself was upgraded away
        (place.venv / "bin/python").unlink()
        (place.venv / "bin/python").symlink_to("/nowhere/python3")
    (place.venv / "left-over").touch()
    assert set_up(place) == ["venv", "pip requirements.txt"]
    assert not (place.venv / "left-over").exists()
    assert set_up(place) == []


def test_killed_while_installing(place):
    place.python()
    assert place.run("launch/setup.sh", STUB_PIP="killed").returncode < 0
    assert place.done() == ["venv", "pip requirements.txt"]
    assert set_up(place) == ["venv", "pip requirements.txt"]
    assert set_up(place) == []


def test_pip_fails(place):
    place.python()
    result = place.run("launch/setup.sh", STUB_PIP="fail")
    assert result.returncode == 1
    assert "ERROR: no network\nsetup: pip could not install requirements.txt" in result.stderr
    assert place.done() == ["venv", "pip requirements.txt"]
    assert set_up(place) == ["pip requirements.txt"]


def test_two_at_once_take_turns(place):
    place.python()
    command = ["bash", str(place.root / "launch/setup.sh")]
    both = [
        subprocess.Popen(command, env=place.env(STUB_PIP="slow"), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    texts = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("waiting for another set-up" in text for text in texts) == 1
    assert place.done().count("venv") == 1


def test_the_interpreter_is_the_first_suitable_one(place):
    place.python("python3", lacks="old")
    place.python("python3.13", lacks="broken")
    place.python("python3.11", lacks="bare")
    nothing = place.run("launch/setup.sh")
    assert nothing.returncode == 1
    assert place.done() == []
    for reason in (
        "python3: 3.9.1 is older than 3.11", "python3.13: does not run", "python3.12: not found",
        "python3.11: 3.12.1 lacks venv or ensurepip (on Debian and Ubuntu: apt install",
        "PYTHON=/path/to/python",
    ):  # fmt: skip
        assert reason in nothing.stderr
    place.python("python3.12")
    result = place.run("launch/setup.sh")
    assert result.returncode == 0
    assert f"with {place.bin}/python3.12 (3.12.1)" in result.stderr


def test_python_can_be_chosen(place):
    place.python()
    other = place.python("python", folder=place.root / "my pythons")
    result = place.run("launch/setup.sh", PYTHON=str(other))
    assert f"with {other} (3.12.1)" in result.stderr
    assert place.run("launch/setup.sh", PYTHON=str(other)).returncode == 0
    old = place.python("python", folder=place.root / "old", lacks="old")
    result = place.run("launch/setup.sh", PYTHON=str(old))
    assert result.returncode == 1
    assert f"PYTHON={old}: 3.9.1 is older than 3.11" in result.stderr
    place.done()
    (place.venv / "bin/python").write_text(STUB.replace("3.12.1", "3.13.0"))
    result = place.run("launch/setup.sh", PYTHON=str(other))
    assert result.returncode == 1
    assert "is 3.12.1, but .venv has 3.13.0; unset PYTHON or remove .venv" in result.stderr
    assert place.done() == []


def test_the_newest_python_has_an_environment_of_its_own(place):
    """Of those on the PATH and of pyenv, whatever python3 is."""
    nothing = place.run("launch/setup.sh", "--newest", HOME=str(place.root))
    assert nothing.returncode == 1 and place.done() == []
    assert nothing.stderr == ("setup: no suitable Python 3.12 or later. Install one, or name it: "
                              "PYTHON=/path/to/python\n")  # fmt: skip
    place.python()
    place.python("python3.12")
    of_pyenv = place.root / ".pyenv/versions"
    place.python("python3.13", folder=of_pyenv / "3.13.7/bin")
    place.python("python3.14", lacks="broken", folder=of_pyenv / "3.14.0/bin")
    result = place.run("launch/setup.sh", "--newest", HOME=str(place.root))
    assert f"making .venv-newest with {of_pyenv}/3.13.7/bin/python3.13" in result.stderr
    assert place.done() == ["venv", "pip requirements.txt"] and not place.venv.exists()
    assert place.run("launch/setup.sh", "--newest").stderr == ""
    old = place.run("launch/setup.sh", "--newest", PYTHON=str(place.python("old", lacks="old")))
    assert old.returncode == 1 and "is older than 3.12" in old.stderr


def test_an_unknown_list(place):
    result = place.run("launch/setup.sh", "requirement.txt")
    assert result.returncode == 1
    assert result.stderr == "setup: there is no list of requirements called requirement.txt\n"


def test_a_lock_is_installed_by_hash_and_only_when_it_has_changed(place):
    """That of .venv's Python; the ranges are met by it, and asked for all the same."""
    place.python()
    lock = "pip constraints/python3.12.txt hashed"
    assert set_up(place, "--locked") == ["venv", lock]
    assert set_up(place, "--locked") == []
    assert set_up(place) == ["pip requirements.txt"]
    assert set_up(place, "--locked") == []
    (place.root / "constraints/python3.12.txt").write_text("jax==0.12.1 --hash=sha256:0\n")
    assert set_up(place, "--locked") == [lock]
    shutil.rmtree(place.venv)
    assert set_up(place, "--locked", STUB_VERSION="3.11.4") == [
        "venv", "pip constraints/python3.11.txt hashed",
    ]  # fmt: skip


def test_no_lock_for_this_python(place):
    place.python()
    result = place.run("launch/setup.sh", "--locked", STUB_VERSION="3.15.0")
    assert result.returncode == 1 and place.done() == []
    assert result.stderr.startswith(
        "setup: --locked: there is no constraints/python3.15.txt (3.15.0); there are python3.11.txt"
    )
    assert "or leave --locked out" in result.stderr
    result = place.run("launch/setup.sh", "--locked", "requirements.txt")
    assert result.returncode == 1 and "leave out requirements.txt" in result.stderr


# --- quickstart ----------------------------------------------------------------------------------


def quickstart(place, *arguments, **env):
    command = ["bash", str(place.root / "launch/quickstart.sh"), *arguments]
    process = subprocess.Popen(command, cwd="/", env=place.env(**env), stderr=subprocess.PIPE)
    process.communicate(timeout=60)
    line = [line for line in place.done() if line.startswith("run")][-1]
    assert line.startswith(f"run {process.pid} "), "python did not take the place of the script"
    return process.returncode, line.removeprefix(f"run {process.pid} ")


def test_quickstart_runs_from_the_root_and_passes_on_what_it_is_given(place):
    place.python()
    code, line = quickstart(place, "--config.train.steps=5", "--stages=target", STUB_STATUS="3")
    assert code == 3
    assert line == (
        f"cpu {place.root} spire_jax.run --config=configs/quickstart.py "
        "--workdir=runs/quickstart --config.train.steps=5 --stages=target"
    )
    assert "--workdir=/else where" in quickstart(place, WORKDIR="/else where")[1]


def test_study_gets_its_corpus_and_tokenizer_before_it_runs(place):
    place.python()
    where = f"cpu {place.root}"

    def study(*arguments, **env):
        result = place.run("launch/study.sh", *arguments, **env)
        lines = [line.partition(" ")[2].partition(" ")[2] for line in place.done()
                 if line.startswith("run ")]  # fmt: skip
        return result.returncode, lines

    fetch = (f"{where} launch.fetch_packages --list=configs/python_packages.txt "
             "--out=data/python_packages")  # fmt: skip
    learn = (f"{where} launch.train_tokenizer --config=configs/study.py "
             "--out=data/python_bpe_4096.json")  # fmt: skip
    run = f"{where} spire_jax.run --config=configs/study.py --workdir=runs/study"
    given = ("--config.study.seeds=1", "--stages=target")
    assert study(*given) == (0, [fetch, learn, f"{run} {given[0]} {given[1]}"])
    assert study(STUB_STATUS="3") == (3, [fetch])  # a failure is the end
    # Figures as soon as there is a report, with the same config; a tokenizer is kept.
    (place.root / "data").mkdir()
    (place.root / "data/python_bpe_4096.json").touch()
    (place.root / "runs/study/report").mkdir(parents=True)
    (place.root / "runs/study/report/summary.json").touch()
    figures = (f"{where} spire_jax.figures --config=configs/study.py --workdir=runs/study "
               f"--out=runs/study/figures {given[0]}")  # fmt: skip
    assert study(*given) == (0, [fetch, f"{run} {given[0]} {given[1]}", figures])


def test_the_study_of_drafts_ends_in_its_tables(place):
    place.python()
    (place.root / "runs/study_drafts/report").mkdir(parents=True)
    (place.root / "runs/study_drafts/report/summary.json").touch()
    result = place.run("launch/study_drafts.sh", "--config.drafts.dspark=", "--stages=report")
    assert result.returncode == 0
    lines = [line.partition(f" {place.root} ")[2].split() for line in place.done()
             if line.startswith("run ")]  # fmt: skip
    assert [line[0] for line in lines] == [
        "launch.fetch_packages", "launch.train_tokenizer", "spire_jax.run",
        "launch.bench.tau_by_tokens", "launch.draft_tables",
    ]  # fmt: skip
    assert lines[1][1] == "--config=configs/study.py"  # whose tokenizer it is
    for line in lines[2:]:
        assert line[1] == "--config=configs/study_drafts.py" and "--config.drafts.dspark=" in line
    assert "--stages=report" in lines[2] and "--stages=report" not in lines[4]


def test_quickstart_leaves_the_platform_to_jax_where_there_is_a_choice(place):
    place.python()
    assert quickstart(place)[1].startswith("cpu ")
    assert quickstart(place, JAX_PLATFORMS="tpu")[1].startswith("tpu ")
    packages = place.venv / "lib/python3.12/site-packages"
    for plugin in ("jax_plugins/xla_cuda13", "libtpu"):
        (packages / plugin).mkdir(parents=True)
        assert quickstart(place)[1].startswith("unset ")
        shutil.rmtree(packages)
    assert quickstart(place)[1].startswith("cpu ")


# --- tests ---------------------------------------------------------------------------------------


def tools(place):
    """ruff and mypy as stubs that note their arguments and fail on demand."""
    place.python()
    set_up(place, "requirements-test.txt")
    for name in ("ruff", "mypy"):
        path = place.venv / "bin" / name
        path.write_text(
            f'#!/bin/bash\necho "{name} $*" >>"$STUB_LOG"\necho "{name} says so"\n'
            f'[[ "{name} $*" != "$STUB_FAILS"* ]]\n'
        )
        path.chmod(0o755)


def test_linter_then_types_beside_the_tests(place):
    tools(place)
    result = place.run("launch/test.sh", "--full", "-k", "sink", STUB_FAILS="none", STUB_STATUS="5")
    assert result.returncode == 5
    libtpu, *linter, one, other = place.done()
    assert libtpu.startswith("pip libtpu==")
    assert linter == ["ruff check .", "ruff format --check ."]
    types, tests = sorted((one, other))
    assert types == "mypy " and " pytest " in tests and tests.endswith(" --full -k sink")


@pytest.mark.parametrize("failing", ["ruff check", "ruff format"])
def test_a_linter_that_fails_stops_the_rest(place, failing):
    tools(place)
    assert place.run("launch/test.sh", STUB_FAILS=failing).returncode == 1
    assert place.done()[-1].startswith(failing)


def test_types_that_are_wrong_are_said_after_the_tests(place):
    tools(place)
    result = place.run("launch/test.sh", STUB_FAILS="mypy")
    assert result.returncode == 1 and result.stdout.endswith("mypy says so\n")
    assert any(" pytest " in line for line in place.done())
    assert place.run("launch/test.sh", STUB_FAILS="mypy", STUB_STATUS="5").returncode == 5


def test_the_tpu_compiler_is_set_up_once_and_tests_run_without_it(place):
    """What jax[tpu] requires of it, apart from the packages that jax looks for TPUs with."""
    tools(place)
    result = place.run("launch/test.sh", STUB_FAILS="none", STUB_PIP="fail")
    assert result.returncode == 0 and "tests that compile for TPUs are skipped" in result.stderr
    assert any(" pytest " in line for line in place.done())
    assert place.run("launch/setup/libtpu.sh").returncode == 0
    (installed,) = place.done()
    assert installed.startswith("pip libtpu==") and (place.venv / "libtpu").is_dir()
    assert place.run("launch/setup/libtpu.sh").returncode == 0
    assert place.done() == []


def test_ci_runs_the_fast_tier(place):
    tools(place)
    assert place.run(".ci/run", STUB_FAILS="none").returncode == 0
    workers = "-n logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder"
    assert any(line.endswith(f" pytest {workers}") for line in place.done())


def test_what_needs_a_newer_jax_runs_with_the_newest_python(place):
    place.python("python3.13")
    result = place.run("launch/test.sh", "--newest", "--full", STUB_STATUS="5")
    assert result.returncode == 5 and f"jax {jax.__version__}\n" in result.stderr
    *installed, last = place.done()
    assert installed == ["venv", "pip requirements-test.txt"]
    assert last.endswith(" pytest -n logical --maxprocesses=4 -m needs_jax --full")
    assert not place.venv.exists()


def test_scripts_are_in_order():
    scripts = [*sorted((ROOT / "launch").rglob("*.sh")), ROOT / ".ci" / "run"]
    for script in scripts:
        if script.name not in ("common.sh", "environment.sh"):  # sourced
            assert os.access(script, os.X_OK) and "set -euo pipefail" in script.read_text(), script
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout

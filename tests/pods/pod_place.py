"""Where the tests of launch/pods run a launcher: a repository, a PATH of stubs, a cloud."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from pod_stubs import PROGRAMS

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "--config=configs/quickstart.py"
BUCKET = [CONFIG, "--workdir=gs://bucket/run"]
TPU = ["--name=my-tpu", "--zone=us-west4-a"]
NEW_TPU = [*TPU, "--type=v5litepod-16"]
UP = ["cloud_tpu", "up", *NEW_TPU, "--", *BUCKET]
COSTS = "STILL RUNNING AND COSTING MONEY"
NASTY = ["--set=a b", "--set=it's", '--set="$(touch pwned)"', "--set=`touch pwned`;&|*", "--set="]


# Tests in the background of a shell, or under nohup, ignore some signals, which bash cannot trap.
HEEDING = """import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""

PROGRAM = f"""#!{sys.executable} -IS
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
from pod_stubs import Program
Program([sys.argv[0].rpartition("/")[2], *sys.argv[1:]]).run()
"""
# All that there is beside the stubs: no cloud's real program, wherever it may be installed.
TOOLS = ("awk basename bash cat cksum cp cut dirname find grep gzip head hostname mkdir mktemp mv "
         "nohup ps rm sed setsid sleep tail tar touch tr uname")  # fmt: skip

# Stands for every Python of a machine. Runs of spire_jax are noted in $HOME/runs, and end with the
# statuses of $STUB_RUN in turn; "term" waits for SIGTERM and ends with 75.
PYTHON = f"""#!/bin/bash
case "$1 ${{2:-}}" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/pyvenv.cfg" ;;
  "-m pip") echo "${{*:3}}" >>"$HOME/pip" ;;
  "-m uv") echo "uv ${{*:3}}" >>"$HOME/pip"; [[ "$4" != find ]] || echo "$HOME/newer/python3" ;;
  "-m spire_jax.run") exec {sys.executable} -IS "$HOME/run.py" "${{@:3}}" ;;
  "-c "*'print("%d'*) echo 3.12.1 ;;
  "-c "*version_info*) [[ -z "${{STUB_OLD:-}}" || "$0" == */newer/* ]] ;;
  "-c "*'distribution("pip")'*) [[ -e "$(dirname "$0")/../pyvenv.cfg" ]] ;;
  *) exec {sys.executable} -IS "$@" ;;
esac
"""
RUN = """import json, os, pathlib, signal, sys, time
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
runs = pathlib.Path(os.environ["HOME"], "runs")
with open(runs, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
count = len(runs.read_text().splitlines())
print("step 10", flush=True)
status = (os.environ["STUB_RUN"].split(",") + ["0"] * count)[count - 1]
if status == "term":
    time.sleep(60)
sys.exit(int(status))
"""


def make_machine(home: pathlib.Path) -> pathlib.Path:
    """A home directory with a Python in its bin."""
    (home / "bin").mkdir(parents=True)
    for name, text in (("bin/python3", PYTHON), ("run.py", RUN)):
        (home / name).write_text(text)
        (home / name).chmod(0o755)
    return home


def make_programs(folder: pathlib.Path) -> pathlib.Path:
    """A directory for the PATH with all programs."""
    folder.mkdir(parents=True)
    for name in PROGRAMS:
        (folder / name).write_text(PROGRAM)
        (folder / name).chmod(0o755)
    return folder


class Cloud:
    """What the programs share: TPUs, workloads, jobs, and the notes of their calls."""

    def __init__(self, folder: pathlib.Path, workers: int = 2):
        self.folder = folder
        for i in range(workers):
            make_machine(folder / f"worker{i}")

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def mistakes(self) -> str:
        path = self.folder / "mistakes"
        return path.read_text() if path.exists() else ""

    def costs(self) -> list[str]:
        """What is there, and would cost money."""
        return [name for name in ("tpu", "request", "workload", "job") if
                (self.folder / name).exists()]  # fmt: skip

    def forget_calls(self) -> None:
        for name in ("calls", "counts"):
            (self.folder / name).unlink(missing_ok=True)

    def machine_runs(self, i: int) -> list[list[str]]:
        text = (self.folder / f"worker{i}" / "runs").read_text()
        return [json.loads(line) for line in text.splitlines()]


def copy_repository(source: pathlib.Path, target: pathlib.Path) -> None:
    """What the launchers need of this repository."""
    for name in ("launch", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(source / name, target / name, ignore=ignored)
    for name in ("requirements.txt", ".gitignore"):
        shutil.copy(source / name, target)


def make_stubs(folder: pathlib.Path) -> pathlib.Path:
    """Programs and tools for the PATH, and a repository of which each test gets a copy."""
    make_programs(folder / "programs")
    (folder / "tools").mkdir()
    for tool in TOOLS.split():
        (folder / "tools" / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
    repository = folder / "repository"
    repository.mkdir()
    copy_repository(ROOT, repository)
    for words in ("init -q", "add .", "-c user.name=n -c user.email=e commit -q -m all"):
        subprocess.run(["/usr/bin/git", *words.split()], cwd=repository, check=True)
    return folder


class Place:
    def __init__(self, stubs: pathlib.Path, folder: pathlib.Path):
        self.root, self.programs, self.tools = (
            folder / "a repo",
            stubs / "programs",
            stubs / "tools",
        )
        shutil.copytree(stubs / "repository", self.root)
        self.cloud = Cloud(folder / "cloud")
        self.home = make_machine(folder / "home")

    def env(self, rules=None, **more):
        env = {
            "PATH": f"{self.programs}:{self.home}/bin:{self.tools}", "HOME": str(self.home),
            "STUB_CLOUD": str(self.cloud.folder), "STUB_RULES": json.dumps(rules or {}),
            "STUB_RUN": "0", "STUB_TOOLS": str(self.tools), "POD_POLL": "0.02", "POD_PAUSE": "0",
            "POD_TICK": "0.05", "POD_TRIES": "3", "POD_UNREACHABLE": "3", "POD_STRAGGLERS": "2",
        }  # fmt: skip
        return env | more

    def popen(self, launcher, *arguments, rules=None, **env):
        return subprocess.Popen(
            [sys.executable, "-ISc", HEEDING, "/bin/bash",
             str(self.root / f"launch/pods/{launcher}.sh"), *arguments],
            cwd="/", env=self.env(rules, **env), text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, launcher, *arguments, rules=None, **env):
        process = self.popen(launcher, *arguments, rules=rules, **env)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def steps(self):
        """The calls, in short: program's last two words, or what host.sh is told over ssh."""
        steps = []
        for argv in self.cloud.calls():
            words = [word for word in argv if not word.startswith("-")]
            host = re.search(r"host\.sh (\S+)", " ".join(argv)) if "ssh" in argv else None
            gcloud = 5 + ("alpha" in argv) if "tpus" in argv else 3
            n = {"gcloud": gcloud, "xpk": 3, "git": 2}.get(argv[0], 1)
            steps.append(host[1] if host else " ".join(words[:n][-2:]))
        return steps


def wait_for(path):
    """Until something has been written there."""
    deadline = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path} has not come"
        time.sleep(0.02)


def interrupt(place, arguments, call, how=signal.SIGINT, **rule):
    """Ctrl-C, to the whole group of processes, while a call hangs."""
    process = place.popen(*arguments, rules={call: {"hang": True, **rule}})
    wait_for(place.cloud.folder / "hangs")
    os.killpg(process.pid, how)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr

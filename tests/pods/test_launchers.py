"""launch/pods but for Cloud TPUs, and what holds for all launchers, with stubs of the programs."""

import json
import os
import shlex
import shutil
import signal
import subprocess

import pytest
from pod_place import (
    BUCKET,
    CONFIG,
    COSTS,
    NASTY,
    NEW_TPU,
    TPU,
    UP,
    interrupt,
    wait_for,
)  # fmt: skip
from pod_stubs import PROGRAMS

WORKLOAD = ["--name=study", "--cluster=c", "--zone=us-west4-a", "--project=my-project"]
GKE_UP = ["gke", "up", *WORKLOAD, "--type=v5litepod-16", "--image=gcr.io/p/i", "--", *BUCKET]
SUBMIT = ["slurm", "submit", "--name=study", "--nodes=2", "--gpus-per-node=8", "--time=4:00:00",
          "--", CONFIG, "--workdir=/shared/run"]  # fmt: skip


# --- GKE -----------------------------------------------------------------------------------------


def test_a_workload_to_its_report(place):
    result = place.run(*GKE_UP)
    assert result.returncode == 0, result.stderr
    assert place.steps() == ["workload list", "workload create", "workload list", "storage cp"]
    create = place.cloud.calls()[1]
    assert {"--max-restarts=20", "--restart-on-exit-codes=75"} <= set(create)
    command = next(word for word in create if word.startswith("--command=")).partition("=")[2]
    # As xpk's container runs it: SIGTERM goes to the shell's process, which has to be python.
    script = f"({command}) & pid=$!; sleep 1; kill -TERM $pid; wait $pid"
    python = place.home / "bin/python"
    shutil.copy(place.home / "bin/python3", python)
    ended = subprocess.run(["bash", "-c", script], env=place.env(STUB_RUN="term"))
    assert ended.returncode == 75


def test_a_workload_from_a_base_image_holds_head(place):
    arguments = [word.replace("--image=gcr.io/p/i", "--base-image=python:3.12") for word in GKE_UP]
    result = place.run(*arguments, *NASTY[:2])
    assert result.returncode == 0, result.stderr
    source = place.root / "runs/pods/study/source"
    assert (source / "launch/pods/host.sh").exists() and not (source / ".git").exists()
    create = next(argv for argv in place.cloud.calls() if "create" in argv)
    command = next(word for word in create if word.startswith("--command=")).partition("=")[2]
    ended = subprocess.run(["bash", "-c", command], cwd=source, env=place.env())
    assert ended.returncode == 0
    runs = [json.loads(line) for line in (place.home / "runs").read_text().splitlines()]
    assert runs == [[*BUCKET, *NASTY[:2], "--distributed"]]


def test_the_home_folder_is_where_the_report_goes(place):
    at = GKE_UP.index("--")
    result = place.run(*GKE_UP[:at], "--out=~/my report", *GKE_UP[at:])
    assert result.returncode == 0, result.stderr
    (copied,) = [argv for argv in place.cloud.calls() if "storage" in argv]
    assert copied[-1].startswith(f"{place.home}/my report")
    (place.home / "c.py").write_text("")
    end = ["--", "--config=~/c.py", "--workdir=/shared/run"]
    shown = place.run(*SUBMIT[:-3], "--dry-run", *end)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize(
    "rules, status, left",
    [
        ({"workload create:1": {"status": 1, "first": True}}, 1, []),
        ({"workload list:2": {"status": 125}}, 1, ["workload"]),  # ended: its pods are gone
        ({"workload list:2": {"status": 124}, "workload list:3": {"status": 1}}, 0, ["workload"]),
        ({f"workload list:{i}": {"status": 1} for i in range(2, 9)}, 1, []),
        ({"workload list:1": {"status": 1}}, 1, []),
        ({"workload create:1": {"status": 1, "stdout": "study already exists", "first": True}},
         1, ["workload"]),
    ],
)  # fmt: skip
def test_a_workload_that_fails(place, rules, status, left):
    result = place.run(*GKE_UP, rules=rules)
    assert result.returncode == status, result.stderr
    assert place.cloud.costs() == left and COSTS not in result.stderr


def test_ctrl_c_deletes_the_workload(place):
    for call in ("workload create:1", "workload list:2"):
        (place.cloud.folder / "hangs").unlink(missing_ok=True)
        place.cloud.forget_calls()
        assert interrupt(place, GKE_UP, call, first=True)[0] == 130
        assert place.cloud.costs() == []
    (place.cloud.folder / "workload").write_text("study")
    result = place.run(*GKE_UP)
    assert result.returncode == 1 and "there is a workload study already" in result.stderr
    assert place.cloud.costs() == ["workload"]


# --- Slurm ---------------------------------------------------------------------------------------


def gpus(place):
    (place.root / ".venv").mkdir()
    (place.root / ".venv/.accelerator").write_text("cuda13 ...")


def test_a_job_is_submitted(place):
    assert "not set up for GPUs" in place.run(*SUBMIT).stderr
    gpus(place)
    result = place.run(*SUBMIT)
    assert (result.returncode, result.stdout) == (0, "4711\n")
    (sbatch,) = place.cloud.calls()
    wanted = {"--ntasks-per-node=8", "--gpus-per-node=8", "--nodes=2", "--signal=TERM@120",
              "--requeue", "--open-mode=append", f"--chdir={place.root}"}  # fmt: skip
    assert wanted <= set(sbatch)
    assert sbatch[-4:] == ["launch/pods/slurm_job.sh", "100", *SUBMIT[-2:]]


def test_names_are_the_clusters_own(place):
    gpus(place)
    given = ["--account=abc@v100", "--partition=gpu_p13,_debug", "--qos=qos_gpu-t3", "--mem=64GB",
             "--time=UNLIMITED"]  # fmt: skip
    more = [word for word in SUBMIT if not word.startswith(("--gpus", "--time", "slurm", "submit"))]
    result = place.run("slurm", "submit", *given, "--gpus-per-node=nvidia_h100:4", *more)
    assert result.returncode == 0, result.stderr
    (sbatch,) = place.cloud.calls()
    assert {*given, "--gpus-per-node=nvidia_h100:4", "--ntasks-per-node=4"} <= set(sbatch)


def test_ctrl_c_while_submitting_finds_the_job(place):
    gpus(place)
    status, stderr = interrupt(place, SUBMIT, "sbatch:1", first=True)
    assert status == 130 and COSTS in stderr and "delete it with: scancel 4711" in stderr


@pytest.mark.parametrize(
    "srun, restarts, requeue, status, requeued, says",
    [
        (0, "", 0, 0, False, ""), (3, "", 0, 3, False, "failed with status 3"),
        (75, "", 0, 75, True, "requeued"), (75, "4", 0, 75, True, "requeued"),
        (75, "5", 0, 75, False, "used up"), (75, "", 1, 75, True, "cannot be requeued"),
    ],
)  # fmt: skip
def test_a_preempted_job_is_requeued(place, srun, restarts, requeue, status, requeued, says):
    rules = {"srun:1": {"status": srun}, "scontrol requeue:1": {"status": requeue}}
    env = {"SLURM_JOB_ID": "4711"} | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})
    result = subprocess.run(
        ["bash", "launch/pods/slurm_job.sh", "5", *BUCKET, "--set=a b"],
        cwd=place.root, env=place.env(rules, **env), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == status and says in result.stderr
    assert (["scontrol", "requeue", "4711"] in place.cloud.calls()) == requeued
    assert place.cloud.calls()[0][-6:] == [
        ".venv/bin/python", "-m", "spire_jax.run", *BUCKET, "--set=a b", "--distributed",
    ][-6:]  # fmt: skip


# --- one host ------------------------------------------------------------------------------------


def set_up_host(place, *arguments):
    result = place.run("host", "setup", "--accelerator=cuda13", *arguments)
    assert result.returncode == 0, result.stderr


def host_runs(place):
    return len((place.home / "runs").read_text().splitlines())


def test_a_host_goes_on_after_preemptions(place):
    assert "first: launch/pods/host.sh setup" in place.run("host", "run", "--", *BUCKET).stderr
    set_up_host(place)
    installed = (place.home / "pip").read_text()
    assert "requirements.txt jax[cuda13]" in installed
    set_up_host(place)
    assert (place.home / "pip").read_text() == installed  # nothing to do
    for statuses, limit, status, runs in (
        ("75,75,0", 9, 0, 3),
        ("75,75", 1, 75, 2),
        ("3", 9, 3, 1),
    ):
        (place.home / "runs").unlink(missing_ok=True)
        limits = f"--max-restarts={limit}"
        assert (
            place.run("host", "run", limits, "--", *BUCKET, STUB_RUN=statuses).returncode == status
        )
        assert host_runs(place) == runs


def test_a_host_with_an_old_python_gets_a_newer_one(place):
    arguments = ["host", "setup", "--accelerator=tpu"]
    assert "no suitable Python 3.11" in place.run(*arguments, STUB_OLD="1").stderr
    shutil.copytree(place.home / "bin", place.home / "newer")
    result = place.run(*arguments, "--get-python", STUB_OLD="1")
    assert result.returncode == 0, result.stderr
    assert "with " + str(place.home / "newer/python3") in result.stderr
    steps = (place.home / "pip").read_text().splitlines()
    assert steps[:2] == ["install -qq --user uv", "uv python install 3.12"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_host_that_is_stopped_saves_and_does_not_start_again(place, how):
    set_up_host(place)
    process = place.popen("host", "run", "--", *BUCKET, STUB_RUN="term")
    wait_for(place.home / "runs")
    os.killpg(process.pid, how)
    assert process.wait(timeout=60) == 75 and host_runs(place) == 1


def test_a_detached_run(place):
    def status():
        return place.run("host", "status").stdout.split()[2:]

    set_up_host(place)
    assert status() == ["never"]
    assert place.run("host", "start", "--", *BUCKET, STUB_RUN="term").returncode == 0
    wait_for(place.home / "runs")
    assert place.run("host", "start", "--", *BUCKET).returncode == 0  # the same is going on
    assert place.run("host", "start", "--", *BUCKET, "--set=b").returncode == 1
    assert status()[0] == "running" and host_runs(place) == 1
    stopped = place.run("host", "stop", "--wait=20")
    assert stopped.returncode == 0 and "ended 75" in stopped.stdout
    assert "step 10" in place.run("host", "logs", "--follow", "--lines=5").stdout
    (place.root / "runs/host/status").unlink()
    assert status()[0] == "lost"


def test_a_run_that_ends_while_it_is_looked_at_is_not_lost(place):
    """The processes of a machine, asked just as the run writes its status and goes."""
    state = place.root / "runs/host"
    state.mkdir(parents=True)
    (state / "pid").write_text("1")
    (place.home / "bin/ps").write_text(f"#!/bin/bash\necho 0 >'{state}/status'\n")
    (place.home / "bin/ps").chmod(0o755)
    assert place.run("host", "status").stdout.split()[2:] == ["ended", "0"]


# --- all -----------------------------------------------------------------------------------------

COMMANDS: list[tuple[list[str], str]] = [  # and what has to be there before
    (UP, ""), (["cloud_tpu", "up", *NEW_TPU, "--queue", "--spot", "--", *BUCKET, *NASTY], ""),
    (["cloud_tpu", "up", *NEW_TPU, "--keep", "--", CONFIG, "--workdir=/nfs/a b"], ""),
    (["cloud_tpu", "create", *NEW_TPU, "--project=my-project", "--service-account=s@p.iam"], ""),
    (["cloud_tpu", "install", *TPU], "tpu"), (["cloud_tpu", "run", *TPU, "--", *BUCKET], "tpu"),
    (["cloud_tpu", "logs", *TPU, "--follow"], "tpu"), (["cloud_tpu", "status", *TPU], "tpu"),
    (["cloud_tpu", "fetch", *TPU, "--out=some where", "--", *BUCKET], "tpu"),
    (["cloud_tpu", "stop", *TPU], "tpu"), (["cloud_tpu", "delete", *TPU], "tpu"), (GKE_UP, ""),
    (["gke", "create", *WORKLOAD, "--type=v6e-16", "--base-image=python:3.12", "--", *BUCKET], ""),
    (["gke", "create", "--name=study", "--cluster=c", "--zone=us-central1-ai1a", "--image=i",
      "--project=example.com:my-project", "--type=tpu7x-2x2x2", "--", *BUCKET], ""),
    (["gke", "wait", *WORKLOAD], "workload"), (["gke", "logs", *WORKLOAD, "--follow"], "workload"),
    (["gke", "logs", *WORKLOAD, "--past"], ""), (["gke", "fetch", *WORKLOAD, "--", *BUCKET], ""),
    (["gke", "status", *WORKLOAD], "workload"), (["gke", "delete", *WORKLOAD], "workload"),
    (SUBMIT, "gpus"), (["slurm", "status", "--job=4711"], "job"),
    (["slurm", "cancel", "--job=4711"], "job"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, before", COMMANDS)
def test_a_dry_run_prints_what_a_run_does(place, arguments, before):
    if before == "gpus":
        gpus(place)
    elif before:
        (place.cloud.folder / before).write_text("study" if before == "workload" else "READY")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    dry = place.run(*arguments[:end], "--dry-run", *arguments[end:], PATH=str(place.tools))
    assert dry.returncode == 0 and COSTS not in dry.stderr, dry.stderr
    assert not (place.root / "runs").exists()
    shown = [shlex.split(line) for line in dry.stdout.splitlines()]
    result = place.run(*arguments)
    assert result.returncode == 0, result.stderr
    assert [argv for argv in shown if argv[0] in PROGRAMS] == place.cloud.calls()
    place.cloud.forget_calls()
    place.run(*arguments[:end], "--dry-run", *arguments[end:])
    assert place.cloud.calls() == []


@pytest.mark.parametrize("arguments, says", [
    (["cloud_tpu", "launch"], "unknown command 'launch'"),
    (["cloud_tpu", "up", *NEW_TPU[1:], "--", *BUCKET], "--name is missing, as in --name=my-tpu"),
    *((["cloud_tpu", "delete", f"--name={name}", TPU[1]], "--name=") for name in
      ("a b", "it's", "a;touch pwned", "$(touch pwned)", "-a", "UP", "a\nb")),
    (["cloud_tpu", "delete", "--name=", TPU[1]], "--name has no value"),
    (["cloud_tpu", "delete", *TPU[:1], "--zone=moon"], "--zone=moon is not valid"),
    (["cloud_tpu", "delete", *TPU[:1], "--zone=us-west4"], "--zone=us-west4 is not valid"),
    (["cloud_tpu", "delete", *TPU, "--project=My Project"], "--project='My Project' is not valid"),
    (["cloud_tpu", "stop", *TPU, "--internal-ip", "--tunnel-through-iap"], "one of --internal-ip"),
    (["cloud_tpu", "create", *TPU, "--type=h100-8"], "no runtime image is known"),
    (["cloud_tpu", "create", *TPU, "--typ=v4-8"], "unknown option --typ"),
    (["cloud_tpu", "create", *NEW_TPU, "--wait=soon"], "--wait=soon is not valid"),
    (["cloud_tpu", "create", *NEW_TPU, "extra"], "unexpected argument 'extra'"),
    (["cloud_tpu", "up", *NEW_TPU], "no --config=..."),
    (["cloud_tpu", "up", *NEW_TPU, "--", CONFIG], "no --workdir=..."),
    (["cloud_tpu", "up", *NEW_TPU, "--", CONFIG, "--workdir=runs/a"], "goes with the machine"),
    (["cloud_tpu", "up", *NEW_TPU, "--", "--config=no.py", BUCKET[1]], "there is no config no.py"),
    (["cloud_tpu", "run", *TPU, "--", *BUCKET, "--distributed"], "leave --distributed out"),
    (["cloud_tpu", "run", *TPU, "--", *BUCKET, "--set=a\nb"], "line break"),
    (["gke", "create", *WORKLOAD, "--type=v4-8", "--", *BUCKET], "one of --image="),
    ([*GKE_UP, "--set=$$"], "Kubernetes rewrites"),
    (["slurm", "submit", "--name=a", "--time=now", "--", *BUCKET], "--time=now is not valid"),
    (["slurm", "submit", "--name=a", "--time=1", "--account=a b", "--", *BUCKET], "--account='a b"),
    (["slurm", "submit", "--name=a", "--time=1", "--mem=lots", "--", *BUCKET], "--mem=lots is not"),
    (["slurm", "submit", "--name=a", "--time=1", "--gpus-per-node=a100", "--", *BUCKET],
     "--gpus-per-node=a100 is not valid"),
    (["slurm", "logs", "--job=x"], "--job=x is not valid"),
    (["host", "setup"], "--accelerator is missing"),
    (["host", "setup", "--accelerator"], "--accelerator wants a value"),
])  # fmt: skip
def test_bad_arguments(place, arguments, says):
    result = place.run(*arguments)
    assert result.returncode == 1 and says in result.stderr
    assert place.cloud.calls() == [] and not list(place.root.rglob("pwned"))


@pytest.mark.parametrize("arguments, program", [
    (UP, "gcloud"), (GKE_UP, "xpk"), (SUBMIT, "sbatch"),
    (["slurm", "cancel", "--job=1"], "scancel"),
])  # fmt: skip
def test_a_missing_program(place, arguments, program):
    gpus(place)
    result = place.run(*arguments, PATH=str(place.tools))
    assert result.returncode == 1 and f"there is no program {program}; " in result.stderr
    assert place.cloud.calls() == []

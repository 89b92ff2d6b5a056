"""launch/pods/cloud_tpu.sh against a gcloud of files: no network, no jax, nothing to pay."""

import os
import re
import signal
import subprocess

import pytest
from pod_place import BUCKET, CONFIG, COSTS, NASTY, NEW_TPU, TPU, UP, interrupt, wait_for

ONCE = ["tpu-vm create", "tpu-vm describe", "git archive", "tpu-vm scp", "setup", "start", "status"]
LOOK = ["git status", "tpu-vm describe"]
END = ["logs", "tpu-vm delete", "storage cp"]

FAILS = {"status": 1}


def test_a_tpu_from_creation_to_report(place):
    result = place.run(*UP)
    assert result.returncode == 0, result.stderr
    assert place.steps() == [*LOOK, *ONCE, *END]
    assert place.cloud.costs() == [] and COSTS not in result.stderr
    out = place.root / "runs/pods/my-tpu"
    assert sorted(path.name for path in (out / "logs").iterdir()) == ["0.log", "1.log"]
    assert (out / "report").is_dir()
    commands = [argv for argv in place.cloud.calls() if "create" in argv]
    assert commands == [[
        "gcloud", "compute", "tpus", "tpu-vm", "create", "my-tpu", "--zone=us-west4-a", "--quiet",
        "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite",
    ]]  # fmt: skip


def test_a_queued_spot_tpu(place):
    arguments = [*NEW_TPU, "--spot", "--queue", "--wait=2h", "--project=my-project", "--", *BUCKET]
    waiting = {"queued-resources describe:2": {"stdout": "WAITING_FOR_RESOURCES"}}
    result = place.run("cloud_tpu", "up", *arguments, rules=waiting)
    assert result.returncode == 0, result.stderr
    assert place.cloud.costs() == []
    create, *_ = [argv for argv in place.cloud.calls() if "create" in argv]
    assert {"--spot", "--valid-until-duration=7200s", "--node-id=my-tpu"} <= set(create)
    assert place.steps().count("queued-resources delete") == 1


@pytest.mark.parametrize("how, program", [
    ("--internal-ip", ["gcloud", "compute"]),
    ("--tunnel-through-iap", ["gcloud", "alpha", "compute"]),  # no other gcloud has it
])  # fmt: skip
def test_a_tpu_without_external_addresses(place, how, program):
    where = ["--name=my-tpu", "--zone=us-central1-ai1a", "--project=example.com:my-project"]
    what = ["--type=v5litepod-16", how, "--reserved", "--", CONFIG, "--workdir=/nfs/run"]
    result = place.run("cloud_tpu", "up", *where, *what)
    assert result.returncode == 0, result.stderr
    assert place.steps() == [*LOOK, *ONCE, "logs", "tpu-vm scp", "tpu-vm delete"]
    for argv in place.cloud.calls()[1:]:
        if {"ssh", "scp"} & set(argv):
            assert argv[: len(program)] == program and how in argv
        elif "tpus" in argv:
            assert argv[:2] == ["gcloud", "compute"] and how not in argv
            assert set(where[1:]) <= set(argv)
            assert ({"--internal-ips", "--reserved"} <= set(argv)) == ("create" in argv)


@pytest.mark.parametrize(
    "rules",
    [
        {"tpu-vm ssh:3": {"reply": ["ended 75 saved"]}},  # SIGTERM, and a checkpoint
        {"tpu-vm ssh:3": {"reply": ["ended 75", "ended 1 peer gone"]}},
        {"tpu-vm ssh:3": {"status": 255, "state": "PREEMPTED"}},
        {"tpu-vm ssh:3": {"reply": ["lost"]}},  # the machine has restarted
        {"tpu-vm ssh:1": {"status": 255, "state": "PREEMPTED"}},  # while installing
        {"tpu-vm ssh:2": {"status": 255, "state": "TERMINATED"}},  # while starting
        {"tpu-vm describe:2": {"stdout": "PREEMPTED"}},  # at once
    ],
)
def test_a_preempted_run_is_taken_up_again(place, rules):
    result = place.run(*UP, rules=rules)
    assert result.returncode == 0, result.stderr
    assert "preempted; creating my-tpu again (1 of at most 20 times)" in result.stderr
    steps = place.steps()
    assert steps.count("tpu-vm create") == steps.count("tpu-vm delete") == 2
    assert steps[-len([*ONCE, *END]) :] == [*ONCE, *END] and place.cloud.costs() == []


def test_preempted_more_often_than_allowed(place):
    rules = {"tpu-vm ssh:*": {"state": "PREEMPTED"}}
    result = place.run("cloud_tpu", "up", *NEW_TPU, "--max-restarts=1", "--", *BUCKET, rules=rules)
    assert result.returncode == 75 and "1 restarts of --max-restarts are used up" in result.stderr
    assert place.steps().count("tpu-vm create") == 2 and place.cloud.costs() == []


def test_a_request_that_is_suspended_is_made_again(place):
    """Of a queued spot TPU nothing is left but its request."""
    gone = {"status": 1, "stderr": "ERROR: NOT_FOUND"}
    rules = {
        "tpu-vm ssh:3": {"status": 1}, "tpu-vm describe:2": gone,
        "queued-resources describe:3": {"stdout": "SUSPENDED"},
    }  # fmt: skip
    result = place.run("cloud_tpu", "up", *NEW_TPU, "--queue", "--", *BUCKET, rules=rules)
    assert result.returncode == 0, result.stderr
    assert place.steps().count("queued-resources create") == 2 and place.cloud.costs() == []


@pytest.mark.parametrize(
    "rules, status, says",
    [
        ({"tpu-vm create:*": {**FAILS, "stderr": "PERMISSION_DENIED"}}, 1, "not be created"),
        ({"tpu-vm create:*": {**FAILS, "first": True, "stderr": "Quota, RESOURCE_EXHAUSTED"}},
         1, "not be created"),
        ({"tpu-vm create:*": {**FAILS, "stderr": "There is no more capacity"}}, 75,
         "no capacity for a v5litepod-16 in us-west4-a within --wait=0"),
        ({"tpu-vm scp:*": FAILS}, 1, "installation does not succeed"),
        ({"tpu-vm ssh:*": FAILS, "tpu-vm ssh:1": {"reply": ["set-up"]}}, 1, "started on 0 of 2"),
        ({"git archive:1": FAILS}, 1, "HEAD cannot be packed"),
        ({"tpu-vm ssh:3": {"reply": ["ended 3 Error: no such file"]}}, 3, "failed with status 3"),
        ({f"tpu-vm ssh:{i}": {"reply": ["ended 9 killed", "running"]} for i in (3, 4, 5)}, 9,
         "failed with status 9"),  # after two more looks at the other
    ],
)  # fmt: skip
def test_a_failure_deletes_what_was_made(place, rules, status, says):
    result = place.run("cloud_tpu", "up", *NEW_TPU, "--wait=0", "--", *BUCKET, rules=rules)
    assert result.returncode == status, result.stderr
    assert says in result.stderr and COSTS not in result.stderr
    assert place.steps().count("tpu-vm delete") == 1 and place.cloud.costs() == []


def test_one_worker_of_two_cannot_install(place):
    """gcloud's own status is 0; what counts is what each worker says."""
    rules = {f"tpu-vm ssh:{i}": {"stdout": "spire_jax-host host-0 set-up"} for i in (1, 2, 3)}
    result = place.run(*UP, rules=rules)
    assert result.returncode == 1
    assert result.stderr.count("installed on 1 of 2 workers") == 3  # POD_TRIES
    assert place.cloud.costs() == [] and "start" not in place.steps()


def test_what_passes_is_tried_again(place):
    gone = {"status": 255, "stderr": "ssh: connect to host: Connection refused"}
    rules = {
        "tpu-vm create:1": {"status": 1, "stderr": "no more capacity", "first": True},
        "tpu-vm scp:1": gone, "tpu-vm ssh:1": gone, "tpu-vm ssh:3": gone, "tpu-vm ssh:5": gone,
        "tpu-vm ssh:6": {"reply": ["running step 1", "ended 0"]}, "tpu-vm ssh:7": gone,
        "tpu-vm describe:6": {"status": 1, "stderr": "no route to host"},
        "tpu-vm delete:2": {"status": 1, "stderr": "UNAVAILABLE"},
    }  # fmt: skip
    result = place.run(*UP, rules=rules)
    assert result.returncode == 0, result.stderr
    steps = place.steps()
    assert [steps.count(s) for s in ("tpu-vm create", "setup", "start")] == [2, 2, 2]
    assert place.cloud.costs() == []


def test_a_tpu_that_cannot_be_deleted_is_said_to_cost_money(place):
    rules = {"tpu-vm delete:*": {"status": 1, "stderr": "INTERNAL"}}
    for arguments in (UP, ["cloud_tpu", "delete", *TPU]):
        result = place.run(*arguments, rules=rules)
        assert result.returncode == 1
        assert place.cloud.costs() == ["tpu"]
        assert f"{COSTS}: my-tpu " in result.stderr
        command = re.search("delete it with: (.*)", result.stderr)[1]
    subprocess.run(["bash", "-c", command], env=place.env(), check=True)
    assert place.cloud.costs() == []


def test_a_tpu_of_somebody_else_is_left_alone(place):
    (place.cloud.folder / "tpu").write_text("READY")
    for rules in ({}, {"tpu-vm describe:1": {"status": 1, "stderr": "NOT_FOUND"}}):
        place.cloud.forget_calls()
        result = place.run(*UP, rules=rules)
        assert result.returncode == 1
        assert ("choose another --name" in result.stderr) == (not rules)
        assert place.cloud.costs() == ["tpu"] and "tpu-vm delete" not in place.steps()
    assert "somebody else has just made a my-tpu" in result.stderr


def test_kept_when_told_so(place):
    result = place.run("cloud_tpu", "up", *NEW_TPU, "--keep", "--", *BUCKET)
    assert result.returncode == 0 and place.cloud.costs() == ["tpu"]
    assert COSTS in result.stderr
    assert place.run("cloud_tpu", "delete", *TPU).returncode == 0 and place.cloud.costs() == []


@pytest.mark.parametrize(
    "call", ["tpu-vm create", "tpu-vm describe:2", "git archive", "tpu-vm scp", "tpu-vm ssh",
             "tpu-vm ssh:2", "tpu-vm ssh:3", "tpu-vm ssh:4", "tpu-vm delete"],
)  # fmt: skip
def test_ctrl_c_deletes_what_was_made(place, call):
    """At whatever it comes, and a creation that was under way comes about."""
    call = call if ":" in call else f"{call}:1"
    status, stderr = interrupt(place, UP, call, first="create" in call)
    assert status == 130, stderr
    assert "interrupted (SIGINT)" in stderr and "deleting my-tpu" in stderr
    assert place.cloud.costs() == [] and COSTS not in stderr
    assert ("stop" in place.steps()) == (call in ("tpu-vm ssh:2", "tpu-vm ssh:3"))


def test_other_ends_delete_too(place):
    for how, number in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        (place.cloud.folder / "hangs").unlink(missing_ok=True)
        place.cloud.forget_calls()
        assert interrupt(place, UP, "tpu-vm ssh:3", how)[0] == number
        assert place.cloud.costs() == []


def test_ctrl_c_does_not_stop_the_deletion(place):
    rules = {"tpu-vm ssh:*": FAILS, "tpu-vm delete:1": {"slow": 1}}
    process = place.popen(*UP, rules=rules)
    wait_for(place.cloud.folder / "hangs")
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and place.cloud.costs() == [], stderr


def test_ctrl_c_in_a_single_step_leaves_the_tpu_and_says_so(place):
    (place.cloud.folder / "tpu").write_text("READY")
    status, stderr = interrupt(place, ["cloud_tpu", "run", *TPU, "--", *BUCKET], "tpu-vm ssh:2")
    assert status == 130 and place.cloud.costs() == ["tpu"]
    assert COSTS in stderr and "tpu-vm delete my-tpu" in stderr


def test_what_runs_is_head(place):
    (place.root / "configs/new.py").touch()
    result = place.run(*UP)
    assert result.returncode == 1 and "?? configs/new.py" in result.stderr
    assert "--allow-dirty" in result.stderr and place.steps() == ["git status"]
    result = place.run("cloud_tpu", "up", *NEW_TPU, "--allow-dirty", "--", *BUCKET)
    assert result.returncode == 0
    archive = place.root / "runs/pods/my-tpu/source.tar.gz"
    listing = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True).stdout
    assert "configs/quickstart.py" in listing and "configs/new.py" not in listing


def test_on_workers_that_run_the_commands(place):
    """Their shells get the recorded commands: source, environment, arguments, preemption."""
    arguments = [*NEW_TPU, "--", *BUCKET, *NASTY]
    real = {"STUB_REAL": "1", "STUB_RUN": "75,0", "POD_POLL": "0.3", "POD_STRAGGLERS": "99"}
    result = place.run("cloud_tpu", "up", *arguments, **real)
    assert result.returncode == 0, result.stderr
    for i in range(2):
        home = place.cloud.folder / f"worker{i}"
        assert place.cloud.machine_runs(i) == [[*BUCKET, *NASTY, "--distributed"]] * 2
        assert "jax[tpu]" in (home / "pip").read_text()
        assert (home / "spire_jax/configs/quickstart.py").exists()
    assert not list(place.cloud.folder.rglob("pwned")) and not list(place.root.rglob("pwned"))
    assert place.steps().count("tpu-vm create") == 2 and place.cloud.costs() == []

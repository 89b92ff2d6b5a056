"""Programs that stand for gcloud, xpk, kubectl, Slurm's and git, and a cloud of files.

Each call is noted as JSON. Flags are held against what the real program takes and wants; calls
that it would refuse are noted as mistakes. What a call does can be changed by $STUB_RULES, JSON of
{"CALL:N" or "CALL:*": {"status", "stdout", "stderr", "reply", "state", "hang", "first", "slow"}},
where CALL is the last two words of a name below and N counts its calls from 1; "first" has the call
do its work before it fails or hangs, "slow" after so many seconds.
"""

import json
import os
import sys
import time

WHERE = {"--zone", "--project", "--quiet"}
CREATE = WHERE | {"--accelerator-type", "--spot", "--reserved", "--internal-ips",
                  "--service-account", "--network", "--subnetwork"}  # fmt: skip
QUEUED, VM = "gcloud compute tpus queued-resources", "gcloud compute tpus tpu-vm"
ALPHA = "gcloud alpha compute tpus tpu-vm"
SSH = WHERE | {"--worker", "--command", "--output-directory"}
SCP = WHERE | {"--worker", "--recurse"}
ON_CLUSTER = {"--cluster", "--zone", "--project"}
# https://cloud.google.com/sdk/gcloud/reference, xpk 1.16 `--help`, https://slurm.schedmd.com:
# call -> flags it takes, flags it wants, number of other arguments.
CALLS: dict[str, tuple[set[str], set[str], int]] = {
    f"{VM} create": (CREATE | {"--version"}, {"--zone", "--accelerator-type", "--version"}, 1),
    f"{VM} describe": (WHERE | {"--format"}, {"--zone"}, 1),
    f"{VM} delete": (WHERE, {"--zone", "--quiet"}, 1),
    f"{VM} ssh": (SSH | {"--internal-ip"}, {"--zone", "--command"}, 1),
    f"{VM} scp": (SCP | {"--internal-ip"}, {"--zone", "--worker"}, 2),
    f"{ALPHA} ssh": (SSH | {"--tunnel-through-iap"}, {"--zone", "--command"}, 1),
    f"{ALPHA} scp": (SCP | {"--tunnel-through-iap"}, {"--zone", "--worker"}, 2),
    f"{QUEUED} create": (
        CREATE | {"--runtime-version", "--node-id", "--valid-until-duration"},
        {"--zone", "--accelerator-type", "--runtime-version", "--node-id"}, 1,
    ),
    f"{QUEUED} describe": (WHERE | {"--format"}, {"--zone"}, 1),
    f"{QUEUED} delete": (WHERE | {"--force"}, {"--zone", "--quiet", "--force"}, 1),
    "gcloud storage cp": ({"--recursive"}, {"--recursive"}, 2),
    "gcloud logging read": (
        {"--project", "--freshness", "--order", "--format"}, {"--project", "--freshness"}, 1,
    ),
    "xpk workload create": (
        ON_CLUSTER | {
            "--workload", "--command", "--tpu-type", "--num-slices", "--docker-image",
            "--base-docker-image", "--script-dir", "--max-restarts", "--restart-on-exit-codes",
            "--termination-grace-period-seconds",
        },
        {"--workload", "--cluster", "--command", "--tpu-type"}, 0,
    ),
    "xpk workload list": (
        ON_CLUSTER | {"--filter-by-job", "--wait-for-job-completion", "--timeout"},
        {"--cluster"}, 0,
    ),
    "xpk workload delete": (
        ON_CLUSTER | {"--workload", "--force"}, {"--cluster", "--workload", "--force"}, 0,
    ),
    "kubectl logs": (
        {"--prefix", "--all-containers", "--tail", "--follow", "--selector"}, {"--selector"}, 0,
    ),
    "squeue": ({"--jobs", "--format", "--me", "--name", "--noheader"}, {"--format"}, 0),
    "scancel": (set(), set(), 1),
    "scontrol requeue": (set(), set(), 1),
    "git status": ({"--porcelain"}, {"--porcelain"}, 0),
    "git archive": ({"--format", "--output"}, {"--format", "--output"}, 1),
    "docker": (set(), set(), 0),
}  # fmt: skip
# What follows these programs' own flags is another program's.
WRAPPERS: dict[str, tuple[set[str], set[str]]] = {
    "sbatch": (
        {
            "--parsable", "--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node",
            "--time", "--partition", "--account", "--qos", "--cpus-per-task", "--mem",
            "--signal", "--requeue", "--open-mode", "--chdir", "--output",
        },
        {"--parsable", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--requeue"},
    ),
    "srun": (
        {"--kill-on-bad-exit", "--wait", "--gpu-bind", "--label", "--open-mode", "--output"},
        {"--kill-on-bad-exit", "--wait", "--gpu-bind"},
    ),
}  # fmt: skip
PROGRAMS = sorted({call.split()[0] for call in CALLS} | set(WRAPPERS))


class Program:
    """One call of a program: checked, noted, answered. Imports little, since it starts often."""

    def __init__(self, argv: list[str]):
        self.argv = argv
        self.cloud = os.environ["STUB_CLOUD"]
        self.workers = sorted(name for name in os.listdir(self.cloud) if name[:6] == "worker")
        self.note("calls", json.dumps(argv))
        self.call, rest, takes, wants, others = self.parts()
        self.flags = dict(word.partition("=")[::2] for word in rest if word.startswith("--"))
        self.names = [word for word in rest if not word.startswith("--")]
        if unknown := set(self.flags) - takes:
            self.mistake(f"unknown flags {sorted(unknown)}")
        if missing := wants - set(self.flags):
            self.mistake(f"missing flags {sorted(missing)}")
        if len(self.names) != others:
            self.mistake(f"{len(self.names)} arguments instead of {others}")

    def parts(self) -> tuple[str, list[str], set[str], set[str], int]:
        argv = self.argv
        if argv[0] in WRAPPERS:
            end = next((i for i in range(1, len(argv)) if argv[i][:2] != "--"), len(argv))
            return argv[0], argv[1:end], *WRAPPERS[argv[0]], 0
        for n in range(len(argv), 0, -1):
            if (call := " ".join(argv[:n])) in CALLS:
                return call, argv[n:], *CALLS[call]
        self.mistake("unknown call")
        raise AssertionError

    def note(self, file: str, line: str) -> int:
        """How many equal lines there are now."""
        with open(f"{self.cloud}/{file}", "a+") as notes:
            notes.write(line + "\n")
            notes.seek(0)
            return notes.read().splitlines().count(line)

    def mistake(self, text: str) -> None:
        self.note("mistakes", f"{text}: {self.argv}")
        sys.exit(f"ERROR: {text}")

    def run(self) -> None:
        name = " ".join(self.call.split()[-2:])
        count = self.note("counts", name)
        rules = json.loads(os.environ.get("STUB_RULES", "{}"))
        rule = rules.get(f"{name}:{count}", rules.get(f"{name}:*"))
        if rule and "slow" in rule:
            self.put("hangs", self.call)
            time.sleep(rule["slow"])
            rule = None
        if rule is None or rule.get("first"):
            self.answer()
        if rule is None:
            return
        if "state" in rule:
            self.put("tpu", rule["state"])
        if "reply" in rule:
            self.reply(*rule["reply"])
        print(rule.get("stdout", ""), flush=True)
        print(rule.get("stderr", ""), file=sys.stderr)
        if rule.get("hang"):
            self.put("hangs", self.call)
            time.sleep(60)
        sys.exit(rule.get("status", 0))

    def reply(self, *texts: str) -> None:
        """One line a worker; of a single text, every worker's."""
        for i in range(len(self.workers) if len(texts) == 1 else len(texts)):
            print(f"spire_jax-host host-{i} {texts[min(i, len(texts) - 1)]}")

    def has(self, thing: str) -> bool:
        return os.path.exists(f"{self.cloud}/{thing}")

    def put(self, thing: str, text: str) -> None:
        with open(f"{self.cloud}/{thing}", "w") as file:
            file.write(text)

    def get(self, thing: str) -> str:
        if not self.has(thing):
            sys.exit(f"ERROR: (gcloud) NOT_FOUND: {thing} {self.names} (NotFound)")
        with open(f"{self.cloud}/{thing}") as file:
            return file.read()

    def drop(self, thing: str) -> None:
        self.get(thing)
        os.remove(f"{self.cloud}/{thing}")

    def answer(self) -> None:
        flags, names = self.flags, self.names
        match self.call.split():
            case [*_, "tpu-vm" | "queued-resources" as kind, "create"]:
                if self.has("tpu"):
                    sys.exit("ERROR: ALREADY_EXISTS: Resource already exists")
                self.put("tpu", "READY")
                if kind == "queued-resources":
                    self.put("request", "ACTIVE")
            case [*_, "tpu-vm", "describe"]:
                print(f"{self.get('tpu')}\t{len(self.workers)}")
            case [*_, "queued-resources", "describe"]:
                print(self.get("request"))
            case [*_, "tpu-vm", "delete"]:
                self.drop("tpu")
            case [*_, "queued-resources", "delete"]:
                self.drop("request")
                if self.has("tpu"):
                    self.drop("tpu")
            case [*_, "ssh"]:
                self.get("tpu")
                self.ssh(flags["--command"])
            case [*_, "scp"]:
                self.scp(*names)
            case ["xpk", _, "create"]:
                self.put("workload", flags["--workload"])
            case ["xpk", _, "delete"]:
                self.drop("workload")
            case ["xpk", _, "list"] if "--filter-by-job" in flags:
                print("[XPK] Workload List Output:\nJobset Name   Status")
                if self.has("workload"):
                    print(self.get("workload"), "  Running")
            case [*_, "storage", "cp"]:
                os.makedirs(f"{names[1]}/report", exist_ok=True)
            case ["sbatch"]:
                self.put("job", "")
                print("4711;cluster")
            case ["squeue"] if self.has("job"):
                print("4711")
            case ["scancel"]:
                self.drop("job")
            case ["git", _]:
                os.execv("/usr/bin/git", self.argv)

    def ssh(self, command: str) -> None:
        if "STUB_REAL" in os.environ:
            import subprocess

            for name in self.workers:
                home = f"{self.cloud}/{name}"
                env = {"HOME": home, "PATH": f"{home}/bin:{os.environ['STUB_TOOLS']}",
                       "STUB_RUN": os.environ["STUB_RUN"]}  # fmt: skip
                subprocess.run(["bash", "-c", command], cwd=home, env=env, stdin=subprocess.DEVNULL)
        elif "host.sh logs" in command:
            for i in range(len(self.workers)):
                if folder := self.flags.get("--output-directory"):
                    with open(f"{folder}/{i}.log", "w") as file:
                        file.write(f"log of worker {i}\n")
        else:
            answers = {"setup": "set-up", "start": "started", "status": "ended 0 step 10",
                       "stop": "ended 75 saved"}  # fmt: skip
            self.reply(answers[command.split("host.sh ")[1].split()[0]])

    def scp(self, source: str, target: str) -> None:
        if target.endswith("/"):
            os.makedirs(f"{target}/report", exist_ok=True)
        elif "STUB_REAL" in os.environ:
            import shutil

            for name in self.workers:
                shutil.copy(source, f"{self.cloud}/{name}/{target.partition(':')[2]}")

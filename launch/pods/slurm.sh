#!/usr/bin/env bash
# GPUs under Slurm: submits spire_jax as a batch job, which is requeued after preemptions and at
# its time limit until the run has finished.
#
#   launch/pods/host.sh setup --accelerator=cuda13
#   launch/pods/slurm.sh submit --name=study --nodes=2 --gpus-per-node=8 --time=24:00:00 \
#     -- --config=configs/study.py --workdir=/shared/study
#
# Commands: submit; status, logs [--follow] and cancel with --job=ID. This checkout, its .venv and
# the work directory have to be on a file system that all nodes share, and stay as they are.
#
#   --name --nodes=1 --gpus-per-node=1 --time   the job; one process for each GPU (a100:1, say)
#   --partition --account --qos --cpus-per-task --mem   as for sbatch, whose other options are set
#                               in its environment: SBATCH_RESERVATION, SBATCH_CONSTRAINT, ...
#   --grace=120                 seconds for a checkpoint between SIGTERM and the time limit
#   --max-restarts=100          how often the job is requeued
#   --dry-run                   prints every command and runs none
#
# Logs: runs/slurm/ID.out of the job, runs/slurm/ID-NODE.log of the processes on each node.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/pods/common.sh

# shellcheck disable=SC2034 # some are read by the name of their option
name="" nodes=1 gpus_per_node=1 time="" partition="" account="" qos="" cpus_per_task="" mem=""
grace=120 max_restarts=100 job="" follow="" workdir="" submitting=""
folder=runs/slurm

submit() {
  local id accelerator option value more=()
  accelerator="$(cat .venv/.accelerator 2>/dev/null || true)"
  [[ -n "$dry_run" || "$accelerator" == cuda* ]] ||
    fail "not set up for GPUs; first: launch/pods/host.sh setup --accelerator=cuda13"
  for option in partition account qos cpus-per-task mem; do
    value="${option//-/_}" value="${!value}"
    [[ -z "$value" ]] || more+=("--$option=$value")
  done
  run mkdir -p "$folder"
  submitting=yes
  # A process for each GPU, since jax.distributed gives a process under Slurm the one device of
  # number SLURM_LOCALID; --gpus-per-node and not --gpus-per-task, so that each sees all of them.
  # --signal without "B:" goes to these processes, not to the batch script
  # (https://slurm.schedmd.com/sbatch.html#OPT_signal); Slurm may send it a minute earlier.
  perform 1 sbatch --parsable --job-name="$name" --nodes="$nodes" \
    --ntasks-per-node="${gpus_per_node##*:}" --gpus-per-node="$gpus_per_node" --time="$time" \
    ${more[@]+"${more[@]}"} --signal="TERM@$grace" --requeue --open-mode=append --chdir="$PWD" \
    --output="$folder/%j.out" launch/pods/slurm_job.sh "$max_restarts" "${run_arguments[@]}" ||
    fail "sbatch has refused the job"
  id="${output%%;*}" # "ID" or "ID;CLUSTER"
  submitting=""
  [[ -z "$dry_run" ]] || return 0
  say "submitted; follow it with: launch/pods/slurm.sh logs --follow --job=$id"
  say "it costs what its nodes cost until it ends; end it with: scancel $id"
  echo "$id"
}

status() {
  run squeue --jobs="$job" --format='%i %j %T %M of %l, %D nodes: %R' ||
    say "Slurm does not know $job any more; how it ended: $folder/$job.out"
}

logs() {
  local files=("$folder/$job.out")
  [[ -n "$dry_run" ]] || files=("$folder/$job".out "$folder/$job"-*.log)
  [[ -n "$dry_run" || -e "${files[0]}" ]] || fail "there is no ${files[0]} yet; see \`status\`"
  run tail -n +1 ${follow:+-F} "${files[@]}"
}

# sbatch may have been stopped after the job was there, and nobody told its number.
clean_up() {
  local jobs=()
  [[ -n "$submitting" && -z "$dry_run" ]] || return 0
  if ! capture "" squeue --me --name="$name" --noheader --format=%i; then
    say "the job may have been submitted all the same; look with: squeue --me --name=$name"
  elif [[ -n "$output" ]]; then
    read -r -a jobs <<<"${output//$'\n'/ }"
    holding "every job of yours that is called $name, perhaps the one just submitted" \
      scancel "${jobs[@]}"
  fi
}

(($#)) || set -- --help
command="$1"
shift
case "$command" in
  -h | --help | help)
    usage
    exit
    ;;
  submit)
    parse "name nodes gpus-per-node time grace max-restarts partition account qos cpus-per-task \
mem" "" "$@"
    check name "$name" '[a-zA-Z0-9][-a-zA-Z0-9._]{0,63}' study
    check nodes "$nodes" '[1-9][0-9]{0,4}' 2
    check gpus-per-node "$gpus_per_node" '([^[:space:]:,]+:)?[1-9][0-9]?' 8
    check time "$time" '([0-9]+-)?[0-9]+(:[0-9]+){0,2}|UNLIMITED' 24:00:00
    # Names are the cluster's own ("abc@v100"); of a partition there may be several, with commas.
    for option in partition account qos; do
      [[ -z "${!option}" ]] || check "$option" "${!option}" '[^[:space:][:cntrl:]]+' my-name
    done
    [[ -z "$cpus_per_task" ]] || check cpus-per-task "$cpus_per_task" '[1-9][0-9]{0,3}' 8
    [[ -z "$mem" ]] || check mem "$mem" '[0-9]+[KMGTkmgt]?[Bb]?' 64G
    check_count grace "$grace" 120
    check_count max-restarts "$max_restarts" 100
    check_run_arguments --workdir=/shared/my-run
    refuse_distributed
    need sbatch "run this on a login node of a Slurm cluster"
    ;;
  status | cancel) parse "job" "" "$@" ;;
  logs) parse "job" "follow" "$@" ;;
  *) fail "unknown command '$command'; see launch/pods/slurm.sh --help" ;;
esac
[[ "$command" == submit ]] || check job "$job" '[1-9][0-9]*' 12345
case "$command" in
  status) need squeue "run this on a login node of a Slurm cluster" ;;
  cancel) need scancel "run this on a login node of a Slurm cluster" ;;
esac

case "$command" in
  cancel)
    holding "the job $job" scancel "$job"
    run scancel "$job"
    holding_nothing
    ;;
  *) "$command" ;;
esac

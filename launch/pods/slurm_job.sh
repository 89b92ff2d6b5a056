#!/usr/bin/env bash
# The batch script of slurm.sh: the run on all nodes, and the job again when it was preempted.
#
#   sbatch ... launch/pods/slurm_job.sh MAX_RESTARTS ARGUMENTS-OF-SPIRE_JAX.RUN...
#
# Slurm runs a copy of this file elsewhere; the repository is where sbatch was told (--chdir).
set -euo pipefail

preempted=75 # as in common.sh
max_restarts="$1"
restarts="${SLURM_RESTART_COUNT:-0}"
shift

say() { echo "slurm_job: $*" >&2; }

source launch/setup/environment.sh
# Slurm's own preemption signals this shell too, which has to live until the processes have ended.
trap : TERM

say "job $SLURM_JOB_ID on ${SLURM_JOB_NODELIST:-?}, restarted $restarts times"
status=0
# The first process that ends does not have the others killed at once: they are saving the same
# checkpoint. After --wait seconds it does. srun's status is the highest of all processes
# (https://slurm.schedmd.com/srun.html).
srun --kill-on-bad-exit=0 --wait=120 --gpu-bind=none --label --open-mode=append \
  --output="runs/slurm/%j-%N.log" \
  .venv/bin/python -m spire_jax.run "$@" --distributed || status=$?

if ((status == preempted)); then
  if ((restarts >= max_restarts)); then
    say "preempted, and all $max_restarts restarts are used up; submit it again to go on"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    say "preempted; requeued to go on from its checkpoint"
  else
    say "preempted, and it cannot be requeued; submit it again to go on"
  fi
elif ((status)); then
  say "the run failed with status $status; see runs/slurm/$SLURM_JOB_ID-*.log"
fi
exit "$status"

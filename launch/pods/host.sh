#!/usr/bin/env bash
# One machine: sets it up for its accelerator, runs spire_jax, and runs it again when it was
# preempted (status 75: SIGTERM made it save a checkpoint).
#
#   launch/pods/host.sh setup --accelerator=tpu|cuda13|cuda12|cpu [--get-python]
#   launch/pods/host.sh run   [--max-restarts=100] -- --config=... --workdir=... [...]
#   launch/pods/host.sh start [--max-restarts=100] -- --config=... --workdir=... [...]
#   launch/pods/host.sh status | logs [--lines=N] [--follow] | stop [--wait=300]
#
# `run` stays in the terminal; Ctrl-C or SIGTERM saves a checkpoint, and its status is that of
# spire_jax.run. `start` outlives the terminal and the connection: `status`, `logs` and `stop` tell
# of it, `stop` after it has saved a checkpoint. --get-python fetches a Python where the machine has
# none of 3.11 or later (the images of TPU VMs have 3.10), by uv. --dry-run prints every command
# and runs none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/pods/common.sh

accelerator="" get_python="" max_restarts=100 lines="" follow="" wait=300 status_file="" workdir=""
state=runs/host # of what `start` has started
python=.venv/bin/python
tick="${POD_TICK:-1}" # seconds between two looks at a process of this machine

# A line for other launchers, which count them: what this machine has reached.
reply() { echo "spire_jax-host $(hostname) $*"; }

is_python() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate uv=(uv)
  if [[ -n "$dry_run" ]]; then
    echo "# where there is no Python of 3.11 or later: uv python install 3.12"
    return
  fi
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    ! is_python "$candidate" || return 0
  done
  say "no Python of 3.11 or later; fetching one by uv"
  if ! command -v uv >/dev/null; then
    # The variable is for newer pips, which refuse without it; older ones do not know it.
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -qq --user uv
    uv=(python3 -m uv)
  fi
  "${uv[@]}" python install 3.12
  # From /: a half-made .venv here would be found first.
  PYTHON="$(cd / && "${uv[@]}" python find --managed-python 3.12)"
  export PYTHON
}

setup() {
  local wanted extra=("jax[$accelerator]")
  check accelerator "$accelerator" 'tpu|cuda13|cuda12|cpu' cuda13
  [[ -z "$get_python" ]] || find_python
  run bash launch/setup.sh requirements.txt
  wanted="$accelerator $(cat .venv/.installed-requirements.txt 2>/dev/null || true)"
  if [[ "$accelerator" != cpu && "$(cat .venv/.accelerator 2>/dev/null)" != "$wanted" ]]; then
    # With the list, so that pip keeps to its ranges.
    run "$python" -m pip install -qq --disable-pip-version-check -r requirements.txt "${extra[@]}"
    [[ -n "$dry_run" ]] || echo "$wanted" >.venv/.accelerator
  fi
  [[ -n "$dry_run" ]] || reply set-up
}

need_python() {
  [[ -x "$python" ]] || fail "there is no $python; first: launch/pods/host.sh setup"
}

# --- in this terminal -------------------------------------------------------------------------

child="" signals=0

# A signal that comes before the child is there is kept for it.
tell_child() {
  signals=$((signals + 1))
  [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true
}

# Once; its status goes into $status.
run_once() {
  # In the background, since bash handles a signal only after what runs in the foreground. There
  # SIGINT is ignored, and Ctrl-C arrives as SIGTERM: the checkpoint is saved.
  "$python" -m spire_jax.run "${run_arguments[@]}" &
  child=$!
  ! ((signals)) || kill -TERM "$child" 2>/dev/null || true
  # Not `wait` at once: bash 5.2 can lose the status of a child that ends while a signal interrupts
  # the wait for it.
  while kill -0 "$child" 2>/dev/null; do sleep "$tick" || true; done # a signal ends the sleep
  status=0
  wait "$child" || status=$?
  child=""
}

run_here() {
  local restarts
  check_count max-restarts "$max_restarts" 100
  check_run_arguments --workdir=runs/my-run
  if [[ -n "$dry_run" ]]; then
    echo "source launch/setup/environment.sh"
    run "$python" -m spire_jax.run "${run_arguments[@]}"
    return
  fi
  need_python
  source launch/setup/environment.sh
  trap tell_child INT TERM HUP
  for ((restarts = 0; ; restarts++)); do
    run_once
    if ((status != preempted)); then exit "$status"; fi
    ((signals == 0 && restarts < max_restarts)) || break
    say "preempted; going on from its checkpoint ($((restarts + 1)) of at most $max_restarts times)"
  done
  say "preempted; the same command goes on from its checkpoint"
  exit "$preempted"
}

# --- detached ---------------------------------------------------------------------------------

is_running() {
  local pid
  pid="$(cat "$state/pid" 2>/dev/null)" && [[ ! -f "$state/status" ]] &&
    [[ "$(ps -p "$pid" -o args= 2>/dev/null)" == *host.sh* ]] # not another one of that number
}

start() {
  local same detached=(nohup)
  check_count max-restarts "$max_restarts" 100
  check_run_arguments --workdir=runs/my-run
  # A session of its own, where the system has that: no signal of this terminal reaches it.
  ! command -v setsid >/dev/null || detached+=(setsid)
  detached+=(bash launch/pods/host.sh run "--max-restarts=$max_restarts"
    "--status-file=$state/status" -- "${run_arguments[@]}")
  if [[ -n "$dry_run" ]]; then
    echo "$(quoted "${detached[@]}") >$state/log 2>&1 </dev/null &"
    return
  fi
  # Not the arguments themselves: what they hold is not ours to keep.
  same="$(quoted "${run_arguments[@]}" | cksum)"
  if is_running; then
    [[ "$(cat "$state/arguments")" == "$same" ]] ||
      fail "another run is going on here; first: launch/pods/host.sh stop"
    reply started # before, and the connection broke
    return
  fi
  need_python
  mkdir -p "$state"
  rm -f "$state/status" "$state/pid"
  echo "$same" >"$state/arguments"
  "${detached[@]}" >"$state/log" 2>&1 </dev/null &
  echo $! >"$state/pid"
  reply started
}

# "running", "ended STATUS", "lost" (the machine has restarted) or "never"; and the log's last line.
status() {
  local what=lost
  if is_running; then
    what=running
  elif [[ -f "$state/status" ]]; then # looked at last: it may have ended just now
    what="ended $(cat "$state/status")"
  elif [[ ! -f "$state/pid" ]]; then
    what=never
  fi
  reply "$what $(tail -n 1 "$state/log" 2>/dev/null | tr -d '\r' | cut -c 1-160 || true)"
}

logs() {
  local tail
  [[ -z "$lines" ]] || check_count lines "$lines" 100
  [[ -f "$state/log" ]] || fail "nothing has been started here"
  if [[ -z "$follow" ]]; then
    tail -n "${lines:-+1}" "$state/log"
    return
  fi
  tail -n "${lines:-+1}" -f "$state/log" &
  tail=$!
  while is_running; do sleep "$tick"; done
  sleep "$tick" # for its last lines
  kill "$tail"
}

stop() {
  local seconds
  in_seconds wait "$wait"
  if is_running; then
    kill -TERM "$(cat "$state/pid")"
    seconds=$((SECONDS + seconds))
    while is_running && ((SECONDS < seconds)); do sleep "$tick"; done
  fi
  status
  ! is_running
}

(($#)) || set -- --help
command="$1"
shift
case "$command" in
  -h | --help | help)
    usage
    exit
    ;;
  setup) parse "accelerator" "get-python" "$@" ;;
  run) parse "max-restarts status-file" "" "$@" ;;
  start) parse "max-restarts" "" "$@" ;;
  status) parse "" "" "$@" ;;
  logs) parse "lines" "follow" "$@" ;;
  stop) parse "wait" "" "$@" ;;
  *) fail "unknown command '$command'; see launch/pods/host.sh --help" ;;
esac

# The status is there whole or not at all.
clean_up() {
  [[ -n "$status_file" ]] || return 0
  echo "$1" >"$status_file.new"
  mv "$status_file.new" "$status_file"
}

case "$command" in
  run) run_here ;;
  *) "$command" ;;
esac

#!/usr/bin/env bash
# Cloud TPU VMs and pods: creates one, installs HEAD on all its workers, runs spire_jax there,
# fetches the report, deletes it; goes on after preemptions.
#
#   launch/pods/cloud_tpu.sh up --name=my-tpu --zone=us-west4-a --type=v5litepod-16 --spot \
#     -- --config=configs/study.py --workdir=gs://my-bucket/study
#
# Commands: create, install, run, logs, fetch, status, stop, delete, each on its own, and `up`: all
# in turn, and the TPU deleted at the end, after a failure and after Ctrl-C too.
#
#   --name --zone [--project]   which TPU; --project is else gcloud's own
#   --type [--version]          what to create; the runtime image follows from the type
#   --spot, --reserved          cheaper, and taken away at any time; of the project's reservation
#   --queue [--wait=1h]         as a queued resource (say so to every command that concerns it);
#                               --wait limits the waiting for capacity, with or without a queue
#   --service-account --network --subnetwork   as for gcloud
#   --internal-ip, --tunnel-through-iap   a TPU without external addresses, which is reached from
#                               its own network, or through Google's proxy (say so to every command)
#   --allow-dirty               HEAD runs, whatever the working tree holds
#   --max-restarts=20           `up`: how often a preempted run is taken up again
#   --keep                      `up`: leaves the TPU running at the end
#   --out=runs/pods/NAME        where logs and report go
#   --worker=0 --follow         of `logs`
#   --dry-run                   prints every command and runs none
#
# Ends with spire_jax.run's status: 0 finished, 75 preempted or no capacity (the same command goes
# on). `run` follows a detached process: stop it, and the run goes on, and `run` follows it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/pods/common.sh

name="" zone="" project="" type="" version="" wait=1h max_restarts=20 out="" worker=0 workdir=""
service_account="" network="" subnetwork="" spot="" reserved="" queue="" keep="" allow_dirty=""
internal_ip="" tunnel_through_iap="" follow=""
seconds=0 state="" workers=1 replies=""
created="" started=""
unreachable_limit="${POD_UNREACHABLE:-20}" # looks at a TPU that is up but does not answer
straggler_limit="${POD_STRAGGLERS:-10}"    # looks at workers that outlive one that failed

vm=(gcloud compute tpus tpu-vm)
queued=(gcloud compute tpus queued-resources)
remote=("${vm[@]}") # ssh and scp

is_missing() { grep -qiE 'not_found|not found|does not exist' <<<"$errors"; }

# Of a creation that failed: whether it may succeed later. A quota does not grow by waiting.
may_pass() {
  ! grep -qi quota <<<"$1" && grep -qiE "no more capacity|not enough|stockout|resource_exhausted|\
unavailable|deadline|timed out|timeout|internal error|try again|connection" <<<"$1"
}

# The TPU's state into $state (GONE: there is none; UNKNOWN: gcloud failed), their number into
# $workers. https://cloud.google.com/sdk/gcloud/reference/topic/projections has len().
look() {
  local format='value(state,networkEndpoints.len())'
  if capture "$1 1" "${vm[@]}" describe "$name" "${where[@]}" --format="$format"; then
    read -r state workers <<<"$output" || true
    workers="${workers:-0}"
  elif is_missing; then
    state=GONE
  else
    state=UNKNOWN
  fi
}

look_at_queue() {
  if capture "$1" "${queued[@]}" describe "$name" "${where[@]}" --format='value(state.state)'; then
    state="$output"
  elif is_missing; then
    state=GONE
  else
    state=UNKNOWN
  fi
}

# on_all ANSWER COMMAND [PATTERN]: in the login shells of all workers. True when each has sent the
# line of host.sh that begins with PATTERN (ANSWER), into $replies; gcloud's own status says too
# little.
on_all() {
  capture "spire_jax-host worker $1" "${remote[@]}" ssh "$name" "${there[@]}" --worker=all \
    --command="$2" || true
  replies="$(grep -E "^spire_jax-host [^ ]+ ${3-$1}" <<<"$output" || true)"
  ((workers > 0 && $(grep -c . <<<"$replies") == workers))
}

host() { echo "cd spire_jax && bash launch/pods/host.sh $*"; }

# --- create and delete ------------------------------------------------------------------------

set_delete() {
  # --force: with its nodes (https://cloud.google.com/tpu/docs/queued-resources).
  delete=("${vm[@]}" delete "$name" "${where[@]}")
  [[ -z "$queue" ]] || delete=("${queued[@]}" delete "$name" "${where[@]}" --force)
}

# True when it is gone, whoever deleted it.
remove() {
  local i
  for ((i = 0; i < 2 * tries; i++)); do # what is still being created may refuse for minutes
    if perform "" "${delete[@]}" || is_missing; then
      holding_nothing
      owned=""
      return
    fi
    pause "$i"
  done
  return 1
}

# What exists already is not ours to delete at the end.
refuse_existing() {
  if [[ -n "$queue" ]]; then look_at_queue GONE; else look GONE; fi
  case "$state" in
    GONE) ;;
    UNKNOWN) fail "gcloud cannot tell whether there is a $name: $errors" ;;
    *) fail "there is a $name already ($state): choose another --name, go on with \`install\`" \
      "and \`run\`, or delete it: $(quoted "${delete[@]}")" ;;
  esac
}

create() {
  local i why deadline=$((SECONDS + seconds)) command
  local common=("${where[@]}" "--accelerator-type=$type")
  [[ -z "$spot" ]] || common+=(--spot)
  [[ -z "$reserved" ]] || common+=(--reserved)
  [[ -z "$internal_ip$tunnel_through_iap" ]] || common+=(--internal-ips)
  [[ -z "$service_account" ]] || common+=("--service-account=$service_account")
  [[ -z "$network" ]] || common+=("--network=$network")
  [[ -z "$subnetwork" ]] || common+=("--subnetwork=$subnetwork")
  command=("${vm[@]}" create "$name" "${common[@]}" "--version=$version")
  # https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create
  [[ -z "$queue" ]] || command=("${queued[@]}" create "$name" "--node-id=$name" "${common[@]}"
    "--runtime-version=$version" "--valid-until-duration=${seconds}s")
  for ((i = 0; ; i++)); do
    # Before it is there: a creation that is stopped half-way may still come about.
    holding "$name ($type in $zone)" "${delete[@]}"
    owned=yes
    if perform "" "${command[@]}"; then break; fi
    why="$errors"
    if ((i == 0)) && grep -qiE 'already_exists|already exists' <<<"$why"; then
      owned=""
      holding_nothing
      fail "somebody else has just made a $name; if it was you: $(quoted "${delete[@]}")"
    fi
    remove || fail "could not be created, and perhaps not be deleted"
    may_pass "$why" || fail "$name could not be created: see above"
    ((SECONDS < deadline)) || unfinished "no capacity for a $type in $zone within --wait=$wait"
    pause "$i"
  done
  [[ -z "$queue" ]] || await_capacity "$deadline"
  created=yes
}

await_capacity() {
  while :; do
    look_at_queue ACTIVE
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPEND* | GONE) unfinished "the request $name is $state; it got no capacity" ;;
    esac
    ((SECONDS < $1)) || unfinished "no capacity for a $type in $zone within --wait=$wait"
    say "$name: $state"
    sleep "$poll"
  done
}

await_ready() {
  local i
  for ((i = 0; i < 40; i++)); do
    look READY
    case "$state" in
      READY) return ;;
      PREEMPTED | TERMINATED) return "$preempted" ;;
      GONE) [[ -n "$queue" ]] || fail "there is no $name" ;;
    esac
    say "$name: $state"
    sleep "$poll"
  done
  fail "$name does not become READY"
}

# --- install and run --------------------------------------------------------------------------

# After a step failed: 75 if the TPU was taken away, else goes on. A queued one vanishes then, and
# its request stays behind.
unless_preempted() {
  look READY
  if [[ "$state" == GONE && -n "$queue" ]]; then look_at_queue SUSPENDED; fi
  case "$state" in
    PREEMPTED | TERMINATED | ACTIVE | SUSPEND* | FAILED) return "$preempted" ;;
  esac
}

install() {
  local i unpack
  # Only what the environment, the work and the data need stays of an earlier installation.
  unpack="mkdir -p spire_jax && find spire_jax -mindepth 1 -maxdepth 1 ! -name .venv"
  unpack+=" ! -name runs ! -name data -exec rm -rf {} + && tar -xzf spire_jax.tar.gz -C spire_jax"
  unpack+=" && rm spire_jax.tar.gz && $(host setup --accelerator=tpu --get-python)"
  run mkdir -p "$out" || fail "$out cannot be made"
  run git archive --format=tar.gz --output="$out/source.tar.gz" HEAD || fail "HEAD cannot be packed"
  for ((i = 0; i < tries; i++)); do # sshd and the network come after READY
    if run "${remote[@]}" scp "$out/source.tar.gz" "$name:spire_jax.tar.gz" "${there[@]}" \
      --worker=all && live=yes on_all set-up "$unpack"; then
      return
    fi
    say "installed on $(grep -c . <<<"$replies" || true) of $workers workers"
    unless_preempted || return
    pause "$i"
  done
  fail "$name: the installation does not succeed"
}

start() {
  local i command
  # A worker does not start again by itself: all go on together, after a new `start`.
  command="$(host start --max-restarts=0 -- "$(quoted "${run_arguments[@]}" --distributed)")"
  started=yes
  say "starting the run on $workers workers"
  for ((i = 0; i < tries; i++)); do
    ! on_all started "$command" || return 0
    printf '%s\n' "$errors" >&2
    unless_preempted || return
    pause "$i"
  done
  fail "$name: the run started on $(grep -c . <<<"$replies" || true) of $workers workers"
}

# What $replies say: "running", or the status of the run, into $verdict.
judge() {
  local what value running=0 bad="" restart=""
  verdict=0
  while read -r _ _ what value _; do
    case "$what $value" in
      running*) running=$((running + 1)) ;;
      "ended 0") ;;
      "ended $preempted" | lost* | never*) restart=yes ;;
      *) bad="${bad:-$value}" ;;
    esac
  done <<<"$replies"
  [[ -z "$bad" ]] || verdict="$bad"
  [[ -z "$restart" ]] || verdict="$preempted" # its end explains how the others ended
  ((running == 0)) || { [[ "$verdict" != 0 ]] && ((stragglers++ >= straggler_limit)); } ||
    verdict=running
}

# Until the run has ended on all workers. Its status, or 75 when the TPU was taken away.
follow_run() {
  local verdict stragglers=0 unreachable=0 seen=""
  while :; do
    if on_all "ended 0" "$(host status)" ""; then
      unreachable=0
      judge
      [[ "$replies" == "$seen" || -n "$dry_run" ]] || printf '%s\n' "$replies" >&2
      seen="$replies"
      [[ "$verdict" == running ]] || return "$verdict"
    else
      unless_preempted || return
      case "$state" in
        GONE) fail "$name is gone: somebody else has deleted it" ;;
        UNKNOWN) say "Google Cloud does not answer; the run goes on" ;; # this end's network
        READY) ((unreachable++ < unreachable_limit)) ||
          fail "$name is $state, but its workers do not answer: $errors" ;;
        *) say "$name: $state" ;; # under repair, say
      esac
    fi
    sleep "$poll"
  done
}

# --- fetch ------------------------------------------------------------------------------------

fetch_logs() {
  run mkdir -p "$out/logs"
  run "${remote[@]}" ssh "$name" "${there[@]}" --worker=all --command="$(host logs)" \
    --output-directory="$out/logs"
}

# From a folder that the workers share, while there are workers.
fetch_from_workers() {
  [[ "$workdir" == gs://* ]] ||
    run "${remote[@]}" scp --recurse "$name:${workdir%/}/report" "$out/" "${there[@]}" --worker=0
}

fetch_report() { [[ "$workdir" != gs://* ]] || fetch_from_bucket "$out"; }

# --- all in turn ------------------------------------------------------------------------------

once() {
  await_ready || return
  install || return
  start || return
  follow_run
}

up() {
  local restarts status fetched=yes
  check_source "$allow_dirty"
  refuse_existing
  for ((restarts = 0; ; restarts++)); do
    created="" started=""
    create
    status=0
    once || status=$?
    ((status == preempted)) || break
    remove || fail "$name was preempted and cannot be deleted"
    ((restarts < max_restarts)) ||
      unfinished "preempted, and the $max_restarts restarts of --max-restarts are used up"
    say "preempted; creating $name again ($((restarts + 1)) of at most $max_restarts times)"
  done
  started=""
  fetch_logs || say "the logs could not be fetched"
  if ((status != 0)); then
    tail -n 20 "$out/logs/0.log" >&2 2>/dev/null || true
    say "the run failed with status $status; logs: $out/logs"
    exit "$status"
  fi
  fetch_from_workers || fetched=""
  [[ -n "$keep" ]] || remove || fail "the run has finished"
  fetch_report || fetched=""
  [[ -n "$fetched" ]] || fail "the run finished; its report could not be fetched from $workdir"
}

clean_up() {
  [[ -n "$owned" && -z "$dry_run" && (-z "$keep" || -z "$created") ]] || return 0
  if [[ -n "$started" && -n "$interrupted" ]]; then
    say "saving a checkpoint (Ctrl-C: without)"
    trap 'true' INT # ends the command, not this
    on_all ended "$(host stop --wait=90)" || say "not all workers could save a checkpoint"
    trap '' INT
  fi
  say "deleting $name"
  remove
}

# --- this command -----------------------------------------------------------------------------

(($#)) || set -- --help
command="$1"
shift
options="name zone project"
flags="queue internal-ip tunnel-through-iap"
creating="type version wait service-account network subnetwork"
case "$command" in
  -h | --help | help)
    usage
    exit
    ;;
  up) options+=" $creating max-restarts out" flags+=" spot reserved keep allow-dirty" ;;
  create) options+=" $creating" flags+=" spot reserved" ;;
  install) options+=" out" flags+=" allow-dirty" ;;
  fetch) options+=" out" ;;
  logs) options+=" worker" flags+=" follow" ;;
  run | status | stop | delete) ;;
  *) fail "unknown command '$command'; see launch/pods/cloud_tpu.sh --help" ;;
esac
parse "$options" "$flags" "$@"
# https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes/create
check name "$name" '[a-z]([-a-z0-9]{0,59}[a-z0-9])?' my-tpu
check_zone "$zone"
where=("--zone=$zone" --quiet) # --quiet: asks nothing
if [[ -n "$project" ]]; then
  check_project "$project"
  where+=("--project=$project")
fi
there=("${where[@]}")
if [[ -n "$internal_ip" ]]; then
  [[ -z "$tunnel_through_iap" ]] || fail "one of --internal-ip and --tunnel-through-iap"
  there+=(--internal-ip)
elif [[ -n "$tunnel_through_iap" ]]; then
  remote=(gcloud alpha compute tpus tpu-vm) # the others know no tunnel
  there+=(--tunnel-through-iap)
fi
out="${out:-runs/pods/$name}"
set_delete
if [[ " $options " == *" type "* ]]; then
  check type "$type" '[a-z0-9]+-[0-9]+' v5litepod-16
  in_seconds wait "$wait"
  if [[ -z "$version" ]]; then # https://cloud.google.com/tpu/docs/runtimes
    case "$type" in
      v6e-*) version=v2-alpha-tpuv6e ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v[234]-*) version=tpu-ubuntu2204-base ;;
      *) fail "no runtime image is known for --type=$type; name it with --version=..." ;;
    esac
  fi
  check version "$version" '[a-z0-9][-a-z0-9._]*' v2-alpha-tpuv6e
fi
check_count max-restarts "$max_restarts" 20
check worker "$worker" '[0-9]+|all' 0
case "$command" in up | run | fetch) check_cloud_workdir ;; esac
[[ "$command" != logs || -z "$follow" || "$worker" != all ]] || fail "--follow follows one worker"
need gcloud "$gcloud_comes_from"
# What is there already goes on costing money when a command on it ends.
case "$command" in install | run | stop | delete) holding "$name in $zone" "${delete[@]}" ;; esac

case "$command" in
  up) up ;;
  create)
    refuse_existing
    create
    await_ready || unfinished "$name was preempted"
    owned=""
    ;;
  install)
    check_source "$allow_dirty"
    await_ready && install
    ;;
  run) await_ready && start && follow_run ;;
  logs)
    run "${remote[@]}" ssh "$name" "${there[@]}" --worker="$worker" \
      --command="$(host logs ${follow:+--follow})"
    ;;
  fetch)
    fetch_logs
    fetch_from_workers
    fetch_report
    ;;
  status)
    if [[ -n "$queue" ]]; then
      look_at_queue ACTIVE
      say "request $name: $state"
    fi
    look READY
    say "$name: $state"
    if [[ "$state" == READY ]]; then
      on_all running "$(host status)" "" || say "not all of $workers workers answer"
      [[ -n "$dry_run" ]] || printf '%s\n' "$replies"
    fi
    ;;
  stop)
    look READY
    on_all ended "$(host stop)" "(ended|never|lost)" || fail "not all workers have stopped: $errors"
    ;;
  delete) remove || fail "$name could not be deleted: $errors" ;;
esac

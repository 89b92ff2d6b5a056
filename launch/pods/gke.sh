#!/usr/bin/env bash
# TPUs on GKE through xpk: submits spire_jax as a workload of a cluster that exists, waits for it,
# fetches the report.
#
#   launch/pods/gke.sh up --name=study --cluster=my-cluster --zone=us-west4-a --project=my-project \
#     --type=v5litepod-16 --image=REGION-docker.pkg.dev/my-project/my-repository/spire_jax \
#     -- --config=configs/study.py --workdir=gs://my-bucket/study
#
# Commands: create, wait, logs, fetch, status, delete, each on its own, and `up`: create, wait and
# fetch; the workload is deleted if that is stopped before it has ended.
#
#   --name --cluster --zone --project   which workload (the cluster is made by xpk cluster create)
#   --type [--slices=1]         what it runs on
#   --image                     holds this repository as its working directory, and jax[tpu]; or
#   --base-image                with Python 3.11 or later; xpk adds HEAD, and each start installs
#   --allow-dirty               with --base-image: HEAD runs, whatever the working tree holds
#   --max-restarts=20           how often a preempted run is taken up again, by the cluster
#   --grace=120                 seconds for a checkpoint between SIGTERM and the end of a pod
#   --wait=168h                 how long to wait for the end
#   --out=runs/pods/NAME        where the report goes
#   --follow, --past            of `logs`: go on; what pods that are gone have written
#   --dry-run                   prints every command and runs none
#
# Ends with 0 when the run has finished and 1 when it failed, restarts included.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/pods/common.sh

name="" cluster="" zone="" project="" type="" slices=1 image="" base_image="" max_restarts=20
grace=120 wait=168h out="" workdir="" allow_dirty="" follow="" past=""
seconds=0 state="" failures_limit="${POD_UNREACHABLE:-20}"

# Whether there is a workload of this name. Its row in xpk's list begins with it.
look() {
  capture "$1" xpk workload list "${where[@]}" --filter-by-job="$name" ||
    fail "xpk cannot list the workloads of $cluster: $output $errors"
  state="$(awk -v name="$name" '$1 == name' <<<"$output")"
}

remove() {
  local i
  for ((i = 0; i < tries; i++)); do
    if perform "" "${delete[@]}" || grep -qiE 'notfound|not found' <<<"$output$errors"; then
      holding_nothing
      owned=""
      return
    fi
    printf '%s\n' "$output" >&2
    pause "$i"
  done
  return 1
}

create() {
  local code=("--docker-image=$image") command arguments
  # "exec": xpk sends SIGTERM to the shell that it starts this in; python must be in its place.
  arguments="$(quoted "${run_arguments[@]}" --distributed)"
  command="exec python -m spire_jax.run $arguments"
  if [[ -n "$base_image" ]]; then
    check_source "$allow_dirty"
    code=("--base-docker-image=$base_image" "--script-dir=$out/source")
    command="bash launch/pods/host.sh setup --accelerator=tpu"
    command+=" && exec bash launch/pods/host.sh run --max-restarts=0 -- $arguments"
  fi
  # Before anything else: xpk would offer to overwrite it, and what is not ours is not deleted.
  look ""
  [[ -z "$state" ]] ||
    fail "there is a workload $name already: choose another --name, or: $(quoted "${delete[@]}")"
  if [[ -n "$base_image" ]]; then
    run rm -rf "$out/source"
    run mkdir -p "$out/source"
    run git archive --format=tar --output="$out/source.tar" HEAD
    run tar -xf "$out/source.tar" -C "$out/source"
  fi
  holding "the workload $name on the cluster $cluster" "${delete[@]}"
  owned=yes
  # xpk takes a failed pod (a preempted one ends with 137 or 143) for a reason to restart; 75 has
  # to be named: https://github.com/AI-Hypercomputer/xpk, `xpk workload create --help`.
  perform "" xpk workload create "${where[@]}" --workload="$name" --tpu-type="$type" \
    --num-slices="$slices" "${code[@]}" --max-restarts="$max_restarts" \
    --restart-on-exit-codes="$preempted" --termination-grace-period-seconds="$grace" \
    --command="$command" && return
  printf '%s\n' "$output" >&2
  if grep -q "$name already exists" <<<"$output$errors"; then
    owned=""
    holding_nothing
    fail "somebody else has just made a $name; if it was you: $(quoted "${delete[@]}")"
  fi
  fail "the workload could not be created"
}

# Until it has ended: 0 or 1.
await_end() {
  local status failures=0 deadline=$((SECONDS + seconds))
  while :; do
    status=0
    # In pieces of an hour, since a connection does not last for days. 124: the hour is over, 125:
    # the workload failed.
    capture "" xpk workload list "${where[@]}" --wait-for-job-completion="$name" --timeout=3600 ||
      status=$?
    case "$status" in
      0 | 125)
        holding_nothing # its pods have left the nodes
        owned=""
        ((status != 0)) || return 0
        say "the run failed; what it wrote: launch/pods/gke.sh logs --past ..."
        return 1
        ;;
      124) failures=0 ;;
      *)
        if grep -q "$name does not exist" <<<"$output"; then
          holding_nothing
          owned=""
          fail "there is no workload $name on $cluster; has somebody deleted it?"
        fi
        ((failures++ < failures_limit)) || fail "xpk cannot wait for $name: $output $errors"
        ;;
    esac
    ((SECONDS < deadline)) || fail "$name has not ended within --wait=$wait"
    ((status == 124)) || sleep "$poll"
  done
}

logs() {
  if [[ -n "$past" ]]; then
    # https://cloud.google.com/sdk/gcloud/reference/logging/read: else of the last day.
    run gcloud logging read "resource.type=k8s_container AND \
resource.labels.cluster_name=$cluster AND resource.labels.pod_name:$name-slice-job" \
      --project="$project" --freshness=7d --order=asc --format='value(textPayload)'
    return
  fi
  look "$name" # and it gets kubectl the credentials
  # The first process of each slice; --tail=-1: from its beginning.
  run kubectl logs --prefix --all-containers --tail=-1 ${follow:+--follow} \
    --selector="xpk.google.com/workload=$name,batch.kubernetes.io/job-completion-index=0"
}

clean_up() {
  [[ -n "$owned" && -z "$dry_run" ]] || return 0
  say "deleting the workload $name"
  remove
}

(($#)) || set -- --help
command="$1"
shift
options="name cluster zone project"
flags=""
creating="type slices image base-image max-restarts grace"
case "$command" in
  -h | --help | help)
    usage
    exit
    ;;
  up) options+=" $creating wait out" flags+=" allow-dirty" ;;
  create) options+=" $creating out" flags+=" allow-dirty" ;;
  wait) options+=" wait" ;;
  fetch) options+=" out" ;;
  logs) flags+=" follow past" ;;
  status | delete) ;;
  *) fail "unknown command '$command'; see launch/pods/gke.sh --help" ;;
esac
parse "$options" "$flags" "$@"
check name "$name" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' study
check cluster "$cluster" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' my-cluster
check_zone "$zone"
check_project "$project"
where=("--cluster=$cluster" "--zone=$zone" "--project=$project")
# --force: asks nothing.
delete=(xpk workload delete "${where[@]}" "--workload=$name" --force)
out="${out:-runs/pods/$name}"
in_seconds wait "$wait"
if [[ " $options " == *" type "* ]]; then
  check type "$type" '[a-z0-9]+-[0-9]+(x[0-9]+)*' v5litepod-16 # or tpu7x-2x2x2, by topology
  check slices "$slices" '[1-9][0-9]{0,3}' 1
  check_count max-restarts "$max_restarts" 20
  check_count grace "$grace" 120
  [[ -n "$image$base_image" && (-z "$image" || -z "$base_image") ]] ||
    fail "one of --image=... and --base-image=... says what the pods run"
  check image "$image$base_image" '[a-z0-9][-a-zA-Z0-9._/:@]*' python:3.12
fi
case "$command" in
  up | create | fetch)
    check_cloud_workdir
    # shellcheck disable=SC2016
    case "${run_arguments[*]}" in
      *'$$'* | *'$('*) fail "Kubernetes rewrites \$\$ and \$( in arguments; leave them out" ;;
    esac
    ;;
esac
if [[ "$command" == fetch || "$command" == up ]] && [[ "$workdir" != gs://* ]]; then
  fail "--workdir=$workdir is no bucket, from which the report could be fetched (gs://...)"
fi
need xpk "install it with: pip install xpk"
need gcloud "$gcloud_comes_from"
need kubectl "install it with: gcloud components install kubectl"
[[ -z "$base_image" ]] || need docker "xpk builds the image with it: https://docs.docker.com/engine"

case "$command" in
  up)
    create
    await_end
    fetch_from_bucket "$out"
    ;;
  create)
    create
    owned=""
    ;;
  wait)
    holding "the workload $name on the cluster $cluster" "${delete[@]}"
    await_end
    ;;
  logs) logs ;;
  fetch) fetch_from_bucket "$out" ;;
  status)
    look "$name"
    [[ -n "$dry_run" ]] || printf '%s\n' "${state:-there is no workload $name}"
    ;;
  delete)
    holding "the workload $name on the cluster $cluster" "${delete[@]}"
    remove || fail "the workload $name could not be deleted"
    ;;
esac

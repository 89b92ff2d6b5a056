# shellcheck shell=bash
# shellcheck disable=SC2034  # variables for the scripts that source this
# Sourced by the launchers in this folder, from the repository's root: options, dry run, retries,
# and what is still running and costing money when a launcher ends.

preempted=75 # EX_TEMPFAIL of sysexits.h: SIGTERM made spire_jax.run save a checkpoint and stop
poll="${POD_POLL:-30}"       # seconds between two looks at what runs
first_pause="${POD_PAUSE:-5}" # whole seconds before the first retry; doubles with each one
longest_pause=60
tries="${POD_TRIES:-5}" # of what may fail in passing: a connection, a deletion

launcher="$(basename "$0" .sh)"
dry_run=""
run_arguments=() # what follows "--": the arguments of spire_jax.run
output="" errors="" # of the last `capture`
running_what="" running_delete="" # what costs money, and the command that ends it
owned="" # this launcher deletes what runs when it ends
interrupted="" # by which signal
scratch=""

say() { echo "$launcher: $*" >&2; }

fail() {
  say "$@"
  exit 1
}

# The comment at the top of the launcher.
usage() { sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; }

# --- options ----------------------------------------------------------------------------------

# parse "OPTIONS" "FLAGS" ARGUMENT...: --some-option=value goes into $some_option, --some-flag puts
# "yes" into $some_flag, what follows "--" goes into $run_arguments. A value that begins with "~/"
# is a path in the home folder, as in spire_jax/config/paths.py.
parse() {
  local options=" $1 " flags=" $2 " key value
  shift 2
  while (($#)); do
    key="${1%%=*}" key="${key#--}"
    case "$1" in
      --) shift && run_arguments=("$@") && return ;;
      --dry-run) dry_run=yes ;;
      --*=) fail "--$key has no value" ;;
      --*=*)
        [[ "$key" != *" "* && "$options" == *" $key "* ]] ||
          fail "unknown option --$key; see $launcher.sh --help"
        value="${1#*=}"
        [[ "$value" != \~/* ]] || value="$HOME/${value:2}"
        printf -v "${key//-/_}" '%s' "$value"
        ;;
      --*)
        [[ "$key" != *" "* && "$options" != *" $key "* ]] || fail "--$key wants a value: --$key=..."
        [[ "$flags" == *" $key "* ]] || fail "unknown option $1; see $launcher.sh --help"
        printf -v "${key//-/_}" yes
        ;;
      *) fail "unexpected argument '$1'; arguments of spire_jax.run go after \"--\"" ;;
    esac
    shift
  done
}

# check OPTION VALUE REGULAR-EXPRESSION EXAMPLE
check() {
  [[ -n "$2" ]] || fail "--$1 is missing, as in --$1=$4"
  [[ "$2" =~ ^($3)$ ]] || fail "--$1=$(quoted "$2") is not valid; it looks like --$1=$4"
}

# Zones end in a letter or in a name of their own (us-central1-ai1a); a region is none.
check_zone() { check zone "$1" '[a-z]+(-[a-z]+)+[0-9]+-[a-z0-9]+' us-west4-a; }

# As gcloud has it: an ID, perhaps after a domain (example.com:my-project), or a number.
check_project() {
  check project "$1" '([-a-z0-9.]+:)?[a-z0-9]([-a-z0-9]*[a-z0-9])?' my-project
}

check_count() { check "$1" "$2" '0|[1-9][0-9]{0,5}' "$3"; }

# "90", "90s", "30m" or "2h" as seconds, into $seconds.
in_seconds() {
  check "$1" "$2" '(0|[1-9][0-9]{0,6})[smh]?' 30m
  case "$2" in
    *h) seconds=$((${2%h} * 3600)) ;;
    *m) seconds=$((${2%m} * 60)) ;;
    *) seconds="${2%s}" ;;
  esac
}

# The arguments of spire_jax.run: a config that exists, and a work directory, into $workdir, that
# outlives the machine.
check_run_arguments() {
  local argument config=""
  workdir=""
  for argument in ${run_arguments[@]+"${run_arguments[@]}"}; do
    case "$argument" in
      *[[:cntrl:]]*) fail "a line break or control character in $(quoted "$argument")" ;;
      --config=*) config="${argument#*=}" ;;
      --workdir=*) workdir="${argument#*=}" ;;
    esac
  done
  [[ -n "$config" ]] || fail "no --config=... after \"--\", as in: -- --config=configs/study.py $1"
  [[ "$config" != \~/* ]] || config="$HOME/${config:2}"
  [[ -f "$config" ]] || fail "there is no config $config (as seen from $PWD)"
  [[ -n "$workdir" ]] || fail "no --workdir=... after \"--\", as in: -- --config=$config $1"
}

# Of a run on several machines, to which the launcher adds --distributed.
refuse_distributed() {
  local argument
  for argument in "${run_arguments[@]}"; do
    case "$argument" in
      --distributed* | --coordinator* | --num-processes* | --process-id*)
        fail "leave $argument out: this launcher says how the processes find each other" ;;
    esac
  done
}

check_cloud_workdir() {
  check_run_arguments --workdir=gs://my-bucket/my-run
  refuse_distributed
  [[ "$workdir" =~ ^gs://[a-z0-9][-a-z0-9_.]+/. || "$workdir" == /?* ]] ||
    fail "--workdir=$workdir goes with the machine; name a bucket (gs://bucket/folder), or a" \
      "folder that all machines share, by its absolute path"
}

# need PROGRAM HOW-TO-GET-IT: before anything starts. A dry run needs none.
need() {
  [[ -n "$dry_run" ]] || command -v "$1" >/dev/null || fail "there is no program $1; $2"
}

gcloud_comes_from="install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), then:\
 gcloud auth login"

# --- commands ---------------------------------------------------------------------------------

# As one line that any shell reads back as the same words.
quoted() {
  local word line="" escaped="'\\''"
  for word in "$@"; do
    [[ "$word" =~ ^[-a-zA-Z0-9_./:=,@%+]+$ ]] || word="'${word//\'/$escaped}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# A command that is shown and run; in a dry run, only shown.
run() {
  if [[ -n "$dry_run" ]]; then
    quoted "$@"
  else
    say "\$ $(quoted "$@")"
    "$@"
  fi
}

# capture ANSWER COMMAND...: what it prints goes into $output and $errors. In a dry run the command
# is shown, and ANSWER stands for its output. With live=yes its messages are seen at once.
capture() {
  local answer="$1" status=0
  shift
  output="$answer" errors=""
  if [[ -n "$dry_run" ]]; then
    quoted "$@"
    return
  fi
  [[ -n "$scratch" ]] || scratch="$(mktemp -d)"
  : >"$scratch/errors"
  if [[ -n "${live:-}" ]]; then
    "$@" </dev/null >"$scratch/output" || status=$?
  else
    "$@" </dev/null >"$scratch/output" 2>"$scratch/errors" || status=$?
  fi
  output="$(cat "$scratch/output")" errors="$(cat "$scratch/errors")"
  return "$status"
}

# `capture` of what changes something: shown before, and its messages after.
perform() {
  local status=0
  [[ -n "$dry_run" ]] || say "\$ $(quoted "${@:2}")"
  capture "$@" || status=$?
  [[ -z "$errors" ]] || printf '%s\n' "$errors" >&2
  return "$status"
}

# pause N: before the retry number N, from 0.
pause() {
  local seconds="$first_pause" i
  for ((i = 0; i < $1 && seconds < longest_pause; i++)); do seconds=$((seconds * 2)); done
  [[ -n "$dry_run" ]] || sleep "$((seconds < longest_pause ? seconds : longest_pause))"
}

# What runs on a machine of its own is HEAD. A dry run asks git nothing.
check_source() {
  need git "install git"
  capture "" git status --porcelain || fail "$PWD is no git checkout: $errors"
  [[ -n "$output" ]] || return 0
  printf '%s\n' "$output" >&2
  [[ -n "$1" ]] ||
    fail "what runs is HEAD, and the working tree differs (above): commit that, or leave it out" \
      "with --allow-dirty"
  say "what runs is HEAD, without the changes above"
}

# Not over, and nothing failed: the same command goes on where this one stopped.
unfinished() {
  say "$@"
  exit "$preempted"
}

# Copies the report out of a bucket. fetch_from_bucket FOLDER
fetch_from_bucket() {
  run mkdir -p "$1"
  run gcloud storage cp --recursive "${workdir%/}/report" "$1/"
}

# --- the end ----------------------------------------------------------------------------------

# holding WHAT COMMAND...: WHAT costs money from now on, or may at any moment; COMMAND deletes it.
holding() {
  running_what="$1"
  running_delete="$(quoted "${@:2}")"
}

holding_nothing() { running_what="" running_delete=""; }

# A launcher redefines this: deletes what it has made, if that is its task. $1: the exit status.
clean_up() { :; }

leave() {
  local status=$?
  set +e # a closed terminal makes every message fail
  trap - EXIT
  # What cleans up must not be stopped half-way by a second Ctrl-C, nor the programs it starts.
  trap '' INT TERM HUP
  clean_up "$status"
  if [[ -n "$running_what" && -z "$dry_run" ]]; then
    say "STILL RUNNING AND COSTING MONEY: $running_what"
    say "delete it with: $running_delete"
  fi
  [[ -z "$scratch" ]] || rm -rf "$scratch"
  exit "$status"
}

on_signal() {
  interrupted="$1"
  say "interrupted (SIG$1)"
  exit "$2"
}

trap leave EXIT
trap 'on_signal INT 130' INT
trap 'on_signal TERM 143' TERM
trap 'on_signal HUP 129' HUP

#!/usr/bin/env bash
# Makes .venv with a suitable Python and installs a list of requirements into it.
#
#   bash launch/setup.sh [--newest] [requirements.txt | requirements-test.txt]
#   bash launch/setup.sh --locked    # constraints/python3.XX.txt: these versions, these files
#
# Quick when nothing has changed: a stamp in .venv holds the hash of the lists and the version of
# Python. What an interrupted run left half-made is made again. PYTHON=/path/to/python chooses
# the interpreter that a new .venv is made with. What was installed by hand (jax[tpu], ...) stays.
# The environment's Python finds spire_jax, pallas_kernels and launch wherever it is started.
# --newest makes .venv-newest beside it, with the newest Python on the PATH or of pyenv: from 3.12
# on there are newer releases of jax.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv oldest=11 newest=""
if [[ "${1:-}" == --newest ]]; then
  venv=.venv-newest oldest=12 newest=yes
  shift
fi
busy="$venv/.installing" # who is installing; outlives a kill
mine=""

say() { echo "setup: $*" >&2; }

fail() {
  say "$@"
  [[ -z "$mine" ]] || rm -f "$busy"
  exit 1
}

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])'; }

# Says why a command is no suitable Python; says nothing where it is one.
why_not() {
  local version
  if ! command -v "$1" >/dev/null; then
    echo "not found"
  elif ! version="$(version_of "$1" 2>/dev/null)"; then
    echo "does not run"
  elif ! "$1" -c "import sys; sys.exit(sys.version_info < (3, $oldest))"; then
    echo "$version is older than 3.$oldest"
  elif ! "$1" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "$version lacks venv or ensurepip (on Debian and Ubuntu: apt install python3-venv)"
  fi
}

# Of Python 3.12 and later, newest first.
newest_pythons() {
  local minor
  for minor in {30..12}; do
    type -P "python3.$minor" || true
    compgen -G "${HOME:-}/.pyenv/versions/3.$minor.*/bin/python3.$minor" || true
  done
}

# $PYTHON, or the python3 that a shell gives, or the newest other one; or the newest of all.
find_python() {
  local candidate reason reasons="" candidates=(python3 python3.13 python3.12 python3.11)
  [[ -z "$newest" ]] || mapfile -t candidates < <(newest_pythons)
  [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    reason="$(why_not "$candidate")"
    if [[ -z "$reason" ]]; then
      command -v "$candidate"
      return
    fi
    reasons+="; $candidate: $reason"
  done
  fail "no suitable Python 3.$oldest or later${reasons}." \
    "Install one, or name it: PYTHON=/path/to/python"
}

# pip's RECORD is the last file that its installation writes.
works() {
  "$venv/bin/python" -c '
import importlib.metadata, sys
sys.exit(not importlib.metadata.distribution("pip").read_text("RECORD"))' 2>/dev/null
}

# A list and those it includes ("-r other.txt").
files_of() {
  local included
  echo "$1"
  while read -r included; do files_of "$included"; done < <(sed -n 's/^-r *//p' "$1")
}

stamp_of() { echo "$venv/.installed-${1##*/}"; }

stamp_text() {
  version_of "$venv/bin/python"
  files_of "$1" | "$venv/bin/python" -c '
import hashlib, sys
parts = [open(name.rstrip("\n"), "rb").read() for name in sys.stdin]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())'
}

# What an editable installation comes to: a line that names this folder. It needs no network and
# nothing that builds packages, which --locked would have to pin.
make_importable() {
  local version place
  version="$(version_of "$venv/bin/python")"
  place="$venv/lib/python${version%.*}/site-packages"
  [[ "$(cat "$place/spire_jax.pth" 2>/dev/null)" != "$PWD" ]] || return 0
  mkdir -p "$place"
  echo "$PWD" >"$place/spire_jax.pth"
}

is_current() {
  [[ -f "$(stamp_of "$list")" && ! -e "$busy" ]] && works &&
    [[ "$(cat "$(stamp_of "$list")")" == "$(stamp_text "$list")" ]]
}

check_choice_of_python() {
  local reason wanted has
  reason="$(why_not "$PYTHON")"
  [[ -z "$reason" ]] || fail "PYTHON=$PYTHON: $reason"
  wanted="$(version_of "$PYTHON")" has="$(version_of "$venv/bin/python")"
  [[ "$wanted" == "$has" ]] ||
    fail "PYTHON=$PYTHON is $wanted, but $venv has $has; unset PYTHON or remove $venv"
}

# The list that fits the Python of .venv, or the one that it would be made with.
lock_of_python() {
  local python="$venv/bin/python" version locks
  works || python="$(find_python)"
  version="$(version_of "$python")"
  list="constraints/python${version%.*}.txt"
  locks="$(cd constraints 2>/dev/null && echo *.txt)"
  [[ -f "$list" ]] || fail "--locked: there is no $list ($version); there are ${locks:-none}." \
    "Choose another PYTHON, make a lock with launch/lock.sh, or leave --locked out"
}

if [[ "${1:-}" == --locked ]]; then
  [[ $# -eq 1 ]] || fail "--locked installs the whole list of its Python; leave out ${*:2}"
  lock_of_python
  hashes=(--require-hashes)
else
  list="${1:-requirements.txt}" hashes=()
  [[ -f "$list" ]] || fail "there is no list of requirements called $list"
fi
[[ -z "${PYTHON:-}" ]] || ! works || check_choice_of_python
if is_current; then
  make_importable || fail "$PWD/$venv cannot be written"
  exit
fi

# One installation at a time.
interrupted=""
mkdir -p "$venv"
until (set -o noclobber && echo "$$" >"$busy") 2>/dev/null; do
  [[ -w "$venv" ]] || fail "$PWD/$venv cannot be written"
  other="$(cat "$busy" 2>/dev/null || true)"
  if [[ -n "$other" ]] && kill -0 "$other" 2>/dev/null; then
    [[ "${waited:-}" == "$other" ]] || say "waiting for another set-up (process $other)"
    waited="$other"
    sleep 1
  else # killed: the packages it was unpacking may look whole to pip
    interrupted=yes
    rm -f "$busy"
  fi
done
mine=yes

if [[ -n "$interrupted" ]] || ! works; then
  python="$(find_python)"
  [[ ! -e "$venv/pyvenv.cfg" ]] || say "$venv is half-made; making it again"
  find "$venv" -mindepth 1 -maxdepth 1 ! -name "${busy##*/}" -exec rm -rf {} +
  say "making $venv with $python ($(version_of "$python"))"
  "$python" -m venv "$venv"
fi

say "installing $list (a few minutes the first time)"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check "${hashes[@]}" -r "$list" ||
  fail "pip could not install $list (its message is above); is there a network? Then start again"
while read -r file; do
  stamp_text "$file" >"$(stamp_of "$file")"
done < <(files_of "$list")
make_importable
rm -f "$busy"

#!/usr/bin/env bash
# Writes constraints/python3.XX.txt: what the ranges of requirements-test.txt come to today, each
# package at one version and with the hashes of its files, for Linux on x86-64.
#
#   bash launch/lock.sh [3.11 3.12 ...]
#
# By default for every Python that is tested. A lock is made anew, at the newest versions that the
# ranges allow. uv resolves, from the PATH or fetched into a temporary environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pythons=("$@")
[[ $# -gt 0 ]] || pythons=(3.11 3.12 3.13)

place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
uv=uv
if ! command -v uv >/dev/null; then
  "${PYTHON:-python3}" -m venv "$place/uv"
  "$place/uv/bin/python" -m pip install -qq --disable-pip-version-check 'uv>=0.13,<0.14'
  uv="$place/uv/bin/uv"
fi

mkdir -p constraints
for python in "${pythons[@]}"; do
  lock="constraints/python$python.txt"
  # Nothing that says where the packages come from: every user has an index of their own.
  "$uv" pip compile requirements-test.txt --quiet --python-version "$python" \
    --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate \
    --no-emit-index-url --no-emit-find-links --output-file "$place/lock" >/dev/null
  {
    echo "# Made by launch/lock.sh from requirements-test.txt, for Python $python on Linux x86-64."
    cat "$place/lock"
  } >"$place/whole"
  mv "$place/whole" "$lock"
  rm "$place/lock"
  echo "lock: $lock, $(grep -c '==' "$lock") packages" >&2
done

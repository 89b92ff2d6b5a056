#!/usr/bin/env bash
# Set-up, linter, type checker, and the tests.
#
#   bash launch/test.sh            the fast tier
#   bash launch/test.sh --full     the long tests too
#   bash launch/test.sh --newest   only what needs a newer jax than Python 3.11 has, in an
#                                  environment of its own with the newest Python that is found
#
# Further arguments go to pytest: bash launch/test.sh tests/test_masks.py -k sink
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# One worker a core, at most four: each compiles its own programs and holds its own arrays. Two
# workers on two cores leave none for XLA's own threads, which at these sizes cost more than they
# bring.
workers=(-n logical --maxprocesses=4)

if [[ "${1:-}" == --newest ]]; then
  bash launch/setup.sh --newest requirements-test.txt
  python=.venv-newest/bin/python
  echo "test: $("$python" --version), jax $("$python" -c 'import jax; print(jax.__version__)')" >&2
  exec "$python" -m pytest "${workers[@]}" -m needs_jax "${@:2}"
fi

bash launch/setup.sh requirements-test.txt
bash launch/setup/libtpu.sh ||
  echo "test: no TPU compiler for this machine; the tests that compile for TPUs are skipped" >&2
bin=.venv/bin

"$bin/ruff" check .
"$bin/ruff" format --check .

# The types beside the tests, which leave a core idle at their end; what mypy says comes last.
types="$(mktemp)"
"$bin/mypy" >"$types" 2>&1 &
mypy=$!
trap 'kill "$mypy" 2>/dev/null || true; rm -f "$types"' EXIT

# A file stays with one worker, so that what its tests share is made once; files come in the order
# of their names, the long ones of end_to_end first.
status=0
"$bin/python" -m pytest "${workers[@]}" --dist=loadfile --no-loadscope-reorder "$@" || status=$?
wait "$mypy" || status=$((status ? status : $?))
cat "$types"
exit "$status"

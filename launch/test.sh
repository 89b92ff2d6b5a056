#!/usr/bin/env bash
# Set-up, linter, type checker, and the tests.
#
#   bash launch/test.sh            the fast tier
#   bash launch/test.sh --full     the long tests too
#
# Further arguments go to pytest: bash launch/test.sh tests/test_masks.py -k sink
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh requirements-test.txt
bash launch/setup_libtpu.sh ||
  echo "test: no TPU compiler for this machine; the tests that compile for TPUs are skipped" >&2
bin=.venv/bin

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"

# One worker a core, at most four: each compiles its own programs and holds its own arrays. A file
# stays with one worker, so that what its tests share is made once; files come in the order of their
# names, the long ones of end_to_end first. Two workers on two cores leave none for XLA's own
# threads, which at these sizes cost more than they bring.
workers=(-n logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder)
exec "$bin/python" -m pytest "${workers[@]}" "$@"

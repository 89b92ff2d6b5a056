#!/usr/bin/env bash
# What a borrowed accelerator is asked: are the kernels right, what do attention, rounds and training
# reach. At most ten minutes, one JSON file; launch/bench/device.py says what is in it.
#
#   [PYTHON=python3] bash launch/bench/device.sh [--out=FILE] [--minutes=9] [--parts=...] [--small]
#
# PYTHON (.venv/bin/python, or python3) has the accelerator's jax and the other packages of
# requirements.txt; nothing is installed or fetched. FILE is $OUT/device.json, or runs/device.json,
# as seen from this repository's root. --small tries it out, also on a CPU, in two minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python="${PYTHON:-.venv/bin/python}"
[[ -n "${PYTHON:-}" || -x "$python" ]] || python=python3
command -v "$python" >/dev/null || {
  echo "device: there is no $python; name one that has jax: PYTHON=/path/to/python" >&2
  exit 1
}
exec "$python" -m launch.bench.device --out="${OUT:-runs}/device.json" "$@"

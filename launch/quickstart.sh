#!/usr/bin/env bash
# The whole method on this machine's CPU in minutes: set-up, training, evaluation, report.
#
#   bash launch/quickstart.sh [--config.train.steps=500 ...]
#
# Results go to $WORKDIR (runs/quickstart), as seen from this repository's root, where it runs.
# Started again it goes on where it stopped. `.venv/bin/python -m launch.sample --workdir=...` puts a
# finished run's table and picture into the README.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh requirements.txt

source launch/setup/environment.sh

# exec: signals reach Python itself, and its exit status is this script's.
exec .venv/bin/python -m spire_jax.run --config=configs/quickstart.py \
  --workdir="${WORKDIR:-runs/quickstart}" "$@"

#!/usr/bin/env bash
# The paper's tables and figures at the size of configs/study.py: set-up, corpus, tokenizer,
# training of the target and of all drafts, evaluation, ablations, figures.
#
#   bash launch/study.sh [--config.study.seeds=1 ...]
#
# Results go to $WORKDIR (runs/study), as seen from this repository's root, where it runs. Started
# again it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/setup/python_packages.sh

workdir="${WORKDIR:-runs/study}"
config=--config=configs/study.py
"$python" -m spire_jax.run "$config" --workdir="$workdir" "$@"

overrides=()
for argument in "$@"; do
  [[ "$argument" != --config.* ]] || overrides+=("$argument")
done
if [[ -f "$workdir/report/summary.json" ]]; then
  exec "$python" -m spire_jax.figures "$config" --workdir="$workdir" --out="$workdir/figures" \
    ${overrides[@]+"${overrides[@]}"}
fi

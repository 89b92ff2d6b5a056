#!/usr/bin/env bash
# The study of drafts (configs/study_drafts.py, docs/drafts.md): set-up, corpus, tokenizer, training
# of the target and of all drafts at once, evaluation, tau over training, tables.
#
#   bash launch/study_drafts.sh [--config.drafts.dspark= --stages=target ...]
#
# Results go to $WORKDIR (runs/study_drafts), as seen from this repository's root, where it runs.
# Started again it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/setup/python_packages.sh

workdir="${WORKDIR:-runs/study_drafts}"
config=--config=configs/study_drafts.py
"$python" -m spire_jax.run "$config" --workdir="$workdir" "$@"

overrides=()
for argument in "$@"; do
  [[ "$argument" != --config.* ]] || overrides+=("$argument")
done
if [[ -f "$workdir/report/summary.json" ]]; then
  "$python" -m launch.bench.tau_by_tokens "$config" --workdir="$workdir" \
    ${overrides[@]+"${overrides[@]}"}
  exec "$python" -m launch.draft_tables "$config" --workdir="$workdir" --ks=4,8,12 \
    --family=all,all2,all3,all4,all6,all8,all12 \
    --pairs=all:spire,own4:all4,markov4:all4,fused:all,fused4:all4,dspark:markov4 \
    ${overrides[@]+"${overrides[@]}"}
fi

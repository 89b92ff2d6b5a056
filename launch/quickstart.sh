#!/usr/bin/env bash
# The whole method on this machine's CPU in minutes: set-up, training, evaluation, report.
#
#   bash launch/quickstart.sh [--config.train.steps=500 ...]
#
# Results go to $WORKDIR (runs/quickstart), as seen from this repository's root, where it runs.
# Started again it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh requirements.txt

# Without an accelerator's plugin jax has only the CPU; saying so spares its search for others
# and the warnings about it. Where a plugin is installed, jax chooses.
if [[ -z "${JAX_PLATFORMS+set}" ]] &&
  ! compgen -G ".venv/lib*/python*/site-packages/jax_plugins/*" >/dev/null &&
  ! compgen -G ".venv/lib*/python*/site-packages/libtpu*" >/dev/null; then
  export JAX_PLATFORMS=cpu
fi

# XLA's CPU allocates anew in every step; with huge pages the kernel maps and zeroes that memory
# quickly (training is a quarter faster). Without effect where glibc or the kernel has none.
if [[ "$(uname)" == Linux ]]; then
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
fi

# exec: signals reach Python itself, and its exit status is this script's.
exec .venv/bin/python -m spire_jax.run --config=configs/quickstart.py \
  --workdir="${WORKDIR:-runs/quickstart}" "$@"

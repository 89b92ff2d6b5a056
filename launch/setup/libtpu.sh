#!/usr/bin/env bash
# Puts the TPU compiler that this version of jax names into .venv/libtpu, for machines without a TPU.
#
#   bash launch/setup/libtpu.sh
#
# Apart from the other packages: where jax finds libtpu among those, it looks for a TPU each time
# it starts. Quick when it is there already; 0.2 GB to fetch, 0.7 GB on the disk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

bash launch/setup.sh
python=.venv/bin/python
# "libtpu==0.0.42.*" from what jax[tpu] requires.
wanted="$("$python" -c '
import importlib.metadata, re
needs = importlib.metadata.requires("jax")
print(next(re.split(r"[; ]", n)[0] for n in needs if n.startswith("libtpu")))')"
stamp=.venv/libtpu/.installed
[[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]] || exit 0

echo "libtpu: installing $wanted into .venv/libtpu" >&2
rm -rf .venv/libtpu
mkdir .venv/libtpu
"$python" -m pip install -qq --disable-pip-version-check --no-deps --target .venv/libtpu "$wanted"
echo "$wanted" >"$stamp"

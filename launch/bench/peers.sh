#!/usr/bin/env bash
# launch/bench/decode.py with transformers and llama.cpp beside it, on the same prompts and threads.
#
#   bash launch/bench/peers.sh --config=... --workdir=... [more arguments of launch.bench.decode]
#
# They run in .venv/parity (launch/setup/parity.sh), where llama.cpp is built from the sources of
# llama-cpp-python for this machine, once: ten minutes on two cores, with a C++ compiler. Where it
# does not build, the bench goes on without it and says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

say() { echo "peers: $*" >&2; }

python="$(bash launch/setup/parity.sh)"
package=llama-cpp-python version=0.3.36
found="$("$python" -m pip list --disable-pip-version-check --format=freeze 2>/dev/null |
  sed -n 's/^llama[-_]cpp[-_]python==//p')"
if [[ "$found" != "$version" ]]; then
  say "building $package $version into .venv/parity"
  CMAKE_ARGS="-DGGML_NATIVE=ON ${CMAKE_ARGS:-}" "$python" -m pip install -qq \
    --disable-pip-version-check --no-binary "$package" "$package==$version" ||
    say "llama.cpp does not build here (the message is above); going on without it"
fi

# shellcheck source=launch/setup/environment.sh
source launch/setup/environment.sh
exec .venv/bin/python -m launch.bench.decode --peers "$@"

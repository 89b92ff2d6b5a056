#!/usr/bin/env bash
# Makes .venv/parity, with torch and transformers (2.0 GB on the disk), and prints its Python.
#
#   bash launch/setup/parity.sh
#
# Quick when nothing has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

say() { echo "parity: $*" >&2; }

bash launch/setup.sh >&2
venv=.venv/parity
python="$venv/bin/python"
lists=(requirements-parity.txt requirements-test.txt requirements.txt)
stamp="$venv/.installed"
wanted="$(.venv/bin/python --version; sha256sum "${lists[@]}")"
if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
  say "installing ${lists[0]} into $venv (some minutes the first time)"
  rm -f "$stamp"
  [[ -x "$python" ]] || .venv/bin/python -m venv --clear "$venv"
  "$python" -m pip install -qq --disable-pip-version-check -r "${lists[0]}" || {
    say "pip could not install ${lists[0]} (its message is above); is there a network?"
    exit 1
  }
  echo "$wanted" >"$stamp"
fi
echo "$python"

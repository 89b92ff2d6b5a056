#!/usr/bin/env bash
# The corpus and the tokenizer of the studies, made once. Sourced, from the repository's root.
set -euo pipefail

bash launch/setup.sh requirements.txt
source launch/setup/environment.sh

python=.venv/bin/python
"$python" -m launch.fetch_packages --list=configs/python_packages.txt --out=data/python_packages
tokenizer=data/python_bpe_4096.json
[[ -f "$tokenizer" ]] ||
  "$python" -m launch.train_tokenizer --config=configs/study.py --out="$tokenizer"

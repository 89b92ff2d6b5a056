"""python -m spire_jax.decode: prompts through a target and a draft (serving/command.py)."""

import sys

from spire_jax.serving.command import main

if __name__ == "__main__":
    sys.exit(main())

"""python -m spire_jax.figures: the paper's figures (results/figures.py)."""

import sys

from spire_jax.results.figures import main

if __name__ == "__main__":
    sys.exit(main())

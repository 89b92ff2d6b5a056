"""python -m spire_jax.choose: the best draft for a traffic mix (results/choose.py)."""

import sys

from spire_jax.results.choose import main

if __name__ == "__main__":
    sys.exit(main())

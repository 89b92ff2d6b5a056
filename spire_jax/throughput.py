"""python -m spire_jax.throughput: modeled throughput (costs/throughput.py)."""

from spire_jax.costs.throughput import main

if __name__ == "__main__":
    main()

"""python -m spire_jax.scaling: modeled throughput of several chips (costs/scaling.py)."""

from spire_jax.costs.scaling import main

if __name__ == "__main__":
    main()

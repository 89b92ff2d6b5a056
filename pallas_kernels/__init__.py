"""Pallas kernels, one folder each, beside a reference in plain jnp; imports nothing of spire_jax."""

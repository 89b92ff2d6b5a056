"""Pallas kernels, one folder each, beside a reference in plain jnp; nothing of spire_jax in it."""

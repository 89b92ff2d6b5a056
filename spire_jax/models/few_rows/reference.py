"""A few rows times a weight matrix, from the definition."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def product(
    x: Float[Array, "M K"], w: Float[Array, "K N"] | Float[Array, "N K"], transposed: bool = False
) -> Float[Array, "M N"]:
    """x @ w, or x @ w.T, of the numbers as they are, in float32."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    return jnp.matmul(x, w.T if transposed else w, precision=jax.lax.Precision.HIGHEST)

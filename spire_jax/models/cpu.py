"""Products and attention of a few tokens, put so that XLA's CPU reads each number once.

For products, what is left where `few_rows` cannot be compiled or has too many rows.

What XLA 0.10's CPU does with the plain forms, measured on two cores of an AVX-512 machine:
bfloat16 products are computed in float32 after the whole matrix has been converted in memory, at
0.7 GB/s of weights; attention over a cache first lays keys and values out anew, heads before
slots, and takes three to four times as long as reading them where they are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.platform import device_kind

# Rows (KV heads * query heads * tokens) up to which attention reads the slots where they are: it
# multiplies every head's queries with every head's keys, K times the arithmetic.
SLOT_ROWS = 64


def on_cpu() -> bool:
    """Whether the program is traced for CPUs."""
    return device_kind().lower() == "cpu"


def bfloat16_product(
    x: BFloat16[Array, "M I"], w: BFloat16[Array, "I O"] | BFloat16[Array, "O I"], transposed: bool
) -> Float[Array, "M O"]:
    """x @ w, or x @ w.T, in float32; XLA's CPU then reads `w` as it is, for two rows or more.

    A single row (which would be a matrix-vector product, and converted) is computed twice; a
    transpose of `w` that is an operation of its own would be converted too.
    """
    rows = x.shape[0]
    if rows == 1:
        x = jnp.broadcast_to(x, (2, x.shape[1]))
    contracted = ((1,), (1 if transposed else 0,))
    out = jax.lax.dot_general(x, w, (contracted, ((), ())), preferred_element_type=jnp.float32)
    return out[:rows]


def reads_slots(kv_heads: int, q_per_kv: int, tokens: int) -> bool:
    """Whether attention over a cache is computed by `slot_logits` and `slot_sums`."""
    return on_cpu() and kv_heads * q_per_kv * tokens <= SLOT_ROWS


def slot_logits(q: Float[Array, "B K M H"], keys: Float[Array, "B S W"]) -> Float[Array, "B K M S"]:
    """q . k in float32 for slots with their heads side by side (W = K * H), none moved.

    A query becomes as wide as a slot, with zeros for the other heads: one product of two matrices.
    """
    b, k, m, h = q.shape
    own = jnp.eye(k, dtype=q.dtype)[:, None, :, None]
    wide = (q[:, :, :, None] * own).reshape(b, k * m, k * h)
    logits = jnp.einsum("BMW,BSW->BMS", wide, keys, preferred_element_type=jnp.float32)
    return logits.reshape(b, k, m, -1)


def slot_sums(
    weight: Float[Array, "B K M S"], values: Float[Array, "B S W"]
) -> Float[Array, "B K M H"]:
    """Sums over slots of weight times value, in float32; a head's own part of a wide result."""
    b, k, m, s = weight.shape
    wide = jnp.einsum("BMS,BSW->BMW", weight.reshape(b, k * m, s), values,
                      preferred_element_type=jnp.float32)  # fmt: skip
    wide = wide.reshape(b, k, m, k, -1)
    return jnp.stack([wide[:, i, :, i] for i in range(k)], axis=1)

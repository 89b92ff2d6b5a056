"""What XLA's CPU has to be told; every function gives None where it has nothing to say.

What XLA 0.10's CPU does with the plain forms, measured on two cores of an AVX-512 machine: a few
rows times a weight matrix more slowly than one; bfloat16 products in float32 after the whole matrix
has been converted in memory, at 0.7 GB/s of weights; attention over a cache first lays keys and
values out anew, heads before slots, and takes three to four times as long as reading them where
they are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.platform import device_kind
from spire_jax.models.few_rows import api as few_rows

# Rows (KV heads * query heads * tokens) up to which attention reads the slots where they are: it
# multiplies every head's queries with every head's keys, K times the arithmetic.
SLOT_ROWS = 64


def on_cpu() -> bool:
    """Whether the program is traced for CPUs."""
    return device_kind().lower() == "cpu"


def product(x: Float[Array, "M I"], w: Array, transposed: bool, kernel: bool) -> Array | None:
    """x @ w, or x @ w.T, each number of `w` read once, in its own type.

    `kernel`: a few rows may take `few_rows`, which has no derivative and no batching rule.
    """
    if not on_cpu():
        return None
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    if kernel and alone and x.shape[0] <= few_rows.MAX_ROWS and few_rows.available():
        return few_rows.product(x, w, transposed)
    if x.dtype == w.dtype == jnp.bfloat16:
        return bfloat16_product(x, w, transposed)
    return None


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


Products = tuple[Callable[[Array, Array], Array], Callable[[Array, Array], Array]]


def over_slots(
    q: Float[Array, "B T K G H"], keys: Float[Array, "B S W"], values: Float[Array, "B S W"]
) -> tuple[Array, Array, Products] | None:
    """A cache's keys and values for attention that reads the slots where they are.

    With the products that take them: `slot_logits` and `slot_sums`.
    """
    _, tokens, kv_heads, q_per_kv, head_dim = q.shape
    if not on_cpu() or kv_heads * q_per_kv * tokens > SLOT_ROWS:
        return None
    # Were the write that comes before fused into these reads, XLA would copy the cache for it.
    keys, values = jax.lax.optimization_barrier((keys, values))
    keys, values = (x[..., : kv_heads * head_dim].astype(q.dtype) for x in (keys, values))
    return keys, values, (slot_logits, slot_sums)


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


def more_than_one(
    slots: Int[Array, "B T"], size: int, *new: Float[Array, "B T K H"]
) -> tuple[Array, ...]:
    """Cache entries to be written at `slots` of `size`; where it is one, with another, dropped.

    A write of one entry XLA's CPU merges with what reads the cache, and copies the layer for it; a
    second one makes it a loop.
    """
    if slots.size != 1 or not on_cpu():
        return slots, *new
    slots = jnp.pad(slots, ((0, 0), (0, 1)), constant_values=size)
    return slots, *(jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in new)

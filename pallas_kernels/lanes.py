"""How heads lie in TPU lanes: a cache slot is one row of K * H numbers, its heads side by side.

A vector register has 128 lanes. Heads narrower than that are taken in groups that fill them: a
query keeps its own head's lanes and is zero in the others', so that one product with the whole
group gives its logits. The matrix unit pads narrower products to 128 anyway: nothing is lost.

    B  rows            T  query tokens      S  key slots      K  KV heads
    G  query heads per KV head              H  head dimension
    N  lane groups     W  lanes of a group  M  query heads of a group
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

LANES = 128
MASKED = -1e30  # a logit that no softmax notices; finite, so that differences stay numbers


def group_size(head_dim: int) -> int:
    """KV heads per lane group."""
    return max(1, LANES // head_dim)


def spread(q: Float[Array, "B T K G H"]) -> Float[Array, "B T N M W"]:
    """Queries by lane group, each on its own head's lanes; heads that do not exist are zero."""
    batch, length, kv_heads, group, h = q.shape
    size = group_size(h)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -kv_heads % size), (0, 0), (0, 0)))
    q = q.reshape(batch, length, -1, size, group, h)
    placed = [
        jnp.pad(q[:, :, :, i], ((0, 0),) * 4 + ((i * h, (size - 1 - i) * h),)) for i in range(size)
    ]
    return jnp.concatenate(placed, axis=3)


def gather(
    out: Float[Array, "B T N M W"], kv_heads: int, head_dim: int
) -> Float[Array, "B T K G H"]:
    """The inverse of `spread`: each query head's own lanes."""
    batch, length, groups, heads, _ = out.shape
    size = group_size(head_dim)
    out = out.reshape(batch, length, groups, size, heads // size, size, head_dim)
    own = jnp.stack([out[:, :, :, i, :, i] for i in range(size)], axis=3)
    return own.reshape(batch, length, groups * size, -1, head_dim)[:, :, :kv_heads]


def by_head(x: Float[Array, "B T N M"], kv_heads: int, head_dim: int) -> Float[Array, "B T K G"]:
    """One number per query head, from lane groups to KV heads."""
    batch, length, groups, heads = x.shape
    size = group_size(head_dim)
    return x.reshape(batch, length, groups * size, heads // size)[:, :, :kv_heads]

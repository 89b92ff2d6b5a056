"""A chunk of a prompt on top of a cache: what `Transformer.extend` is for a few tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spire_jax.models.attention import attention, merge_attention, unpacked
from spire_jax.models.caches import FullCache, RingCache, write_rows
from spire_jax.models.layers import Block
from spire_jax.models.masks import EMPTY
from spire_jax.models.transformer import Activations, Transformer


def extend_prompt(
    module: Transformer,
    cache: FullCache | RingCache,
    rows: Int[Array, " R"],
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    collect: tuple[int, ...] = (),
) -> tuple[Activations, FullCache | RingCache]:
    """Process the next T prompt tokens of some rows, whatever T is to a ring.

    A full cache is written and then read. On a ring an early query of the chunk may need what a
    later token of it overwrites, so it is read as it was, merged with attention within the chunk,
    and written at the end. Of what lies in the cache at the chunk's positions or after them
    (rejected tokens, rounds that went on while the row waited) nothing is seen.

    Args:
        cache: of the whole batch; rows beyond it read the last one and write nothing.
        positions: in sequence, row by row; -1 at the end of a prompt, for no token.
        collect: the l of the activations y^l to return.
    """
    x, ring = module.embed(tokens), isinstance(cache, RingCache)
    slots = cache.slots(positions)
    activations, keys_values = {0: x}, []
    for i, block in enumerate(module.blocks):
        k, v = block.keys_values(x, positions)
        if ring:
            attended = _on_ring(module, block, i, cache, rows, x, (k, v), positions)
            keys_values.append((k, v))
        else:
            cache = cache.write(i, slots, k, v, rows)
            attended = _over_cache(module, block, i, cache, rows, x, positions)[0]
        x = activations[i + 1] = block.finish(x, attended)
    if ring:
        cache = write_rows(cache, rows, positions, keys_values)
    return tuple(activations[i] for i in collect), cache


def _on_ring(module, block, layer, cache, rows, x, keys_values, positions):
    config = module.config
    own = jnp.where(positions < 0, EMPTY, positions)
    begin = jnp.broadcast_to(jnp.min(own, axis=1, keepdims=True), own.shape)
    within = attention(
        block.queries(x, positions), *keys_values, positions, own, window=config.window,
        sink=config.sink, scale=block.scale, compute=module.compute,
    )  # fmt: skip
    return merge_attention(
        [_over_cache(module, block, layer, cache, rows, x, positions, begin), within]
    )


def _over_cache(
    module: Transformer,
    block: Block,
    layer: int,
    cache: FullCache | RingCache,
    rows: Int[Array, " R"],
    x: Float[Array, "R T D"],
    positions: Int[Array, "R T"],
    limit: Int[Array, "R T"] | None = None,
) -> tuple[Float[Array, "R T K G H"], Float[Array, "R T K G"]]:
    """Attention to the rows' own slots, of positions before `limit` where there is one."""
    config, q = module.config, block.queries(x, positions)
    keys, values = (
        unpacked(of[layer].at[rows].get(mode="clip"), *q.shape[2::2]).astype(x.dtype)
        for of in (cache.keys, cache.values)
    )
    at = cache.layer_positions(layer)
    at = at if cache.ordered else at.at[rows].get(mode="clip")
    return attention(
        q, keys, values, positions, at, window=config.window, sink=config.sink, limit=limit,
        scale=block.scale, compute=module.compute,
    )  # fmt: skip

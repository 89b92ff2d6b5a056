"""Attention for every use, and which code computes it: XLA, or a kernel of `pallas_kernels`.

Over a text whose positions are known while tracing (training, prefill) it is `attention`; over a
cache (decoding) `cached_attention`. A kernel is chosen by `Compute.attention`; XLA computes what
no kernel takes: positions per KV head, a rollout's own few keys.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.checks import MAX_TOKENS, unsupported_heads
from pallas_kernels.decode_attention import api as decode_kernel
from pallas_kernels.platform import is_tpu
from pallas_kernels.streaming_attention import api as streaming_kernel
from spire_jax.models.cpu import reads_slots, slot_logits, slot_sums
from spire_jax.models.few_rows import api as few_rows
from spire_jax.models.masks import may_attend
from spire_jax.models.sharding import RULES, spec

Positions = Int[np.ndarray, " T"] | Int[Array, "B T"]

XLA, AUTO = "xla", "auto"
TPU_KERNELS = ("tpu", "interpret")  # Pallas on a TPU; the same interpreted on a CPU, for tests


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model computes; changes rounding and speed, never what is computed."""

    dtype: str = "float32"  # of matrix products and activations
    attention_chunk: int = 128  # queries (and keys) per block of the XLA attention
    remat: bool = False  # recompute each layer in the backward pass
    # XLA, or AUTO: on CPUs the kernel for products of a few rows, which has no derivative.
    products: str = XLA
    # XLA; one of TPU_KERNELS; "gpu": Hopper's kernel over caches, XLA elsewhere; AUTO: "tpu" on a
    # TPU that takes the heads, else XLA (on GPUs too, where no kernel of ours was measured yet).
    attention: str = AUTO

    def kernel(self, head_dim: int, q_per_kv: int) -> str:
        """Which implementation of the kernels these heads get; "" = XLA."""
        if self.attention != AUTO:
            return "" if self.attention == XLA else self.attention
        return "tpu" if is_tpu() and not unsupported_heads(head_dim, q_per_kv) else ""

    def few_rows(self, rows: int) -> bool:
        """Whether the product of `rows` rows with a weight matrix is the kernel's."""
        mesh = jax.sharding.get_abstract_mesh()
        alone = mesh.empty or mesh.size == 1
        return (
            self.products == AUTO and alone and rows <= few_rows.MAX_ROWS and few_rows.available()
        )


@runtime_checkable
class Cached(Protocol):
    """What `cached_attention` reads of a cache (`kv_cache`)."""

    @property
    def keys(self) -> tuple[Float[Array, "B S W"], ...]: ...

    @property
    def values(self) -> tuple[Float[Array, "B S W"], ...]: ...

    @property
    def ordered(self) -> bool: ...

    @property
    def by_head(self) -> bool: ...

    @property
    def live(self) -> int: ...

    def layer_positions(self, layer: int) -> Array: ...


def attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_pos: Positions,
    k_pos: Int[np.ndarray, " S"] | Int[Array, "#B S"] | Int[Array, "#B K S"],
    *,
    window: int = 0,
    sink: int = 0,
    limit: Positions | None = None,
    scale: float = 1.0,
    compute: Compute = Compute(),
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """Softmax attention under `may_attend`, and its log-sum-exp in float32.

    Positions as NumPy arrays are known while tracing: what no query may see is then left out, by
    the kernel or by XLA in chunks of queries. Positions as JAX arrays are masked at run time.

    Args:
        q, k, v: rotated queries and keys, and values; G query heads share a KV head.
        q_pos, k_pos: positions in the text; keys may have their own for each KV head.
        limit: per query, the first position that is *not* visible (SPIRe's memories of the
            target end before the block); None for no such limit.
        scale: multiplies the logits.

    Returns:
        The output, zero for a query that sees no key; its log-sum-exp, -inf there.
    """
    static = isinstance(q_pos, np.ndarray) and isinstance(k_pos, np.ndarray)
    kernel = compute.kernel(*q.shape[:2:-1]) if static and k.shape[1] else ""
    if kernel in TPU_KERNELS:
        positions: dict[str, Any] = dict(q_positions=q_pos, k_positions=k_pos, limits=limit)
        call = functools.partial(
            streaming_kernel.streaming_attention, **positions, window=window or None,
            sink=sink if window else 0,
            scale=scale, implementation=kernel,
        )  # fmt: skip
        return _on_mesh(call, [_QUERIES, _KEYS, _KEYS])(q, k, v)
    # Heads before tokens: on CPUs a quarter faster, forward and backward, than leaving the
    # transposes to each chunk's products.
    q = jnp.moveaxis(q, 1, 3)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    if static:
        out, lse = _in_chunks(
            q, k, v, q_pos, k_pos, limit, window, sink, scale, compute.attention_chunk
        )
    else:
        out, lse = _attend(q, k, v, _mask(q_pos, k_pos, limit, window, sink), scale)
    return jnp.moveaxis(out, 3, 1), jnp.moveaxis(lse, 3, 1)


def cached_attention(
    q: Float[Array, "B T K G H"],
    cache: Cached,
    layer: int,
    positions: Int[Array, "B T"],
    *,
    window: int = 0,
    sink: int = 0,
    include_self: bool = True,
    scale: float = 1.0,
    compute: Compute = Compute(),
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """`attention` of a few new tokens per row over a layer of a cache.

    Args:
        positions: the queries', each row's one after the other.
        include_self: whether a query sees its own position, and those after it in the block.
    """
    keys, values = cache.keys[layer], cache.values[layer]
    kernel = compute.kernel(*q.shape[:2:-1])
    if kernel and not cache.by_head and q.shape[1] <= MAX_TOKENS:
        # Position j is in a slot no later than j, so that later ones hold nothing to be seen.
        lengths = jnp.clip(positions[:, -1] + 1, 0, cache.live)
        call = functools.partial(
            decode_kernel.decode_attention, window=window or None,
            sink=sink if window else 0,
            include_self=include_self, scale=scale, implementation=kernel,
        )  # fmt: skip
        arguments = [q, keys, values, lengths, positions[:, 0]]
        axes: list[tuple[str | None, ...]] = [_QUERIES, _SLOTS, _SLOTS, _ROWS, _ROWS]
        if not cache.ordered:
            arguments.append(cache.layer_positions(layer))
            axes.append(("batch", None))
        return _on_mesh(call, axes)(*arguments)
    k_pos, limit = cache.layer_positions(layer), None if include_self else positions
    _, tokens, kv_heads, q_per_kv, head_dim = q.shape
    whole = jax.sharding.get_abstract_mesh().shape.get(RULES["kv_heads"], 1) == 1
    if whole and reads_slots(kv_heads, q_per_kv, tokens):
        # Were the write that comes before fused into these reads, XLA would copy the cache for it.
        keys, values = jax.lax.optimization_barrier((keys, values))
        keys, values = (x[..., : kv_heads * head_dim].astype(q.dtype) for x in (keys, values))
        mask = _mask(positions, k_pos, limit, window, sink)
        out, lse = _attend(jnp.moveaxis(q, 1, 3), keys, values, mask, scale, slot_logits, slot_sums)
        return jnp.moveaxis(out, 3, 1), jnp.moveaxis(lse, 3, 1)
    keys, values = (unpacked(x, kv_heads, head_dim).astype(q.dtype) for x in (keys, values))
    return attention(
        q, keys, values, positions, k_pos, window=window, sink=sink, limit=limit, scale=scale
    )


def cache_shape(compute: Compute, slots: int, kv_heads: int, head_dim: int) -> tuple[int, int]:
    """Slots to allocate, and numbers per slot: K * H, or what a kernel reads best.

    Heads that are split over a mesh keep K * H: where a device's share of it is no multiple of 128,
    a TPU lays the cache out anew for each call of the kernel.
    """
    kernel, exact = compute.kernel(head_dim, 1), kv_heads * head_dim
    if not kernel:
        return slots, exact
    whole = jax.sharding.get_abstract_mesh().shape.get(RULES["kv_heads"], 1) == 1
    slots, width = decode_kernel.cache_shape(slots, kv_heads, head_dim)
    return slots, width if whole and kernel in TPU_KERNELS else exact


def packed(x: Float[Array, "B T K H"], width: int) -> Float[Array, "B T W"]:
    """Heads side by side, as a cache slot holds them; zeros up to `width`."""
    flat = x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])
    return jnp.pad(flat, ((0, 0), (0, 0), (0, width - flat.shape[-1])))


def unpacked(x: Float[Array, "B S W"], kv_heads: int, head_dim: int) -> Float[Array, "B S K H"]:
    """The heads of cache slots."""
    return x[..., : kv_heads * head_dim].reshape(*x.shape[:2], kv_heads, head_dim)


def merge_attention(parts):
    """One softmax over the keys of several `attention` results (out, log-sum-exp)."""
    top = jnp.max(jnp.stack([lse for _, lse in parts]), axis=0)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = [jnp.exp(lse - top) for _, lse in parts]
    total = sum(weights)
    total = jnp.where(total > 0, total, 1.0)
    out = sum(o * (w / total)[..., None] for (o, _), w in zip(parts, weights, strict=True))
    return out.astype(parts[0][0].dtype)


# --- kernels on a mesh -------------------------------------------------------------------------

_QUERIES = ("batch", None, "kv_heads", None, None)
_KEYS = ("batch", None, "kv_heads", None)
_SLOTS = ("batch", None, "kv_heads")  # a slot's heads side by side: whole heads are split
_ROWS = ("batch",)


def _on_mesh(call: Callable[..., Any], axes: Sequence[tuple[str | None, ...]]):
    """A kernel on each device's own rows and heads: XLA cannot partition it by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return call
    in_specs = tuple(spec(*names) for names in axes)
    outs = spec(*_QUERIES), spec(*_QUERIES[:-1])
    return jax.shard_map(call, in_specs=in_specs, out_specs=outs, check_vma=False)


# --- XLA ---------------------------------------------------------------------------------------


def _in_chunks(q, k, v, q_pos, k_pos, limit, window, sink, scale, chunk):
    """`chunk` queries at a time, each with the keys that some of them may see."""
    parts = []
    for start in range(0, q.shape[3], chunk):
        rows = slice(start, start + chunk)
        row_limit = None if limit is None else limit[rows]
        seen, mask = _visible_runs(q_pos[rows], k_pos, row_limit, window, sink, chunk)
        keys, values = (jnp.concatenate([x[:, :, s] for s in seen], axis=2) for x in (k, v))
        parts.append(_attend(q[:, :, :, rows], keys, values, mask, scale))
    outs, lses = zip(*parts, strict=True)
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _mask(q_pos, k_pos, limit, window, sink) -> Bool[np.ndarray | Array, "rows *K T S"]:
    q_pos, k_pos = (x[None] if x.ndim == 1 else x for x in (q_pos, k_pos))
    by_head = k_pos.ndim == 3
    q_pos = q_pos[:, None] if by_head else q_pos
    visible = may_attend(q_pos[..., :, None], k_pos[..., None, :], window, sink)
    if limit is not None:
        limit = limit[None] if limit.ndim == 1 else limit
        limit = limit[:, None] if by_head else limit
        visible &= k_pos[..., None, :] < limit[..., :, None]
    return visible


def _visible_runs(
    q_pos: Int[np.ndarray, " T"],
    k_pos: Int[np.ndarray, " S"],
    limit: Int[np.ndarray, " T"] | None,
    window: int,
    sink: int,
    chunk: int,
) -> tuple[list[slice], Bool[np.ndarray, "1 T M"]]:
    """Runs of keys, in whole chunks, that some query may see, and their mask.

    One key where there is none.
    """
    # What the window cannot reach is left out first: a mask of all keys is quadratic.
    near = k_pos <= q_pos.max()
    if window:
        near &= (k_pos < sink) | (k_pos > q_pos.min() - window)
    runs: list[slice] = []
    masks = []
    for start in range(0, len(k_pos), chunk):
        if not near[start : start + chunk].any():
            continue
        mask = np.asarray(_mask(q_pos, k_pos[start : start + chunk], limit, window, sink))
        if mask.any():
            begin = runs.pop().start if runs and runs[-1].stop == start else start
            runs.append(slice(begin, start + chunk))
            masks.append(mask)
    if not runs:
        return [slice(0, 1)], np.zeros((1, len(q_pos), 1), bool)
    return runs, np.concatenate(masks, axis=2)


def _logits(q: Float[Array, "B K M H"], k: Float[Array, "B K S H"]) -> Float[Array, "B K M S"]:
    return jnp.einsum("BKMH,BKSH->BKMS", q, k, preferred_element_type=jnp.float32)


def _sums(weight: Float[Array, "B K M S"], v: Float[Array, "B K S H"]) -> Float[Array, "B K M H"]:
    return jnp.einsum("BKMS,BKSH->BKMH", weight, v, preferred_element_type=jnp.float32)


def _attend(q, k, v, mask, scale, logits_of=_logits, sums_of=_sums):
    # Query heads of one KV head are folded into the tokens: a plain batched matrix product.
    b, kv_heads, group, t, h = q.shape
    q = q.reshape(b, kv_heads, group * t, h)
    logits = logits_of(q, k)
    logits = logits * scale if scale != 1.0 else logits
    if not (isinstance(mask, np.ndarray) and mask.all()):
        logits = logits.reshape(b, kv_heads, group, t, -1)
        mask = mask[:, :, None] if mask.ndim == 4 else mask[:, None, None]
        logits = jnp.where(mask, logits, -jnp.inf)
        logits = logits.reshape(b, kv_heads, group * t, -1)
    top = jnp.max(logits, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weight = jnp.exp(logits - top)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = sums_of(weight.astype(v.dtype), v)
    out = (out / total).astype(q.dtype).reshape(b, kv_heads, group, t, h)
    lse = jnp.where(some, jnp.log(total) + top, -jnp.inf)
    return out, lse.reshape(b, kv_heads, group, t)

"""Attention for every use, and which code computes it: XLA, or a kernel of `pallas_kernels`.

Over a text whose positions are known while tracing (training, prefill) it is `attention`; over a
layer's cache (decoding) `cached_attention`. A kernel is chosen by `Compute.attention`; XLA computes
what no kernel takes: positions per KV head, a rollout's own few keys, a softcap, a view of another
rule.
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
from spire_jax.models import cpu
from spire_jax.models.masks import View
from spire_jax.models.sharding import RULES, spec

Positions = Int[np.ndarray, " T"] | Int[Array, "B T"]
# The output, zero for a query that sees no key; its log-sum-exp, -inf there.
Attended = tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]

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

    def kernel(self, head_dim: int, q_per_kv: int, view: View = View()) -> str:
        """Which implementation of the kernels such heads get; "" = XLA.

        Raises:
            ValueError: a view that no kernel has, with one that is asked for by name.
        """
        known = view.windowed and not view.softcap
        if self.attention == AUTO:
            found = is_tpu() and known and not unsupported_heads(head_dim, q_per_kv)
            return "tpu" if found else ""
        if self.attention == XLA:
            return ""
        if not known:
            raise ValueError(f"attention={self.attention!r}: the kernels have no softcap, and no "
                             f"view but a window and sinks; use {AUTO!r} or {XLA!r}")  # fmt: skip
        return self.attention


@runtime_checkable
class Slots(Protocol):
    """What `cached_attention` reads of one layer's cache (`caches`)."""

    @property
    def keys(self) -> Float[Array, "B S W"]: ...

    @property
    def values(self) -> Float[Array, "B S W"]: ...

    @property
    def ordered(self) -> bool:
        """Whether slot j holds position j."""
        ...

    @property
    def live(self) -> int:
        """Slots that may hold something; those after them only fill up the allocation."""
        ...

    def held(self, last: Int[Array, " B"]) -> Int[Array, "#B S"] | Int[Array, "B K S"]:
        """The position that each slot holds, EMPTY for none, when `last` is the newest written."""
        ...


def attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_pos: Positions,
    k_pos: Int[np.ndarray, " S"] | Int[Array, "#B S"] | Int[Array, "#B K S"],
    view: View = View(),
    *,
    limit: Positions | None = None,
    compute: Compute = Compute(),
) -> Attended:
    """Softmax attention under a view, and its log-sum-exp in float32.

    Positions as NumPy arrays are known while tracing: what no query may see is then left out, by
    the kernel or by XLA in chunks of queries. Positions as JAX arrays are masked at run time.

    Args:
        q, k, v: rotated queries and keys, and values; G query heads share a KV head.
        q_pos, k_pos: positions in the text; keys may have their own for each KV head.
        limit: per query, the first position that is *not* visible (SPIRe's memories of the
            target end before the block); None for no such limit.
    """
    static = isinstance(q_pos, np.ndarray) and isinstance(k_pos, np.ndarray)
    kernel = compute.kernel(q.shape[4], q.shape[3], view) if static and k.shape[1] else ""
    if kernel in TPU_KERNELS:
        positions: dict[str, Any] = dict(q_positions=q_pos, k_positions=k_pos, limits=limit)
        call = functools.partial(
            streaming_kernel.streaming_attention, **positions, **_of_kernels(view),
            implementation=kernel,
        )  # fmt: skip
        return _on_mesh(call, [_QUERIES, _KEYS, _KEYS])(q, k, v)
    if not static:
        return masked_attention(q, k, v, _mask(q_pos, k_pos, view, limit), view)
    # Heads before tokens: on CPUs a quarter faster, forward and backward, than leaving the
    # transposes to each chunk's products.
    q = jnp.moveaxis(q, 1, 3)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    out, lse = _in_chunks(q, k, v, q_pos, k_pos, view, limit, compute.attention_chunk)
    return jnp.moveaxis(out, 3, 1), jnp.moveaxis(lse, 3, 1)


def masked_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[np.ndarray | Array, "#B T S"] | Bool[np.ndarray | Array, "#B K T S"],
    view: View = View(),
) -> Attended:
    """`attention` under any mask, of which `view` says only how logits are formed; by XLA."""
    q, k, v = jnp.moveaxis(q, 1, 3), jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    out, lse = _attend(q, k, v, mask, view)
    return jnp.moveaxis(out, 3, 1), jnp.moveaxis(lse, 3, 1)


def cached_attention(
    q: Float[Array, "B T K G H"],
    cache: Slots,
    positions: Int[Array, "B T"],
    view: View = View(),
    *,
    include_self: bool = True,
    compute: Compute = Compute(),
) -> Attended:
    """`attention` of a few new tokens per row over one layer's cache, written up to them.

    Args:
        positions: the queries', each row's one after the other.
        include_self: whether a query sees its own entry; without, the last one's need not be
            written.
    """
    last = positions[:, -1] if include_self else positions[:, -1] - 1
    k_pos = cache.held(last)
    kernel = compute.kernel(q.shape[4], q.shape[3], view)
    if kernel and k_pos.ndim == 2 and q.shape[1] <= MAX_TOKENS:
        # Position j is in a slot no later than j, so that later ones hold nothing to be seen.
        lengths = jnp.clip(positions[:, -1] + 1, 0, cache.live)
        call = functools.partial(
            decode_kernel.decode_attention, include_self=include_self, implementation=kernel,
            **_of_kernels(view),
        )  # fmt: skip
        arguments = [q, cache.keys, cache.values, lengths, positions[:, 0]]
        axes: list[tuple[str | None, ...]] = [_QUERIES, _SLOTS, _SLOTS, _ROWS, _ROWS]
        if not cache.ordered:
            arguments.append(k_pos)
            axes.append(("batch", None))
        return _on_mesh(call, axes)(*arguments)
    limit = None if include_self else positions
    on_cpu = cpu.over_slots(q, cache.keys, cache.values) if _heads_are_whole() else None
    if on_cpu is not None:
        keys, values, products = on_cpu
        mask = _mask(positions, k_pos, view, limit)
        out, lse = _attend(jnp.moveaxis(q, 1, 3), keys, values, mask, view, *products)
        return jnp.moveaxis(out, 3, 1), jnp.moveaxis(lse, 3, 1)
    keys, values = (unpacked(x, *q.shape[2::2]).astype(q.dtype) for x in (cache.keys, cache.values))
    return attention(q, keys, values, positions, k_pos, view, limit=limit)


def cache_shape(compute: Compute, slots: int, kv_heads: int, head_dim: int) -> tuple[int, int]:
    """Slots to allocate, and numbers per slot: K * H, or what a kernel reads best.

    Heads that are split over a mesh keep K * H: where a device's share of it is no multiple of 128,
    a TPU lays the cache out anew for each call of the kernel.
    """
    kernel, exact = compute.kernel(head_dim, 1), kv_heads * head_dim
    if not kernel:
        return slots, exact
    slots, width = decode_kernel.cache_shape(slots, kv_heads, head_dim)
    return slots, width if _heads_are_whole() and kernel in TPU_KERNELS else exact


def _heads_are_whole() -> bool:
    return jax.sharding.get_abstract_mesh().shape.get(RULES["kv_heads"], 1) == 1


def _of_kernels(view: View) -> dict[str, Any]:
    return {"window": view.window or None, "sink": view.sink if view.window else 0,
            "scale": view.scale}  # fmt: skip


def packed(x: Float[Array, "B T K H"], width: int) -> Float[Array, "B T W"]:
    """Heads side by side, as a cache slot holds them; zeros up to `width`."""
    flat = x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])
    return jnp.pad(flat, ((0, 0), (0, 0), (0, width - flat.shape[-1])))


def unpacked(x: Float[Array, "B S W"], kv_heads: int, head_dim: int) -> Float[Array, "B S K H"]:
    """The heads of cache slots."""
    return x[..., : kv_heads * head_dim].reshape(*x.shape[:2], kv_heads, head_dim)


def merge_attention(parts):
    """One softmax over the keys of several `attention` results (out, log-sum-exp)."""
    if len(parts) == 1:
        return parts[0][0]
    top = functools.reduce(jnp.maximum, [lse for _, lse in parts])
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


def _in_chunks(q, k, v, q_pos, k_pos, view, limit, chunk):
    """`chunk` queries at a time, each with the keys that some of them may see."""
    parts = []
    for start in range(0, q.shape[3], chunk):
        rows = slice(start, start + chunk)
        row_limit = None if limit is None else limit[rows]
        seen, mask = _visible_runs(q_pos[rows], k_pos, view, row_limit, chunk)
        keys, values = (jnp.concatenate([x[:, :, s] for s in seen], axis=2) for x in (k, v))
        parts.append(_attend(q[:, :, :, rows], keys, values, mask, view))
    outs, lses = zip(*parts, strict=True)
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _mask(q_pos, k_pos, view, limit) -> Bool[np.ndarray | Array, "rows *K T S"]:
    q_pos, k_pos = (x[None] if x.ndim == 1 else x for x in (q_pos, k_pos))
    by_head = k_pos.ndim == 3
    q_pos = q_pos[:, None] if by_head else q_pos
    visible = view.sees(q_pos[..., :, None], k_pos[..., None, :])
    if limit is not None:
        limit = limit[None] if limit.ndim == 1 else limit
        limit = limit[:, None] if by_head else limit
        visible &= k_pos[..., None, :] < limit[..., :, None]
    return visible


def _visible_runs(
    q_pos: Int[np.ndarray, " T"],
    k_pos: Int[np.ndarray, " S"],
    view: View,
    limit: Int[np.ndarray, " T"] | None,
    chunk: int,
) -> tuple[list[slice], Bool[np.ndarray, "1 T M"]]:
    """Runs of keys, in whole chunks, that some query may see, and their mask.

    One key where there is none.
    """
    # What the window cannot reach is left out first: a mask of all keys is quadratic.
    near = k_pos <= q_pos.max()
    if view.window and view.windowed:
        near &= (k_pos < view.sink) | (k_pos > q_pos.min() - view.window)
    runs: list[slice] = []
    masks = []
    for start in range(0, len(k_pos), chunk):
        if not near[start : start + chunk].any():
            continue
        mask = np.asarray(_mask(q_pos, k_pos[start : start + chunk], view, limit))
        if mask.any():
            begin = runs.pop().start if runs and runs[-1].stop == start else start
            runs.append(slice(begin, start + chunk))
            masks.append(mask)
    if not runs:
        return [slice(0, 1)], np.zeros((1, len(q_pos), 1), bool)
    return runs, np.concatenate(masks, axis=2)


def _logits(q: Float[Array, "B K M H"], k: Float[Array, "B K S H"]) -> Float[Array, "B K M S"]:
    return jnp.einsum("BKMH,BKSH->BKMS", q, k, preferred_element_type=jnp.float32)


def capped(logits: Float[Array, "*rows S"], view: View) -> Float[Array, "*rows S"]:
    """A view's logits, of the products of queries and keys."""
    logits = logits * view.scale if view.scale != 1.0 else logits
    return view.softcap * jnp.tanh(logits / view.softcap) if view.softcap else logits


def _sums(weight: Float[Array, "B K M S"], v: Float[Array, "B K S H"]) -> Float[Array, "B K M H"]:
    return jnp.einsum("BKMS,BKSH->BKMH", weight, v, preferred_element_type=jnp.float32)


def _attend(q, k, v, mask, view, logits_of=_logits, sums_of=_sums):
    # Query heads of one KV head are folded into the tokens: a plain batched matrix product.
    b, kv_heads, group, t, h = q.shape
    q = q.reshape(b, kv_heads, group * t, h)
    logits = capped(logits_of(q, k), view)
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

"""Decode attention on TPU: a list of (row, key block) work items, however long the rows are.

The grid is as long as the list, which holds only blocks that some query of the row may see: time
follows the sum of the lengths, not the batch times the longest. Pallas' pipeline reads the next
item's keys and values while this one is computed. The items of a row are neighbours, so that the
running maximum, sum and output stay in VMEM until the row's last one.

Chips whose two cores work as one split the list in the middle of its work, wherever that lies in
a row; the two parts of such a row are merged by their log-sum-exps.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.lanes import LANES, MASKED, by_head, gather, spread
from pallas_kernels.platform import VMEM_LIMIT

BLOCK_BYTES = 2**20  # of keys (and of values) in one block: long enough to hide a step's overhead


class Work(NamedTuple):
    """The items of a call, and which rows have any."""

    rows: Int[Array, " items"]
    blocks: Int[Array, " items"]
    ends_row: Int[Array, " items"]  # 2 if the item is its row's last, plus 1 if its first
    bounds: Int[Array, "2"]  # items per core, items in all
    begin: Int[Array, " B"]  # of each row in the list
    end: Int[Array, " B"]


def block_size(slots: int, row_bytes: int) -> int:
    """Key slots per block: about BLOCK_BYTES, in whole registers, no more than there are."""
    fitting = max(BLOCK_BYTES // row_bytes // LANES, 1) * LANES
    return min(fitting, pl.cdiv(slots, LANES) * LANES)


def work_list(
    lengths: Int[Array, " B"],
    q_positions: Int[Array, " B"],
    *,
    tokens: int,
    slots: int,
    block: int,
    window: int | None,
    sink: int,
    include_self: bool,
    ordered: bool,
    cores: int,
) -> Work:
    """Every block that some query of a row may see, row by row.

    `ordered`: slot j holds position j, so that causality and the window bound the blocks too.
    """
    batch, most = lengths.shape[0], pl.cdiv(slots, block)
    stop, first = jnp.clip(lengths, 0, slots), jnp.zeros_like(lengths)
    if ordered:
        stop = jnp.clip(q_positions + tokens - 1 + include_self, 0, stop)
        if window is not None:
            first = jnp.maximum(q_positions - window + 1, 0) // block
            seen = pl.cdiv(window + tokens - 1, block) + 1 + pl.cdiv(sink, block)
            most = min(most, seen)
    sinks = jnp.minimum(pl.cdiv(jnp.minimum(sink, stop), block), first)
    counts = sinks + jnp.maximum(pl.cdiv(stop, block) - first, 0)
    end = jnp.cumsum(counts, dtype=jnp.int32)
    begin = end - counts
    item = jnp.arange(batch * most, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(end, item, side="right"), batch - 1).astype(jnp.int32)
    local = item - begin[row]
    blocks = jnp.where(local < sinks[row], local, first[row] + local - sinks[row])
    edges = (local == 0) + 2 * (item == end[row] - 1)
    per_core = jnp.maximum(pl.cdiv(end[-1], cores), 1)
    bounds = jnp.stack([per_core, end[-1]])
    # Items past the end are never computed, but their blocks may be fetched.
    return Work(row, jnp.clip(blocks, 0, pl.cdiv(slots, block) - 1), edges, bounds, begin, end)


@functools.partial(
    jax.jit,
    static_argnames=("window", "sink", "include_self", "scale", "block", "cores", "interpret"),
)
def decode_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S KH"],
    v: Float[Array, "B S KH"],
    lengths: Int[Array, " B"],
    q_positions: Int[Array, " B"],
    k_positions: Int[Array, "B S"] | None = None,
    *,
    window: int | None = None,
    sink: int = 0,
    include_self: bool = True,
    scale: float = 1.0,
    block: int | None = None,
    cores: int = 1,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """See `api.decode_attention`.

    Args:
        block: key slots per work item; `block_size` unless given.
        cores: that one call runs on: 2 on TPU v4 and v5p.
    """
    batch, tokens, kv_heads, group, h = q.shape
    slots, width = k.shape[1:]  # wider than K * H where `cache_shape` rounds up
    block = block or block_size(slots, width * k.dtype.itemsize)
    ordered = k_positions is None
    lengths = jnp.clip(lengths, 0, slots)
    work = work_list(
        lengths, q_positions, tokens=tokens, slots=slots, block=block, window=window, sink=sink,
        include_self=include_self, ordered=ordered, cores=cores,
    )  # fmt: skip
    spread_q = spread(q)
    groups, heads, lanes = spread_q.shape[2:]
    used = tokens * heads
    rows = pl.cdiv(used, 16) * 16  # bfloat16 comes in tiles of 16 rows
    folded = jnp.moveaxis(spread_q, 1, 2).reshape(batch, groups, used, lanes)
    folded = jnp.pad(folded, ((0, 0), (0, 0), (0, rows - used), (0, 0)))

    def item(core, step, rows, blocks, edges, bounds, *_):
        return jnp.minimum(core * bounds[0] + step, jnp.maximum(bounds[1] - 1, 0))

    def of_row(core, step, rows, *prefetched):
        return rows[item(core, step, rows, *prefetched)], 0, 0, 0

    def of_block(core, step, rows, blocks, *prefetched):
        i = item(core, step, rows, blocks, *prefetched)
        return rows[i], blocks[i], 0

    def positions_of_block(core, step, rows, blocks, *prefetched):
        i = item(core, step, rows, blocks, *prefetched)
        return rows[i], 0, blocks[i]

    def part_of_row(core, step, rows, *prefetched):
        return core, rows[item(core, step, rows, *prefetched)], 0, 0, 0

    def lse_of_row(*at):
        return part_of_row(*at)[:-1]

    operands = [folded, k, v]
    in_specs = [
        pl.BlockSpec((1, groups, rows, lanes), of_row),
        pl.BlockSpec((1, block, width), of_block),
        pl.BlockSpec((1, block, width), of_block),
    ]
    if k_positions is not None:
        operands.append(k_positions[:, None])
        in_specs.append(pl.BlockSpec((1, 1, block), positions_of_block))
    # One core's part is the result; parts that are still to be merged keep their precision.
    part = jax.ShapeDtypeStruct(
        (cores, batch, groups, rows, lanes), q.dtype if cores == 1 else jnp.float32
    )
    kernel = functools.partial(
        _kernel, tokens=tokens, heads=heads, scale=scale, window=window, sink=sink,
        include_self=include_self, ordered=ordered, width=kv_heads * h,
    )  # fmt: skip
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(cores, work.bounds[0]),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, 1, groups, rows, lanes), part_of_row),
                pl.BlockSpec((1, 1, rows, LANES), lse_of_row),
            ],
            scratch_shapes=[
                pltpu.VMEM((groups, rows, LANES), jnp.float32),
                pltpu.VMEM((groups, rows, LANES), jnp.float32),
                pltpu.VMEM((groups, rows, lanes), jnp.float32),
            ],
        ),
        out_shape=[part, jax.ShapeDtypeStruct((cores, batch, rows, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * tokens * kv_heads * group * h * min(slots, window or slots),
            transcendentals=batch * tokens * kv_heads * group * min(slots, window or slots),
            bytes_accessed=2 * batch * min(slots, window or slots) * width * k.dtype.itemsize,
        ),
        interpret=interpret,
    )(*work[:4], lengths, q_positions, *operands)

    lse = jnp.moveaxis(lse[..., :used, :groups], -1, -2)  # cores, B, N, T * M
    out, lse = _merged(work, out[..., :used, :], lse)
    shape = batch, groups, tokens, heads
    out = jnp.moveaxis(out.reshape(*shape, lanes), 1, 2).astype(q.dtype)
    lse = jnp.moveaxis(lse.reshape(shape), 1, 2)
    return gather(out, kv_heads, h), by_head(lse, kv_heads, h)


def _kernel(
    rows_ref, blocks_ref, edges_ref, bounds_ref, lengths_ref, q_positions_ref,
    q_NxRxW, k_SxKH, v_SxKH, *refs,
    tokens: int, heads: int, scale: float, window: int | None, sink: int, include_self: bool,
    ordered: bool, width: int,
):  # fmt: skip
    *positions, out_NxRxW, lse_RxN, top_NxR, total_NxR, sum_NxRxW = refs
    step, steps = pl.program_id(1), bounds_ref[0]
    i = pl.program_id(0) * steps + step
    real = i < bounds_ref[1]
    at = jnp.minimum(i, jnp.maximum(bounds_ref[1] - 1, 0))  # the last core may have fewer items
    row, block, edge = rows_ref[at], blocks_ref[at], edges_ref[at]
    length, q_first = lengths_ref[row], q_positions_ref[row]
    size = k_SxKH.shape[1]
    begin = block * size

    @pl.when(real & ((step == 0) | (edge % 2 == 1)))
    def _():
        top_NxR[...] = jnp.full_like(top_NxR, MASKED)
        total_NxR[...] = jnp.zeros_like(total_NxR)
        sum_NxRxW[...] = jnp.zeros_like(sum_NxRxW)

    def attend(masked: bool):
        groups, rows, lanes = q_NxRxW.shape[1:]
        precision = jax.lax.Precision.HIGHEST if k_SxKH.dtype == jnp.float32 else None
        if masked:
            # Row t * M + m of the queries is token t.
            query = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
            q_pos = q_first + sum((query >= t * heads).astype(jnp.int32) for t in range(1, tokens))
            slot = begin + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
            k_pos = slot if ordered else positions[0][0]
            visible = (slot < length) & (k_pos < q_pos + include_self)
            if window is not None:
                visible &= (k_pos < sink) | (q_pos - k_pos < window)
        for n in range(groups):
            own = slice(n * lanes, min((n + 1) * lanes, width))  # the last may be half a group
            used = own.stop - own.start
            k, v = k_SxKH[0, :, own], v_SxKH[0, :, own]
            logits = scale * jax.lax.dot_general(
                q_NxRxW[0, n, :, :used], k, (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32, precision=precision,
            )  # fmt: skip
            if masked:
                logits = jnp.where(visible, logits, MASKED)
                # What lies beyond the row's length may be anything, and 0 * nan is nan.
                inside = begin + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < length
                v = jnp.where(inside, v, jnp.zeros_like(v))
            before = top_NxR[n]
            top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            weight = jnp.exp(logits - top[:, :1])
            if masked:
                weight = jnp.where(visible, weight, 0.0)
            shrink = jnp.exp(before - top)
            top_NxR[n] = top
            total_NxR[n] = shrink * total_NxR[n] + jnp.sum(weight, axis=1, keepdims=True)
            new = jax.lax.dot_general(
                weight.astype(v.dtype), v, (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32, precision=precision,
            )  # fmt: skip
            sum_NxRxW[n, :, :used] = shrink[:, :1] * sum_NxRxW[n, :, :used] + new

    # Most blocks of a long row are seen whole, by every query: no mask is computed for them.
    whole = begin + size <= jnp.minimum(length, q_first + include_self)
    if window is not None:
        whole &= begin > q_first + tokens - 1 - window
    whole &= ordered

    pl.when(real & whole)(functools.partial(attend, masked=False))
    pl.when(real & jnp.logical_not(whole))(functools.partial(attend, masked=True))

    last = (edge >= 2) | (step == steps - 1) | (i == bounds_ref[1] - 1)

    @pl.when(real & last)
    def _():
        lane = jax.lax.broadcasted_iota(jnp.int32, lse_RxN.shape[2:], 1)
        lses = jnp.full(lse_RxN.shape[2:], -jnp.inf, jnp.float32)
        for n in range(q_NxRxW.shape[1]):
            total = total_NxR[n]
            some = total > 0
            total = jnp.where(some, total, 1.0)
            out = sum_NxRxW[n] / total[:, :1]
            out_NxRxW[0, 0, n] = out.astype(out_NxRxW.dtype)
            lse = jnp.where(some, top_NxR[n] + jnp.log(total), -jnp.inf)
            lses = jnp.where(lane == n, lse, lses)
        lse_RxN[0, 0] = lses


def _merged(work: Work, out: Array, lse: Array) -> tuple[Array, Array]:
    """One result from the cores' parts, those that were never written left out."""
    cores = out.shape[0]
    core = jnp.arange(cores)[:, None]
    first, stop = core * work.bounds[0], (core + 1) * work.bounds[0]
    written = (work.begin < jnp.minimum(work.end, stop)) & (work.end > first)
    written &= jnp.maximum(work.begin, first) < jnp.minimum(work.end, stop)
    written = written[..., None, None]
    lse = jnp.where(written, lse, -jnp.inf)
    out = jnp.where(written[..., None], out, 0.0)
    if cores == 1:
        return out[0], lse[0]
    top = jnp.max(lse, axis=0)
    weight = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weight, axis=0)
    share = weight / jnp.where(total > 0, total, 1.0)
    merged = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
    return jnp.sum(out * share[..., None], axis=0), merged

"""Decode attention on Hopper GPUs (sm_90a): intervals of a list of key blocks, in Mosaic GPU.

Decoding reads every visible key once and computes little with it, so the kernel is built to keep
the memory busy. The blocks of keys that some query can see, of all rows, form one list, cut into
intervals of equal length. A CTA walks one interval for one KV head: its copies run through one
ring of shared memory that never drains between rows, and every CTA has the same number of bytes
to read however ragged the lengths are. Interval n holds one piece of each row b that it crosses;
from piece to piece along the list either b or n grows, so b + n numbers the pieces without a
table. A second kernel merges each row's pieces in their order: no atomics, the same bits each run.

    B  rows       T  query tokens             S  key slots     K  KV heads
    H  head dim   G  query heads per KV head  N  intervals     P  pieces, B + N - 1
    R  queries of a KV head, T * G and padding
"""

import functools
import importlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

plgpu: Any  # whose types change from release to release
try:
    plgpu = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
except ImportError:  # some releases of jax need a package for it that they do not install
    plgpu = None

TILE = 64  # queries of one wgmma
SMS = 132  # streaming multiprocessors of an H100 SXM and of an H200
EMPTY = 2**30  # the position of a slot that holds no key
LOWEST = -1e30  # where a running maximum starts: finite, so that -inf minus it is no nan
LOG2E = math.log2(math.e)
# By head dimension, what fits the 227 KB of shared memory: keys of a block, blocks of the ring,
# CTAs of a multiprocessor.
FITTING = {64: (128, 3, 2), 128: (64, 3, 2), 256: (64, 3, 1)}
BEGIN, END, SINKS, GAP, NEXT, LENGTH, POSITION = range(7)  # columns of Plan.rows; one is free


class Plan(NamedTuple):
    """The list of key blocks: row b's are its entries BEGIN to END.

    The first SINKS of them are the row's first blocks, the others lie GAP blocks farther on: what
    the window leaves behind. NEXT is the next row that has any.
    """

    rows: Int[Array, "B 8"]
    intervals: Int[Array, "N 3"]  # first entry, the one after the last, the first one's row
    pieces: Int[Array, "B 2"]  # of each row: first piece, the one after the last


def unsupported(head_dim: int, slots: int, width: int, dtype: str) -> str:
    """Why this kernel cannot take such a cache, beyond what `api` checks; nothing if it can."""
    if plgpu is None or jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__}: the GPU kernel needs 0.11 or later"
    if dtype != "bfloat16":
        return f"{dtype}: the GPU kernel takes bfloat16"
    if head_dim not in FITTING:
        return f"head dimension {head_dim}: the GPU kernel takes {', '.join(map(str, FITTING))}"
    if slots % 8 or width % 8:
        return f"{slots} slots of {width} numbers: the GPU kernel takes multiples of 8 of both"
    return ""


def plan(
    lengths: Int[Array, " B"],
    q_positions: Int[Array, " B"],
    *,
    shape: tuple[int, ...],
    slots: int,
    window: int | None,
    sink: int,
    include_self: bool,
    ordered: bool,
    splits: int | None = None,
) -> Plan:
    """The list for queries of `shape`; the same for all layers of a model, so XLA makes it once.

    `ordered`: slot j holds position j, so that causality and the window bound the blocks too.
    """
    batch, tokens, kv_heads, group, head_dim = shape
    block, _, ctas = FITTING[head_dim]
    if splits is None:  # as many CTAs as the GPU runs at once
        splits = max(1, SMS * ctas // (kv_heads * pl.cdiv(tokens * group, TILE)))
    splits = min(splits, batch * pl.cdiv(slots, block))
    lengths = jnp.clip(lengths, 0, slots)
    stop, gap, sinks = lengths, jnp.zeros_like(lengths), jnp.zeros_like(lengths)
    if ordered:
        stop = jnp.clip(q_positions + tokens - 1 + include_self, 0, lengths)
        if window is not None:
            oldest = jnp.minimum(jnp.maximum(q_positions - window + 1, 0), stop) // block
            sinks = jnp.minimum(pl.cdiv(jnp.minimum(sink, stop), block), oldest)
            gap = oldest - sinks
    counts = pl.cdiv(stop, block) - gap
    end = jnp.cumsum(counts, dtype=jnp.int32)
    begin = end - counts
    # Empty intervals come last: a row's pieces are then numbered without holes.
    used = jnp.clip(end[-1], 1, splits)
    cut = end[-1] * jnp.minimum(jnp.arange(splits + 1), used) // used

    def row_of(entry):
        passed = jnp.sum(end <= entry[:, None], axis=1, dtype=jnp.int32)
        return jnp.minimum(passed, batch - 1)

    def piece_of(row, entry):
        return row + jnp.sum(cut[1:] <= entry[:, None], axis=1, dtype=jnp.int32)

    columns = [begin, end, sinks, gap, row_of(end), lengths, q_positions, jnp.zeros_like(end)]
    row = jnp.arange(batch, dtype=jnp.int32)
    first = piece_of(row, begin)
    after = jnp.where(counts > 0, piece_of(row, end - 1) + 1, first)
    intervals = [cut[:-1], cut[1:], row_of(cut[:-1])]
    return Plan(*(jnp.stack(x, axis=1) for x in (columns, intervals, [first, after])))


@functools.partial(
    jax.jit, static_argnames=("window", "sink", "include_self", "scale", "splits", "interpret")
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
    splits: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """See `api.decode_attention`; values of slots before a row's length must be finite.

    Args:
        splits: intervals of the list; as many as the GPU runs at once unless given.
        interpret: on a CPU, from jax 0.11.1 on; or the InterpretGPUParams to do it with.

    Raises:
        ValueError: what `unsupported` says.
    """
    batch, tokens, kv_heads, group, head_dim = q.shape
    slots, width = k.shape[1:]
    if reason := unsupported(head_dim, slots, width, str(q.dtype)):
        raise ValueError(reason)
    if interpret is True:
        if not hasattr(plgpu, "InterpretGPUParams"):
            raise ValueError(f"jax {jax.__version__}: the GPU kernel is interpreted from 0.11.1 on")
        interpret = plgpu.InterpretGPUParams()
    block, stages, _ = FITTING[head_dim]
    options: dict[str, Any] = dict(window=window, sink=sink, include_self=include_self)
    options["ordered"] = k_positions is None
    rows, intervals, pieces = plan(
        lengths, q_positions, shape=q.shape, slots=slots, splits=splits, **options
    )
    # Queries are (token, query head); copies fill or drop what a tile has beyond them. Shared
    # memory is tiled by 8 of them, and a CTA that merges needs 128 lanes.
    used = tokens * group
    lanes = max(head_dim, 128)
    merged = pl.cdiv(used, lanes // head_dim) * (lanes // head_dim)
    padded = merged if merged < 8 else pl.cdiv(used, 8) * 8
    folded = jnp.moveaxis(q, 1, 2).reshape(batch, kv_heads, used, head_dim)
    folded = jnp.pad(folded, ((0, 0), (0, 0), (0, padded - used), (0, 0)))
    operands = [rows, intervals, folded, k, v]
    if k_positions is not None:
        beyond = -slots % block
        operands.append(jnp.pad(k_positions, ((0, 0), (0, beyond)), constant_values=EMPTY))

    tiles = pl.cdiv(used, TILE)
    count = batch + intervals.shape[0] - 1
    layout = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    smem = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=layout)
    ring, arrived = smem((stages, block, head_dim)), plgpu.Barrier(num_barriers=stages)
    sums, stats = plgpu.kernel(
        functools.partial(_attend, group=group, scale=scale, interpret=bool(interpret), **options),
        out_type=(
            jax.ShapeDtypeStruct((2, count, kv_heads, padded, head_dim), jnp.bfloat16),
            jax.ShapeDtypeStruct((count, kv_heads, 2, tiles * TILE), jnp.float32),
        ),
        scratch_types=[smem((TILE, head_dim)), ring, ring, plgpu.Barrier(), arrived, arrived],
        grid=(intervals.shape[0], kv_heads, tiles),
        grid_names=("interval", "head", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="decode_attention",
        interpret=interpret or None,
    )(*operands)
    out, stats = plgpu.kernel(
        functools.partial(_merge, head_dim=head_dim, lanes=lanes),
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, merged * head_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, 2, merged), jnp.float32),
        ),
        grid=(batch, kv_heads, merged * head_dim // lanes),
        grid_names=("row", "head", "chunk"),
        kernel_name="decode_attention_merge",
        interpret=interpret or None,
    )(pieces, sums.reshape(2, count, kv_heads, padded * head_dim), stats)
    lse = stats[:, :, 0] / LOG2E + jnp.log(stats[:, :, 1])
    heads = batch, kv_heads, tokens, group
    out = out[:, :, : used * head_dim].reshape(*heads, head_dim)
    return jnp.moveaxis(out, 1, 2), jnp.moveaxis(lse[:, :, :used].reshape(heads), 1, 2)


def _attend(
    rows_Bx8, intervals_Nx3, q_BxKxRxH, k_BxSxKH, v_BxSxKH, *refs,
    group: int, scale: float, window: int | None, sink: int, include_self: bool, ordered: bool,
    interpret: bool,
):  # fmt: skip
    """One interval for one KV head: its pieces' sums of values, maxima and totals of weights."""
    *positions, sums, stats, q_RxH, k_DxSxH, v_DxSxH, q_ready, k_ready, v_ready = refs
    interval, head, tile = (lax.axis_index(name) for name in ("interval", "head", "tile"))
    first, stop, first_row = (intervals_Nx3[interval, i] for i in range(3))
    stages, block, head_dim = k_DxSxH.shape
    wgmma = plgpu.Layout.WGMMA
    lanes, queries = pl.ds(head * head_dim, head_dim), pl.ds(tile * TILE, TILE)

    def iota(rows: int, columns: int, axis: int):
        return plgpu.broadcasted_iota(jnp.int32, (rows, columns), axis, layout=wgmma)

    def spread(x, columns: int):
        return lax.broadcast_in_dim(x, (TILE, columns), [0])

    def span(row):
        """A row and where its blocks are in the list and in the cache."""
        return row, *(rows_Bx8[row, column] for column in (BEGIN, END, SINKS, GAP))

    def slot_of(entry, span):
        """The first slot of an entry of the row with this span."""
        _, begin, _, sinks, gap = span
        return (entry - begin + jnp.where(entry - begin >= sinks, gap, 0)) * block

    def fetch(entry, at):
        """Start the copies of an entry; `at` is the span of the one fetched before."""

        def copy():
            now = lax.cond(entry >= at[2], lambda: span(rows_Bx8[at[0], NEXT]), lambda: at)
            source = now[0], pl.ds(slot_of(entry, now), block), lanes
            stage = lax.rem(entry - first, jnp.int32(stages))
            plgpu.copy_gmem_to_smem(k_BxSxKH.at[source], k_DxSxH.at[stage], k_ready.at[stage])
            plgpu.copy_gmem_to_smem(v_BxSxKH.at[source], v_DxSxH.at[stage], v_ready.at[stage])
            return now

        return lax.cond(entry < stop, copy, lambda: at)

    def silence(values_SxH, begin, length):
        """Zeros for values from the length on: a weight of 0 does not silence a nan."""
        inside = begin + iota(block, 64, 0) < length
        for part in range(0, head_dim, 64):
            columns = values_SxH.at[:, pl.ds(part, 64)]
            kept = plgpu.load(columns, layout=wgmma)
            columns[...] = jnp.where(inside, kept, jnp.zeros_like(kept))
        plgpu.commit_smem()

    def piece(carry):
        """The entries from `entry` on that belong to one row."""
        entry, row, fetched = carry
        here = span(row)
        length, position = rows_Bx8[row, LENGTH], rows_Bx8[row, POSITION]
        plgpu.copy_gmem_to_smem(q_BxKxRxH.at[row, head, queries], q_RxH, q_ready)

        def step(entry, carry):
            acc, top, total, fetched = carry
            stage = lax.rem(entry - first, jnp.int32(stages))
            begin = slot_of(entry, here)
            slot = begin + iota(TILE, block, 1)
            k_pos = slot
            if not ordered:  # read before the wait for the keys, which hides its latency
                held = positions[0].at[row, pl.ds(begin, block)]
                held = plgpu.load(held, layout=wgmma.reduce(0), optimized=False)
                k_pos = lax.broadcast_in_dim(held, (TILE, block), [1])
            plgpu.barrier_wait(k_ready.at[stage])

            def product(logits):
                plgpu.wgmma(logits, q_RxH, k_DxSxH.at[stage].transpose((1, 0)))
                return logits[...]

            logits = pl.run_scoped(product, plgpu.ACC((TILE, block), jnp.float32))
            q_pos = position + lax.div(tile * TILE + iota(TILE, block, 0), jnp.int32(group))
            visible = (slot < length) & (k_pos < q_pos + int(include_self))
            if window is not None:
                visible &= (k_pos < sink) | (q_pos - k_pos < window)
            # In units of log 2: the exponentials are then one instruction each.
            logits = jnp.where(visible, logits * (scale * LOG2E), -jnp.inf)
            higher = jnp.maximum(top, logits.max(axis=1))
            shrink = jnp.exp2(top - higher)
            weight = jnp.exp2(logits - spread(higher, block))
            total = total * shrink + weight.sum(axis=1)
            acc = acc * spread(shrink, head_dim)
            weight = weight.astype(v_DxSxH.dtype)
            plgpu.barrier_wait(v_ready.at[stage])
            values = v_DxSxH.at[stage]
            pl.when(begin + block > length)(lambda: silence(values, begin, length))
            if interpret:  # knows no wgmma of registers, nor an accumulator's first value
                acc += jnp.dot(weight, values[...], preferred_element_type=jnp.float32)
                plgpu.commit_smem()
            else:
                acc = pl.run_state(lambda acc: plgpu.wgmma(acc, weight, values))(
                    plgpu.ACC.init(acc)
                )
            return acc, higher, total, fetch(entry + stages, fetched)

        start = (
            plgpu.layout_cast(jnp.zeros((TILE, head_dim), jnp.float32), wgmma),
            plgpu.layout_cast(jnp.full((TILE,), LOWEST, jnp.float32), wgmma.reduce(1)),
            plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), wgmma.reduce(1)),
        )
        row_stop = jnp.minimum(here[2], stop)
        plgpu.barrier_wait(q_ready)
        acc, top, total, fetched = lax.fori_loop(entry, row_stop, step, (*start, fetched))
        # The queries' shared memory is free now and carries the sums out: float32 as two bfloat16,
        # the rounded sum and its rest. The copies drop the queries that are only padding.
        number = row + interval
        stats[number, head, 0, queries] = top
        stats[number, head, 1, queries] = total
        for half in range(2):
            rounded = acc.astype(q_RxH.dtype)
            acc = acc - rounded.astype(jnp.float32)
            q_RxH[...] = rounded
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_RxH, sums.at[half, number, head, queries])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return row_stop, rows_Bx8[row, NEXT], fetched

    fetched = span(first_row)
    for stage in range(stages):
        fetched = fetch(first + stage, fetched)
    lax.while_loop(lambda carry: carry[0] < stop, piece, (first, first_row, fetched))
    plgpu.wait_smem_to_gmem(0)


def _merge(
    pieces_Bx2, sums_2xPxKxRH, stats_PxKx2xR, out_BxKxRH, stats_BxKx2xR, *, head_dim: int,
    lanes: int,
):  # fmt: skip
    """The pieces of one row and KV head, for a chunk of lanes: one query, or two of 64 lanes."""
    row, head, chunk = (lax.axis_index(name) for name in ("row", "head", "chunk"))
    queries = [chunk * (lanes // head_dim) + i for i in range(lanes // head_dim)]
    own = pl.ds(chunk * lanes, lanes)
    strided = plgpu.Layout.WG_STRIDED((lanes,), vec_size=lanes // 128)
    lane = plgpu.broadcasted_iota(jnp.int32, (lanes,), 0, layout=strided)

    def spread(values):
        """The value of each lane's query."""
        spread = jnp.full((lanes,), values[0])
        for i, value in enumerate(values[1:], 1):
            spread = jnp.where(lane < i * head_dim, spread, jnp.full((lanes,), value))
        return spread

    def add(piece, carry):
        acc, tops, totals = carry
        new_tops = [stats_PxKx2xR[piece, head, 0, query] for query in queries]
        new_totals = [stats_PxKx2xR[piece, head, 1, query] for query in queries]
        higher = [jnp.maximum(a, b) for a, b in zip(tops, new_tops, strict=True)]
        shrink = [jnp.exp2(a - h) for a, h in zip(tops, higher, strict=True)]
        weight = [jnp.exp2(b - h) for b, h in zip(new_tops, higher, strict=True)]
        totals = [
            a * s + b * w for a, s, b, w in zip(totals, shrink, new_totals, weight, strict=True)
        ]
        new, rest = (sums_2xPxKxRH[half, piece, head, own].astype(jnp.float32) for half in (0, 1))
        return acc * spread(shrink) + (new + rest) * spread(weight), higher, totals

    nothing = [jnp.float32(0)] * len(queries)
    start = spread(nothing), [jnp.float32(LOWEST)] * len(queries), nothing
    acc, tops, totals = lax.fori_loop(pieces_Bx2[row, 0], pieces_Bx2[row, 1], add, start)
    share = [jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), 0.0) for total in totals]
    out_BxKxRH[row, head, own] = (acc * spread(share)).astype(out_BxKxRH.dtype)
    for query, top, total in zip(queries, tops, totals, strict=True):
        stats_BxKx2xR[row, head, 0, query] = top
        stats_BxKx2xR[row, head, 1, query] = total

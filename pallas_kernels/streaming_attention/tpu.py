"""Streaming attention on TPU: flash attention over the listed pairs of blocks, and its gradient.

Everything is computed transposed, keys down and queries across: the running maximum and sum of a
query, its log-sum-exp and its bounds are then rows, which spread over a tile of logits for free.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.lanes import LANES, MASKED, by_head, gather, group_size, spread
from pallas_kernels.platform import VMEM_LIMIT
from pallas_kernels.streaming_attention import plan

# For the choice of blocks only: what an item costs besides its products, and their speed.
STEP_SECONDS, FLOPS_PER_SECOND = 0.35e-6, 100e12
OUTPUT_IN_VMEM = 2**18  # numbers of a block of queries, over all heads of a lane group


class Setting(NamedTuple):
    """All that is static about a call."""

    seen: plan.Bounds  # of the padded queries
    k_positions: Int[np.ndarray, " S"]  # padded
    q_block: int
    k_block: int
    groups: int  # lane groups
    heads: int  # query heads per lane group
    lanes: int
    scale: float
    interpret: bool | pltpu.InterpretParams

    @property
    def forward(self) -> plan.Items:
        return plan.items(*self._pairs)

    @property
    def backward(self) -> plan.Items:
        visited, whole = self._pairs
        return plan.items(visited.T, whole.T)

    @property
    def _pairs(self):
        return plan.pairs(self.seen, self.k_positions, self.q_block, self.k_block)


def streaming_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_positions: Int[np.ndarray, " T"],
    k_positions: Int[np.ndarray, " S"],
    *,
    window: int | None = None,
    sink: int = 0,
    limits: Int[np.ndarray, " T"] | None = None,
    scale: float = 1.0,
    blocks: tuple[int, int] | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """See `api.streaming_attention`.

    Args:
        blocks: queries and keys per block, multiples of 128; `choose_blocks` unless given.
    """
    batch, length, kv_heads, group, h = q.shape
    seen = plan.bounds(q_positions, limits, window, sink)
    heads = group * group_size(h)
    q_block, k_block = blocks or choose_blocks(seen, k_positions, heads * max(h, LANES))
    padded_q = spread(q)
    groups, _, lanes = padded_q.shape[2:]
    padded_q = _pad(padded_q.reshape(batch, length, -1), q_block)
    missing = ((0, 0), (0, 0), (0, -kv_heads % group_size(h)), (0, 0))
    k, v = (_pad(jnp.pad(x, missing).reshape(batch, x.shape[1], -1), k_block) for x in (k, v))
    k_positions = np.pad(
        k_positions.astype(np.int32), (0, -len(k_positions) % k_block), constant_values=plan.UNSEEN
    )
    setting = Setting(
        plan.padded(seen, q_block), k_positions, q_block, k_block, groups, heads, lanes, scale,
        interpret,
    )  # fmt: skip
    out, lse = _differentiable(setting)(padded_q, k, v)
    out = out[:, :length].reshape(batch, length, groups, heads, lanes)
    lse = jnp.moveaxis(lse[..., :length], -1, 1)  # B, T, N, M
    return gather(out, kv_heads, h), by_head(lse, kv_heads, h)


def choose_blocks(
    seen: plan.Bounds, k_positions: Int[np.ndarray, " S"], width: int
) -> tuple[int, int]:
    """The blocks of 128, 256 or 512 that should take least time: fewer items against less waste.

    `width` is what a query of all heads of a lane group takes.
    """

    def seconds(sizes: tuple[int, int]) -> float:
        q_block, k_block = sizes
        k_pos = np.pad(k_positions, (0, -len(k_positions) % k_block), constant_values=plan.UNSEEN)
        visited, _ = plan.pairs(plan.padded(seen, q_block), k_pos, q_block, k_block)
        flops = 4 * q_block * k_block * width
        return visited.sum() * (STEP_SECONDS + flops / FLOPS_PER_SECOND)

    def fitting(length: int) -> list[int]:
        return [size for size in (128, 256, 512) if size == 128 or size < 2 * length]

    sizes = [
        (a, b)
        for a, b in itertools.product(fitting(len(seen.upper)), fitting(len(k_positions)))
        if a == 128 or a * width <= OUTPUT_IN_VMEM
    ]
    return min(sizes, key=seconds)


def _pad(x: Array, to: int) -> Array:
    """Zeros behind the tokens of [B, T, lanes] up to a multiple of `to`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % to), (0, 0)))


def _differentiable(setting: Setting):
    @jax.custom_vjp
    def attend(q, k, v):
        return _forward(setting, q, k, v)

    def forward(q, k, v):
        out, lse = _forward(setting, q, k, v)
        return (out, lse), (q, k, v, out, lse)

    def backward(kept, gradients):
        return _backward(setting, *kept, *gradients)

    attend.defvjp(forward, backward)
    return attend


# --- the three calls ---------------------------------------------------------------------------


def _forward(
    at: Setting,
    q: Float[Array, "B T NMW"],
    k: Float[Array, "B S NW"],
    v: Float[Array, "B S NW"],
) -> tuple[Float[Array, "B T NMW"], Float[Array, "B N M T"]]:
    batch, length = q.shape[:2]
    outer, inner = _blocks(at, outer_is_q=True)
    return _call(
        at, _forward_kernel, at.forward, [outer.tokens, inner.tokens, inner.tokens],
        [outer.bounds, inner.positions],
        out_specs=[outer.tokens, outer.rows],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, at.groups, at.heads, length), jnp.float32),
        ],
        scratch=[
            pltpu.VMEM((at.heads, at.q_block), jnp.float32),
            pltpu.VMEM((at.heads, at.q_block), jnp.float32),
            pltpu.VMEM((at.heads, at.lanes, at.q_block), jnp.float32),
        ],
        products=2,
    )(q, k, v)  # fmt: skip


def _backward(at: Setting, q, k, v, out, lse, d_out, d_lse):
    batch, length = q.shape[:2]
    d_out = d_out.astype(q.dtype)
    rows = batch, length, at.groups, at.heads, at.lanes
    # d logits = p (d p - delta), where delta takes in the gradient of the log-sum-exp. Where that
    # is -inf no weight depends on a key, whatever is asked of it.
    d_lse = jnp.where(jnp.isfinite(lse), d_lse, 0.0)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).reshape(rows).sum(axis=-1)
    delta = jnp.moveaxis(delta, 1, -1) - d_lse
    # A query that sees nothing: exp(logit - lse) must be 0.
    lse = jnp.where(jnp.isfinite(lse), lse, -MASKED)
    arguments = q, k, v, d_out, lse, delta

    outer, inner = _blocks(at, outer_is_q=True)
    (d_q,) = _call(
        at, _d_query_kernel, at.forward,
        [outer.tokens, inner.tokens, inner.tokens, outer.tokens, outer.rows, outer.rows],
        [outer.bounds, inner.positions],
        out_specs=[outer.tokens],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        scratch=[pltpu.VMEM((at.heads, at.q_block, at.lanes), jnp.float32)],
        products=3,
    )(*arguments)  # fmt: skip

    outer, inner = _blocks(at, outer_is_q=False)
    d_k, d_v = _call(
        at, _d_key_kernel, at.backward,
        [inner.tokens, outer.tokens, outer.tokens, inner.tokens, inner.rows, inner.rows],
        [inner.bounds, outer.positions],
        out_specs=[outer.tokens, outer.tokens],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        scratch=[pltpu.VMEM((at.k_block, at.lanes), jnp.float32)] * 2,
        products=4,
    )(*arguments)  # fmt: skip
    return d_q, d_k, d_v


class _Blocks(NamedTuple):
    """Block specs of the operands that go with the outer or the inner block of an item."""

    tokens: pl.BlockSpec
    rows: pl.BlockSpec | None = None
    bounds: pl.BlockSpec | None = None
    positions: pl.BlockSpec | None = None


def _blocks(at: Setting, outer_is_q: bool) -> tuple[_Blocks, _Blocks]:
    def specs(of_q: bool, which: int) -> _Blocks:
        # `which` of the prefetched lists, outer or inner, holds the block's index.
        def tokens(b, n, i, *lists):
            return b, lists[which][i], n

        def rows(b, n, i, *lists):
            return b, n, 0, lists[which][i]

        def shared(b, n, i, *lists):
            return 0, lists[which][i]

        if of_q:
            return _Blocks(
                tokens=pl.BlockSpec((1, at.q_block, at.heads * at.lanes), tokens),
                rows=pl.BlockSpec((1, 1, at.heads, at.q_block), rows),
                bounds=pl.BlockSpec((2, at.q_block), shared),
            )
        return _Blocks(
            tokens=pl.BlockSpec((1, at.k_block, at.lanes), tokens),
            positions=pl.BlockSpec((1, at.k_block), shared),
        )

    return specs(outer_is_q, 0), specs(not outer_is_q, 1)


def _call(at: Setting, kernel, work: plan.Items, specs, static_specs, *,
          out_specs, out_shape, scratch, products: int):  # fmt: skip
    lists = jnp.asarray(work.outer), jnp.asarray(work.inner), jnp.asarray(work.flags)
    q_bounds = jnp.stack([at.seen.upper, at.seen.lower])
    k_pos = jnp.asarray(at.k_positions)[None]
    pairs = int(np.sum(work.flags & plan.EMPTY == 0)) * at.q_block * at.k_block * at.heads

    def run(*operands):
        calls = operands[0].shape[0] * at.groups
        bytes_read = sum(x.size * x.dtype.itemsize for x in operands)
        return pl.pallas_call(
            functools.partial(kernel, sink=at.seen.sink, scale=at.scale, lanes=at.lanes),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(operands[0].shape[0], at.groups, len(work.flags)),
                in_specs=[*static_specs, *specs],
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=VMEM_LIMIT,
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * calls * pairs * at.lanes,
                transcendentals=calls * pairs,
                bytes_accessed=bytes_read,
            ),
            interpret=at.interpret,
        )(*lists, q_bounds, k_pos, *operands)

    return run


# --- kernels -----------------------------------------------------------------------------------


def _when(flags, kernel_step):
    """Run a step on an item's pair of blocks, with a mask only where it is needed."""
    seen = flags & plan.EMPTY == 0
    whole = flags & plan.WHOLE != 0
    pl.when(seen & whole)(functools.partial(kernel_step, masked=False))
    pl.when(seen & jnp.logical_not(whole))(functools.partial(kernel_step, masked=True))


def _visible(bounds_2xT, positions_1xS, sink: int):
    """Keys down, queries across: [S, T]."""
    column = jnp.broadcast_to(positions_1xS[...], (8, positions_1xS.shape[1])).T[:, :1]
    upper, lower = bounds_2xT[0:1], bounds_2xT[1:2]
    return (column <= upper) & ((column < sink) | (column > lower))


def _product(a, b, contract: tuple[int, int]):
    precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a.astype(b.dtype), b, (((contract[0],), (contract[1],)), ((), ())),
        preferred_element_type=jnp.float32, precision=precision,
    )  # fmt: skip


def _forward_kernel(
    outer, inner, flags_ref, bounds_2xT, positions_1xS, q_TxMW, k_SxW, v_SxW, out_TxMW, lse_MxT,
    top_MxT, total_MxT, sum_MxWxT, *, sink: int, scale: float, lanes: int,
):  # fmt: skip
    flags = flags_ref[pl.program_id(2)]
    heads = top_MxT.shape[0]

    @pl.when(flags & plan.FIRST != 0)
    def _():
        top_MxT[...] = jnp.full_like(top_MxT, MASKED)
        total_MxT[...] = jnp.zeros_like(total_MxT)
        sum_MxWxT[...] = jnp.zeros_like(sum_MxWxT)

    def step(masked: bool):
        visible = _visible(bounds_2xT, positions_1xS, sink) if masked else None
        for m in range(heads):
            q = q_TxMW[0, :, m * lanes : (m + 1) * lanes]
            logits = scale * _product(k_SxW[0], q, (1, 1))
            if visible is not None:
                logits = jnp.where(visible, logits, MASKED)
            before = top_MxT[m : m + 1]
            top = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
            weight = jnp.exp(logits - top)
            if visible is not None:
                weight = jnp.where(visible, weight, 0.0)
            shrink = jnp.exp(before - top)
            top_MxT[m : m + 1] = top
            total = shrink * total_MxT[m : m + 1]
            total_MxT[m : m + 1] = total + jnp.sum(weight, axis=0, keepdims=True)
            weight = weight.astype(v_SxW.dtype)
            sum_MxWxT[m] = shrink * sum_MxWxT[m] + _product(v_SxW[0], weight, (0, 0))

    _when(flags, step)

    @pl.when(flags & plan.LAST != 0)
    def _():
        for m in range(heads):
            total = total_MxT[m : m + 1]
            some = total > 0
            total = jnp.where(some, total, 1.0)
            out = (sum_MxWxT[m] / total).T
            out_TxMW[0, :, m * lanes : (m + 1) * lanes] = out.astype(out_TxMW.dtype)
            lse = jnp.where(some, top_MxT[m : m + 1] + jnp.log(total), -jnp.inf)
            lse_MxT[0, 0, m : m + 1] = lse


def _d_logits(m, visible, q, k, v, d_out, lse_MxT, delta_MxT, scale: float):
    """Weights and the gradient of the scaled products, keys down: [S, T] each."""
    logits = scale * _product(k, q, (1, 1))
    if visible is not None:
        logits = jnp.where(visible, logits, MASKED)
    weight = jnp.exp(logits - lse_MxT[0, 0, m : m + 1])
    d_weight = _product(v, d_out, (1, 1))
    return weight, scale * weight * (d_weight - delta_MxT[0, 0, m : m + 1])


def _d_query_kernel(
    outer, inner, flags_ref, bounds_2xT, positions_1xS, q_TxMW, k_SxW, v_SxW, d_out_TxMW, lse_MxT,
    delta_MxT, d_q_TxMW, sum_MxTxW, *, sink: int, scale: float, lanes: int,
):  # fmt: skip
    flags = flags_ref[pl.program_id(2)]
    heads = sum_MxTxW.shape[0]

    @pl.when(flags & plan.FIRST != 0)
    def _():
        sum_MxTxW[...] = jnp.zeros_like(sum_MxTxW)

    def step(masked: bool):
        visible = _visible(bounds_2xT, positions_1xS, sink) if masked else None
        for m in range(heads):
            own = slice(m * lanes, (m + 1) * lanes)
            _, d_logits = _d_logits(
                m, visible, q_TxMW[0, :, own], k_SxW[0], v_SxW[0], d_out_TxMW[0, :, own], lse_MxT,
                delta_MxT, scale,
            )  # fmt: skip
            sum_MxTxW[m] += _product(d_logits, k_SxW[0], (0, 0))

    _when(flags, step)

    @pl.when(flags & plan.LAST != 0)
    def _():
        for m in range(heads):
            d_q_TxMW[0, :, m * lanes : (m + 1) * lanes] = sum_MxTxW[m].astype(d_q_TxMW.dtype)


def _d_key_kernel(
    outer, inner, flags_ref, bounds_2xT, positions_1xS, q_TxMW, k_SxW, v_SxW, d_out_TxMW, lse_MxT,
    delta_MxT, d_k_SxW, d_v_SxW, k_sum_SxW, v_sum_SxW, *, sink: int, scale: float, lanes: int,
):  # fmt: skip
    flags = flags_ref[pl.program_id(2)]

    @pl.when(flags & plan.FIRST != 0)
    def _():
        k_sum_SxW[...] = jnp.zeros_like(k_sum_SxW)
        v_sum_SxW[...] = jnp.zeros_like(v_sum_SxW)

    def step(masked: bool):
        visible = _visible(bounds_2xT, positions_1xS, sink) if masked else None
        for m in range(lse_MxT.shape[2]):
            own = slice(m * lanes, (m + 1) * lanes)
            q, d_out = q_TxMW[0, :, own], d_out_TxMW[0, :, own]
            weight, d_logits = _d_logits(
                m, visible, q, k_SxW[0], v_SxW[0], d_out, lse_MxT, delta_MxT, scale
            )
            v_sum_SxW[...] += _product(weight, d_out, (1, 0))
            k_sum_SxW[...] += _product(d_logits, q, (1, 0))

    _when(flags, step)

    @pl.when(flags & plan.LAST != 0)
    def _():
        d_k_SxW[0] = k_sum_SxW[...].astype(d_k_SxW.dtype)
        d_v_SxW[0] = v_sum_SxW[...].astype(d_v_SxW.dtype)

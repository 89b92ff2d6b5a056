"""Building blocks: parameters with logical axes, RMSNorm, RoPE, attention, one decoder block."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from spire_jax.config import ModelConfig
from spire_jax.masks import may_attend
from spire_jax.sharding import constrain

Positions = Int[np.ndarray, " T"] | Int[Array, "B T"]


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model computes; changes rounding and speed, never what is computed."""

    dtype: str = "float32"  # of matrix products and activations
    attention_chunk: int = 128  # queries (and keys) per block of the XLA attention
    remat: bool = False  # recompute each layer in the backward pass


def truncated_normal(fan_in: int, scale: float = 1.0):
    """Initializer with standard deviation scale / sqrt(fan_in), cut at two deviations."""
    return nnx.initializers.truncated_normal(scale * fan_in**-0.5 / 0.87962566103423978)


def parameter(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], init) -> nnx.Param:
    """A float32 parameter that carries its logical axes."""
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float, *, rngs: nnx.Rngs):
        self.scale = parameter(rngs, (size,), (None,), nnx.initializers.ones)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * inverse * self.scale[...]).astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> Float[np.ndarray, " half"]:
    """Radians per position of each rotated pair, with Llama 3's scaling where configured."""
    exponent = np.arange(0, config.d_head, 2) / config.d_head
    frequency = 1.0 / config.rope_base**exponent
    if config.rope_scaling != 1.0:
        turns = config.rope_original_len * frequency / (2 * np.pi)
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (smooth + (1 - smooth) / config.rope_scaling)
    return frequency.astype(np.float32)


def rope(
    x: Float[Array, "B T *heads H"], positions: Positions, config: ModelConfig
) -> Float[Array, "B T *heads H"]:
    """Rotate the pairs (x[h], x[h + H/2]) by position times frequency, in float32."""
    angle = jnp.asarray(positions, jnp.float32)[..., None] * rope_frequencies(config)
    angle = angle.reshape(*angle.shape[:-1], *(1,) * (x.ndim - 3), angle.shape[-1])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


# --- attention: one call for every use ---------------------------------------------------------


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
    chunk: int = 128,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """Softmax attention under `may_attend`, and its log-sum-exp in float32.

    Positions as NumPy arrays are known while tracing: the queries are then taken `chunk` at a
    time and blocks of keys that none of them may see are skipped. Positions as JAX arrays
    (decoding) are masked at run time.

    Args:
        q, k, v: rotated queries and keys, and values; G query heads share a KV head.
        q_pos, k_pos: positions in the text; keys may have their own for each KV head.
        limit: per query, the first position that is *not* visible (SPIRe's memories of the
            target end before the block); None for no such limit.
        scale: multiplies the logits.

    Returns:
        The output, zero for a query that sees no key; its log-sum-exp, -inf there.
    """
    # Heads before tokens: on CPUs a quarter faster, forward and backward, than leaving the
    # transposes to each chunk's products.
    q = jnp.moveaxis(q, 1, 3)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    if not (isinstance(q_pos, np.ndarray) and isinstance(k_pos, np.ndarray)):
        parts = [_attend(q, k, v, _mask(q_pos, k_pos, limit, window, sink), scale)]
    else:
        parts = []
        for start in range(0, q.shape[3], chunk):
            rows = slice(start, start + chunk)
            row_limit = None if limit is None else limit[rows]
            mask = np.asarray(_mask(q_pos[rows], k_pos, row_limit, window, sink)[0])
            seen = _visible_runs(mask, chunk)
            keys, values = (jnp.concatenate([x[:, :, s] for s in seen], axis=2) for x in (k, v))
            visible = np.concatenate([mask[:, s] for s in seen], axis=1)[None]
            parts.append(_attend(q[:, :, :, rows], keys, values, visible, scale))
    outs, lses = zip(*parts, strict=True)
    out = jnp.moveaxis(jnp.concatenate(outs, axis=3), 3, 1)
    return out, jnp.moveaxis(jnp.concatenate(lses, axis=3), 3, 1)


def merge_attention(parts):
    """One softmax over the keys of several `attention` results (out, log-sum-exp)."""
    top = jnp.max(jnp.stack([lse for _, lse in parts]), axis=0)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = [jnp.exp(lse - top) for _, lse in parts]
    total = sum(weights)
    total = jnp.where(total > 0, total, 1.0)
    out = sum(o * (w / total)[..., None] for (o, _), w in zip(parts, weights, strict=True))
    return out.astype(parts[0][0].dtype)


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


def _visible_runs(mask: Bool[np.ndarray, "T S"], chunk: int) -> list[slice]:
    """Runs of keys, in whole chunks, that some query may see; one key where there is none."""
    runs: list[slice] = []
    for start in range(0, mask.shape[1], chunk):
        if not mask[:, start : start + chunk].any():
            continue
        begin = runs.pop().start if runs and runs[-1].stop == start else start
        runs.append(slice(begin, start + chunk))
    return runs or [slice(0, 1)]


def _attend(q, k, v, mask, scale):
    # Query heads of one KV head are folded into the tokens: a plain batched matrix product.
    b, kv_heads, group, t, h = q.shape
    q = q.reshape(b, kv_heads, group * t, h)
    logits = jnp.einsum("BKTH,BKSH->BKTS", q, k, preferred_element_type=jnp.float32)
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
    out = jnp.einsum(
        "BKTS,BKSH->BKTH", weight.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = (out / total).astype(q.dtype).reshape(b, kv_heads, group, t, h)
    lse = jnp.where(some, jnp.log(total) + top, -jnp.inf)
    return out, lse.reshape(b, kv_heads, group, t)


# --- one decoder block -------------------------------------------------------------------------


def product(x: Array, w: Array, over: int = 1, dtype: str | None = None) -> Array:
    """The last `over` axes of `x` against the first of `w`, as a product of two matrices.

    The gradient of `w` sums over all rows of `x`. XLA's CPU does that several times faster where
    the rows are one axis (an unembedding's whole step in 0.11 instead of 0.20 s).
    """
    inner, outer = x.shape[x.ndim - over :], w.shape[over:]
    flat = x.reshape(-1, math.prod(inner)), w.reshape(math.prod(inner), -1)
    out = jnp.matmul(*flat, preferred_element_type=dtype)
    return out.reshape(*x.shape[: x.ndim - over], *outer)


class Block(nnx.Module):
    """Pre-norm attention and SwiGLU with residuals, in pieces that the models put together.

    What an attention layer reads is an argument: `keys_values` of the block's own input in a
    plain transformer, of memory vectors in SPIRe (method.md 3.3); both pass through the block's
    pre-attention norm.
    """

    def __init__(self, config: ModelConfig, compute: Compute, *, rngs: nnx.Rngs):
        c = config
        self.config, self.compute = config, compute
        d, k, g, h, f = c.d_model, c.n_kv_heads, c.q_per_kv, c.d_head, c.d_ff
        query_scale = h**-0.5 if c.scale_in_init else 1.0
        self.scale = 1.0 if c.scale_in_init else h**-0.5
        self.norm_attention = RMSNorm(d, c.norm_eps, rngs=rngs)
        heads = ("embed", "kv_heads", None, None)
        self.query = parameter(rngs, (d, k, g, h), heads, truncated_normal(d, query_scale))
        self.key = parameter(rngs, (d, k, h), ("embed", "kv_heads", None), truncated_normal(d))
        self.value = parameter(rngs, (d, k, h), ("embed", "kv_heads", None), truncated_normal(d))
        self.out = parameter(
            rngs, (k, g, h, d), ("kv_heads", None, None, "embed"), truncated_normal(k * g * h)
        )
        if c.qkv_bias:
            zeros = nnx.initializers.zeros
            self.query_bias = parameter(rngs, (k, g, h), ("kv_heads", None, None), zeros)
            self.key_bias = parameter(rngs, (k, h), ("kv_heads", None), zeros)
            self.value_bias = parameter(rngs, (k, h), ("kv_heads", None), zeros)
        if c.qk_norm:
            self.norm_query = RMSNorm(h, c.norm_eps, rngs=rngs)
            self.norm_key = RMSNorm(h, c.norm_eps, rngs=rngs)
        self.norm_mlp = RMSNorm(d, c.norm_eps, rngs=rngs)
        self.gate = parameter(rngs, (d, f), ("embed", "mlp"), truncated_normal(d))
        self.up = parameter(rngs, (d, f), ("embed", "mlp"), truncated_normal(d))
        self.down = parameter(rngs, (f, d), ("mlp", "embed"), truncated_normal(f))

    def _weight(self, weight: nnx.Param) -> Array:
        return weight[...].astype(self.compute.dtype)

    def queries(self, x: Float[Array, "B T D"], positions: Positions) -> Float[Array, "B T K G H"]:
        """Rotated queries of layer inputs `x` at `positions`."""
        q = product(self.norm_attention(x), self._weight(self.query))
        if self.config.qkv_bias:
            q = q + self._weight(self.query_bias)
        if self.config.qk_norm:
            q = self.norm_query(q)
        return constrain(rope(q, positions, self.config), "batch", None, "kv_heads", None, None)

    def keys_values(
        self, x: Float[Array, "B T D"], positions: Positions
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Rotated keys, and values, of layer inputs or memory vectors `x` at `positions`."""
        x = self.norm_attention(x)
        k = product(x, self._weight(self.key))
        v = product(x, self._weight(self.value))
        if self.config.qkv_bias:
            k, v = k + self._weight(self.key_bias), v + self._weight(self.value_bias)
        if self.config.qk_norm:
            k = self.norm_key(k)
        k = constrain(rope(k, positions, self.config), "batch", None, "kv_heads", None)
        return k, constrain(v, "batch", None, "kv_heads", None)

    def finish(
        self, x: Float[Array, "B T D"], attended: Float[Array, "B T K G H"]
    ) -> Float[Array, "B T D"]:
        """The block's output from its input and what its attention returned."""
        x = x + product(attended, self._weight(self.out), over=3)
        x = constrain(x, "batch", None, None)
        y = self.norm_mlp(x)
        gate = constrain(product(y, self._weight(self.gate)), "batch", None, "mlp")
        up = constrain(product(y, self._weight(self.up)), "batch", None, "mlp")
        x = x + product(jax.nn.silu(gate) * up, self._weight(self.down))
        return constrain(x, "batch", None, None)

"""Building blocks: parameters with logical axes, RMSNorm, RoPE, one decoder block."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from spire_jax.config.schema import ModelConfig
from spire_jax.models import cpu
from spire_jax.models.attention import XLA, Compute, Positions
from spire_jax.models.sharding import constrain


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


# --- one decoder block -------------------------------------------------------------------------


def product(
    x: Array,
    w: Array,
    over: int = 1,
    dtype: str | None = None,
    transposed: bool = False,
    compute: Compute | None = None,
) -> Array:
    """The last `over` axes of `x` against the first of `w`, as a product of two matrices.

    `transposed`: the last axis of `x` against the last of a matrix `w` (a tied unembedding).
    `compute` says what computes it.

    The gradient of `w` sums over all rows of `x`. XLA's CPU does that several times faster where
    the rows are one axis (an unembedding's whole step in 0.11 instead of 0.20 s).
    """
    inner, outer = x.shape[x.ndim - over :], w.shape[:1] if transposed else w.shape[over:]
    x_flat = x.reshape(-1, math.prod(inner))
    w_flat = w if transposed else w.reshape(math.prod(inner), -1)
    out = cpu.product(x_flat, w_flat, transposed, compute is not None and compute.products != XLA)
    if out is None:
        w_flat = w_flat.T if transposed else w_flat
        out = jnp.matmul(x_flat, w_flat, preferred_element_type=dtype)
    else:
        out = out.astype(dtype or x.dtype)
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

    def _product(self, x: Array, weight: nnx.Param, over: int = 1) -> Array:
        return product(x, self._weight(weight), over, compute=self.compute)

    def queries(self, x: Float[Array, "B T D"], positions: Positions) -> Float[Array, "B T K G H"]:
        """Rotated queries of layer inputs `x` at `positions`."""
        q = self._product(self.norm_attention(x), self.query)
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
        k = self._product(x, self.key)
        v = self._product(x, self.value)
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
        return self.feed_forward(self.add(x, attended))

    def add(
        self, x: Float[Array, "B T D"], attended: Float[Array, "B T K G H"]
    ) -> Float[Array, "B T D"]:
        """The residual stream after attention."""
        x = x + self._product(attended, self.out, over=3)
        return constrain(x, "batch", None, None)

    def feed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual stream after the MLP."""
        y = self.norm_mlp(x)
        gate = constrain(self._product(y, self.gate), "batch", None, "mlp")
        up = constrain(self._product(y, self.up), "batch", None, "mlp")
        x = x + self._product(jax.nn.silu(gate) * up, self.down)
        return constrain(x, "batch", None, None)

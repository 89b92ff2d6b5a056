"""A few rows times a weight matrix on CPUs, each weight read once, in its own type, on all cores.

That is what a decoding step mostly does. XLA's CPU computes a few rows at a time more slowly than
one, and converts bfloat16 weights in memory first; `launch/bench/cpu.py` times both. This kernel is
C++ behind XLA's foreign function interface; it has no derivative and no batching rule.
"""

import ctypes
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.platform import device_kind
from spire_jax.models.few_rows.build import library

MAX_ROWS = 64
_TARGET = "spire_jax_few_rows"


def available() -> bool:
    """Whether the program is traced for CPUs, and the kernel could be compiled."""
    return device_kind().lower() == "cpu" and _registered()


@functools.cache
def _registered() -> bool:
    path = library()
    if path is None:
        return False
    handler = ctypes.CDLL(str(path)).FewRowsProduct
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    return True


def product(
    x: Float[Array, "M K"], w: Float[Array, "K N"] | Float[Array, "N K"], transposed: bool = False
) -> Float[Array, "M N"]:
    """x @ w, or x @ w.T, in float32; at most MAX_ROWS rows, w in float32 or bfloat16.

    Raises:
        ValueError: other shapes or types, or no kernel for this machine.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1 if transposed else 0]:
        how = "x @ w.T" if transposed else "x @ w"
        raise ValueError(f"x {x.shape} and w {w.shape} are no two matrices for {how}")
    if not 1 <= x.shape[0] <= MAX_ROWS or 0 in w.shape:
        raise ValueError(f"x {x.shape}, w {w.shape}: the kernel takes 1 to {MAX_ROWS} rows and no "
                         f"empty matrix")  # fmt: skip
    if w.dtype not in (jnp.float32, jnp.bfloat16) or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x {x.dtype}, w {w.dtype}: the kernel takes float32 and bfloat16")
    if not available():
        raise ValueError("the kernel is for CPUs with a C++ compiler; use jnp.matmul")
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[0 if transposed else 1]), jnp.float32)
    call = jax.ffi.ffi_call(_TARGET, out)
    return call(x.astype(jnp.float32), w, transposed=transposed)

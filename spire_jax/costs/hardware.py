"""What this machine is, and the arithmetic peak that a training step is held against."""

import functools
import os
import platform
import resource
import sys
import time

import jax
import jax.numpy as jnp

from spire_jax.costs.chips import device_chip


def describe() -> dict[str, str]:
    """Hardware and versions, for reports: every absolute figure stands beside them."""
    devices = jax.devices()
    return {
        "hardware": f"{_processor()}, {os.cpu_count()} cores",
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


@functools.cache
def peak_flops(dtype: str) -> tuple[float, str]:
    """FLOP/s of one device in `dtype`, and where the figure is from.

    The data sheet's for a known accelerator; for anything else the best of a few large matrix
    products, timed here.
    """
    chip = device_chip(jax.devices()[0].device_kind)
    width = jnp.dtype(dtype).itemsize
    if chip is not None and width in chip.peak_flops:
        # Some chips show as several jax devices.
        return chip.peak_flops[width] / chip.jax_devices, f"{chip.name} data sheet"
    size = 1024
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        jax.block_until_ready(product(x, x))
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best, f"{size}-cubed {dtype} product measured here"


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()

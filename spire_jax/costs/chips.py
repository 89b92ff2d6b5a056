"""Accelerators as their vendors specify them: dense peaks, memory, links between chips.

A peak is for one chip and without structured sparsity; where a data sheet gives only the
sparse figure, the dense one is half of it. The interconnect is what one chip can send, over all its
links and in one direction: Google and NVIDIA both print what it sends and receives together, twice
that. No jax here: a device is recognised by the text of its ``device_kind``.
"""

import dataclasses
from collections.abc import Mapping

from spire_jax.config.schema import ConfigError

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip, after its vendor's data sheet."""

    name: str
    # FLOP/s by bytes per operand: 1 = FP8 or INT8, 2 = bf16, 4 = float32 as jax multiplies it
    # by default (TF32), where the data sheet gives it.
    peak_flops: Mapping[int, float]
    hbm_bytes_per_s: float
    hbm_bytes: float
    interconnect_bytes_per_s: float  # sent by one chip, summed over its links (ICI, NVLink)
    links: int
    source: str
    jax_devices: int = 1  # devices that jax shows for one chip

    def peak(self, compute_bytes: int | float) -> float:
        """Dense peak FLOP/s at an operand width in bytes; ConfigError where none is given."""
        for width, flops in self.peak_flops.items():
            if width == compute_bytes:
                return flops
        raise ConfigError(
            f"throughput.compute_bytes={compute_bytes:g}: no peak is given for {self.name} at "
            f"that width; use one of {sorted(self.peak_flops)}"
        )

    def hoi(self, compute_bytes: int | float) -> float:
        """Hardware operational intensity: peak FLOP/s over HBM bytes/s (method.md section 1)."""
        return self.peak(compute_bytes) / self.hbm_bytes_per_s


_CHIPS = (
    # Cloud TPU documentation, "TPU v5e": 197 TFLOPs bf16, 393 TOPs Int8, 16 GB, 819 GBps; 4 ICI
    # ports, 400 GBps bidirectional per chip (earlier printed as 1600 Gbps: one direction).
    Chip("v5e", {2: 197e12, 1: 393e12}, 819e9, 16e9, 200e9, 4,
         "Google Cloud documentation, TPU v5e, docs.cloud.google.com/tpu/docs/v5e"),
    # "TPU v5p": 459 TFLOPs bf16, 95 GiB, 2765 GBps. It has no FP8 units (that page's FP8 row
    # repeats the bf16 peak); 918 TOPS is the INT8 peak of the announcement, 6 December 2023.
    # 1200 GBps ICI bidirectional per chip (earlier 4800 Gbps), a 3D torus: 6 links.
    Chip("v5p", {2: 459e12, 1: 918e12}, 2765e9, 95 * GIB, 600e9, 6,
         "Google Cloud documentation, TPU v5p, docs.cloud.google.com/tpu/docs/v5p; INT8: Google "
         "Cloud blog, Introducing Cloud TPU v5p and AI Hypercomputer"),
    # "TPU v6e": 918 TFLOPs bf16, 1836 TOPs Int8, 32 GB (GiB in the TPU7x page), 1638 GBps;
    # 4 ICI ports, 800 GBps bidirectional per chip (earlier 3200 Gbps).
    Chip("v6e", {2: 918e12, 1: 1836e12}, 1638e9, 32 * GIB, 400e9, 4,
         "Google Cloud documentation, TPU v6e, docs.cloud.google.com/tpu/docs/v6e"),
    # "TPU7x (Ironwood)": 2307 TFLOPs bf16, 4614 FP8, 192 GiB, 7380 GB/s; two chiplets, each a
    # device of its own. 1200 GB/s ICI bidirectional per chip, a 3D torus: 6 links.
    Chip("v7x", {2: 2307e12, 1: 4614e12}, 7380e9, 192 * GIB, 600e9, 6,
         "Google Cloud documentation, TPU7x (Ironwood), docs.cloud.google.com/tpu/docs/tpu7x",
         jax_devices=2),
    # H100 SXM: 1,979 TFLOPS bf16, 3,958 FP8 and 989 TF32 with sparsity, 80 GB, 3.35 TB/s;
    # NVLink 900 GB/s, which NVIDIA's page on the Hopper architecture calls bidirectional per GPU:
    # 18 links of 25 GB/s each way, all of them to switches.
    Chip("h100", {4: 494.5e12, 2: 989.5e12, 1: 1979e12}, 3.35e12, 80e9, 450e9, 18,
         "NVIDIA H100 Tensor Core GPU data sheet, H100 SXM, halved for dense"),
    # H200 SXM: the same peaks and NVLink, 141 GB, 4.8 TB/s.
    Chip("h200", {4: 494.5e12, 2: 989.5e12, 1: 1979e12}, 4.8e12, 141e9, 450e9, 18,
         "NVIDIA H200 Tensor Core GPU data sheet, H200 SXM, halved for dense"),
    # DGX B200, eight GPUs: 72 PFLOPS FP8 with sparsity (so 36 bf16), 1,440 GB, 64 TB/s;
    # NVLink 14.4 TB/s over all of them and both directions, 18 links of 50 GB/s each way.
    Chip("b200", {2: 2250e12, 1: 4500e12}, 8e12, 180e9, 900e9, 18,
         "NVIDIA DGX B200 data sheet, an eighth of the system, halved for dense"),
)  # fmt: skip

CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _CHIPS}

# Whole names only: an H100 PCIe, an H200 NVL or a MIG slice has other peaks than the SXM part.
_BY_DEVICE_KIND = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


def chip(name: str) -> Chip:
    """The chip called `name` (a key of CHIPS); ConfigError lists those that are known."""
    if name not in CHIPS:
        raise ConfigError(f"throughput.chip={name!r} is unknown; choose from {list(CHIPS)}")
    return CHIPS[name]


def device_chip(device_kind: str) -> Chip | None:
    """The chip of a jax device, by its ``device_kind``; None for CPUs and unknown devices.

    A chip's figures cover all its devices: divide by `Chip.jax_devices` for one of them.
    """
    name = _BY_DEVICE_KIND.get(device_kind.strip())
    return CHIPS[name] if name else None

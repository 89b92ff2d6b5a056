"""Data sheets: the chips that the config knows, their peaks, and which one a device is."""

import pytest
from paper_numbers import PAPER_67M

from spire_jax.config import files, schema
from spire_jax.costs import chips, throughput


def test_the_config_knows_the_chips_and_the_variants() -> None:
    for name in chips.CHIPS:
        assert files.load(PAPER_67M, [f"throughput.chip={name}"]).throughput.chip == name
    for name in throughput.VARIANTS:
        assert files.load(PAPER_67M, [f"throughput.variant={name}"]).throughput.variant == name
    with pytest.raises(schema.ConfigError, match=r"throughput\.chip='h300'") as of_config:
        files.load(PAPER_67M, ["throughput.chip=h300"])
    with pytest.raises(schema.ConfigError, match=r"throughput\.chip='h300'") as of_chips:
        chips.chip("h300")
    for name in chips.CHIPS:
        assert name in str(of_config.value)
        assert name in str(of_chips.value)


def test_peaks_are_dense_and_cited() -> None:
    assert list(chips.CHIPS) == ["v5e", "v5p", "v6e", "v7x", "h100", "h200", "b200"]
    for name, chip in chips.CHIPS.items():
        assert chip.name == name
        assert chip.source
        # FP8 or INT8 runs at twice bf16 on all of them; a sparse peak would be four times.
        assert chip.peak(1) / chip.peak(2) == pytest.approx(2, rel=0.01)
        assert chip.hoi(1) == chip.peak(1) / chip.hbm_bytes_per_s
    assert chips.chip("h100").hoi(1) == pytest.approx(600, rel=0.02)  # the paper's, in FP8
    with pytest.raises(schema.ConfigError, match="no peak is given for v5e"):
        chips.chip("v5e").peak(4)


def test_interconnects_count_one_direction_over_all_links() -> None:
    """Half of what is printed for both directions together, in GB/s, and the links."""
    printed = {"v5e": (400, 4), "v5p": (1200, 6), "v6e": (800, 4), "v7x": (1200, 6),
               "h100": (900, 18), "h200": (900, 18), "b200": (14400 / 8, 18)}  # fmt: skip
    for name, chip in chips.CHIPS.items():
        both, links = printed[name]
        assert (chip.interconnect_bytes_per_s, chip.links) == (both / 2 * 1e9, links)
        assert chip.interconnect_bytes_per_s < chip.hbm_bytes_per_s


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "v7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),  # another part, with other peaks
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("TPU v4", None),
        ("cpu", None),
    ],
)
def test_devices_are_recognised(device_kind: str, name: str | None) -> None:
    found = chips.device_chip(device_kind)
    assert (found.name if found else None) == name

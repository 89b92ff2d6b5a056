"""What a kernel is traced for: the mesh's devices where there is a mesh, else the default ones."""

import jax

# Bytes of vector memory that a kernel may take: v5e and v6e have 128 MiB, a core of v7x 64, of v5p
# about 48. What XLA gives unasked (16 MiB) is too little for the widest heads.
VMEM_LIMIT = 40 * 2**20
MEGACORE = ("TPU v4", "TPU v5", "TPU v5p")  # chips whose two cores run one program together


def device_kind() -> str:
    """The name of the kind of device, such as "TPU v5 lite" or "cpu"."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return described.device_kind if described is not None else jax.devices()[0].device_kind


def is_tpu() -> bool:
    """Whether the device is a TPU."""
    return device_kind().startswith("TPU")


def cores_per_device() -> int:
    """Cores that share one kernel's grid."""
    return 2 if device_kind() in MEGACORE else 1

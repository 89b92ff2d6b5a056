"""The device mesh, and what each logical axis of a parameter or an activation maps to.

The mesh has three axes: `data` (batch only), `fsdp` (batch, and parameters in storage) and
`tensor` (heads, feed-forward width, vocabulary). Models name logical axes; only this file knows
the mesh.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spire_jax.config.schema import ConfigError, ExperimentConfig, MeshConfig
from spire_jax.storage import processes

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    "batch": ("data", "fsdp"),
    "embed": "fsdp",  # d_model of a parameter; activations keep d_model whole
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all); ConfigError if the sizes do not fit their number."""
    devices = list(processes.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = 1
    for size in sizes:
        fixed *= size if size > 0 else 1
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
        fixed = len(devices)
    if fixed != len(devices):
        wanted = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise ConfigError(
            f"mesh: {wanted} does not fit {len(devices)} devices; the product of mesh.data, "
            f"mesh.fsdp and mesh.tensor must be {len(devices)} (-1 takes what is left)"
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # a mesh axis that is a part of an axis of the torus: 8 of 16x16
        grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=types)


def check_mesh(mesh: Mesh, config: ExperimentConfig) -> None:
    """Raise ConfigError where a sharded axis does not divide over the mesh."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    written = config.continuations
    micro_batch = config.train.batch_size // config.train.accumulate
    for key, size in (
        ("train.batch_size / train.accumulate", micro_batch),
        ("eval.batch_size", config.eval.batch_size),
        ("continuations.batch_size", written.batch_size if written.rows else rows),
    ):
        if size % rows:
            raise ConfigError(f"{key}={size} is not a multiple of mesh data x fsdp = {rows}")
    models = [("target", config.target)]
    models += [(f"drafts.{n}", d.model(config.target)) for n, d in config.drafts]
    for name, model in models:
        for key, size, axis in (
            ("d_model", model.d_model, "fsdp"),
            ("n_kv_heads", model.n_kv_heads, "tensor"),
            ("d_ff", model.d_ff, "tensor"),
            ("vocab_size", model.vocab_size, "tensor"),
            ("head_tokens", model.head_tokens, "tensor"),
        ):
            if size % mesh.shape[axis]:
                raise ConfigError(
                    f"{name}.{key}={size} is not a multiple of mesh.{axis}={mesh.shape[axis]}"
                )


def spec(*axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` with its logical axes pinned to the mesh in force; as it is where there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def shardings(mesh: Mesh, axes: Any) -> Any:
    """NamedShardings for a pytree whose leaves are tuples of logical axes."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(*names)), axes, is_leaf=lambda x: type(x) is tuple
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, the rest whole."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def place_rows(x: Any) -> jax.Array:
    """An array on the devices of the mesh in force, rows over data and fsdp."""
    mesh = jax.sharding.get_mesh()
    return jax.numpy.asarray(x) if mesh.empty else jax.device_put(x, batch_sharding(mesh))

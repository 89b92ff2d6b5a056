"""One Orbax checkpoint on disk, as training and finished models use it.

It holds the arrays of a pytree under their flattened names ("params.blocks.0.query"), and beside
them, as metadata, each leaf's path, dtype and shape and the values of host scalars. Arrays are
matched to the abstract tree by name, so that integer keys and optax's named tuples come back as
the types that they were. Orbax commits by a rename: a checkpoint that exists under its own name
was written to the end. A list of its files and their sizes, added then, shows what was lost or
cut since, before anything is read. In a bucket Orbax commits by an object that it writes last, and
nothing is ever cut.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from spire_jax.config.identity import differences
from spire_jax.config.values import parse_json
from spire_jax.storage.bucket import in_bucket
from spire_jax.storage.paths import write_whole

try:
    from orbax.checkpoint import v1 as ocp
except ImportError:  # before the v1 interface left `experimental`
    from orbax.checkpoint.experimental import v1 as ocp

Tree = Any  # a pytree of arrays and host scalars
Identity = Mapping[str, Any]  # JSON-able values that say what a directory's contents are

ARRAYS = "arrays"  # the one checkpointable of every checkpoint here
FILES_FILE = "files.json"
COMMIT_FILE = "commit_success.txt"  # Orbax's, of what is complete in a bucket


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used here; the message names the remedy."""


class TornError(Exception):
    """A checkpoint that does not hold what it says it holds."""


class _Leaf(NamedTuple):
    path: list[str | int]
    value: Any

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path)) or "value"

    @property
    def on_host(self) -> bool:
        """Kept in the metadata: jax arrays have no 64 bits by default."""
        return isinstance(self.value, bool | int | float | np.generic)

    @property
    def kind(self) -> list[Any]:
        value = np.asarray(self.value) if self.on_host else self.value
        return [str(value.dtype), list(value.shape)]


def _leaves(tree: Tree) -> list[_Leaf]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [_Leaf([*map(_plain_key, keys)], value) for keys, value in leaves]


def _plain_key(key: Any) -> str | int:
    """A key of a dict, of a sequence or of a named tuple."""
    return next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind))


def flatten(tree: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays by name, metadata) of a tree."""
    leaves = _leaves(tree)
    names = [leaf.name for leaf in leaves]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CheckpointError(f"several leaves have one name, {', '.join(twice)}")
    arrays = {leaf.name: leaf.value for leaf in leaves if not leaf.on_host}
    metadata = {
        "leaves": [[leaf.path, *leaf.kind] for leaf in leaves],
        "scalars": {leaf.name: np.asarray(leaf.value).item() for leaf in leaves if leaf.on_host},
    }
    return arrays, metadata


def read(path: epath.Path, abstract_tree: Tree) -> Tree:
    """The tree in a checkpoint; TornError if unreadable, CheckpointError if it is another tree."""
    metadata = read_metadata(path)
    saved = {".".join(map(str, keys)) or "value": kind for keys, *kind in metadata["leaves"]}
    scalars, leaves = metadata["scalars"], _leaves(abstract_tree)
    wanted = {leaf.name: leaf.kind for leaf in leaves}
    if saved != wanted:
        raise CheckpointError(
            f"{path} holds another tree than the one to restore: {differences(saved, wanted)}; "
            f"choose another --workdir"
        )
    arrays = {leaf.name: _abstract(leaf.value) for leaf in leaves if leaf.name not in scalars}
    try:
        values = ocp.load_checkpointables(path, {ARRAYS: arrays})[ARRAYS] if arrays else {}
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # of this machine or this user, not of the checkpoint
    except Exception as error:  # Orbax and TensorStore raise many kinds, bare Exception among them
        raise TornError(first_line(error)) from error
    for leaf in leaves:
        if leaf.name in scalars:
            kind = type(leaf.value) if leaf.on_host else np.dtype(leaf.value.dtype).type
            values[leaf.name] = kind(scalars[leaf.name])
    return jax.tree.unflatten(jax.tree.structure(abstract_tree), [values[x.name] for x in leaves])


def read_metadata(path: epath.Path) -> dict[str, Any]:
    """Leaves, scalars and, for a model, its identity; TornError if any of it is damaged."""
    _check_files(path)
    try:
        metadata = ocp.checkpointables_metadata(path).custom_metadata
    except (OSError, ValueError, KeyError) as error:
        raise TornError(first_line(error)) from error
    if not metadata or not {"leaves", "scalars"} <= set(metadata):
        raise TornError("its metadata is missing")
    return metadata


def is_complete(path: epath.Path) -> bool:
    """Whether there is a checkpoint that was written to its end."""
    return (path / COMMIT_FILE if in_bucket(path) else path).exists()


def list_files(path: epath.Path) -> None:
    """Write down what a complete checkpoint consists of; in a bucket, objects are never cut."""
    if jax.process_index() == 0 and not in_bucket(path):
        write_json(path / FILES_FILE, _sizes(path))


def _check_files(path: epath.Path) -> None:
    """TornError if files are gone or cut; a kill can leave a good checkpoint without its list."""
    if not (path / FILES_FILE).exists():
        return
    try:
        listed, there = parse_json((path / FILES_FILE).read_bytes()), _sizes(path)
    except ValueError as error:
        raise TornError(f"{FILES_FILE}: {error}") from error
    if damaged := differences(listed, {name: there.get(name) for name in listed}):
        raise TornError(f"bytes of its files: {damaged}")


def _sizes(path: epath.Path) -> dict[str, int]:
    root = pathlib.Path(path)
    files = (file for file in root.rglob("*") if file.is_file() and file.name != FILES_FILE)
    return {str(file.relative_to(root)): file.stat().st_size for file in files}


def _abstract(leaf: Any) -> Any:
    """What Orbax restores into; without a sharding, the default device."""
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def abstract_tree_of(leaves: list[Any]) -> dict[Any, Any]:
    """Nested dicts of jax.ShapeDtypeStructs from the metadata's leaves."""
    tree: dict[Any, Any] = {}
    for (*parents, last), dtype, shape in leaves:
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype))
    return tree


def is_nested_dict(tree: Any) -> bool:
    """Whether a tree can be read back without an abstract one: dicts of dicts of arrays."""
    if not isinstance(tree, Mapping):
        return isinstance(tree, jax.Array | np.ndarray)
    return all(isinstance(k, str | int) and is_nested_dict(v) for k, v in tree.items())


# --- identities and paths ------------------------------------------------------------------------


def plain(values: Identity) -> dict[str, Any]:
    """As JSON gives it back, so that tuples compare equal to lists."""
    return json.loads(json.dumps(values, sort_keys=True))


def compare_identities(found: Any, expected: dict[str, Any], where: epath.Path) -> None:
    """CheckpointError naming each value in which what is found differs from what is expected."""
    if found != expected:
        raise CheckpointError(
            f"{where} belongs to another configuration, with {differences(found, expected)}; "
            f"choose another --workdir, or restore the values that it was made with"
        )


def write_json(path: epath.Path, values: Any) -> None:
    """Atomic: a kill leaves the old file or the new one."""
    write_whole(path, json.dumps(values, indent=1, sort_keys=True) + "\n")


def first_line(error: BaseException) -> str:
    """What went wrong at the bottom: Orbax wraps it in accounts of who noticed."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]

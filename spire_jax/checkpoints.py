"""Checkpoints of training, and finished models, on Orbax.

On disk, both are one Orbax checkpoint: the arrays of a pytree under their flattened names
("params.blocks.0.query"), and beside them, as metadata, each leaf's path, dtype and shape and the
values of host scalars. Arrays are matched to the abstract tree by name, so that integer keys and
optax's named tuples come back as the types that they were. Orbax commits by a rename: a
checkpoint that exists under its own name was written to the end. A list of its files and their
sizes, added then, shows what was lost or cut since, before anything is read.
"""

import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

try:
    from orbax.checkpoint import v1 as ocp
except ImportError:  # before the v1 interface left `experimental`
    from orbax.checkpoint.experimental import v1 as ocp

Tree = Any  # a pytree of arrays and host scalars
Identity = Mapping[str, Any]  # JSON-able values that say what a directory's contents are

_IDENTITY_FILE = "identity.json"
_FILES_FILE = "files.json"
_ARRAYS = "arrays"  # the one checkpointable of every checkpoint here
_UNREADABLE = "unreadable-"  # prefix under which a torn checkpoint is put aside


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used here; the message names the remedy."""


class Checkpoints:
    """The newest few checkpoints of one training run, written in the background.

    A context manager: leaving it waits for the save under way. Use from one thread.
    """

    def __init__(self, directory: str | os.PathLike[str], *, kept: int, identity: Identity):
        """Open `directory`, or make it; the newest `kept` checkpoints stay.

        `identity` (JSON-able) says what is trained here. It is written once; a directory with
        another identity raises CheckpointError, naming each value that differs, before anything
        is touched. A directory that cannot be written raises CheckpointError too.
        """
        self.directory = _path(directory)
        self._last_saved: int | None = None
        self._unlisted: int | None = None  # the step whose files are to be listed once it is there
        self._check_identity(_plain(identity))
        policies = ocp.training.preservation_policies
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                preservation_policy=policies.LatestN(kept),
                cleanup_tmp_directories=True,  # what a killed save left behind
            )
        except OSError as error:
            raise self._cannot_write(error) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            warnings.warn(str(failure), stacklevel=2)  # what is on its way up matters more
        finally:
            self._checkpointer.close()

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are complete, oldest first; waits for a pending save."""
        self.wait()
        self._checkpointer.reload()
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def restore(self, abstract_state: Tree) -> tuple[int, Tree] | None:
        """The newest readable checkpoint as (step, state), or None where there is none.

        `abstract_state` has the state's structure; its leaves are arrays, scalars or
        jax.ShapeDtypeStructs, whose shardings the restored arrays take. A torn or unreadable
        checkpoint is put aside with a warning, and the one before it is read. A checkpoint
        that holds another structure, shape or dtype raises CheckpointError.
        """
        for step in reversed(self.steps()):
            path = self.directory / str(step)
            try:
                return step, _read(path, abstract_state)
            except _TornError as error:
                self._put_aside(path, error)
        return None

    def save(self, step: int, state: Tree) -> None:
        """Start to save `state` as of `step`; the arrays may be donated as soon as it returns.

        Leaves are jax arrays, numpy arrays or scalars; Python and numpy scalars keep 64 bits.
        Waits for the save before it, and raises CheckpointError if that one, or the start of
        this one, failed.
        """
        self.wait()
        arrays, metadata = _flatten(state)
        try:
            self._last_saved = self._unlisted = step
            self._checkpointer.save_checkpointables_async(
                step, {_ARRAYS: arrays}, force=True, custom_metadata=metadata
            )
        except ocp.training.errors.StepAlreadyExistsError as error:
            raise CheckpointError(f"{self.directory} already holds step {step}") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise self._cannot_write(error) from error

    def wait(self) -> None:
        """Return when nothing is being written; CheckpointError if a save failed."""
        unlisted, self._unlisted = self._unlisted, None
        try:
            self._checkpointer.wait()
            if unlisted is not None:
                _list_files(self.directory / str(unlisted))
        except Exception as error:  # whatever the writing thread met
            raise self._cannot_write(error) from error

    def _check_identity(self, identity: dict[str, Any]) -> None:
        path = self.directory / _IDENTITY_FILE
        try:
            if path.exists():
                _compare(_read_json(path), identity, self.directory)
            elif any(child.name.isdigit() for child in _children(self.directory)):
                raise CheckpointError(
                    f"{self.directory} holds checkpoints but no {_IDENTITY_FILE}, so nobody can "
                    f"say what they are; choose another --workdir, or move them away"
                )
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                # Rewritten where it exists: a directory that is read-only, or on a full disk, is
                # found out now and not after the first hour of training.
                _write_json(path, identity)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _put_aside(self, path: epath.Path, error: Exception) -> None:
        """Rename an unreadable checkpoint, so that its step can be saved again."""
        aside = self.directory / f"{_UNREADABLE}{path.name}"
        warnings.warn(
            f"checkpoint {path} is torn or unreadable ({_first_line(error)}); skipped, "
            f"and moved to {aside.name}, which can be deleted",
            stacklevel=3,
        )
        if jax.process_index() == 0:
            if aside.exists():
                aside.rmtree()
            path.rename(aside)
        _barrier("put_aside")
        self._checkpointer.reload()

    def _cannot_write(self, error: BaseException) -> CheckpointError:
        what = "" if self._last_saved is None else f" of step {self._last_saved}"
        return CheckpointError(
            f"cannot write the checkpoint{what} in {self.directory}: {_first_line(error)}; make "
            f"the directory writable and free some space, or choose another --workdir. "
            f"Checkpoints that were complete before are intact: start again to resume."
        )


def save_params(
    directory: str | os.PathLike[str], params: Mapping[Any, Any], identity: Identity
) -> None:
    """Write a finished model: nested dicts of arrays, and `identity`, JSON-able values.

    Atomic: `directory` appears when it is complete. A model of the same identity is replaced;
    anything else that is in the way raises CheckpointError, as does a failure to write.
    """
    path = _path(directory)
    identity = _plain(identity)
    arrays, metadata = _flatten(params)
    if not _is_nested_dict(params):
        raise CheckpointError(f"{path}: params must be nested dicts of arrays, got {type(params)}")
    if path.exists():
        _compare(params_identity(path), identity, path)
    new, old = path.parent / f".{path.name}.new", path.parent / f".{path.name}.old"
    try:
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left_over in path.parent.glob(f".{path.name}.new.orbax-checkpoint-tmp*"):
                left_over.rmtree()
        _barrier("save_params")
        ocp.save_checkpointables(
            new,
            {_ARRAYS: arrays},
            overwrite=True,
            custom_metadata={**metadata, "identity": identity},
        )
        _list_files(new)
        if jax.process_index() == 0:
            if old.exists():
                old.rmtree()
            if path.exists():
                path.rename(old)
            new.rename(path)
            if old.exists():
                old.rmtree()
        _barrier("saved_params")
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot write the model {path}: {_first_line(error)}; make {path.parent} writable "
            f"and free some space, or choose another --workdir"
        ) from error


def load_params(
    directory: str | os.PathLike[str],
    abstract_params: Tree | None = None,
    expected_identity: Identity | None = None,
    check_only: bool = False,
) -> Any:
    """The parameters of a finished model, as nested dicts of jax arrays.

    With `abstract_params` (arrays or jax.ShapeDtypeStructs) they take its structure and
    shardings, without it they lie on the default device. CheckpointError if the model is missing
    or torn, has another structure, or if its identity is not `expected_identity`. With
    `check_only` no array is read and None returned: files, sizes and identity are checked.
    """
    path = _path(directory)
    identity = params_identity(path)  # raises where there is no model
    if expected_identity is not None:
        _compare(identity, _plain(expected_identity), path)
    if check_only:
        return None
    try:
        if abstract_params is None:
            abstract_params = _nested(_metadata(path)["leaves"])
        return _read(path, abstract_params)
    except _TornError as error:
        raise _torn(path, error) from error


def params_identity(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The identity of a finished model, without reading it; CheckpointError if missing or torn."""
    path = _path(directory)
    if not path.exists():
        raise CheckpointError(f"there is no model in {path}; run the stage that makes it first")
    try:
        if "://" not in str(path) and not (path / _FILES_FILE).exists():
            raise _TornError(f"it has no {_FILES_FILE}")  # listed before it got its name
        return _metadata(path)["identity"]
    except (_TornError, KeyError) as error:
        raise _torn(path, error) from error


# --- a pytree as named arrays and metadata -------------------------------------------------------


class _TornError(Exception):
    """A checkpoint that does not hold what it says it holds."""


class _Leaf(NamedTuple):
    name: str
    path: list[str | int]
    value: Any

    @property
    def on_host(
        self,
    ) -> bool:  # kept in the metadata: jax arrays have no 64 bits by default
        return isinstance(self.value, bool | int | float | np.generic)

    @property
    def kind(self) -> list[Any]:
        value = np.asarray(self.value) if self.on_host else self.value
        return [str(value.dtype), list(value.shape)]


def _leaves(tree: Tree) -> list[_Leaf]:
    leaves: dict[str, _Leaf] = {}
    for keys, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = [_plain_key(key) for key in keys]
        name = ".".join(map(str, path)) or "value"
        if name in leaves:
            raise CheckpointError(f"{leaves[name].path} and {path} have one name, {name!r}")
        leaves[name] = _Leaf(name, path, value)
    return list(leaves.values())


def _plain_key(key: Any) -> str | int:
    for attribute in ("key", "idx", "name"):  # of dicts, of sequences, of named tuples
        if hasattr(key, attribute):
            return getattr(key, attribute)
    raise CheckpointError(f"cannot name the pytree key {key!r}")


def _flatten(tree: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays by name, metadata) of a tree."""
    leaves = _leaves(tree)
    for leaf in leaves:
        if not leaf.on_host and not isinstance(leaf.value, jax.Array | np.ndarray):
            raise CheckpointError(f"{leaf.name} is neither an array nor a number: {leaf.value!r}")
    arrays = {leaf.name: leaf.value for leaf in leaves if not leaf.on_host}
    metadata = {
        "leaves": [[leaf.path, *leaf.kind] for leaf in leaves],
        "scalars": {leaf.name: np.asarray(leaf.value).item() for leaf in leaves if leaf.on_host},
    }
    return arrays, metadata


def _read(path: epath.Path, abstract_tree: Tree) -> Tree:
    """The tree in a checkpoint; _TornError if unreadable, CheckpointError if it is another tree."""
    metadata = _metadata(path)
    saved = {".".join(map(str, keys)) or "value": kind for keys, *kind in metadata["leaves"]}
    scalars, leaves = metadata["scalars"], _leaves(abstract_tree)
    wanted = {leaf.name: leaf.kind for leaf in leaves}
    if saved != wanted:
        raise CheckpointError(
            f"{path} holds another tree than the one to restore: "
            + _differences(saved, wanted, "it has", "expected")
            + "; choose another --workdir"
        )
    arrays = {leaf.name: _abstract(leaf.value) for leaf in leaves if leaf.name not in scalars}
    try:
        values = ocp.load_checkpointables(path, {_ARRAYS: arrays})[_ARRAYS] if arrays else {}
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # of this machine or this user, not of the checkpoint
    except Exception as error:  # Orbax and TensorStore raise many kinds, bare Exception among them
        raise _TornError(_first_line(error)) from error
    for leaf in leaves:
        if leaf.name in scalars:
            kind = type(leaf.value) if leaf.on_host else np.dtype(leaf.value.dtype).type
            values[leaf.name] = kind(scalars[leaf.name])
    return jax.tree.unflatten(jax.tree.structure(abstract_tree), [values[x.name] for x in leaves])


def _metadata(path: epath.Path) -> dict[str, Any]:
    """Leaves, scalars and, for a model, its identity; _TornError if any of it is damaged."""
    _check_files(path)
    try:
        metadata = ocp.checkpointables_metadata(path).custom_metadata
    except (OSError, ValueError, KeyError) as error:
        raise _TornError(_first_line(error)) from error
    if not metadata or not {"leaves", "scalars"} <= set(metadata):
        raise _TornError("its metadata is missing")
    return metadata


def _list_files(path: epath.Path) -> None:
    """Write down what a complete checkpoint consists of; in a bucket, objects are never cut."""
    if jax.process_index() == 0 and "://" not in str(path):
        _write_json(path / _FILES_FILE, _sizes(path))


def _check_files(path: epath.Path) -> None:
    """_TornError if files are gone or cut; a kill can leave a good checkpoint without its list."""
    listing = path / _FILES_FILE
    if not listing.exists():
        return
    try:
        expected, found = json.loads(listing.read_text()), _sizes(path)
    except ValueError as error:
        raise _TornError(f"{_FILES_FILE}: {error}") from error
    for name, size in expected.items():
        if found.get(name) != size:
            has = f"{found[name]} bytes" if name in found else "no file"
            raise _TornError(f"{name}: {has} instead of {size} bytes")


def _sizes(path: epath.Path) -> dict[str, int]:
    root = pathlib.Path(path)
    files = (file for file in root.rglob("*") if file.is_file() and file.name != _FILES_FILE)
    return {str(file.relative_to(root)): file.stat().st_size for file in files}


def _abstract(leaf: Any) -> Any:
    """What Orbax restores into; without a sharding, the default device."""
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _nested(leaves: list[Any]) -> dict[Any, Any]:
    """Nested dicts of jax.ShapeDtypeStructs from the metadata's leaves."""
    tree: dict[Any, Any] = {}
    for (*parents, last), dtype, shape in leaves:
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype))
    return tree


def _is_nested_dict(tree: Any) -> bool:
    if not isinstance(tree, Mapping):
        return isinstance(tree, jax.Array | np.ndarray)
    return all(isinstance(k, str | int) and _is_nested_dict(v) for k, v in tree.items())


# --- identities and files ------------------------------------------------------------------------


def _plain(values: Identity) -> dict[str, Any]:
    """As JSON gives it back, so that tuples compare equal to lists."""
    return json.loads(json.dumps(values, sort_keys=True))


def _compare(found: Any, expected: dict[str, Any], where: epath.Path) -> None:
    if found != expected:
        raise CheckpointError(
            f"{where} belongs to another configuration: "
            + _differences(found, expected, "there", "now")
            + "; choose another --workdir, or restore the values that it was made with"
        )


def _differences(found: Any, expected: Any, at_found: str, at_expected: str) -> str:
    found, expected = _dotted(found), _dotted(expected)
    return ", ".join(
        f"{key} ({at_found}: {found.get(key, 'absent')}, {at_expected}: "
        f"{expected.get(key, 'absent')})"
        for key in sorted(found.keys() | expected.keys())
        if (key in found, found.get(key)) != (key in expected, expected.get(key))
    )


def _dotted(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping) or not values:
        return {prefix.removesuffix("."): values}
    return {k: v for key in values for k, v in _dotted(values[key], f"{prefix}{key}.").items()}


def _read_json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); choose another --workdir") from error


def _write_json(path: epath.Path, values: Any) -> None:
    """Atomic: a kill leaves the old file or the new one."""
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def _children(directory: epath.Path) -> list[epath.Path]:
    return list(directory.iterdir()) if directory.exists() else []


def _path(directory: str | os.PathLike[str]) -> epath.Path:
    """Absolute, as Orbax wants it; buckets (gs://...) as they are."""
    directory = os.fspath(directory)
    return epath.Path(directory if "://" in directory else os.path.abspath(directory))


def _torn(path: epath.Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the model {path} is torn or unreadable ({_first_line(error)}); "
        f"move it away and run the stage that makes it again"
    )


def _first_line(error: BaseException) -> str:
    """What went wrong at the bottom: Orbax wraps it in accounts of who noticed."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)

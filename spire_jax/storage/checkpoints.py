"""Checkpoints of training, and finished models: written atomically, checked on reading."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from spire_jax.config.checks import ConfigError
from spire_jax.storage.bucket import watched
from spire_jax.storage.checkpoint_files import (
    ARRAYS,
    CheckpointError,
    Identity,
    TornError,
    Tree,
    abstract_tree_of,
    compare_identities,
    first_line,
    flatten,
    is_complete,
    is_nested_dict,
    list_files,
    ocp,
    plain,
    read,
    read_metadata,
    write_json,
)
from spire_jax.storage.paths import locate, read_record

_IDENTITY_FILE = "identity.json"
_UNREADABLE = "unreadable-"  # prefix under which a torn checkpoint is put aside


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
        self.directory = locate(directory)
        self._last_saved: int | None = None
        self._unlisted: int | None = None  # the step whose files are to be listed once it is there
        self._check_identity(plain(identity))
        with self._writing():
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                preservation_policy=ocp.training.preservation_policies.LatestN(kept),
                cleanup_tmp_directories=True,  # what a killed save left behind
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            try:
                self.wait()
            finally:
                with self._writing():  # after a failed save Orbax may fail here once more
                    self._checkpointer.close()
        except CheckpointError as failure:
            if error is None:
                raise
            warnings.warn(str(failure), stacklevel=2)  # what is on its way up matters more

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
            with watched(path):
                try:
                    return step, read(path, abstract_state)
                except TornError as error:
                    self._put_aside(path, error)
        return None

    def save(self, step: int, state: Tree) -> None:
        """Start to save `state` as of `step`; the arrays may be donated as soon as it returns.

        Leaves are jax arrays, numpy arrays or scalars; Python and numpy scalars keep 64 bits.
        Waits for the save before it, and raises CheckpointError if that one, or the start of
        this one, failed.
        """
        self.wait()
        arrays, metadata = flatten(state)
        self._last_saved = self._unlisted = step
        with self._writing():
            self._checkpointer.save_checkpointables_async(
                step, {ARRAYS: arrays}, force=True, custom_metadata=metadata
            )

    def wait(self) -> None:
        """Return when nothing is being written; CheckpointError if a save failed."""
        unlisted, self._unlisted = self._unlisted, None
        with self._writing():
            self._checkpointer.wait()
            if unlisted is not None:
                list_files(self.directory / str(unlisted))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A CheckpointError that says what to do, for whatever fails within it."""
        try:
            with watched(self.directory):
                yield
        except (CheckpointError, ConfigError):
            raise
        except Exception as error:  # whatever a writing thread met
            what = "" if self._last_saved is None else f" of step {self._last_saved}"
            raise CheckpointError(
                f"cannot write the checkpoint{what} in {self.directory}: {first_line(error)}; make "
                f"the directory writable and free some space, or choose another --workdir. "
                f"Checkpoints that were complete before are intact: start again to resume."
            ) from error

    def _check_identity(self, identity: dict[str, Any]) -> None:
        path = self.directory / _IDENTITY_FILE
        with self._writing():
            held = any(self.directory.glob("[0-9]*"))  # else nothing came of what stands there
            if held and path.exists():
                compare_identities(read_record(path), identity, self.directory)
            elif held:
                raise CheckpointError(
                    f"{self.directory} holds checkpoints but no {_IDENTITY_FILE}, so nobody can "
                    f"say what they are; choose another --workdir, or move them away"
                )
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                # Rewritten where it exists: a directory that is read-only, or on a full disk, is
                # found out now and not after the first hour of training.
                write_json(path, identity)

    def _put_aside(self, path: epath.Path, error: Exception) -> None:
        """Rename an unreadable checkpoint, so that its step can be saved again."""
        aside = self.directory / f"{_UNREADABLE}{path.name}"
        warnings.warn(
            f"checkpoint {path} is torn or unreadable ({first_line(error)}); skipped, "
            f"and moved to {aside.name}, which can be deleted",
            stacklevel=3,
        )
        if jax.process_index() == 0:
            if aside.exists():
                aside.rmtree()
            path.rename(aside)
        _barrier("put_aside")
        self._checkpointer.reload()


def save_params(
    directory: str | os.PathLike[str], params: Mapping[Any, Any], identity: Identity
) -> None:
    """Write a finished model: nested dicts of arrays, and `identity`, JSON-able values.

    Atomic: the model is there when it is complete (`has_params`). One of the same identity that is
    there already stays; one of another raises CheckpointError, as does a failure to write.
    """
    path, identity = locate(directory), plain(identity)
    arrays, metadata = flatten(params)
    if not is_nested_dict(params):
        raise CheckpointError(f"{path}: params must be nested dicts of arrays, got {type(params)}")
    if is_complete(path):
        compare_identities(params_identity(path), identity, path)
        return
    try:
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left_over in path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*"):
                left_over.rmtree()
        _barrier("save_params")
        with watched(path):
            ocp.save_checkpointables(
                path,
                {ARRAYS: arrays},
                overwrite=True,
                custom_metadata={**metadata, "identity": identity},
            )
        list_files(path)
        _barrier("saved_params")
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot write the model {path}: {first_line(error)}; make {path.parent} writable "
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
    path = locate(directory)
    identity = params_identity(path)  # raises where there is no model
    if expected_identity is not None:
        compare_identities(identity, plain(expected_identity), path)
    if check_only:
        return None
    try:
        if abstract_params is None:
            abstract_params = abstract_tree_of(read_metadata(path)["leaves"])
        with watched(path):
            return read(path, abstract_params)
    except TornError as error:
        raise _torn(path, error) from error


def has_params(directory: str | os.PathLike[str]) -> bool:
    """Whether there is a finished model, as far as one sees without reading it."""
    return is_complete(locate(directory))


def params_identity(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The identity of a finished model, without reading it; CheckpointError if missing or torn."""
    path = locate(directory)
    if not is_complete(path):
        raise CheckpointError(f"there is no model in {path}; run the stage that makes it first")
    try:
        return read_metadata(path)["identity"]
    except (TornError, KeyError) as error:
        raise _torn(path, error) from error


def _torn(path: epath.Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the model {path} is torn or unreadable ({first_line(error)}); "
        f"move it away and run the stage that makes it again"
    )


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)

"""Where a run's files are, in a folder or in a bucket (gs://...), and what differs between the two.

A file of a folder is appended to, and replaced by a rename. An object of a bucket is written whole,
and is there when its upload ends: there are no folders, no renames and no locks.
"""

import math
import os
import pathlib
import shutil
import tempfile
from typing import Any, TypeAlias

from etils import epath

from spire_jax.config.checks import ConfigError
from spire_jax.config.values import parse_json
from spire_jax.storage.bucket import in_bucket, open_bucket, watched

Place: TypeAlias = epath.Path | pathlib.Path  # the second, which has less, in tests and notebooks


def locate(path: str | os.PathLike[str]) -> epath.Path:
    """The absolute path of a folder or file, or of one in a bucket.

    Raises:
        ConfigError: a URL that is none of a bucket's folder, or gcsfs is missing.
    """
    text = os.fspath(path)
    return open_bucket(text) if "://" in text else epath.Path(os.path.abspath(text))


def read_record(path: Place) -> Any:
    """The JSON of a file that a stage wrote; ConfigError where it is damaged."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); move the folder {path.parent} away, and "
                          f"the same command makes it again") from None  # fmt: skip


def write_whole(path: Place, content: bytes | str) -> None:
    """Write a file at once: a kill leaves the old content or the new.

    Halves of surrogate pairs, which UTF-8 cannot hold, are written as escapes.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    if in_bucket(path):
        with watched(path):
            path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Near:
    """A folder whose files can grow: the one that is asked for, or a temporary one for a bucket's.

    A run pushes with every checkpoint, and a resumed run removes what is beyond the last one.
    """

    def __init__(self, folder: epath.Path):
        self._folder, self._temporary = folder, None
        if in_bucket(folder):
            self._temporary = tempfile.TemporaryDirectory()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = pathlib.Path(self._temporary.name if self._temporary else folder)

    def push(self) -> None:
        """Copy the files to where they belong, if they are elsewhere."""
        for file in self.path.iterdir() if self._temporary else ():
            write_whole(self._folder / file.name, file.read_bytes())

    def __enter__(self) -> "Near":
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary:
            self._temporary.cleanup()


def move_aside(folder: epath.Path, kept: epath.Path, stamp: str) -> None:
    """Rename a folder of files; one of the new name goes.

    In a bucket, where that is not one step, the file `stamp`, which says what the folder holds,
    goes first: a kill leaves a whole folder of the old name or one of the new.
    """
    if kept.exists():
        kept.rmtree()
    if not in_bucket(folder):
        folder.rename(kept)
        return
    for path in folder.iterdir():
        path.copy(kept / path.name)
    (folder / stamp).unlink()
    folder.rmtree()


def cache_folder(workdir: Place | None = None) -> pathlib.Path:
    """Where to keep what takes long to make and is the same for all runs: near, for a bucket."""
    if workdir is not None and not in_bucket(workdir):
        return pathlib.Path(workdir)
    named = os.environ.get("SPIRE_JAX_CACHE")
    return pathlib.Path(named) if named else pathlib.Path.home() / ".cache" / "spire_jax"


def free_bytes(workdir: Place) -> float:
    """Bytes that may still be written; a bucket has no bounds."""
    return math.inf if in_bucket(workdir) else float(shutil.disk_usage(workdir).free)

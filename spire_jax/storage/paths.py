"""Where a run's files are, in a folder or in a bucket (gs://...), and what differs between the two.

A file of a folder is appended to, and replaced by a rename. An object of a bucket is written whole,
and is there when its upload ends: there are no folders, no renames and no locks. Paths are
`pathlib.Path` in a folder and `epath.Path` in a bucket, which have the methods that we use in
common.
"""

import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from etils import epath

from spire_jax.storage.bucket import in_bucket, open_bucket, watched

Place: TypeAlias = pathlib.Path | epath.Path


def locate(path: str | os.PathLike[str]) -> Place:
    """The absolute path of a folder or file, or of one in a bucket.

    Raises:
        ConfigError: a URL that is none of a bucket's folder, or gcsfs is missing.
    """
    text = os.fspath(path)
    return open_bucket(text) if "://" in text else pathlib.Path(text).absolute()


def write_whole(path: Place, content: bytes | str) -> None:
    """Write a file at once: a kill leaves the old content or the new."""
    data = content.encode() if isinstance(content, str) else content
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


def write_together(texts: Mapping[Place, str]) -> None:
    """Write files of one folder; none is replaced before all are written, but in a bucket.

    Halves of surrogate pairs, which UTF-8 cannot hold, are written as escapes.
    """
    if any(in_bucket(path) for path in texts):
        for path, text in texts.items():
            write_whole(path, text.encode(errors="backslashreplace"))
        return
    partial = {path: path.with_name(f".{path.name}.partial") for path in texts}
    try:
        for path, text in texts.items():
            partial[path].write_text(text, encoding="utf-8", errors="backslashreplace")
        for path, written in partial.items():
            os.replace(written, path)
    finally:
        for written in partial.values():
            written.unlink(missing_ok=True)


class FileLines:
    """Lines that are with the system when `append` returns."""

    def __init__(self, path: Place):
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, line: bytes) -> None:
        """Add a line; OSError if it cannot be written."""
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(None, f"{written} of {len(line)} bytes were written")

    def sync(self) -> None:
        """Return when all lines are on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class ObjectLines:
    """Lines that go to the bucket at every `sync`, all of them: objects do not grow.

    A run syncs with every checkpoint, and a resumed run removes what is beyond the last one.
    """

    def __init__(self, path: Place, content: bytes):
        self._path, self._content, self._kept = path, bytearray(content), len(content)

    def append(self, line: bytes) -> None:
        """Add a line."""
        self._content += line

    def sync(self) -> None:
        """Return when all lines are in the bucket."""
        if self._kept != len(self._content):
            write_whole(self._path, bytes(self._content))
            self._kept = len(self._content)

    def close(self) -> None:
        """There is nothing to close."""


Lines: TypeAlias = FileLines | ObjectLines


def grow(path: Place, content: bytes) -> Lines:
    """The file `path`, which holds `content`, to be appended to."""
    return ObjectLines(path, content) if in_bucket(path) else FileLines(path)


def files(folder: epath.Path) -> Iterator[epath.Path]:
    """The files of a folder and of the folders in it."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files(path)
        else:
            yield path


def move_aside(folder: Place, kept: Place, stamp: str) -> None:
    """Rename a folder; one of the new name goes.

    In a bucket, where that is not one step, the file `stamp`, which says what the folder holds,
    goes first: a kill leaves a whole folder of the old name or one of the new.
    """
    if not in_bucket(folder):
        if kept.exists():
            shutil.rmtree(kept)
        folder.rename(kept)
        return
    source, target = epath.Path(folder), epath.Path(kept)
    if target.exists():
        target.rmtree()
    for path in files(source):
        path.copy(target / path.relative_to(source))
    (source / stamp).unlink()
    source.rmtree()


def cache_folder(workdir: Place) -> pathlib.Path:
    """Where to keep what takes long to make and is the same for all runs: near, for a bucket."""
    if isinstance(workdir, pathlib.Path):
        return workdir
    named = os.environ.get("SPIRE_JAX_CACHE")
    return pathlib.Path(named) if named else pathlib.Path.home() / ".cache" / "spire_jax"


def free_bytes(workdir: Place) -> float:
    """Bytes that may still be written; a bucket has no bounds."""
    return math.inf if in_bucket(workdir) else float(shutil.disk_usage(workdir).free)

"""Documents: a folder of text, cleaned, deduplicated, split, and tokenized once; or zarr arrays.

The corpus is identified by a hash of everything that its tokens depend on. The default source is
Python's own standard library: long documents that are on every machine, nothing downloaded. What
is tokenized already, in zarr arrays, is a corpus of the same interface (token_zarr.py).
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Integer

from spire_jax.config.schema import BYTES, DataConfig
from spire_jax.data.tokenizer import Tokenizer, make_tokenizer

STDLIB_WITHOUT = {"site-packages", "dist-packages", "test", "encodings", "__pycache__"}


class DataError(ValueError):
    """Text that cannot be used; the message names the file or folder and the remedy."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One file of text, or one row of a token array."""

    path: str  # relative to the root, with forward slashes; of a row, the array and the number
    heldout: bool
    begin: int  # its tokens in the corpus: [begin, end), the separator last where there is one
    end: int
    n_bytes: int = 0  # of its text; 0 = not known


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Documents in the order of their tokens, as columns: millions of them are no objects."""

    paths: Sequence[str]
    number: Int[np.ndarray, " documents"]  # of each: its place in `paths`
    heldout: Bool[np.ndarray, " documents"]
    begins: Int[np.ndarray, " documents"]
    ends: Int[np.ndarray, " documents"]
    n_bytes: Int[np.ndarray, " documents"]

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> Document:
        columns = (self.begins, self.ends, self.n_bytes)
        path, heldout = self.paths[int(self.number[index])], bool(self.heldout[index])
        return Document(path, heldout, *(int(column[index]) for column in columns))

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Documents) and list(self) == list(other)

    @property
    def lengths(self) -> Int[np.ndarray, " documents"]:
        """Tokens of each."""
        return self.ends - self.begins

    def where(self, chosen: Bool[np.ndarray, " documents"]) -> "Documents":
        """The chosen ones."""
        columns = (self.number, self.heldout, self.begins, self.ends, self.n_bytes)
        return Documents(self.paths, *(column[chosen] for column in columns))


@runtime_checkable
class TokenArray(Protocol):
    """Tokens one after another: an array in memory, or one that reads what it is asked for."""

    @property
    def dtype(self) -> Any:
        """uint16 where the vocabulary allows."""
        ...

    def __getitem__(self, piece: slice, /) -> Integer[np.ndarray, " n"]:
        """The tokens of a piece of one document."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """All documents in order, those of a folder sorted by path, and their tokens."""

    source: str
    documents: Documents
    tokens: TokenArray
    sha256: str
    tokenizer: Tokenizer
    duplicates: int = 0  # files left out because another one is the same
    not_text: int = 0  # files left out because they are binary or not UTF-8
    empty: int = 0  # files left out because there is nothing in them
    band: int = 0  # tokens that are stored, and best read, together; 0 = it does not matter
    about: Mapping[str, Any] | None = None  # what the summary says instead of counting files

    def tokens_of(self, document: Document) -> Int[np.ndarray, " n"]:
        """A document's tokens, ended by the separator where it has one."""
        return self.tokens[document.begin : document.end].astype(np.int32)

    def split(self, heldout: bool) -> Documents:
        """The training or the held-out documents."""
        return self.documents.where(self.documents.heldout == heldout)

    def summary(self) -> dict[str, Any]:
        """What a report says about the corpus."""
        of = {name: self.split(name == "heldout") for name in ("train", "heldout")}
        files = {
            **{f"{name}_bytes": int(ds.n_bytes.sum()) for name, ds in of.items()},
            "duplicates_dropped": self.duplicates,
            "not_text": self.not_text,
            "empty": self.empty,
        }
        return {
            "source": self.source,
            "sha256": self.sha256,
            "tokenizer": self.tokenizer.name,
            **{f"{name}_documents": len(documents) for name, documents in of.items()},
            **(files if self.about is None else self.about),
        }


def load_corpus(config: DataConfig, cache: pathlib.Path | None = None) -> Corpus:
    """Read, check, split and tokenize the documents of `data.source`; or open its token arrays.

    Args:
        cache: a folder where tokens that take long to make are kept for the next time, under the
            hash of all that they are made from.

    Raises:
        DataError: a folder that is missing or holds no text, a file that cannot be read or
            changes meanwhile, a split that is left empty, or arrays that cannot be used.
    """
    from spire_jax.data.token_zarr import holds_arrays, open_corpus  # it builds on this file

    if config.heldout_source or holds_arrays(config.source):
        return open_corpus(config)
    return read_folder(config, cache)


def text_folder(source: str) -> tuple[pathlib.Path, list[str]]:
    """The folder that `data.source` names, and the relative paths of its files, sorted.

    Raises:
        DataError: there is no such folder, or a part of it cannot be listed.
    """
    if source == "stdlib":
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        return root, list(_files(root, "*.py", STDLIB_WITHOUT))
    root = pathlib.Path(source).expanduser()
    if not root.is_dir():
        raise DataError(f"data.source={source!r} is not a folder; give a folder of text, or "
                        f"'stdlib'")  # fmt: skip
    return root, list(_files(root, "*", set()))


def read_folder(config: DataConfig, cache: pathlib.Path | None = None) -> Corpus:
    """A corpus of the files of `data.source`."""
    source, (root, relatives) = config.source, text_folder(config.source)
    tokenizer = make_tokenizer(config.tokenizer)
    documents: list[tuple[str, bool, int]] = []
    texts: list[bytes] = []
    seen = set()
    duplicates = not_text = empty = files = 0
    by_folder = config.split == "folder"
    made = f"{tokenizer.name}\0{config.heldout_percent}\0" + ("by folder\0" if by_folder else "")
    identity = hashlib.sha256(made.encode())
    for relative in relatives:
        files += 1
        content = read_whole(root / relative)
        if not content:
            empty += 1
            continue
        if not is_text(content):
            not_text += 1
            continue
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            duplicates += 1
            continue
        seen.add(digest)
        heldout = is_heldout(relative.split("/")[0] if by_folder else relative,
                             config.heldout_percent)  # fmt: skip
        documents.append((relative, heldout, len(content)))
        texts.append(content)
        identity.update(relative.encode() + b"\0" + digest)
    if not documents:
        kinds = f"{not_text} binary or not UTF-8, {empty} empty"
        found = f"{files} files but no text ({kinds})" if files else "no files"
        raise DataError(f"data.source={source!r} holds {found}; give a folder of text files")
    paths, sides, sizes = zip(*documents, strict=True)
    check_split(np.array(sides), config)
    sha256 = identity.hexdigest()
    tokens, ends = _tokens(tokenizer, texts, sha256, cache)
    begins = np.concatenate([[0], ends[:-1]])
    columns = Documents(paths, np.arange(len(paths)), np.array(sides), begins, ends,
                        np.array(sizes))  # fmt: skip
    return Corpus(source, columns, tokens, sha256, tokenizer, duplicates, not_text, empty)


def check_split(heldout: Bool[np.ndarray, " documents"], config: DataConfig) -> None:
    """DataError unless there are both training and held-out documents."""
    for side, name in ((False, "training"), (True, "held-out")):
        if not (heldout == side).any():
            raise DataError(
                f"data.source={config.source!r}: of {len(heldout)} documents none fell to the "
                f"{name} split; give more documents or change data.heldout_percent="
                f"{config.heldout_percent}"
            )


def _tokens(
    tokenizer: Tokenizer, texts: list[bytes], sha256: str, cache: pathlib.Path | None
) -> tuple[Integer[np.ndarray, " n"], Int[np.ndarray, " documents"]]:
    """The tokens of all documents, a separator after each, and where each one ends."""
    kept = cache / f"tokens-{sha256[:16]}.npz" if cache and tokenizer.name != BYTES else None
    if kept and kept.is_file():
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
            with kept.open("rb") as file, np.load(file) as stored:
                return stored["tokens"], stored["ends"]
    small = np.uint16 if tokenizer.n_tokens <= 2**16 else np.int32
    separator = np.array([tokenizer.separator], small)
    pieces = [p for ids in tokenizer.encode_all(texts) for p in (ids.astype(small), separator)]
    tokens = np.concatenate(pieces)
    ends = np.cumsum([len(p) + 1 for p in pieces[::2]])
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f".{os.getpid()}-{kept.name}")
        with temporary.open("wb") as written:
            np.savez(written, tokens=tokens, ends=ends)
        os.replace(temporary, kept)
    return tokens, ends


def _files(root: pathlib.Path, pattern: str, skip: set[str]) -> Iterator[str]:
    """Relative paths of regular files, sorted; hidden ones left out.

    Links to files are read, links to folders are not followed: they may lead in a circle.
    """
    paths = []
    for folder, names, files in os.walk(root, onerror=functools.partial(_unreadable, root)):
        names[:] = [n for n in names if n not in skip and not n.startswith(".")]
        here = pathlib.Path(folder)
        for name in files:
            path = here / name
            if name.startswith(".") or not path.match(pattern) or not os.path.isfile(path):
                continue
            relative = path.relative_to(root).as_posix()
            if not _encodes(relative):
                raise DataError(f"{relative!r} below {root}: the name is not UTF-8; rename it")
            paths.append(relative)
    return iter(sorted(paths))


def _unreadable(root: pathlib.Path, error: OSError) -> None:
    raise DataError(f"{error.filename or root} cannot be listed ({error.strerror}); check its "
                    f"permissions")  # fmt: skip


def read_whole(path: pathlib.Path) -> bytes:
    """A file's content; DataError if it cannot be read, or changes meanwhile."""
    try:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            content = file.read()
            after = os.fstat(file.fileno())
    except FileNotFoundError as error:
        raise DataError(
            f"{path} disappeared while the corpus was read; start again when the folder is at rest"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); check it or remove it"
        ) from error
    changed = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
    if changed or len(content) != after.st_size:
        raise DataError(
            f"{path} changed while the corpus was read; start again when the folder is at rest"
        )
    return content


def is_text(content: bytes) -> bool:
    """Whether it is UTF-8 and no binary file."""
    if b"\0" in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _encodes(name: str) -> bool:
    """False for the stand-ins (halves of surrogate pairs) of a name's bytes that are not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_heldout(name: str, percent: int) -> bool:
    """By the name (its path) alone, so that adding or changing other documents moves nothing."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100 < percent

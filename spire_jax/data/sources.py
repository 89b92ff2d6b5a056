"""Documents: a folder of text, cleaned, deduplicated, split, and tokenized once.

The corpus is identified by a hash of everything that its tokens depend on. The default source is
Python's own standard library: long documents that are on every machine, nothing downloaded.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import sysconfig
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from spire_jax.config import BYTES, DataConfig
from spire_jax.data.tokenizer import Tokenizer, make_tokenizer

STDLIB_WITHOUT = {"site-packages", "dist-packages", "test", "encodings", "__pycache__"}


class DataError(ValueError):
    """Text that cannot be used; the message names the file or folder and the remedy."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One file of text."""

    path: str  # relative to the root, with forward slashes
    heldout: bool
    n_bytes: int
    begin: int  # its tokens in the corpus: [begin, end), the separator last
    end: int


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """All documents, sorted by path, and their tokens in one array."""

    source: str
    documents: tuple[Document, ...]
    tokens: Integer[np.ndarray, " n"]  # uint16 where the vocabulary allows
    sha256: str
    tokenizer: Tokenizer
    duplicates: int  # files left out because another one is the same
    not_text: int  # files left out because they are binary or not UTF-8
    empty: int  # files left out because there is nothing in them

    def tokens_of(self, document: Document) -> Int[np.ndarray, " n"]:
        """A document's tokens, ended by the separator."""
        return self.tokens[document.begin : document.end].astype(np.int32)

    def split(self, heldout: bool) -> list[Document]:
        """The training or the held-out documents."""
        return [d for d in self.documents if d.heldout == heldout]

    def summary(self) -> dict[str, Any]:
        """What a report says about the corpus."""
        of = {name: self.split(name == "heldout") for name in ("train", "heldout")}
        return {
            "source": self.source,
            "sha256": self.sha256,
            "tokenizer": self.tokenizer.name,
            **{f"{name}_documents": len(documents) for name, documents in of.items()},
            **{f"{name}_bytes": sum(d.n_bytes for d in ds) for name, ds in of.items()},
            "duplicates_dropped": self.duplicates,
            "not_text": self.not_text,
            "empty": self.empty,
        }


def load_corpus(config: DataConfig, cache: pathlib.Path | None = None) -> Corpus:
    """Read, check, split and tokenize the documents of `data.source`.

    Args:
        cache: a folder where tokens that take long to make are kept for the next time, under the
            hash of all that they are made from.

    Raises:
        DataError: a folder that is missing or holds no text, a file that cannot be read or
            changes meanwhile, or a split that is left empty.
    """
    if config.source == "stdlib":
        root, pattern = pathlib.Path(sysconfig.get_paths()["stdlib"]), "*.py"
    else:
        root, pattern = pathlib.Path(config.source).expanduser(), "*"
        if not root.is_dir():
            raise DataError(f"data.source={config.source!r} is not a folder; give a folder of "
                            f"text, or 'stdlib'")  # fmt: skip
    return read_folder(root, pattern, config.source, config, cache)


def read_folder(
    root: pathlib.Path,
    pattern: str,
    source: str,
    config: DataConfig,
    cache: pathlib.Path | None = None,
) -> Corpus:
    """A corpus of the files below `root` that match `pattern`."""
    tokenizer = make_tokenizer(config.tokenizer)
    documents: list[Document] = []
    texts: list[bytes] = []
    seen = set()
    duplicates = not_text = empty = files = 0
    by_folder = config.split == "folder"
    made = f"{tokenizer.name}\0{config.heldout_percent}\0" + ("by folder\0" if by_folder else "")
    identity = hashlib.sha256(made.encode())
    skip = STDLIB_WITHOUT if source == "stdlib" else set()
    for relative in _files(root, pattern, skip):
        files += 1
        content = _read(root / relative)
        if not content:
            empty += 1
            continue
        if not _is_text(content):
            not_text += 1
            continue
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            duplicates += 1
            continue
        seen.add(digest)
        heldout = _is_heldout(relative.split("/")[0] if by_folder else relative,
                              config.heldout_percent)  # fmt: skip
        documents.append(Document(relative, heldout, len(content), 0, 0))
        texts.append(content)
        identity.update(relative.encode() + b"\0" + digest)
    if not documents:
        kinds = f"{not_text} binary or not UTF-8, {empty} empty"
        found = f"{files} files but no text ({kinds})" if files else "no files"
        raise DataError(f"data.source={source!r} holds {found}; give a folder of text files")
    for heldout, name in ((False, "training"), (True, "held-out")):
        if all(d.heldout != heldout for d in documents):
            raise DataError(
                f"data.source={source!r}: of {len(documents)} documents none fell to the {name} "
                f"split; give more documents or change data.heldout_percent="
                f"{config.heldout_percent}"
            )
    sha256 = identity.hexdigest()
    tokens, ends = _tokens(tokenizer, texts, sha256, cache)
    begins = [0, *ends[:-1].tolist()]
    documents = [
        dataclasses.replace(d, begin=begin, end=end)
        for d, begin, end in zip(documents, begins, ends.tolist(), strict=True)
    ]
    return Corpus(source, tuple(documents), tokens, sha256, tokenizer, duplicates, not_text,
                  empty)  # fmt: skip


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


def _read(path: pathlib.Path) -> bytes:
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


def _is_text(content: bytes) -> bool:
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


def _is_heldout(relative: str, percent: int) -> bool:
    """By the path alone, so that adding or changing other documents moves nothing."""
    return int.from_bytes(hashlib.sha256(relative.encode()).digest()[:8], "big") % 100 < percent

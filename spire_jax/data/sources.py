"""Documents: a folder of text, cleaned, deduplicated, split, and tokenized once; or zarr arrays.

The corpus is identified by a hash of everything that its tokens depend on. The default source is
Python's own standard library: long documents that are on every machine, nothing downloaded. What
is tokenized already, in zarr arrays, is a corpus of the same interface (token_zarr.py).
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import sysconfig
import zipfile
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, Integer

from spire_jax.config.schema import BYTES, DataConfig
from spire_jax.data.corpus import Corpus, DataError, Documents, check_split
from spire_jax.data.token_zarr import holds_arrays, open_corpus
from spire_jax.data.tokenizer import Tokenizer, make_tokenizer

STDLIB_WITHOUT = {"site-packages", "dist-packages", "test", "encodings", "__pycache__"}


def load_corpus(config: DataConfig, cache: pathlib.Path | None = None) -> Corpus:
    """Read, check, split and tokenize the documents of `data.source`; or open its token arrays.

    Args:
        cache: a folder where tokens that take long to make are kept for the next time, under the
            hash of all that they are made from.

    Raises:
        DataError: a folder that is missing or holds no text, a file that cannot be read or
            changes meanwhile, a split that is left empty, or arrays that cannot be used.
    """
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
    root = pathlib.Path(source)
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

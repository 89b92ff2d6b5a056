"""A corpus: documents as columns, and their tokens one after another, in memory or on demand."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Integer

from spire_jax.config.schema import DataConfig
from spire_jax.data.tokenizer import Tokenizer


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

    @property
    def begin(self) -> tuple[int, ...]:
        """What a model wants in front of every text: one token, or none; `tokens` are without."""
        return () if self.tokenizer.begin is None else (self.tokenizer.begin,)

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
            **({"begin_token": self.begin[0]} if self.begin else {}),
            **{f"{name}_documents": len(documents) for name, documents in of.items()},
            **(files if self.about is None else self.about),
        }


def check_split(heldout: Bool[np.ndarray, " documents"], config: DataConfig) -> None:
    """DataError unless there are both training and held-out documents."""
    for side, name in ((False, "training"), (True, "held-out")):
        if not (heldout == side).any():
            raise DataError(
                f"data.source={config.source!r}: of {len(heldout)} documents none fell to the "
                f"{name} split; give more documents or change data.heldout_percent="
                f"{config.heldout_percent}"
            )

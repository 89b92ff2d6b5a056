"""Tokenizers: text to ids and back. Bytes for now; others join `make_tokenizer`."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from spire_jax.config import ConfigError


@runtime_checkable
class Tokenizer(Protocol):
    """What the library asks of a tokenizer."""

    name: str
    n_tokens: int  # the separator included
    separator: int  # ends every document; the end of sequence in decoding

    def encode(self, text: bytes | str) -> Int[np.ndarray, " n"]:
        """Token ids (int32) of text, as it is or in UTF-8, without a separator."""
        ...

    def decode(self, ids: Int[np.ndarray, " n"]) -> str:
        """Text of token ids; bytes that are not UTF-8 and separators are shown as marks."""
        ...

    def count_bytes(self, ids: Int[np.ndarray, " n"]) -> int:
        """Bytes of text that the ids stand for; a separator stands for none."""
        ...


class ByteTokenizer:
    """Bytes 0 .. 255 and a document separator, 256."""

    name = "bytes"
    n_tokens = 257
    separator = 256

    def encode(self, text: bytes | str) -> Int[np.ndarray, " n"]:
        text = text.encode() if isinstance(text, str) else text
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, ids: Int[np.ndarray, " n"]) -> str:
        """Text; invalid UTF-8 becomes U+FFFD and a separator U+241E, the symbol for one."""
        text = b"".join(
            "␞".encode() if i == self.separator else bytes([i]) for i in np.asarray(ids).tolist()
        )
        return text.decode(errors="replace")

    def count_bytes(self, ids: Int[np.ndarray, " n"]) -> int:
        return int(np.sum(np.asarray(ids) != self.separator))


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names."""
    if name == "bytes":
        return ByteTokenizer()
    raise ConfigError(f"data.tokenizer={name!r} is unknown; use 'bytes'")

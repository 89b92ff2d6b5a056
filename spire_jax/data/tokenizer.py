"""Tokenizers: text to ids and back: bytes, byte-level BPE from a file of `tokenizers`, or that of a
pretrained checkpoint."""

import hashlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from spire_jax.config.checks import ConfigError
from spire_jax.config.schema import BYTES
from spire_jax.config.validation import is_checkpoint, tokenizer_size
from spire_jax.pretrained.tokenizer import load_tokenizer


@runtime_checkable
class Tokenizer(Protocol):
    """What the library asks of a tokenizer."""

    name: str
    n_tokens: int  # the separator included
    separator: int  # ends every document; the end of sequence in decoding
    begin: int | None  # what a model wants in front of every text that it reads; None = nothing

    def encode(self, text: bytes | str) -> Int[np.ndarray, " n"]:
        """Token ids (int32) of text, as it is or in UTF-8, without a separator."""
        ...

    def encode_all(self, texts: Sequence[bytes]) -> list[Int[np.ndarray, " n"]]:
        """`encode` of each text; may use all cores."""
        ...

    def decode(self, ids: Int[np.ndarray, " n"]) -> str:
        """Text of token ids; bytes that are not UTF-8 and separators are shown as marks."""
        ...

    def count_bytes(self, ids: Int[np.ndarray, " n"]) -> int:
        """Bytes of text that the ids stand for; a separator stands for none."""
        ...


def end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """All ids that end a text or a turn, the separator first: a chat model's are several."""
    return tuple(getattr(tokenizer, "eos", (tokenizer.separator,)))


class ByteTokenizer:
    """Bytes 0 .. 255 and a document separator, 256."""

    name = "bytes"
    n_tokens = 257
    separator = 256
    begin: int | None = None

    def encode(self, text: bytes | str) -> Int[np.ndarray, " n"]:
        text = text.encode() if isinstance(text, str) else text
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def encode_all(self, texts: Sequence[bytes]) -> list[Int[np.ndarray, " n"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Int[np.ndarray, " n"]) -> str:
        """Text; invalid UTF-8 becomes U+FFFD and a separator U+241E, the symbol for one."""
        text = b"".join(
            "␞".encode() if i == self.separator else bytes([i]) for i in np.asarray(ids).tolist()
        )
        return text.decode(errors="replace")

    def count_bytes(self, ids: Int[np.ndarray, " n"]) -> int:
        return int(np.sum(np.asarray(ids) != self.separator))


class BpeTokenizer:
    """Byte-level BPE (every text has an encoding that decodes to it), and a separator, the last id.

    The separator is no entry of the file, so that no text can spell it.
    """

    begin: int | None = None

    def __init__(self, path: pathlib.Path):
        """ConfigError for a model's own file, whose special tokens would be mistaken."""
        self.n_tokens = tokenizer_size(str(path))
        content = path.read_bytes()
        try:
            self._bpe = tokenizers.Tokenizer.from_buffer(content)
            entries = self._bpe.get_vocab()
        except Exception as error:  # it has no class of its own
            raise ConfigError(f"data.tokenizer={str(path)!r} cannot be read by `tokenizers` "
                              f"({error}); make it again") from None  # fmt: skip
        if self._bpe.encode("").ids or max(entries.values(), default=0) >= self.n_tokens - 1:
            raise ConfigError(
                f"data.tokenizer={str(path)!r} has special tokens of a model's own; name the "
                f"model's folder, or its GGUF file"
            )
        self.separator = self.n_tokens - 1
        # By content: the same file elsewhere is the same tokenizer.
        self.name = f"bpe-{self.n_tokens}-{hashlib.sha256(content).hexdigest()[:16]}"
        # In a byte-level vocabulary a character of an entry stands for a byte.
        self._bytes = np.zeros(self.n_tokens, np.int64)
        for entry, i in entries.items():
            self._bytes[i] = len(entry)

    def encode(self, text: bytes | str) -> Int[np.ndarray, " n"]:
        text = text.decode() if isinstance(text, bytes) else text
        return np.array(self._bpe.encode(text).ids, np.int32)

    def encode_all(self, texts: Sequence[bytes]) -> list[Int[np.ndarray, " n"]]:
        encodings = self._bpe.encode_batch_fast([text.decode() for text in texts])
        return [np.array(e.ids, np.int32) for e in encodings]

    def decode(self, ids: Int[np.ndarray, " n"]) -> str:
        """Text; invalid UTF-8 becomes U+FFFD and a separator U+241E, the symbol for one."""
        ids = np.asarray(ids)
        pieces = np.split(ids, np.flatnonzero(ids == self.separator))
        texts = [self._bpe.decode(p[p != self.separator].tolist()) for p in pieces]
        return "␞".join(texts)

    def count_bytes(self, ids: Int[np.ndarray, " n"]) -> int:
        return int(self._bytes[np.asarray(ids)].sum())


def train_bpe(texts: Iterable[str], n_tokens: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of `n_tokens` ids, the separator's included; words split as GPT-2 does."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names."""
    if name == BYTES:
        return ByteTokenizer()
    if is_checkpoint(name):
        return load_tokenizer(name, tokenizer_size(name))
    return BpeTokenizer(pathlib.Path(name))

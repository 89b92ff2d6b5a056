"""The tokenizer of a pretrained checkpoint, behind the library's `Tokenizer`, and its chats.

Text that a user wrote never becomes a special token: `encode` and the contents of `chat`'s
messages are ordinary text, whatever they spell. Only `encode_special` reads special tokens.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken

from spire_jax.pretrained import PretrainedError
from spire_jax.pretrained.chat import (
    render_messages,
    render_unfinished,
    text_messages,
    unused_marks,
)
from spire_jax.pretrained.token_bytes import token_bytes
from spire_jax.pretrained.tokenizer_sources import Description, describe, refusals

SEPARATOR_MARK = "␞"  # U+241E, as in `spire_jax.data.tokenizer`
# A model's rows beyond its tokens round the vocabulary up. Known models have a few per cent of
# them; a tokenizer that leaves more is another model's.
MIN_FILLED = 0.9


class PretrainedTokenizer:
    """Ids of a pretrained model. Satisfies `spire_jax.data.tokenizer.Tokenizer`.

    `name` is a hash of the content, `n_tokens` the rows of the model's embedding (ids that no
    token has stand for nothing), `separator` the tokenizer's end of text. Besides:
    `eos`: all ids that end a generation; `bos` and whether the model wants it in front of a text,
    `add_bos`, so that it is `begin`; `special`: text -> id of special tokens; `chat_template`, or
    None.
    """

    def __init__(self, source: Description, n_tokens: int):
        self._path, self.n_tokens = source.path, n_tokens
        self._with_special = source.backend
        with refusals(source.path):
            self._plain = tokenizers.Tokenizer.from_str(source.backend.to_str())
            self._plain.encode_special_tokens = True  # as text
        self.bos, self.add_bos, self.eos = source.bos, source.add_bos, source.eos
        self.begin = self.bos if self.add_bos else None
        self.chat_template, self._names = source.chat_template, dict(source.names)
        added = source.backend.get_added_tokens_decoder()
        self.special: dict[str, int] = {t.content: i for i, t in added.items() if t.special}
        self._of_mark: dict[str, tuple[tokenizers.Tokenizer, dict[int | None, int]]] = {}
        with refusals(source.path):
            self._check()
        self.separator = self.eos[0]
        facts = json.dumps([source.content, self.eos, self.bos, self.add_bos, n_tokens])
        self.name = f"pretrained-{n_tokens}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
        self._bytes, self._strip = token_bytes(source.backend, n_tokens, str(source.path))
        self._lengths = np.array([len(b) for b in self._bytes], np.int64)
        self._lengths[[*self.special.values(), *self.eos]] = 0
        self._spelled = re.compile(
            "|".join(re.escape(t) for t in sorted(self.special, key=len, reverse=True)) or r"(?!)"
        )

    def _check(self) -> None:
        size = self._with_special.get_vocab_size()
        last = max(self._with_special.get_vocab().values(), default=-1)
        if last >= self.n_tokens:
            raise PretrainedError(
                f"{self._path}: the tokenizer has ids up to {last}, the model {self.n_tokens} "
                "rows; use the tokenizer that came with the model"
            )
        if size < MIN_FILLED * self.n_tokens:
            raise PretrainedError(
                f"{self._path}: the tokenizer has {size} tokens for {self.n_tokens} rows of the "
                "model; use the tokenizer that came with the model"
            )
        if not self.eos:
            raise PretrainedError(
                f"{self._path}: no token is named that ends a text; put eos_token_id into "
                "generation_config.json (GGUF: tokenizer.ggml.eos_token_id)"
            )
        for i in (*self.eos, *([] if self.bos is None else [self.bos])):
            if i >= self.n_tokens or self._with_special.id_to_token(i) is None:
                raise PretrainedError(
                    f"{self._path}: the end or start of text is given as id {i}, which is no "
                    "token; correct eos_token_id or bos_token_id"
                )
        ids = set(self.special.values())
        for text in self.special:
            if ids.intersection(self._plain.encode(text, add_special_tokens=False).ids):
                raise PretrainedError(
                    f"{self._path}: plain text can spell the special token {text!r}, so users "
                    "could forge messages; correct tokenizer.json"
                )

    # --- text to ids -----------------------------------------------------------------------------

    def encode(self, text: bytes | str) -> Int[np.ndarray, " n"]:
        """Ids (int32) of plain text, nothing added; special tokens in it are text like any other.

        PretrainedError for bytes that are no UTF-8, or a string with halves of surrogate pairs.
        """
        return _ids(self._plain.encode(_checked(text), add_special_tokens=False))

    def encode_all(self, texts: Sequence[bytes]) -> list[Int[np.ndarray, " n"]]:
        """`encode` of each text, on all cores."""
        checked = [_checked(text) for text in texts]
        encodings = self._plain.encode_batch_fast(checked, add_special_tokens=False)
        return [_ids(e) for e in encodings]

    def encode_special(self, text: bytes | str) -> Int[np.ndarray, " n"]:
        """Ids of text in which special tokens are recognised, as of a chat; nothing is added."""
        return _ids(self._with_special.encode(_checked(text), add_special_tokens=False))

    def encode_prompt(self, text: bytes | str) -> Int[np.ndarray, " n"]:
        """`encode` of a text that the model shall continue: `begin` in front if it wants that."""
        front = [] if self.begin is None else [self.begin]
        return np.concatenate([np.array(front, np.int32), self.encode(text)])

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The conversation as text by the model's own template.

        `add_generation_prompt`: up to where the assistant writes, which is the end of the last
        message where that is its own. Errors as of `chat.text_messages` and `chat.render_messages`.
        """
        if self.chat_template is None:
            raise PretrainedError(
                f"{self._path} has no chat template: the model was not trained on messages; give "
                "the prompt as text"
            )
        messages, extra = text_messages(messages), self._names | extra
        if add_generation_prompt and messages and messages[-1].get("role") == "assistant":
            return render_unfinished(self.chat_template, messages, **extra)
        return render_messages(self.chat_template, messages,
                               add_generation_prompt=add_generation_prompt, **extra)  # fmt: skip

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> Int[np.ndarray, " n"]:
        """Ids of a conversation: the template's special tokens are special, the messages' are text.

        Nothing is added: a template writes the start of text itself where the model wants it.
        """
        broken, whole = unused_marks(2, self.chat_template, messages, extra)
        text = self.render_chat(
            [self._marked(m, broken) for m in text_messages(messages)],
            add_generation_prompt=add_generation_prompt,
            **self._marked(extra, broken),
        )
        if broken not in text:
            return self.encode_special(text)
        parts, at = [], 0
        for found in self._spelled.finditer(text):
            if text.startswith(broken, found.end()):
                continue  # of one character, which a mark can only follow
            parts += [text[at : found.start()], whole + found[0]]
            at = found.end()
        return self._encode_marked("".join([*parts, text[at:]]).replace(broken, ""), whole)

    def _encode_marked(self, text: str, mark: str) -> Int[np.ndarray, " n"]:
        """`encode_special` where special tokens are those with `mark` in front, and no others.

        In one piece: what a special token does to the text around it, it does here too.
        """
        if mark not in self._of_mark:
            backend = tokenizers.Tokenizer.from_str(self._plain.to_str())
            backend.encode_special_tokens = True
            backend.add_tokens([
                AddedToken(mark + token.content, lstrip=token.lstrip, rstrip=token.rstrip,
                           normalized=token.normalized)
                for token in backend.get_added_tokens_decoder().values() if token.special
            ])  # fmt: skip
            ids = {backend.token_to_id(mark + t): i for t, i in self.special.items()}
            self._of_mark[mark] = backend, ids
        backend, ids = self._of_mark[mark]
        encoding = backend.encode(_checked(text), add_special_tokens=False)
        return np.array([ids.get(i, i) for i in encoding.ids], np.int32)

    def _marked(self, value: Any, mark: str) -> Any:
        """`value` with `mark` inside all that spells a special token."""
        if isinstance(value, str):
            return self._spelled.sub(lambda m: m[0][0] + mark + m[0][1:], value)
        if isinstance(value, Mapping):
            return {self._marked(k, mark): self._marked(v, mark) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(v, mark) for v in value]
        return value

    # --- ids to text -----------------------------------------------------------------------------

    def decode(self, ids: Int[np.ndarray, " n"]) -> str:
        """Text; invalid UTF-8 becomes U+FFFD, the separator U+241E, special tokens their names."""
        parts = [
            SEPARATOR_MARK.encode() if i == self.separator else self._bytes[i]
            for i in self._checked_ids(ids)
        ]
        return self._stripped(b"".join(parts)).decode(errors="replace")

    def count_bytes(self, ids: Int[np.ndarray, " n"]) -> int:
        """Bytes of text that the ids stand for; special tokens stand for none."""
        return int(self._lengths[self._checked_ids(ids)].sum())

    def _stripped(self, text: bytes) -> bytes:
        return text[1:] if self._strip and text.startswith(b" ") else text

    def _checked_ids(self, ids: Int[np.ndarray, " n"] | Sequence[int]) -> list[int]:
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.n_tokens:
            bad = ids[(ids < 0) | (ids >= self.n_tokens)][0]
            raise PretrainedError(
                f"{self._path}: {bad} is no id; the model has rows 0 to {self.n_tokens - 1}"
            )
        return ids.tolist()


def _checked(text: bytes | str) -> str:
    """The text, if it is Unicode."""
    try:
        if isinstance(text, bytes):
            return text.decode()
        text.encode()
    except UnicodeError as error:
        raise PretrainedError(
            f"the text is no UTF-8: {error}; give it in UTF-8, or decode it with errors='replace'"
        ) from None
    return text


def _ids(encoding: tokenizers.Encoding) -> Int[np.ndarray, " n"]:
    return np.array(encoding.ids, np.int32)


def load_tokenizer(path: str | os.PathLike[str], n_tokens: int) -> PretrainedTokenizer:
    """The tokenizer of a checkpoint whose embedding has `n_tokens` rows.

    `path`: a GGUF file, a directory with tokenizer.json, or that file. PretrainedError if there
    is none, if it is of a kind that is not supported, or if it is another model's.
    """
    return PretrainedTokenizer(describe(path), n_tokens)

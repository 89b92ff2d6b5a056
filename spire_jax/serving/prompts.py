"""Token ids of what is asked: a text, ids, messages of a chat, or questions one after the other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from spire_jax.data.tokenizer import Tokenizer

PROMPTS = ("prompt", "tokens", "messages", "turns")  # one of them makes a request


class RequestError(ValueError):
    """A request that cannot be served; the message names what is wrong with it."""


def encode(kind: str, value: Any, tokenizer: Tokenizer) -> Int[np.ndarray, " n"]:
    """Ids of a JSON value of a kind of PROMPTS; of `turns`, the first. RequestError."""
    if kind == "tokens":
        good = isinstance(value, list) and all(type(t) is int for t in value)
        if not good or not all(0 <= t < tokenizer.n_tokens for t in value):
            raise RequestError(f"tokens must be a list of ids below {tokenizer.n_tokens}")
        tokens = np.array(value, np.int32)
    elif kind == "messages":
        tokens = _chat(value, tokenizer)
    elif kind == "turns":
        good = isinstance(value, list) and bool(value)
        if not good or not all(isinstance(turn, str) and turn for turn in value):
            raise RequestError("turns must be a list of texts, none empty")
        for turn in value[1:]:  # what is no text is refused before anything is answered
            _text(turn, tokenizer)
        tokens = encode_turns(value[:1], [], tokenizer)
    else:
        if not isinstance(value, str):
            raise RequestError(f"prompt={value!r} must be a string")
        tokens = _text(value, tokenizer)
    if not len(tokens):
        raise RequestError("the prompt is empty; give at least one token")
    return tokens


def encode_turns(
    turns: Sequence[str], answers: Sequence[tuple[Sequence[int], str]], tokenizer: Tokenizer
) -> Int[np.ndarray, " n"]:
    """Ids of a conversation up to where the answer to the last of `turns` begins.

    With a chat template turns are the user's messages. Without one the text goes on: an answer
    follows its turn on a line of its own, token by token as it was written.

    Args:
        answers: tokens and text of those to the turns before the last.
    """
    if has_chat(tokenizer):
        messages = [{"role": "user", "content": turns[0]}]
        for turn, (_, text) in zip(turns[1:], answers, strict=True):
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": turn}]
        return _chat(messages, tokenizer)
    pieces = [_text(f"{turns[0]}\n", tokenizer)]
    for turn, (tokens, _) in zip(turns[1:], answers, strict=True):
        pieces += [np.array(tokens, np.int32), tokenizer.encode(f"\n{turn}\n")]
    return np.concatenate(pieces)


def has_chat(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer writes conversations: a pretrained one may have no template."""
    return hasattr(tokenizer, "chat") and getattr(tokenizer, "chat_template", "") is not None


def _text(text: str, tokenizer: Tokenizer) -> Int[np.ndarray, " n"]:
    """Ids of a plain prompt, after the tokenizer's own first token where it wants one."""
    try:
        return getattr(tokenizer, "encode_prompt", tokenizer.encode)(text)
    except ValueError:
        raise RequestError("the prompt has half a surrogate pair, which no text has") from None


def _chat(messages: Any, tokenizer: Tokenizer) -> Int[np.ndarray, " n"]:
    """`tokenizer.chat(messages)`: ids of a conversation, for its answer to follow."""
    chat = getattr(tokenizer, "chat", None)
    if chat is None:
        raise RequestError(f"messages: the tokenizer {tokenizer.name} has no chat template; give "
                           f"prompt or tokens")  # fmt: skip
    good = isinstance(messages, list) and messages
    if not good or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise RequestError('messages must be a list of {"role": ..., "content": ...}')
    try:
        return chat(messages)
    except ValueError as error:  # PretrainedError: the template refuses them
        raise RequestError(f"messages: {error}") from None

"""What people ask for: prompts from JSON lines, text or a stream, each checked by itself.

A JSON line has one of `prompt` (text), `tokens` (ids) and `messages` (for a tokenizer with a chat
template), and may have `id`, `max_tokens`, `seed` and `stop`; null is as good as absent. What is
wrong with one line is its own failure; the others are served.
"""

import dataclasses
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from spire_jax.data.tokenizer import Tokenizer

FORMATS = ("jsonl", "text", "lines")
FIELDS = ("prompt", "tokens", "messages", "id", "max_tokens", "seed", "stop")
Id = str | int


class RequestError(ValueError):
    """A request that cannot be served; the message names what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a request does not say itself."""

    max_tokens: int = 128
    seed: int = 0  # each request's own is derived from it and the request's index
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to be continued."""

    id: Id
    tokens: Int[np.ndarray, " n"]
    max_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    line: int = 0  # of the prompt file, from 1; 0 = there is none


@dataclasses.dataclass(frozen=True)
class Failure:
    """A request that was not served, and why."""

    id: Id
    error: str
    line: int = 0

    def record(self) -> dict[str, Any]:
        """The output line."""
        return {"id": self.id, "line": self.line, "error": self.error}


def read_requests(
    lines: Iterable[bytes], form: str, tokenizer: Tokenizer, defaults: Defaults
) -> Iterator[Request | Failure]:
    """The requests of a prompt file (`open(path, "rb")`), in order.

    Args:
        form: "jsonl"; "lines", a prompt a line; or "text", all of it one prompt. Blank lines are
            none in the first two.
    """
    seen: dict[Id, int] = {}
    numbered = enumerate(lines, 1)
    if form == "text":
        whole = b"".join(lines)
        numbered = enumerate([whole] if whole.strip() else [], 1)
    index = 0
    for number, line in numbered:
        if not line.strip():
            continue
        request = _read(line, number, index, form, tokenizer, defaults)
        if request.id in seen:
            error = f"the id {request.id!r} is that of line {seen[request.id]} too; rename one"
            request = Failure(request.id, error, number)
        seen.setdefault(request.id, number)
        index += 1
        yield request


def request_of(
    values: dict[str, Any], index: int, tokenizer: Tokenizer, defaults: Defaults, line: int = 0
) -> Request:
    """A request from the fields of a JSON line; its id is `index` unless given. RequestError."""
    if unknown := sorted(set(values) - set(FIELDS)):
        raise RequestError(f"unknown field {unknown[0]!r}; there are {', '.join(FIELDS)}")
    values = {name: value for name, value in values.items() if value is not None}
    given = [name for name in FIELDS[:3] if name in values]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise RequestError(f"give one of prompt, tokens and messages; found {found}")
    max_tokens = _integer(values, "max_tokens", defaults.max_tokens, 1, 2**31)
    seed = _integer(values, "seed", derived_seed(defaults.seed, index), -(2**63), 2**63)
    stop = values.get("stop", defaults.stop)
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
        raise RequestError(f"stop={stop!r} must be a string or a list of strings, none empty")
    tokens = _tokens(given[0], values[given[0]], tokenizer)
    return Request(values.get("id", index), tokens, max_tokens, seed, tuple(stop), line)


def derived_seed(seed: int, index: int) -> int:
    """A request's own seed, from that of the run and its place in the prompt file."""
    return zlib.crc32(f"{seed}/request/{index}".encode())


def _read(line, number, index, form, tokenizer, defaults) -> Request | Failure:
    name: Id = index
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # a file may begin with a BOM
        values = json.loads(text) if form == "jsonl" else {"prompt": text}
        if form == "lines":
            values = {"prompt": text.rstrip("\r\n")}
        if not isinstance(values, dict):
            raise RequestError('not a JSON object: write {"prompt": ...}')
        name = _id(values, index)
        return request_of(values, index, tokenizer, defaults, number)
    except UnicodeDecodeError as error:
        at = f"byte {error.start} is {error.object[error.start]:#04x}"
        return Failure(name, f"line {number} is not UTF-8: {at}; convert it", number)
    except json.JSONDecodeError as error:
        return Failure(name, f"line {number} is not JSON: {error.msg} at column {error.colno}; "
                             f"for plain text use --format=text or lines", number)  # fmt: skip
    except RecursionError:
        return Failure(name, f"line {number}: it is nested too deeply", number)
    except ValueError as error:  # RequestError; a whole number of too many digits
        return Failure(name, f"line {number}: {error}", number)


def _id(values: dict[str, Any], index: int) -> Id:
    found = index if values.get("id") is None else values["id"]
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise RequestError(f"id={found!r} must be a string or a whole number")
    return found


def _integer(values: dict[str, Any], name: str, default: int, least: int, end: int) -> int:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < end:
        raise RequestError(f"{name}={value!r} must be a whole number from {least} to {end - 1}")
    return value


def _tokens(kind: str, value: Any, tokenizer: Tokenizer) -> Int[np.ndarray, " n"]:
    if kind == "tokens":
        good = isinstance(value, list) and all(type(t) is int for t in value)
        if not good or not all(0 <= t < tokenizer.n_tokens for t in value):
            raise RequestError(f"tokens must be a list of ids below {tokenizer.n_tokens}")
        tokens = np.array(value, np.int32)
    elif kind == "messages":
        tokens = _chat(value, tokenizer)
    else:
        if not isinstance(value, str):
            raise RequestError(f"prompt={value!r} must be a string")
        tokens = encode_prompt(value, tokenizer)
    if not len(tokens):
        raise RequestError("the prompt is empty; give at least one token")
    return tokens


def encode_prompt(text: str, tokenizer: Tokenizer) -> Int[np.ndarray, " n"]:
    """Ids of a plain prompt, after the tokenizer's own first token where it wants one."""
    try:
        return getattr(tokenizer, "encode_prompt", tokenizer.encode)(text)
    except ValueError:
        raise RequestError("the prompt has half a surrogate pair, which no text has") from None


def _chat(messages: Any, tokenizer: Tokenizer) -> Int[np.ndarray, " n"]:
    """`tokenizer.chat(messages)`: ids of a conversation up to where the answer begins."""
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

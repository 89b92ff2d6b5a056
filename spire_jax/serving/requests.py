"""What people ask for: prompts from JSON lines, text or a stream, each checked by itself.

A JSON line has one of `prompt` (text), `tokens` (ids), `messages` (for a tokenizer with a chat
template) and `turns` (questions, each asked on top of the answer before: the form of MT-Bench and
Spec-Bench). It may have `id` (or `question_id`), `category`, `max_tokens`, `seed` and `stop`; null
is as good as absent, and a `reference` answer is left alone. What is wrong with one line is its own
failure; the others are served.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from spire_jax.config.files import in_words
from spire_jax.config.identity import digest
from spire_jax.config.values import parse_json
from spire_jax.data.tokenizer import Tokenizer
from spire_jax.serving.prompts import PROMPTS, RequestError, encode, encode_turns
from spire_jax.serving.records import Failure, Id, Request, Result, refused

FORMATS = ("jsonl", "text", "lines")
FIELDS = (*PROMPTS, "id", "question_id", "category", "max_tokens", "seed", "stop", "reference")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a request does not say itself."""

    max_tokens: int = 128
    seed: int = 0  # each request's own is derived from it and the request's id
    stop: tuple[str, ...] = ()


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
    given = [name for name in PROMPTS if name in values]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise RequestError(f"give one of {', '.join(PROMPTS)}; found {found}")
    name = _id(values, index)
    max_tokens = _integer(values, "max_tokens", defaults.max_tokens, 1, 2**31)
    seed = _integer(values, "seed", derived_seed(defaults.seed, f"request/{name}"), -(2**63), 2**63)
    stop = values.get("stop", defaults.stop)
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
        raise RequestError(f"stop={stop!r} must be a string or a list of strings, none empty")
    category = values.get("category", "")
    if not isinstance(category, str):
        raise RequestError(f"category={category!r} must be a string")
    tokens = encode(given[0], values[given[0]], tokenizer)
    turns = tuple(values.get("turns", ()))
    # Not its tokens: a chat template may write the date.
    asked = digest([given[0], values[given[0]], max_tokens, seed, stop])
    return Request(name, tokens, max_tokens, seed, tuple(stop), line, category, turns, (), asked)


def next_turn(result: Result, tokenizer: Tokenizer) -> Request | Failure | None:
    """What is to be asked once a turn is answered; None after the last."""
    request = result.request
    answers = (*request.answers, result)
    if len(answers) >= len(request.turns):
        return None
    try:
        tokens = encode_turns(request.turns[: len(answers) + 1],
                              [(a.tokens, a.text) for a in answers], tokenizer)  # fmt: skip
    except RequestError as error:
        return refused(dataclasses.replace(request, answers=answers), str(error))
    seed = derived_seed(request.seed, f"turn/{len(answers)}")
    return dataclasses.replace(request, tokens=tokens, seed=seed, answers=answers)


def prompt_length(request: Request, tokenizer: Tokenizer) -> int:
    """Tokens of a prompt; of several turns, of all of them, with answers of none."""
    if len(request.turns) < 2:
        return len(request.tokens)
    try:
        return len(encode_turns(request.turns, [((), "")] * (len(request.turns) - 1), tokenizer))
    except RequestError:  # a template that wants more of an answer
        return len(request.tokens)


def derived_seed(seed: int, name: str) -> int:
    """A seed for one of many, from that of all and what the one is called; of 63 bits."""
    word = hashlib.blake2b(f"{seed}/{name}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(word) >> 1


def _read(line, number, index, form, tokenizer, defaults) -> Request | Failure:
    name: Id = index
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # a file may begin with a BOM
        values = parse_json(text) if form == "jsonl" else {"prompt": text}
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
    except ValueError as error:  # RequestError; JSON that is nested too deeply, and the like
        return Failure(name, f"line {number}: {in_words(error)}", number)


def _id(values: dict[str, Any], index: int) -> Id:
    found = [values[name] for name in ("id", "question_id") if values.get(name) is not None]
    for value in found:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise RequestError(f"id={value!r} must be a string or a whole number")
    return found[0] if found else index


def _integer(values: dict[str, Any], name: str, default: int, least: int, end: int) -> int:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < end:
        raise RequestError(f"{name}={value!r} must be a whole number from {least} to {end - 1}")
    return value

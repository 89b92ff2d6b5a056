"""What comes back for a request, as a record and as lines of a file."""

import contextlib
import dataclasses
import io
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from spire_jax.serving.requests import Failure, Id, Request, RequestError

EOS, STOP, LENGTH = "eos", "stop", "length"  # why a request ended
BEGIN = b'{"id": '  # of every line


@dataclasses.dataclass(frozen=True)
class Result:
    """A request that was served."""

    request: Request
    tokens: list[int]  # emitted, without an end of sequence and what a stop string cut off
    text: str
    generation_lengths: list[int]  # round by round: accepted + 1, even where the end cut it
    depths: list[int]  # drafted tokens, round by round
    finish_reason: str
    queued: float  # seconds from when it was read to when it got a slot
    prefill: float  # ... to its first round
    decode: float  # ... to its end
    first_token: float = 0.0  # seconds from when it was read to its first token

    def record(self) -> dict[str, Any]:
        """The output line."""
        return {
            "id": self.request.id,
            "line": self.request.line,
            "prompt_tokens": len(self.request.tokens),
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "generation_lengths": self.generation_lengths,
            "acceptance": acceptance(self.generation_lengths, self.depths),
            "timing": {
                "queued": round(self.queued, 6),
                "prefill": round(self.prefill, 6),
                "decode": round(self.decode, 6),
                "first_token": round(self.first_token, 6),
                "tokens_per_s": round(len(self.tokens) / max(self.decode, 1e-9), 3),
            },
        }


def acceptance(generation_lengths: list[int], depths: list[int]) -> dict[str, Any]:
    """Accepted and drafted tokens, and the share accepted at each depth of those that got there."""
    accepted, drafted = np.array(generation_lengths) - 1, np.array(depths)
    shares = []
    for depth in range(1, max(depths, default=0) + 1):
        tried = int(np.sum((drafted >= depth) & (accepted >= depth - 1)))
        passed = int(np.sum(accepted >= depth))
        shares.append(round(passed / tried, 6) if tried else None)
    return {"accepted": int(accepted.sum()), "drafted": int(drafted.sum()), "by_depth": shares}


class Results:
    """Where output lines go, each written and flushed as its request ends."""

    def __init__(self, file: TextIO | io.TextIOBase, done: frozenset[Id] = frozenset()):
        self.done = done  # ids that a run before this one has served
        self._file = file

    def write(self, result: Result | Failure) -> None:
        """Append one line."""
        self._file.write(json.dumps(result.record(), ensure_ascii=False) + "\n")
        self._file.flush()


@contextlib.contextmanager
def open_results(path: str, resume: bool) -> Iterator[Results]:
    """A file to append to, or "-" for stdout.

    Raises:
        RequestError: the file exists, is not empty, and this is no resumption; or it is one, and
            the file holds something else than results. A last line that was cut off is removed.
    """
    if path == "-":
        if isinstance(sys.stdout, io.TextIOWrapper):  # an id may be half a surrogate pair
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
        yield Results(sys.stdout)
        return
    file = pathlib.Path(path)
    # An empty one is what a start that failed has left.
    if not resume and file.exists() and not (file.is_file() and not file.stat().st_size):
        raise RequestError(f"--out={path} exists; name another file, or go on with --resume")
    done = _written(file) if file.exists() else frozenset()
    with file.open("a", encoding="utf-8", errors="backslashreplace") as opened:
        yield Results(opened, done)


def _written(file: pathlib.Path) -> frozenset[Id]:
    """Ids that the whole lines of a file have served; what failed is to be tried again."""
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines, torn = whole.splitlines(), content[len(whole) :]
    ids: set[Id] = set()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if "error" not in record:
                ids.add(record["id"])
        except (ValueError, KeyError, TypeError):
            raise _not_ours(file, number) from None
    # A few bytes may begin a line of ours only where others of ours stand before them.
    if torn and not torn.startswith(BEGIN) and not (lines and BEGIN.startswith(torn)):
        raise _not_ours(file, len(lines) + 1)
    if torn:
        with file.open("r+b") as opened:
            opened.truncate(len(whole))
    return frozenset(ids)


def _not_ours(file: pathlib.Path, number: int) -> RequestError:
    return RequestError(f"--out={file}: line {number} is no result; --resume goes on with a file "
                        f"that this command wrote")  # fmt: skip

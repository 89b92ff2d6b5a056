"""Where results go: lines of a file, which another run can go on with."""

import contextlib
import io
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from spire_jax.config.identity import differences
from spire_jax.config.values import parse_json
from spire_jax.serving.prompts import RequestError
from spire_jax.serving.records import Failure, Id, Request, Result

BEGIN = b'{"id": '  # of every line


class Results:
    """Where output lines go, each written and flushed as its request ends.

    Args:
        written: what a run before this one has served: by id, what was asked for.
        earlier: what its lines were made by.
        stamped: whether lines say what was asked for and what made them, for a run after this one.
    """

    def __init__(
        self,
        file: TextIO | io.TextIOBase,
        written: Mapping[Id, str] = {},
        earlier: Sequence[Mapping[str, Any]] = (),
        stamped: bool = False,
    ):
        self.written = written
        self._file, self._earlier, self._stamped = file, earlier, stamped
        self._made_by: Mapping[str, Any] = {}

    def made_by(self, values: Mapping[str, Any]) -> None:
        """Say what is going to decode; RequestError where what is written was made otherwise."""
        self._made_by = values
        for before in self._earlier:
            if before != values:
                raise RequestError(
                    f"--resume: what --out holds was made with {differences(before, values)}; go "
                    f"on with the same, or name another file"
                )

    def left(self, items: Iterable[Request | Failure]) -> Iterator[Request | Failure]:
        """Those that are not written yet; RequestError for one that is, and asks something else."""
        for item in items:
            # What failed may have the id of what was served (and be told that it has).
            if isinstance(item, Failure) or item.id not in self.written:
                yield item
            elif self.written[item.id] != item.asked:
                raise RequestError(
                    f"--resume: line {item.line} has the id {item.id!r}, whose output in --out is "
                    f"of another prompt, max_tokens, seed or stop; name another file, or give each "
                    f"prompt an id of its own (without one it is the line's place)"
                )

    def write(self, result: Result | Failure) -> None:
        """Append one line."""
        record = result.record()
        if isinstance(result, Result) and self._stamped:
            record |= {"asked": result.request.asked, "made_by": self._made_by}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
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
    written, made_by = _written(file) if file.exists() else ({}, [])
    with file.open("a", encoding="utf-8", errors="backslashreplace") as opened:
        yield Results(opened, written, made_by, stamped=True)


def _written(file: pathlib.Path) -> tuple[dict[Id, str], list[dict[str, Any]]]:
    """What the whole lines of a file have served, and what they were made by.

    What failed is to be tried again.
    """
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines, torn = whole.splitlines(), content[len(whole) :]
    served: dict[Id, str] = {}
    made_by: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            if not isinstance(record, dict):
                raise ValueError
            if "error" in record:
                continue
            name, asked, values = record["id"], record["asked"], record["made_by"]
            if type(name) not in (str, int) or type(asked) is not str or type(values) is not dict:
                raise ValueError
            served[name] = asked
            if values not in made_by:
                made_by.append(values)
        except (ValueError, KeyError):
            raise _not_ours(file, number) from None
    # A few bytes may begin a line of ours only where others of ours stand before them.
    if torn and not torn.startswith(BEGIN) and not (lines and BEGIN.startswith(torn)):
        raise _not_ours(file, len(lines) + 1)
    if torn:
        with file.open("r+b") as opened:
            opened.truncate(len(whole))
    return served, made_by


def _not_ours(file: pathlib.Path, number: int) -> RequestError:
    return RequestError(f"--out={file}: line {number} is no result; --resume goes on with a file "
                        f"that this command wrote")  # fmt: skip

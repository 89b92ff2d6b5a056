"""Training metrics as JSON lines that survive kills, and the progress bar."""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class MetricsError(ValueError):
    """A metrics file that cannot be continued; names the file, the line and the remedy."""


class MetricsLog:
    """A JSON-lines file, one record a step, steps increasing, that a resumed run continues.

    A record of step s describes the model after s updates, so the first has step 1. Opening
    removes the records beyond `resume_step`, the step of the checkpoint that training goes on
    from, and a last line that a kill has torn: what follows makes a file without holes, repeats
    or torn lines. Context manager; one process writes.
    """

    def __init__(
        self, path: str | os.PathLike[str], resume_step: int, expected_last: int | None = None
    ):
        """Open, truncate and position the file; its folder is made if need be.

        MetricsError if a complete line is no record, if steps do not increase, or if the last
        step up to `resume_step` is not `expected_last` (where given; 0 means no record at all).
        """
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_bytes() if self.path.exists() else b""
        kept = [r for r in _parse(before, self.path) if r["step"] <= resume_step]
        last = kept[-1]["step"] if kept else 0
        if expected_last is not None and last != expected_last:
            raise MetricsError(
                f"{self.path}: the last record up to step {resume_step} is of step {last}, not "
                f"{expected_last}: lines are missing; put the file back as it was when the "
                f"checkpoint of step {resume_step} was written, or start in another --workdir"
            )
        after = b"".join(_line(record) for record in kept)
        if before != after:
            write_whole(self.path, after)
        self._step = max(last, resume_step)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, with an int "step" above the one before, in one system call.

        Values are JSON-able, numpy or jax scalars and arrays; what is not finite is written as
        null, since JSON has no word for it. MetricsError for a wrong step, OSError naming the
        file if it cannot be written.
        """
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step <= self._step:
            raise MetricsError(f"{self.path}: step {step!r} does not come after {self._step}")
        line = _line(record)
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise self._cannot_write(error.errno, error.strerror) from error
        if written != len(line):
            raise self._cannot_write(None, f"{written} of {len(line)} bytes were written")
        self._step = step

    def sync(self) -> None:
        """Return when everything written is on the disk; call before committing a checkpoint."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._cannot_write(error.errno, error.strerror) from error

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _cannot_write(self, errno: int | None, what: str | None) -> OSError:
        return OSError(
            errno,
            f"cannot write metrics ({what}); free some space and start again to resume",
            str(self.path),
        )


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics file, without a last line that is torn.

    MetricsError for any other line that is no record, OSError if there is no such file.
    """
    return _parse(pathlib.Path(path).read_bytes(), pathlib.Path(path))


def _parse(content: bytes, path: pathlib.Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break  # torn: a record and its newline go out together
            raise MetricsError(f"{path}, line {number} is not a record: {error}") from error
        if records and step <= records[-1]["step"]:
            raise MetricsError(
                f"{path}, line {number}: step {step} comes after {records[-1]['step']}; two runs "
                f"have written to one file; start in another --workdir"
            )
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(_jsonable(record), allow_nan=False) + "\n").encode()


def _jsonable(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy and jax, scalars and arrays
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_whole(path: pathlib.Path, content: bytes | str) -> None:
    """Write a file at once: a kill leaves the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Progress:
    """A progress bar on a terminal; elsewhere a plain line every few seconds, fit for a log.

    Shows the description, the bar, step and total, loss, tokens/s and the time left.
    """

    def __init__(
        self,
        description: str,
        total: int,
        start: int = 0,
        *,
        show: bool = True,
        seconds_per_line: float = 5.0,
        console: Console | None = None,
    ):
        """`start` steps are done already; `show=False` for all processes but one."""
        self._console = console or Console(file=sys.stderr)
        # Not rich's own judgement, which the environment can turn: a log must stay readable.
        self._bar = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._show, self._seconds_per_line = show, seconds_per_line
        self._line_time, self._line_step = -math.inf, float(start)
        self._rich = RichProgress(
            TextColumn("{task.description}", justify="left"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            disable=not (show and self._bar),
            speed_estimate_period=120,
        )
        self._task = self._rich.add_task(description, total=total, completed=start, numbers="")

    def update(
        self, step: int, *, loss: float | None = None, tokens_per_s: float | None = None
    ) -> None:
        """Step `step` is done; values of None are not shown."""
        numbers = [] if loss is None else [f"loss {loss:.4f}"]
        numbers += [] if tokens_per_s is None else [f"{tokens_per_s:,.0f} tokens/s"]
        self._rich.update(self._task, completed=step, numbers="  ".join(numbers))
        self._maybe_print()

    def advance(self, steps: int = 1, *, description: str | None = None) -> None:
        """`steps` more are done, perhaps of something with another name."""
        self._rich.update(self._task, advance=steps, description=description)
        self._maybe_print()

    def __enter__(self) -> "Progress":
        self._rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._rich.stop()
        if self._rich.tasks[0].completed != self._line_step:
            self._print()

    def _maybe_print(self) -> None:
        if time.monotonic() - self._line_time >= self._seconds_per_line:
            self._print()

    def _print(self) -> None:
        if not self._show or self._bar:
            return
        task = self._rich.tasks[0]
        self._line_time, self._line_step = time.monotonic(), task.completed
        parts = [f"{task.description}: {task.completed:.0f}/{task.total:.0f}"]
        parts += [task.fields["numbers"]] if task.fields["numbers"] else []
        if not task.finished and task.time_remaining is not None:
            minutes, seconds = divmod(round(task.time_remaining), 60)
            parts.append(f"{minutes}:{seconds:02d} left")
        print("  ".join(parts), file=self._console.file, flush=True)

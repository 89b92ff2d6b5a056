"""Training metrics as JSON lines that survive kills, TensorBoard's copy, and the progress bar."""

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from spire_jax.config.values import parse_json
from spire_jax.storage import paths
from spire_jax.storage.paths import Near, Place, locate
from spire_jax.storage.processes import is_first


class MetricsError(ValueError):
    """A metrics file that cannot be continued; names the file, the line and the remedy."""


class MetricsLog:
    """A JSON-lines file, one record a step, steps increasing, that a resumed run continues.

    A record of step s describes the model after s updates, so the first has step 1. Opening
    removes the records beyond `resume_step`, the step of the checkpoint that training goes on
    from, and a last line that a kill has torn: what follows makes a file without holes, repeats
    or torn lines. In a bucket lines appear when `sync` is called. Context manager; of several
    processes the first writes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        resume_step: int,
        expected_last: int | None = None,
        events: str | os.PathLike[str] | None = None,
    ):
        """Open, truncate and position the file; its folder is made if need be.

        `events` is a folder of TensorBoard's for the same records (`EventsLog`), or None.
        MetricsError if a complete line is no record, if steps do not increase, or if the last
        step up to `resume_step` is not `expected_last` (where given; 0 means no record at all).
        """
        self.path = locate(path)
        self._open = contextlib.ExitStack()  # nothing in it but in the first process
        self._file: io.FileIO | None = None
        self._events: EventsLog | None = None
        if not is_first():
            return
        before = self.path.read_bytes() if self.path.exists() else b""
        kept = [r for r in _parse(before, self.path) if r["step"] <= resume_step]
        last = kept[-1]["step"] if kept else 0
        if expected_last is not None and last != expected_last:
            raise MetricsError(
                f"{self.path}: the last record up to step {resume_step} is of step {last}, not "
                f"{expected_last}: lines are missing; put the file back as it was when the "
                f"checkpoint of step {resume_step} was written, or start in another --workdir"
            )
        self._near = self._open.enter_context(Near(self.path.parent))
        near = self._near.path / self.path.name
        paths.write_whole(near, b"".join(map(_line, kept)))
        self._file = self._open.enter_context(io.FileIO(near, "a"))
        if events is not None:
            self._events = self._open.enter_context(contextlib.closing(EventsLog(events, kept)))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, with an int "step" above the one before, in one system call.

        Values are JSON-able, numpy or jax scalars and arrays; what is not finite is written as
        null, since JSON has no word for it. OSError naming the file if it cannot be written.
        """
        if self._file is None:
            return
        record = _jsonable(record)
        line = _line(record)
        with _named("metrics", self.path):
            if (written := self._file.write(line)) != len(line):
                raise OSError(None, f"{written} of {len(line)} bytes were written")
        if self._events is not None:
            self._events.write(record)

    def sync(self) -> None:
        """Return when everything written is kept; call before committing a checkpoint."""
        if self._file is None:
            return
        with _named("metrics", self.path):
            os.fsync(self._file)
            self._near.push()
            if self._events is not None:
                self._events.sync()

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        self._open.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EventsLog:
    """The numbers of a metrics file for TensorBoard, in a folder of their own.

    The metrics file is the truth: opening writes its records anew, so that no curve has a step
    twice or one that a kill took. Lists become curves `name/1`, `name/2`, ...; what was not finite
    is left out. The times of records that were written anew are those of the opening.
    """

    def __init__(self, folder: str | os.PathLike[str], records: list[dict[str, Any]]):
        self._folder = locate(folder)
        self._near = Near(self._folder)
        for old in self._folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = EventsWriter(str(self._near.path / "events"))
        self.write(*records)

    def write(self, *records: Mapping[str, Any]) -> None:
        """Append records and hand them to the system; OSError naming the folder if that fails."""
        for record in records:
            event = Event(step=record["step"], wall_time=time.time())
            for name, value in record.items():
                several = isinstance(value, list)
                for depth, number in enumerate(value if several else [value], start=1):
                    if name != "step" and isinstance(number, int | float):
                        tag = f"{name}/{depth}" if several else name
                        event.summary.value.add(tag=tag, simple_value=number)
            self._writer.write_event(event)
        with _named("events", self._folder):
            self._writer.flush()

    def sync(self) -> None:
        """Copy the file to where it belongs, if it is elsewhere."""
        self._near.push()

    def close(self) -> None:
        """Close the file; everything is in it already."""
        with contextlib.suppress(OSError), self._near:
            self._writer.close()


@contextlib.contextmanager
def _named(kind: str, path: Place) -> Iterator[None]:
    """An OSError that names the file, and the remedy, for one that names none."""
    try:
        yield
    except OSError as error:
        message = f"cannot write {kind} ({error.strerror or error!r}); free some space and start "
        raise OSError(error.errno, message + "again to resume", str(path)) from error


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics file, without a last line that is torn.

    MetricsError for any other line that is no record, OSError if there is no such file.
    """
    return _parse(locate(path).read_bytes(), locate(path))


def _parse(content: bytes, path: Place) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            if type(step := record["step"]) is not int:
                raise ValueError(f"step={step!r:.80} is no whole number")
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
    return (json.dumps(record, allow_nan=False) + "\n").encode()


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


def write_whole(path: Place, content: bytes | str) -> None:
    """Write a file at once, the first process does: a kill leaves the old content or the new."""
    if is_first():
        paths.write_whole(path, content)


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
        show: bool | None = None,
        seconds_per_line: float = 5.0,
        console: Console | None = None,
    ):
        """`start` steps are done already; `show`: by default the first process does."""
        show = is_first() if show is None else show
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

    def __exit__(self, *_: object) -> None:
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

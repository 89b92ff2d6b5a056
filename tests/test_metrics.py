"""Metrics files without holes, repeats or torn lines; progress that a log can hold."""

import io
import json
import os
import pathlib
import pty
import resource
import select
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from spire_jax.storage.metrics import MetricsError, MetricsLog, Progress, read_metrics


def write(path, steps, resume_step=0):
    with MetricsLog(path, resume_step=resume_step) as log:
        for step in steps:
            log.write({"step": step, "loss": 1 / step})


def steps_of(path):
    return [record["step"] for record in read_metrics(path)]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "metrics" / "target.jsonl"
    with MetricsLog(path, resume_step=0) as log:
        log.write({"step": 1, "loss": np.float32(0.5), "alpha": jnp.array([0.25, 0.5]), "a": None})
        log.write({"step": 3, "loss": float("nan"), "nested": {"x": [np.inf, 1]}})
        log.sync()
    assert read_metrics(path) == [
        {"step": 1, "loss": 0.5, "alpha": [0.25, 0.5], "a": None},
        {"step": 3, "loss": None, "nested": {"x": [None, 1]}},
    ]


@pytest.mark.parametrize("resume_step", [0, 5, 10, 15, 99])
def test_a_resumed_file_is_what_it_would_have_been(tmp_path, resume_step):
    write(tmp_path / "whole", range(1, 21))
    write(tmp_path / "resumed", range(1, 16))
    resume_step = min(resume_step, 15)
    write(tmp_path / "resumed", range(resume_step + 1, 21), resume_step)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["resumed", "whole"]


def test_a_line_torn_anywhere_is_removed(tmp_path):
    write(tmp_path / "whole", range(1, 4))
    whole = (tmp_path / "whole").read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for length in range(second, len(whole)):
        torn = tmp_path / "torn"
        torn.write_bytes(whole[:length])
        complete = [1, 2, 3] if length == len(whole) - 1 else [1, 2]  # all but its newline
        assert steps_of(torn) == complete
        write(torn, [s for s in (1, 2, 3) if s not in complete], resume_step=complete[-1])
        assert torn.read_bytes() == whole


def test_missing_lines_are_an_error(tmp_path):
    write(tmp_path / "m", (10, 20))
    with MetricsLog(tmp_path / "m", resume_step=25, expected_last=20):
        pass
    with pytest.raises(MetricsError, match=r"m: the last record up to step 35 is of step 20, not"):
        MetricsLog(tmp_path / "m", resume_step=35, expected_last=30)
    with pytest.raises(MetricsError, match="is of step 0, not 10"):
        MetricsLog(tmp_path / "gone", resume_step=10, expected_last=10)
    assert steps_of(tmp_path / "m") == [10, 20]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"step": 1}\n{"st\n{"step": 3}\n', "line 2 is not a record"),
        (b'{"step": 1}\n{"loss": 3}\n', "line 2 is not a record"),
        (b'{"step": 1}\n[]\n', "line 2 is not a record"),
        (b'{"step": 1}\n{"step": "2"}\n', "line 2 is not a record: step='2' is no whole"),
        (b'{"step": 1}\n{"step": 2}\n{"step": 2}\n', "line 3: step 2 comes after 2"),
    ],
)
def test_a_damaged_file_is_named_and_left_alone(tmp_path, lines, message):
    (tmp_path / "m").write_bytes(lines)
    with pytest.raises(MetricsError, match=message):
        MetricsLog(tmp_path / "m", resume_step=1)
    with pytest.raises(MetricsError, match=message):
        read_metrics(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == lines


def test_a_full_disk_names_the_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(tmp_path / "m", resume_step=0) as log:
        log.write({"step": 1})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
            with pytest.raises(OSError, match="free some space") as short:  # some bytes fit
                log.write({"step": 2})
            with pytest.raises(OSError, match="free some space") as none:
                log.write({"step": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert short.value.filename == none.value.filename == str(tmp_path / "m")
    assert steps_of(tmp_path / "m") == [1]


def test_killed_while_writing(tmp_path):
    code = """
        import sys
        from spire_jax.storage.metrics import MetricsLog
        with MetricsLog(sys.argv[1], resume_step=0) as log:
            for step in range(1, 10**9):
                log.write({"step": step, "loss": [0.1] * 100})
                if step == 50:
                    print(flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "m")],
        cwd=pathlib.Path(__file__).parent.parent, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    process.stdout.read(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    last = steps_of(tmp_path / "m")[-1]
    write(tmp_path / "m", range(41, 61), resume_step=40)
    assert last >= 50
    assert steps_of(tmp_path / "m") == list(range(1, 61))


# --- progress ------------------------------------------------------------------------------------


def test_a_log_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    with Progress("target", 300, 100, console=Console(file=file), seconds_per_line=0.0) as progress:
        for step in range(101, 301):
            progress.update(step, loss=2.0, tokens_per_s=5012.3)
    lines = file.getvalue().splitlines()
    assert lines[0] == "target: 101/300  loss 2.0000  5,012 tokens/s"
    assert len(lines) == 200
    assert lines[-1] == "target: 300/300  loss 2.0000  5,012 tokens/s"
    assert lines[100].endswith(" left")
    assert "\x1b" not in file.getvalue()


def test_lines_come_seldom(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    file = io.StringIO()
    with Progress("target", 103, console=Console(file=file), seconds_per_line=5.0) as progress:
        for step in range(1, 104):
            now[0] += 0.25
            progress.update(step, loss=None)
        now[0] += 0.25
    assert [line.split()[1] for line in file.getvalue().splitlines()] == [
        "1/103", "21/103", "41/103", "61/103", "81/103", "101/103", "103/103",
    ]  # fmt: skip


def test_only_one_process_shows_and_descriptions_change():
    for show in (True, False):
        file = io.StringIO()
        console = Console(file=file)
        with Progress("a", 2, console=console, show=show, seconds_per_line=0.0) as progress:
            progress.advance(description="b")
            progress.advance()
        assert file.getvalue().startswith("b: 1/2" if show else "")
        assert bool(file.getvalue()) == show


def test_a_terminal_gets_a_bar():
    """In a pseudo-terminal the line is redrawn in place, with loss, speed and time left."""
    code = """
        from spire_jax.storage.metrics import Progress
        with Progress("target", 10) as progress:
            for step in range(1, 10):
                progress.update(step, loss=1.5, tokens_per_s=99.0)
    """
    main, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=pathlib.Path(__file__).parent.parent, stderr=other,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(other)
    shown = b""
    while select.select([main], [], [], 30)[0]:
        try:
            shown += os.read(main, 4096)
        except OSError:  # how Linux reports that the other side is closed
            break
    os.close(main)
    assert process.wait() == 0
    text = shown.decode()
    assert "\x1b[" in text
    for part in ("target", "9/10", "loss 1.5000", "99 tokens/s", "left"):
        assert part in text


def test_records_are_one_line_each(tmp_path):
    with MetricsLog(tmp_path / "m", resume_step=0) as log:
        log.write({"step": 1, "note": "two\nlines\u2028three"})
    assert len((tmp_path / "m").read_bytes().splitlines()) == 1
    assert json.loads((tmp_path / "m").read_text())["note"] == "two\nlines\u2028three"


# --- TensorBoard's copy --------------------------------------------------------------------------


def curves(folder):
    """Of event files: curve -> [(step, value)], by the format's definition."""
    found = {}
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):  # the length, its checksum, an event, its checksum
            size = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            at += 16 + size
    return found


def log_events(folder, steps, resume_step=0):
    with MetricsLog(folder / "m", resume_step, events=folder / "events") as log:
        for step in steps:
            nan = float("nan") if step == 2 else 0.5
            log.write({"step": step, "loss": 1 / step, "alpha": nan, "by_depth": [0.5, step],
                       "peak_share": None, "note": "text"})  # fmt: skip


def test_events_are_the_metrics_without_holes_or_repeats(tmp_path):
    log_events(tmp_path, range(1, 16))
    whole = {
        "loss": [(s, pytest.approx(1 / s)) for s in range(1, 21)],
        "alpha": [(s, 0.5) for s in range(1, 21) if s != 2],
        "by_depth/1": [(s, 0.5) for s in range(1, 21)],
        "by_depth/2": [(s, s) for s in range(1, 21)],
    }
    before = {tag: points[: 15 - (tag == "alpha")] for tag, points in whole.items()}
    assert curves(tmp_path / "events") == before
    (kept,) = (tmp_path / "events").iterdir()
    kept.with_name("events.out.tfevents.1.before").write_bytes(kept.read_bytes()[:-7])  # torn
    kept.unlink()
    log_events(tmp_path, range(11, 21), resume_step=10)  # from a checkpoint before
    assert curves(tmp_path / "events") == whole
    assert len(list((tmp_path / "events").iterdir())) == 1


def test_events_are_there_when_they_are_written(tmp_path):
    with MetricsLog(tmp_path / "m", 0, events=tmp_path / "events") as log:
        log.write({"step": 1, "loss": 0.5})
        assert curves(tmp_path / "events") == {"loss": [(1, 0.5)]}


def test_a_full_disk_names_the_events(tmp_path):
    """The metrics fit, their copy does not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(tmp_path / "m", 0, events=tmp_path / "events") as log:
        (file,) = (tmp_path / "events").iterdir()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 1, before[1]))
            with pytest.raises(OSError, match=r"cannot write events .*free some space") as error:
                log.write({"step": 1, "a": 1})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(tmp_path / "events")

"""What cannot be written, or not there: an error that says why, and nothing else is touched."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import time

import pytest
from buckets import bucket
from corpora import names, write
from token_arrays import ROOT, command, contents, flags, killed_after, opened, texts, write_lines

from spire_jax.data import write_zarr
from spire_jax.data.corpus import DataError
from spire_jax.data.tokenizer import train_bpe
from spire_jax.data.write_zarr import main
from spire_jax.data.zarr_store import open_store


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "text", texts(30))


BAD_LINES = {
    '{"text": 5}': "no JSON object with a string 'text'",
    '{"other": "x"}': "no JSON object with a string 'text'",
    '["text"]': "no JSON object with a string 'text'",
    "[" * 10**5: "it is nested too deeply",
    '{"text": "x"': "Expecting ',' delimiter",
    '{"text": "\\ud800"}': "surrogates not allowed",
    b'{"text": "\xff"}': "can't decode byte 0xff",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: str(line)[:20])
def test_a_bad_line_is_named_by_its_number(tmp_path, capsys, line):
    line = line.encode() if isinstance(line, str) else line
    good = [json.dumps({"text": f"line {i}"}).encode() for i in range(100)]
    path = tmp_path / "pages.jsonl"
    path.write_bytes(b"\n".join([*good[:70], b"", line, *good[70:]]))
    assert main(flags(path, tmp_path / "out")) == 2
    key = line.decode() if line.isascii() else line
    assert f"{path}, line 72: " in (said := capsys.readouterr().err) and BAD_LINES[key] in said
    assert "mend or remove it" in said


def test_flags_and_sources_that_cannot_be(folder, tmp_path, capsys):
    path, _ = write_lines(tmp_path)
    out = tmp_path / "out"
    (tmp_path / "nothing").mkdir()
    for given, message in [
        (flags(folder, out, **{"row-tokens": 1}), "--row-tokens=1: a row needs two tokens or more"),
        (
            flags(folder, out, **{"min-tokens": 65}),
            "--min-tokens=65 must lie between 2 and --row-t",
        ),
        (
            flags(folder, out, **{"heldout-percent": 100}),
            "--heldout-percent=100 must lie between 0",
        ),
        (flags(folder, out, workers=0), "--workers=0: give 1 or more"),
        (flags(folder, out, tokenizer="gpt2"), "data.tokenizer='gpt2' does not exist"),
        (flags(tmp_path / "gone", out), "gone' is not a folder; give a folder of text"),
        (flags(tmp_path / "nothing", out), "nothing holds no files of text"),
        (flags(folder, out, field="text"), "text holds no *.jsonl files"),
        (flags(folder / "binary", out), "is one file of text; give a folder, or lines of JSON"),
        (flags(path, out, split="folder"), "--split=folder: lines of JSONL have no folders"),
        (flags(folder, "ftp://host/x"), "use a folder or a gs:// or s3:// URL"),
        (flags(folder, folder / "binary" / "x"), "cannot be made (Not a directory); name another"),
    ]:
        assert main(given) == 2
        assert message in (said := capsys.readouterr().err) and said.startswith("error: "), said
        assert not out.exists()


def test_no_document_for_a_side(tmp_path, capsys):
    folder = write(tmp_path / "text", {names(False, 1)[0]: "training"})
    assert main(flags(folder, tmp_path / "out")) == 2
    assert "no document fell to heldout.zarr; give more text, another" in capsys.readouterr().err
    with pytest.raises(DataError, match="is not finished"):
        opened(tmp_path / "out")


def test_nothing_is_overwritten(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(flags(folder, out)) == 0
    before = contents(out)
    assert main(flags(folder, out, **{"row-tokens": 32})) == 2
    assert "holds something else (" in capsys.readouterr().err
    with pytest.raises(DataError, match="with the tokenizer bytes, but"):
        bpe = tmp_path / "bpe.json"
        train_bpe(["def f(x): return x\n"] * 50, 270).save(str(bpe))
        opened(out, tokenizer=str(bpe))
    assert main(flags(folder, folder)) == 2
    assert "text/ holds something else (" in capsys.readouterr().err
    assert contents(out) == before


def test_an_unfinished_array_goes_on_with_the_same_flags_and_text_alone(
    folder, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    with killed_after(monkeypatch, 30):
        main(flags(folder, out))
    assert main(flags(folder, out, **{"row-tokens": 32})) == 2
    assert "was begun with row_tokens=64 (now 32); give the same again" in capsys.readouterr().err
    first = next(p for p in folder.rglob("*.txt"))
    os.utime(first, (0, 0))
    assert main(flags(folder, out)) == 2
    assert "was begun with text='" in capsys.readouterr().err


def test_one_writer_at_a_time(folder, tmp_path, capsys):
    with write_zarr.only_one(open_store(str(tmp_path / "out"))):
        assert main(flags(folder, tmp_path / "out")) == 2
    assert "is being written by another process; wait for it" in capsys.readouterr().err
    assert main(flags(folder, tmp_path / "out")) == 0


def test_a_disk_without_room(folder, tmp_path, capsys, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(signal, "SIGXFSZ", signal.SIGXFSZ)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
        assert main(flags(folder, tmp_path / "out")) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    said = capsys.readouterr().err
    assert "check that it can be written and that there is room; the same command goes on" in said
    assert main(flags(folder, tmp_path / "out")) == 0


# --- a bucket ------------------------------------------------------------------------------------


def in_process(served, *arguments):
    return subprocess.run(command(*arguments), env=served.environment, cwd=ROOT,
                          capture_output=True, text=True, timeout=100)  # fmt: skip


def test_a_bucket_gets_what_a_folder_gets(folder, tmp_path):
    given = {"row-tokens": 48, "shard-rows": 16}
    with bucket() as served:
        done = in_process(served, *flags(folder, "gs://bucket/a/b", **given))
        assert done.returncode == 0, done.stderr
        in_bucket = {k.removeprefix("a/b/"): v for k, v in served.objects.items()}
        again = in_process(served, *flags(folder, "gs://bucket/a", **given))
        assert again.returncode == 2 and "gs://bucket/a/ holds something else" in again.stderr
        served.refused.add("POST")
        begin = time.monotonic()
        refused = in_process(served, *flags(folder, "gs://bucket/c", **given))
        assert time.monotonic() - begin < 30 and refused.returncode == 2
        assert (
            "error: gs://bucket/c/.progress/plan.json: PERMISSION_DENIED: no perm" in refused.stderr
        )
        assert not [name for name in served.objects if name.startswith("c/")]
    assert main(flags(folder, tmp_path / "out", **given)) == 0
    assert in_bucket == contents(tmp_path / "out")


def test_in_a_bucket_the_last_writer_goes_on(folder, tmp_path, monkeypatch):
    """A folder stands for the bucket here: without its lock, by the owner's key alone."""
    monkeypatch.setattr(write_zarr, "only_one", contextlib.nullcontext)
    assert main(flags(folder, tmp_path / "whole")) == 0
    real, started = write_zarr.Writer.add, []

    def interrupted(writer, number, block):
        if not started:
            started.append(number)
            assert main(flags(folder, tmp_path / "out")) == 0  # another one, from begin to end
        real(writer, number, block)

    monkeypatch.setattr(write_zarr.Writer, "add", interrupted)
    assert main(flags(folder, tmp_path / "out")) == 2
    assert contents(tmp_path / "out").keys() >= contents(tmp_path / "whole").keys()
    kept = {k: v for k, v in contents(tmp_path / "out").items() if not k.startswith(".progress")}
    assert kept == contents(tmp_path / "whole")

"""Text into token arrays: what is written, and that text and flags alone decide it."""

import json
import os
import pathlib
import signal
import subprocess
import time

import numpy as np
import pytest
from corpora import SEPARATOR, corpus_of, names, words, write
from token_arrays import (
    ROOT,
    command,
    contents,
    flags,
    killed_after,
    opened,
    texts,
    write_lines,
)

from spire_jax.data import write_zarr
from spire_jax.data.corpus import DataError
from spire_jax.data.tokenizing import Plan, find_text
from spire_jax.data.write_zarr import main


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "text", texts(30))


def documents_of(corpus, heldout):
    """Rows put together again: a document ends with a separator."""
    rows = [corpus.tokens_of(d).tolist() for d in corpus.split(heldout)]
    tokens = [t for row in rows for t in row]
    ends = [i + 1 for i, t in enumerate(tokens) if t == SEPARATOR]
    return [tokens[a:b] for a, b in zip([0, *ends], ends, strict=False)]


# --- what is written -----------------------------------------------------------------------------


def test_a_folder_has_the_documents_and_sides_that_its_text_has(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(flags(folder, out)) == 0
    text, rows = corpus_of(folder, percent=30), opened(out)
    for side in (False, True):
        tokens = [text.tokens_of(d) for d in text.split(side)]
        # A row of one token is left out: a separator that a document's last row has no room for.
        expected = np.concatenate([t if len(t) % 64 != 1 else t[:-1] for t in tokens])
        written = np.concatenate([rows.tokens_of(d) for d in rows.split(side)])
        assert len(tokens) > 5 and np.array_equal(written, expected)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["left_out"] == {"duplicates": 1, "not_text": 1, "empty": 1, "short": 0}
    for name, side in (("train", False), ("heldout", True)):
        about = manifest["arrays"][f"{name}.zarr"]
        documents = text.split(side)
        assert about["documents"] == len(documents) and about["rows"] == len(rows.split(side))
        assert about["bytes"] == documents.n_bytes.sum()
        assert about["tokens"] == rows.split(side).lengths.sum()
        assert len(about["sha256"]) == -(-about["rows"] // 4)
    assert f"{out}/train.zarr: {len(text.split(False))} documents, " in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {
        "train.zarr", "train.lengths.zarr", "heldout.zarr", "heldout.lengths.zarr", "manifest.json"
    }  # fmt: skip


def test_long_documents_go_on_in_the_next_row_and_short_ones_are_left_out(tmp_path):
    first, second, third, fourth = names(False, 4)
    folder = write(tmp_path / "text", {first: "abcdefghijk", second: "lmn", third: "opqrstu",
                                       fourth: "vwxyz", names(True, 1)[0]: "held out"})  # fmt: skip
    given = {"row-tokens": 4, "min-tokens": 3, "heldout-percent": 50}
    assert main(flags(folder, tmp_path / "out", **given)) == 0
    corpus, end = opened(tmp_path / "out"), [SEPARATOR]
    rows = [corpus.tokens_of(d).tolist() for d in corpus.split(False)]
    a, l, o, v = (list(t.encode()) for t in ("abcdefghijk", "lmn", "opqrstu", "vwxyz"))  # noqa: E741
    by_name = {first: [a[:4], a[4:8], a[8:] + end], second: [l + end], third: [o[:4], o[4:] + end],
               fourth: [v[:4]]}  # fmt: skip
    assert rows == [row for name in sorted(by_name) for row in by_name[name]]
    given["min-tokens"] = 4
    assert main(flags(folder, tmp_path / "longer", **given)) == 0
    assert all(len(opened(tmp_path / "longer").tokens_of(d)) == 4
               for d in opened(tmp_path / "longer").documents)  # fmt: skip


def test_lines_are_documents_once_wherever_blocks_begin(tmp_path):
    path, texts = write_lines(tmp_path)
    made = {}
    for size in (50, 300, 1000, 10**6):
        out = tmp_path / str(size)
        given = {"row-tokens": 128, "shard-rows": 64, "block-bytes": size}
        assert main(flags(path, out, field="body", **given)) == 0
        made[size] = {k: v for k, v in contents(out).items() if k != "manifest.json"}
    assert all(files == made[50] for files in made.values())
    corpus = opened(out)
    sides = [{bytes(t[:-1]).decode() for t in documents_of(corpus, side)} for side in (False, True)]
    assert sides[0] | sides[1] == set(texts) and not sides[0] & sides[1]
    assert 0.2 < len(sides[1]) / 300 < 0.4
    # Other lines before them move no line to the other side.
    path.write_text('{"body": "new"}\n' + path.read_text())
    assert main(flags(path, tmp_path / "more", field="body", **given)) == 0
    more = {bytes(t[:-1]).decode() for t in documents_of(opened(tmp_path / "more"), True)}
    assert more - {"new"} == sides[1]


def test_ids_that_are_what_missing_chunks_read_as(tmp_path):
    """A chunk of zeros is stored like any other: it is no missing one."""
    path = tmp_path / "pages.jsonl"
    path.write_text(json.dumps({"text": "\0" * 9}) + "\n" + json.dumps({"text": "x"}))
    given = {"row-tokens": 3, "heldout-percent": 0}
    assert main(flags(path, tmp_path / "out", **given)) == 0
    corpus = opened(tmp_path / "out", heldout_percent=50)
    rows = [corpus.tokens_of(d).tolist() for d in corpus.documents]
    assert rows == [[0] * 3, [0] * 3, [0] * 3, [ord("x"), SEPARATOR]]


def test_files_of_lines_in_a_folder(tmp_path):
    path, texts = write_lines(tmp_path)
    folder = tmp_path / "folder"
    every = path.read_text().splitlines(keepends=True)
    write(folder, {"b/2.jsonl": "".join(every[:400]), "a.jsonl": "".join(every[400:]),
                   "notes.txt": "no JSON"})  # fmt: skip
    given = {"row-tokens": 128, "shard-rows": 64}
    assert main(flags(folder, tmp_path / "out", field="body", **given)) == 0
    corpus = opened(tmp_path / "out")
    found = [bytes(t[:-1]).decode() for s in (False, True) for t in documents_of(corpus, s)]
    assert sorted(found) == sorted(texts)


def test_duplicates_can_be_kept(folder, tmp_path):
    assert main([*flags(folder, tmp_path / "out"), "--keep-duplicates"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["left_out"]["duplicates"] == 0
    assert sum(about["documents"] for about in manifest["arrays"].values()) == 41


def test_without_a_held_out_array_rows_are_drawn(folder, tmp_path):
    assert main(flags(folder, tmp_path / "out", **{"heldout-percent": 0})) == 0
    assert not (tmp_path / "out" / "heldout.zarr").exists()
    corpus = opened(tmp_path / "out")
    assert 0 < len(corpus.split(True)) < len(corpus.split(False))


def test_a_dry_run_says_what_will_be_written(folder, tmp_path, capsys):
    out = tmp_path / "out"
    (folder / "zz").unlink()  # no duplicates: the number is exact
    given = flags(folder, out, **{"block-bytes": 10**6})
    assert main([*given, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not out.exists()
    assert main(given) == 0
    rows = len(opened(out).documents)
    tokens = sum(p.stat().st_size + 1 for p in folder.rglob("*.txt"))
    assert f"of text: {tokens:,} tokens, {rows:,} rows of 64, 30% of the documents held" in said
    assert f"at most {rows * 64 * 2 / 1e6:,.1f} MB before compression" in said


# --- the same bytes, whatever happens ------------------------------------------------------------


def test_the_number_of_workers_changes_nothing(folder, tmp_path):
    for workers in (1, 2):
        assert main(flags(folder, tmp_path / str(workers), workers=workers)) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_killed_after_any_write_and_begun_again(tmp_path, monkeypatch):
    folder = write(tmp_path / "text", texts(12))
    with killed_after(monkeypatch, 0) as count:
        assert main(flags(folder, tmp_path / "whole")) == 0
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"
    assert count[0] > 40
    for writes in range(1, count[0], 3):
        with killed_after(monkeypatch, writes):
            main(flags(folder, out := tmp_path / str(writes)))
        if not (out / "manifest.json").exists():
            with pytest.raises(DataError, match="is not finished"):
                opened(out)
        assert main(flags(folder, out)) == 0
        assert contents(out) == whole, writes
    for writes in (15, 25):  # again and again
        out, runs = tmp_path / f"every {writes}", 0
        while not (out / "manifest.json").exists():
            with killed_after(monkeypatch, writes):
                main(flags(folder, out))
            runs += 1
            assert runs < 20, "no run gets further"
        assert main(flags(folder, out)) == 0 and contents(out) == whole


def test_what_is_finished_is_kept(folder, tmp_path, monkeypatch):
    """After a kill no block is read again that the state knows."""
    read = []
    real = write_zarr.tokenized

    def noted(plan, source, blocks, workers):
        read.append(len(blocks))
        return real(plan, source, blocks, workers)

    monkeypatch.setattr(write_zarr, "tokenized", noted)
    with killed_after(monkeypatch, 45):
        main(flags(folder, tmp_path / "out"))
    assert main(flags(folder, tmp_path / "out")) == 0
    assert read[0] == len(find_text(Plan(str(folder), block_bytes=500)).blocks) > read[1] > 0
    assert main(flags(folder, tmp_path / "out")) == 0 and len(read) == 2  # all is there


def children_of(parent):
    """Ids of the processes that a process has started."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.slow
def test_killed_with_its_workers_at_work(tmp_path):
    """A kill -9 leaves no process behind, and the same command ends with the same bytes."""
    folder = write(tmp_path / "text", {f"{i}.txt": words(i, 40_000) for i in range(60)})
    given = flags(
        folder,
        tmp_path / "out",
        workers=2,
        **{"row-tokens": 512, "shard-rows": 1024, "block-bytes": 50_000},
    )
    process = subprocess.Popen(command(*given), cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "out" / ".progress" / "owner").exists() or len(
            children_of(process.pid)) < 3:  # fmt: skip
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    workers = children_of(process.pid)
    time.sleep(0.5)
    process.kill()
    process.wait()
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end, "workers live on"
        time.sleep(0.05)
    for out in ("out", "whole"):
        done = subprocess.run(command(*(a.replace("/out", f"/{out}") for a in given)), cwd=ROOT,
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_worker_that_is_killed_is_no_hang(tmp_path):
    folder = write(tmp_path / "text", {f"{i}.txt": words(i, 40_000) for i in range(60)})
    process = subprocess.Popen(command(*flags(folder, tmp_path / "out", workers=2)), cwd=ROOT,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    end = time.monotonic() + 60
    while len(workers := children_of(process.pid)) < 3:  # two, and multiprocessing's own
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.kill(workers[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "error: a worker was killed, perhaps for its memory" in error

"""Text in, rows out: what is read, how it is split and cut, and that a count alone resumes it."""

import gc
import hashlib
import os
import pathlib
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time

import numpy as np
import pytest

from spire_jax.config import ConfigError, DataConfig
from spire_jax.data import sources
from spire_jax.data.pipeline import (
    BATCHES_AHEAD,
    Dataset,
    cut_contexts,
    held_out_batches,
    train_batches,
)
from spire_jax.data.sources import DataError, load_corpus
from spire_jax.data.tokenizer import make_tokenizer
from spire_jax.validation import tokenizer_size

SEPARATOR = 256


def names(heldout, count, percent=50):
    """Paths that fall to one split, by the definition."""
    every = (f"{i // 10}/{i}.txt" for i in range(10_000))
    hashed = ((n, hashlib.sha256(n.encode()).digest()[:8]) for n in every)
    chosen = [n for n, h in hashed if (int.from_bytes(h, "big") % 100 < percent) == heldout]
    return chosen[:count]


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def corpus_of(root, files=None, percent=50):
    return load_corpus(DataConfig(source=str(write(root, files or {})), heldout_percent=percent))


def words(seed, length):
    """Random letters."""
    return bytes(np.random.default_rng(seed).integers(97, 123, length, np.uint8))


@pytest.fixture
def corpus(tmp_path):
    """Twelve training and five held-out documents of 1 to 100 bytes."""
    train = {n: words(i, 1 + 9 * i) for i, n in enumerate(names(False, 12))}
    heldout = {n: words(100 + i, 60 + 10 * i) for i, n in enumerate(names(True, 5))}
    return corpus_of(tmp_path, train | heldout)


def arrays(batch):
    return batch.tokens_BxT, batch.targets_BxT, batch.mask_BxT, batch.example_B


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def examples(batches):
    return [int(i) for batch in batches for i in batch.example_B]


# --- tokenizer ---------------------------------------------------------------------------------


def test_bytes_go_there_and_back():
    tokenizer = make_tokenizer("bytes")
    text = "def naïve():\n\treturn '→ 🐍'\0"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
    assert np.array_equal(tokenizer.encode(text.encode()), ids)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.n_tokens, tokenizer.separator) == (257, SEPARATOR)
    assert tokenizer.n_tokens == tokenizer_size("bytes")
    assert tokenizer.encode(b"").shape == (0,) and tokenizer.decode(tokenizer.encode(b"")) == ""


def test_what_is_no_text_is_shown_and_not_counted():
    tokenizer = make_tokenizer("bytes")
    ids = np.array([*b"a\xe2\x82", SEPARATOR, *b"\xffb"], np.int32)  # a euro sign, cut short
    assert tokenizer.decode(ids) == "a\ufffd\u241e\ufffdb"
    assert tokenizer.count_bytes(ids) == 5


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(ConfigError, match=r"data\.tokenizer='gpt2' does not exist; use 'bytes'"):
        make_tokenizer("gpt2")


# --- sources -----------------------------------------------------------------------------------


def test_a_folder_of_text(tmp_path):
    train, heldout = names(False, 3), names(True, 1)
    folder = write(tmp_path / "text", {
        train[0]: "first", train[1]: "second é", heldout[0]: "third",
        "zz/copy of the first": "first", "binary": b"text\0text", "latin": b"caf\xe9",
        "nothing": "", ".hidden": "hidden", ".git/config": "hidden too",
    })  # fmt: skip
    write(tmp_path, {"elsewhere": "linked"})
    (folder / train[2]).parent.mkdir(exist_ok=True)
    (folder / train[2]).symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (folder / "broken").symlink_to(folder / "not there")
    corpus = corpus_of(folder)
    contents = {train[0]: b"first", train[1]: "second é".encode(), heldout[0]: b"third",
                train[2]: b"linked"}  # fmt: skip
    assert [d.path for d in corpus.documents] == sorted(contents)
    for document in corpus.documents:
        tokens = corpus.tokens_of(document)
        assert tokens.dtype == np.int32
        assert tokens.tolist() == [*contents[document.path], SEPARATOR]
        assert document.n_bytes == len(contents[document.path])
        assert document.heldout == (document.path in heldout)
    assert corpus.summary() == {
        "source": str(folder), "sha256": corpus.sha256, "tokenizer": "bytes",
        "train_documents": 3, "heldout_documents": 1, "train_bytes": 20, "heldout_bytes": 5,
        "duplicates_dropped": 1, "not_text": 2, "empty": 1,
    }  # fmt: skip


def test_of_equal_files_the_first_path_stays(tmp_path):
    other = {names(False, 1)[0]: "other", names(True, 1)[0]: "held out"}
    for name in ("b", "a/z", "c"):  # whatever the order on disk
        write(tmp_path, {name: "same"})
    corpus = corpus_of(tmp_path, other)
    assert {d.path for d in corpus.documents} == {"a/z", *other}
    assert corpus.duplicates == 2


def test_the_standard_library_without_its_tests(tmp_path, monkeypatch):
    write(tmp_path, {f"{n}.py": f"# {n}" for n in [*names(False, 5, 10), *names(True, 5, 10)]})
    kept = {"json/decoder.py": "# j", "testing.py": "# t", "unittest/case.py": "# u"}
    left_out = ("site-packages/a.py", "dist-packages/a.py", "test/a.py", "encodings/a.py",
                "unittest/test/deep/a.py", "json/__pycache__/a.py", "json/notes.txt")  # fmt: skip
    write(tmp_path, kept | {name: f"# {name}" for name in left_out})
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    paths = {d.path for d in load_corpus(DataConfig(heldout_percent=50)).documents}
    assert set(kept) <= paths and not paths & set(left_out)
    # In a folder that a user names, such names mean nothing.
    assert set(left_out) <= {d.path for d in corpus_of(tmp_path).documents}


def test_the_default_corpus_is_large_enough_for_the_quickstart():
    summary = load_corpus(DataConfig()).summary()
    assert summary["train_bytes"] > 5e6 and summary["heldout_bytes"] > 3e5


def test_the_split_depends_on_the_path_alone(tmp_path):
    paths = [f"folder/{i}.txt" for i in range(500)]
    corpus = corpus_of(tmp_path / "a", {p: p for p in paths}, percent=20)
    heldout = {d.path for d in corpus.split(True)}
    assert 60 <= len(heldout) <= 140  # 100 +- 9
    first = {f"folder/{i}.txt" for i in (4, 5, 8)}  # of ten, in every version of this code
    assert set(paths[:10]) & heldout == first
    fewer = corpus_of(tmp_path / "b", {p: p + "changed" for p in paths[::3]}, percent=20)
    assert {d.path for d in fewer.split(True)} == heldout & set(paths[::3])
    more = corpus_of(tmp_path / "a", percent=40)
    assert heldout < {d.path for d in more.split(True)}


def test_the_hash_covers_what_the_tokens_depend_on(tmp_path, monkeypatch):
    files = {n: n * 3 for n in [*names(False, 3), *names(True, 3)]}
    plain = corpus_of(tmp_path / "a", files).sha256
    assert corpus_of(tmp_path / "elsewhere", files | {".hidden": "x"}).sha256 == plain
    first, second = list(files)[:2]
    swapped = files | {first: files[second], second: files[first]}
    longer = files | {first: files[first] + "."}
    renamed = {n + "x" * (n == max(files)): content for n, content in files.items()}
    changed = enumerate((swapped, longer, renamed))
    others = [corpus_of(tmp_path / str(i), f).sha256 for i, f in changed]
    others.append(corpus_of(tmp_path / "a", percent=51).sha256)
    tokenizer = make_tokenizer("bytes")
    tokenizer.name = "other"
    monkeypatch.setattr(sources, "make_tokenizer", lambda name: tokenizer)
    others.append(corpus_of(tmp_path / "a").sha256)
    assert len({plain, *others}) == 6


BAD_FOLDERS = {
    "nothing": ({".hidden": "x"}, "holds no files; give a folder of text"),
    "binary": ({"a": b"\0", "b": b"\xff", "c": ""},
               "holds 3 files but no text (2 binary or not UTF-8, 1 empty)"),
    "no held-out": (dict.fromkeys(names(False, 1), "x"), "of 1 documents none fell to the held-out "
                    "split; give more documents or change data.heldout_percent=50"),
    "no training": (dict.fromkeys(names(True, 1), "x"), "none fell to the training split"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_folder_that_cannot_be_used(tmp_path, kind):
    files, message = BAD_FOLDERS[kind]
    with pytest.raises(DataError) as error:
        corpus_of(tmp_path, files)
    assert message in str(error.value) and f"data.source={str(tmp_path)!r}" in str(error.value)


def test_a_source_that_is_no_folder(tmp_path):
    write(tmp_path, {"file": "x"})
    for source in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(DataError, match=r"data\.source='.*' is not a folder; give a folder"):
            load_corpus(DataConfig(source=str(source)))


def test_a_file_that_disappears_is_named(tmp_path, monkeypatch):
    found = sources._files

    def files(root, *args):
        paths = list(found(root, *args))
        (root / "b").unlink()
        return iter(paths)

    monkeypatch.setattr(sources, "_files", files)
    with pytest.raises(DataError, match=r"/b disappeared while .*start again"):
        corpus_of(tmp_path, {"a": "1", "b": "2"})


@pytest.mark.parametrize("content", [b"longer", b"3"])
def test_a_file_that_changes_is_named(tmp_path, monkeypatch, content):
    write(tmp_path, {"a": "1"})
    os.utime(tmp_path / "a", (0, 0))
    fstat = os.fstat

    def then_change(descriptor):
        status = fstat(descriptor)
        write(tmp_path, {"a": content})
        return status

    monkeypatch.setattr(os, "fstat", then_change)
    with pytest.raises(DataError, match=r"/a changed while .*start again"):
        corpus_of(tmp_path)


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a": "1", "folder/b": "2"})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("folder"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def refuse_file(path, mode):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError, match=r"/folder cannot be listed \(Permission denied\)"):
            corpus_of(tmp_path)
    monkeypatch.setattr(pathlib.Path, "open", refuse_file)
    with pytest.raises(DataError, match=r"/a cannot be read \(Permission denied\)"):
        load_corpus(DataConfig(source=str(tmp_path)))


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    try:
        pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")).write_bytes(b"text")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(DataError, match=r"'caf\\udce9' below .*rename it"):
        corpus_of(tmp_path)


# --- rows --------------------------------------------------------------------------------------


def test_rows_by_hand(tmp_path):
    (first, second), heldout = names(False, 2), names(True, 1)
    corpus = corpus_of(tmp_path, {first: "abcdef", second: "xyz", heldout[0]: "held out"})
    dataset = Dataset(corpus, 4)
    pad, end = 0, SEPARATOR
    a, b, c, d, e, f, x, y, z = b"abcdefxyz"
    expected = [
        ([a, b, c, d], [b, c, d, e], [1, 1, 1, 1], f"{first} tokens 0..4"),
        ([e, f, end, pad], [f, end, pad, pad], [1, 1, 0, 0], f"{first} tokens 4..6"),
        ([x, y, z, end], [y, z, end, pad], [1, 1, 1, 0], f"{second} tokens 0..3"),
    ]
    assert len(dataset) == 3
    for index, (tokens, targets, mask, place) in enumerate(expected):
        row = dataset[index]
        assert (row["tokens"].tolist(), row["targets"].tolist()) == (tokens, targets)
        assert row["mask"].tolist() == [bool(m) for m in mask] and row["example"] == index
        assert dataset.describe(index) == place
    assert dataset.padding_share() == pytest.approx(3 / 12)


@pytest.mark.parametrize("seq_len", [1, 4, 9, 10, 200])
def test_every_token_but_the_first_is_predicted_once(corpus, seq_len):
    dataset = Dataset(corpus, seq_len)
    rows = [dataset[i] for i in range(len(dataset))]
    assert all(row["mask"].any() for row in rows)
    ids = [corpus.tokens_of(d) for d in corpus.split(False)]
    targets = np.concatenate([row["targets"][row["mask"]] for row in rows])
    inputs = np.concatenate([row["tokens"][row["mask"]] for row in rows])
    assert np.array_equal(targets, np.concatenate([i[1:] for i in ids]))
    assert np.array_equal(inputs, np.concatenate([i[:-1] for i in ids]))
    assert dataset.padding_share() == pytest.approx(1 - np.mean([row["mask"] for row in rows]))


# --- the order ---------------------------------------------------------------------------------


def test_each_epoch_has_each_row_once_in_a_new_order(corpus):
    dataset = Dataset(corpus, 8)
    size = len(dataset)
    seen = examples(take(train_batches(dataset, batch_size=5, seed=3), 3 * size // 5 + 1))
    epochs = [seen[i * size : (i + 1) * size] for i in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    other = examples(take(train_batches(dataset, batch_size=size, seed=4), 1))
    assert len({tuple(order) for order in (*epochs, other, range(size))}) == 5


def test_a_batch_holds_the_rows_that_it_names(corpus):
    dataset = Dataset(corpus, 8)
    for batch in take(train_batches(dataset, batch_size=6, seed=0), 4):
        assert batch.tokens_BxT.dtype == batch.targets_BxT.dtype == np.int32
        for values, name in zip(arrays(batch), ("tokens", "targets", "mask"), strict=False):
            rows = [dataset[int(i)][name] for i in batch.example_B]
            assert np.array_equal(values, np.stack(rows))


@pytest.mark.parametrize("step", [0, 1, 7, 40])
@pytest.mark.parametrize("workers", [0, 1, 3, 20])
def test_a_count_of_examples_resumes(corpus, step, workers):
    """Beyond the first epoch as within it, and however many threads read."""
    dataset = Dataset(corpus, 8)
    whole = take(train_batches(dataset, batch_size=6, seed=1), step + 5)
    resumed = train_batches(dataset, batch_size=6, seed=1, start_example=step * 6, workers=workers)
    for one, other in zip(whole[step:], take(resumed, 5), strict=True):
        for a, b in zip(arrays(one), arrays(other), strict=True):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("start", [0, 12, 5])
@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_share_a_step_without_overlap(corpus, processes, start):
    dataset = Dataset(corpus, 8)
    whole = take(train_batches(dataset, batch_size=6, seed=1, start_example=start), 30)
    parts = [
        take(train_batches(dataset, batch_size=6, seed=1, start_example=start,
                           process_index=i, process_count=processes), 30)
        for i in range(processes)
    ]  # fmt: skip
    for step, batch in enumerate(whole):
        shares = [part[step].example_B.tolist() for part in parts]
        assert shares == [batch.example_B[i::processes].tolist() for i in range(processes)]


def test_a_batch_that_processes_cannot_share(corpus):
    with pytest.raises(DataError, match=r"train\.batch_size=6 is not a multiple of 4 processes"):
        train_batches(Dataset(corpus, 8), batch_size=6, seed=0, process_count=4)


def test_nothing_is_read_that_is_skipped_and_little_ahead(corpus):
    class Counting(Dataset):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    dataset = Counting(corpus, 8)
    batches = train_batches(dataset, batch_size=4, seed=0, start_example=10**12, workers=1)
    take(batches, 3)
    time.sleep(0.3)  # what reads ahead has come to rest
    assert dataset.reads <= 4 * (3 + BATCHES_AHEAD)


def reading_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def test_threads_end_with_the_iterator(corpus):
    batches = train_batches(Dataset(corpus, 8), batch_size=4, seed=0)
    next(batches)
    assert reading_threads()
    del batches
    end = time.monotonic() + 20
    while reading_threads() and time.monotonic() < end:
        gc.collect()  # and with those of other tests
        time.sleep(0.01)
    assert not reading_threads()


def test_a_process_ends_in_the_middle_of_the_data(tmp_path):
    files = {n: words(i, 500) for i, n in enumerate([*names(False, 9), *names(True, 9)])}
    program = """
        import sys
        from spire_jax.config import DataConfig
        from spire_jax.data.pipeline import Dataset, train_batches
        from spire_jax.data.sources import load_corpus
        corpus = load_corpus(DataConfig(source=sys.argv[1], heldout_percent=50))
        batches = train_batches(Dataset(corpus, 16), batch_size=4, seed=0)
        print(next(batches).tokens_BxT.shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(write(tmp_path, files))],
        capture_output=True, text=True, timeout=60,
        cwd=pathlib.Path(sources.__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "(4, 16)\n", "")


# --- held-out text -----------------------------------------------------------------------------


def test_held_out_rows_come_once_in_order(corpus):
    dataset = Dataset(corpus, 8, heldout=True)
    batches = list(held_out_batches(corpus, seq_len=8, batch_size=7))
    assert len(dataset) % 7 and all(b.tokens_BxT.shape == (7, 8) for b in batches)
    rows = [i for i in examples(batches) if i >= 0]
    assert rows == list(range(len(dataset)))
    counted = np.concatenate([b.targets_BxT[b.mask_BxT] for b in batches])
    ids = [corpus.tokens_of(d)[1:] for d in corpus.split(True)]
    assert np.array_equal(counted, np.concatenate(ids))
    last = batches[-1]
    assert (last.example_B == -1).any() and not last.mask_BxT[last.example_B == -1].any()


def test_fewer_held_out_rows_are_evenly_spaced(corpus):
    size = len(Dataset(corpus, 8, heldout=True))
    rows = examples(held_out_batches(corpus, seq_len=8, batch_size=3, max_rows=9))
    assert len(rows) == 9 and (rows[0], rows[-1]) == (0, size - 1)
    assert set(np.diff(rows)) <= {(size - 1) // 8, (size - 1) // 8 + 1}
    more = examples(held_out_batches(corpus, seq_len=8, batch_size=1, max_rows=10 * size))
    assert more == list(range(size))


def cut(corpus, n_contexts, context_length=30, room=20, seed=0):
    return cut_contexts(
        corpus, n_contexts=n_contexts, context_length=context_length, room=room, seed=seed
    )


def test_contexts_are_held_out_text_with_room_after_it(corpus):
    texts = {d.path: corpus.tokens_of(d)[:-1].tolist() for d in corpus.split(True)}
    contexts = cut(corpus, 60)
    for context in contexts:
        text = texts[context.document]
        assert context.tokens.dtype == np.int32
        assert context.tokens.tolist() == text[context.cut - 30 : context.cut]
        assert 30 <= context.cut <= len(text) - 20
    # Both ends are reached: the shortest document has 11 points, and 11 passes use them all.
    shortest = min(texts, key=lambda path: len(texts[path]))
    cuts = [c.cut for c in cut(corpus, 55) if c.document == shortest]
    assert sorted(cuts) == list(range(30, 41))


def test_contexts_spread_over_documents_and_never_repeat(corpus):
    contexts = cut(corpus, 53)
    for begin in range(0, 50, 5):  # every pass takes each of the five documents
        assert len({c.document for c in contexts[begin : begin + 5]}) == 5
    assert len({(c.document, c.cut) for c in contexts}) == 53
    places = [(c.document, c.cut) for c in contexts]
    assert [(c.document, c.cut) for c in cut(corpus, 53)] == places
    assert [(c.document, c.cut) for c in cut(corpus, 53, seed=1)] != places
    # More contexts go on where fewer end.
    assert [(c.document, c.cut) for c in cut(corpus, 7)] == places[:7]


def test_contexts_that_the_text_has_no_room_for(corpus):
    # The longest has 100 bytes; of the context's 80 one point of it is left, and all are used.
    assert [c.cut for c in cut(corpus, 1, context_length=80)] == [80]
    with pytest.raises(DataError, match=r"has room for .* = 101 tokens; the longest has 100: "):
        cut(corpus, 1, context_length=81)
    points = sum(60 + 10 * i - 49 for i in range(5))
    assert len({(c.document, c.cut) for c in cut(corpus, points)}) == points
    with pytest.raises(DataError, match=rf"eval\.contexts={points + 1}, .* {points} points only"):
        cut(corpus, points + 1)

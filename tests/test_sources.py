"""Text in: what is read, how it is split, and what cannot be read."""

import os
import pathlib
import sysconfig

import numpy as np
import pytest
from corpora import SEPARATOR, corpus_of, names, write

from spire_jax.config.schema import ConfigError, DataConfig
from spire_jax.config.validation import tokenizer_size
from spire_jax.data import sources
from spire_jax.data.corpus import DataError
from spire_jax.data.sources import load_corpus
from spire_jax.data.tokenizer import make_tokenizer

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

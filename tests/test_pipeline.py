"""Rows out: how documents are cut, in what order they come, and that a count alone resumes it."""

import dataclasses
import gc
import pathlib
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from corpora import BEGIN, SEPARATOR, Beginning, corpus_of, names, words, write

from spire_jax.data import sources
from spire_jax.data.corpus import Corpus, DataError, Documents
from spire_jax.data.pipeline import (
    BATCHES_AHEAD,
    Dataset,
    cut_contexts,
    held_out_batches,
    train_batches,
)


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


# --- a begin token -----------------------------------------------------------------------------


def test_each_row_begins_as_a_prompt_does(tmp_path):
    (first, second), heldout = names(False, 2), names(True, 1)
    corpus = corpus_of(tmp_path, {first: "abcdef", second: "xyz", heldout[0]: "held out"})
    corpus = dataclasses.replace(corpus, tokenizer=Beginning())
    dataset = Dataset(corpus, 4)
    pad, end = 0, SEPARATOR
    a, b, c, d, e, f, x, y, z = b"abcdefxyz"
    expected = [
        ([BEGIN, a, b, c], [a, b, c, d], [1, 1, 1, 1], f"{first} tokens 0..3"),
        ([BEGIN, e, f, end], [e, f, end, pad], [1, 1, 1, 0], f"{first} tokens 4..6"),
        ([BEGIN, x, y, z], [x, y, z, end], [1, 1, 1, 1], f"{second} tokens 0..3"),
    ]
    assert len(dataset) == 3
    for index, (tokens, targets, mask, place) in enumerate(expected):
        row = dataset[index]
        assert (row["tokens"].tolist(), row["targets"].tolist()) == (tokens, targets)
        assert row["mask"].tolist() == [bool(m) for m in mask]
        assert dataset.describe(index) == place
    assert dataset.padding_share() == pytest.approx(1 / 12)
    assert corpus.summary()["begin_token"] == BEGIN
    (held,) = held_out_batches(corpus, seq_len=16, batch_size=1)
    assert held.tokens_BxT[0, :9].tolist() == [BEGIN, *b"held out"]
    assert held.targets_BxT[held.mask_BxT].tolist() == [*b"held out", end]


@pytest.mark.parametrize("seq_len", [1, 4, 9, 10, 200])
def test_after_a_begin_token_every_token_is_predicted_once(corpus, seq_len):
    dataset = Dataset(dataclasses.replace(corpus, tokenizer=Beginning()), seq_len)
    rows = [dataset[i] for i in range(len(dataset))]
    ids = [corpus.tokens_of(d) for d in corpus.split(False)]
    targets = np.concatenate([row["targets"][row["mask"]] for row in rows])
    assert np.array_equal(targets, np.concatenate(ids))
    assert {int(row["tokens"][0]) for row in rows} == {BEGIN}
    assert all(row["mask"].any() for row in rows)
    assert dataset.padding_share() == pytest.approx(1 - np.mean([row["mask"] for row in rows]))


def test_a_begin_token_that_a_document_has_is_not_put_there_twice():
    tokens, ends = np.array([BEGIN, *b"abcd", SEPARATOR, BEGIN, *b"held"]), np.array([6, 11])
    columns = Documents(["t", "h"], np.arange(2), np.array([False, True]), np.array([0, 6]), ends,
                        np.zeros(2, int))  # fmt: skip
    dataset = Dataset(Corpus("memory", columns, tokens, "", Beginning()), 4)
    rows = [dataset[i] for i in range(len(dataset))]
    assert [row["tokens"].tolist() for row in rows] == [
        [BEGIN, *b"abc"], [BEGIN, *b"d", SEPARATOR, 0]
    ]  # fmt: skip
    targets = [row["targets"][row["mask"]].tolist() for row in rows]
    assert targets == [[*b"abc"], [*b"d", SEPARATOR]]


def test_a_context_of_any_length_begins_as_a_prompt_does(corpus):
    plain = cut(corpus, 5)
    for context, bare in zip(
        cut(dataclasses.replace(corpus, tokenizer=Beginning()), 5), plain, strict=True
    ):
        for length in (1, 7, 30):
            assert bare.last(length).tolist() == bare.tokens[-length:].tolist()
            expected = [BEGIN, *bare.tokens[30 - length + 1 :].tolist()]
            assert context.last(length).tolist() == expected and len(expected) == length


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
        from spire_jax.config.schema import DataConfig
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

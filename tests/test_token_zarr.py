"""Token arrays as a corpus: what they hold, and in what order they are read."""

import pickle
import time

import numpy as np
import pytest
import tensorstore as ts
from corpora import SEPARATOR, corpus_of, names, words
from token_arrays import ids, opened, store_array, take

from spire_jax import run
from spire_jax.data import pipeline, token_zarr
from spire_jax.data.corpus import DataError
from spire_jax.data.pipeline import (
    Dataset,
    InBands,
    cut_contexts,
    held_out_batches,
    most_frequent,
    train_batches,
)


@pytest.fixture
def array(tmp_path):
    return store_array(tmp_path / "tokens.zarr", ids(60, 12))


# --- what arrays hold ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.uint64, np.uint8])
@pytest.mark.parametrize("version", [2, 3])
def test_rows_are_documents_however_they_are_stored(array, tmp_path, version, kind):
    values = ids(60, 12)
    place = store_array(tmp_path / "other.zarr", values.astype(kind), (7, 5), version)
    corpus = opened(place)
    assert len(corpus.documents) == 60 and corpus.tokens.dtype == np.uint16
    for row, document in enumerate(corpus.documents):
        assert np.array_equal(corpus.tokens_of(document), values[row])
        assert document.path == f"other.zarr row {row}"
    assert corpus.sha256 == opened(array).sha256
    assert corpus.summary() == {
        "source": str(place), "sha256": corpus.sha256, "tokenizer": "bytes",
        "train_documents": len(corpus.split(False)), "heldout_documents": len(corpus.split(True)),
        "train_tokens": 12 * len(corpus.split(False)),
        "heldout_tokens": 12 * len(corpus.split(True)),
    }  # fmt: skip


def test_one_array_is_split_by_its_row_numbers(tmp_path):
    sides = {}
    for rows in (400, 500):  # more rows move none
        corpus = opened(store_array(tmp_path / f"{rows}", ids(rows, 2)))
        sides[rows] = corpus.documents.heldout
    assert 0.23 < sides[500].mean() < 0.37
    assert np.array_equal(sides[400], sides[500][:400])
    first = [i for i in range(12) if sides[400][i]]
    assert first == [1, 6, 10, 11]  # in every version of this code
    assert not set(np.flatnonzero(sides[500])) - set(
        np.flatnonzero(opened(tmp_path / "500", heldout_percent=60).documents.heldout)
    )


@pytest.mark.parametrize("named", [False, True])
def test_two_arrays_are_two_sides(tmp_path, named):
    train, heldout = ids(5, 8), ids(3, 6, seed=1)
    places = "train.zarr", "validation.zarr" if named else "heldout.zarr"
    for name, values in zip(places, (train, heldout), strict=True):
        store_array(tmp_path / name, values, version=2)
    corpus = (opened(tmp_path / places[0], heldout_source=str(tmp_path / places[1]))
              if named else opened(tmp_path))  # fmt: skip
    for side, values in ((False, train), (True, heldout)):
        tokens = [corpus.tokens_of(d) for d in corpus.split(side)]
        assert np.array_equal(np.stack(tokens), values)
    assert [d.path for d in corpus.split(True)] == [f"{places[1]} row {i}" for i in range(3)]


@pytest.mark.parametrize("version", [2, 3])
def test_chunks_that_a_writer_left_out_are_read_where_that_is_said(tmp_path, version):
    """Chunks of the fill value alone, which the writer here leaves out as zarr-python does."""
    values = ids(40, 12) | 1
    values[:10, 8:] = values[10:20, 4:] = 0
    place = store_array(tmp_path / "t.zarr", values, (10, 4), version)
    assert len([p for p in place.rglob("*") if p.name[-1].isdecimal() and p.is_file()]) == 9
    with pytest.raises(DataError, match=r"NOT_FOUND.*, or set data.missing_chunks='fill' if its w"):
        for document in (corpus := opened(place)).documents:
            corpus.tokens_of(document)
    corpus = opened(place, missing_chunks="fill")
    read = [corpus.tokens_of(document) for document in corpus.documents]
    assert np.array_equal(np.stack(read), values)


def test_chunks_beyond_the_lengths_of_rows_are_not_missed(tmp_path):
    values, lengths = ids(40, 12) | 1, np.full(40, 12, np.int32)
    values[:10, 8:], lengths[:10] = 0, 7
    place = store_array(tmp_path / "t.zarr", values, (10, 4), 2)
    store_array(tmp_path / "t.lengths.zarr", lengths)
    corpus = opened(place)
    for row, document in enumerate(corpus.documents):
        assert np.array_equal(corpus.tokens_of(document), values[row, : lengths[row]])


def test_padding_is_no_text(tmp_path):
    values, lengths = ids(40, 10), np.random.default_rng(0).integers(2, 11, 40).astype(np.int32)
    values[np.arange(10) >= lengths[:, None]] = 60_000  # would be no id
    store_array(tmp_path / "a.zarr", values)
    store_array(tmp_path / "a.lengths.zarr", lengths)
    corpus = opened(tmp_path / "a.zarr")
    assert all(
        len(corpus.tokens_of(d)) == n for d, n in zip(corpus.documents, lengths, strict=True)
    )
    dataset = Dataset(corpus, 4)
    predicted = np.concatenate([r["targets"][r["mask"]] for r in map(dataset.__getitem__,
                                range(len(dataset)))])  # fmt: skip
    expected = [corpus.tokens_of(d)[1:] for d in corpus.split(False)]
    assert np.array_equal(predicted, np.concatenate(expected))
    assert dataset.padding_share() == pytest.approx(1 - len(predicted) / (4 * len(dataset)))
    assert dataset.describe(0).startswith("a.zarr row ") and " tokens 0.." in dataset.describe(0)


@pytest.fixture
def twins(tmp_path):
    """The same documents as a folder of text, and as arrays with lengths, in the same order."""
    train = {n: words(i, 5 + 9 * i) for i, n in enumerate(names(False, 9))}
    heldout = {n: words(50 + i, 60 + 10 * i) for i, n in enumerate(names(True, 4))}
    text = corpus_of(tmp_path / "text", train | heldout)
    for name, side in (("train", False), ("heldout", True)):
        tokens = [text.tokens_of(d) for d in text.split(side)]
        rows = np.zeros((len(tokens), 100), np.uint16)
        for row, of in zip(rows, tokens, strict=True):
            row[: len(of)] = of
        store_array(tmp_path / "rows" / f"{name}.zarr", rows, (1, 100))
        lengths = np.array([len(t) for t in tokens], np.int32)
        store_array(tmp_path / "rows" / f"{name}.lengths.zarr", lengths)
    return text, opened(tmp_path / "rows")


def test_rows_of_tokens_are_what_text_is_to_training_and_evaluation(twins):
    sets = [Dataset(corpus, 8) for corpus in twins]
    orders = [take(train_batches(d, batch_size=6, seed=1, start_example=7), 20) for d in sets]
    held = [list(held_out_batches(c, seq_len=8, batch_size=5, max_rows=17)) for c in twins]
    for one, other in (*zip(*orders, strict=True), *zip(*held, strict=True)):
        for name in ("tokens_BxT", "targets_BxT", "mask_BxT", "example_B"):
            a, b = getattr(one, name), getattr(other, name)
            assert a.dtype == b.dtype and np.array_equal(a, b)
    cuts = [cut_contexts(c, n_contexts=30, context_length=20, room=9, seed=0) for c in twins]
    for a, b in zip(*cuts, strict=True):
        assert a.cut == b.cut and np.array_equal(a.tokens, b.tokens)
    frequent = [most_frequent(d, None, 257, 9).tolist() for d in sets]
    assert frequent[0] == frequent[1] and frequent[0][-1] == SEPARATOR


@pytest.mark.parametrize("chunks", [(1, 50), (8, 50)])
def test_of_very_many_tokens_some_are_counted(tmp_path, monkeypatch, chunks):
    """Documents at equal distances, or whole bands where they are stored so."""
    monkeypatch.setattr(pipeline, "COUNTED", 1000)
    monkeypatch.setattr(token_zarr, "BAND_BYTES", 8 * 50 * 2)
    values = np.repeat(np.arange(1, 201, dtype=np.uint16)[:, None], 50, axis=1)
    corpus = opened(store_array(tmp_path / "t.zarr", values, chunks))
    read, row_of = set(), type(corpus.tokens).__getitem__

    def note(tokens, piece):
        read.add(piece.start // 50)
        return row_of(tokens, piece)

    monkeypatch.setattr(type(corpus.tokens), "__getitem__", note)
    most = most_frequent(Dataset(corpus, 8), None, 257, 5)
    assert 500 < 50 * len(read) < 1500 < 50 * len(corpus.split(False))
    assert not corpus.documents.heldout[list(read)].any()
    assert set(most) == {*(i + 1 for i in sorted(read)[:4]), SEPARATOR}
    bands = {row // 8 for row in read}
    assert len(bands) < 6 if chunks[0] > 1 else len(bands) > 12


def test_the_hash_covers_what_can_be_read(tmp_path):
    values = ids(40, 600)

    def sha256(name, rows, lengths=None, **config):
        store_array(tmp_path / name / "t.zarr", rows, (9, 100))
        if lengths is not None:
            store_array(tmp_path / name / "t.lengths.zarr", lengths)
        return opened(tmp_path / name / "t.zarr", **config).sha256

    plain = sha256("plain", values)
    assert sha256("elsewhere", values) == plain
    full = np.full(40, 600, np.int32)
    assert sha256("full", values, full) == plain
    full[7] = 599
    others = [sha256("shorter", values, full), sha256("other", ids(40, 600, seed=1)),
              sha256("fewer", values[:-1]), sha256("narrower", values[:, :-1]),
              sha256("percent", values, heldout_percent=31)]  # fmt: skip
    assert len({plain, *others}) == 6


# --- the order -----------------------------------------------------------------------------------


@pytest.fixture
def banded(tmp_path, monkeypatch):
    """Chunks of 4 rows and 16 columns, two of them high a band: 5 bands and a rest."""
    monkeypatch.setattr(token_zarr, "BAND_BYTES", 8 * 40 * 2)
    values = np.random.default_rng(0).integers(0, 256, (43, 40)).astype(np.uint16)
    store_array(tmp_path / "train.zarr", values, (4, 16), version=2)
    store_array(tmp_path / "heldout.zarr", values[:5], (4, 16), version=2)
    return Dataset(opened(tmp_path), 8)


def examples(batches):
    return [int(i) for batch in batches for i in batch.example_B]


def test_bands_come_one_after_the_other_and_hold_all_rows_once(banded):
    assert banded.bands.tolist() == [0, 40, 80, 120, 160, 200, 215]  # 8 documents of 5 rows
    size, orders = len(banded), []
    for seed in (3, 4):
        seen = examples(take(train_batches(banded, batch_size=5, seed=seed), 2 * size // 5))
        orders += [seen[:size], seen[size:]]
    for order in orders:
        assert sorted(order) == list(range(size))
        changes = np.flatnonzero(np.diff([row // 40 for row in order]))
        assert len(changes) == 5  # each is left once
        inside = order[: changes[0] + 1]
        assert sorted(inside) != inside
    rows = [tuple(row for row in order if row < 40) for order in orders]  # of the first band
    assert len(set(rows)) == 4
    assert len({tuple(dict.fromkeys(row // 40 for row in order)) for order in orders}) == 4


@pytest.mark.parametrize("kind", ["banded", "one band"])
def test_shards_neither_overlap_nor_miss_across_a_change_of_processes(
    banded, tmp_path, kind, monkeypatch
):
    """Processes of any number, one after the other, take the very order that one alone takes."""
    monkeypatch.setattr(pipeline, "BATCHES_AHEAD", 2)
    dataset = banded
    if kind == "one band":
        store_array(tmp_path / "t.zarr", ids(60, 40), (1, 40))
        dataset = Dataset(opened(tmp_path / "t.zarr"), 8)
    steps, size = 30, 12
    whole = take(train_batches(dataset, batch_size=size, seed=1, workers=2), steps)
    step, together = 0, []
    for processes, until in ((1, 4), (3, 12), (2, 13), (6, 22), (4, 30)):
        parts = [
            take(train_batches(dataset, batch_size=size, seed=1, start_example=step * size,
                               process_index=i, process_count=processes, workers=2), until - step)
            for i in range(processes)
        ]  # fmt: skip
        for batches in zip(*parts, strict=True):
            rows = np.empty(size, int)
            for i, batch in enumerate(batches):
                rows[i::processes] = batch.example_B
                for row, tokens in zip(batch.example_B, batch.tokens_BxT, strict=True):
                    assert np.array_equal(tokens, dataset[int(row)]["tokens"])
            together.append(rows)
        step = until
    assert np.array_equal(np.stack(together), np.stack([b.example_B for b in whole]))


def test_a_band_order_is_one_for_all_positions(banded):
    order = InBands(banded, 7)
    size = len(banded)
    rows = [int(order[size * 5 + i]["example"]) for i in range(size)]
    assert [int(InBands(banded, 7)[size * 5 + i]["example"]) for i in (3, 99, 0)] == [
        rows[3], rows[99], rows[0]
    ]  # fmt: skip


def reads_of_files():
    """How many there have been."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/read")
    return next(m["values"][0]["value"] for m in metrics if m["name"].endswith("/read"))


def test_a_band_is_decoded_once(tmp_path, monkeypatch):
    """Every chunk of an array whose chunks hold many documents is read once in an epoch."""
    monkeypatch.setattr(token_zarr, "BAND_BYTES", 64 * 2048 * 2)
    monkeypatch.setattr(token_zarr, "CACHE_BYTES", (0, 2**31))  # of two bands
    place = store_array(tmp_path / "t.zarr", ids(512, 2048), (64, 512), version=2)
    reads = []
    for banded in (True, False):
        dataset = Dataset(opened(place), 256)
        order = InBands(dataset, 0)
        if not banded:
            order = np.random.default_rng(0).permutation(len(dataset))
        before = reads_of_files()
        for i in range(len(dataset)):
            order[i] if banded else dataset[int(order[i])]
        reads.append(reads_of_files() - before)
    assert 16 < reads[0] <= 36 and reads[1] > 10 * reads[0], reads


def test_arrays_are_opened_by_each_process(array):
    corpus = opened(array)
    tokens = pickle.loads(pickle.dumps(corpus.tokens))
    assert "_opened" not in vars(tokens)
    document = corpus.documents[3]
    assert np.array_equal(tokens[document.begin : document.end], corpus.tokens_of(document))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["as write_zarr writes", "as LongCrawl64 is stored"])
def test_waiting_for_data_is_under_2_percent_of_a_step(tmp_path, monkeypatch, layout):
    """Steps of 100 ms that take 16 rows of 1024 from an array larger than the cache."""
    if layout == "as write_zarr writes":
        store = {"chunks": (1, 8192)}
        monkeypatch.setattr(token_zarr, "CACHE_BYTES", (2**24, 2**31))
        shape = 1024, 2**16
    else:  # two bands, and the end of one is passed
        store = {"chunks": (2048, 2048), "version": 2}
        monkeypatch.setattr(token_zarr, "BAND_BYTES", 2048 * 2**13 * 2)
        shape = 4096, 2**13
    place = store_array(tmp_path / "t.zarr", ids(*shape), **store)
    dataset = Dataset(opened(place, heldout_percent=2), 1024)
    start = 0 if len(dataset.bands) == 2 else int(np.diff(dataset.bands).max()) - 800
    batches = train_batches(dataset, batch_size=16, seed=0, start_example=start)
    next(batches)
    waits = []
    for _ in range(100):
        time.sleep(0.1)
        begin = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - begin)
    assert sum(waits) < 0.02 * 0.1 * len(waits), f"{1e3 * np.mean(waits):.2f} ms a step"


@pytest.mark.slow
def test_training_reads_arrays_and_knows_them(tmp_path, capsys):
    for name, rows in (("train", 40), ("heldout", 9)):
        store_array(tmp_path / "one" / f"{name}.zarr", ids(rows, 100), (4, 32), version=2)
        store_array(tmp_path / "two" / f"{name}.zarr", ids(rows, 100, seed=9), (4, 32))
    small = {"target.n_layers": 1, "target.d_model": 16, "target.n_kv_heads": 1, "target.d_head": 8,
             "target.d_ff": 16, "train.steps": 4, "train.batch_size": 4, "train.seq_len": 32,
             "train.log_every": 1, "eval.context_lengths": 16, "eval.output_length": 8,
             "eval.contexts": 8, "drafts.magicdec.window": 6, "drafts.spire.n_layers": 1,
             "drafts.spire.window": 8, "drafts.vanilla.n_layers": 1}  # fmt: skip
    flags = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'work'}", "--stages=target",
             *(f"--config.{key}={value}" for key, value in small.items())]  # fmt: skip
    assert run.main([*flags, f"--config.data.source={tmp_path / 'one'}"]) == 0, capsys.readouterr()
    assert len((tmp_path / "work" / "metrics" / "target.jsonl").read_text().splitlines()) == 4
    (events,) = (tmp_path / "work" / "tensorboard" / "target").iterdir()
    assert b"learning_rate" in events.read_bytes()
    assert run.main([*flags, f"--config.data.source={tmp_path / 'two'}"]) == 2
    assert "belongs to another configuration: corpus" in capsys.readouterr().err

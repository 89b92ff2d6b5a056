"""Rows that the target writes: what they are, resumed, and mixed into what drafts see."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from corpora import BEGIN, Beginning, corpus_of, names, words
from models import init

from spire_jax.config import files
from spire_jax.config.identity import plan
from spire_jax.config.schema import AUTOREGRESSIVE, ConfigError
from spire_jax.data.pipeline import Dataset, WrittenRows, train_batches
from spire_jax.decoding import Weights, generate
from spire_jax.decoding.build import make_decoder
from spire_jax.models.sampling import Sampling
from spire_jax.training import continuations
from spire_jax.training.continuations import (
    fitting,
    prompt,
    read_continuations,
    write_continuations,
    written,
)
from spire_jax.training.tasks import target_task

VALUES = {
    "target": {"n_layers": 1, "d_model": 16, "n_kv_heads": 1, "d_head": 8, "d_ff": 16},
    "drafts": {"spire": {"kind": "spire", "n_layers": 1, "window": 8}},
    "train": {"steps": 4, "batch_size": 4, "seq_len": 24, "k": 4},
    "eval": {"context_lengths": (8,), "output_length": 4},
    "continuations": {"rows": 5, "prompt": 8, "batch_size": 2, "temperature": 0.9},
}
IDENTITY = {"of": "a test"}


def experiment(**values):
    sections = VALUES | {"continuations": VALUES["continuations"] | values}
    return files.build(sections)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    train = {name: words(i, 40 + 30 * i) for i, name in enumerate(names(False, 6))}
    heldout = {name: words(100, 60) for name in names(True, 1)}
    return corpus_of(tmp_path_factory.mktemp("text"), train | heldout)


@pytest.fixture(scope="module")
def target():
    return init(target_task(experiment()).model, 3, sharpness=2.0)


@pytest.fixture(scope="module")
def rows(corpus, target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "continuations"
    write_continuations(experiment(), target, corpus, folder, IDENTITY)
    return folder


def contents(folder):
    return [np.load(folder / name) for name in (continuations.TOKENS, continuations.LENGTHS)]


def test_rows_are_a_prompt_and_what_the_target_makes_of_it(rows, corpus, target):
    config, (tokens, lengths) = experiment(), contents(rows)
    assert tokens.shape == (5, 25) and tokens.dtype == corpus.tokens.dtype
    eos = corpus.tokenizer.separator
    documents = fitting(corpus, 8)
    decoder = make_decoder(config, AUTOREGRESSIVE, eos, Sampling(0.9))
    texts = [corpus.tokens_of(d).tolist() for d in corpus.split(False)]
    for row in range(5):
        start = prompt(corpus, documents, 8, config.seed, row)
        np.testing.assert_array_equal(tokens[row, :8], start)
        found = [text for text in texts if any(
            text[i : i + 8] == start.tolist() for i in range(len(text) - 8))]  # fmt: skip
        assert found, "a piece of a training document, without its separator"
        seed = continuations.zlib.crc32(f"0/continuation/{row}".encode())
        alone = generate(decoder, Weights(target), [start], [17], [seed], width=25)
        n = int(alone.lengths[0])
        assert lengths[row] == n
        np.testing.assert_array_equal(tokens[row, :n], np.asarray(alone.tokens)[0, :n])
    assert len({tuple(row) for row in tokens[:, :8]}) > 1


def test_a_row_begins_with_the_begin_token(corpus):
    documents = fitting(corpus, 8)
    begins = dataclasses.replace(corpus, tokenizer=Beginning())
    for row in range(5):
        plain = prompt(corpus, documents, 8, 0, row).tolist()
        assert prompt(begins, documents, 8, 0, row).tolist() == [BEGIN, *plain[1:]]


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_ends_with_the_same_rows(after, rows, corpus, target, tmp_path,
                                                    monkeypatch):  # fmt: skip
    calls = itertools.count()

    def failing(*arguments, **options):
        if next(calls) == after:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(continuations, "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        write_continuations(experiment(), target, corpus, tmp_path / "c", IDENTITY)
    assert written(tmp_path / "c", IDENTITY) == 2 * after
    write_continuations(experiment(), target, corpus, tmp_path / "c", IDENTITY)
    assert next(calls) == 5 - 1, "three batches, and the one that failed"
    jax.tree.map(np.testing.assert_array_equal, contents(tmp_path / "c"), contents(rows))


def test_rows_made_from_something_else_are_refused(rows):
    with pytest.raises(ConfigError, match="made from other values"):
        written(rows, {"of": "another"})


def test_a_prompt_longer_than_every_document_is_named(corpus):
    with pytest.raises(ConfigError, match="prompt=5000: no training document"):
        fitting(corpus, 5000)


def test_drafts_see_both_kinds_of_rows_in_their_share(rows, corpus):
    dataset = Dataset(corpus, 24)
    mixed = read_continuations(rows, len(dataset))
    options = dict(batch_size=4, seed=0, written=mixed, written_share=0.25)
    seen = list(itertools.islice(train_batches(dataset, **options), 50))
    examples = np.concatenate([batch.example_B for batch in seen])
    assert abs(np.mean(examples >= len(dataset)) - 0.25) < 0.01
    assert set(examples[examples >= len(dataset)]) == set(len(dataset) + np.arange(5))
    tokens, lengths = contents(rows)
    for batch in seen:
        for row, example in enumerate(batch.example_B - len(dataset)):
            if example >= 0:
                np.testing.assert_array_equal(batch.tokens_BxT[row], tokens[example, :-1])
                np.testing.assert_array_equal(batch.targets_BxT[row], tokens[example, 1:])
                assert batch.mask_BxT[row].sum() == lengths[example] - 1
    later = next(train_batches(dataset, start_example=48, **options))
    np.testing.assert_array_equal(later.example_B, seen[12].example_B)


def test_tokens_beyond_a_row_s_end_are_masked():
    rows = WrittenRows(np.array([[5, 6, 7, 0]], np.uint16), np.array([3]), 10)
    assert rows[0]["mask"].tolist() == [True, True, False]
    assert rows[0]["targets"].tolist() == [6, 7, 0] and rows[0]["example"] == 10
    assert rows.describe(10) == "continuation 0"


def test_drafts_are_identified_by_the_rows_they_saw():
    def hashes(**values):
        return plan(experiment(**values), "corpus").hashes

    base, none = hashes(), hashes(rows=0)
    assert base["target"] == none["target"] and "continuations" not in none
    assert base["draft spire"] != none["draft spire"]
    assert hashes(batch_size=4) == base, "how many are written at a time changes nothing"
    other = hashes(share=0.75)
    assert other["continuations"] == base["continuations"]
    assert other["draft spire"] != base["draft spire"]
    assert hashes(temperature=0.5)["continuations"] != base["continuations"]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"share": 1.0}, "share=1.0 must lie between 0 and 1"),
        ({"prompt": 24}, "prompt=24 leaves nothing of train.seq_len=24"),
        ({"rows": -1}, "rows=-1 is negative"),
    ],
)
def test_bad_values_name_the_key(values, message):
    with pytest.raises(ConfigError, match=message):
        experiment(**values)

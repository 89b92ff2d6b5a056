"""Token arrays that cannot be used: an error that names them, at once or when they are read."""

import json
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from buckets import bucket
from token_arrays import ids, opened, store_array, take

from spire_jax import run
from spire_jax.data import token_zarr
from spire_jax.data.corpus import DataError
from spire_jax.data.pipeline import Dataset, train_batches


@pytest.fixture
def array(tmp_path):
    return store_array(tmp_path / "tokens.zarr", ids(60, 12))


def flat(folder):
    store_array(folder / "t.zarr", ids(1, 50)[0])


def deep(folder):
    store_array(folder / "t.zarr", ids(4, 6).reshape(4, 3, 2))


def floats(folder):
    store_array(folder / "t.zarr", ids(4, 6).astype(np.float32))


def narrow(folder):
    store_array(folder / "t.zarr", ids(4, 1))


def group(folder):
    (folder / "t.zarr").mkdir()
    (folder / "t.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')


def old_group(folder):
    (folder / "t.zarr").mkdir()
    (folder / "t.zarr" / ".zgroup").write_text('{"zarr_format": 2}')


def nothing(folder):
    (folder / "t.zarr").mkdir()


def damaged(folder):
    store_array(folder / "t.zarr", ids(60, 6))
    (folder / "t.zarr" / "zarr.json").write_text("{")


def vocabulary(folder):
    store_array(folder / "t.zarr", np.full((60, 6), 300, np.uint16))


def negative(folder):
    store_array(folder / "t.zarr", np.full((60, 6), -1, np.int32))


def other_lengths(folder):
    store_array(folder / "t.zarr", ids(60, 6))
    store_array(folder / "t.lengths.zarr", np.full(59, 6, np.int32))


def long_lengths(folder):
    store_array(folder / "t.zarr", ids(60, 6))
    store_array(folder / "t.lengths.zarr", np.full(60, 7, np.int32))


def real_lengths(folder):
    store_array(folder / "t.zarr", ids(60, 6))
    store_array(folder / "t.lengths.zarr", np.full(60, 6, np.float32))


def missing(folder):
    store_array(folder / "t.zarr", ids(60, 600), (2, 600), version=2)
    for i in range(30):
        (folder / "t.zarr" / f"{i}.0").unlink()


def long(folder):
    store_array(folder / "t.zarr", ids(60, 6), version=2)
    change(folder / "t.zarr" / ".zarray", shape=[2**40, 6])


def wide(folder):
    store_array(folder / "t.zarr", ids(60, 6), version=2)
    change(folder / "t.zarr" / ".zarray", shape=[60, 2**60])


def coarse(folder):
    store_array(folder / "t.zarr", ids(60, 6), version=2)
    change(folder / "t.zarr" / ".zarray", chunks=[2**20, 2**20])


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def no_object(folder):
    store_array(folder / "t.zarr", ids(60, 6))
    (folder / "t.zarr" / "zarr.json").write_text("[]")


def nested(folder):
    store_array(folder / "t.zarr", ids(60, 6))
    (folder / "t.zarr" / "zarr.json").write_text("[" * 10**5)


def no_manifest(folder):
    manifest(folder, arrays=["t.zarr"])


def half_a_manifest(folder):
    manifest(folder, arrays={"t.zarr": {"rows": 60}})


def few(folder):
    store_array(folder / "t.zarr", ids(1, 6))


def unfinished(folder):
    store_array(folder / "t.zarr", ids(60, 6))
    (folder / ".progress").mkdir()
    (folder / ".progress" / "plan.json").write_text("{}")


def tokenized_otherwise(folder):
    manifest(folder, tokenizer="bpe-9-abc")


def of_other_shape(folder):
    manifest(folder, row_tokens=7)


def manifest(folder, **values):
    if not (folder / "t.zarr").exists():
        store_array(folder / "t.zarr", ids(60, 6))
    about = {
        "tokenizer": "bytes",
        "row_tokens": 6,
        "arrays": {"t.zarr": {"rows": 60, "sha256": []}},
    }
    (folder / "manifest.json").write_text(json.dumps(about | values))


BAD = {
    flat: r"has shape \[50\] and dtype uint16; it should hold rows of token ids \(rank 2, an integ",
    deep: r"has shape \[4, 3, 2\] and dtype uint16; it should hold rows of token ids",
    floats: r"has shape \[4, 6\] and dtype float32; it should hold rows of token ids",
    narrow: "has rows of 1 token; a row needs two or more",
    group: "is a zarr group; name one of its arrays",
    old_group: "is a zarr group; name one of its arrays",
    nothing: r"holds no zarr array \(zarr.json or .zarray\); name an array, or a folder with train",
    damaged: "zarr.json is no JSON .*; copy the data again",
    no_object: "zarr.json is no JSON object; copy the data again",
    nested: r"zarr.json is no JSON \(it is nested .*\); copy the data again",
    no_manifest: "manifest.json is not as write_zarr writes it; copy it again, or move it away",
    half_a_manifest: "manifest.json is not as write_zarr writes it; copy it again, or move it away",
    long: r"row 1099511627775: columns 0..0 cannot be read \(NOT_FOUND.*; copy or make the array a",
    coarse: r"has chunks of \[1048576, 1048576\], and more than 2147483648 bytes; make it again wi",
    wide: r"has the shape \[60, 1152921504606846976\], more ids than there can be; copy the arra",
    vocabulary: r"t.zarr, row \d+, column 0 holds the id 300, but data.tokenizer='bytes' has 0..25",
    negative: r"row \d+, column 0 holds the id -1, but",
    other_lengths: r"tells the lengths of 59 rows, but .*t.zarr has 60; they do not belong toge",
    long_lengths: "row 0 has length 7; it must lie between 2 and the 6 columns",
    real_lengths: r"dtype float32; it should hold the lengths of rows \(rank 1, an integer dtype\)",
    missing: r"row \d+: columns \d+..\d+ cannot be read \(NOT_FOUND.*; copy or make the arra",
    few: "of 1 documents none fell to the",
    unfinished: "is not finished: it is being written, .*; give the same write_zarr command again",
    tokenized_otherwise: r"written with the tokenizer bpe-9-abc, but data.tokenizer='bytes' is by",
    of_other_shape: r"tells of 60 rows of 7, but .*t.zarr has 60 of 6; they do not belong together",
}


@pytest.mark.parametrize("make", BAD, ids=lambda f: f.__name__)
def test_arrays_that_cannot_be_used(tmp_path, make):
    make(tmp_path)
    with pytest.raises(DataError, match=BAD[make]) as error:
        opened(tmp_path / "t.zarr")
    assert str(tmp_path) in str(error.value)


def test_a_manifest_of_the_array_is_taken(tmp_path):
    manifest(tmp_path)
    first = opened(tmp_path / "t.zarr").sha256
    manifest(tmp_path, arrays={"t.zarr": {"rows": 60, "sha256": ["ab"]}})
    assert opened(tmp_path / "t.zarr").sha256 != first


def test_other_mistakes(tmp_path, array):
    with pytest.raises(DataError, match=r"data.split='folder': rows of token arrays have no folde"):
        opened(array, split="folder")
    with pytest.raises(DataError, match="holds no zarr array"):
        opened(array, heldout_source=str(tmp_path / "nowhere"))
    with pytest.raises(
        DataError, match=r"Invalid kvstore URL.*use a folder or a gs:// or s3:// URL"
    ):
        opened("gs://b")
    with pytest.raises(DataError, match=r"ftp://.*; use a folder or a gs:// or s3:// URL"):
        opened("ftp://host/tokens")


def test_an_id_outside_is_named_when_it_is_read(tmp_path):
    """Where the sample of the hash does not meet it."""
    values = ids(2000, 300)
    values[1234, 257] = 999
    corpus = opened(store_array(tmp_path / "t.zarr", values, (100, 300)), heldout_percent=1)
    message = (
        r"t.zarr, row 1234, column 257 holds the id 999, but data.tokenizer='bytes' has 0..256"
    )
    dataset = Dataset(corpus, 100)
    with pytest.raises(DataError, match=message):
        for batch in take(train_batches(dataset, batch_size=200, seed=0), len(dataset) // 200):
            assert batch.mask_BxT.all() or not batch.mask_BxT.all()
    with pytest.raises(DataError, match=message):
        corpus.tokens_of(corpus.documents[1234])


def test_a_chunk_that_is_lost_later_is_no_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(token_zarr, "CACHE_BYTES", (0, 0))
    corpus = opened(store_array(tmp_path / "t.zarr", ids(60, 64), (1, 64), version=2))
    (tmp_path / "t.zarr" / "17.0").unlink()
    with pytest.raises(
        DataError, match=r"t.zarr, row 17: columns 0..63 cannot be read \(NOT_FOUND"
    ):
        for document in corpus.documents:
            corpus.tokens_of(document)


@pytest.mark.parametrize("lost, words", [
    (["1.1"], r"1 chunks are missing .*, first that of rows 20\.\.39 from column 4 on; copy "),
    (["2.0", "2.1", "2.2"], r"first that of rows 40\.\.59 from column 0 on"),
])  # fmt: skip
def test_a_copy_in_part_is_no_padding(tmp_path, lost, words):
    """Where missing chunks are filled: all of a row's are gone, or one before others."""
    place = store_array(tmp_path / "t.zarr", ids(60, 12) | 1, (20, 4), version=2)
    opened(place, missing_chunks="fill")
    for name in lost:
        (place / name).unlink()
    with pytest.raises(DataError, match=words):
        opened(place, missing_chunks="fill")


def test_rows_that_the_metadata_makes_up_are_not_filled_in(tmp_path):
    """However many: memory is of the chunks that there are."""
    place = store_array(tmp_path / "t.zarr", ids(60, 12), (20, 4), version=2)
    change(place / ".zarray", shape=[2**40, 12])
    words = (
        r"54975581386 chunks are missing .*, first that of rows 60\.\.79 from column 0 on; copy "
    )
    with pytest.raises(DataError, match=words):
        opened(place, missing_chunks="fill")


def test_without_a_fill_value_there_is_nothing_to_fill_in(tmp_path):
    place = store_array(tmp_path / "t.zarr", ids(60, 12), version=2)
    metadata = json.loads((place / ".zarray").read_text())
    (place / ".zarray").write_text(json.dumps(metadata | {"fill_value": None}))
    with pytest.raises(DataError, match=r"names no fill value, so that data.missing_chunks"):
        opened(place, missing_chunks="fill")


def test_the_command_says_what_is_wrong_before_anything_is_made(tmp_path, capsys):
    vocabulary(tmp_path)
    work = tmp_path / "work"
    begin = time.monotonic()
    assert run.main(["--config=configs/quickstart.py", f"--workdir={work}",
                     f"--config.data.source={tmp_path / 't.zarr'}"]) == 2  # fmt: skip
    assert time.monotonic() - begin < 20 and not work.exists()
    assert "error: " in (error := capsys.readouterr().err) and "holds the id 300" in error


CODE = """
    import sys, numpy as np
    from spire_jax.config.schema import DataConfig
    from spire_jax.data import zarr_store
    from spire_jax.data.sources import DataError, load_corpus
    zarr_store.SECONDS = float(sys.argv[2])
    try:
        corpus = load_corpus(DataConfig(source=sys.argv[1], heldout_percent=30))
    except DataError as error:
        print(f"DataError: {error}")
    else:
        print(corpus.sha256, sum(int(corpus.tokens_of(d).sum()) for d in corpus.documents))
"""


def read_in_process(source, environment, seconds=30):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE), source, str(seconds)],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_array_in_a_bucket(tmp_path):
    values = ids(60, 12)
    place = store_array(tmp_path / "train.zarr", values, (7, 5), version=2)
    with bucket() as served:
        for path in place.iterdir():
            served.objects[f"some/where/train.zarr/{path.name}"] = path.read_bytes()
            served.generations[f"some/where/train.zarr/{path.name}"] = 1
        for source in ("gs://bucket/some/where", "gs://bucket/some/where/train.zarr"):
            sha256, total = read_in_process(source, served.environment).split()
            assert sha256 == opened(place).sha256 and int(total) == values.sum()
        served.refused.add("GET")
        said = read_in_process("gs://bucket/some/where", served.environment)
        assert "gs://bucket/some/where/zarr.json: PERMISSION_DENIED: no permission" in said
    begin = time.monotonic()
    said = read_in_process("gs://bucket/some/where", served.environment, seconds=1)  # gone
    assert "no answer in 1 s; check that it can be read" in said
    assert time.monotonic() - begin < 15

"""Token arrays for tests: some as other libraries write them, and what write_zarr is run on."""

import contextlib
import json
import pathlib
import sys

import numpy as np
import tensorstore as ts
from corpora import names, words

from spire_jax.config.schema import DataConfig
from spire_jax.data import write_zarr
from spire_jax.data.sources import load_corpus

ROOT = pathlib.Path(write_zarr.__file__).parents[2]


def store_array(place, values, chunks=None, version=3):
    """A zarr array of values, as another library would write it."""
    chunks = list(chunks or values.shape)
    if version == 3:
        grid = {"name": "regular", "configuration": {"chunk_shape": chunks}}
        metadata = {"shape": values.shape, "data_type": values.dtype.name, "chunk_grid": grid}
    else:
        lz4 = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}
        metadata = {"shape": values.shape, "dtype": values.dtype.str, "chunks": chunks,
                    "compressor": lz4, "fill_value": 0}  # fmt: skip
    spec = {"driver": "zarr3" if version == 3 else "zarr", "metadata": metadata,
            "kvstore": {"driver": "file", "path": f"{place}/"}}  # fmt: skip
    ts.open(spec, create=True).result().write(values).result()
    return place


def ids(rows, width, seed=0, kind=np.uint16):
    return np.random.default_rng(seed).integers(0, 256, (rows, width)).astype(kind)


def opened(source, **values):
    return load_corpus(DataConfig(source=str(source), **{"heldout_percent": 30, **values}))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


# --- what write_zarr is run on ------------------------------------------------------------------


def texts(count, seed=0):
    """Files of 1 to 150 bytes that fall to both sides, a duplicate, and what is no text."""
    rng = np.random.default_rng(seed)
    train, heldout = names(False, count, 30), names(True, count // 3, 30)
    files = {n: words(i, int(rng.integers(1, 150))) for i, n in enumerate([*train, *heldout])}
    return files | {"zz": files[train[0]], "binary": b"\0", "empty": b""}


def write_lines(folder):
    """Three hundred lines of JSON of different lengths."""
    rng = np.random.default_rng(0)
    texts = [words(i, int(rng.integers(1, 90))).decode() + " é🐍"[: i % 4] for i in range(300)]
    path = folder / "pages.jsonl"
    path.write_text("".join(json.dumps({"id": i, "body": t}, ensure_ascii=i % 2 == 0) + "\n" * (
        1 + i % 3) for i, t in enumerate(texts)))  # fmt: skip
    return path, texts


def flags(source, out, **values):
    """Shards of four rows and blocks of 500 bytes, unless told otherwise."""
    given = {"row-tokens": 64, "heldout-percent": 30, "workers": 1, "shard-rows": 4,
             "block-bytes": 500, **values}  # fmt: skip
    return [f"--source={source}", f"--out={out}", *(f"--{k}={v}" for k, v in given.items())]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def command(*arguments):
    return [sys.executable, "-m", "spire_jax.data.write_zarr", *arguments]


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_after(monkeypatch, writes):
    """Within, the process dies after so many writes, of whatever kind; yields their count."""
    real, done = write_zarr.written, [0]

    @contextlib.contextmanager
    def counting(place):
        with real(place):
            yield
        done[0] += 1
        if done[0] == writes:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(write_zarr, "written", counting)
        try:
            yield done
        except Killed:
            assert done[0] == writes

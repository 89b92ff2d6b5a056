"""Pre-tokenized documents: 2-D zarr arrays of token ids, one long document a row.

The layout of LongCrawl64 (two zarr v2 arrays, `train.zarr` and `heldout.zarr`, of uint16 GPT-2 ids
in rows of 65,536) and of `write_zarr`, read row by row through TensorStore, from a disk or a
bucket. A row is a document to the pipeline. How many of its ids count says `train.lengths.zarr`,
beside the array; where there is none, all do. No id marks padding: any of them may be text.

Nothing is believed without need. What the metadata tells is checked when a corpus is opened, ids
when they are read. A chunk that is missing may be one of fill values alone, which zarr lets a
writer leave out, or one that was lost: an error, unless `data.missing_chunks` says that the writer
did so. Then, too, an array with holes that no padding leaves is refused.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Int, Integer, UInt64

from spire_jax.config.schema import DataConfig
from spire_jax.data import zarr_store
from spire_jax.data.corpus import Corpus, DataError, Documents, check_split
from spire_jax.data.tokenizer import Tokenizer, make_tokenizer
from spire_jax.data.zarr_store import asked, open_store, read_json, read_key, reason

TRAIN, HELDOUT = "train.zarr", "heldout.zarr"
MANIFEST = "manifest.json"  # what `write_zarr` wrote: counts, and hashes of all rows
UNFINISHED = ".progress/plan.json"  # is there while `write_zarr` writes
METADATA = ("zarr.json", ".zarray")  # of zarr v3 and v2
BAND_BYTES = 2**28  # of rows that are read together where chunks hold many
CACHE_BYTES = 2**28, 2**31  # least and most of decoded chunks that a process keeps
SAMPLES, SAMPLED = 32, 256  # pieces that a corpus's hash reads, and their tokens
MOST_CHUNK = 2**31  # bytes
MOST_IDS = 2**62  # of all arrays: what 64 bits can count, with room


# --- places --------------------------------------------------------------------------------------


def holds_arrays(source: str) -> bool:
    """Whether `data.source` means zarr arrays: a URL, an array, or a folder with `train.zarr`."""
    folder = pathlib.Path(source)
    inside = (*METADATA, TRAIN, UNFINISHED)
    return "://" in source or folder.suffix == ".zarr" or any((folder / n).exists() for n in inside)


# --- arrays --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RowArray:
    """One array of rows of token ids, as its metadata describes it."""

    place: str
    spec: dict[str, Any]  # by which TensorStore opens it
    rows: int
    width: int  # ids of a row
    itemsize: int  # bytes of an id
    chunk_rows: int  # rows that are decoded together

    @property
    def name(self) -> str:
        return self.place.rstrip("/").rpartition("/")[2]


def open_array(
    place: str, rank: int = 2, *, fill: bool = False
) -> tuple[ts.TensorStore, dict[str, Any]]:
    """A zarr array, v2 or v3, and the spec by which another process opens it again.

    Args:
        fill: read the fill value where a chunk is missing, which else is an error when it is read.

    Raises:
        DataError: there is none, it is still being written, or of another rank or of no integers.
    """
    store = open_store(place)
    metadata = read_json(store, METADATA[0])
    driver = "zarr3" if metadata is not None else "zarr"
    if metadata is None:
        metadata = read_json(store, METADATA[1])
    if metadata is None and read_key(store, ".zgroup") is None:
        raise DataError(
            f"{place} holds no zarr array ({' or '.join(METADATA)}); name an array, or a folder "
            f"with {TRAIN}, or make one with python -m spire_jax.data.write_zarr"
        )
    if metadata is None or metadata.get("node_type") == "group":
        raise DataError(f"{place} is a zarr group; name one of its arrays")
    spec = {
        "driver": driver,
        "kvstore": store.spec().to_json(),
        # What is opened does not change.
        "recheck_cached_metadata": "open",
        "recheck_cached_data": "open",
        "fill_missing_data_reads": fill,
    }
    if fill and metadata.get("fill_value") is None:
        raise DataError(f"{place} names no fill value, so that data.missing_chunks='fill' has "
                        f"nothing to fill in; make the array again with one")  # fmt: skip
    with asked(place, "the array cannot be opened; copy or make it again"):
        array = ts.open(spec, read=True).result(timeout=zarr_store.SECONDS)
    shape, kind = array.shape, np.dtype(array.dtype.numpy_dtype)
    if len(shape) != rank or kind.kind not in "iu" or 0 in shape:
        wanted = "rows of token ids (rank 2" if rank == 2 else "the lengths of rows (rank 1"
        raise DataError(f"{place} has shape {list(shape)} and dtype {array.dtype.name}; it should "
                        f"hold {wanted}, an integer dtype)")  # fmt: skip
    # What is decoded at once; where there is no memory for it, TensorStore ends the process.
    chunk = array.chunk_layout.read_chunk.shape or shape
    if math.prod(n or 1 for n in chunk) * kind.itemsize > MOST_CHUNK:
        raise DataError(f"{place} has chunks of {list(chunk)}, and more than {MOST_CHUNK} bytes; "
                        f"make it again with smaller ones")  # fmt: skip
    return array, spec


def _describe(place: str, fill: bool) -> RowArray:
    array, spec = open_array(place, fill=fill)
    rows, width = array.shape
    if width < 2:
        raise DataError(f"{place} has rows of {width} token; a row needs two or more")
    if rows * width >= MOST_IDS:
        raise DataError(f"{place} has the shape {[rows, width]}, more ids than there can be; copy "
                        f"the array again")  # fmt: skip
    # Before anything is made for as many rows as the metadata says.
    if fill:
        _check_holes(place, array)
    else:
        with _reading(place, rows - 1, 0, 1):
            array[rows - 1, 0].read().result(timeout=zarr_store.SECONDS)
    itemsize = np.dtype(array.dtype.numpy_dtype).itemsize
    chunk = array.chunk_layout.read_chunk.shape or ()
    return RowArray(place, spec, rows, width, itemsize, chunk[0] or rows)


def _check_holes(place: str, array: ts.TensorStore) -> None:
    """DataError for missing chunks that no writer leaves out: all of a row's, or before others.

    Padding stands at the end of rows. Asks for a list of all chunks, whose names end in i.j or i/j.
    """
    chunk = array.chunk_layout.write_chunk.shape or array.shape
    steps = [step or size for size, step in zip(array.shape, chunk, strict=True)]
    counts = [-(-size // step) for size, step in zip(array.shape, steps, strict=True)]
    with asked(place, "check that it can be listed"):
        keys = open_store(place).list().result(timeout=20 * zarr_store.SECONDS)
    there: dict[int, set[int]] = {}  # row -> columns, of chunks
    for key in keys:
        if found := re.search(rb"(\d{1,19})[./](\d{1,19})$", key):
            row, column = int(found[1]), int(found[2])
            if row < counts[0] and column < counts[1]:
                there.setdefault(row, set()).add(column)
    lost = counts[0] - len(there) + sum(max(of) + 1 - len(of) for of in there.values())
    if lost:
        row = next(i for i in range(counts[0]) if max(there.get(i, ()), default=0) + 1
                   > len(there.get(i, ())))  # fmt: skip
        column = next(i for i in range(counts[1]) if i not in there.get(row, ()))
        rows = f"{row * steps[0]}..{min((row + 1) * steps[0], array.shape[0]) - 1}"
        raise DataError(f"{place}: {lost} chunks are missing that no padding leaves out, "
                        f"first that of rows {rows} from column {column * steps[1]} on; copy the "
                        f"array again")  # fmt: skip


@contextlib.contextmanager
def _reading(place: str, row: int, begin: int, end: int) -> Iterator[None]:
    """A DataError that says which ids were to be read for whatever TensorStore raises."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        remedy = "copy or make the array again"
        if str(error).startswith("NOT_FOUND"):
            remedy += (", or set data.missing_chunks='fill' if its writer leaves out chunks of "
                       "fill values alone, as zarr-python does")  # fmt: skip
        raise DataError(f"{place}, row {row}: columns {begin}..{end - 1} cannot be read "
                        f"({reason(error)}); {remedy}") from error  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class ZarrTokens:
    """The ids of arrays, row after row, as if they were one: reads the pieces it is asked for.

    A piece is of one row: token c of row r of an array with w columns is at `first + r * w + c`.
    Arrays are opened when a process first reads.
    """

    arrays: tuple[RowArray, ...]
    firsts: tuple[int, ...]  # where each array begins
    n_tokens: int  # ids that there are
    tokenizer: str  # ... and whose they are, for messages
    cache_bytes: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.n_tokens <= 2**16 else np.int32)

    @functools.cached_property
    def _opened(self) -> list[ts.TensorStore]:
        context = ts.Context({"cache_pool": {"total_bytes_limit": self.cache_bytes}})
        futures = [ts.open(a.spec, read=True, context=context) for a in self.arrays]
        return [future.result() for future in futures]

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __getitem__(self, piece: slice) -> Integer[np.ndarray, " n"]:
        """The ids of a piece of one row.

        Raises:
            DataError: they cannot be read, or one of them is none of the tokenizer's.
        """
        which = sum(first <= piece.start for first in self.firsts) - 1
        array = self.arrays[which]
        row, begin = divmod(piece.start - self.firsts[which], array.width)
        end = begin + piece.stop - piece.start
        if not begin <= end <= array.width or row >= array.rows:
            raise IndexError(f"{piece} is no piece of a row of {array.place}")
        with _reading(array.place, row, begin, end):
            ids = self._opened[which][row, begin:end].read().result()
        outside = (ids < 0) | (ids >= self.n_tokens)
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            raise DataError(
                f"{array.place}, row {row}, column {begin + at} holds the id {ids[at]}, but "
                f"data.tokenizer={self.tokenizer!r} has 0..{self.n_tokens - 1}; name the tokenizer "
                f"that the array was made with"
            )
        return ids.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class RowNames(Sequence[str]):
    """Names of rows, array after array, made when they are asked for."""

    arrays: tuple[RowArray, ...]

    def __len__(self) -> int:
        return sum(array.rows for array in self.arrays)

    def __getitem__(self, index):
        for array in self.arrays:
            if index < array.rows:
                return f"{array.name} row {index}"
            index -= array.rows
        raise IndexError(index)


# --- a corpus ------------------------------------------------------------------------------------


def open_corpus(config: DataConfig) -> Corpus:
    """The rows of `data.source`, a training array and a held-out one, or one that is split.

    The one array is split by a hash of the row numbers (`data.heldout_percent`).

    Raises:
        DataError: arrays that are missing, unfinished, of another rank, dtype, shape or tokenizer
            than they should be; rows that cannot be read; no answer from a bucket.
    """
    if config.split != "file":
        raise DataError(f"data.split={config.split!r}: rows of token arrays have no folders; "
                        f"use 'file'")  # fmt: skip
    tokenizer = make_tokenizer(config.tokenizer)
    places = _places(config)
    fill = config.missing_chunks == "fill"
    arrays = tuple(_describe(place, fill) for place in places)
    lengths = [_lengths(array, fill) for array in arrays]
    hashes = [_hashes(array, tokenizer, config.tokenizer) for array in arrays]
    sizes = [array.rows * array.width for array in arrays]
    firsts = (0, *np.cumsum(sizes)[:-1].tolist())
    band = _band_rows(arrays[0]) * arrays[0].width
    least, most = CACHE_BYTES
    bands = 9 * band * arrays[0].itemsize // 4  # one that ends, one that begins, and how both fit
    cache = min(max(least, bands), most)
    tokens = ZarrTokens(arrays, firsts, tokenizer.n_tokens, config.tokenizer, cache)

    begins = [first + np.arange(a.rows) * a.width for first, a in zip(firsts, arrays, strict=True)]
    if len(arrays) == 2:
        sides = [np.full(arrays[0].rows, False), np.full(arrays[1].rows, True)]
    else:
        sides = [_drawn(np.arange(arrays[0].rows)) % 100 < config.heldout_percent]
    heldout, begin = np.concatenate(sides), np.concatenate(begins)
    check_split(heldout, config)
    counted = np.concatenate(lengths)
    columns = Documents(RowNames(arrays), np.arange(len(begin)), heldout, begin, begin + counted,
                        np.zeros(len(begin), np.int64))  # fmt: skip
    sha256 = hashlib.sha256(f"{tokenizer.name}\0{len(arrays)}\0".encode())
    if len(arrays) == 1:
        sha256.update(f"{config.heldout_percent}\0".encode())
    for array, first, of, written in zip(arrays, firsts, lengths, hashes, strict=True):
        sha256.update(f"{array.rows} {array.width}\0".encode() + of.astype("<i8").tobytes())
        sha256.update(json.dumps(written).encode())
        sha256.update(_sample(tokens, first, array.width, of))
    about = {f"{name}_tokens": int(counted[heldout == side].sum())
             for name, side in (("train", False), ("heldout", True))}  # fmt: skip
    return Corpus(config.source, columns, tokens, sha256.hexdigest(), tokenizer, band=band,
                  about=about)  # fmt: skip


def _places(config: DataConfig) -> list[str]:
    """The training array and, where there is one, the held-out one."""
    source = _whole(config.source)
    if config.heldout_source:
        return [source, _whole(config.heldout_source)]
    train, heldout = f"{source}/{TRAIN}", f"{source}/{HELDOUT}"
    if _is_array(source) or not _is_array(train):
        _check_finished(source)
        return [source]
    return [train, heldout] if _is_array(heldout) else [train]


def _whole(place: str) -> str:
    """A place by its whole path, so that it has a folder."""
    if "://" not in place:
        place = str(pathlib.Path(place).absolute())
    return place.rstrip("/")


def _is_array(place: str) -> bool:
    store = open_store(place)
    return any(read_key(store, name) is not None for name in METADATA)


def _check_finished(folder: str) -> None:
    if read_key(open_store(folder), UNFINISHED) is not None:
        raise DataError(f"{folder} is not finished: it is being written, or that was interrupted; "
                        f"give the same write_zarr command again")  # fmt: skip


def _beside(place: str, name: str) -> str:
    return f"{place.rstrip('/').rpartition('/')[0]}/{name}"


def lengths_name(name: str) -> str:
    """The array of lengths that belongs to an array of rows."""
    return f"{name.removesuffix('.zarr')}.lengths.zarr"


def _lengths(array: RowArray, fill: bool) -> Int[np.ndarray, " rows"]:
    """Ids of each row that count."""
    place = _beside(array.place, lengths_name(array.name))
    _check_finished(_beside(array.place, ""))
    if not _is_array(place):
        return np.full(array.rows, array.width)
    stored, _ = open_array(place, rank=1, fill=fill)
    with asked(place, "copy or make the arrays again"):
        lengths = stored.read().result(timeout=2 * zarr_store.SECONDS).astype(np.int64)
    if len(lengths) != array.rows:
        raise DataError(f"{place} tells the lengths of {len(lengths)} rows, but {array.place} has "
                        f"{array.rows}; they do not belong together")  # fmt: skip
    bad = np.flatnonzero((lengths < 2) | (lengths > array.width))
    if len(bad):
        raise DataError(f"{place}: row {bad[0]} has length {lengths[bad[0]]}; it must lie between "
                        f"2 and the {array.width} columns of {array.place}")  # fmt: skip
    return lengths


def _hashes(array: RowArray, tokenizer: Tokenizer, named: str) -> Any:
    """The hashes that `write_zarr` wrote of the array, None if it did not write it.

    DataError if it tells of another array, or if that is not how it writes.
    """
    place = _beside(array.place, MANIFEST)
    manifest = read_json(open_store(_beside(array.place, "")), MANIFEST) or {}
    try:
        about = manifest.get("arrays", {}).get(array.name)
        if about is None:
            return None
        theirs, hashes = manifest["tokenizer"], about["sha256"]
        rows, width = about["rows"], manifest["row_tokens"]
    except (AttributeError, KeyError, TypeError):
        raise DataError(f"{place} is not as write_zarr writes it; copy it again, or move it away "
                        f"to read the arrays without it") from None  # fmt: skip
    if theirs != tokenizer.name:
        raise DataError(f"{array.place} was written with the tokenizer {theirs!s:.100}, but "
                        f"data.tokenizer={named!r} is {tokenizer.name}; name the other "
                        f"one")  # fmt: skip
    if [rows, width] != [array.rows, array.width]:
        raise DataError(f"{place} tells of {rows!r:.50} rows of {width!r:.50}, but {array.place} "
                        f"has {array.rows} of {array.width}; they do not belong "
                        f"together")  # fmt: skip
    return hashes


def _band_rows(array: RowArray) -> int:
    """Rows to be read together: as many whole chunks as fit into `BAND_BYTES`; 0 if in any order.

    Chunks of one row each are as well read in any order.
    """
    if array.chunk_rows == 1:
        return 0
    chunks = BAND_BYTES // (array.itemsize * array.width * array.chunk_rows)
    return max(chunks, 1) * array.chunk_rows


def _drawn(numbers: Integer[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """A random 64-bit number for each, the same always (the finalizer of splitmix64)."""
    x = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _sample(tokens: ZarrTokens, first: int, width: int, lengths: Int[np.ndarray, " rows"]) -> bytes:
    """Pieces of an array's rows, the same always: what of terabytes a hash can read."""
    drawn = _drawn(np.arange(2 * SAMPLES))
    rows = (drawn[:SAMPLES] % np.uint64(len(lengths))).astype(np.int64)
    pieces = -(-lengths[rows] // SAMPLED)
    begins = (drawn[SAMPLES:] % pieces.astype(np.uint64)).astype(np.int64) * SAMPLED
    ends = np.minimum(begins + SAMPLED, lengths[rows])
    at = first + rows * width
    spans = zip((at + begins).tolist(), (at + ends).tolist(), strict=True)
    with concurrent.futures.ThreadPoolExecutor(SAMPLES) as threads:
        read = threads.map(lambda span: tokens[span[0] : span[1]].astype("<i4").tobytes(), spans)
        return b"".join(read)

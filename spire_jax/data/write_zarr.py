"""Tokenize a folder of text, or JSONL, into zarr arrays of rows, which token_zarr.py reads.

    python -m spire_jax.data.write_zarr --source=texts --tokenizer=data/python_bpe_4096.json \\
        --out=runs/tokens --row-tokens=65536
    python -m spire_jax.data.write_zarr --source=pages.jsonl --field=text --out=gs://bucket/tokens

OUT gets `train.zarr` and `heldout.zarr` (zarr v3, sharded), the lengths of their rows, and
`manifest.json` with counts and a hash of every shard. A document is ended by the separator; what
goes beyond a row is continued in the next one, and a piece of fewer than --min-tokens is left out.
Exact duplicates are left out, as from a folder of text, and files are split as there; lines of
JSONL by the hash of their text. The same command goes on where an interruption, of whatever kind,
left it, and ends with the same bytes, whatever --workers is. What is not complete is not read.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Integer

from spire_jax.config.files import in_words
from spire_jax.config.identity import differences, digest
from spire_jax.config.paths import local, path_or_url
from spire_jax.config.schema import BYTES, ConfigError
from spire_jax.data.corpus import DataError
from spire_jax.data.token_zarr import HELDOUT, MANIFEST, TRAIN, UNFINISHED, lengths_name
from spire_jax.data.tokenizer import make_tokenizer
from spire_jax.data.tokenizing import Plan, Source, Tokenized, Tokenizing, find_text, tokenized
from spire_jax.data.zarr_store import SECONDS, asked, open_store, read_json, read_key
from spire_jax.pretrained import PretrainedError
from spire_jax.storage.metrics import Progress

PROGRESS = UNFINISHED.split("/")[0]
STATE, OWNER = f"{PROGRESS}/state.json", f"{PROGRESS}/owner"
CHUNK_TOKENS = 2**13  # that are compressed together: what a read decodes
CRC = {"name": "crc32c"}
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
COMPRESSED = [LITTLE, {"name": "zstd", "configuration": {"level": 3}}, CRC]
TRIED = 4, 2**20  # pieces of the text, and their bytes, from which an estimate is made
WRITING = 600.0  # seconds in which a shard must be written
LEFT_OUT = ("duplicates", "not_text", "empty", "short")


class Rows:
    """One array in the making: rows fill a buffer, and a full buffer becomes a shard."""

    def __init__(self, store: ts.KvStore, name: str, plan: Plan, dtype: np.dtype[Any]):
        self._store, self._name, self._plan = store, name, plan
        self._buffer = np.zeros((plan.rows_per_shard, plan.row_tokens), dtype)
        self._lengths = np.zeros(plan.rows_per_shard, np.int32)
        self._filled = 0
        self.shards: list[tuple[bytes, np.ndarray]] = []  # hash and lengths of each
        self.counts = {"documents": 0, "bytes": 0, "tokens": 0}

    @property
    def rows(self) -> int:
        return sum(len(lengths) for _, lengths in self.shards) + self._filled

    def add(self, tokens: Integer[np.ndarray, " n"], n_bytes: int) -> bool:
        """Append a document; False if it is too short."""
        width, used = self._plan.row_tokens, 0
        for begin in range(0, len(tokens), width):
            piece = tokens[begin : begin + width]
            if len(piece) < self._plan.min_tokens:
                break
            self._buffer[self._filled, : len(piece)] = piece
            self._lengths[self._filled] = len(piece)
            self._filled += 1
            used += len(piece)
            if self._filled == len(self._buffer):
                self.flush()
        self.counts["documents"] += used > 0
        self.counts["bytes"] += n_bytes if used else 0
        self.counts["tokens"] += used
        return used > 0

    def flush(self) -> None:
        """Write what the buffer holds as a shard, then its hash and lengths."""
        if not self._filled:
            return
        number, lengths = len(self.shards), self._lengths[: self._filled].copy()
        rows, begin = self._buffer[: self._filled], number * len(self._buffer)
        array = self._open(2**40, made=False)  # it grows
        with written(f"{self._store.url}{self._name}"):
            array[begin : begin + len(rows)].write(rows).result(timeout=WRITING)
        content = hashlib.sha256(lengths.astype("<i4").tobytes())
        content.update(rows.astype(rows.dtype.newbyteorder("<")).tobytes())
        self.shards.append((content.digest(), lengths))
        record = content.digest() + lengths.astype("<i4").tobytes()
        write_key(self._store, f"{PROGRESS}/{self._name}/{number:08}", record)
        self._buffer[:] = 0
        self._filled = 0

    def _open(self, rows: int, *, made: bool) -> ts.TensorStore:
        """The array with so many rows; if it is made, everyone can see that it is there."""
        width = self._plan.row_tokens
        inner = min(CHUNK_TOKENS, width)
        codecs = {"chunk_shape": [1, inner], "codecs": COMPRESSED, "index_codecs": [LITTLE, CRC]}
        shard = [self._plan.rows_per_shard, -(-width // inner) * inner]  # whole chunks
        metadata = {
            "shape": [rows, width],
            "data_type": self._buffer.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "codecs": [{"name": "sharding_indexed", "configuration": codecs}],
            "fill_value": 0,
        }
        return self._array(self._name, metadata, made)

    def _array(self, name: str, metadata: dict[str, Any], made: bool) -> ts.TensorStore:
        store = (self._store / f"{name}/").spec().to_json()
        spec = {"driver": "zarr3", "kvstore": store, "metadata": metadata,
                "store_data_equal_to_fill_value": True}  # fmt: skip
        with written(f"{self._store.url}{name}"):
            opened = ts.open(spec, open=True, create=made, assume_metadata=not made)
            return opened.result(timeout=SECONDS)

    def finish(self) -> dict[str, Any]:
        """Write the last shard, the lengths and, last, what makes it an array; what it holds."""
        self.flush()
        lengths = np.concatenate([lengths for _, lengths in self.shards])
        chunk = {"name": "regular", "configuration": {"chunk_shape": [min(len(lengths), 2**20)]}}
        metadata = {"shape": [len(lengths)], "data_type": "int32", "chunk_grid": chunk,
                    "codecs": COMPRESSED, "fill_value": 0}  # fmt: skip
        name = lengths_name(self._name)
        array = self._array(name, metadata, True)
        with written(f"{self._store.url}{name}"):
            array.write(lengths).result(timeout=WRITING)
        self._open(len(lengths), made=True)
        hashes = [content.hex() for content, _ in self.shards]
        return {"rows": len(lengths), **self.counts, "rows_per_hash": self._plan.rows_per_shard,
                "sha256": hashes}  # fmt: skip

    def keep(self, block: int) -> dict[str, Any]:
        """Write what the buffer holds under a block's number; what `resume` needs to know."""
        content = self._lengths[: self._filled].tobytes() + self._buffer[: self._filled].tobytes()
        write_key(self._store, self._kept(block), content)
        return {"shards": len(self.shards), "filled": self._filled, "counts": self.counts}

    def resume(self, block: int, kept: dict[str, Any]) -> None:
        """Go on from what `keep` wrote and returned."""
        keys = [f"{PROGRESS}/{self._name}/{number:08}" for number in range(kept["shards"])]
        with asked(self._store.url, "start anew in another --out"):
            records = [f.result(timeout=WRITING).value for f in map(self._store.read, keys)]
        for record in records:
            self.shards.append((record[:32], np.frombuffer(record[32:], "<i4")))
        filled = self._filled = kept["filled"]
        self.counts = kept["counts"]
        content = read_key(self._store, self._kept(block)) or b""
        self._lengths[:filled] = np.frombuffer(content[: 4 * filled], np.int32)
        rows = np.frombuffer(content[4 * filled :], self._buffer.dtype)
        self._buffer[:filled] = rows.reshape(filled, self._plan.row_tokens)

    def _kept(self, block: int) -> str:
        return f"{PROGRESS}/{self._name}/buffer-{block}"

    def forget(self, block: int) -> None:
        """Remove what an earlier `keep` wrote."""
        with written(self._store.url):
            self._store.write(self._kept(block), None).result(timeout=SECONDS)


class Writer:
    """All arrays in the making, and how far they are.

    The state names blocks of text that are written to the end; it is replaced as a whole, after
    what it stands on. A kill costs what came after it.
    """

    def __init__(self, store: ts.KvStore, plan: Plan, dtype: np.dtype[Any]):
        self._store, self._plan = store, plan
        names = [TRAIN, HELDOUT] if plan.heldout_percent else [TRAIN]
        self.arrays = {name: Rows(store, name, plan, dtype) for name in names}
        self.left_out = dict.fromkeys(LEFT_OUT, 0)
        self._seen: set[bytes] = set()
        self._new: list[bytes] = []  # seen since the state was written
        self._saved = self._kept_seen = 0  # blocks, and hashes, that the state knows of
        self._me = uuid.uuid4().bytes
        write_key(store, OWNER, self._me)
        state = read_json(store, STATE)
        if state is None:
            return
        self._saved, self._kept_seen = state["block"], state["seen"]
        self.left_out = state["left_out"]
        for name, kept in state["arrays"].items():
            self.arrays[name].resume(self._saved, kept)
        self._seen = self._read_seen(state["seen"])

    @property
    def block(self) -> int:
        """Blocks of text that need not be read again."""
        return self._saved

    def add(self, block: int, done: Tokenized) -> None:
        """Write the documents of one block, the next one."""
        shards = self._shards()
        self.left_out["not_text"] += done.not_text
        self.left_out["empty"] += done.empty
        columns = (done.tokens, done.heldout, done.n_bytes, done.digests)
        for tokens, heldout, n_bytes, content in zip(*columns, strict=True):
            if not self._plan.keep_duplicates:
                if content in self._seen:
                    self.left_out["duplicates"] += 1
                    continue
                self._seen.add(content)
                self._new.append(content)
            array = self.arrays[HELDOUT if heldout else TRAIN]
            self.left_out["short"] += not array.add(tokens, n_bytes)
        if self._shards() > shards:
            self._save(block + 1)

    def _shards(self) -> int:
        return sum(len(array.shards) for array in self.arrays.values())

    def _save(self, block: int) -> None:
        if read_key(self._store, OWNER) != self._me:
            raise DataError(f"{self._store.url} is now written by another process; this one stops")
        kept = {name: array.keep(block) for name, array in self.arrays.items()}
        if self._new:
            key = f"{PROGRESS}/seen/{self._kept_seen:012}"
            write_key(self._store, key, b"".join(self._new))
        before, self._saved = self._saved, block
        self._kept_seen, self._new = self._kept_seen + len(self._new), []
        state = {"block": block, "seen": self._kept_seen, "left_out": self.left_out, "arrays": kept}
        write_key(self._store, STATE, json.dumps(state).encode())
        for array in self.arrays.values():
            array.forget(before)

    def _read_seen(self, count: int) -> set[bytes]:
        """The hashes of documents before the state: parts, each named by its first one's number.

        A part that a kill left behind without a state is as the beginning of its successor.
        """
        room = bytearray(16 * count)
        prefix = f"{PROGRESS}/seen/"
        keys = ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")  # "0" comes after "/"
        with asked(self._store.url, "start anew in another --out"):
            names = sorted(self._store.list(keys).result(timeout=WRITING))
            parts = [f.result(timeout=WRITING).value for f in map(self._store.read, names)]
        for name, part in zip(names, parts, strict=True):
            at = 16 * int(name.decode().removeprefix(prefix))
            room[at : at + len(part)] = part
        return {bytes(room[i : i + 16]) for i in range(0, 16 * count, 16)}

    def finish(self, tokenizer: str, made_from: str) -> dict[str, Any]:
        """Write what is left and the manifest, and remove the state; the manifest."""
        for name, array in self.arrays.items():
            if not array.rows:
                raise DataError(f"no document fell to {name}; give more text, another "
                                f"--heldout-percent, or fewer --min-tokens")  # fmt: skip
        manifest = {
            "tokenizer": tokenizer,
            "row_tokens": self._plan.row_tokens,
            "left_out": self.left_out,
            "arrays": {name: array.finish() for name, array in self.arrays.items()},
            "made_from": made_from,
        }
        write_key(self._store, MANIFEST, json.dumps(manifest, indent=1).encode())
        remove_progress(self._store)
        return manifest


def write_key(store: ts.KvStore, key: str, content: bytes) -> None:
    """Write a key as a whole; DataError if that cannot be done, or takes too long."""
    with written(store.url + key):
        store.write(key, content).result(timeout=SECONDS)


def written(place: str) -> contextlib.AbstractContextManager[None]:
    """A DataError for what cannot be written."""
    return asked(place, "check that it can be written and that there is room; the same command "
                        "goes on")  # fmt: skip


def remove_progress(store: ts.KvStore) -> None:
    """Remove the state; what says that the arrays are unfinished goes last."""
    with written(store.url):
        middle, end = f"{PROGRESS}/plan.json", f"{PROGRESS}0"
        for keys in ((f"{PROGRESS}/", middle), (middle + "\0", end), (middle, middle + "\0")):
            store.delete_range(ts.KvStore.KeyRange(*keys)).result(timeout=WRITING)
    if store.spec().to_json()["driver"] == "file":
        shutil.rmtree(pathlib.Path(store.path) / PROGRESS, ignore_errors=True)


# --- the command ---------------------------------------------------------------------------------


def claim(store: ts.KvStore, values: dict[str, Any]) -> dict[str, Any] | None:
    """Begin or go on in `store`; the manifest if all is done there.

    Args:
        values: what the arrays are made from.

    Raises:
        DataError: something else is there, or it cannot be written.
    """
    begun, manifest = read_json(store, UNFINISHED), read_json(store, MANIFEST)
    if manifest is not None and manifest.get("made_from") == digest(values):
        remove_progress(store)
        return manifest
    if begun is None:
        with asked(store.url, "check that it can be read"):
            found = store.list().result(timeout=SECONDS)
        if found:
            raise DataError(f"{store.url} holds something else ({found[0].decode()!r}"
                            f"{', ...' * (len(found) > 1)}); name an empty --out")  # fmt: skip
        write_key(store, UNFINISHED, json.dumps(values).encode())
    elif begun != values:
        raise DataError(f"{store.url} was begun with {differences(begun, values)}; give the same "
                        f"again, or name another --out")  # fmt: skip
    return None


@contextlib.contextmanager
def only_one(store: ts.KvStore) -> Iterator[None]:
    """Hold a local folder; in a bucket the last one that comes goes on (`Writer`)."""
    if store.spec().to_json()["driver"] != "file":
        yield
        return
    folder = pathlib.Path(store.path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({error.strerror}); name another --out") from None
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder} is being written by another process; wait for it, or name "
                            f"another --out") from None  # fmt: skip
        yield
    finally:
        os.close(held)


def estimate(plan: Plan, source: Source) -> str:
    """What would be written, from a few pieces of the text; duplicates are not looked for."""
    tokenize, (pieces, most) = Tokenizing(plan, source.root), TRIED
    count = len(source.blocks)
    chosen = [source.blocks[i] for i in sorted({i * count // pieces for i in range(pieces)})]
    tried = [block.head(most) for block in chosen]
    documents = [tokens for block in tried for tokens in tokenize(block).tokens]
    read = sum(block.n_bytes for block in tried)
    scale = source.n_bytes / max(read, 1)
    full = sum(len(tokens) // plan.row_tokens for tokens in documents)
    rows = full + sum(len(t) % plan.row_tokens >= plan.min_tokens for t in documents)
    tokens, rows = (round(scale * n) for n in (sum(map(len, documents)), rows))
    size = rows * plan.row_tokens * tokenize.dtype.itemsize
    about = "" if read == source.n_bytes else "about "
    return (f"{source.n_bytes / 1e6:,.1f} MB of text: {about}{tokens:,} tokens, {rows:,} rows of "
            f"{plan.row_tokens:,}, {plan.heldout_percent}% of the documents held out; at most "
            f"{size / 1e6:,.1f} MB before compression")  # fmt: skip


def write(plan: Plan, out: str, workers: int) -> dict[str, Any]:
    """Write the arrays of `plan` into the folder or bucket prefix `out`; the manifest.

    Raises:
        DataError: text that cannot be used, a place that cannot be written or holds something
            else, another writer.
    """
    source, store = find_text(plan), open_store(out)
    tokenizer = make_tokenizer(plan.tokenizer)
    values = {**dataclasses.asdict(plan), "tokenizer": tokenizer.name, "text": source.sha256}
    del values["source"]
    with only_one(store):
        manifest = claim(store, values)
        if manifest is not None:
            return manifest
        writer = Writer(store, plan, Tokenizing(plan, source.root).dtype)
        sizes = [block.n_bytes / 1e6 for block in source.blocks]
        done, left = sum(sizes[: writer.block]), source.blocks[writer.block :]
        with Progress("MB of text", round(sum(sizes)), round(done), show=True) as progress:
            for number, block in enumerate(tokenized(plan, source, left, workers), writer.block):
                writer.add(number, block)
                done += sizes[number]
                progress.update(round(done))
        return writer.finish(tokenizer.name, digest(values))


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    name = "python -m spire_jax.data.write_zarr"
    parser = argparse.ArgumentParser(name, None, __doc__, formatter_class=raw)
    of, usual = parser.add_argument, Plan("")
    of("--source", type=local, required=True, help="a folder of text, a .jsonl file or, with "
       "--field, a folder of them; or stdlib")  # fmt: skip
    of("--out", type=path_or_url, required=True, help="an empty folder, or a gs:// or s3:// URL")
    of("--tokenizer", type=local, default=BYTES, help="as data.tokenizer (default: %(default)s)")
    of("--field", default="", help="where a line of JSONL has its text (text)")
    of("--row-tokens", type=int, default=usual.row_tokens, help="of a row (%(default)s)")
    of("--min-tokens", type=int, default=usual.min_tokens, help="of a row or more, the separator "
       "included; shorter documents and remainders are left out (%(default)s)")  # fmt: skip
    of("--heldout-percent", type=int, default=usual.heldout_percent, help="(%(default)s)")
    of("--split", default=usual.split, choices=["file", "folder"], help="as data.split")
    of("--shard-rows", type=int, default=usual.shard_rows, help="of a file; 0 = about 32 MB")
    of("--block-bytes", type=int, default=usual.block_bytes, help="of text, read at a time")
    of("--keep-duplicates", action="store_true", help="do not remember 16 bytes of every document")
    of("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    of("--dry-run", action="store_true", help="say how much it will write, and write nothing")
    args = vars(parser.parse_args(argv))
    out, workers, dry_run = args.pop("out"), args.pop("workers"), args.pop("dry_run")
    args["field"] = args["field"] or ("text" if args["source"].endswith(".jsonl") else "")
    try:
        plan = Plan(**args)
        plan.check()
        if workers < 1:
            raise DataError(f"--workers={workers}: give 1 or more")
        if dry_run:
            print(f"{out}: {estimate(plan, find_text(plan))}")
            return 0
        manifest = write(plan, out, workers)
    except (ConfigError, DataError, PretrainedError, OSError, MemoryError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    for array, about in manifest["arrays"].items():
        print(f"{out}/{array}: {about['documents']:,} documents, {about['tokens']:,} tokens in "
              f"{about['rows']:,} rows")  # fmt: skip
    left_out = ", ".join(
        f"{n} {kind.replace('_', ' ')}" for kind, n in manifest["left_out"].items()
    )
    print(f"left out: {left_out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

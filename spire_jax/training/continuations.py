"""Training rows that the frozen target writes itself, from the beginnings of training documents.

A draft is to predict what the target writes, and a pretrained target writes other text than the
corpus at hand. The rows are written once, to a token array in the work directory; every row has a
prompt and a random seed of its own, so that an interrupted run goes on after the last whole batch
of rows and ends with the same array.
"""

import json
import os
import zlib
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Int, Integer

from spire_jax.config.schema import AUTOREGRESSIVE, ConfigError, ExperimentConfig
from spire_jax.data.corpus import Corpus, Documents
from spire_jax.data.pipeline import WrittenRows, begun
from spire_jax.data.tokenizer import end_tokens
from spire_jax.decoding import Weights, generate
from spire_jax.decoding.build import make_decoder
from spire_jax.models.sampling import Sampling
from spire_jax.models.transformer import Params
from spire_jax.storage.bucket import in_bucket, watched
from spire_jax.storage.metrics import Progress, write_whole
from spire_jax.storage.paths import Place, read_record
from spire_jax.storage.processes import is_first, to_host

TOKENS, LENGTHS, STATE = "tokens.npy", "lengths.npy", "state.json"
CHUNK_ROWS = 64  # of an array in a bucket: an object


def write_continuations(
    config: ExperimentConfig,
    target: Params,
    corpus: Corpus,
    folder: Place,
    identity: dict[str, Any],
) -> None:
    """Write the rows of `config.continuations` that `folder` does not hold yet.

    Args:
        target: parameters for decoding.
        identity: what the rows are made from; rows of another are refused.

    Raises:
        ConfigError: the folder holds rows that were made from something else.
    """
    at, width = config.continuations, config.train.seq_len + 1
    done = written(folder, identity)
    if done == at.rows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokens = lengths = None
    if is_first():
        new, kind = done == 0, np.dtype(corpus.tokens.dtype)
        with watched(folder):
            tokens = _Rows(folder, TOKENS, (at.rows, width), kind, new)
            lengths = _Rows(folder, LENGTHS, (at.rows,), np.dtype(np.int32), new)
    starts = fitting(corpus, at.prompt)
    decoder = make_decoder(config, AUTOREGRESSIVE, end_tokens(corpus.tokenizer),
                           Sampling(temperature=at.temperature))  # fmt: skip
    with Progress("continuations", total=at.rows, start=done) as progress:
        while done < at.rows:
            # The last batch repeats its last row: one shape for all.
            rows = np.minimum(np.arange(done, done + at.batch_size), at.rows - 1)
            state = generate(
                decoder,
                Weights(target),
                [prompt(corpus, starts, at.prompt, config.seed, int(row)) for row in rows],
                [width - at.prompt] * len(rows),
                [zlib.crc32(f"{config.seed}/continuation/{row}".encode()) for row in rows],
                width=width,
                rounds_per_call=config.decode.rounds_per_call,
            )
            found = to_host(state.tokens), to_host(state.lengths)
            if tokens is not None and lengths is not None:
                with watched(folder):
                    for array, values in zip((tokens, lengths), found, strict=True):
                        array.write(done, values[: at.rows - done])
            done = min(done + at.batch_size, at.rows)
            progress.update(done)
            write_whole(folder / STATE, json.dumps({"rows": done, "identity": identity}))


class _Rows:
    """An array of rows that is written bit by bit: a file, or in a bucket a zarr array."""

    def __init__(
        self, folder: Place, name: str, shape: tuple[int, ...], kind: np.dtype[Any], new: bool
    ):
        """`new`: make it; else it is there."""
        self._store = self._file = None
        if in_bucket(folder):
            chunk = {"shape": [CHUNK_ROWS, *shape[1:]]}
            layout = {"read_chunk": chunk, "write_chunk": chunk}
            schema = {"dtype": kind.name, "domain": {"shape": shape}, "chunk_layout": layout}
            how = {"create": True, "delete_existing": True, "schema": schema} if new else {}
            self._store = ts.open(_zarr(folder, name) | how, open=not new or None).result()
        else:
            path = folder / name
            self._file = (np.lib.format.open_memmap(path, "w+", kind, shape) if new
                          else np.lib.format.open_memmap(path, "r+"))  # fmt: skip

    def write(self, begin: int, rows: Integer[np.ndarray, "rows ..."]) -> None:
        """Rows from `begin` on; they are kept when it returns."""
        if self._store is not None:
            self._store[begin : begin + len(rows)].write(
                rows.astype(self._store.dtype.numpy_dtype)
            ).result()
        elif self._file is not None:
            self._file[begin : begin + len(rows)] = rows
            self._file.flush()


def _zarr(folder: Place, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": f"{os.fspath(folder / name.replace('npy', 'zarr'))}/"}


def _read(folder: Place, name: str) -> Integer[np.ndarray, "rows ..."]:
    if in_bucket(folder):
        with watched(folder):
            return ts.open(_zarr(folder, name), read=True).result().read().result()
    return np.load(folder / name, mmap_mode="r")


def written(folder: Place, identity: dict[str, Any]) -> int:
    """How many rows `folder` holds; ConfigError if they were made from something else."""
    if not (folder / STATE).exists():
        return 0
    state = read_record(folder / STATE)
    if state["identity"] != identity:
        raise ConfigError(
            f"{folder} holds continuations made from other values ({state['identity']}, now "
            f"{identity}); move it away, or choose another --workdir"
        )
    return int(state["rows"])


def read_continuations(folder: Place, first_example: int) -> WrittenRows:
    """The rows of a complete folder, those of a bucket in memory; they count as examples from
    `first_example` on."""
    return WrittenRows(_read(folder, TOKENS), np.array(_read(folder, LENGTHS)), first_example)


def fitting(corpus: Corpus, length: int) -> Documents:
    """Training documents of at least `length` tokens; ConfigError if there are none."""
    documents = corpus.split(False)
    found = documents.where(documents.lengths > length)
    if not len(found):
        raise ConfigError(f"continuations.prompt={length}: no training document has as many tokens")
    return found


def prompt(
    corpus: Corpus, documents: Documents, length: int, seed: int, row: int
) -> Int[np.ndarray, " length"]:
    """The first tokens of a row: a piece of one of the documents, from anywhere, as a prompt."""
    rng = np.random.default_rng([seed, zlib.crc32(b"continuations"), row])
    document = documents[int(rng.integers(len(documents)))]
    begin = rng.integers(document.begin, document.end - length)
    return begun(corpus.tokens[begin : begin + length], corpus.begin)

"""Training rows that the frozen target writes itself, from the beginnings of training documents.

A draft is to predict what the target writes, and a pretrained target writes other text than the
corpus at hand. The rows are written once, to a token array in the work directory; every row has a
prompt and a random seed of its own, so that an interrupted run goes on after the last whole batch
of rows and ends with the same array.
"""

import json
import pathlib
import zlib
from typing import Any

import numpy as np
from jaxtyping import Int

from spire_jax.config import AUTOREGRESSIVE, ConfigError, ExperimentConfig
from spire_jax.data.pipeline import WrittenRows
from spire_jax.data.sources import Corpus, Documents
from spire_jax.decode import Weights, generate
from spire_jax.evaluate import make_decoder
from spire_jax.metrics import Progress, write_whole
from spire_jax.models.transformer import Params
from spire_jax.processes import is_first, to_host
from spire_jax.sampling import Sampling

TOKENS, LENGTHS, STATE = "tokens.npy", "lengths.npy", "state.json"


def write_continuations(
    config: ExperimentConfig,
    target: Params,
    corpus: Corpus,
    folder: pathlib.Path,
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
    if done == 0 and is_first():
        kind = corpus.tokens.dtype
        np.lib.format.open_memmap(folder / TOKENS, "w+", kind, (at.rows, width)).flush()
        np.lib.format.open_memmap(folder / LENGTHS, "w+", np.int32, (at.rows,)).flush()
    tokens = lengths = None
    if is_first():
        tokens = np.load(folder / TOKENS, mmap_mode="r+")
        lengths = np.load(folder / LENGTHS, mmap_mode="r+")
    eos = tuple(getattr(corpus.tokenizer, "eos", (corpus.tokenizer.separator,)))
    starts = fitting(corpus, at.prompt)
    decoder = make_decoder(config, AUTOREGRESSIVE, eos, Sampling(temperature=at.temperature))
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
                tokens[rows], lengths[rows] = found
                tokens.flush()
                lengths.flush()
            done = min(done + at.batch_size, at.rows)
            progress.update(done)
            write_whole(folder / STATE, json.dumps({"rows": done, "identity": identity}))


def written(folder: pathlib.Path, identity: dict[str, Any]) -> int:
    """How many rows `folder` holds; ConfigError if they were made from something else."""
    if not (folder / STATE).is_file():
        return 0
    state = json.loads((folder / STATE).read_text())
    if state["identity"] != identity:
        raise ConfigError(
            f"{folder} holds continuations made from other values ({state['identity']}, now "
            f"{identity}); move it away, or choose another --workdir"
        )
    return int(state["rows"])


def read_continuations(folder: pathlib.Path, first_example: int) -> WrittenRows:
    """The rows of a complete folder; they count as examples from `first_example` on."""
    tokens = np.load(folder / TOKENS, mmap_mode="r")
    return WrittenRows(tokens, np.load(folder / LENGTHS), first_example)


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
    """The first tokens of a row: a piece of one of the documents, from anywhere."""
    rng = np.random.default_rng([seed, zlib.crc32(b"continuations"), row])
    document = documents[int(rng.integers(len(documents)))]
    begin = rng.integers(document.begin, document.end - length)
    return corpus.tokens[begin : begin + length].astype(np.int32)

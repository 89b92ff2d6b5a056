"""Batches for training, batches of held-out text, and contexts for evaluation.

A training row is a piece of one document, from position 0, padded at the document's end: no row
crosses documents, so that positions and masks are the same in every row. The order is Grain's: a
global index, shuffled anew every epoch, of which a process takes every n-th. Where a run stands
in the data is therefore one number, the count of examples that all processes have consumed.
"""

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Bool, Int, Integer

from spire_jax.data.sources import Corpus, DataError, Document

# Grain reads 500 batches ahead unless told otherwise: half a gigabyte at 128 rows of 1024, and no
# shorter a wait for the next one.
BATCHES_AHEAD = 16


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of token ids, of one process."""

    tokens_BxT: Int[np.ndarray, "B T"]
    targets_BxT: Int[np.ndarray, "B T"]  # the token after each
    mask_BxT: Bool[np.ndarray, "B T"]  # False on padding
    example_B: Int[np.ndarray, " B"]  # rows of the data set; -1 where there is none


class Dataset:
    """The rows of `seq_len` tokens of one split of a corpus; random access."""

    def __init__(self, corpus: Corpus, seq_len: int, *, heldout: bool = False):
        self.corpus, self.seq_len = corpus, seq_len
        self._rows: list[tuple[Document, int]] = []
        for document in corpus.split(heldout):
            # A row of T inputs needs T + 1 tokens; the last one only one target.
            count = -(-(document.end - document.begin - 1) // seq_len)
            self._rows += [(document, i * seq_len) for i in range(count)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        document, offset = self._rows[index]
        begin = document.begin + offset
        piece = self.corpus.tokens[begin : min(begin + self.seq_len + 1, document.end)]
        room = np.zeros(self.seq_len + 1, np.int32)
        room[: len(piece)] = piece
        mask = np.arange(1, self.seq_len + 1) < len(piece)
        return {"tokens": room[:-1], "targets": room[1:], "mask": mask,
                "example": np.asarray(index)}  # fmt: skip

    def describe(self, index: int) -> str:
        """Where a row is from: the document's path and the range of its tokens."""
        document, offset = self._rows[index]
        end = min(offset + self.seq_len + 1, document.end - document.begin)
        return f"{document.path} tokens {offset}..{end - 1}"

    def padding_share(self) -> float:
        """Share of positions that are padding."""
        used = sum(d.end - d.begin - 1 for d in dict.fromkeys(d for d, _ in self._rows))
        return 1 - used / (len(self) * self.seq_len)


@dataclasses.dataclass(frozen=True)
class WrittenRows:
    """Rows of T + 1 tokens that are already there (the target's continuations); random access."""

    tokens: Integer[np.ndarray, "rows T1"]
    lengths: Int[np.ndarray, " rows"]  # tokens of each row that count
    first_example: int  # the number of row 0 among all examples

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self.tokens[index].astype(np.int32)
        mask = np.arange(1, len(row)) < self.lengths[index]
        example = np.asarray(self.first_example + index)
        return {"tokens": row[:-1], "targets": row[1:], "mask": mask, "example": example}

    def describe(self, example: int) -> str:
        """Where a row is from."""
        return f"continuation {example - self.first_example}"


def most_frequent(
    dataset: Dataset, written: WrittenRows | None, n_tokens: int, n: int
) -> Int[np.ndarray, " n"]:
    """The n most frequent of `n_tokens` tokens in what drafts are trained on, ascending.

    The ends of a text are always among them. Of equally frequent ones the lower ids are.
    """
    corpus = dataset.corpus
    counts = np.zeros(n_tokens, np.int64)
    for document in corpus.split(False):
        piece = corpus.tokens[document.begin : document.end]
        counts += np.bincount(piece, minlength=n_tokens)
    if written is not None:
        used = np.arange(written.tokens.shape[1]) < written.lengths[:, None]
        counts += np.bincount(written.tokens[used], minlength=n_tokens)
    ends = getattr(corpus.tokenizer, "eos", (corpus.tokenizer.separator,))
    counts[list(ends)] = counts.sum() + 1
    return np.sort(np.argsort(-counts, kind="stable")[:n]).astype(np.int32)


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start_example: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    written: WrittenRows | None = None,
    written_share: float = 0.0,
) -> Iterator[Batch]:
    """This process's batches, without end, after `start_example` examples of the global order.

    Step s of all processes together takes examples [s * batch_size, (s + 1) * batch_size) of the
    order that starts there, whatever the number of processes.

    Args:
        batch_size: rows per step over all processes; `process_count` divides it.
        start_example: any count; a later start only skips, at no cost.
        workers: threads that read ahead; 0 = Grain's default.
        written, written_share: rows besides the data set's, and their share of the order.

    Raises:
        DataError: a batch that cannot be split evenly over the processes.
    """
    if batch_size % process_count:
        raise DataError(f"train.batch_size={batch_size} is not a multiple of {process_count} "
                        f"processes")  # fmt: skip
    order = grain.MapDataset.source(dataset).seed(seed).shuffle().repeat()
    if written is not None:
        others = grain.MapDataset.source(written).seed(seed).shuffle().repeat()
        order = grain.MapDataset.mix([order, others], [1 - written_share, written_share])
    mine = order[start_example + process_index :: process_count]
    threads = workers or grain.ReadOptions().num_threads
    options = grain.ReadOptions(threads, prefetch_buffer_size=max(BATCHES_AHEAD, threads))
    rows = mine.batch(batch_size // process_count).to_iter_dataset(options)
    return map(_batch, iter(rows))


def held_out_batches(
    corpus: Corpus, *, seq_len: int, batch_size: int, max_rows: int = 0
) -> Iterator[Batch]:
    """Rows of the held-out documents, in order, each once; the last batch is filled with
    masked rows.

    Args:
        max_rows: take this many, evenly spaced; 0 = all.
    """
    dataset = Dataset(corpus, seq_len, heldout=True)
    count = min(max_rows, len(dataset)) if max_rows else len(dataset)
    chosen = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
    for begin in range(0, count, batch_size):
        rows = [dataset[i] for i in chosen[begin : begin + batch_size]]
        empty = {name: np.zeros_like(value) for name, value in rows[0].items()}
        empty["example"] -= 1
        rows += [empty] * (batch_size - len(rows))
        yield _batch({name: np.stack([row[name] for row in rows]) for name in empty})


def _batch(rows: dict[str, np.ndarray]) -> Batch:
    return Batch(rows["tokens"], rows["targets"], rows["mask"], rows["example"])


@dataclasses.dataclass(frozen=True)
class Context:
    """A held-out document cut at one point; shorter contexts are suffixes of `tokens`."""

    document: str
    cut: int  # the context's tokens are the `length` before it
    tokens: Int[np.ndarray, " L"]


def cut_contexts(
    corpus: Corpus, *, n_contexts: int, context_length: int, room: int, seed: int
) -> list[Context]:
    """Held-out contexts (method.md section 4): each document cut at random points.

    Every document with room for the context and `room` more tokens is used once before any is
    used a second time, and then at another point: no two contexts are the same.

    Raises:
        DataError: no held-out document is long enough, or there are not that many points.
    """
    need = context_length + room
    heldout = corpus.split(True)
    # The separator is no part of a context.
    fitting = [d for d in heldout if d.end - 1 - d.begin >= need]
    if not fitting:
        longest = max(d.end - 1 - d.begin for d in heldout)
        raise DataError(
            f"no held-out document has room for eval.context_lengths + eval.output_length + k = "
            f"{need} tokens; the longest has {longest}: shorten the context, or add longer text"
        )
    points = [d.end - 1 - d.begin - need + 1 for d in fitting]
    if n_contexts > sum(points):
        raise DataError(
            f"eval.contexts={n_contexts}, but the held-out documents can be cut at {sum(points)} "
            f"points only (context, output and k take {need} tokens); lower it, or add longer text"
        )
    rng = np.random.default_rng([seed, 0xC07])
    taken: list[set[int]] = [set() for _ in fitting]
    contexts: list[Context] = []
    while True:
        for index in rng.permutation(len(fitting)):
            if len(contexts) == n_contexts:
                return contexts
            if len(taken[index]) == points[index]:
                continue
            while (start := int(rng.integers(points[index]))) in taken[index]:
                pass
            taken[index].add(start)
            piece = corpus.tokens_of(fitting[index])[start : start + context_length]
            contexts.append(Context(fitting[index].path, start + context_length, piece))

"""Batches for training, batches of held-out text, and contexts for evaluation.

A training row is a piece of one document, from position 0, padded at the document's end: no row
crosses documents, so that positions and masks are the same in every row. Where the tokenizer has a
begin token, each row and each context begins with it, as each prompt in decoding does. The order is
Grain's: a global index, shuffled anew every epoch, of which a process takes every n-th. Where a run
stands in the data is therefore one number, the count of examples that all processes have consumed.
"""

import concurrent.futures
import dataclasses
import functools
import zlib
from collections import defaultdict
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Bool, Int, Integer

from spire_jax.data.corpus import Corpus, DataError, Document
from spire_jax.data.tokenizer import end_tokens

# Grain reads 500 batches ahead unless told otherwise: half a gigabyte at 128 rows of 1024, and no
# shorter a wait for the next one.
BATCHES_AHEAD = 16
COUNTED = 2**27  # tokens from which the most frequent ones are known
READ_AT_ONCE = 16  # held-out rows: each may be a request to a bucket


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
        self._documents = corpus.split(heldout)
        # A row of T inputs needs T + 1 tokens; the last one only one target.
        self._ends = np.cumsum(-(-self._targets // seq_len))

    @property
    def _targets(self) -> Int[np.ndarray, " documents"]:
        """Tokens of each document that are predicted: without a begin token, not its first."""
        return self._documents.lengths - 1 + len(self.corpus.begin)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        document, offset = self._place(index)
        piece = self.corpus.tokens[document.begin + offset : self._end(document, offset)]
        front = self.corpus.begin
        if tuple(piece[: len(front)]) != front:  # what others have tokenized may begin with it
            piece = np.concatenate([front, piece])
        room = np.zeros(self.seq_len + 1, np.int32)
        room[: len(piece)] = piece
        mask = np.arange(1, self.seq_len + 1) < len(piece)
        return {"tokens": room[:-1], "targets": room[1:], "mask": mask,
                "example": np.asarray(index)}  # fmt: skip

    def _place(self, index: int) -> tuple[Document, int]:
        """A row's document, and where in it the row begins."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        return self._documents[number], (int(index) - first) * self.seq_len

    def _end(self, document: Document, offset: int) -> int:
        """Where in the corpus a row ends: it has T + 1 tokens, the begin token among them."""
        end = document.begin + offset + self.seq_len + 1 - len(self.corpus.begin)
        return min(end, document.end)

    def describe(self, index: int) -> str:
        """Where a row is from: the document's path and the range of its tokens."""
        document, offset = self._place(index)
        last = self._end(document, offset) - 1 - document.begin
        return f"{document.path} tokens {offset}..{last}"

    def padding_share(self) -> float:
        """Share of positions that are padding."""
        used = int(self._targets.sum())
        return 1 - used / (len(self) * self.seq_len)

    @functools.cached_property
    def bands(self) -> Int[np.ndarray, " bands1"]:
        """Rows where the bands of the corpus begin, and the number of rows."""
        if not self.corpus.band:
            return np.array([0, len(self)])
        number = self._documents.begins // self.corpus.band
        last = np.flatnonzero(np.diff(number))  # the last document of each but the last band
        return np.unique(np.concatenate([[0], self._ends[last], [len(self)]]))


class InBands:
    """Positions in an order of a dataset's rows -> rows: one band after the other.

    For arrays whose chunks hold many documents: rows in an order without bands would each decode
    a chunk of megabytes, while a band's chunks are decoded once and serve all its rows. Bands
    come in a random order, anew in every epoch, and so do the rows of each.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self._dataset, self._seed = dataset, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return len(self._dataset) * 2**20  # epochs

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(int(position), len(self._dataset))
        bands, ends = self._epoch(epoch)
        at = int(np.searchsorted(ends, place, side="right"))
        band, first = int(bands[at]), int(ends[at - 1]) if at else 0
        begin, count = self._dataset.bands[band], int(ends[at]) - first
        row = _shuffled(place - first, count, f"{self._seed}/{epoch}/{band}")
        return self._dataset[int(begin) + row]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The bands in an epoch's order, and where in it each one's rows end."""
        count = len(self._dataset.bands) - 1
        bands = np.array([_shuffled(i, count, f"{self._seed}/{epoch}") for i in range(count)])
        return bands, np.cumsum(np.diff(self._dataset.bands)[bands])


def _shuffled(index: int, count: int, key: str) -> int:
    """Where a random permutation of `count` indices, one for each key, takes one of them."""
    seed = zlib.crc32(key.encode())
    return grain.experimental.index_shuffle(index, max_index=count - 1, seed=seed, rounds=4)


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

    The ends of a text are always among them. Of equally frequent ones the lower ids are. Of more
    than `COUNTED` tokens, about as many are counted: those of documents (or bands) at equal
    distances.
    """
    corpus, documents = dataset.corpus, dataset.corpus.split(False)
    group = documents.begins // corpus.band if corpus.band else np.arange(len(documents))
    _, group = np.unique(group, return_inverse=True)
    every = -(-int(documents.lengths.sum()) // COUNTED)
    counts = np.zeros(n_tokens, np.int64)
    for document in documents.where(group % every == 0):
        piece = corpus.tokens[document.begin : document.end]
        counts += np.bincount(piece, minlength=n_tokens)
    if written is not None:
        used = np.arange(written.tokens.shape[1]) < written.lengths[:, None]
        counts += np.bincount(written.tokens[used], minlength=n_tokens)
    counts[list(end_tokens(corpus.tokenizer))] = counts.sum() + 1
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
    if len(dataset.bands) == 2:
        order = grain.MapDataset.source(dataset).seed(seed).shuffle().repeat()
    else:
        order = grain.MapDataset.source(InBands(dataset, seed)).repeat()
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
    with concurrent.futures.ThreadPoolExecutor(READ_AT_ONCE) as threads:
        for begin in range(0, count, batch_size):
            rows = list(threads.map(dataset.__getitem__, chosen[begin : begin + batch_size]))
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
    begin: tuple[int, ...] = ()  # `Corpus.begin`

    def last(self, length: int) -> Int[np.ndarray, " length"]:
        """The context of so many tokens, as a prompt: a begin token takes the first one's place."""
        return begun(self.tokens[-length:], self.begin)


def begun(tokens: Integer[np.ndarray, " n"], begin: tuple[int, ...]) -> Int[np.ndarray, " n"]:
    """A piece of a document as a prompt of the same length, `begin` in place of its first token."""
    prompt = tokens.astype(np.int32)
    prompt[: len(begin)] = begin
    return prompt


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
    # The separator is no part of a context; nor is the last token of a row that has none.
    lengths = heldout.lengths - 1
    fitting = heldout.where(lengths >= need)
    if not len(fitting):
        raise DataError(
            f"no held-out document has room for eval.context_lengths + eval.output_length + k = "
            f"{need} tokens; the longest has {lengths.max()}: shorten the context, or add longer "
            f"text"
        )
    points = fitting.lengths - need
    if n_contexts > points.sum():
        raise DataError(
            f"eval.contexts={n_contexts}, but the held-out documents can be cut at {points.sum()} "
            f"points only (context, output and k take {need} tokens); lower it, or add longer text"
        )
    rng = np.random.default_rng([seed, 0xC07])
    taken: dict[int, set[int]] = defaultdict(set)
    contexts: list[Context] = []
    while True:
        for index in rng.permutation(len(fitting)).tolist():
            if len(contexts) == n_contexts:
                return contexts
            if len(taken[index]) == points[index]:
                continue
            while (start := int(rng.integers(points[index]))) in taken[index]:
                pass
            taken[index].add(start)
            document = fitting[index]
            begin = document.begin + start
            piece = corpus.tokens[begin : begin + context_length].astype(np.int32)
            contexts.append(Context(document.path, start + context_length, piece, corpus.begin))

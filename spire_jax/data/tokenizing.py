"""Text in blocks, each read and tokenized by itself, in as many processes as there are cores.

What a token array is made from (write_zarr.py): a folder of text, or lines of JSONL. Which block
holds what follows from names, sizes and times alone, and blocks come in order, however many
workers there are.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Integer

from spire_jax.config.schema import BYTES
from spire_jax.config.values import parse_json
from spire_jax.data.corpus import DataError
from spire_jax.data.sources import is_heldout, is_text, read_whole, text_folder
from spire_jax.data.tokenizer import make_tokenizer

LINES = ".jsonl"
SHARD_TOKENS, SHARD_ROWS = 2**24, 2**12  # at most, of a file of rows: 32 MB of uint16


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that the arrays depend on, besides the text."""

    source: str
    tokenizer: str = BYTES
    field: str = ""  # of a line of JSONL; "" = files of text
    row_tokens: int = 65536
    min_tokens: int = 2
    heldout_percent: int = 10
    split: str = "file"
    keep_duplicates: bool = False
    shard_rows: int = 0  # 0 = as many as SHARD_TOKENS and SHARD_ROWS allow
    block_bytes: int = 2**22  # of text that is tokenized at a time

    @property
    def rows_per_shard(self) -> int:
        return self.shard_rows or max(1, min(SHARD_TOKENS // self.row_tokens, SHARD_ROWS))

    def check(self) -> None:
        """DataError for values that cannot be."""
        if self.row_tokens < 2:
            raise DataError(f"--row-tokens={self.row_tokens}: a row needs two tokens or more")
        if not 2 <= self.min_tokens <= self.row_tokens:
            raise DataError(f"--min-tokens={self.min_tokens} must lie between 2 and --row-tokens="
                            f"{self.row_tokens}")  # fmt: skip
        if not 0 <= self.heldout_percent < 100:
            raise DataError(f"--heldout-percent={self.heldout_percent} must lie between 0 (none "
                            f"held out) and 99")  # fmt: skip
        if self.shard_rows < 0 or self.block_bytes < 1:
            raise DataError(f"--shard-rows={self.shard_rows} and --block-bytes={self.block_bytes} "
                            f"must be 0 or more, and 1 or more")  # fmt: skip
        if self.field and self.split == "folder":
            raise DataError("--split=folder: lines of JSONL have no folders")


@dataclasses.dataclass(frozen=True)
class Block:
    """Text that is tokenized at a time: whole files, or the lines that start in a range of one."""

    files: tuple[str, ...]
    sizes: tuple[int, ...]  # bytes; of lines: those of the range
    begin: int | None = None  # of the range; None = whole files

    @property
    def n_bytes(self) -> int:
        return sum(self.sizes)

    def head(self, most: int) -> "Block":
        """Its beginning: of lines `most` bytes, of files as many as make them up."""
        if self.begin is not None:
            return dataclasses.replace(self, sizes=(min(most, self.n_bytes),))
        count = 1 + int(np.searchsorted(np.cumsum(self.sizes), most))
        return Block(self.files[:count], self.sizes[:count])


@dataclasses.dataclass(frozen=True)
class Source:
    """The text: where it is, how it is cut into blocks, and a hash of all names, sizes, times."""

    root: pathlib.Path
    blocks: tuple[Block, ...]
    sha256: str

    @property
    def n_bytes(self) -> int:
        return sum(block.n_bytes for block in self.blocks)


def find_text(plan: Plan) -> Source:
    """The blocks of `plan.source`; DataError if there is no such folder or file, or no text."""
    path = pathlib.Path(plan.source)
    if path.is_file() and not plan.field:
        raise DataError(f"--source={plan.source} is one file of text; give a folder, or lines of "
                        f"JSON and --field")  # fmt: skip
    if path.is_file():
        root, names = path.parent, [path.name]
    else:
        root, names = text_folder(plan.source)
        names = [name for name in names if not plan.field or name.endswith(LINES)]
    if not names:
        kind = f"*{LINES} files" if plan.field else "files of text"
        raise DataError(f"--source={plan.source} holds no {kind}")
    listing, blocks = hashlib.sha256(), []
    files: list[tuple[str, int]] = []
    for name in names:
        status = (root / name).stat()
        listing.update(f"{name}\0{status.st_size} {status.st_mtime_ns}\0".encode())
        if plan.field:
            steps = range(0, status.st_size, plan.block_bytes)
            sizes = [min(plan.block_bytes, status.st_size - at) for at in steps]
            blocks += [Block((name,), (n,), at) for at, n in zip(steps, sizes, strict=True)]
            continue
        files.append((name, status.st_size))
        if name == names[-1] or sum(size for _, size in files) >= plan.block_bytes:
            blocks.append(Block(tuple(n for n, _ in files), tuple(size for _, size in files)))
            files = []
    return Source(root, tuple(blocks), listing.hexdigest())


@dataclasses.dataclass
class Tokenized:
    """The documents of a block."""

    tokens: list[Integer[np.ndarray, " n"]]  # ended by the separator
    heldout: list[bool]
    n_bytes: list[int]
    digests: list[bytes]
    not_text: int = 0
    empty: int = 0


class Tokenizing:
    """Reads and tokenizes blocks; one in every process."""

    def __init__(self, plan: Plan, root: pathlib.Path):
        self._plan, self._root = plan, root
        self._tokenizer = make_tokenizer(plan.tokenizer)
        self.dtype = np.dtype(np.uint16 if self._tokenizer.n_tokens <= 2**16 else np.uint32)

    def __call__(self, block: Block) -> Tokenized:
        done = Tokenized([], [], [], [])
        texts = []
        for name, text in (_lines if self._plan.field else _files)(self._root, block, self._plan):
            if not text:
                done.empty += 1
                continue
            if not self._plan.field and not is_text(text):
                done.not_text += 1
                continue
            content = hashlib.sha256(text)
            done.digests.append(content.digest()[:16])
            side = is_heldout(name or content.hexdigest(), self._plan.heldout_percent)
            done.heldout.append(side)
            done.n_bytes.append(len(text))
            texts.append(text)
        end = np.array([self._tokenizer.separator], self.dtype)
        for ids in self._tokenizer.encode_all(texts):
            done.tokens.append(np.concatenate([ids.astype(self.dtype), end]))
        return done


def _files(root: pathlib.Path, block: Block, plan: Plan) -> Iterator[tuple[str, bytes]]:
    """The files of a block, and the name by which each is split."""
    for name in block.files:
        yield name.split("/")[0] if plan.split == "folder" else name, read_whole(root / name)


def _lines(root: pathlib.Path, block: Block, plan: Plan) -> Iterator[tuple[str, bytes]]:
    """The texts of the lines that start in a block; they have no name."""
    path, at = root / block.files[0], block.begin or 0
    end = at + block.n_bytes
    with path.open("rb") as file:
        if at:
            file.seek(at - 1)
            file.readline()  # the end of a line that starts before
        while (at := file.tell()) < end:
            line = file.readline()
            if line.isspace():
                continue
            try:
                record = parse_json(line)
                text = record.get(plan.field) if isinstance(record, dict) else None
                if not isinstance(text, str):
                    raise ValueError(f"no JSON object with a string {plan.field!r}")
                yield "", text.encode()
            except ValueError as error:
                number = 1 + _newlines(path, at)
                raise DataError(f"{path}, line {number}: {error}; mend or remove it") from error


def _newlines(path: pathlib.Path, end: int) -> int:
    """How many there are before a place in a file."""
    with path.open("rb") as file:
        return sum(file.read(min(2**24, end - at)).count(b"\n") for at in range(0, end, 2**24))


def tokenized(
    plan: Plan, source: Source, blocks: Sequence[Block], workers: int
) -> Iterator[Tokenized]:
    """The documents of blocks, in order; a few blocks ahead of who takes them."""
    if min(workers, len(blocks)) <= 1:
        yield from map(Tokenizing(plan, source.root), blocks)
        return
    workers = min(workers, len(blocks))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, _start_worker, (plan, source.root)
    ) as pool:
        waiting: collections.deque[concurrent.futures.Future[Tokenized]] = collections.deque()
        try:
            for block in blocks:
                waiting.append(pool.submit(_work, block))
                if len(waiting) > workers + 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.BrokenExecutor as error:
            raise DataError("a worker was killed, perhaps for its memory; give fewer --workers, "
                            "the same command goes on") from error  # fmt: skip
        finally:
            pool.shutdown(cancel_futures=True)


_worker: Tokenizing


def _work(block: Block) -> Tokenized:
    return _worker(block)


def _start_worker(plan: Plan, root: pathlib.Path) -> None:
    """A worker uses one core, leaves interruptions to its parent, and goes when it has gone."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _worker = Tokenizing(plan, root)

"""Continuous batching: requests pass through a fixed batch of slots.

The loop is on the host. Between two calls of `serve_rounds` finished rows are handed out, free
slots take the next requests, and prompts are read a chunk at a time, so that rows that decode
wait for `chunks_per_round` chunks at most. All shapes are fixed: one program to admit, one to
prefill, one per depth; nothing compiles after the first moment. A request's output depends on its
own prompt and seed, the decoder and the shapes (batch, width, chunk), never on its slot or its
neighbours.
"""

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from spire_jax.data.tokenizer import Tokenizer
from spire_jax.decoding import slots
from spire_jax.decoding.rounds import NO_LOGITS, DecodeError, Decoder, DecodeState, Weights
from spire_jax.models.sampling import NO_TOKEN, seed_words
from spire_jax.serving.adaptive import DepthController
from spire_jax.serving.records import EOS, LENGTH, STOP, Failure, Request, Result, refused
from spire_jax.serving.requests import next_turn
from spire_jax.serving.text import TextStream, first_stop, tokens_of_text

PROGRAMS = (slots.empty_slots, slots.admit, slots.prefill_chunk, slots.serve_rounds)
# What a round gave a request: its tokens, how many of them were drafted, and the round's depth.
Watch = Callable[[Request, list[int], int, int], None]


@dataclasses.dataclass(frozen=True)
class Serving:
    """The shapes and the pace of a server."""

    batch: int = 8
    width: int = 2048  # positions of a row: prompt, output and the deepest round
    chunk: int = 128  # prompt tokens that are read at once
    chunk_rows: int = 1  # prompts that are read side by side; a multiple of a mesh's batch shards
    chunks_per_round: int = 1  # while other rows decode
    rounds_per_call: int = 8  # while no prompt waits to be read


@dataclasses.dataclass
class _Slot:
    """A request in a row."""

    request: Request
    received: float
    admitted: float
    ready: float = 0.0  # when its first round began
    first: float = 0.0  # when its first token was there
    read: int = 0  # prompt tokens in the caches
    tokens: list[int] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    depths: list[int] = dataclasses.field(default_factory=list)
    stream: TextStream | None = None  # where there are stop strings to look for
    text: str = ""

    @property
    def unread(self) -> int:
        """Prompt tokens still to be read; the last one opens the first round."""
        return len(self.request.tokens) - 1 - self.read


class Server:
    """Slots with a decoder, compiled when made.

    Attributes:
        rounds: by depth, how many were run.
        compilations: programs compiled for this server.

    Raises:
        DecodeError: a strategy that cannot prefill in chunks, or sizes that do not fit.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        tokenizer: Tokenizer,
        serving: Serving = Serving(),
        depths: Sequence[int] = (),
    ):
        """`depths` are those to choose from; without any, all rounds are of `decoder.k`.

        With `decoder.prices` rows choose by themselves, and all rounds are of it, too.
        """
        chosen = decoder.strategy is not None and not decoder.prices and depths
        depths = tuple(depths) if chosen else (decoder.k,)
        self.controller = DepthController(depths)
        self.decoders = {k: dataclasses.replace(decoder, k=k) for k in self.controller.depths}
        self.decoder = self.decoders[max(depths)]  # whose rings every depth fits
        self.weights, self.tokenizer, self.serving = weights, tokenizer, serving
        self.rounds = dict.fromkeys(self.controller.depths, 0)
        self.first_token = 0.0  # when the first of all was there (time.perf_counter)
        self._check_sizes()
        self._slots: list[_Slot | None] = [None] * serving.batch
        self._halted = np.zeros(serving.batch, bool)
        compiled = sum(map(_programs, PROGRAMS))
        self._state = self._warm_up()
        self.compilations = sum(map(_programs, PROGRAMS)) - compiled

    def serve(
        self, source: "Iterable[Request | Failure] | Inbox", watch: Watch | None = None
    ) -> Iterator[Result | Failure]:
        """Results in the order in which they finish; failures of `source` are passed on.

        With an `Inbox` as the source nothing waits for it while rows decode. `watch` is told of
        every round of every request.
        """
        self._slots = [None] * self.serving.batch
        self._halted[:] = True  # what an earlier call left behind
        take = source.take if isinstance(source, Inbox) else _taker(iter(source))
        turns: collections.deque[Any] = collections.deque()  # that follow an answer
        more = True
        while more or turns or any(self._slots):
            while (more or turns) and None in self._slots:
                found = turns.popleft() if turns else take(not any(self._slots))
                if found is None:
                    break
                if found is END:
                    more = False
                    continue
                item, received = found
                error = self.check(item) if isinstance(item, Request) else ""
                if isinstance(item, Failure) or error:
                    yield item if isinstance(item, Failure) else refused(item, error)
                    continue
                self._admit(item, received)
            clean = not self._prefill()
            for result in self._rounds(clean, watch):
                following = None
                if isinstance(result, Result):
                    following = next_turn(result, self.tokenizer)
                if following is None:
                    yield result
                else:
                    turns.append((following, time.perf_counter()))

    def reset(self) -> None:
        """Slots as they were at first: after an interruption in the middle of a call."""
        del self._state
        self._state = slots.empty_slots(
            self.decoder, self.weights, self.serving.batch, self.serving.width
        )

    def check(self, request: Request) -> str:
        """Why a request cannot be served here; "" if it can."""
        model, k = self.decoder.target.config, self.decoder.k
        length = len(request.tokens)
        if not 0 <= int(request.tokens.min()) <= int(request.tokens.max()) < model.n_tokens:
            return f"a token is outside the model's vocabulary of {model.n_tokens}"
        need = length + request.max_tokens
        of = f"prompt {length} + max_tokens {request.max_tokens}"
        # What is drafted beyond the end is never kept: it takes room in a row alone.
        if model.max_len and need > model.max_len:
            return (f"{of} = {need} goes beyond the model's context of {model.max_len}; shorten "
                    f"one of them")  # fmt: skip
        if need + k > self.serving.width:
            return (f"{of} + k {k} = {need + k} goes beyond the {self.serving.width} positions of "
                    f"a row; shorten one of them, or raise --width")  # fmt: skip
        return ""

    # --- between rounds ------------------------------------------------------------------------

    def _admit(self, request: Request, received: float) -> None:
        row, now = self._slots.index(None), time.perf_counter()
        length = len(request.tokens)
        prompt = np.zeros(self.serving.width, np.int32)
        prompt[:length] = request.tokens
        end = length + request.max_tokens
        self._state = slots.admit(
            self._state, np.int32(row), prompt, np.int32(length), np.int32(end),
            seed_words(request.seed),
        )  # fmt: skip
        stream = TextStream(self.tokenizer.decode) if request.stop else None
        self._slots[row] = _Slot(request, received, now, ready=now, stream=stream)
        self._halted[row] = False

    def _prefill(self) -> bool:
        """Read chunks of waiting prompts, first come first served; whether there were any."""
        chunks, at_once, batch = 0, self.serving.chunk_rows, self.serving.batch
        # With nothing to decode there is nobody to hold up.
        while (waiting := self._waiting()) and (
            chunks < self.serving.chunks_per_round or not self._ready()
        ):
            chunks += 1
            of = [slot for row in waiting[:at_once] if (slot := self._slots[row])]
            pad = at_once - len(of)
            self._state = slots.prefill_chunk(
                self.decoder, self.weights, self._state,
                np.array(waiting[:at_once] + [batch] * pad, np.int32),
                np.array([s.read for s in of] + [0] * pad, np.int32),
                np.array([len(s.request.tokens) for s in of] + [1] * pad, np.int32),
                self.serving.chunk,
            )  # fmt: skip
            for slot in of:
                slot.read += min(self.serving.chunk, slot.unread)
            if not all(slot.unread for slot in of):
                jax.block_until_ready(self._state.lengths)  # its rounds are timed from now on
            for slot in of:
                slot.ready = time.perf_counter()
        return chunks > 0

    def _waiting(self) -> list[int]:
        """Rows with prompts to be read, the earliest first."""
        found = [(s.admitted, row) for row, s in enumerate(self._slots) if s and s.unread]
        return [row for _, row in sorted(found)]

    def _ready(self) -> list[int]:
        return [row for row, slot in enumerate(self._slots) if slot and not slot.unread]

    # --- rounds --------------------------------------------------------------------------------

    def _rounds(self, clean: bool, watch: Watch | None) -> Iterator[Result | Failure]:
        """One call of rounds for the rows that are ready; those that finish.

        `clean`: nothing else is under way on the device, so that the call can be timed.
        """
        rows = self._ready()
        if not rows:
            return
        k = self.controller.choose()
        most = 1 if self._waiting() else self.serving.rounds_per_call
        begin = time.perf_counter()
        self._state, log = slots.serve_rounds(
            self.decoders[k], self.weights, self._state, self._halted, np.int32(most),
            self.serving.rounds_per_call,
        )  # fmt: skip
        given = np.asarray(log)
        now = time.perf_counter()
        done = int(np.sum(given[:, rows, 0].max(axis=1) >= 0))
        self.rounds[k] += done
        for one in given[:done, rows, 0] if len(self.decoders) > 1 else ():
            self.controller.accepted(k, one[one >= 0])
        if clean and done:
            self.controller.took(k, (now - begin) / done)
        for row, lines in zip(rows, given[:done].swapaxes(0, 1)[rows].tolist(), strict=True):
            reason = self._take_in(row, lines, watch)
            if reason:
                self._halted[row] = True
                slot, self._slots[row] = self._slots[row], None
                assert slot is not None
                if reason == NO_LOGITS:
                    yield refused(slot.request, reason)
                else:
                    yield self._result(slot, reason, now)

    def _take_in(self, row: int, lines: list[list[int]], watch: Watch | None) -> str:
        """What the rounds of a call gave one row; why it ends, "" if it goes on."""
        slot = self._slots[row]
        assert slot is not None
        for accepted, depth, emitted, *tokens in lines:
            if accepted < 0:
                break
            slot.first = slot.first or time.perf_counter()
            self.first_token = self.first_token or slot.first
            slot.lengths.append(accepted + 1)
            slot.depths.append(depth)
            if watch:
                given = [t for t in tokens[:emitted] if t != NO_TOKEN]
                watch(slot.request, given, accepted, depth)
            # One by one, so that no end depends on how many tokens a round brings.
            for token in tokens[:emitted]:
                if token == NO_TOKEN:
                    return NO_LOGITS
                slot.tokens.append(token)
                if token in self.decoder.ends:
                    return EOS
                if slot.stream and self._stopped(slot, slot.stream.feed([token])):
                    return STOP
                if len(slot.tokens) >= slot.request.max_tokens:
                    return LENGTH
        return ""

    def _stopped(self, slot: _Slot, piece: str) -> bool:
        """Whether a stop string is complete with a piece of text."""
        longest = max(map(len, slot.request.stop))
        slot.text, begin = slot.text + piece, len(slot.text) - longest
        return first_stop(slot.text, slot.request.stop, begin) >= 0

    def _result(self, slot: _Slot, reason: str, now: float) -> Result:
        decode, request = self.tokenizer.decode, slot.request
        tokens = slot.tokens[:-1] if reason == EOS else slot.tokens
        text = decode(np.array(tokens, np.int32))
        if (cut := first_stop(text, request.stop)) >= 0:
            text, reason = text[:cut], STOP
            tokens = tokens[: tokens_of_text(tokens, text, decode)]
        return Result(
            request, tokens, text, slot.lengths, slot.depths, reason,
            queued=slot.admitted - slot.received, prefill=slot.ready - slot.admitted,
            decode=now - slot.ready, first_token=slot.first - slot.received,
        )  # fmt: skip

    # --- at the start --------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        s = self.serving
        for name in ("batch", "width", "chunk", "chunk_rows", "chunks_per_round",
                     "rounds_per_call"):  # fmt: skip
            if getattr(s, name) < 1:
                raise DecodeError(f"{name}={getattr(s, name)}: use 1 or more")

    def _warm_up(self) -> DecodeState:
        """Empty slots, after every program has run once without doing anything."""
        s, nobody = self.serving, np.full(self.serving.chunk_rows, self.serving.batch, np.int32)
        prompt, halted = np.zeros(s.width, np.int32), np.ones(s.batch, bool)
        state = slots.empty_slots(self.decoder, self.weights, s.batch, s.width)
        # Twice: on a mesh, what one program hands to the next is placed otherwise than what is
        # made empty, and a placement is part of what a program is compiled for.
        for _ in range(2):
            state = slots.admit(state, np.int32(0), prompt, np.int32(1), np.int32(1), seed_words(0))
            try:
                state = slots.prefill_chunk(self.decoder, self.weights, state, nobody, nobody * 0,
                                            nobody * 0 + 1, s.chunk)  # fmt: skip
            except ValueError as error:  # a strategy that needs whole prompts
                raise DecodeError(f"continuous batching: {error}") from error
            for decoder in self.decoders.values():
                state, _ = slots.serve_rounds(decoder, self.weights, state, halted, np.int32(0),
                                              s.rounds_per_call)  # fmt: skip
        return jax.block_until_ready(state)


def _programs(function: Any) -> int:
    return function._cache_size()


# --- where requests come from ------------------------------------------------------------------

END = object()  # after the last request


class Inbox:
    """Requests of an iterable that may make one wait (a pipe), read ahead by a thread."""

    def __init__(self, source: Iterable[Request | Failure], ahead: int = 256):
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        threading.Thread(target=self._read, args=(source,), daemon=True).start()

    def take(self, wait: bool) -> Any:
        """(the next request, when it was read); END after the last; None if there is none yet."""
        try:
            found = self._queue.get(block=wait)
        except queue.Empty:
            return None
        if isinstance(found, BaseException):
            raise found
        return found

    def _read(self, source: Iterable[Request | Failure]) -> None:
        try:
            for item in source:
                self._queue.put((item, time.perf_counter()))
            self._queue.put(END)
        except Exception as error:  # shown where the requests are taken
            self._queue.put(error)


def _taker(source: Iterator[Request | Failure]) -> Callable[[bool], Any]:
    begin = time.perf_counter()  # they are all there already

    def take(wait: bool) -> Any:
        return (item, begin) if (item := next(source, None)) is not None else END

    return take

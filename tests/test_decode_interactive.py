"""`python -m spire_jax.decode --interactive`: what is typed, and what is shown of the answers."""

import dataclasses
import io
import itertools
import types
from typing import Any

import numpy as np
from models import TINY, pair
from rich.console import Console

from spire_jax.data.tokenizer import ByteTokenizer
from spire_jax.serving import batching
from spire_jax.serving.batching import Server, Serving
from spire_jax.serving.interactive import Printer, converse, visible
from spire_jax.serving.records import Request, Result
from spire_jax.serving.requests import Defaults
from spire_jax.serving.text import TextStream

BYTES = dataclasses.replace(TINY, n_layers=2, vocab_size=264, n_tokens=257, max_len=120)


class Asked:
    """What a person types."""

    def __init__(self, *lines):
        self.lines = iter(lines)

    def __call__(self, prompt: str) -> str:
        line = next(self.lines, EOFError)
        if not isinstance(line, str):
            raise line
        return line


def test_answers_are_streamed_and_summed_up():
    p, file = pair("spire", BYTES), io.StringIO()
    server = Server(p.decoder(2), p.weights, ByteTokenizer(),
                    Serving(batch=2, width=120, chunk=16, rounds_per_call=8))  # fmt: skip
    console = Console(file=file, force_terminal=True, color_system="standard", width=10)
    bad = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")
    converse(server, Defaults(20, 0), console, Asked("", bad, "ab", "x" * 130, "ab"))
    shown = file.getvalue()
    assert shown.count("drafted and accepted") == 1 and "\x1b[32m" in shown
    assert shown.count("20 tokens in") == 2 and shown.count("tokens/s, tau") == 2
    assert "not UTF-8" in shown and "goes beyond the model's context" in shown


class Chatty(ByteTokenizer):
    """Forty tokens a message."""

    def chat(self, messages):
        return np.full(40 * len(messages), 97, np.int32)


def test_a_conversation_that_is_too_long_can_be_left():
    p, file = pair("spire", BYTES), io.StringIO()
    server = Server(p.decoder(2), p.weights, Chatty(), Serving(batch=2, width=120, chunk=16))
    converse(server, Defaults(20, 0), Console(file=file, width=10),
             Asked("hi", "hi", "hi", "/new", "hi"))  # fmt: skip
    shown = file.getvalue()
    assert shown.count("20 tokens in") == 2 and shown.count("/new begins another") == 2
    assert shown.index("[a new conversation]") < shown.rindex("20 tokens in")


def test_a_stop_string_is_not_shown():
    """Neither in parts nor where one round brings all of it; colours follow the tokens."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard")
    printer = Printer(ByteTokenizer(), (256,), ("END",), console)
    request = Request(0, np.array([1], np.int32), 9, 0, ("END",))
    printer.watch(request, list(b"abcE"), 3, 3)
    assert "ab" in file.getvalue() and "E" not in file.getvalue()
    printer.watch(request, list(b"dEND"), 2, 3)
    printer.end(Result(request, [], "abcEd", [4, 3], [3, 3], "stop", 0.0, 0.0, 0.0))
    text = file.getvalue()
    for style, letters in (("32", "ab"), ("36", "E"), ("32", "d")):
        assert f"\x1b[{style}m{letters}" in text
    assert "N" not in text


def test_what_may_be_a_stop_string_is_shown_once():
    file = io.StringIO()
    printer = Printer(ByteTokenizer(), (256,), ("abcdef",), Console(file=file))
    request = Request(0, np.array([1], np.int32), 9, 0, ("abcdef",))
    for letter in b"123456":
        printer.watch(request, [letter], 0, 0)
    printer.end(Result(request, [], "123456", [1] * 6, [0] * 6, "length", 0.0, 0.0, 0.0))
    assert file.getvalue() == "123456"


PIECES = (b"a", b"b", b"c", b" a", b"ab", b"abc", b" ", "é".encode(), b"\xc3", b"\xa9b", b"c\xc3",
          b"\xe6", b"\x97", b"\xa5", b"\xff", b"def")  # fmt: skip
STOPS = ("a", "c", "ab", "bc", "abc", "abcdef", "é", "cé", "éb", " a", "a ", "日")


class Pieces(ByteTokenizer):
    """Tokens of parts of characters, and of several; a text's first space is left out."""

    n_tokens, separator = len(PIECES) + 1, len(PIECES)

    def decode(self, ids):
        text = b"".join([*PIECES, "␞".encode()][i] for i in np.asarray(ids).tolist())
        return text.removeprefix(b" ").decode(errors="replace")


def taken_in(tokens, max_tokens, stop, sizes) -> tuple[Result, str]:
    """What a server makes of a row whose rounds bring so many tokens each, and what is shown."""
    server, file = object.__new__(Server), io.StringIO()
    server.tokenizer, server.first_token = Pieces(), 0.0
    decoder: Any = types.SimpleNamespace(ends=(Pieces.separator,))
    server.decoder = decoder
    request = Request(0, np.array([1], np.int32), max_tokens, 0, stop)
    slot = batching._Slot(request, 0.0, 0.0, stream=TextStream(Pieces().decode) if stop else None)
    server._slots, begin, reason = [slot], 0, ""
    printer = Printer(Pieces(), server.decoder.ends, stop, Console(file=file, width=10**6))
    while not reason:
        size = next(sizes)
        emitted = tokens[begin : min(begin + size, max_tokens)]  # up to the first end (`_emit`)
        if Pieces.separator in emitted:
            emitted = emitted[: emitted.index(Pieces.separator) + 1]
        begin += len(emitted)
        line = [size - 1, size - 1, len(emitted), *emitted]
        reason = server._take_in(0, [line], printer.watch)
    result = server._result(slot, reason, 0.0)
    printer.end(result)
    return result, file.getvalue()


def test_no_end_depends_on_how_many_tokens_a_round_brings():
    """Stop strings, budgets and ends of sequence, parts of characters between them."""
    rng, reasons = np.random.default_rng(0), []
    for _ in range(300):
        most = int(rng.integers(1, 14))
        chances = rng.dirichlet(np.full(Pieces.n_tokens, 0.4))
        tokens = rng.choice(Pieces.n_tokens, most, p=chances).tolist()
        stop = tuple(rng.choice(STOPS, rng.integers(4), replace=False).tolist())
        one, shown = taken_in(tokens, most, stop, itertools.repeat(1))
        assert shown == one.text and not any(s in one.text for s in stop)
        assert Pieces().decode(one.tokens).startswith(one.text)
        reasons.append(one.finish_reason)
        other, shown = taken_in(tokens, most, stop, iter(rng.integers(1, 6, most).tolist()))
        assert (other.tokens, other.text, other.finish_reason) == (
            one.tokens, one.text, one.finish_reason
        )  # fmt: skip
        assert shown == other.text
    assert min(map(reasons.count, ("stop", "eos", "length"))) > 20


def test_output_cannot_steer_the_terminal():
    assert visible("a\x1b[2J\r\tb\n\x7fé") == "a␛[2J␍\tb\n\N{REPLACEMENT CHARACTER}é"

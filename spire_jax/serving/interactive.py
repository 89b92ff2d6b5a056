"""Prompts typed one after the other, answers streamed as rounds give them, coloured by origin."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from spire_jax.data.tokenizer import Tokenizer
from spire_jax.serving.batching import Server
from spire_jax.serving.prompts import RequestError, has_chat
from spire_jax.serving.records import Failure, Request, Result
from spire_jax.serving.requests import Defaults, request_of
from spire_jax.serving.text import TextStream, first_stop

NEW = "/new"  # typed for an empty conversation
STYLES = {"accepted": "green", "correction": "yellow", "bonus": "cyan"}


def converse(
    server: Server, defaults: Defaults, console: Console, ask: Callable[[str], str] = input
) -> None:
    """Answer prompts until there are no more (EOFError); Ctrl-C ends an answer.

    With a tokenizer that has a chat template what is typed are the user's messages of one
    conversation, and `/new` begins another; without, each prompt is a text of its own to be
    continued.
    """
    legend = Text("drafted and accepted", STYLES["accepted"])
    legend += Text("  the target's correction", STYLES["correction"])
    legend += Text("  its bonus token", STYLES["bonus"])
    if server.decoder.strategy is not None:
        console.print(legend, soft_wrap=True)
    messages: list[dict[str, str]] = []
    chat, index = has_chat(server.tokenizer), 0
    while True:
        try:
            typed = ask("> ")
        except EOFError:
            return
        except UnicodeDecodeError:
            _say(console, "error: what was typed is not UTF-8")
            continue
        if not typed:
            continue
        if chat and typed.strip() == NEW:
            messages = []
            _say(console, "[a new conversation]", "dim")
            continue
        turn = [*messages, {"role": "user", "content": typed}]
        values = {"messages": turn} if chat else {"prompt": typed}
        try:
            request = request_of(values, index, server.tokenizer, defaults)
        except RequestError as error:
            _say(console, f"error: {error}")
            continue
        index += 1
        if messages and (why := server.check(request)):
            _say(console, f"error: {why}; with this message the conversation is too long, {NEW} "
                          f"begins another")  # fmt: skip
            continue
        answer = _answer(server, request, console)
        if answer is not None:
            messages = [*turn, {"role": "assistant", "content": answer.text}]


def _answer(server: Server, request: Request, console: Console) -> Result | None:
    printer = Printer(server.tokenizer, server.decoder.ends, request.stop, console)
    begin = time.perf_counter()
    try:
        for found in server.serve([request], printer.watch):
            if isinstance(found, Failure):
                _say(console, f"error: {found.error}")
                return None
            printer.end(found)
            seconds = time.perf_counter() - begin
            speed = len(found.tokens) / max(found.decode, 1e-9)
            _say(
                console,
                f"\n[{len(found.tokens)} tokens in {seconds:.2f} s, {speed:.1f} tokens/s, "
                f"tau {found.tau:.2f}, {found.kept:.2f} kept a round, {found.finish_reason}]",
                "dim",
            )
            return found
    except KeyboardInterrupt:
        server.reset()
        _say(console, "\n[interrupted]")
    return None


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), highlight=False, soft_wrap=True)


class Printer:
    """Shows a request's tokens as they come, up to a stop string."""

    def __init__(
        self, tokenizer: Tokenizer, ends: Sequence[int], stop: Sequence[str], console: Console
    ):
        self._ends, self._stop, self._console = ends, stop, console
        self._stream = TextStream(tokenizer.decode)
        self._text, self._runs = "", [(0, "")]  # the text so far; where runs of a style begin
        self._printed = 0
        # A stop string may be under way.
        self._held = max(map(len, stop), default=1) - 1

    def watch(self, request: Request, tokens: list[int], accepted: int, k: int) -> None:
        """A round's tokens (`batching.Watch`)."""
        last = "" if k == 0 else STYLES["bonus" if accepted == k else "correction"]
        for run, style in ((tokens[:accepted], STYLES["accepted"]), (tokens[accepted:], last)):
            self._runs.append((len(self._text), style))
            self._text += self._stream.feed([t for t in run if t not in self._ends])
        cut = first_stop(self._text, self._stop)
        self._print(cut if cut >= 0 else max(len(self._text) - self._held, 0))

    def end(self, result: Result) -> None:
        """What was held back, as far as it belongs to the answer."""
        self._text += self._stream.end()
        self._print(min(len(self._text), len(result.text)))

    def _print(self, end: int) -> None:
        for (begin, style), (stop, _) in zip(
            self._runs, [*self._runs[1:], (len(self._text), "")], strict=True
        ):
            piece = self._text[max(begin, self._printed) : min(stop, end)]
            if piece:
                self._console.print(Text(visible(piece), style), end="", soft_wrap=True)
        self._printed = max(self._printed, end)
        while len(self._runs) > 1 and self._runs[1][0] <= self._printed:
            del self._runs[0]


def visible(text: str) -> str:
    """Text that cannot steer a terminal: control characters as their symbols."""

    def shown(c: str) -> str:
        if c in "\n\t" or c.isprintable():
            return c
        return chr(0x2400 + ord(c)) if ord(c) < 0x20 else "\N{REPLACEMENT CHARACTER}"

    return "".join(map(shown, text))

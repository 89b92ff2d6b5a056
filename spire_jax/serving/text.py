"""Text as tokens arrive: what is complete so far, and where a stop string cuts it."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

Decode = Callable[[Int[np.ndarray, " n"]], str]
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # at the end: of a character some bytes may be to come
LONGEST = 4  # tokens that one character's bytes may be spread over


class TextStream:
    """The text of a growing list of tokens, piece by piece.

    A piece is the difference of two decoded windows that begin at the same token, so that a
    tokenizer whose first token is written differently (a leading space left out) does no harm,
    and long texts are not decoded again and again. Bytes of an unfinished character wait. All
    windows begin where a character does: bytes that are no text decode otherwise from within.
    """

    def __init__(self, decode: Decode):
        self._decode = decode
        self._tokens: list[int] = []
        self._window = self._whole = 0  # the window's first token; tokens that end with a character
        self._shown = 0  # characters of the window that are out

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        self._tokens += tokens
        return self._piece(final=False)

    def end(self) -> str:
        """What is left, complete or not."""
        return self._piece(final=True)

    def _piece(self, final: bool) -> str:
        everything = len(self._tokens)
        for end in () if final else range(everything, everything - LONGEST, -1):
            if end <= self._whole:
                return ""
            text = self._text(self._window, end)
            if not text.endswith(UNFINISHED):
                piece = text[self._shown :]
                self._window, self._whole = self._whole, end
                self._shown = len(self._text(self._window, end))
                return piece
        # So many tokens are no text, but for the last few, that may begin a character.
        text = self._text(self._window, everything)
        end = max(len(text) - (0 if final else LONGEST - 1), self._shown)
        piece, self._shown = text[self._shown : end], end
        return piece

    def _text(self, begin: int, end: int) -> str:
        return self._decode(np.array(self._tokens[begin:end], np.int32))


def first_stop(text: str, stops: Sequence[str], begin: int = 0) -> int:
    """Where the stop string that is complete first starts, of those from `begin`; -1: none is.

    So what follows never changes it, however much text comes at once. Of several that are complete
    with the same character the longest counts.
    """
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop, max(begin, 0))) >= 0]
    return min(found, default=(0, -1))[1]


def tokens_of_text(tokens: Sequence[int], text: str, decode: Decode) -> int:
    """How many of the first tokens it takes to write `text`, a beginning of their text."""
    n = len(tokens)
    while n and decode(np.array(tokens[: n - 1], np.int32)).startswith(text):
        n -= 1
    return n

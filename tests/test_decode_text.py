"""Text of growing tokens, and where stop strings cut it."""

import numpy as np
import pytest

from spire_jax.data.tokenizer import ByteTokenizer
from spire_jax.serving.text import TextStream, first_stop, tokens_of_text

TEXT = "naïve 日本語 👩‍💻 plain\n"


def in_steps(data: bytes, size: int, decode) -> list[str]:
    stream = TextStream(decode)
    pieces = [stream.feed(data[i : i + size]) for i in range(0, len(data), size)]
    return [*pieces, stream.end()]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_are_the_text_whole_characters_at_a_time(size):
    pieces = in_steps(TEXT.encode(), size, ByteTokenizer().decode)
    assert "".join(pieces) == TEXT
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_bytes_that_are_no_text_come_out_at_last():
    decode = ByteTokenizer().decode
    for data in (b"a\xff\xfe\xffbc\xe6\x97", b"\xf0\x9f", b"\xff" * 9 + b"x"):
        pieces = in_steps(data, 1, decode)
        assert "".join(pieces) == decode(np.frombuffer(data, np.uint8).astype(np.int32))
    assert "".join(in_steps(b"\xff" * 9, 1, decode)[:-1])  # not only at the end


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_whatever_the_bytes_the_pieces_are_the_whole(size):
    """Text, parts of characters and bytes that are none, in any order; by tokens of many bytes."""
    rng, decode = np.random.default_rng(size), ByteTokenizer().decode
    parts = [*(bytes([b]) for b in b"\xff\xe6\x97\xf0\x9f\xedx"), *map(str.encode, "é日👩")]
    parts += [b"\xe6\x97", b"\xa5\xff"]  # the second ends the first's character, with more behind

    def spelled(ids):
        return decode(np.array([b for i in ids for b in parts[i]], np.int32))

    for _ in range(300):
        data = b"".join(rng.choice(np.array(parts, object), 30))
        whole = decode(np.frombuffer(data, np.uint8).astype(np.int32))
        assert "".join(in_steps(data, size, decode)) == whole
        ids = rng.integers(0, len(parts), 30).tolist()
        assert "".join(in_steps(ids, size, spelled)) == spelled(ids)


def test_a_tokenizer_that_drops_the_first_space():
    words = ["the", "cat", "sat", "on", "it"]
    decode = lambda ids: " ".join(words[i] for i in np.asarray(ids).tolist())  # noqa: E731
    stream = TextStream(decode)
    assert [stream.feed([i]) for i in range(5)] == ["the", " cat", " sat", " on", " it"]


def test_long_texts_are_not_decoded_again():
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return ByteTokenizer().decode(ids)

    in_steps(b"x" * 500, 1, decode)
    assert max(decoded) <= 8


def test_the_stop_string_that_is_complete_first():
    assert first_stop("..abcdef..", ("abcdef", "c")) == 4
    assert first_stop("..abc", ("c", "bc")) == 3  # of two that end together, all of both goes
    assert first_stop("a fox, a dog", ("dog", "fox")) == 2
    assert first_stop("a fox, a dog", ("dog", "fox"), 3) == 9
    assert first_stop("a fox", ("fox",), -7) == 2
    assert first_stop("a fox", ("wolf",)) == -1 == first_stop("a fox", ())


def test_tokens_behind_a_text():
    data, decode = list("日本x".encode()), ByteTokenizer().decode
    assert tokens_of_text(data, "日本x", decode) == 7
    assert tokens_of_text(data, "日", decode) == 3
    assert tokens_of_text(data, "", decode) == 0

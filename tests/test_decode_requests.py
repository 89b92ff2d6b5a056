"""Prompt files line by line, good and bad; output files written, refused and resumed."""

import json

import numpy as np
import pytest

from spire_jax.data.tokenizer import ByteTokenizer
from spire_jax.serving.outputs import open_results
from spire_jax.serving.prompts import RequestError
from spire_jax.serving.records import Failure, Request, Result
from spire_jax.serving.requests import Defaults, derived_seed, read_requests

DEFAULTS = Defaults(max_tokens=9, seed=3, stop=("END",))


def read(content: bytes, form: str = "jsonl", tokenizer=None) -> list:
    lines = content.splitlines(keepends=True)
    return list(read_requests(lines, form, tokenizer or ByteTokenizer(), DEFAULTS))


def one(**values) -> Request | Failure:
    return read(json.dumps(values).encode())[0]


def test_a_line_says_what_it_wants():
    found = one(prompt="héllo", id="a", max_tokens=4, seed=7, stop=["x", "yz"])
    assert found.tokens.tolist() == list("héllo".encode())
    assert (found.id, found.max_tokens, found.seed, found.stop) == ("a", 4, 7, ("x", "yz"))
    assert one(tokens=[1, 256], stop="x").tokens.tolist() == [1, 256]
    assert one(tokens=[1], stop="x").stop == ("x",) and one(tokens=[1], stop=[]).stop == ()


def test_a_seed_has_64_bits():
    for seed in (-(2**63), -1, 2**32, 2**63 - 1):
        assert one(prompt="a", seed=seed).seed == seed


def test_what_it_does_not_say_follows_from_its_place():
    """Blank lines are none; the index counts requests, the line the file's lines."""
    found = read(b'{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [(r.id, r.line) for r in found] == [(0, 1), (1, 3)]
    assert [r.max_tokens for r in found] == [9, 9] and found[0].stop == ("END",)
    assert [r.seed for r in found] == [derived_seed(3, "request/0"), derived_seed(3, "request/1")]
    assert len({derived_seed(s, f"request/{i}") for s in range(4) for i in range(50)}) == 200
    assert one(prompt="a", id="x").seed == derived_seed(3, "request/x")  # wherever it stands


def test_null_is_as_good_as_absent():
    found = one(prompt="a", tokens=None, id=None, max_tokens=None, seed=None, stop=None)
    assert (found.id, found.max_tokens, found.stop) == (0, 9, ("END",))
    assert found.seed == derived_seed(3, "request/0")


def test_a_byte_order_mark_is_no_text():
    bom = b"\xef\xbb\xbf"
    for form, line in (("jsonl", b'{"prompt": "a"}'), ("lines", b"a"), ("text", b"a")):
        assert read(bom + line, form)[0].tokens.tolist() == [97]
    assert len(read(b"a\n" + bom + b"a", "lines")[1].tokens) == 4  # it is text elsewhere


def test_text_and_lines():
    assert [bytes(r.tokens.tolist()) for r in read(b"a b\n\nc\n", "text")] == [b"a b\n\nc\n"]
    found = read(b"a b\r\n\n c\nd", "lines")
    assert [bytes(r.tokens.tolist()) for r in found] == [b"a b", b" c", b"d"]
    assert read(b"", "text") == read(b" \n", "text") == read(b"\n\n", "lines") == []


BAD = [
    (b"not json", "line 1 is not JSON: Expecting value at column 1"),
    (b'{"prompt": "a"', "line 1 is not JSON"),
    (b'{"prompt": "\xff"}', "line 1 is not UTF-8: byte 12 is 0xff"),
    (b'["a"]', "line 1: not a JSON object"),
    (b'{"prompt": "a", "max_token": 3}', "unknown field 'max_token'; there are prompt, tokens"),
    (b"{}", "give one of prompt, tokens, messages, turns; found none"),
    (b'{"prompt": "a", "tokens": [1]}', "found prompt and tokens"),
    (b'{"prompt": ""}', "the prompt is empty"),
    (b'{"prompt": 3}', "prompt=3 must be a string"),
    (b'{"prompt": "\\ud800"}', "half a surrogate pair"),
    (b'{"turns": ["a", "\\ud800"]}', "half a surrogate pair"),
    (b'{"tokens": []}', "the prompt is empty"),
    (b'{"tokens": [257]}', "ids below 257"),
    (b'{"tokens": [-1]}', "ids below 257"),
    (b'{"tokens": [true]}', "ids below 257"),
    (b'{"tokens": "abc"}', "ids below 257"),
    (b'{"prompt": "a", "max_tokens": 0}', "max_tokens=0 must be a whole number from 1"),
    (b'{"prompt": "a", "max_tokens": 2.5}', "max_tokens=2.5 must be"),
    (b'{"prompt": "a", "max_tokens": true}', "max_tokens=True must be"),
    (
        b'{"prompt": "a", "seed": 9223372036854775808}',
        "whole number from -9223372036854775808 to 9",
    ),
    (b'{"prompt": "a", "seed": -9223372036854775809}', "seed=-9223372036854775809 must be"),
    (b'{"prompt": "a", "seed": 1.0}', "seed=1.0 must be a whole number"),
    (b'{"prompt": "a", "stop": [""]}', "none empty"),
    (b'{"prompt": "a", "stop": 3}', "stop=3 must be"),
    (b'{"prompt": "a", "id": [1]}', "id=.1. must be a string or a whole number"),
    (b'{"messages": [{"role": "user", "content": "hi"}]}', "bytes has no chat template"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"prompt": ' + b"[" * 101 + b"]" * 101 + b"}", "it is nested deeper than 100 times"),
    (b'{"prompt": ["' + b"x" * 10**5 + b'"]}', r"^line 1: prompt=.{900,1600}must be a string$"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "line 1: .* value has 5000 digits"),
    (b'{"prompt": null}', "give one of prompt, tokens, messages, turns; found none"),
    (b'\xef\xbb\xbf{"prompt": "\xff"}', "line 1 is not UTF-8: byte 12 is 0xff"),
]


@pytest.mark.parametrize("line, message", BAD, ids=lambda v: str(v)[:40])
def test_a_bad_line_fails_alone(line, message):
    found = read(line + b'\n{"prompt": "b"}\n')
    assert isinstance(found[0], Failure) and found[0].line == 1 and found[0].id == 0
    with pytest.raises(RequestError, match=message):
        raise RequestError(found[0].error)
    assert found[1].tokens.tolist() == [98] and found[1].id == 1
    record = json.loads(json.dumps(found[0].record()))
    assert record == {"id": 0, "line": 1, "error": found[0].error}


def test_an_id_names_one_request():
    found = read(b'{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n{"prompt": "c"}\n')
    assert [type(r) for r in found] == [Request, Failure, Request]
    assert found[1].error == "the id 'x' is that of line 1 too; rename one"


class Chatty(ByteTokenizer):
    def encode_prompt(self, text):
        return np.concatenate([np.array([7], np.int32), self.encode(text)])

    def chat(self, messages):
        if messages[0]["role"] == "robot":
            raise ValueError("the template knows no robots")
        return np.array([len(messages)], np.int32)


def test_messages_and_a_first_token_are_the_tokenizers_business():
    def of(line: bytes):
        return read(line, tokenizer=Chatty())[0]

    assert of(b'{"messages": [{"role": "user", "content": "hi"}]}').tokens.tolist() == [1]
    assert of(b'{"prompt": "a"}').tokens.tolist() == [7, 97]
    assert "no robots" in of(b'{"messages": [{"role": "robot", "content": ""}]}').error
    for bad in (b"[]", b'"hi"', b'[{"content": "hi"}]', b'[{"role": 3}]'):
        assert "must be a list of" in of(b'{"messages": ' + bad + b"}").error


def test_what_was_asked_for_is_the_same_tomorrow():
    """A template may write the date: what is resumed are the messages."""

    class Dated(Chatty):
        day = 0

        def chat(self, messages):
            return np.array([self.day, len(messages)], np.int32)

    def of(day: int, **values) -> Request:
        tokenizer = Dated()
        tokenizer.day = day
        return read(json.dumps(values).encode(), tokenizer=tokenizer)[0]

    hi = {"messages": [{"role": "user", "content": "hi"}]}
    assert of(1, **hi).asked == of(2, **hi).asked
    others = [{"messages": [{"role": "user", "content": "ho"}]}, hi | {"max_tokens": 8},
              hi | {"seed": 1}, hi | {"stop": "x"}, {"prompt": "hi"}]  # fmt: skip
    assert len({of(1, **values).asked for values in (hi, *others)}) == 6


# --- output files ------------------------------------------------------------------------------


def result(name) -> Result:
    request = Request(name, np.array([1], np.int32), 3, 0)
    return Result(request, [65, 66], "AB\u2028ü", [3], [2], "length", 0.5, 0.25, 0.5, 0.75)


def test_results_are_lines_that_are_there_at_once(tmp_path):
    path = tmp_path / "out.jsonl"
    with open_results(str(path), False) as results:
        results.write(result("a"))
        record = json.loads(path.read_text())  # before the file is closed
        results.write(Failure(4, "too long", 9))
    assert record["text"] == "AB\u2028ü" and record["tokens"] == [65, 66]
    assert record["timing"] == {
        "queued": 0.5, "prefill": 0.25, "decode": 0.5, "first_token": 0.75, "tokens_per_s": 4.0,
    }  # fmt: skip
    assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()] == ["a", 4]


def test_an_existing_file_is_never_overwritten(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    with pytest.raises(RequestError, match=r"exists; name another file, or go on with --resume"):
        with open_results(str(path), False):
            pass
    with pytest.raises(RequestError, match="line 1 is no result"):
        path.write_text("precious\n")
        with open_results(str(path), True):
            pass
    assert path.read_text() == "precious\n"
    for foreign in ("precious", '{"layers": 3}', "{"):  # no newline: not one of our lines, torn
        path.write_text(foreign)
        with (
            pytest.raises(RequestError, match="line 1 is no result"),
            open_results(str(path), True),
        ):
            pass
        assert path.read_text() == foreign


NO_RESULTS = [
    b"[" * 10**5, b'"error"', b'["error"]', b'{"id": 3}',
    b'{"id": true, "asked": "b", "made_by": {}}', b'{"id": 1.5, "asked": "b", "made_by": {}}',
    b'{"id": 3, "asked": [], "made_by": {}}', b'{"id": 3, "asked": "b", "made_by": "c"}',
]  # fmt: skip


@pytest.mark.parametrize("line", NO_RESULTS, ids=lambda line: str(line)[:40])
def test_only_results_are_gone_on_with(tmp_path, line):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"id": 2, "line": 1, "error": "e"}\n' + line + b"\n")
    with pytest.raises(RequestError, match="line 2 is no result"):
        with open_results(str(path), True):
            pass


def test_what_a_start_that_failed_has_left_is_no_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(OSError), open_results(str(path), False):
        raise OSError("no weights")
    with open_results(str(path), False) as results:
        results.write(result("a"))
    assert json.loads(path.read_text())["id"] == "a"


def test_an_id_that_is_no_text_goes_to_stdout(monkeypatch, tmp_path):
    path = tmp_path / "stdout"
    with path.open("w", encoding="ascii") as file:
        monkeypatch.setattr("sys.stdout", file)
        with open_results("-", False) as results:
            results.write(result("\ud800é"))
    line = path.read_bytes()
    assert json.loads(line)["id"] == "\ud800é" and "é".encode() in line


def test_resuming_goes_on_after_the_last_whole_line(tmp_path):
    path = tmp_path / "out.jsonl"
    with open_results(str(path), True) as results:  # nothing is there yet
        assert results.written == {}
        results.write(result("a"))
        results.write(result(1))
    whole = path.read_bytes()
    for torn in (b'{"', b'{"id": "b", "te'):
        path.write_bytes(whole + torn)
        with open_results(str(path), True) as results:
            assert set(results.written) == {"a", 1}
            results.write(result("b"))
        ids = [json.loads(line)["id"] for line in path.read_bytes().splitlines()]
        assert ids == ["a", 1, "b"]


def test_what_failed_is_not_done(tmp_path):
    """Also where the failure is that of a second request with the id of one still to come."""
    path = tmp_path / "out.jsonl"
    with open_results(str(path), False) as results:
        results.write(Failure("x", "the id 'x' is that of line 1 too; rename one", 2))
        results.write(result("y"))
    with open_results(str(path), True) as results:
        assert set(results.written) == {"y"}

"""`python -m spire_jax.decode` as it is typed: what it prints, writes and returns."""

import dataclasses
import json
import os
import re
import threading
import types
from typing import Any

import jax
import numpy as np
import pytest
from models import TINY, pair

from spire_jax.config.schema import ConfigError, ExperimentConfig
from spire_jax.data.tokenizer import ByteTokenizer
from spire_jax.models.sharding import MESH_AXES, make_mesh
from spire_jax.serving import command
from spire_jax.serving.batching import Server
from spire_jax.serving.loading import Loaded
from spire_jax.serving.records import Request
from spire_jax.serving.requests import Defaults, derived_seed, request_of

BYTES = dataclasses.replace(TINY, n_layers=2, vocab_size=264, n_tokens=257, max_len=120)
LINES = [
    {"prompt": "abc", "id": "a", "max_tokens": 5},
    {"prompt": "x" * 30},
    {"prompt": "y" * 200},
    {"tokens": [1, 2], "max_tokens": 3, "seed": 9},
]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The command with a tiny model in place of a trained one: status, stdout, stderr."""

    def loaded(args, config):
        p = pair("spire", BYTES)
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        made_by = {"k": 2, "sampling": {"temperature": args.temperature}}
        return Loaded(p.decoder(2), p.weights, ByteTokenizer(), mesh, (), made_by)

    monkeypatch.setattr(command, "load_for_decoding", loaded)

    def call(*argv: str, stdin: bytes | None = None, width: int | None = 120):
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=open_bytes(stdin)))
        fixed = ("--config=configs/quickstart.py", "--method=spire", f"--workdir={tmp_path}",
                 "--batch-size=2", "--max-tokens=4", "--chunk=16")  # fmt: skip
        try:
            status: Any = command.main([*fixed, *([f"--width={width}"] if width else []), *argv])
        except SystemExit as end:
            status = end.code
        out = capsys.readouterr()
        return status, [json.loads(line) for line in out.out.splitlines()], out.err

    def open_bytes(content: bytes):
        path = tmp_path / "stdin"
        path.write_bytes(content)
        return path.open("rb")

    return call


def prompts(tmp_path, lines=LINES) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"--prompts={path}"


def test_a_file_of_prompts(run, tmp_path):
    """One is too long: it fails alone, with status 1 at the end; --resume repeats it alone."""
    out = tmp_path / "out.jsonl"
    status, _, err = run(prompts(tmp_path), f"--out={out}")
    found = {r["id"]: r for r in map(json.loads, out.read_text().splitlines())}
    assert status == 1 and set(found) == {"a", 1, 2, 3}
    assert [len(found[i]["tokens"]) for i in ("a", 1, 3)] == [5, 4, 3]
    assert found[1]["text"] == ByteTokenizer().decode(np.array(found[1]["tokens"]))
    assert found[2]["line"] == 3 and "goes beyond the model's context of 120" in found[2]["error"]
    assert "error: 2: prompt 200" in err
    assert "3 requests, 1 failed; 12 tokens" in err and "programs for serving" in err
    assert "batch 2, width 120, chunk 16" in err and "tau" in err
    assert re.search(r"time to first token: [0-9.]+ s .*, the first of all [0-9.]+ s", err)

    before = out.read_bytes()
    status, _, err = run(prompts(tmp_path), f"--out={out}")
    assert status == 2 and "exists" in err and out.read_bytes() == before
    status, _, err = run(prompts(tmp_path), f"--out={out}", "--resume")
    assert status == 1 and "0 requests, 1 failed" in err and "no rounds" in err
    assert out.read_bytes() == before + json.dumps(found[2]).encode() + b"\n"
    mended = [*LINES[:2], {"prompt": "y"}, LINES[3], {"prompt": "z", "id": "new"}]
    for said in ("2 requests, 0 failed", "all of"):
        status, _, err = run(prompts(tmp_path, mended), f"--out={out}", "--resume")
        assert status == 0 and said in err
    assert out.read_bytes().startswith(before)
    assert {json.loads(line)["id"] for line in out.read_text().splitlines()[-2:]} == {2, "new"}


def test_stdin_and_the_seed(run):
    """The same seed, the same output; another, another; lines and one text."""
    first, again, other = (
        run("--prompts=-", "--format=lines", f"--seed={seed}", stdin=b"abc\n\nde\n")
        for seed in (1, 1, 2)
    )
    tokens = [[r["tokens"] for r in sorted(of[1], key=lambda r: r["id"])]
              for of in (first, again, other)]  # fmt: skip
    assert first[0] == 0 and len(tokens[0]) == 2
    assert tokens[0] == tokens[1] != tokens[2]
    status, [record], _ = run("--prompts=-", stdin=b"abc\n\nde\n")
    assert status == 0 and record["prompt_tokens"] == 8


@pytest.mark.parametrize(
    "argv, stdin, message",
    [
        (["--prompts=-"], b"", "holds no prompt"),
        (["--prompts=-", "--format=lines"], b"\n", "stdin held no prompt"),
        (["--prompts=missing.jsonl"], None, "missing.jsonl"),
        ([], None, "give --prompts=FILE"),
        (["--prompts=-", "--interactive"], None, "or --interactive"),
        (["--interactive", "--out=x"], None, "--interactive writes no file: leave out --out"),
        (["--prompts=-", "--max-tokens=0"], None, "--max-tokens=0: use 1 or more"),
        (["--prompts=-", "--stop="], None, "--stop is empty"),
        (["--prompts=-", "--resume"], None, "--resume needs --out=FILE"),
        (["--prompts=-", "--nonsense"], None, "unknown argument '--nonsense'"),
    ],
)
def test_what_cannot_be_started(run, argv, stdin, message):
    status, records, err = run(*argv, stdin=stdin)
    assert status == 2 and message in err and not records


def test_where_a_draft_ends_beyond_the_row(run, monkeypatch):
    """What is served of requests that are not known beforehand does not depend on k."""
    monkeypatch.setattr(command, "WIDTH", 118)
    lines = b"x" * 114 + b"\n" + b"x" * 115 + b"\n"
    status, [good, bad], _ = run("--prompts=-", "--format=lines", stdin=lines, width=None)[:3]
    good, bad = (good, bad) if "tokens" in good else (bad, good)
    assert status == 1 and len(good["tokens"]) == 4
    assert "115 + max_tokens 4 + k 2 = 121 goes beyond the 120 positions" in bad["error"]


def test_an_empty_file(run, tmp_path):
    status, _, err = run(prompts(tmp_path, []))
    assert status == 2 and "is empty" in err


def test_only_what_was_made_alike_is_resumed(run, tmp_path):
    """From the same prompts by the same method, sampling and weights; nothing else is mixed in."""
    out, lines = tmp_path / "out.jsonl", [{"prompt": "abc"}, {"prompt": "de"}]
    assert run(prompts(tmp_path, lines), f"--out={out}")[0] == 0
    before = out.read_bytes()
    for more, of, message in (
        (("--temperature=0.5",), lines, "sampling.temperature=None (now 0.5)"),
        ((), [{"prompt": "new"}, *lines], "line 1 has the id 0, whose output in --out is of anoth"),
        (("--seed=1",), lines, "another prompt, max_tokens, seed or stop"),
        (("--max-tokens=5",), lines, "another prompt, max_tokens, seed or stop"),
        (("--stop=x",), lines, "another prompt, max_tokens, seed or stop"),
    ):
        status, _, err = run(prompts(tmp_path, of), f"--out={out}", "--resume", *more)
        assert status == 2 and message in err and out.read_bytes() == before, err
    status, _, err = run(prompts(tmp_path, [*lines, {"prompt": "new"}]), f"--out={out}", "--resume")
    assert status == 0 and "1 requests, 0 failed" in err and out.read_bytes().startswith(before)
    # Of a stream, too: what is another's ends it where it comes.
    for third, said, end in (("new", "0 requests, 0 failed; 0 tokens", 0), ("x", "line 3 has", 2)):
        stdin = "".join(json.dumps({"prompt": p}) + "\n" for p in ("abc", "de", third)).encode()
        before = out.read_bytes()
        status, _, err = run("--prompts=-", "--format=jsonl", f"--out={out}", "--resume",
                             stdin=stdin, width=None)  # fmt: skip
        assert status == end and said in err and out.read_bytes() == before
    # With ids a line may stand anywhere.
    named = [{"prompt": "abc", "id": "a"}, {"prompt": "de", "id": "b"}]
    out.unlink()
    assert run(prompts(tmp_path, named[1:]), f"--out={out}")[0] == 0
    assert "1 requests" in run(prompts(tmp_path, named), f"--out={out}", "--resume")[2]
    first, second = map(json.loads, out.read_text().splitlines())
    assert (first["id"], second["id"]) == ("b", "a") and first["made_by"]["k"] == 2


def test_questions_of_several_turns(run, tmp_path):
    """Each on top of the answer before: what plain prompts of the same tokens give."""
    question = {"question_id": 81, "category": "writing", "turns": ["ab", "cd", "e"],
                "reference": ["x", "y", "z"]}  # fmt: skip
    status, [other, record], err = sorted_by_id(run(prompts(tmp_path, [question, LINES[0]])))
    assert status == 0 and "2 requests, 0 failed; 17 tokens" in err
    assert other["id"] == "a" and len(other["tokens"]) == 5
    assert list(record)[:4] == ["id", "line", "category", "turns"]
    assert (record["id"], record["line"], record["category"]) == (81, 1, "writing")
    assert re.search(
        r"^writing: tau \d\.\d+, of which \d\.\d+ tokens a round were kept$", err, re.M
    )
    read, seed = b"ab\n", derived_seed(0, "request/81")
    for i, (answer, turn) in enumerate(zip(record["turns"], (b"cd", b"e", b""), strict=True)):
        seed = derived_seed(seed, f"turn/{i}") if i else seed
        _, [alone], _ = run(prompts(tmp_path, [{"tokens": list(read), "seed": seed}]))
        assert answer["tokens"] == alone["tokens"] and answer["text"] == alone["text"]
        assert answer["prompt_tokens"] == len(read) == alone["prompt_tokens"]
        read = [*read, *answer["tokens"], *b"\n", *turn, *b"\n"]


def test_a_turn_that_is_too_long_keeps_the_answers_before(run, tmp_path):
    turns = {"turns": ["ab", "c" * 120], "category": "long"}
    status, [record], err = run(prompts(tmp_path, [turns]))
    assert status == 1 and "0 requests, 1 failed" in err
    assert list(record) == ["id", "line", "category", "turns", "error"]
    assert "turn 2: prompt 129 + max_tokens 4 = 133 goes beyond the model's" in record["error"]
    assert len(record["turns"]) == 1 and len(record["turns"][0]["tokens"]) == 4


def sorted_by_id(found):
    status, records, err = found
    return status, sorted(records, key=lambda r: str(r["id"]), reverse=True), err


def test_what_was_cut_is_not_in_what_was_kept(run, tmp_path):
    """tau counts what rounds accepted, whatever became of it; beside it is what became output."""
    status, records, err = run(prompts(tmp_path, [{"prompt": "abc", "max_tokens": 1}] * 3))
    emitted = sum(sum(r["generation_lengths"]) for r in records)
    assert status == 0 and [r["kept_per_round"] for r in records] == [1, 1, 1]
    assert [r["tau"] for r in records] == [r["generation_lengths"][0] for r in records]
    assert f"; tau {emitted / 3:.3f}, of which 1.000 tokens a round were kept; " in err


def test_ctrl_c_keeps_what_is_finished(run, tmp_path, monkeypatch):
    out, write = tmp_path / "out.jsonl", command.Results.write

    def interrupted(self, result):
        write(self, result)
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Results, "write", interrupted)
    status, _, err = run(prompts(tmp_path), f"--out={out}")
    assert status == 130 and "interrupted" in err and "requests" in err
    assert len(out.read_text().splitlines()) == 1


def test_a_prompt_through_a_named_pipe(run, tmp_path):
    """Of size 0, and not empty."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b"abc",))
    writer.start()
    status, [record], _ = run(f"--prompts={path}")
    writer.join()
    assert status == 0 and record["prompt_tokens"] == 3


def test_a_start_that_failed_can_be_tried_again(run, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    assert run(f"--prompts={tmp_path / 'none.jsonl'}", f"--out={out}")[0] == 2
    with monkeypatch.context() as patch:

        def fails(args, config):
            raise ConfigError("no weights")

        patch.setattr(command, "load_for_decoding", fails)
        assert "no weights" in run(prompts(tmp_path), f"--out={out}")[2]
    assert run(prompts(tmp_path, LINES[:1]), f"--out={out}")[0] == 0
    assert json.loads(out.read_text())["id"] == "a"


def test_what_the_device_cannot_hold(run, tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")

    monkeypatch.setattr(command, "_server", full)
    status, _, err = run(prompts(tmp_path))
    assert status == 2 and "Out of memory; if" in err and "lower --width or --batch-size" in err


def test_an_interruption_does_not_wait_for_stdin(run, monkeypatch):
    """A line was read, and a thread waits for the next."""

    def interrupted(server, requests, *_):
        requests.take(True)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_server", lambda *_: None)
    monkeypatch.setattr(command, "_serve", interrupted)
    end, late = os.pipe(), threading.Event()
    with os.fdopen(end[0], "rb") as stdin, os.fdopen(end[1], "wb", 0) as writer:
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=stdin))
        writer.write(b"abc\n")
        rescue = threading.Timer(5, lambda: (late.set(), writer.close()))
        rescue.start()
        status, _, err = run("--prompts=-", "--format=lines")
        rescue.cancel()
    assert status == 130 and "interrupted" in err and not late.is_set()


# --- shapes ------------------------------------------------------------------------------------


def loaded_with(shape=(1, 1), **model) -> Loaded:
    p = pair("spire", BYTES)
    decoder = p.decoder(2)
    target = dataclasses.replace(decoder.target, config=dataclasses.replace(BYTES, **model))
    decoder = dataclasses.replace(decoder, target=target)
    devices = np.array(jax.devices()[:1] * shape[0] * shape[1])  # for the shape alone
    mesh = jax.sharding.Mesh(devices.reshape(*shape, 1), MESH_AXES)
    return Loaded(decoder, p.weights, ByteTokenizer(), mesh, ())


def test_the_width_is_what_the_longest_needs():
    """What one line asks for is not all others' width, where the model sets no limit."""

    def width(*lengths_and_budgets, max_len=0) -> int:
        wanted = [Request(0, np.zeros(n, np.int32), budget, 0) for n, budget in lengths_and_budgets]
        return command._needed(wanted, loaded_with(max_len=max_len), 128)

    assert width((100, 128)) == 256 and width((100, 155)) == 512 and width() == 256
    assert width((100, 128), (3, 10**9)) == 256
    assert width((100, 1900), (3, 10**9)) == 2048 and width((100, 1950)) == 256
    assert width((4000, 128), (3, 10**9)) == width((4000, 128)) == 4352
    assert width((100, 3000), (3, 10**9), max_len=4096) == 3328
    assert width((4, 2044)) == 2304  # with k


def test_of_several_turns_as_many_as_there_is_room_for():
    """Where not all fit, the first still do; a budget of its own is no one else's width."""

    def width(usual=128, max_len=0, **own) -> int:
        values = {"turns": ["a" * 99] * 3, **own}
        asked = request_of(values, 0, ByteTokenizer(), Defaults(usual))
        return command._needed([asked], loaded_with(max_len=max_len), usual)

    assert width() == 768 and width(max_len=500) == 512  # 304 + 3 * 128
    assert width(2000) == 6400 and width(2000, 4096) == 4352
    assert width(max_tokens=1500) == 2304 and width(max_tokens=10**9) == 256


def test_a_batch_fits_the_mesh(monkeypatch):
    def unmade(decoder, weights, tokenizer, serving, depths):
        server = object.__new__(Server)
        server.serving = serving
        return server

    monkeypatch.setattr(command, "Server", unmade)

    def batch(least, shape, *argv) -> int:
        args = command.arguments().parse_args(argv)
        serving = command._server(args, ExperimentConfig(), loaded_with(shape), least, 120).serving
        assert serving.chunk_rows == shape[0] * shape[1]
        return serving.batch

    assert [batch(least, (1, 1)) for least in (1, 8)] == [1, 8]
    assert [batch(least, (3, 2)) for least in (1, 8)] == [6, 12]
    assert batch(1, (2, 1), "--interactive", "--batch-size=4") == 4
    with pytest.raises(ConfigError, match="--batch-size=3 is not a multiple"):
        batch(1, (2, 1), "--interactive", "--batch-size=3")


def test_resumption_keeps_the_shapes(run, tmp_path, monkeypatch):
    """The width is what all requests need, those that are done too."""
    seen = []
    monkeypatch.setattr(command, "_needed", lambda found, *_: seen.append(len(found)) or 120)
    for lines in (LINES[:1], [*LINES[:1], {"prompt": "z"}]):
        argv = (prompts(tmp_path, lines), f"--out={tmp_path / 'out.jsonl'}", "--resume")
        status, _, err = run(*argv, width=None)
        assert status == 0 and "1 requests, 0 failed" in err
    assert seen == [1, 2]

"""`python -m spire_jax.decode` as it is typed: what it prints, writes and returns."""

import argparse
import contextlib
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
from pretrained_models import tiny, write_safetensors

from spire_jax.config.files import command_line
from spire_jax.config.schema import (
    ConfigError,
    ExperimentConfig,
    ModelConfig,
    PretrainedConfig,
    StudyConfig,
)
from spire_jax.data.tokenizer import ByteTokenizer
from spire_jax.drafting.magicdec import MagicDecOptions
from spire_jax.drafting.snapkv import SnapKvOptions
from spire_jax.drafting.spire import SpireOptions
from spire_jax.drafting.vanilla import VanillaOptions
from spire_jax.models.sharding import MESH_AXES, make_mesh
from spire_jax.serving import command, loading
from spire_jax.serving.batching import Server
from spire_jax.serving.loading import Loaded, for_method, load_for_decoding, method_name
from spire_jax.serving.records import Request
from spire_jax.serving.requests import Defaults, derived_seed, request_of
from spire_jax.training.workdir import params_sha256

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
        serving = command._server(args, CONFIG, loaded_with(shape), least, 120).serving
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


# --- methods and their weights -----------------------------------------------------------------

CONFIG = ExperimentConfig(
    target=ModelConfig(vocab_size=264, n_tokens=257),
    drafts=(("long", SpireOptions()), ("plain", VanillaOptions(window=0)),
            ("sparse", MagicDecOptions()), ("chosen", SnapKvOptions())),
)  # fmt: skip


def test_methods_by_name_and_by_kind():
    asked = ("long", "plain", "spire", "vanilla", "magicdec", "autoregressive")
    assert [method_name(CONFIG, method) for method in asked] == [
        "long", "plain", "long", "plain", "sparse", "autoregressive",
    ]  # fmt: skip
    one = dataclasses.replace(CONFIG, drafts=CONFIG.drafts[:1])
    assert method_name(one, None) == "long"
    with pytest.raises(ConfigError, match=r"--method=: the config has 4 drafts; choose from"):
        method_name(CONFIG, None)
    two = dataclasses.replace(CONFIG, drafts=(*CONFIG.drafts, ("wide", SpireOptions())))
    with pytest.raises(ConfigError, match="--method=spire: the config has 2 drafts of this kind"):
        method_name(two, "spire")
    with pytest.raises(ConfigError, match=r"--method=eagle: unknown; choose from \['long'"):
        method_name(CONFIG, "eagle")
    with pytest.raises(ConfigError, match=r"'autoregressive'\], or make one: --config.drafts.NAME"):
        method_name(one, "vanilla")


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("snapkv", {}, "--method=chosen: .* selects over a whole prompt"),
        ("spire", {"top_p": 1.5}, "decode.top_p=1.5 must lie"),
        ("spire", {"temperature": -1.0}, "decode.temperature=-1.0 must be 0"),
    ],
)
def test_what_is_refused_before_anything_is_read(method, options, message):
    sampling = {"temperature": None, "top_k": None, "top_p": None} | options
    args = argparse.Namespace(
        method=method, workdir="nowhere", draft=None, ignore_eos=False, out="-", **sampling
    )
    with pytest.raises(ConfigError, match=message):
        load_for_decoding(args, CONFIG)


def test_an_exported_draft_is_the_method_whatever_its_kind(monkeypatch, tmp_path):
    """And nothing of the config's drafts is of it."""
    found = []

    def checked(config, method):
        found.append((method, [name for name, _ in config.drafts]))
        raise ConfigError("enough")

    exported = types.SimpleNamespace(draft=CONFIG.drafts[1][1])
    monkeypatch.setattr(loading, "_Target", lambda *_: types.SimpleNamespace(sha256=""))
    monkeypatch.setattr(loading, "import_draft", lambda *_: exported)
    monkeypatch.setattr(loading, "method_name", checked)
    config = dataclasses.replace(CONFIG, study=StudyConfig(of="long", ablations=""))
    args = argparse.Namespace(method=None, workdir="nowhere", draft=tmp_path, ignore_eos=False,
                              temperature=None, top_k=None, top_p=None, out="-")  # fmt: skip
    with pytest.raises(ConfigError, match=r"holds no config.json; give a folder that python -m"):
        load_for_decoding(args, config)
    (tmp_path / "config.json").touch()
    with pytest.raises(ConfigError, match="enough"):
        load_for_decoding(args, config)
    assert found == [("exported", ["exported"])]


def test_a_target_of_a_work_directory_is_loaded_once(monkeypatch):
    """For its hash and for decoding: two at a time may not fit."""
    params, loads = {"w": np.ones(3, np.float32)}, []
    at = types.SimpleNamespace(pretrained=None, mesh=None,
                               target=lambda: loads.append(1) or params)  # fmt: skip
    monkeypatch.setattr(loading, "WorkDir", lambda *_: at)
    target = loading._Target(CONFIG, "somewhere")
    assert target.sha256 == params_sha256(params) and target.params is params and loads == [1]


def test_what_made_an_output_is_what_json_keeps():
    """The draft's own values alone: every line holds them."""
    config = dataclasses.replace(CONFIG, drafts=(("long", SpireOptions(window=9)),))
    decoder = pair("spire", BYTES).decoder(2)
    made = loading._made_by(config, "long", decoder, (1, 2))
    assert made["method"] == {"kind": "spire", "window": 9} and made["k"] == [1, 2]
    assert json.loads(json.dumps(made)) == made and "pretrained_dtype" in made
    plain = loading._made_by(config, "autoregressive", decoder, ())
    assert plain["method"] == {"kind": "autoregressive"} and plain["k"] == 2


def test_a_checkpoint_needs_no_work_directory(monkeypatch, tmp_path):
    """Where nothing that was trained is asked for, one that is given is not opened."""
    monkeypatch.setattr(loading, "WorkDir", None)
    pretrained = PretrainedConfig(path=str(write_safetensors(tmp_path, *tiny("llama"))))
    config = dataclasses.replace(CONFIG, pretrained=pretrained, drafts=CONFIG.drafts[2:])
    assert loading._Target(config, "nowhere").workdir is None
    with pytest.raises(TypeError):
        loading._Target(dataclasses.replace(config, drafts=CONFIG.drafts), "nowhere")


SMALL = (  # the quickstart's drafts and rows do not fit it
    "--config.target.d_model=64", "--config.target.d_head=16", "--config.target.max_len=100",
    "--config.drafts.spire.d_head=8",
)  # fmt: skip


@pytest.mark.parametrize(
    "method, more, message",
    [
        ("autoregressive", (), ""),
        ("magicdec", ("--config.drafts.magicdec.window=3",), "window=3 must be above k = 4"),
        ("magicdec", (), ""),
        ("spire", (), "drafts.spire.d_head=8 differs from target.d_head=16"),
        ("autoregressive", ("--config.decode.top_p=0",), "decode.top_p=0.0 must lie in"),
    ],
)
def test_of_a_config_what_decoding_uses_is_checked(method, more, message):
    """Neither the other drafts nor the rows that training and evaluation would read."""
    argv = ["--config=configs/quickstart.py", "--workdir=nowhere", f"--method={method}"]
    found = command_line(command.arguments(), [*argv, *SMALL, *more], decoding=True)
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        config, name = for_method(*found)
        assert config.target.max_len == 100 and name == method
        assert [n for n, _ in config.drafts] == ([] if method == "autoregressive" else [method])


def test_a_target_takes_the_place_of_the_configs(tmp_path):
    """Whose sizes are not its own; its drafts are there."""
    checkpoint = write_safetensors(tmp_path / "target", *tiny("llama"))
    argv = ["--config=configs/quickstart.py", f"--target={checkpoint}", "--method=magicdec"]
    config, name = for_method(*command_line(command.arguments(), argv, decoding=True))
    assert config.target.d_model == 64 and config.pretrained.path == str(checkpoint)
    assert name == "magicdec" and config.draft(name).window == 32


def test_a_workdir_without_its_config(capsys):
    assert command.main(["--workdir=runs/x", "--prompts=x", "--method=spire"]) == 2
    assert "--workdir=runs/x: give the --config that it was made with" in capsys.readouterr().err


def test_neither_a_target_nor_a_workdir():
    with pytest.raises(ConfigError, match="give the --target that decodes"):
        for_method(*command_line(command.arguments(), [], decoding=True))

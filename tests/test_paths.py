"""Paths as users write them: `~` is the home folder wherever a path is given, and only there."""

import argparse
import ast
import pathlib
import shutil

import pytest
from corpora import names, words, write

from spire_jax.config import files
from spire_jax.config.paths import PathError, local, local_path, path_or_url
from spire_jax.config.schema import ConfigError
from spire_jax.data import write_zarr
from spire_jax.serving import command

ROOT = pathlib.Path(__file__).parents[1]
# Options of commands that name a path. What spire_jax.export calls --draft is a name.
OPTIONS = {"--workdir", "--out", "--config", "--prompts", "--draft", "--source", "--tokenizer",
           "--list", "--json"}  # fmt: skip
TYPES = {"path_or_url", "local", "local_path"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a space in its name; the command runs elsewhere."""
    home, here = tmp_path / "the home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return home


def test_the_home_folder_is_where_a_path_begins_with_it(home):
    assert path_or_url("~/runs/a") == local("~/runs/a") == f"{home}/runs/a"
    assert local_path("~") == home
    for path in ("runs/~", "./~/runs", "/a b/c", "-", "gs://bucket/~/a", "stdlib"):
        assert path_or_url(path) == path


@pytest.mark.parametrize(
    "path, message",
    [
        ("", "the path is empty; name one"),
        ("~nobody-here/runs", r"no such home folder; write \./~nobody-here/runs"),
        ("gs:/bucket/run", r"is a slash missing\? write gs://..., or \./gs:/bucket/run"),
        ("s3:bucket", "is a slash missing"),
        ("file:///a/b", "write /a/b, without file://"),
    ],
)
def test_what_cannot_be_meant_is_refused(home, path, message):
    for read in (path_or_url, local, local_path):
        with pytest.raises(PathError, match=message):
            read(path)


def test_a_bucket_is_no_place_for_what_is_read_and_written_here(home, capsys):
    with pytest.raises(ConfigError, match=r"pretrained\.path: gs://b/model is no path of this"):
        files.build({"pretrained": {"path": "gs://b/model"}})
    with pytest.raises(SystemExit) as status:
        command.main(["--config=x.py", "--prompts=-", "--out=gs://bucket/out.jsonl"])
    assert status.value.code == 2
    assert "argument --out: gs://bucket/out.jsonl is no path of this" in capsys.readouterr().err


def test_a_config_s_paths_are_read_and_others_name_their_key(home):
    found = files.build({"data": {"source": "~/texts", "heldout_source": "gs://bucket/~"}}).data
    assert (found.source, found.heldout_source) == (f"{home}/texts", "gs://bucket/~")
    assert files.build({}).data.source == "stdlib"
    for values, message in (
        ({"data": {"source": "gs:/a"}}, r"data\.source: gs:/a: is a slash missing"),
        ({"data": {"tokenizer": "~/bpe.json"}}, f"tokenizer='{home}/bpe.json' does not exist"),
        ({"pretrained": {"path": "~/llama"}}, f"{home}/llama does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            files.build(values)


def test_a_command_finds_all_that_it_is_given_at_home(home, capsys):
    shutil.copy(ROOT / "configs/quickstart.py", home / "config.py")
    text = {n: words(i, 900) for i, n in enumerate([*names(False, 3), *names(True, 3)])}
    write(home / "texts", text)
    (home / "prompts.txt").write_text("x")
    status = command.main([
        "--config=~/config.py", "--config.data.source=~/texts", "--workdir=~/runs",
        "--config.data.heldout_percent=50", "--method=autoregressive", "--prompts=~/prompts.txt",
        "--out=~/out.jsonl",
    ])  # fmt: skip
    assert status == 2
    assert f"target is not trained in {home}/runs; run --stages" in capsys.readouterr().err
    assert (home / "out.jsonl").exists() and not list(pathlib.Path.cwd().iterdir())


def test_token_arrays_are_written_at_home(home):
    write(home / "texts", {f"{i}.txt": words(i, 100) for i in range(20)})
    given = ["--source=~/texts", "--out=~/tokens", "--workers=1", "--heldout-percent=0"]
    assert write_zarr.main(given) == 0
    assert (home / "tokens/manifest.json").exists() and not list(pathlib.Path.cwd().iterdir())


def test_every_option_that_names_a_path_reads_it_as_one():
    parsers = []
    for path in sorted([*ROOT.glob("spire_jax/**/*.py"), *ROOT.glob("launch/**/*.py")]):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            option = call.args[0]
            if not isinstance(option, ast.Constant) or option.value not in OPTIONS:
                continue
            if (path.name, option.value) == ("export.py", "--draft"):
                continue
            (read,) = [k.value for k in call.keywords if k.arg == "type"] or [None]
            parsers.append(f"{path.relative_to(ROOT)} {option.value}")
            assert isinstance(read, ast.Name) and read.id in TYPES, parsers[-1]
    assert len(parsers) > 20
    assert issubclass(PathError, argparse.ArgumentTypeError), "so that argparse shows the message"

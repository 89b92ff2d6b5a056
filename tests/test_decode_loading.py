"""Which method decodes, from where its weights come, and what is refused before they are read."""

import argparse
import contextlib
import dataclasses
import json
import types

import numpy as np
import pytest
from models import TINY, pair
from pretrained_models import tiny, write_safetensors

from spire_jax.config import files
from spire_jax.config.files import command_line
from spire_jax.config.schema import (
    ConfigError,
    ExperimentConfig,
    ModelConfig,
    PretrainedConfig,
    StudyConfig,
)
from spire_jax.costs.throughput import depth_prices
from spire_jax.decoding.build import make_decoder
from spire_jax.drafting.magicdec import MagicDecOptions
from spire_jax.drafting.snapkv import SnapKvOptions
from spire_jax.drafting.spire import SpireOptions
from spire_jax.drafting.vanilla import VanillaOptions
from spire_jax.serving import command, loading
from spire_jax.serving.loading import for_method, load_for_decoding, method_name
from spire_jax.training.workdir import params_sha256

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
    decoder = pair("spire", TINY).decoder(2)
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


def test_rows_choose_their_depth_where_the_draft_is_confident():
    overrides = ["drafts.spire.kind=block", "decode.depths=4,1,2"]
    of = files.load("configs/quickstart.py", overrides)
    decoder = make_decoder(of, "spire")
    assert loading.with_prices(of, "spire", decoder, of.decode.depths) is decoder
    sure = files.load("configs/quickstart.py", [*overrides, "drafts.spire.confidence=true"])
    assert loading.with_prices(sure, "spire", decoder, ()) is decoder
    found = loading.with_prices(sure, "spire", decoder, sure.decode.depths)
    assert (found.k, found.widths) == (4, (1, 2, 4))
    assert found.prices == depth_prices(sure, "spire", 4)

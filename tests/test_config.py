"""Configuration: overrides, types, and every contradiction named before anything runs."""

import dataclasses
import pathlib
import re

import pytest

from spire_jax.config import files, schema
from spire_jax.config.schema import (
    ConfigError,
    DraftConfig,
    ModelConfig,
    TrainConfig,
    trained_depth,
)
from spire_jax.config.variants import ABLATIONS

QUICKSTART = pathlib.Path("configs/quickstart.py")


def load(*overrides: str) -> schema.ExperimentConfig:
    return files.load(QUICKSTART, overrides)


@pytest.mark.parametrize("path", sorted(pathlib.Path("configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_loads_and_says_how_to_run_it(path):
    text = path.read_text()
    # Any tokenizer and any target: what is fetched or made by a command of its own is not here.
    overrides = ["data.tokenizer=bytes", "pretrained.path="]
    if "config.pretrained = " in text:
        overrides += ["target.n_layers=30", "target.n_tokens=49152"]
    files.load(path, overrides)
    assert "python -m" in text or "launch/" in text
    assert "import ml_collections" in text and "spire_jax import" not in text


def leaves(section, path=""):
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}{field.name}.")
        elif field.name not in ("drafts", "variants"):
            yield path + field.name, value


def test_every_value_can_be_overridden():
    base = load()
    keys = list(leaves(base))
    keys += [(f"drafts.spire.{key}", value) for key, value in leaves(base.draft("spire"))]
    assert len(keys) > 70
    for key, value in keys:
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert load(f"{key}={text}") == base, key
    changed = load("train.steps=7", "drafts.spire.attend_self=false", "eval.context_lengths=90,80")
    assert changed.train.steps == 7
    assert changed.draft("spire").attend_self is False
    assert changed.eval.context_lengths == (90, 80)
    assert changed.draft("vanilla") == base.draft("vanilla")


@pytest.mark.parametrize(
    "override,message",
    [
        ("train.stepz=5", "unknown config key 'train.stepz'; did you mean 'steps'"),
        ("trian.steps=5", "unknown config key 'trian'; did you mean 'train'"),
        ("drafts.spyre.window=5", "unknown config key 'drafts.spyre'; did you mean 'spire'"),
        ("train.steps=many", "train.steps='many' should be int"),
        ("train.remat=maybe", "train.remat='maybe' should be bool"),
        ("eval.context_lengths=a", "eval.context_lengths='a' should be a list of integers"),
        ("train.steps", "not of the form key=value"),
        ("train.k=3", "train.k=3 does not divide train.seq_len=256"),
        ("drafts.spire.window=-1", "drafts.spire.window=-1 is under 1"),
        ("drafts.spire.memory=target", "drafts.spire.memory='target'; choose from"),
        ("drafts.spire.k=3", "drafts.spire.k=3 does not divide train.seq_len=256"),
        ("study.of=spyre", "study.of='spyre' is no draft; there are ['spire', 'vanilla']"),
        ("study.of=vanilla", "study.of='vanilla' is of kind 'vanilla'; name a 'spire' draft"),
        ("magicdec.window=200", "larger than the longest context (184)"),
        ("data.split=package", "data.split='package'; choose from ['file', 'folder']"),
        ("decode.verification=tree", "decode.verification='tree'; choose from"),
        ("decode.products=mkl", "decode.products='mkl'; choose from"),
        ("drafts.vanilla.window=-1", "drafts.vanilla.window=-1 is under 1"),
        ("drafts.spire.sink=49", "drafts.spire.sink=49 is longer than the shortest context"),
        ("drafts.spire.n_layers=9", "drafts.spire.n_layers=9 is deeper than the target"),
        ("drafts.spire.d_model=128", "drafts.spire.d_model=128 differs from target.d_model=96"),
        ("drafts.spire.d_ff=64", "drafts.spire.d_ff=64 differs from target.d_ff"),
        ("drafts.spire.kind=medusa", "choose from ['spire', 'vanilla']"),
        ("drafts.spire.loss=kl", "drafts.spire.loss='kl'; choose from"),
        ("drafts.spire.omega=2", "drafts.spire.omega=2.0 must lie in [0, 1]"),
        ("target.vocab_size=200", "target.vocab_size=200 is under the data's 257"),
        ("target.max_len=250", "= 252 goes beyond target.max_len=250"),
        ("target.d_head=7", "target.d_head=7 is odd"),
        (
            "data.tokenizer=words",
            "data.tokenizer='words' does not exist; use 'bytes', or make a file",
        ),
        ("train.accumulate=3", "train.accumulate=3 does not divide train.batch_size"),
        ("train.dtype=float16", "train.dtype='float16'; use 'float32' or 'bfloat16'"),
        ("train.attention=flash", "train.attention='flash'; choose from"),
        ("decode.attention=tpu", "decode.attention='tpu', target: head dimension 48: the kernel"),
        ("decode.attention=interpret", "decode.attention='interpret', target: head dimension 48"),
        ("train.attention=gpu", "train.attention='gpu'; choose from"),
        ("decode.attention=gpu", "decode.attention='gpu' takes decode.dtype='bfloat16'"),
        ("train.peak_lr=0", "train.peak_lr=0.0 must be above 0"),
        ("decode.k=0", "decode.k=0 must be above 0"),
        ("decode.top_p=0", "decode.top_p=0.0 must lie in (0, 1]"),
        ("decode.temperature=-1", "decode.temperature=-1.0 is negative"),
        ("mesh.tensor=0", "mesh.tensor=0; use 1 or more"),
        ("mesh.tensor=-1", "mesh: at most one axis can be -1"),
        ("seed=-1", "seed=-1 is negative"),
        ("data.heldout_percent=0", "data.heldout_percent=0 must lie between"),
    ],
)
def test_bad_values_are_named(override, message):
    with pytest.raises(ConfigError) as error:
        load(override)
    assert message in str(error.value)


def test_a_kernel_asked_for_by_name_must_take_a_round():
    wide = "target.d_head=64", "decode.k=16"
    load(*wide, "decode.attention=xla")
    with pytest.raises(ConfigError, match=r"decode\.k=16 verifies more than the kernel's 16"):
        load(*wide, "decode.attention=tpu")


def test_snapkv_needs_more_than_what_it_observes():
    with pytest.raises(ConfigError, match="keeps the last 32 tokens anyway: sink \\+ window = 32"):
        load("magicdec.snapkv=true", "magicdec.window=31")


def test_variants_are_the_base_but_for_what_their_name_says():
    config = load("study.of=spire", "study.trained_k=8", "study.seeds=2")
    base, variants = config.draft("spire"), dict(config.variants)
    for name, ablation in ABLATIONS.items():
        changed = dict(ablation.overrides) | {"of": "spire"}
        assert variants[f"spire-{name}"] == dataclasses.replace(base, **changed), name
    assert variants["spire-k8"].k == 8 and trained_depth(config, "spire-k8") == 8
    assert trained_depth(config, "spire") == config.train.k
    assert [n for n in variants if n.endswith("-seed1")] == [
        "spire-seed1", "spire-distillation_only-seed1", "spire-no_feedback-seed1",
    ]  # fmt: skip
    assert variants["spire-seed1"].seed == 1
    assert config.trained == config.drafts + config.variants
    few = load("study.of=spire", "study.ablations=hard_target", "study.trained_k=", "study.seeds=1")
    assert [name for name, _ in few.variants] == ["spire-hard_target"]
    assert load().variants == ()


def test_ablations_that_do_not_exist_are_named():
    for override, message in (
        ("study.ablations=no_feedbck", "there is no ablation 'no_feedbck'; there are ['no_sparse"),
        ("study.seeded=all_of_it", "study.seeded: there is no ablation 'all_of_it'"),
        ("study.ablations=hard_target,hard_target", "names an ablation twice"),
        ("study.trained_k=3", "study.trained_k=(3,): 3 does not divide train.seq_len"),
    ):
        with pytest.raises(ConfigError) as error:
            load("study.of=spire", override)
        assert message in str(error.value)
    with pytest.raises(ConfigError, match="takes away what study"):
        load("study.of=spire", "drafts.spire.feedback=false")


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.py does not exist"):
        files.load(tmp_path / "nothing.py")
    for text, message in (
        ("dict(train=5)", "train is a section, not a value"),
        ("dict(train=dict(steps='5'))", "train.steps='5' should be of type int"),
        ("dict(drafts=dict(a=dict(kidn='spire')))", "unknown config key 'drafts.a.kidn'"),
        ("dict(drafts=dict(autoregressive=dict()))", "rename it"),
    ):
        path = tmp_path / "bad.py"
        path.write_text(f"def get_config():\n    return {text}\n")
        with pytest.raises(ConfigError) as error:
            files.load(path)
        assert message in str(error.value)


def test_command_line_ends_without_a_traceback(capsys):
    import argparse

    for argument, message in (
        ("--config.train.stepz=5", "did you mean 'steps'"),
        ("--configs.train.steps=5", "unknown argument"),
        ("--config.train.steps", "set as --config.train.steps=value"),
    ):
        with pytest.raises(SystemExit) as status:
            files.command_line(argparse.ArgumentParser(), [f"--config={QUICKSTART}", argument])
        assert status.value.code == 2
        assert message in capsys.readouterr().err


def test_a_draft_takes_its_sizes_from_the_target():
    target = ModelConfig(n_layers=8, d_model=512, rope_base=5e5, tied=True, vocab_size=64)
    model = schema.draft_model(target, DraftConfig(n_layers=2, window=64, sink=1))
    assert (model.n_layers, model.d_model, model.window, model.sink) == (2, 512, 64, 1)
    assert (model.rope_base, model.tied, model.vocab_size) == (5e5, True, 64)
    dense = schema.draft_model(target, DraftConfig(kind="vanilla", window=0, d_model=256))
    assert (dense.window, dense.sink, dense.d_model) == (0, 0, 256)


def test_identity_leaves_out_what_computes_the_same():
    one, other = TrainConfig(), TrainConfig(remat=True, log_every=3, checkpoint_every=7)
    assert schema.digest(schema.identity(one)) == schema.digest(schema.identity(other))
    other = TrainConfig(weight_decay=0.2)
    assert schema.digest(schema.identity(one)) != schema.digest(schema.identity(other))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"window": 4}, "magicdec.window=4 must be above k = 4"),
        ({"window": 0}, "magicdec.window=0 must be above 0"),
        ({"sink": -1}, "magicdec.sink=-1 is negative"),
        ({"window": 180, "sink": 5}, "a budget of sink + window = 185 is larger than the longest"),
    ],
)
def test_bad_sizes_of_magicdec_name_the_key(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(*(f"magicdec.{key}={value}" for key, value in values.items()))


def test_magicdec_needs_a_dense_target():
    with pytest.raises(ConfigError, match=r"target has a window of its own \(target.window=64\)"):
        load("target.window=64")

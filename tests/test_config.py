"""Configuration: overrides, types, and every contradiction named before anything runs."""

import dataclasses
import pathlib
import sys

import pytest

from spire_jax.config import files, schema
from spire_jax.config.registry import DRAFT_KINDS, FAMILIES, Registry
from spire_jax.config.schema import ConfigError, ModelConfig
from spire_jax.config.variants import ABLATIONS, changed
from spire_jax.drafting.magicdec import MagicDecOptions
from spire_jax.drafting.spire import SpireOptions
from spire_jax.drafting.vanilla import VanillaOptions

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
    if "LINE_ENDS" in text:  # tokens of a vocabulary that is made
        overrides.append("target.n_tokens=4096")
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


BY_NAME = ("throughput.tau", "throughput.training_cost")  # mappings


def test_every_value_can_be_overridden():
    base = load("throughput.tau.spire=2.5")
    keys = [(key, value) for key, value in leaves(base) if key not in BY_NAME]
    for name, draft in base.drafts:
        keys += [(f"drafts.{name}.{key}", value) for key, value in leaves(draft)]
    assert len(keys) > 70
    for key, value in keys:
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert load("throughput.tau.spire=2.5", f"{key}={text}") == base, key
    changed = load("train.steps=7", "drafts.spire.feedback=false", "eval.context_lengths=90,80")
    assert changed.train.steps == 7
    assert changed.draft("spire").feedback is changed.draft("stride2").feedback is False
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
        ("drafts.spire.fused=1,2", "drafts.spire.fused=(1, 2) is of memory='fused', not of"),
        ("drafts.spire.k=3", "drafts.spire.k=3 does not divide train.seq_len=256"),
        ("study.of=spyre", "study.of='spyre' is no draft; there are ['magicdec', 'spire', 'strid"),
        ("study.of=magicdec", "'random_init' changes the option 'init', which the draft of"),
        ("drafts.magicdec.window=200", "larger than the longest context (184"),
        ("drafts.magicdec.window=4", "drafts.magicdec.window=4 must be above k = 4"),
        ("drafts.magicdec.window=0", "drafts.magicdec.window=0 must be above 0"),
        ("drafts.magicdec.sink=-1", "drafts.magicdec.sink=-1 is negative"),
        ("drafts.magicdec.n_layers=1", "'magicdec' has no such option; it belongs to '"),
        ("drafts.vanilla.memory=final", "'vanilla' has no such option; it belongs to 'block'"),
        ("drafts.spyre=", "unknown config key 'drafts.spyre'; did you mean 'spire'"),
        ("drafts.spire=vanilla", "drafts.spire is a section, not a value"),
        ("drafts.vanilla.windw=3", "unknown config key 'drafts.vanilla.windw'; did you mean 'wind"),
        ("target.window=64", "target has a window of its own in every layer (64"),
        ("target.family=mamba", "unknown model family 'mamba' (did you mean 'llama'?); there"),
        ("throughput.chip=v9", "throughput.chip='v9'; choose from ['v5e'"),
        ("throughput.tau.medusa=2", "throughput.tau.medusa: no draft named 'medusa'; there are"),
        ("throughput.tau.spire=5.5", "throughput.tau.spire=5.5 must lie between 1 and decode.k"),
        ("throughput.tau=2", "throughput.tau is a mapping, not a value: throughput.tau.NAME="),
        ("throughput.tau.spire=fast", "throughput.tau.spire='fast' should be float"),
        ("data.split=package", "data.split='package'; choose from ['file', 'folder']"),
        ("decode.verification=tree", "decode.verification='tree'; choose from"),
        ("decode.products=mkl", "decode.products='mkl'; choose from"),
        ("drafts.vanilla.window=-1", "drafts.vanilla.window=-1 is under 1"),
        ("drafts.spire.sink=49", "drafts.spire.sink=49 is longer than the shortest context"),
        ("drafts.spire.n_layers=9", "drafts.spire.n_layers=9 is deeper than the target"),
        ("drafts.spire.d_model=128", "drafts.spire.d_model=128 differs from target.d_model=96"),
        ("drafts.spire.d_ff=64", "drafts.spire.d_ff=64 differs from target.d_ff"),
        ("drafts.spire.kind=medusa", "unknown draft kind 'medusa'; there are ['"),
        ("drafts.spire.kind=vanila", "unknown draft kind 'vanila' (did you mean 'vanilla'?)"),
        ("drafts.spire.loss=kl", "drafts.spire.loss='kl'; choose from"),
        ("drafts.spire.omega=2", "drafts.spire.omega=2.0 must lie in [0, 1]"),
        ("target.vocab_size=200", "target.vocab_size=200 is under the data's 257"),
        ("target.max_len=250", "k - 1 = 251 goes beyond target.max_len=250"),
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
        ("decode.temperature=-1", "decode.temperature=-1.0 must be 0 (greedy) or more, and finite"),
        (
            "decode.temperature=nan",
            "decode.temperature='nan' is beyond all use; give a finite number",
        ),
        ("mesh.tensor=0", "mesh.tensor=0; use 1 or more"),
        ("mesh.tensor=-1", "mesh: at most one axis can be -1"),
        ("seed=-1", "seed=-1 must lie between 0 and 2**64 - 1"),
        ("seed=18446744073709551616", "seed='18446744073709551616' is beyond all use; give"),
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
    with pytest.raises(ConfigError, match=r"budget=32: the last 32 tokens \(drafts.s.observed\)"):
        load("drafts.s.kind=snapkv", "drafts.s.budget=32")


def test_a_draft_of_the_command_line():
    """One that the file does not have; and another kind, which keeps what both have."""
    config = load("drafts.new.kind=magicdec", "drafts.new.window=16")
    assert config.draft("new") == MagicDecOptions(window=16)
    assert [name for name, _ in config.drafts] == [
        "magicdec", "new", "spire", "stride2", "stride4", "vanilla"]  # fmt: skip
    base = load().draft("spire")
    plain = load("drafts.spire.kind=vanilla").draft("spire")
    assert isinstance(plain, VanillaOptions) and isinstance(base, SpireOptions)
    assert (plain.window, plain.steps, plain.n_layers) == (base.window, base.steps, base.n_layers)
    assert load("drafts.spire.kind=vanilla", "drafts.spire.window=8").draft("spire").kept()[0] == 8
    with pytest.raises(ConfigError, match=r"it belongs to .*'spire'"):
        load("drafts.spire.kind=vanilla", "drafts.spire.memory=final")
    # What uses its weights is of its kind, too; what the file says that this has not, goes.
    assert load("drafts.spire.kind=spire").draft("stride4").kind == "spire"
    with pytest.raises(ConfigError, match=r"drafts\.stride2\.stride': a draft of kind 'va"):
        load("drafts.spire.kind=vanilla", "drafts.stride2.stride=2")
    without = load("drafts.spire=", "drafts.stride2=", "drafts.stride4=")
    assert [name for name, _ in without.drafts] == ["magicdec", "vanilla"]
    for name in ("autoregressive", "evaluate"):
        with pytest.raises(ConfigError, match="rename it"):
            load(f"drafts.{name}.kind=vanilla")


def test_variants_are_the_base_but_for_what_their_name_says():
    config = load("study.of=spire", "study.trained_k=8", "study.seeds=2", "drafts.spire.kind=spire")
    base, variants = config.draft("spire"), dict(config.variants)
    for name, ablation in ABLATIONS.items():
        overrides = dict(ablation.overrides) | {"of": "spire"}
        assert variants[f"spire-{name}"] == changed(name, base, **overrides), name
    assert isinstance(variants["spire-no_feedback_no_target"], VanillaOptions)
    assert variants["spire-no_feedback_no_target"].kept() == base.kept()
    assert variants["spire-k8"].rollout(config.train) == 8
    assert base.rollout(config.train) == config.train.k
    assert [n for n in variants if n.endswith("-seed1")] == [
        "spire-seed1", "spire-distillation_only-seed1", "spire-no_feedback-seed1",
    ]  # fmt: skip
    assert config.trained["spire-seed1"].seed == 1
    assert list(config.trained) == ["spire", "vanilla", *variants]
    few = load(
        "drafts.spire.kind=spire",
        "study.of=spire",
        "study.ablations=hard_target",
        "study.trained_k=",
        "study.seeds=1",
    )
    assert [name for name, _ in few.variants] == ["spire-hard_target"]
    assert load().variants == ()


def test_ablations_that_do_not_exist_are_named():
    for override, message in (
        ("study.ablations=no_feedbck", "there is no ablation 'no_feedbck'; there are ['no_sparse"),
        ("study.seeded=all_of_it", "study.seeded: there is no ablation 'all_of_it'"),
        ("study.ablations=hard_target,hard_target", "names an ablation twice"),
        ("drafts.spire.kind=vanilla", "changes the option 'feedback', which the draft of study.of"),
        ("study.trained_k=3", "the study's spire-k3.k=3 does not divide train.seq_len"),
        ("target.max_len=260", "study.context_length + eval.output_length + k - 1 = 335 goes bey"),
    ):
        with pytest.raises(ConfigError) as error:
            load("drafts.spire.kind=spire", "study.of=spire", override)
        assert message in str(error.value)
    with pytest.raises(ConfigError, match="takes away what the draft of study"):
        load("study.of=spire", "drafts.spire.feedback=false")


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.py does not exist"):
        files.load(tmp_path / "nothing.py")
    for text, message in (
        ("dict(train=5)", "train is a section, not a value"),
        ("dict(train=dict(steps='5'))", "train.steps='5' should be int, like 1000"),
        ("dict(plugins='mine')", "plugins='mine' should be a list of words"),
        ("dict(drafts=dict(a=dict(kidn='spire')))", "drafts.a.kind is missing; choose from ['"),
        ("dict(drafts=dict(a=dict(kind='spire', windw=3)))", "unknown config key 'drafts.a.windw'"),
        ("dict(drafts=dict(autoregressive=dict(kind='vanilla')))", "rename it"),
        ("dict(variants=dict())", "unknown config key 'variants'"),
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
    model = SpireOptions(n_layers=2, window=64, sink=1).model(target)
    assert (model.n_layers, model.d_model) == (2, 512)
    assert (model.rope_base, model.tied, model.vocab_size) == (5e5, True, 64)
    dense = VanillaOptions(window=0, d_model=256)
    assert (dense.kept(), dense.model(target).d_model) == ((0, 0), 256)


# --- registries and plugins --------------------------------------------------------------------


def test_a_name_stands_for_one_thing():
    registry: Registry[object] = Registry("thing", "json")
    one = registry.register("a")(object())
    assert registry.register("a")(one) is registry.get("a") is one
    with pytest.raises(ConfigError, match=r"thing 'a' is registered twice: .* and .*; rename one"):
        registry.register("a")(object())
    with pytest.raises(ConfigError, match=r"unknown thing 'b'; there are \['a'\], and"):
        registry.get("b")


def test_what_is_built_in_comes_along():
    """Each kind is in a file of its own in the registry's home, and says its own name."""
    kinds = DRAFT_KINDS.items()
    assert sorted(kinds) == DRAFT_KINDS.names()
    assert all(options().kind == kind for kind, options in kinds.items())
    assert len({options.__module__ for options in kinds.values()}) == len(kinds)
    assert all(model().family == family for family, model in FAMILIES.items().items())


PLUGIN = """
import dataclasses
from spire_jax.config.registry import DRAFT_KINDS, FAMILIES
from spire_jax.config.drafts import TrainedOptions
from spire_jax.config.schema import ModelConfig

@DRAFT_KINDS.register("guess")
@dataclasses.dataclass(frozen=True)
class GuessOptions(TrainedOptions):
    kind: str = "guess"
    words: tuple[str, ...] = ("a",)
    scales: tuple[float, ...] = ()

    def check(self, at, config):
        super().check(at, config)
        if "bad" in self.words:
            raise ValueError

@FAMILIES.register("twin")
@dataclasses.dataclass(frozen=True)
class TwinConfig(ModelConfig):
    family: str = "twin"
    softcap: float = 0.0
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A stranger's module, `my_drafts`; what it registers goes with it."""
    (tmp_path / "my_drafts.py").write_text(PLUGIN)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    DRAFT_KINDS.items(), FAMILIES.items()
    for registry in (DRAFT_KINDS, FAMILIES):
        monkeypatch.setattr(registry, "_found", dict(registry.items()))
    yield "plugins=my_drafts"
    sys.modules.pop("my_drafts", None)


def test_a_strangers_kind_and_family(plugin):
    """From the command line alone, in any order; tuples of words and of numbers are read."""
    config = load("drafts.g.words=x,y", "drafts.g.scales=0.5,2", "drafts.g.kind=guess", plugin,
                  "target.softcap=30", "target.family=twin")  # fmt: skip
    draft = config.draft("g")
    assert (draft.kind, draft.words, draft.scales) == ("guess", ("x", "y"), (0.5, 2.0))
    assert config.plugins == ("my_drafts",) and "g" in config.trained
    assert (config.target.family, config.target.softcap) == ("twin", 30.0)
    assert draft.model(config.target).family == "twin"


def test_without_its_module_a_kind_is_unknown(plugin):
    for override in ("drafts.g.kind=guess", "target.family=twin"):
        with pytest.raises(ConfigError, match="needs the module that registers it in `plugins`"):
            load(override)
    for name, message in (
        ("nowhere.at_all", "'nowhere.at_all' cannot be imported (ModuleNotFoundError: No module"),
        ("broken", "'broken' cannot be imported (ZeroDivisionError: division by zero)"),
    ):
        with pytest.raises(ConfigError) as error:
            load(f"plugins=my_drafts,{name}")
        assert message in str(error.value) and "\n" not in str(error.value)

"""Stages are identified by what they read: every config value, each where its field says."""

import dataclasses
import pathlib
import typing

import pytest

from spire_jax.config import files
from spire_jax.config.identity import Plan, batch_seed, differences, made_with, plan
from spire_jax.config.readers import Reader
from spire_jax.config.schema import ExperimentConfig
from spire_jax.results.study import study_config

QUICKSTART = pathlib.Path("configs/quickstart.py")
BASE = ("continuations.rows=8", "study.of=spire", "study.ablations=random_init",
        "study.trained_k=8", "study.seeds=1", "eval.context_lengths=64,128")  # fmt: skip
EVERYTHING = {"target", "continuations", "draft spire", "draft vanilla", "draft spire-random_init",
              "draft spire-k8", "evaluate", "report", "study"}  # fmt: skip
DRAFTS = {name for name in EVERYTHING if name.startswith("draft ")}
OWN = {"draft spire", "draft spire-random_init", "draft spire-k8"}  # of the options of `spire`


def stages(*overrides: str, corpus: str = "c") -> Plan:
    return plan(files.load(QUICKSTART, [*BASE, *overrides]), corpus)


def changed(*overrides: str, corpus: str = "c") -> set[str]:
    before, after = stages().hashes, stages(*overrides, corpus=corpus).hashes
    assert before.keys() == after.keys() == EVERYTHING
    return {name for name in before if before[name] != after[name]}


AFTER_DRAFT = {"evaluate", "report", "study"}
CASES = {
    "target.d_ff=128": EVERYTHING,
    "seed=1": EVERYTHING,
    "train.weight_decay=0.2": EVERYTHING,
    "train.steps=7": EVERYTHING,  # the target's; a draft's own are its own
    "train.k=2": {"draft spire", "draft spire-random_init", *AFTER_DRAFT},
    "train.remat=true": set(),
    "train.log_every=3": set(),
    "decode.dtype=bfloat16": EVERYTHING - {"target"},  # the continuations are decoded
    "decode.k=2": AFTER_DRAFT,
    "decode.attention=xla": set(),
    "decode.chunk=16": set(),
    "continuations.prompt=16": EVERYTHING - {"target"},
    "continuations.share=0.25": DRAFTS | AFTER_DRAFT,
    "continuations.batch_size=3": set(),
    "drafts.spire.window=16": OWN | AFTER_DRAFT,
    "drafts.spire.omega=0.25": OWN | AFTER_DRAFT,
    "drafts.vanilla.omega=0.25": set(),  # its loss is hard
    "drafts.vanilla.steps=7": {"draft vanilla", *AFTER_DRAFT},
    "drafts.spire.k=2": {"draft spire", "draft spire-random_init", *AFTER_DRAFT},
    "drafts.spire.k=4": set(),  # what train.k says already
    "drafts.magicdec.window=16": AFTER_DRAFT,  # nothing is trained
    "eval.contexts=9": {"evaluate", "report"},
    "eval.output_length=32": AFTER_DRAFT,
    "eval.bootstrap=99": {"report", "study"},
    "throughput.hoi=300": {"report", "study"},
    "throughput.tau.spire=3": set(),
    "throughput.decode_to_train=3": set(),
    "study.contexts=9": {"study"},
    "mesh.fsdp=-1": set(),
    "data.workers=2": set(),
    "data.heldout_percent=20": set(),  # seen in what came of the data
}


@pytest.mark.parametrize("override", CASES)
def test_a_value_changes_the_stages_that_read_it_and_those_after(override):
    more = ("mesh.data=1",) if override.startswith("mesh") else ()
    assert changed(override, *more) == CASES[override]


def test_another_corpus_changes_everything():
    assert changed(corpus="other") == EVERYTHING

    # Where nothing is trained the evaluation still says what it was made on.
    config = files.load(QUICKSTART)
    given = dataclasses.replace(config.pretrained, path="p")
    given = dataclasses.replace(config, pretrained=given, drafts=config.drafts[:1])
    assert not given.trained
    one, other = (plan(given, corpus, "sha").hashes for corpus in ("c", "d"))
    assert one["target"] == other["target"] and one["evaluate"] != other["evaluate"]


def test_a_begin_token_tells_apart_what_is_made_from_text():
    config = files.load(QUICKSTART, BASE)
    plain, begun, other = (plan(config, "c", begin_token=token) for token in (None, 0, 1))
    assert plain.hashes == stages().hashes
    for before, after in ((plain, begun), (begun, other)):
        assert {n for n in EVERYTHING if before.hashes[n] != after.hashes[n]} == EVERYTHING
    said = differences(plain.target.values, other.target.values)
    assert said == "begin_token=None (now 1)"


def test_a_given_target_is_its_weights_wherever_they_lie():
    config = files.load(QUICKSTART)

    def target(path: str, sha256: str, **train):
        pretrained = dataclasses.replace(config.pretrained, path=path)
        values = dataclasses.replace(config.train, **train)
        return plan(
            dataclasses.replace(config, pretrained=pretrained, train=values), "c", sha256
        ).target.hash

    assert target("a", "s") == target("b", "s") == target("a", "s", steps=7)
    assert target("a", "s") != target("a", "t")


def test_every_field_names_real_readers_and_every_stage_reads_something():
    config = files.load(QUICKSTART, BASE)
    for section in (config, *(getattr(config, f.name) for f in dataclasses.fields(config))):
        if dataclasses.is_dataclass(section):
            for field in dataclasses.fields(section):
                assert set(field.metadata.get("read_by", ())) <= set(Reader), field.name
    for name, values in ((s.name, s.values) for s in stages().drafts.values()):
        assert values["drafts"].keys() == {name.removeprefix("draft ")}


def _leaves(config: ExperimentConfig):
    """(section, field) of every value in a section."""
    for part in dataclasses.fields(config):
        section = getattr(config, part.name)
        if dataclasses.is_dataclass(section):
            for field in dataclasses.fields(section):
                yield part, field


def test_results_are_compared_by_all_that_made_them():
    """Each value that a stage up to the evaluation reads tells two runs apart; no other does."""
    config = files.load(QUICKSTART, BASE)
    before = typing.cast(typing.Any, made_with(config))
    makers = {Reader.TARGET, Reader.CONTINUATIONS, Reader.DRAFT, Reader.EVALUATE}
    seen = 0
    for part, field in _leaves(config):
        if part.name == "pretrained":
            continue  # another target altogether
        section = getattr(config, part.name)
        old = getattr(section, field.name)
        more = ("spire", 0.5) if field.name in ("tau", "training_cost") else 1
        new = {
            bool: lambda v: not v,
            int: lambda v: v + 1,
            float: lambda v: v + 0.5,
            str: lambda v: v + "x",
            tuple: lambda v, more=more: (*v, more),
        }[type(old)](old)
        other = dataclasses.replace(
            config, **{part.name: dataclasses.replace(section, **{field.name: new})}
        )
        readers = set(field.metadata.get("read_by", part.metadata.get("read_by", ())))
        found = differences(before, made_with(other))
        assert bool(found) == bool(readers & makers), f"{part.name}.{field.name}"
        seen += bool(found)
    assert seen > 40
    for override in ("continuations.prompt=16", "drafts.magicdec.window=16"):
        key = override.partition("=")[0]
        assert key in differences(before, made_with(files.load(QUICKSTART, [*BASE, override])))


def test_a_study_evaluates_nothing_that_it_does_not_read():
    """What `eval` says for evaluations alone is replaced, or used by none of its functions."""
    config = study_config(files.load(QUICKSTART, BASE))
    other = study_config(files.load(QUICKSTART, [*BASE, "eval.contexts=9",
                                                 "eval.context_lengths=48,96"]))  # fmt: skip
    assert config == other


def test_orders_of_batches_have_seeds_of_32_bits():
    """Grain's; those that have no more already stay, so that old runs go on."""
    assert [batch_seed(seed, 0) for seed in (0, 7, 2**32 - 1)] == [0, 7, 2**32 - 1]
    large = [batch_seed(seed, 0) for seed in (2**32, 2**32 + 7, 2**64 - 1)]
    assert len({*large, 0, 7, 2**32 - 1}) == 6 and all(0 <= seed < 2**32 for seed in large)

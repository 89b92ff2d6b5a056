"""A study from training to its tables, small; and what it refuses."""

import json
import shutil

import numpy as np
import pipelines
import pytest

from spire_jax.config.files import load
from spire_jax.results import study, study_report

STUDY = {"study.of": "spire", "study.ablations": "shared_memory", "train.k": 2, "decode.k": 2,
         "study.trained_k": 4, "study.seeds": 2, "study.seeded": "shared_memory",
         "study.context_length": 12, "study.contexts": 10, "study.detectable": 6,
         "drafts.magicdec.window": 17, "target.n_layers": 1, "eval.context_lengths": "8,18",
         "drafts.spire.steps": 6, "train.steps": 9, "drafts.vanilla.steps": 6}  # fmt: skip
VARIANTS = ["spire", "vanilla", "spire-shared_memory", "spire-k4", "spire-seed1",
            "spire-shared_memory-seed1"]  # fmt: skip


def run(corpus, workdir, *more: str, stages: str = "target,drafts,study") -> int:
    given = [f"--config.{key}={value}" for key, value in STUDY.items()]
    return pipelines.main(corpus, workdir, *given, f"--stages={stages}", *more)


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study") / "run"
    assert run(corpus, workdir) == 0
    return workdir


def records(workdir, name):
    return [json.loads(x) for x in (workdir / "study" / f"{name}.jsonl").read_text().splitlines()]


def test_every_variant_sees_the_same_contexts_and_batches(done):
    places = {tuple((r["document"], r["cut"]) for r in records(done, n)) for n in VARIANTS}
    assert len(places) == 1 and len(places.pop()) == 10
    steps = {tuple(json.loads(line)["examples"] for line in (done / "metrics" / f"{n}.jsonl")
                   .read_text().splitlines()) for n in VARIANTS}  # fmt: skip
    assert len(steps) == 1


def test_the_tables_have_what_was_asked(done):
    found = json.loads((done / "study" / study_report.JSON).read_text())
    assert set(found["methods"]) == {*VARIANTS, "magicdec"}
    for name, row in found["methods"].items():
        assert 1 <= row["tau"] <= 3, name
        pair = [np.sum([r["oracle"][key][1] for r in records(done, name)])
                for key in ("lengths_by_k", "rounds_by_k")]  # fmt: skip
        assert row["tau"] == pytest.approx(pair[0] / pair[1])
        assert row["tau"] <= row["tau_block"] <= 3
        assert row["difference"] == pytest.approx(row["tau"] - found["methods"]["spire"]["tau"])
    assert found["plan"]["twins"] == ["spire", "spire-seed1"]
    assert found["plan"]["smallest_detectable_effect"] > 0
    assert len(found["by_k"]["spire-k4"]) == len(found["by_k"]["spire"]) == 4
    assert len(found["methods"]["spire-shared_memory"]["tau_by_k"]) == 2
    assert set(found["seeds"]) == {"spire", "spire-shared_memory"}
    assert {len(row["tau"]) for row in found["seeds"].values()} == {2}
    for row in found["decoded"]:
        assert abs(row["tau_decoder"] - row["tau_oracle"]) < 1  # ten contexts
    text = (done / "study" / study_report.TEXT).read_text()
    assert "one memory for all layers" in text and "3.401" in text


def test_a_finished_study_ends_at_once_and_the_old_one_is_kept(done, corpus, tmp_path, capsys):
    before = (done / "study" / study_report.JSON).stat().st_mtime_ns
    assert run(corpus, done, stages="study") == 0
    assert (done / "study" / study_report.JSON).stat().st_mtime_ns == before
    copy = shutil.copytree(done, tmp_path / "copy")
    assert run(corpus, copy, "--config.study.contexts=8", stages="study") == 0
    assert "study.contexts=10 (now 8)" in capsys.readouterr().err
    assert len([p for p in copy.iterdir() if p.name.startswith("study")]) == 2


def test_what_is_missing_or_of_another_config_is_named(done, corpus, tmp_path, capsys):
    copy = shutil.copytree(done, tmp_path / "copy")
    shutil.rmtree(copy / "drafts" / "spire-k4")
    (copy / "study" / "identity.json").unlink()
    for more, message in (
        ([], "draft spire-k4 is not trained"),
        (["--config.study.of="], "the config names no study"),
        (["--config.drafts.spire.window=9"], "window"),
        (["--config.study.contexts=100000"], "can be cut at"),
    ):
        assert run(corpus, copy, *more, stages="study") == 2
        assert message in capsys.readouterr().err


# --- statistics --------------------------------------------------------------------------------


def config(*more: str):
    return load(
        "configs/quickstart.py",
        ["drafts.spire.kind=spire", "study.of=spire", "study.contexts=400", *more],
    )


def test_the_smallest_effect_is_what_repeated_studies_resolve():
    """Drawn many times, a difference of that size is told from 0 in 4 of 5 studies."""
    rng, k, n = np.random.default_rng(0), config().decode.k, 400

    def rows(rounds):
        lists = np.stack([rounds] * k, axis=1)
        return [{"oracle": {"lengths_by_k": [64.0] * k, "rounds_by_k": list(r)}} for r in lists]

    def draw(size, tau):
        shared = rng.normal(0, 2, size)  # paired: most of the spread is the contexts'
        return 64 / tau + shared + rng.normal(0, 0.5, size), 64 / 3.0 + shared + rng.normal(
            0, 0.5, size)  # fmt: skip

    pilot = dict(zip(("a", "b"), map(rows, draw(400, 3.0)), strict=True))
    effect = study.smallest_effect(pilot, ("a", "b"), config())["smallest_detectable_effect"]
    resolved = 0
    for _ in range(300):
        a, b = draw(n, 3.0 + effect)
        taus = [64 / x.mean() for x in (a, b)]
        terms = [(64 - tau * x) / x.mean() for tau, x in zip(taus, (a, b), strict=True)]
        error = np.std(terms[0] - terms[1], ddof=1) / np.sqrt(n)
        resolved += abs(taus[0] - taus[1]) > 1.96 * error
    assert 0.7 < resolved / 300 < 0.9


def test_the_best_depth_is_the_largest_multiplier():
    from spire_jax.costs import throughput

    taus = [1.8, 2.4, 2.8, 3.0, 3.1, 3.15]
    at = {"batch": 64, "context": 512, "hoi": 600.0, "variant": "paper"}
    k, value = study.best_k(config(), "spire", taus, **at)
    found = [throughput.multiplier(config(), "spire", tau=t, batch=64, context=512, k=i + 1)
             for i, t in enumerate(taus)]  # fmt: skip
    assert value == max(found) == found[k - 1] and 1 < k < 6
    checked = study.depths_to_check(config(), taus)
    assert checked == sorted(set(checked)) and 1 <= len(checked) <= 3

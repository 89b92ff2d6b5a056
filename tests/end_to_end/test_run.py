"""Stages and their identities, the report's contents, and bad input from the command line."""

import collections
import json
import shutil
import time

import pipelines
import pytest

from spire_jax.storage import processes


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")


def contents(folder) -> dict[str, bytes]:
    """Every file but those that a run always writes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "config.json")
    }


def test_the_summary_has_what_it_promises(finished):
    summary = json.loads((finished / "report" / "summary.json").read_text())
    assert set(summary["methods"]) == {"autoregressive", "spire", "vanilla", "magicdec"}
    keys = {"tau", "tau_ci95", "tau_decoder", "acceptance_by_depth", "contexts", "context_length",
            "output_length", "k", "modeled_multiplier", "modeled_tokens_per_s_per_chip",
            "measured_tokens_per_s"}  # fmt: skip
    for name, method in summary["methods"].items():
        assert keys <= set(method), name
        assert method["contexts"] == 6 and method["context_length"] == 16
        assert method["measured_tokens_per_s"] > 0
    spire = summary["methods"]["spire"]
    assert 1 <= spire["tau"] <= 5 and spire["tau_ci95"][0] <= spire["tau"] <= spire["tau_ci95"][1]
    assert len(spire["acceptance_by_depth"]) == 4
    assert summary["methods"]["autoregressive"]["tau"] == 1
    assert summary["corpus"]["sha256"] and summary["corpus"]["train_bytes"] > 0
    page = (finished / "report" / "index.html").read_text()
    assert "<svg" in page and "module_" in page


def test_oracle_and_decoder_records_are_paired(finished):
    lines = {
        name: [json.loads(x) for x in (finished / "eval" / f"{name}.jsonl").read_text().split("\n")
               if x]
        for name in ("autoregressive", "spire", "vanilla")
    }  # fmt: skip
    places = {
        name: [(r["context"], r["document"], r["cut"], r["context_length"]) for r in records]
        for name, records in lines.items()
    }
    assert places["spire"] == places["vanilla"] == places["autoregressive"]
    assert collections.Counter(p[3] for p in places["spire"]) == {8: 6, 16: 6}
    for record in lines["spire"]:
        assert record["oracle"]["rounds_by_k"][-1] >= 12 / 5
        assert sum(record["decoder"]["accepted_counts"]) == record["decoder"]["rounds"]


def test_a_finished_run_ends_at_once(finished, corpus):
    before, begin = contents(finished), time.monotonic()
    assert pipelines.main(corpus, finished) == 0
    assert time.monotonic() - begin < 5
    assert contents(finished) == before


@pytest.mark.slow
def test_another_k_retrains_nothing_and_keeps_the_old_evaluation(copy, corpus, capsys):
    before = contents(copy)
    assert pipelines.main(corpus, copy, "--stages=evaluate,report", "--config.decode.k=2") == 0
    after, error = contents(copy), " ".join(capsys.readouterr().err.split())
    assert "eval/ was made with decode.k=4 (now 2)" in error
    kept = [path.name for path in copy.glob("eval-*")]
    assert len(kept) == 1 and kept[0] in error
    for name, content in before.items():
        if name.startswith(("target/", "drafts/", "metrics/")):
            assert after[name] == content
        elif name.startswith("eval/"):
            assert after[name.replace("eval", kept[0], 1)] == content
    summary = json.loads((copy / "report" / "summary.json").read_text())
    assert summary["methods"]["spire"]["k"] == 2


@pytest.mark.parametrize(
    "more,message",
    [
        (["--config.target.d_ff=32"], "target.d_ff"),
        (["--config.train.weight_decay=0.2"], "weight_decay"),
        (["--config.seed=1"], "seed"),
        (["--config.drafts.spire.window=9", "--stages=spire"], "window"),
        (["--config.drafts.spire.window=9", "--stages=evaluate"], "window"),
        (
            ["--config.train.k=8", "--config.drafts.magicdec.window=9", "--stages=drafts"],
            "drafts.spire.k=4 (now 8)",
        ),
        (["--stages=target,draft"], "unknown ['draft']"),
        (["--config.mesh.tensor=2"], "does not fit 1 devices"),
        (["--config.eval.context_lengths=8,4000"], "no held-out document has room"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_touched(copy, corpus, capsys, more, message):
    before = contents(copy)
    assert pipelines.main(corpus, copy, *more) == 2
    error = capsys.readouterr().err
    assert "error: " in error and message in error
    assert "Traceback" not in error
    assert contents(copy) == before


def test_a_draft_refuses_another_target(copy, corpus, capsys):
    """A target of other values in the draft's work directory: the draft says what it is of."""
    shutil.rmtree(copy / "target")
    status = pipelines.main(corpus, copy, "--config.train.weight_decay=0.2", "--stages=target")
    assert status == 0
    before = contents(copy)
    assert pipelines.main(corpus, copy, "--config.train.weight_decay=0.2") == 2
    assert "made_from.target" in capsys.readouterr().err
    assert contents(copy) == before


def test_stages_need_those_before_them(corpus, tmp_path, capsys):
    for stages, message in (
        ("report", "--stages=evaluate first"),
        ("evaluate", "target is not trained"),
        ("spire", "target is not trained"),
    ):
        assert pipelines.main(corpus, tmp_path / "empty", f"--stages={stages}") == 2
        assert message in capsys.readouterr().err


def test_bad_data_and_work_directories(corpus, tmp_path, capsys, monkeypatch):
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.mkdir()
    binary.mkdir()
    (binary / "x.bin").write_bytes(b"\0\1\2")
    (tmp_path / "file").write_text("in the way")
    work = tmp_path / "work"
    for more, workdir, message in (
        ([f"--config.data.source={empty}"], work, "holds no files"),
        ([f"--config.data.source={binary}"], work, "no text"),
        ([f"--config.data.source={tmp_path / 'none'}"], work, "is not a folder"),
        ([], tmp_path / "file" / "work", "cannot be written"),
    ):
        assert pipelines.main(corpus, workdir, *more) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and "Traceback" not in error
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert pipelines.main(corpus, work) == 2
    assert "GB free, but checkpoints need" in capsys.readouterr().err
    assert not (work / "target" / "params").exists()


def test_one_run_at_a_time(corpus, tmp_path, capsys):
    with processes.only_one(tmp_path):
        assert pipelines.main(corpus, tmp_path) == 2
    assert "in use by another run" in capsys.readouterr().err

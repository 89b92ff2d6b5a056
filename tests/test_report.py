"""The report: statistics against hand computation, and broken input."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from report_files import (
    ALPHA,
    STAGES,
    K,
    edit,
    edit_evaluation,
    experiment,
    fill,
    read_lines,
    reported,
    write_lines,
)

from spire_jax.config import schema
from spire_jax.results import intervals, report


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    return reported(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def summary(workdir) -> dict:
    return json.loads((workdir / "report" / "summary.json").read_text())


# --- statistics --------------------------------------------------------------------------------


def test_summary_equals_hand_computed_values(summary, workdir):
    rows = [r for r in read_lines(workdir / "eval" / "vanilla.jsonl") if r["context_length"] == 184]
    got = summary["methods"]["vanilla"]
    for k in range(1, K + 1):
        lengths = sum(r["oracle"]["lengths_by_k"][k - 1] for r in rows)
        rounds = sum(r["oracle"]["rounds_by_k"][k - 1] for r in rows)
        assert got["tau_by_k"][str(k)] == pytest.approx(lengths / rounds, rel=1e-12)
    assert got["tau"] == got["tau_by_k"]["4"]
    mean_of_ratios = np.mean([64 / r["oracle"]["rounds_by_k"][3] for r in rows])
    assert abs(got["tau"] - mean_of_ratios) > 1e-4  # the test can tell the two apart
    decoded = [r["decoder"] for r in rows]
    expected = sum(d["lengths"] for d in decoded) / sum(d["rounds"] for d in decoded)
    assert got["tau_decoder"] == pytest.approx(expected, rel=1e-12)
    for depth in range(K):
        reached = sum(r["oracle"]["reached"][depth] for r in rows)
        accepted = sum(r["oracle"]["accepted"][depth] for r in rows)
        assert got["acceptance_by_depth"][depth] == pytest.approx(accepted / reached, rel=1e-12)
    assert got["contexts"] == 40 and got["documents"] == 20
    assert got["context_length"] == 184 and got["output_length"] == 64 and got["k"] == K
    assert list(got["by_context"]) == ["48", "96", "184"]
    assert got["by_context"]["184"]["tau"] == got["tau"] != got["by_context"]["48"]["tau"]
    assert summary["stages"] == STAGES
    assert summary["config"]["decode"]["k"] == K
    assert summary["corpus"]["sha256"] == "ab" * 32
    assert summary["heldout_alpha"]["spire"] == 0.8125


def test_autoregressive_is_the_unit(summary):
    row = summary["methods"]["autoregressive"]
    assert row["tau"] == 1 and row["modeled_multiplier"] == 1 and row["measured_multiplier"] == 1
    assert not any("autoregressive" in pair for pair in summary["paired_differences"])


def test_measured_is_median_and_range_of_the_repeats(summary):
    row = summary["methods"]["spire"]
    assert row["measured_tokens_per_s"] == 300 and row["measured_tokens_per_s_range"] == [240, 330]
    assert row["measured_multiplier"] == 2.0
    assert row["measured_multiplier_range"] == [1.5, 2.4]  # repeat by repeat


def test_interval_resamples_documents_not_contexts():
    """Copies of a context in the same document add no information."""
    rng = np.random.default_rng(0)
    once = rng.uniform(1, 5, 30), np.ones(30)
    low, high = intervals.ratio_interval(*once, resamples=2000)
    assert low < np.mean(once[0]) < high
    many = intervals.ratio_interval(once[0] * 50, once[1] * 50, resamples=2000)
    assert many == pytest.approx((low, high), rel=1e-12)
    spread = 2 * 1.96 * np.std(once[0]) / np.sqrt(30)
    assert high - low == pytest.approx(spread, rel=0.1)


def test_intervals_cover_the_truth():
    """95% intervals hold the true ratio, and the true difference, about 95 times in 100."""
    rng = np.random.default_rng(3)
    trials, documents, ratio, ratio_b = 300, 40, 3.0, 2.5
    hits = hits_difference = 0
    for _ in range(trials):
        rounds = rng.uniform(5, 30, documents)
        shared = rng.normal(0, 2, documents)  # what both methods find hard
        lengths = ratio * rounds + shared + rng.normal(0, 3, documents)
        lengths_b = ratio_b * rounds + shared + rng.normal(0, 0.5, documents)
        low, high = intervals.ratio_interval(lengths, rounds, resamples=400)
        hits += low <= ratio <= high
        a, b = (lengths, rounds), (lengths_b, rounds)
        low, high = intervals.difference_interval(a, b, resamples=400)
        hits_difference += low <= ratio - ratio_b <= high
    # 4 standard errors of a binomial at 0.95, and the percentile interval's small shortfall.
    for count in (hits, hits_difference):
        assert 0.89 <= count / trials <= 0.99


def test_paired_difference_is_narrower_than_the_intervals_and_signed(summary):
    pairs = summary["paired_differences"]
    assert set(pairs) == {"magicdec - spire", "magicdec - vanilla", "spire - vanilla"}
    pair, methods = pairs["spire - vanilla"], summary["methods"]
    assert pair["difference"] == pytest.approx(methods["spire"]["tau"] - methods["vanilla"]["tau"])
    assert pair["resolved"] and pair["ci95"][0] < pair["difference"] < pair["ci95"][1]
    widths = [np.diff(methods[m]["tau_ci95"])[0] for m in ("spire", "vanilla")]
    assert np.diff(pair["ci95"])[0] < np.hypot(*widths)
    assert pairs["magicdec - vanilla"]["difference"] > 0


@pytest.mark.parametrize("own, train, expected", [(0, 4, False), (0, 2, True), (2, 4, True),
                                                  (8, 2, False)])  # fmt: skip
def test_depths_beyond_what_a_draft_was_trained_to_are_extrapolated(own, train, expected, tmp_path):
    """By the draft's own rollout depth, where it has one; others are trained to no depth."""
    config = experiment()
    drafts = tuple((name, dataclasses.replace(draft, k=own) if name == "spire" else draft)
                   for name, draft in config.drafts)  # fmt: skip
    config = dataclasses.replace(
        config, drafts=drafts, train=dataclasses.replace(config.train, k=train)
    )
    methods = report.summarize(fill(tmp_path), config, stages=STAGES)["methods"]
    assert {name for name, row in methods.items() if row["extrapolated"]} == (
        {"spire"} if expected else set()
    )


def test_equal_methods_are_not_resolved(tmp_path):
    fill(tmp_path)
    rows = read_lines(tmp_path / "eval" / "spire.jsonl")
    write_lines(tmp_path / "eval" / "vanilla.jsonl", [r | {"method": "vanilla"} for r in rows])
    summary = report.summarize(tmp_path, experiment(), stages=STAGES)
    pair = summary["paired_differences"]["spire - vanilla"]
    assert pair["difference"] == 0 and pair["ci95"] == [0, 0] and not pair["resolved"]


def test_a_single_document_has_no_interval(tmp_path):
    fill(tmp_path, documents=1, per_document=3)
    summary = report.write_report(tmp_path, experiment(), stages=STAGES)
    assert summary["methods"]["spire"]["tau_ci95"] is None
    pair = summary["paired_differences"]["spire - vanilla"]
    assert pair["ci95"] is None and not pair["resolved"]
    assert "a single document" in (tmp_path / "report" / "index.html").read_text()


def test_depths_beyond_the_oracle_leave_the_decoder(tmp_path):
    fill(tmp_path)

    def deeper(rows):
        for row in rows:
            if row["method"] != "autoregressive":
                row["k"] = 6
                row["decoder"] |= {"accepted_counts": [8, 4, 2, 0, 0, 0, 2], "rounds": 16}
                if row["method"] == "vanilla":
                    row["oracle"] = None

    for method in ALPHA:
        edit(tmp_path / "eval" / f"{method}.jsonl", deeper)
    config = dataclasses.replace(experiment(), decode=schema.DecodeConfig(k=6))
    summary = report.write_report(tmp_path, config, stages=STAGES)
    spire, vanilla = summary["methods"]["spire"], summary["methods"]["vanilla"]
    assert spire["tau"] is None and spire["tau_ci95"] is None and spire["tau_source"] == "decoder"
    assert set(spire["tau_by_k"]) == {"1", "2", "3", "4"} and vanilla["tau_by_k"] == {}
    assert spire["modeled_multiplier"] > 0
    assert vanilla["acceptance_source"] == "decoder"
    expected = [8 / 16, 4 / 8, 2 / 4, 1, 1, 1]
    assert vanilla["acceptance_by_depth"] == pytest.approx(expected)
    assert summary["paired_differences"]["spire - vanilla"]["source"] == "decoder"
    assert "beyond the depths" in (tmp_path / "report" / "index.html").read_text()


def test_modeled_figures_are_the_cost_models(summary):
    config, row = experiment(), summary["methods"]["spire"]
    multiplier = report.throughput.multiplier
    # Acceptance by context, between two by the logarithm.
    measured = {int(n): of["tau"] for n, of in row["by_context"].items()}
    for context, got in row["modeled_by_context"].items():
        tau = np.interp(np.log(int(context)), np.log(list(measured)), list(measured.values()))
        expected = multiplier(config, "spire", tau=tau, batch=64, context=int(context),
                              variant="paper")  # fmt: skip
        assert got == pytest.approx(expected)
    for variant, got in row["modeled_by_variant"].items():
        expected = multiplier(config, "spire", tau=row["tau"], batch=64, context=512,
                              variant=variant)  # fmt: skip
        assert got["multiplier"] == pytest.approx(expected)
    by_variant = {v["multiplier"] for v in row["modeled_by_variant"].values()}
    assert len(by_variant) == len(row["modeled_by_variant"]) == 4
    assert row["modeled_multiplier"] == row["modeled_by_variant"]["paper"]["multiplier"]
    rates = row["modeled_by_variant"]["paper"]["tokens_per_s_per_chip"]
    assert row["modeled_tokens_per_s_per_chip"] == rates["h100"] and len(rates) >= 7
    at_128 = multiplier(config, "spire", tau=row["tau"], batch=64, context=128, variant="paper")
    assert row["modeled_by_context"]["128"] != pytest.approx(at_128, rel=1e-6)
    for cell in summary["choice"]["cells"][6]:
        its = summary["methods"][cell["method"]]["tau_by_k"][str(cell["k"])]
        assert cell["batch"] == 64 and (cell["context"] < 184 or cell["tau"] == pytest.approx(its))
    short = row["by_context"]["48"]
    expected = multiplier(config, "spire", tau=short["tau"], batch=64, context=48, variant="paper")
    assert short["modeled_multiplier"] == pytest.approx(expected)


# --- broken input ------------------------------------------------------------------------------


def torn(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def repeat(rows: list) -> None:
    rows.append(rows[0])


def other_cut(rows: list) -> None:
    rows[0]["cut"] += 1


BROKEN = {
    "no method": (lambda w: (w / "eval/spire.jsonl").unlink(), "spire.jsonl does not exist"),
    "no evaluation": (lambda w: (w / "eval/evaluation.json").unlink(), "evaluation.json does not"),
    "no metrics": (lambda w: (w / "metrics/vanilla.jsonl").unlink(), "train vanilla again"),
    "torn line": (lambda w: torn(w / "eval/spire.jsonl"), "spire.jsonl cannot be used"),
    "torn json": (lambda w: torn(w / "eval/evaluation.json"), "evaluation.json cannot be used"),
    "empty": (lambda w: (w / "eval/spire.jsonl").write_text(""), "it is empty.*evaluate` again"),
    "lost row": (lambda w: edit(w / "eval/spire.jsonl", list.pop), "spire.jsonl: the contexts of"),
    "twice": (lambda w: edit(w / "eval/spire.jsonl", repeat), "spire.jsonl: the contexts of"),
    "unpaired": (lambda w: edit(w / "eval/spire.jsonl", other_cut), r"\(0, .* 100[01]\)"),
    "timing": (lambda w: edit_evaluation(w, lambda e: e["timing"]["spire"].update(batch_size=8)),
               "timing of spire"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_named_and_nothing_is_overwritten(tmp_path, case):
    fill(tmp_path, documents=20)
    kept = tmp_path / "report" / "summary.json"
    kept.parent.mkdir()
    kept.write_text("before")
    damage, message = BROKEN[case]
    damage(tmp_path)
    with pytest.raises(report.ReportError, match=message):
        report.write_report(tmp_path, experiment(), stages=STAGES)
    assert [p.name for p in kept.parent.iterdir()] == ["summary.json"]
    assert kept.read_text() == "before"


def test_an_untimed_method_is_shown_as_not_measured(tmp_path):
    fill(tmp_path)
    edit_evaluation(tmp_path, lambda e: e["timing"].pop("vanilla"))
    summary = report.write_report(tmp_path, experiment(), stages=STAGES)
    assert summary["methods"]["vanilla"]["measured_tokens_per_s"] is None
    assert "not measured" in (tmp_path / "report" / "index.html").read_text()


def test_the_report_does_not_import_jax():
    code = "import sys, spire_jax.results.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

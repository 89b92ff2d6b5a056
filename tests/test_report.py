"""The report: statistics against hand computation, the page against hostile and broken input."""

import dataclasses
import html.parser
import io
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import rich.console

from spire_jax import config as config_lib
from spire_jax import config_files, intervals, report, report_page

HOSTILE = (
    "<script>alert('x')</script> & \"</pre><img src=http://evil.example/x>\" {{ 7 * 7 }} \x00\x1b"
)
HOSTILE_NAME = 'lib/"><svg onload=alert(1)>.py'
LENGTHS = (48, 96, 184)
K = 4
ALPHA = {"spire": 0.84, "vanilla": 0.62, "magicdec": 0.9}
STAGES = {"target": "0123456789abcdef", "evaluate": "fedcba9876543210"}


def experiment(**evaluation) -> config_lib.ExperimentConfig:
    values = {
        "target": dict(n_layers=8, d_model=96, n_kv_heads=4, d_head=32, d_ff=288),
        "drafts": {
            "spire": dict(kind="spire", n_layers=2, window=32, sink=1),
            "vanilla": dict(kind="vanilla", n_layers=2, d_model=64, n_kv_heads=2, d_ff=192,
                            window=0, init="random", loss="hard"),
        },
        "train": dict(steps=300, seq_len=256, k=K),
        "decode": dict(k=K),
        "eval": dict(context_lengths=LENGTHS, bootstrap=300) | evaluation,
    }  # fmt: skip
    return config_files.build(config_files.defaults(values))


def write_lines(path: pathlib.Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fill(workdir: pathlib.Path, documents: int = 20, per_document: int = 2) -> pathlib.Path:
    """Records as evaluation and training leave them: 4 methods, 3 lengths, 20 documents."""
    rng = np.random.default_rng(7)
    names = [HOSTILE_NAME] + [f"lib/module_{i}.py" for i in range(1, documents)]
    hardness = rng.normal(0, 0.04, documents)
    for method in ("autoregressive", *ALPHA):
        rows = []
        for context in range(documents * per_document):
            document = context % documents
            for length in LENGTHS:
                row = {"method": method, "context": context, "document": names[document],
                       "cut": 1000 + context, "context_length": length, "output_length": 64,
                       "k": 0}  # fmt: skip
                if method != "autoregressive":
                    alpha = ALPHA[method] + hardness[document] - 0.001 * (LENGTHS[0] / length)
                    row |= {"k": K, **counts(rng, float(np.clip(alpha, 0.05, 0.99)))}
                rows.append(row)
        write_lines(workdir / "eval" / f"{method}.jsonl", rows)
    for model in ("target", "spire", "vanilla"):
        write_lines(workdir / "metrics" / f"{model}.jsonl", training_rows(rng, model))
    (workdir / "eval" / "evaluation.json").write_text(json.dumps(evaluation()))
    return workdir


def counts(rng: np.random.Generator, alpha: float) -> dict:
    """Oracle and decoder counts of 64 tokens whose drafts are accepted with one probability."""
    tau = [sum(alpha**j for j in range(k + 1)) for k in range(1, K + 1)]
    rounds = [64 / t for t in tau]
    reached = [rounds[-1] * alpha**d for d in range(K)]
    decoded = np.bincount(np.minimum(rng.geometric(1 - alpha, 20) - 1, K), minlength=K + 1)
    return {
        "oracle": {"k": K, "lengths_by_k": [64.0] * K, "rounds_by_k": rounds, "reached": reached,
                   "accepted": [r * alpha for r in reached]},
        "decoder": {"lengths": int((decoded * (1 + np.arange(K + 1))).sum()), "rounds": 20,
                    "accepted_counts": decoded.tolist()},
    }  # fmt: skip


def training_rows(rng: np.random.Generator, model: str) -> list[dict]:
    rows = []
    for step in range(10, 310, 10):
        row = {"step": step, "examples": 16 * step, "tokens": 4096 * step,
               "loss": 5.5 * np.exp(-step / 80) + 1 + rng.normal(0, 0.03), "learning_rate": 3e-3,
               "grad_norm": 1.0, "tokens_per_s": 6000 + rng.normal(0, 100),
               "peak_share": None}  # fmt: skip
        if model == "spire":
            row |= {"alpha": 0.84 - 0.6 * np.exp(-step / 60), "alpha_by_depth": [0.84] * K}
        rows.append(row)
    return rows


def evaluation() -> dict:
    code = "def cross_entropy(logits, labels):\n    return -log_softmax(logits)[labels]\n\n\n"
    pieces = [["accepted", c] for c in "class Pars"] + [["bonus", "e"], ["accepted", "r(obj"]]
    pieces += [["correction", "\n"], ["accepted", HOSTILE], ["correction", "a<b>"]]
    examples = [
        {"method": method, "document": HOSTILE_NAME, "context_text": code * 12 + HOSTILE,
         "pieces": pieces if method != "autoregressive" else [["target", HOSTILE + "\nx = 1"]]}
        for method in ("autoregressive", "spire", "vanilla")
    ]  # fmt: skip
    rates = {"autoregressive": [200.0, 100.0, 150.0], "spire": [300.0, 240.0, 330.0],
             "vanilla": [180.0, 170.0, 260.0], "magicdec": [90.0, 80.0, 85.0]}  # fmt: skip
    return {
        "corpus": {"sha256": "ab" * 32, "train_bytes": 21_000_000, "heldout_bytes": 2_400_000,
                   "train_documents": 1400, "heldout_documents": 150},
        "heldout_bits_per_byte": {"target": 1.71, "vanilla": 2.2},
        "heldout_alpha": {"spire": 0.8125, "vanilla": 0.625},
        "machine": {"hardware": "2 cores of a test <CPU>", "jax": "0.10.2", "python": "3.11.4",
                    "devices": "cpu:0"},
        "timing": {name: {"context_length": 184, "batch_size": 16, "tokens_per_s": values,
                          "seconds": [1.0, 1.0, 1.0]} for name, values in rates.items()},
        "examples": examples,
        "seconds": {"evaluate": 41.2, "target": 240.0},
    }  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    folder = fill(tmp_path_factory.mktemp("work"))
    report.write_report(folder, experiment(), stages=STAGES)
    return folder


@pytest.fixture(scope="module")
def summary(workdir) -> dict:
    return json.loads((workdir / "report" / "summary.json").read_text())


@pytest.fixture(scope="module")
def page(workdir) -> str:
    return (workdir / "report" / "index.html").read_text(encoding="utf-8")


def edit(path: pathlib.Path, change) -> None:
    rows = read_lines(path)
    change(rows)
    write_lines(path, rows)


def edit_evaluation(workdir: pathlib.Path, change) -> None:
    path = workdir / "eval" / "evaluation.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


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
    assert set(pairs) == {"spire - vanilla", "spire - magicdec", "vanilla - magicdec"}
    pair, methods = pairs["spire - vanilla"], summary["methods"]
    assert pair["difference"] == pytest.approx(methods["spire"]["tau"] - methods["vanilla"]["tau"])
    assert pair["resolved"] and pair["ci95"][0] < pair["difference"] < pair["ci95"][1]
    widths = [np.diff(methods[m]["tau_ci95"])[0] for m in ("spire", "vanilla")]
    assert np.diff(pair["ci95"])[0] < np.hypot(*widths)
    assert pairs["vanilla - magicdec"]["difference"] < 0


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
    config = dataclasses.replace(experiment(), decode=config_lib.DecodeConfig(k=6))
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
    for context, got in row["modeled_by_context"].items():
        expected = multiplier(config, "spire", tau=row["tau"], batch=64, context=int(context),
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
    short = row["by_context"]["48"]
    expected = multiplier(config, "spire", tau=short["tau"], batch=64, context=48, variant="paper")
    assert short["modeled_multiplier"] == pytest.approx(expected)


# --- page --------------------------------------------------------------------------------------


class Elements(html.parser.HTMLParser):
    """Start tags, text, ids and nesting of a page."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_self_contained(page):
    parsed = Elements(page)
    assert parsed.open == []
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "base"}
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                assert value.startswith("#"), (tag, name, value)
    style = "".join(re.findall(r"<style.*?</style>", page, re.DOTALL))
    assert "@import" not in style
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert "://" not in page.replace("http://evil.example", "")  # there as text, escaped


def test_ids_are_unique_and_references_resolve(page):
    tags = Elements(page).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids)) > 100
    used = set(re.findall(r"url\(#([^)]+)\)", page))
    used |= {a[n][1:] for _, a in tags for n in ("href", "xlink:href") if n in a}
    used |= {a["aria-labelledby"] for _, a in tags if "aria-labelledby" in a}
    assert used and used <= set(ids)
    figures = [a for t, a in tags if t == "svg"]
    assert len(figures) == 6 and all(a["role"] == "img" for a in figures)


def test_figures_follow_the_page_colours(page):
    figures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "currentColor" in figures and "var(--series-1)" in figures and "var(--grid)" in figures
    left = set(re.findall(r"#[0-9a-fA-F]{6}\b", figures))
    assert left <= {"#ffffff"}, left  # invisible only: see the next line
    for shape in re.findall(r"<path[^>]*#ffffff[^>]*>", figures):
        assert "opacity: 0" in shape
    variables = set(re.findall(r"var\((--[\w-]+)\)", page))
    light, dark = page.split("@media (prefers-color-scheme: dark)", 1)
    for variable in variables:
        assert f"{variable}:" in light and f"{variable}:" in dark, variable


def test_hostile_text_is_shown_not_run(page):
    parsed = Elements(page)
    assert "<script>alert" not in page and "<svg onload" not in page and "<img" not in page
    assert "<script>alert('x')</script> & \"</pre>" in parsed.text  # shown, letter for letter
    assert HOSTILE_NAME in parsed.text and "{{ 7 * 7 }}" in parsed.text
    assert "\x00" not in page and "\x1b" not in page and "␀␛" in page
    assert "2 cores of a test <CPU>" in parsed.text


def test_pieces_are_told_apart_without_colour(page):
    assert '<span class="accepted">class Pars</span><span class="bonus">e</span>' in page
    assert '<span class="correction">⏎\n</span>' in page  # a line end can be seen
    rules = dict(re.findall(r"^\.(accepted|correction|bonus) \{(.*?)\}", page, re.S | re.M))
    lines = {re.search(r"underline( wavy| double)?", rule)[0] for rule in rules.values()}
    assert len(rules) == len(lines) == 3


def test_long_contexts_are_cut_and_say_so(page):
    context = evaluation()["examples"][0]["context_text"]
    assert f"{len(context) - report_page.CONTEXT_SHOWN:,} characters before" in page


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path):
    fill(tmp_path)
    edit_evaluation(tmp_path, lambda e: e["examples"][1]["pieces"].append(["accepted", "\ud83d"]))
    report.write_report(tmp_path, experiment(), stages=STAGES)
    assert "\\ud83d" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_modeled_and_measured_are_labelled_apart(page):
    modeled = page[page.index('<h2 id="modeled"') : page.index('<h2 id="measured"')]
    measured = page[page.index('<h2 id="measured"') : page.index('<h2 id="training"')]
    assert "300.0" in measured and "300.0" not in modeled and "2 cores" not in modeled
    assert "2 cores of a test" in measured and "batch 16, context 184" in measured
    for chip in report.throughput.CHIPS:
        assert f'<th scope="col">{chip}</th>' in modeled


def test_terminal_table_fits_80_columns(summary):
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    report.print_table(summary, console)
    text = console.export_text()
    row = next(line for line in text.splitlines() if "spire" in line)
    assert f"{summary['methods']['spire']['tau']:.2f} [" in row and "300" in row and "2.00" in row
    assert "batch 64, context 512" in " ".join(text.split()) and "2 cores of a test" in " ".join(
        text.split()
    )


# --- broken input ------------------------------------------------------------------------------


def torn(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def repeat(rows: list) -> None:
    rows.append(rows[0])


def other_cut(rows: list) -> None:
    rows[0]["cut"] += 1


def other_k(rows: list) -> None:
    rows[5]["k"] = 3


def short_oracle(rows: list) -> None:
    rows[5]["oracle"]["reached"].pop()


def not_finite(rows: list) -> None:
    rows[5]["oracle"]["rounds_by_k"][0] = float("nan")


def no_oracle_once(rows: list) -> None:
    rows[5]["oracle"] = None


BROKEN = {
    "no method": (lambda w: (w / "eval/spire.jsonl").unlink(), "spire.jsonl does not exist"),
    "no evaluation": (lambda w: (w / "eval/evaluation.json").unlink(), "evaluation.json does not"),
    "no metrics": (lambda w: (w / "metrics/vanilla.jsonl").unlink(), "train vanilla again"),
    "torn line": (lambda w: torn(w / "eval/spire.jsonl"), r"spire.jsonl:120 is not whole JSON"),
    "torn json": (lambda w: torn(w / "eval/evaluation.json"), "evaluation.json is not whole"),
    "empty": (lambda w: (w / "eval/spire.jsonl").write_text(""), "spire.jsonl is empty"),
    "lost row": (lambda w: edit(w / "eval/spire.jsonl", list.pop), "spire.jsonl: the contexts of"),
    "twice": (lambda w: edit(w / "eval/spire.jsonl", repeat), r"spire.jsonl:121: .* twice"),
    "unpaired": (lambda w: edit(w / "eval/spire.jsonl", other_cut), r"context 0, .* cut 100[01]"),
    "other k": (lambda w: edit(w / "eval/spire.jsonl", other_k), r"spire.jsonl:6: k is 3"),
    "short": (lambda w: edit(w / "eval/spire.jsonl", short_oracle), r"spire.jsonl:6: reached"),
    "nan": (lambda w: edit(w / "eval/spire.jsonl", not_finite), r"spire.jsonl:6: rounds_by_k"),
    "mixed": (lambda w: edit(w / "eval/spire.jsonl", no_oracle_once), r"spire.jsonl: the oracle"),
    "no corpus": (lambda w: edit_evaluation(w, lambda e: e.pop("corpus")), "json: corpus is miss"),
    "kind": (lambda w: edit_evaluation(w, lambda e: e["examples"][1]["pieces"].append(["x", ""])),
             "example 1: a piece"),
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


def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch):
    fill(tmp_path)
    report.write_report(tmp_path, experiment(), stages={"target": "old"})
    before = {p.name: p.read_bytes() for p in (tmp_path / "report").iterdir()}
    write = pathlib.Path.write_text

    def full(self, text, **options):
        if "summary" in self.name:
            write(self, text[:100], **options)
            raise OSError(28, "No space left on device", str(self))
        return write(self, text, **options)

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_report(tmp_path, experiment(), stages=STAGES)
    assert {p.name: p.read_bytes() for p in (tmp_path / "report").iterdir()} == before


def test_an_untimed_method_is_shown_as_not_measured(tmp_path):
    fill(tmp_path)
    edit_evaluation(tmp_path, lambda e: e["timing"].pop("vanilla"))
    summary = report.write_report(tmp_path, experiment(), stages=STAGES)
    assert summary["methods"]["vanilla"]["measured_tokens_per_s"] is None
    assert "not measured" in (tmp_path / "report" / "index.html").read_text()


def test_the_report_does_not_import_jax():
    code = "import sys, spire_jax.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

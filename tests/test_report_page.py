"""The report's page and table: whole, self-contained, and safe against hostile text."""

import html.parser
import io
import json
import pathlib
import re

import pytest
import rich.console
from report_files import (
    HOSTILE_NAME,
    STAGES,
    edit_evaluation,
    evaluation,
    experiment,
    fill,
    reported,
)

from spire_jax.results import report, report_page


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    return reported(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def summary(workdir) -> dict:
    return json.loads((workdir / "report" / "summary.json").read_text())


@pytest.fixture(scope="module")
def page(workdir) -> str:
    return (workdir / "report" / "index.html").read_text(encoding="utf-8")


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
    assert len(figures) == 7 and all(a["role"] == "img" for a in figures)


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

"""The README's sample: all of it from one run, between the marks, or nothing."""

import json

import pytest
from report_files import experiment, fill, reported

from launch import sample
from spire_jax.config.files import load
from spire_jax.config.schema import ConfigError

BEFORE = {
    sample.README: "# Title\n\n<!-- sample -->\nold 0.84\n<!-- /sample -->\n\nMore.\n",
    sample.CONFIG: '"""Says\nprinted (python -m launch.sample)\n\n    old\n"""\n\nx = """a"""\n',
}


@pytest.fixture
def root(tmp_path):
    for name, text in BEFORE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "docs").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A work directory with its report, which has the hash of its stage."""
    folder = reported(tmp_path_factory.mktemp("work"))
    path = folder / "report" / "summary.json"
    summary = json.loads(path.read_text())
    summary["stages"]["report"] = "0f1e2d3c4b5a6978"
    path.write_text(json.dumps(summary))
    return folder


def texts(root):
    return {name: (root / name).read_text() for name in BEFORE}


def test_the_sample_is_of_one_run_and_nothing_else_changes(root, workdir):
    summary = json.loads((workdir / "report" / "summary.json").read_text())
    for _ in range(2):  # the second time over its own
        sample.write(root, experiment(), workdir)
    readme, config = texts(root).values()
    for text in (readme, config):
        words = " ".join(text.split())
        assert "2 cores of a test <CPU>, Python 3.11.4, jax 0.10.2" in words and "old" not in words
        assert text.count("0f1e2d3c4b5a6978") == 1 and text.count("autoregressive  ") == 1
        for name, row in summary["methods"].items():
            (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{name}  "))
            assert f"{row['tau']:.2f}" in line and f"{row['measured_tokens_per_s']:,.0f}" in line
            assert f"{row['modeled_multiplier']:.2f}" in line
    assert readme.startswith("# Title\n\n<!-- sample -->\n<!-- the run ")
    assert readme.endswith("\n<!-- /sample -->\n\nMore.\n") and "1.71 bits per byte" in readme
    pair = summary["paired_differences"]["spire - vanilla"]["difference"]
    assert f"spire less vanilla {pair:.2f} [" in " ".join(readme.split())
    found: dict = {}
    exec(config, found)
    assert found["x"] == "a" and found["__doc__"].startswith("Says\nprinted")
    assert 10_000 < (root / sample.PICTURE).stat().st_size < 200_000


def test_the_picture_names_modeled_and_measured_apart(workdir):
    summary = json.loads((workdir / "report" / "summary.json").read_text())
    taus, over, variants, measured = (figure := sample.picture(summary)).axes
    assert len(taus.lines) and measured.get_title() == "measured here"
    assert over.get_title().startswith("modeled") and variants.get_title().startswith("modeled")
    drafts = [row for name, row in summary["methods"].items() if name != "autoregressive"]
    heights = [bar.get_height() for bar in measured.patches]
    assert heights == [row["measured_multiplier"] for row in drafts]
    assert len(variants.patches) == len(drafts) * len(summary["assumptions"]["variants"])
    assert "2 cores of a test <CPU>" in figure._supxlabel.get_text().replace("\n", " ")


@pytest.mark.parametrize(
    "case, said",
    [
        ("no report", "has no report; run the pipeline there first"),
        ("another config", "is of another config"),
        ("no marks", "must have '<!-- sample -->' once, and '<!-- /sample -->' after it"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(root, workdir, tmp_path, case, said):
    config = experiment()
    if case == "no report":
        workdir = fill(tmp_path / "unreported")
    elif case == "another config":
        config = load(sample.ROOT / sample.CONFIG)
    else:
        (root / sample.README).write_text("# No marks\n")
    before = texts(root)
    with pytest.raises(ConfigError, match=said):
        sample.write(root, config, workdir)
    assert texts(root) == before and not (root / sample.PICTURE).exists()


def test_the_repositorys_own_files_have_the_marks():
    for name, marks in ((sample.README, sample.IN_README), (sample.CONFIG, sample.IN_CONFIG)):
        assert "new" in sample._between(sample.ROOT / name, marks, "new")

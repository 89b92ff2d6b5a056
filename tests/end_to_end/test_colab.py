"""`launch/colab.ipynb`, executed cell by cell at small sizes; what it shows is looked at."""

import base64
import io
import pathlib
import re
import shutil
import subprocess
import sys

import nbclient
import nbformat
import numpy as np
import pipelines
import pytest
from matplotlib.image import imread
from test_resume import check_equal

from spire_jax.storage.metrics import read_metrics

ROOT = pathlib.Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "launch" / "colab.ipynb"
PROMPT = "def <x>(&y):\n"  # text that would be markup


def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(corpus, workdir):
    """The notebook after an execution, by the ids of its cells; a cell that fails is an error."""
    book = notebook()
    values = {"data.source": corpus, **pipelines.OVERRIDES}
    given = {
        "WORKDIR": str(workdir), "TARGET_STEPS": values["train.steps"], "MAX_TOKENS": 24,
        "DRAFT_STEPS": values["drafts.spire.steps"], "PROMPTS": [PROMPT, "x = "],
        "OVERRIDES": [f"--config.{key}={value}" for key, value in values.items()],
    }  # fmt: skip
    (cell,) = (c for c in book.cells if "parameters" in c.metadata.get("tags", ()))
    names = re.findall(r"^(\w+(?:, \w+)*)(?:: \S+)? = ", cell.source, flags=re.MULTILINE)
    assert {n for group in names for n in group.split(", ")} == {*given, "REPOSITORY"}
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    client = nbclient.NotebookClient(
        book, timeout=240, kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )  # fmt: skip
    client.execute()
    return {cell.id: cell for cell in book.cells}


def shown(cell, kind):
    (found,) = (o["data"][kind] for o in cell.outputs if kind in o.get("data", {}))
    return found


def picture(cell):
    """(height, width, 3) of the cell's only picture, 0 to 255."""
    return pixels(base64.b64decode(shown(cell, "image/png")))


def pixels(png):
    return np.rint(imread(io.BytesIO(png))[..., :3] * 255).astype(int)


def share(image, color):
    """The share of pixels within a few steps of a colour, "#rrggbb"."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(image - wanted).max(axis=-1) <= 6).mean()


def check_what_is_shown(cells, workdir):
    from spire_jax.notebook import attention, curves

    for name in ("masks", "reads"):
        image = picture(cells[name])
        assert share(image, attention.COLORS[attention.TARGET]) > 0.05
    assert all(share(image, attention.COLORS[kind]) > 0.01 for kind in range(4))
    assert share(picture(cells["layers"]), "#08306b") > 0.02  # all of one layer's weight
    # A curve each, of all the steps that the files have.
    for name, models in (("train-target", ["target"]), ("train-draft", ["target", "spire"])):
        image = picture(cells[name])
        for model in ("target", "spire"):
            assert (share(image, curves.COLORS[model]) > 0.0005) == (model in models)
    for model, steps in (("target", 24), ("spire", 12)):
        assert read_metrics(workdir / "metrics" / f"{model}.jsonl")[-1]["step"] == steps
    text = shown(cells["decode"], "text/html")
    assert "def &lt;x&gt;(&amp;y):" in text and "<x>" not in text
    assert text.count('class="accepted') > 8 and text.count('class="prompt"') == 2
    tokens = sum(map(int, re.findall(r"(\d+) tokens in \d+ rounds", text)))
    spans = len(re.findall(r'<span class="\w+(?: first)?" title="round', text))
    assert tokens <= spans <= tokens + 2, "a token each, and the end of sequence where there is one"
    assert re.search(r"tau = [1-4]\.\d\d tokens per round", text)
    assert share(picture(cells["winners"]), "#ffffff") < 0.9
    sliders = shown(cells["costs"], "application/vnd.jupyter.widget-view+json")
    assert sliders["model_id"]


@pytest.mark.slow  # in the fast tier what the cells call: test_notebook.py
def test_every_cell_runs_and_training_goes_on(corpus, finished, tmp_path):
    """On what an interrupted run has left: a whole target, a draft with a step's checkpoint."""
    workdir = tmp_path / "interrupted"
    shutil.copytree(finished, workdir)
    draft = workdir / "drafts" / "spire"
    shutil.rmtree(draft / "params")
    steps = sorted(int(p.name) for p in (draft / "checkpoints").iterdir() if p.name.isdigit())
    shutil.rmtree(draft / "checkpoints" / str(steps[-1]))
    target = workdir / "target" / "params"
    of_target = target.stat().st_mtime_ns
    earlier = (draft / "checkpoints" / str(steps[-2])).stat().st_mtime_ns
    assert len(steps) >= 2
    cells = execute(corpus, workdir)
    check_what_is_shown(cells, workdir)
    check_equal(workdir, finished, ["target", "spire"])
    # Not made anew: the speed that was measured at the first steps is the first run's.
    for model, first in (("target", 24), ("spire", steps[-2])):
        ours, theirs = (read_metrics(w / "metrics" / f"{model}.jsonl") for w in (workdir, finished))
        assert [r for r in ours if r["step"] <= first] == [r for r in theirs if r["step"] <= first]
    assert target.stat().st_mtime_ns == of_target
    kept = draft / "checkpoints" / str(steps[-2])
    assert not kept.exists() or kept.stat().st_mtime_ns == earlier


@pytest.mark.slow
def test_from_nothing_and_again(corpus, finished, tmp_path):
    workdir = tmp_path / "new"
    check_what_is_shown(execute(corpus, workdir), workdir)
    check_equal(workdir, finished, ["target", "spire"])
    metrics = {p: p.read_bytes() for p in (workdir / "metrics").iterdir()}
    check_what_is_shown(execute(corpus, workdir), workdir)
    assert metrics == {p: p.read_bytes() for p in (workdir / "metrics").iterdir()}


def test_the_committed_notebook_is_clean():
    book = notebook()
    nbformat.validate(book)
    for cell in book.cells:
        assert len(cell.source.splitlines()) < 16
        assert re.fullmatch(r"[a-z][a-z-]+", cell.id), "ids are given, and stay"
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert len({cell.id for cell in book.cells}) == len(book.cells)
    assert NOTEBOOK.stat().st_size < 20_000
    assert str(ROOT) not in NOTEBOOK.read_text()


def test_ruff_reads_the_notebook(tmp_path):
    """`ruff check .` includes notebooks: it finds what is planted in one."""
    ruff = pathlib.Path(sys.executable).parent / "ruff"

    def check(path):
        command = [ruff, "check", "--config", str(ROOT / "pyproject.toml"), str(path)]
        return subprocess.run(command, capture_output=True, text=True)

    done = check(NOTEBOOK)
    assert done.returncode == 0, done.stdout
    book = notebook()
    book.cells[-2].source += "\nimport os"
    nbformat.write(book, tmp_path / "planted.ipynb")
    assert "E402" in check(tmp_path / "planted.ipynb").stdout

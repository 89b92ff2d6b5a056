"""What the Colab notebook shows, and how it installs, without a front end."""

import dataclasses
import html
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest

from launch.setup import colab
from spire_jax import notebook, run
from spire_jax.config.files import load
from spire_jax.config.schema import ConfigError
from spire_jax.costs.roofline import VARIANTS
from spire_jax.costs.throughput import multiplier
from spire_jax.data.tokenizer import ByteTokenizer
from spire_jax.models.masks import may_attend
from spire_jax.notebook import curves as curves_module
from spire_jax.notebook.attention import ITSELF, NOTHING, OWN, TARGET, reads
from spire_jax.notebook.costs import tau_at, with_settings
from spire_jax.notebook.curves import curves
from spire_jax.notebook.decoding import Answer, Decoded, Round
from spire_jax.serving.interactive import visible
from spire_jax.serving.records import LENGTH, Request, Result

QUICK = "configs/quickstart.py"
SMALL = [
    "target.d_model=16",
    "target.d_head=8",
    "target.d_ff=16",
    "drafts.vanilla.n_layers=1",
    "drafts.spire.kind=spire",
]
PAPER, LLAMA = "configs/paper_67m.py", "configs/paper_llama3_70b.py"

# --- who reads what ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "sink", "k", "more"),
    [(6, 2, 4, []), (4, 0, 2, ["drafts.spire.feedback=False"]),
     (5, 1, 4, ["drafts.spire.memory=final"])],
)  # fmt: skip
def test_what_a_draft_reads_is_what_the_method_says(window, sink, k, more):
    """Method.md 3.3: target memories up to S - k, its own of the block, itself; all under 3.1."""
    length = 16
    values = [f"drafts.spire.window={window}", f"drafts.spire.sink={sink}", f"train.k={k}"]
    config = load(QUICK, [*SMALL, *values, *more])
    found = reads(config, "spire", length)
    for q in range(length):
        for p in range(length):
            wanted = TARGET if p < q // k * k else OWN if p < q else ITSELF
            wanted = wanted if may_attend(q, p, window, sink) else NOTHING
            assert found[q, p] == wanted, (q, p)


def test_a_memory_of_embeddings_reads_no_target():
    values = ["drafts.spire.memory=embedding", "drafts.spire.window=6"]
    found = reads(load(QUICK, [*SMALL, *values]), "spire", length=8)
    assert not np.any(found == TARGET) and np.any(found == OWN)


def test_a_draft_without_rollouts_is_refused():
    config = load(QUICK, SMALL)
    with pytest.raises(ConfigError, match=r"drafts\.vanilla: a vanilla draft reads no target"):
        reads(config, "vanilla")
    with pytest.raises(ConfigError, match="has no feedback memory"):
        notebook.layers_figure(config, "vanilla")
    with pytest.raises(ConfigError, match="length=10 must be a multiple of the rollout depth 4"):
        reads(config, "spire", length=10)


def numbers(axes):
    return [text.get_text() for text in axes.texts]


def test_layers_of_the_memory():
    config = load(QUICK)
    left, right = notebook.layers_figure(config, "spire").axes
    drawn = np.asarray(left.images[0].get_array())
    assert np.argwhere(drawn).tolist() == [[0, 6], [1, 7]]  # N - n + i - 1, of 8 and 2 layers
    assert numbers(right) == ["0.95", "0.03", "0.03", "0.03", "0.95", "0.03"]
    learned = {"memory_mix": np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])}
    _, right = notebook.layers_figure(config, "spire", params=learned).axes
    assert numbers(right) == ["0.50", "0.25", "0.25", "0.10", "0.20", "0.70"]


def test_masks():
    config = load(QUICK, ["drafts.spire.window=3", "drafts.spire.sink=1"])
    target, draft = notebook.masks_figure(config, "spire", length=5).axes
    assert np.array_equal(target.images[0].get_array(), np.tri(5))
    assert draft.images[0].get_array().tolist()[4] == [1, 0, 1, 1, 1]


# --- training ------------------------------------------------------------------------------------


class Handle:
    def __init__(self):
        self.pictures = []

    def update(self, picture):
        self.pictures.append(picture.data)


def write(path, steps):
    records = [{"step": s, "tokens": 10 * s, "loss": 5 - s / 10, "alpha": s / 10}
               for s in range(1, steps + 1)]  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_curves_follow_the_files(tmp_path, monkeypatch):
    handle = Handle()

    def display(picture, display_id):
        handle.update(picture)
        return handle

    monkeypatch.setattr(curves_module, "display", display)
    path = tmp_path / "metrics" / "spire.jsonl"
    with notebook.live_curves(str(tmp_path), ["spire"], seconds=0.05):
        write(path, 3)
        seen = len(handle.pictures)
        while len(handle.pictures) < seen + 2:
            pass
    assert len(set(handle.pictures)) > 1
    before = handle.pictures[-1]
    with pytest.raises(ValueError, match="stops"):  # the last state is drawn all the same
        with notebook.live_curves(str(tmp_path), ["spire"], seconds=60.0):
            write(path, 6)
            raise ValueError("stops")
    assert handle.pictures[-1] != before


def test_curves(tmp_path):
    write(tmp_path / "metrics" / "target.jsonl", 4)
    write(tmp_path / "metrics" / "spire.jsonl", 2)
    with (tmp_path / "metrics" / "spire.jsonl").open("a") as file:
        file.write('{"step": 3, "tok')  # a line under way
    loss, acceptance = curves(str(tmp_path), ["target", "spire", "vanilla"]).axes
    labels = [line.get_label() for line in loss.lines]
    assert labels == ["target, step 4", "spire, step 2", "vanilla, waiting"]
    assert loss.lines[0].get_xydata().tolist() == [[10, 4.9], [20, 4.8], [30, 4.7], [40, 4.6]]
    assert acceptance.lines[0].get_xydata().tolist() == [[10, 0.1], [20, 0.2]]


def test_how_a_run_ends_is_said(monkeypatch):
    def ends(status):
        def main(arguments):
            print("error: it is full", file=sys.stderr)
            if status == "exit":
                sys.exit(2)
            return status

        monkeypatch.setattr(run, "main", main)
        notebook.train([])

    ends(0)
    for status in (2, "exit"):
        with pytest.raises(RuntimeError, match="status 2: error: it is full"):
            ends(status)
    with pytest.raises(KeyboardInterrupt):
        ends(130)


# --- decoding ------------------------------------------------------------------------------------


def decoded(prompt, rounds):
    tokenizer = ByteTokenizer()
    tokens = [t for one in rounds for t in one.tokens]
    request = Request(0, tokenizer.encode(prompt), len(tokens), seed=0)
    result = Result(
        request, tokens, tokenizer.decode(np.array(tokens, np.int32)),
        [one.accepted + 1 for one in rounds], [one.k for one in rounds], LENGTH, 0.0, 0.0, 1.0,
    )  # fmt: skip
    answer = Answer(prompt, tuple(rounds), result)
    return Decoded("spire", load(QUICK), (answer,), tokenizer, None)


def test_tokens_are_coloured_by_origin_and_nothing_is_markup():
    text = "<b>&é\x1b"
    tokens = text.encode()  # 7: é is two
    rounds = [Round(tuple(tokens[:3]), 2, 2), Round(tuple(tokens[3:5]), 1, 2),
              Round(tuple(tokens[5:6]), 0, 2), Round(tuple(tokens[6:]), 2, 2)]  # fmt: skip
    page = notebook.coloured(decoded("<script>\n", rounds))
    spans = re.findall(r'<span class="([\w ]+)" title="round (\d)[^"]*">([^<]*)</span>', page)
    assert [(kind, number, html.unescape(text)) for kind, number, text in spans] == [
        ("accepted first", "1", "<"), ("accepted", "1", "b"), ("bonus", "1", ">"),
        ("accepted first", "2", "&"), ("correction", "2", ""), ("correction first", "3", "é"),
        ("accepted first", "4", visible("\x1b")),
    ]  # fmt: skip
    assert "<script>" not in page and "&lt;script&gt;\n" in page and "<b>&" not in page
    assert "7 tokens in 4 rounds: tau 2.25, 1.75 kept a round; 5 of 8 drafted tokens acc" in page
    assert re.findall(r'title="round (\d): (\d)"', page) == [
        ("1", "3"), ("2", "2"), ("3", "1"), ("4", "3")
    ]  # fmt: skip


def test_without_a_draft_no_token_has_an_origin():
    page = notebook.coloured(decoded("x", [Round((97,), 0, 0), Round((98,), 0, 0)]))
    assert re.findall(r'<span class="([\w ]+)" title="round', page) == [" first", " first"]


# --- costs ---------------------------------------------------------------------------------------


def test_acceptance_length_at_another_depth():
    assert tau_at(3.4, 4, 4) == pytest.approx(3.4)
    assert tau_at(1 + 0.5 + 0.25, 2, 3) == pytest.approx(1.875)
    assert tau_at(1.0, 4, 8) == 1 and tau_at(5.0, 4, 8) == pytest.approx(9)
    with pytest.raises(ConfigError, match="between 1 and k"):
        tau_at(5.1, 4, 4)


def test_the_figure_has_the_papers_multipliers():
    config = load(PAPER)
    figure = notebook.cost_figure(config, k=4, window=64, sink=1, batch=64, context=512)
    labels = [label for line in figure.axes[0].lines if "(tau" in (label := str(line.get_label()))]
    assert labels == [
        "vanilla: 1.36 (tau 2.65)", "magicdec: 2.05 (tau 3.89)", "spire: 2.78 (tau 3.40)",
    ]  # fmt: skip


def test_every_setting_counts():
    config = load(PAPER)
    at = {"k": 4, "window": 64, "sink": 1, "batch": 64, "context": 512}

    def drawn(**more):
        axes = notebook.cost_figure(config, **{**at, **more}).axes
        return [np.asarray(line.get_ydata()).tolist() for one in axes for line in one.lines]

    base = drawn()
    changes = {"k": 8, "window": 256, "sink": 16, "batch": 8, "context": 2048,
               "variant": "with_head", "on": "v5e"}  # fmt: skip
    for name, value in changes.items():
        assert drawn(**{name: value}) != base, name
    settled = with_settings(config, k=8, window=256, sink=16)
    assert settled.draft("spire").kept() == (256, 16)
    assert settled.draft("magicdec").kept() == (256, 16) and settled.decode.k == 8
    assert settled.draft("vanilla") == config.draft("vanilla")  # a dense cache stays one
    wanted = multiplier(settled, "spire", tau=tau_at(3.401, 4, 8), batch=8, context=2048)
    line = notebook.cost_figure(
        config, k=8, window=256, sink=16, batch=8, context=2048, variant="paper"
    ).axes[0].lines[5]  # fmt: skip
    assert line.get_ydata() == pytest.approx(wanted)


def test_who_wins_is_drawn_for_every_batch_and_context():
    config = load(PAPER)
    (axes,) = notebook.winners_figure(config).axes
    at = config.throughput
    assert len(axes.patches) == len(at.batch_sizes) * len(at.context_lengths)
    shown = [text.get_text() for text in axes.texts]
    assert any(text.startswith("k = 8") for text in shown) and len(shown) == len(axes.patches)
    assert {line.get_label() for line in axes.lines} <= {"autoregressive", *dict(config.drafts)}


@pytest.mark.parametrize("path", [PAPER, pytest.param(LLAMA, marks=pytest.mark.slow)])
@pytest.mark.parametrize("end", [0, -1])
def test_sliders_at_their_ends(path, end):
    """Every slider at its least, or most; then each variant."""
    *controls, picture = notebook.cost_widgets(load(path)).children
    first = bytes(picture.value)
    assert first.startswith(b"\x89PNG")
    for control in controls:
        ends = (getattr(control, "min", None), getattr(control, "max", None))
        control.value = ends[end] if ends[0] is not None else control.options[end]
    last = bytes(picture.value)
    assert last.startswith(b"\x89PNG") and last != first
    names = [control.description for control in controls]
    assert names == ["k", "window", "sink", "batch", "context", "variant", "chip"]
    assert list(controls[5].options) == list(VARIANTS)


def test_a_config_without_acceptance_lengths_is_refused():
    with pytest.raises(ConfigError, match="gives no acceptance length"):
        notebook.cost_figure(load(QUICK), k=4, window=64, sink=1, batch=64, context=512)


# --- installation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "extra"),
    [((), None), (("jax-cuda12-plugin", "jax"), "cuda12"), (("libtpu",), "tpu")],
)
def test_jax_comes_with_its_accelerators_plugin(installed, extra):
    root = colab.ROOT
    dash, path, *jax = colab.wanted(root, installed)
    assert (dash, path) == ("-r", str(root / "requirements.txt"))
    assert jax == ([] if extra is None else [f"jax[{extra}]>=0.10,<0.13"])


def test_packages_that_are_loaded_and_were_replaced(monkeypatch):
    before = {"numpy": "1.0", "scikit-learn": "1.1", "rich": "13", "idle": "1"}
    owners = {"numpy": ["numpy"], "sklearn": ["scikit_learn"], "rich": ["rich"], "idle": ["idle"]}
    monkeypatch.setattr(colab.importlib.metadata, "packages_distributions", lambda: owners)
    after = {"numpy": "2.0", "scikit-learn": "1.2", "rich": "13", "idle": "2"}
    found = colab.in_use(before, after, ["numpy.linalg", "sklearn", "rich", "mine"])
    assert found == ["numpy 1.0 (now 2.0)", "scikit-learn 1.1 (now 1.2)"]


def test_what_goes_wrong_while_installing_is_said(monkeypatch):
    def pip(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        return types.SimpleNamespace(returncode=int(fails), stderr="ERROR: no network")

    versions = iter([{"numpy": "1.0"}, {"numpy": "2.0"}] * 2)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(colab, "versions", lambda: next(versions))
    fails = False
    with pytest.raises(colab.InstallError, match=r"numpy 1.0 \(now 2.0\).*Restart session"):
        colab.install()
    fails = True
    with pytest.raises(colab.InstallError, match="no network"):
        colab.install()


def test_the_parts_are_those_of_the_library():
    """`Decoded.tau` is the mean over rounds, not over answers."""
    one = decoded("x", [Round((97, 98, 99), 2, 2)]).answers[0]
    other = decoded("x", [Round((97,), 0, 2)] * 3).answers[0]
    both = dataclasses.replace(decoded("x", []), answers=(one, other))
    assert both.tau == pytest.approx(6 / 4)

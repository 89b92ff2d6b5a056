"""Figures: all of them drawn, with their assumptions, from the paper's tau and from one's own."""

import json
import pathlib
import time

import pytest

from spire_jax.config.files import load
from spire_jax.config.identity import made_with
from spire_jax.config.schema import ConfigError
from spire_jax.config.variants import ABLATIONS
from spire_jax.costs import throughput
from spire_jax.costs.roofline import VARIANTS
from spire_jax.results import figure_inputs, figures

PAPER = "configs/paper_67m.py"
ALWAYS = {"speedup_over_context", "operational_intensity", "cost_analysis", "alternative_metric",
          "ablations", *(f"heat_map_{v}" for v in VARIANTS)}  # fmt: skip


def words(figure) -> str:
    texts = [figure.get_suptitle(), figure._supxlabel.get_text()]
    for axes in figure.axes:
        texts += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
        texts += [text.get_text() for text in axes.texts]
    return " ".join(texts).replace("\n", " ")


@pytest.fixture(scope="module")
def paper():
    config = figure_inputs.with_ablations(load(PAPER))
    return config, figure_inputs.paper_inputs(config)


def test_every_figure_says_its_assumptions(paper):
    drawn = dict(figures.figures(*paper))
    assert set(drawn) == ALWAYS
    for name, figure in drawn.items():
        text = words(figure)
        assert "HOI 600" in text or name == "operational_intensity", name
        if name.startswith("heat_map_"):
            assert VARIANTS[name.removeprefix("heat_map_")] in text
    for axes in drawn["speedup_over_context"].axes:
        assert all(0 <= v <= axes.get_ylim()[1] for line in axes.lines for v in line.get_ydata())
    assert "2.78" in words(drawn["heat_map_paper"]) and "2.45" in words(drawn["heat_map_with_head"])
    assert "L_crit = 32" in words(drawn["operational_intensity"])
    lines = drawn["operational_intensity"].axes[0].lines
    assert len(lines) == 1 + len(paper[0].throughput.context_lengths)
    assert "3.401" in words(drawn["ablations"]) and "2.959" in words(drawn["ablations"])


def test_the_papers_net_savings(paper):
    """Ten units of decoding at (64, 512): 6.15 for SPIRe, 5.12 for MagicDec (section 6)."""
    config, given = paper
    saved = {
        name: throughput.net_saving(
            throughput.multiplier(config, name, tau=given.tau[name], batch=64, context=512),
            config.throughput.decode_to_train,
            given.training[name],
        )
        for name in ("spire", "magicdec")
    }
    assert saved["spire"] == pytest.approx(6.15, abs=0.01)
    assert saved["magicdec"] == pytest.approx(5.12, abs=0.01)
    assert "spire 6.15" in figures._savings(config, given)
    for bad in ((0, 1, 1), (2, -1, 0), (2, 1, -1)):
        with pytest.raises(ConfigError, match="must not be negative"):
            throughput.net_saving(*map(float, bad))


def test_costs_of_training_are_flops_unless_given(paper):
    config = load(PAPER, ["throughput.training_cost.spire=0"])
    costs = figure_inputs.training_costs(config, {"spire": 3.4, "vanilla": 2.6, "magicdec": 3.9})
    assert costs["magicdec"] == 0
    # The target's own forward pass for every batch is in it: more than the draft alone.
    alone = 1.0 * config.draft("spire").steps / config.train.steps * 0.25
    assert alone < costs["spire"] < 0.6
    assert 0.02 < costs["vanilla"] < 0.15
    assert paper[1].training["spire"] == 0.25


def test_the_grid_takes_less_than_a_second(paper):
    config, given = paper
    begin = time.process_time()  # of this process: whatever else the machine does
    for variant in VARIANTS:
        throughput.grid(config, given.tau, variant=variant)
    assert time.process_time() - begin < 1


def own_run(folder: pathlib.Path, **over) -> pathlib.Path:
    """The files that figures read of a finished run."""
    config = load("configs/quickstart.py")
    taus = {"autoregressive": 1.0, "spire": 3.5, "vanilla": 3.0}
    methods = {name: {"tau": tau, "by_context": {
        "48": {"tau": tau, "tau_ci95": None}, "184": {"tau": tau, "tau_ci95": [tau - 0.1, tau]}}}
        for name, tau in taus.items()}  # fmt: skip
    summary = {"methods": methods, "context_length": 184, "assumptions": {"k": config.decode.k},
               "made_with": made_with(config)} | over  # fmt: skip
    rows = {f"spire-{n}": {"tau": 3.0, "tau_ci95": [2.9, 3.1]} for n in ABLATIONS}
    rows["spire"] = {"tau": 3.5, "tau_ci95": [3.4, 3.6], "acceptance_by_depth": [0.9, 0.8]}
    study = {"of": "spire", "k": 4, "context_length": 96, "methods": rows,
             "by_k": {"spire": [1.9, 2.7]}}  # fmt: skip
    for name, content in (("report/summary.json", summary), ("study/study.json", study)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def test_the_command_draws_ones_own(tmp_path, capsys):
    workdir, out = own_run(tmp_path / "run"), tmp_path / "figures"
    given = ["--config=configs/quickstart.py", f"--workdir={workdir}", f"--out={out}"]
    assert figures.main(given) == 0
    assert {p.stem for p in out.glob("*.png")} == ALWAYS | {"tau_over_k", "acceptance_by_depth",
                                                           "tau_over_context"}  # fmt: skip
    assert all(2_000 < p.stat().st_size < 400_000 for p in out.iterdir())


def test_ones_own_stands_beside_the_papers(tmp_path):
    config = load("configs/quickstart.py")
    given = figure_inputs.own_inputs(config, own_run(tmp_path))
    drawn = dict(figures.figures(figure_inputs.with_ablations(config), given))
    here, paper = drawn["tau_over_context"].axes
    assert list(here.lines[0].get_xdata()) == [48, 184]
    table = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in paper.lines}
    assert table == {"spire": {256: 3.427, 512: 3.401, 960: 3.382},
                     "vanilla": {256: 2.637, 512: 2.647, 960: 2.644}}  # fmt: skip
    ticks = [line.get_xdata()[0] for line in drawn["ablations"].axes[0].lines
             if line.get_marker() == "|"]  # fmt: skip
    assert 3.401 in ticks and 2.959 in ticks and len(ticks) == 7


def test_what_cannot_be_drawn_is_named(tmp_path, capsys):
    other = own_run(tmp_path / "other")
    for arguments, message in (
        (["--config=configs/quickstart.py"], "gives no acceptance length"),
        (["--config=configs/quickstart.py", f"--workdir={tmp_path}"], "has no report"),
        (
            ["--config=configs/quickstart.py", f"--workdir={other}", "--config.decode.k=3"],
            "of another config: it was made with decode.k=4 (now 3)",
        ),
        (
            [
                f"--config={PAPER}",
                "--config.study.of=vanilla",
                "--config.study.ablations=",
                "--config.study.trained_k=",
                "--config.study.seeds=1",
            ],
            "takes away what the draft of study.of does not have",
        ),
    ):
        with pytest.raises(SystemExit) as status:
            figures.main([*arguments, f"--out={tmp_path / 'out'}"])
        assert status.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""The choice of a draft for a traffic: acceptance by context, ragged batches, mixes, policies."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from report_files import experiment, reported

from launch import draft_tables
from spire_jax.config import files
from spire_jax.config.schema import AUTOREGRESSIVE, ConfigError
from spire_jax.config.values import to_dict
from spire_jax.costs import throughput
from spire_jax.costs.acceptance import Acceptance, at_context, shares
from spire_jax.costs.chips import CHIPS
from spire_jax.results import choose as command
from spire_jax.results.choice import choose, offers, who_wins
from spire_jax.results.mix import LENGTHS, Cell, read_mix

CHIP = CHIPS["v6e"]
MEASURED = (48, 96, 184)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run whose drafts are accepted alike, whatever the context."""
    folder = reported(tmp_path_factory.mktemp("work"))
    (folder / "config.json").write_text(json.dumps(to_dict(experiment())))
    return folder


def acceptance(*taus: float, slope: float = 0.0) -> Acceptance:
    """tau by depth, which falls with every measured context by `slope`."""
    rows = np.array([[1 + (t - 1) * (1 - slope * i) for t in taus] for i in range(3)])
    return Acceptance(MEASURED, rows[None])


# By depth 1 .. 4: spire's chain stays good, vanilla's does not, magicdec's is nearly the target.
TAUS = {
    "spire": acceptance(1.8, 2.4, 2.9, 3.3, slope=0.1),
    "vanilla": acceptance(1.6, 1.9, 2.0, 2.1),
    "magicdec": acceptance(1.9, 2.7, 3.5, 4.2, slope=0.05),
}


# --- acceptance by context -----------------------------------------------------------------------


def test_acceptance_between_contexts():
    np.testing.assert_allclose(shares(MEASURED, [48, 184]), [0.5, 0, 0.5], atol=1e-12)
    np.testing.assert_allclose(shares(MEASURED, [1, 10_000]), [0.5, 0, 0.5], atol=1e-12)
    middle = (96 * 184) ** 0.5  # of the logarithms
    np.testing.assert_allclose(shares(MEASURED, [middle]), [0, 0.5, 0.5], atol=1e-12)
    assert at_context({184: 3.0, 96: 2.0}, middle) == pytest.approx(2.5)
    assert at_context(2.5, 7) == 2.5
    # A batch's tau is its rows' mean, not tau at the mean context.
    ragged = TAUS["spire"].at(4, [48, 10_000])[0]
    assert ragged == pytest.approx(np.mean([3.3, 1 + 2.3 * 0.8]))
    assert ragged != pytest.approx(TAUS["spire"].at(4, [np.mean([48, 10_000])])[0], abs=0.1)


def test_acceptance_is_scaled_to_a_tau():
    of = TAUS["magicdec"]
    scaled = of.raised(of.exponents_for(3.0, 4))
    np.testing.assert_allclose(scaled.tau[0, :, 3], 3.0)
    for tau, survival in zip(scaled.tau[0], scaled.survival()[0], strict=True):
        assert tau[0] == pytest.approx(1 + survival[0]) and np.all(np.diff(survival) < 0)
    with pytest.raises(ConfigError, match="between 1 and k \\+ 1 = 5"):
        of.exponents_for(5.0, 4)


# --- cost ----------------------------------------------------------------------------------------


def test_a_ragged_batch_costs_the_sum_of_its_lengths():
    config = experiment()
    same, ragged = (
        {name: (throughput.round_cost(config, name, batch=64, context=context, variant="with_head"),
                throughput.memory_bytes(config, name, batch=64, context=context))
         for name in TAUS}
        for context in (416, [32, 800])
    )  # fmt: skip
    for name in TAUS:
        cost, memory = same[name]
        its, its_memory = ragged[name]
        assert its.target_step == pytest.approx(cost.target_step, rel=1e-12)
        assert its.verification == pytest.approx(cost.verification, rel=1e-12)
        assert its_memory <= memory * (1 + 1e-12)
    # A dense draft reads the sum, a window no more than it has: of 31 tokens those.
    assert ragged["vanilla"][0].draft_step == pytest.approx(same["vanilla"][0].draft_step)
    short = throughput.round_cost(config, "spire", batch=64, context=[8, 800], variant="with_head")
    ends = [throughput.round_cost(config, "spire", batch=64, context=n, variant="with_head")
            for n in (8, 800)]  # fmt: skip
    assert short.draft_step == pytest.approx(np.mean([e.draft_step for e in ends]))
    assert short.draft_step < ends[1].draft_step


def test_a_pass_costs_its_launch():
    free = experiment()
    at = dataclasses.replace(free.throughput, launch_us=50.0, compute_bytes=2.0)
    paid = dataclasses.replace(free, throughput=at)
    for method, passes in ((AUTOREGRESSIVE, 0), ("spire", 4)):
        cost, more = (
            throughput.round_cost(c, method, batch=8, context=512, hoi=CHIP) for c in (
                dataclasses.replace(paid, throughput=dataclasses.replace(at, launch_us=0.0)), paid)
        )  # fmt: skip
        launch = 50e-6 * CHIP.peak(2)
        assert more.total == pytest.approx(cost.total + (passes + 1) * launch)
        assert more.target_step == pytest.approx(cost.target_step + launch)
    with pytest.raises(ConfigError, match=r"throughput\.launch_us"):
        files.build({"throughput": {"launch_us": -1.0}})


# --- the choice ----------------------------------------------------------------------------------


def cells() -> tuple[Cell, ...]:
    return (Cell(0.5, 1, (64.0,), "alone"), Cell(0.3, 64, (64.0, 4096.0), "ragged"),
            Cell(0.2, 256, (100.0,), "short"))  # fmt: skip


def test_the_policies_are_the_best_of_their_kind():
    config, mix = experiment(), cells()
    found = choose(config, TAUS, mix, CHIP, baseline="spire", variant="with_head")
    offered = [offers(config, TAUS, cell, CHIP, variant="with_head") for cell in mix]

    def whole(chosen) -> float:
        return 1 / sum(c.share / o.rate[0] for c, o in zip(mix, chosen, strict=True))

    every = list(itertools.product(*offered))  # 13 choices in each of three cells
    alike = {
        "any draft": lambda chosen: True,
        "one draft's weights": lambda chosen: len({c.method for c in chosen}) == 1,
        "one method": lambda chosen: len({c.method for c in chosen}) == 1,
        "one method, one depth": lambda chosen: len({(c.method, c.k) for c in chosen}) == 1,
    }
    for name, good in alike.items():
        most = max(whole(chosen) for chosen in every if good(chosen))
        assert found["policies"][name]["tokens_per_s"] == pytest.approx(most), name
    rates = [p["tokens_per_s"] for p in found["policies"].values()]
    assert rates[0] > rates[2] > rates[3]  # in this mix each freedom brings something
    over = found["policies"]["any draft"]["over"]["spire, k = 4"]
    assert over["ratio"] == pytest.approx(rates[0] / rates[-1]) and over["ci95"] is None


def test_what_does_not_fit_is_not_chosen():
    config, cell = experiment(), Cell(1.0, 64, (512.0,), "all")
    of = {c.method: c.memory_bytes for c in offers(config, TAUS, cell, CHIP)}
    between = (of[AUTOREGRESSIVE] + of["spire"]) / 2
    small = dataclasses.replace(CHIP, hbm_bytes=between)
    found = choose(config, TAUS, [cell], small, baseline="spire", reserve=0.0)
    assert found["policies"]["any draft"]["choices"] == [{"method": AUTOREGRESSIVE, "k": 0}]
    assert set(found["cells"][0]["do_not_fit"]) == {"spire", "vanilla", "magicdec"}
    assert "spire, k = 4" not in found["policies"]
    with pytest.raises(ConfigError, match="nothing fits in the cell all"):
        choose(config, TAUS, [cell], small, baseline="spire", reserve=0.5)


def test_who_wins():
    config = experiment()
    for row in who_wins(config, TAUS, CHIP, baseline="spire", variant="per_operator"):
        for cell in row:
            where = dict(batch=cell["batch"], context=cell["context"], hoi=CHIP,
                         variant="per_operator")  # fmt: skip
            gains = {
                name: max(throughput.multiplier(config, name, tau=of.at(k, [cell["context"]])[0],
                                                k=k, **where) for k in range(1, 5))
                for name, of in TAUS.items()
            } | {AUTOREGRESSIVE: 1.0}  # fmt: skip
            first, second = sorted(gains, key=lambda name: -gains[name])[:2]
            assert (cell["method"], cell["second"]) == (first, second)
            assert cell["gain"] == pytest.approx(gains[first])
            base = throughput.multiplier(config, "spire", k=4, **where,
                                         tau=TAUS["spire"].at(4, [cell["context"]])[0])  # fmt: skip
            assert cell["over_baseline"] == pytest.approx(gains[first] / base)
            assert cell["margin"] == pytest.approx(gains[first] / gains[second] - 1)
            assert cell["extrapolated"] == (not 48 <= cell["context"] <= 184)


# --- mixes ---------------------------------------------------------------------------------------


def written(folder, *values, **whole):
    path = folder / "mix.json"
    path.write_text(json.dumps({"cells": list(values)} | whole))
    return path


def test_spreads_of_lengths(tmp_path):
    (tmp_path / "lengths.jsonl").write_text(
        "\n".join(["100", '{"tokens": 300, "id": 7}', ""] + ["200"] * 500)
    )
    mix = read_mix(written(
        tmp_path,
        {"share": 0.2, "batch": 4, "context": 512},
        {"share": 0.2, "batch": 4, "context": {"uniform": [100, 300]}},
        {"share": 0.2, "batch": 4, "context": {"bimodal": [100, 1000], "long": 0.25}},
        {"share": 0.2, "batch": 4, "context": {"zipf": [10, 1000], "exponent": 2}},
        {"share": 0.2, "batch": 4, "context": {"requests": "lengths.jsonl"}, "name": "logged"},
    ))  # fmt: skip
    one, uniform, bimodal, zipf, real = (np.array(cell.contexts) for cell in mix)
    assert one.tolist() == [512.0] and mix[4].name == "logged"
    assert len(uniform) == LENGTHS and uniform.mean() == pytest.approx(200)
    assert np.mean(bimodal > 500) == 0.25 and bimodal.mean() == pytest.approx(325)
    # Density in proportion to 1 / x^2 between 10 and 1000: the mean is ln(100) / (1/10 - 1/1000).
    assert zipf.mean() == pytest.approx(np.log(100) / (0.1 - 0.001), rel=0.01)
    assert real.mean() == pytest.approx((400 + 500 * 200) / 502) and real.min() < 200 < real.max()


BAD = {
    "shares of its 2 cells sum to 0.9": [{"share": 0.5, "batch": 1, "context": 9},
                                         {"share": 0.4, "batch": 1, "context": 9}],
    "shares of its 0 cells sum to 0": [],
    "cell 1: share='all' must lie in": [{"share": "all", "batch": 1, "context": 9}],
    "cell 1: batch=0 must be": [{"share": 1, "batch": 0, "context": 9}],
    "cell 1 has no 'context'": [{"share": 1, "batch": 1}],
    "cell 1: context=0 must be 1 or more": [{"share": 1, "batch": 1, "context": 0}],
    "cell 1 has a context of 2048 tokens, but target.max_len=1024": [
        {"share": 1, "batch": 1, "context": {"uniform": [1, 2048]}}],
    "must be a number of tokens, or an object with one of": [
        {"share": 1, "batch": 1, "context": {"normal": [1, 2]}}],
    "context.uniform=\\[9, 1\\] must be the shortest and the longest": [
        {"share": 1, "batch": 1, "context": {"uniform": [9, 1]}}],
    "context.long=1.5 must be": [
        {"share": 1, "batch": 1, "context": {"bimodal": [1, 9], "long": 1.5}}],
    "context.exponent": [{"share": 1, "batch": 1, "context": {"uniform": [1, 9], "exponent": 1}}],
    "cell 1: shares": [{"shares": 1, "batch": 1, "context": 9}],
    "none.jsonl cannot be read": [
        {"share": 1, "batch": 1, "context": {"requests": "none.jsonl"}}],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_mixes_are_named(tmp_path, message):
    with pytest.raises(ConfigError, match=message):
        read_mix(written(tmp_path, *BAD[message]), 1024)


def test_files_that_are_no_mix(tmp_path):
    path = tmp_path / "mix.json"
    for text, message in (("{", "cannot be read as JSON"), ("[1]", "has no list of cells")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_mix(path)
    (tmp_path / "lengths.jsonl").write_text("12\nmany\n")
    path = written(tmp_path, {"share": 1, "batch": 1, "context": {"requests": "lengths.jsonl"}})
    with pytest.raises(ConfigError, match="line 2: 'many' is no number of tokens"):
        read_mix(path)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_reads_a_run_and_a_mix(workdir, tmp_path, capsys):
    mix = written(tmp_path, {"share": 0.5, "batch": 64, "context": {"uniform": [32, 4096]}},
                  {"share": 0.5, "batch": 1, "context": 64})  # fmt: skip
    given = [f"--workdir={workdir}", "--chip=v6e", f"--mix={mix}"]
    assert command.main([*given, f"--out={tmp_path / 'out'}"]) == 0
    shown = capsys.readouterr().out
    for words in ("the fastest on one v6e", "the mix", "64 x uniform 32 to 4096", "any draft",
                  "measured at contexts [48, 96, 184]"):  # fmt: skip
        assert words in shown
    found = json.loads((tmp_path / "out" / "choice.json").read_text())
    assert (tmp_path / "out" / "choice.png").stat().st_size > 10_000
    policies = found["mix"]["policies"]
    low, high = policies["any draft"]["over"]["spire, k = 4"]["ci95"]
    assert 0.5 < low <= policies["any draft"]["over"]["spire, k = 4"]["ratio"] <= high < 5
    assert command.main([*given, "--format=json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert command.main([*given, "--methods=vanilla", "--format=json"]) == 0
    some = json.loads(capsys.readouterr().out)
    assert {m["method"] for m in some["mix"]["cells"][0]["methods"]} == {
        AUTOREGRESSIVE, "vanilla"}  # fmt: skip
    assert "spire, k = 4" in some["mix"]["policies"]
    # On other sizes, with acceptances as if the baseline had the paper's.
    assert command.main([*given, "--sizes=configs/paper_67m.py", "--tau=3.4", "--format=json"]) == 0
    of_paper = json.loads(capsys.readouterr().out)
    spire = next(m for m in of_paper["mix"]["cells"][0]["methods"] if m["method"] == "spire")
    assert spire["tau"] == pytest.approx(3.4) or spire["k"] != 4
    assert of_paper["who_wins"] != found["who_wins"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--chip=v9"], "v9"),
        (["--baseline=nobody"], "no draft named 'nobody'"),
        (["--reserve=1"], "--reserve=1"),
        (["--tau=9"], "cannot be scaled to tau=9"),
        (["--config.drafts.spire.window=16"], "is of another config"),
    ],
)
def test_what_the_command_refuses(workdir, more, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([f"--workdir={workdir}", *more])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_runs_own_config_names_no_code(tmp_path, capsys):
    values = to_dict(experiment()) | {"plugins": ["os"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(SystemExit):
        command.main([f"--workdir={tmp_path}"])
    assert "names code (plugins: ['os'])" in capsys.readouterr().err


def test_choosing_needs_no_jax():
    script = ("import sys; from spire_jax.results import choice, mix; "
              "sys.exit('jax' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_tables_of_a_run(workdir, capsys):
    given = [f"--workdir={workdir}", "--ks=2,4", "--family=spire", "--pairs=spire:vanilla"]
    draft_tables.main(given)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    methods = json.loads((workdir / "report" / "summary.json").read_text())["methods"]
    row, acceptance = [r for r in rows if r[0] == "| spire"]
    assert row[1].startswith(f"{methods['spire']['by_context']['48']['tau_by_k']['2']:.3f} [")
    assert row[6].startswith(f"{methods['spire']['tau']:.3f} [")
    assert 0.5 < float(acceptance[1]) < 0.99
    (apart,) = [r for r in rows if r[0] == "| spire less vanilla"]
    pair = methods["spire"]["tau"] - methods["vanilla"]["tau"]
    assert float(apart[6].split(" ")[0]) == pytest.approx(pair, abs=6e-4)
    # Against itself the family of one gains what its depth does.
    gains = [r for r in rows if r[0] == "| as found" and r[1] == "with_head"]
    assert [r[2] for r in gains] == ["32", "512", "4096"] and all(
        float(r[6].removesuffix(" |")) >= 1 for r in gains)  # fmt: skip
    with pytest.raises(SystemExit):
        draft_tables.main([*given, "--ks=9"])
    assert "the run's oracle went to 4" in capsys.readouterr().err

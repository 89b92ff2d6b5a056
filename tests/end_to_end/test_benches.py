"""The commands that measure a finished run: decoding against the clock, tau by training tokens."""

import argparse
import json
import pathlib
import shutil

import numpy as np
import pipelines
import pytest

from launch.bench import decode as bench_decode
from launch.bench import mesh as bench_mesh
from launch.bench import mix as bench_mix
from launch.bench import tau_by_tokens
from launch.bench.decode import Point, add, record_of, room_for, rounds_of
from launch.bench.mesh import parse_meshes
from spire_jax.config.files import load
from spire_jax.config.schema import ConfigError
from spire_jax.costs.throughput import multiplier, round_cost
from spire_jax.results.mix import Cell

RATES = {"bytes_per_s": 2e10, "flops_per_s": 1e11}
QUICKSTART = "configs/quickstart.py"


@pytest.fixture(scope="module")
def measured(finished, corpus, tmp_path_factory):
    """What both commands leave behind, run as they are typed."""
    folder = tmp_path_factory.mktemp("benches")
    workdir = shutil.copytree(finished, folder / "run")
    flags = pipelines.arguments(corpus, workdir)
    # Drafts that are not trained may join later.
    selecting = [f"--config.drafts.select.{option}"
                 for option in ("kind=snapkv", "budget=6", "observed=2")]  # fmt: skip
    bench_decode.main([*flags, *selecting, "--methods=spire,magicdec,select", "--batch=2",
                       "--context=8", "--tokens=4", "--repeats=2", "--k=2", "--dtype=float32",
                       f"--out={folder}"])  # fmt: skip
    tau_by_tokens.main([*flags, "--config.drafts.twin.weights_of=vanilla"])
    return (json.loads((folder / "decode.json").read_text()),
            json.loads((workdir / "tau_by_tokens.json").read_text()))  # fmt: skip


def test_every_method_is_measured_beside_autoregressive_decoding(measured):
    records = {(r["method"], r["k"]): r for r in measured[0]}
    assert set(records) == {
        ("autoregressive", 0), ("spire", 2), ("magicdec", 2), ("select", 2),
    }  # fmt: skip
    alone = records["autoregressive", 0]
    assert alone["tau"] == 1 and alone["multiplier"] == pytest.approx(1)
    for r in records.values():
        assert r["tokens_per_s"] == pytest.approx(2 * r["tau"] / r["seconds_per_round"])
        assert r["multiplier"] == pytest.approx(r["tokens_per_s"] / alone["tokens_per_s"])
        assert 1 <= r["tau"] <= 3 and r["bytes_per_s"] > 0 and r["flops_per_s"] > 0


def test_tau_is_reported_at_every_kept_checkpoint(measured):
    found = {(r["method"], r["steps"], r["context_length"]): r for r in measured[1]}
    # Checkpoints every 3 steps, the newest two kept; drafts of 12 and 8 steps.
    steps = {"spire": (0, 9, 12), "vanilla": (0, 6, 8), "twin": (0, 6, 8), "magicdec": (0,)}
    assert set(found) == {(m, s, n) for m, of in steps.items() for s in of for n in (8, 16)}
    assert found["spire", 12, 8]["tokens"] == 12 * 4 * 32
    for at in [(s, n) for s in steps["twin"] for n in (8, 16)]:  # decodes with vanilla's weights
        assert found["twin", *at] == found["vanilla", *at] | {"method": "twin"}
    assert len({found["vanilla", s, 16]["tau"][3] for s in steps["vanilla"]}) == 3


def test_the_last_checkpoint_has_the_evaluations_tau(measured, finished):
    """The same contexts and samples: the oracle's tau to the bit of its JSON."""
    lines = (finished / "eval" / "spire.jsonl").read_text().splitlines()
    oracle = [r["oracle"] for r in map(json.loads, lines) if r["context_length"] == 16]
    lengths, rounds = (np.sum([o[key] for o in oracle], axis=0)
                       for key in ("lengths_by_k", "rounds_by_k"))  # fmt: skip
    [found] = [r["tau"] for r in measured[1]
               if (r["method"], r["steps"], r["context_length"]) == ("spire", 12, 16)]  # fmt: skip
    np.testing.assert_allclose(found, lengths / rounds, rtol=1e-5)


def test_a_record_by_hand():
    config, point = load(QUICKSTART), Point("float32", 4, 128)
    counts = np.array([2, 0, 6])  # 8 rounds, 2 + 18 tokens
    record = record_of(config, point, "spire", 2, 0.5, counts, 0.25, RATES)
    assert record["tau"] == 20 / 8 and record["multiplier"] == 2.5 * 0.25 / 0.5
    at = point.config(config, 2)
    options = {"batch": 4, "context": 128, "hoi": 5.0, "variant": "with_head"}
    expected = multiplier(at, "spire", tau=2.5, **options)
    assert record["predicted_multiplier"] == pytest.approx(expected)
    assert record["share_of_prediction"] == pytest.approx(1.25 / expected)
    seconds = round_cost(at, "spire", **options).total / 1e11
    assert record["modeled_seconds_per_round"] == pytest.approx(seconds)
    assert record["share_of_bandwidth"] == pytest.approx(seconds / 0.5)
    step = record_of(config, point, "autoregressive", 0, 0.25, np.array([8]), 0.25, RATES)
    assert step["multiplier"] == step["predicted_multiplier"] == 1
    wide = round_cost(at, "spire", **options).target_step
    narrow = round_cost(Point("bfloat16", 4, 128).config(config, 2), "spire", **options).target_step
    assert wide == pytest.approx(2 * narrow), "bound by bytes: two or four each"


def test_room_is_left_for_everything_to_be_accepted():
    assert rounds_of(0, 32) == 32 and rounds_of(4, 32) == 16
    assert room_for([0, 4], 32) == 16 * 5 + 5 and room_for([0], 32) == 33


def test_points_are_added_and_replaced(tmp_path: pathlib.Path):
    place = {"dtype": "float32", "batch": 1, "context": 8, "k": 0}
    add(tmp_path, [{**place, "method": "a", "tokens_per_s": 1.0}])
    found = add(tmp_path, [{**place, "method": "a", "tokens_per_s": 2.0},
                           {**place, "method": "b", "tokens_per_s": 3.0}])  # fmt: skip
    assert [r["tokens_per_s"] for r in found] == [2.0, 3.0]
    assert json.loads((tmp_path / "decode.json").read_text()) == found


def test_unknown_methods_are_named(finished, corpus, capsys):
    flags = pipelines.arguments(corpus, finished)
    with pytest.raises(SystemExit):
        bench_decode.main([*flags, "--methods=other"])
    assert "unknown ['other']" in capsys.readouterr().err


def test_meshes_by_their_axes():
    assert parse_meshes("1; 4:data=2,tensor=2;2:fsdp=2") == [
        (1, {"data": 1}), (4, {"data": 2, "tensor": 2}), (2, {"data": 1, "fsdp": 2}),
    ]  # fmt: skip
    with pytest.raises(
        argparse.ArgumentTypeError, match="no mesh axis 'model'; there are data, fsdp, tensor"
    ):
        parse_meshes("4:model=4")


def test_a_mesh_that_does_not_fit_its_devices_ends_the_command(corpus, capfd):
    flags = pipelines.arguments(corpus, pathlib.Path("unused"))
    flags = [flag for flag in flags if not flag.startswith("--workdir")]
    with pytest.raises(SystemExit):
        bench_mesh.main([*flags, "--meshes=2:data=4", "--repeats=1"])
    assert "does not fit 2 devices" in capfd.readouterr().err


@pytest.mark.slow
def test_steps_on_two_devices_beside_one(corpus, capfd):
    flags = pipelines.arguments(corpus, pathlib.Path("unused"))
    flags = [flag for flag in flags if not flag.startswith("--workdir")]
    bench_mesh.main([*flags, "--meshes=1; 2:data=2", "--repeats=2", "--steps=2"])
    rows = [line.split("│")[1:-1] for line in capfd.readouterr().out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [(row[0], row[1]) for row in cells] == [
        (name, n) for name in ("target", "spire", "vanilla") for n in ("1", "2")
    ]
    assert all(float(row[3]) > 0 and float(row[4]) > 0 for row in cells)
    assert [row[4] for row in cells[::2]] == ["1.00"] * 3


# --- a traffic mix -------------------------------------------------------------------------------


def test_a_mix_adds_up():
    """Rates of cells make the mix's by shares of tokens; launches explain the plain step."""
    config, chip = load(QUICKSTART), bench_mix.Chip("it", {4: 1e11}, 2e10, 1e12, 1.0, 1, "made up")
    cells = [Cell(0.25, 4, (64.0, 128.0), "ragged"), Cell(0.75, 1, (64.0,), "alone")]
    alone, spire = ("autoregressive", 0), ("spire", 4)

    def of(rate, tau):
        return {"tokens_per_s": rate, "whole_tokens_per_s": rate / 2, "tau": tau}

    found = [{alone: of(400.0, 1.0), spire: of(600.0, 3.0)},
             {alone: of(100.0, 1.0), spire: of(220.0, 3.4)}]  # fmt: skip
    records = {(r["cell"], r["method"]): r
               for r in bench_mix.records_of(config, cells, found, chip, 32)}  # fmt: skip
    whole = records["the mix", "spire"]
    assert whole["tokens_per_s"] == pytest.approx(1 / (0.25 / 600 + 0.75 / 220))
    assert whole["multiplier"] == pytest.approx(
        whole["tokens_per_s"] / records["the mix", "autoregressive"]["tokens_per_s"]
    )
    for cell, methods in zip(cells, found, strict=True):
        launch = records[cell.name, "spire"]["launch_us"]
        for method in (alone, spire):
            tau = methods[method]["tau"]
            model = bench_mix.predicted(config, cell, method, tau, chip, launch, 32)
            if method == alone:
                assert model == pytest.approx(methods[alone]["tokens_per_s"])
                continue
            record = records[cell.name, "spire"]
            ratio = model / methods[alone]["tokens_per_s"]
            assert record["predicted_with_launch"] == pytest.approx(ratio)
            assert record["predicted"] > 1 and record["predicted"] != pytest.approx(ratio)
    with pytest.raises(ConfigError, match="no draft with its depth"):
        bench_mix.methods_of("spire", config)


@pytest.mark.slow
def test_a_mix_is_served_and_modeled(finished, corpus, tmp_path):
    mix = tmp_path / "mix.json"
    mix.write_text(json.dumps({"cells": [
        {"share": 0.5, "batch": 2, "context": {"uniform": [4, 16]}},
        {"share": 0.5, "batch": 1, "context": 8}]}))  # fmt: skip
    bench_mix.main([*pipelines.arguments(corpus, finished), f"--mix={mix}", "--tokens=6",
                    "--methods=spire:2,magicdec:3", "--repeats=1",
                    f"--out={tmp_path}"])  # fmt: skip
    records = json.loads((tmp_path / "measured.json").read_text())["records"]
    assert [(r["method"], r["k"]) for r in records] == [
        ("autoregressive", 0), ("spire", 2), ("magicdec", 3)] * 3  # fmt: skip
    assert all(r["whole_tokens_per_s"] < r["tokens_per_s"] for r in records)
    assert all(1 <= r["tau"] <= r["k"] + 1 for r in records if "tau" in r)

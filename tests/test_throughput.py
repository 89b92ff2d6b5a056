"""Modeled throughput against the paper's numbers, and the command line."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from paper_numbers import PAPER_67M, PAPER_70B, ROOT, TABLE, TAU

from spire_jax.config import files, schema
from spire_jax.costs import throughput

SIZES = [2**n for n in range(14)]


# --- the paper's numbers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "draft", "count"),
    [
        (PAPER_67M, None, 67_117_056),
        (PAPER_67M, "vanilla", 8_390_656),
        (PAPER_67M, "spire", 16_779_264),
        (PAPER_70B, None, 68_452_352_000),
        (PAPER_70B, "vanilla", 6_979_584_000),
        (PAPER_70B, "spire", 17_113_088_000),
    ],
)
def test_body_parameters_are_the_paper_s(path: str, draft: str | None, count: int) -> None:
    loaded = files.load(path)
    model = loaded.target
    if draft:
        model = loaded.draft(draft).model(model)
    assert model.body_parameters() == count


@pytest.mark.parametrize(("variant", "context"), TABLE)
def test_the_four_variants(pair: schema.ExperimentConfig, variant: str, context: int) -> None:
    found = tuple(
        round(throughput.multiplier(pair, method, tau=tau, batch=64, context=context,
                                    variant=variant), 2)
        for method, tau in TAU.items()
    )  # fmt: skip
    assert found == TABLE[variant, context]


def test_llama3_70b_at_its_headline_point(llama: schema.ExperimentConfig) -> None:
    def at(method: str) -> float:
        value = throughput.multiplier(llama, method, tau=TAU[method], batch=64, context=65536)
        return round(value, 2)

    assert (at("magicdec"), at("spire")) == (2.14, 2.82)


def test_round_times_over_an_autoregressive_step(pair: schema.ExperimentConfig) -> None:
    def delta_t(method: str, context: int) -> float:
        cost = throughput.round_cost(pair, method, batch=64, context=context)
        return round(cost.delta_t, 2)

    assert [delta_t("spire", 512), delta_t("magicdec", 512)] == [1.22, 1.90]
    assert [delta_t("spire", 4096), delta_t("magicdec", 4096)] == [1.14, 1.55]


def test_magicdec_overtakes_spire_between_2048_and_4096_with_a_fixed_window(
    pair: schema.ExperimentConfig,
) -> None:
    grid = throughput.grid(pair, TAU, batch_sizes=[64], variant="fixed_window")
    ahead = [n for n in SIZES[5:] if grid["magicdec"][64][n] > grid["spire"][64][n]]
    assert ahead == [4096, 8192]


def test_the_metric_summed_over_64_generated_tokens(pair: schema.ExperimentConfig) -> None:
    found = [
        round(throughput.multiplier_over_generation(pair, m, tau=tau, batch=64, context=512), 2)
        for m, tau in TAU.items()
    ]
    assert found == [1.31, 2.04, 2.78]


def test_generation_of_one_token_costs_one_whole_round(pair: schema.ExperimentConfig) -> None:
    found = throughput.multiplier_over_generation(
        pair, "spire", tau=3.4, batch=64, context=512, tokens=1
    )
    assert found == pytest.approx(
        1 / throughput.round_cost(pair, "spire", batch=64, context=512).delta_t
    )


def test_critical_contexts(pair: schema.ExperimentConfig, llama: schema.ExperimentConfig) -> None:
    assert throughput.critical_context(pair) == 32
    assert throughput.critical_context(llama) == 4096
    assert throughput.critical_context(pair, k=5) == 64  # k + 1 verified tokens would give 64
    assert throughput.critical_context(pair, hoi=1e9) == 0


@pytest.mark.parametrize("verified", [2, 4, 7])
def test_critical_context_agrees_with_the_costs(
    pair: schema.ExperimentConfig, verified: int
) -> None:
    """The pass over so many tokens is compute-bound at L_crit for a huge batch, not at twice."""

    def compute_bound(context: int) -> bool:
        at: dict[str, Any] = {"batch": 2**30, "context": context, "k": verified - 1}
        cost = throughput.round_cost(pair, "vanilla", **at).verification
        return cost == 2 * pair.target.body_parameters() * 2**30 * verified

    found = throughput.critical_context(pair, k=verified)
    assert compute_bound(found)
    assert not compute_bound(2 * found)


def test_paper_config_trains_on_20_tokens_per_parameter(pair: schema.ExperimentConfig) -> None:
    trained = [(pair.target, pair.train.steps)]
    trained += [(draft.model(pair.target), draft.steps) for draft in pair.trained.values()]
    for model, steps in trained:
        parameters = model.body_parameters() + model.d_model * (2 * model.vocab_size + 1)
        tokens = steps * pair.train.batch_size * pair.train.seq_len
        assert tokens / parameters == pytest.approx(20, rel=1e-3)


# --- properties --------------------------------------------------------------------------------


def test_autoregressive_decoding_is_the_unit(pair: schema.ExperimentConfig) -> None:
    for variant in throughput.VARIANTS:
        cost = throughput.round_cost(pair, "autoregressive", batch=8, context=100, variant=variant)
        assert cost.delta_t == 1
        assert cost.total == cost.target_step
    at: dict[str, Any] = {"tau": 1.0, "batch": 8, "context": 100}
    assert throughput.multiplier(pair, "autoregressive", **at) == 1
    assert throughput.multiplier_over_generation(pair, "autoregressive", **at) == 1


def test_a_round_grows_with_k_and_its_gain_with_tau(pair: schema.ExperimentConfig) -> None:
    for method in TAU:
        times = [
            throughput.round_cost(pair, method, batch=64, context=512, k=k).delta_t
            for k in (1, 2, 4, 8)
        ]
        assert times == sorted(times)
        assert times[0] > 1
        one = throughput.multiplier(pair, method, tau=1.5, batch=64, context=512)
        two = throughput.multiplier(pair, method, tau=3.0, batch=64, context=512)
        assert two == pytest.approx(2 * one)


def test_a_windowed_target_reads_its_window(pair: schema.ExperimentConfig) -> None:
    target = dataclasses.replace(pair.target, window=60, sink=4)
    windowed = dataclasses.replace(pair, target=target)
    cost = throughput.round_cost(windowed, "spire", batch=64, context=4096)
    assert (
        cost.target_step == throughput.round_cost(pair, "spire", batch=64, context=64).target_step
    )
    with pytest.raises(schema.ConfigError, match=r"target\.window"):
        throughput.critical_context(windowed)


def test_tokens_per_second_are_the_multiplier_times_autoregressive_ones(
    pair: schema.ExperimentConfig,
) -> None:
    at: dict[str, Any] = {"batch": 64, "context": 512}
    for chip in throughput.CHIPS.values():
        base = throughput.tokens_per_s_per_chip(pair, "autoregressive", tau=1.0, chip=chip, **at)
        fast = throughput.tokens_per_s_per_chip(pair, "spire", tau=3.4, chip=chip.name, **at)
        gain = throughput.multiplier(pair, "spire", tau=3.4, hoi=chip.hoi(1), **at)
        assert fast / base == pytest.approx(gain)


def test_memory_bound_steps_take_the_time_of_their_bytes(pair: schema.ExperimentConfig) -> None:
    """On an H100: 67,117,056 weights and 64 caches of 512 x 16,384 elements at 3.35 TB/s."""
    at: dict[str, Any] = {"tau": 1.0, "batch": 64, "context": 512, "chip": "h100"}
    seconds = (67_117_056 + 64 * 512 * 16_384) / 3.35e12
    rate = throughput.tokens_per_s_per_chip(pair, "autoregressive", **at)
    assert rate == pytest.approx(64 / seconds)
    wide = dataclasses.replace(
        pair, throughput=dataclasses.replace(pair.throughput, weight_bytes=2.0, cache_bytes=2.0,
                                             compute_bytes=2.0),
    )  # fmt: skip
    assert throughput.tokens_per_s_per_chip(wide, "autoregressive", **at) == pytest.approx(rate / 2)


def test_compute_bound_steps_take_the_time_of_their_flops(pair: schema.ExperimentConfig) -> None:
    wide = dataclasses.replace(
        pair, throughput=dataclasses.replace(pair.throughput, compute_bytes=2.0)
    )
    rate = throughput.tokens_per_s_per_chip(
        wide, "autoregressive", tau=1.0, batch=100_000, context=1, chip="v5p"
    )
    assert rate == pytest.approx(459e12 / (2 * 67_117_056))


def test_memory_counts_weights_embeddings_and_caches(pair: schema.ExperimentConfig) -> None:
    target = 67_117_056 + 2 * 512 * 50264 + 64 * 512 * 16_384
    at: dict[str, Any] = {"batch": 64, "context": 512}
    assert throughput.memory_bytes(pair, "autoregressive", **at) == target
    # A ring has room for the sink, the window and the four drafted tokens.
    ring = 64 * (1 + 64 + 4)
    assert throughput.memory_bytes(pair, "magicdec", **at) == target + ring * 16_384
    draft = 16_779_264 + 2 * 512 * 50264 + ring * 4096
    assert throughput.memory_bytes(pair, "spire", **at) == target + draft


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("medusa", {}, "no draft named 'medusa'"),
        ("spire", {"tau": 5.1}, "between 1 and k \\+ 1 = 5"),
        ("spire", {"tau": 0.5}, "between 1 and k \\+ 1 = 5"),
        ("autoregressive", {"tau": 2.0}, "between 1 and k \\+ 1 = 1"),
        ("spire", {"batch": 0}, "batch=0 must be above 0"),
        ("spire", {"context": 0}, "context=0 must be above 0"),
        ("spire", {"k": 0}, "k=0 must be above 0"),
        ("spire", {"hoi": -1.0}, "hoi=-1.0 must be above 0"),
        ("spire", {"variant": "papers"}, "choose from \\['paper', 'fixed_window'"),
    ],
)
def test_bad_input_is_named(
    pair: schema.ExperimentConfig, method: str, values: dict[str, Any], message: str
) -> None:
    at: dict[str, Any] = {"tau": 2.0, "batch": 1, "context": 8}
    with pytest.raises(schema.ConfigError, match=message):
        throughput.multiplier(pair, method, **(at | values))


# --- command line ------------------------------------------------------------------------------


def test_json_of_the_whole_grid(
    pair: schema.ExperimentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    throughput.main([f"--config={PAPER_67M}", "--format=json"])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["vanilla", "magicdec", "spire"]
    for method, tau in TAU.items():
        assert list(found[method]) == [str(n) for n in SIZES[:8]]  # B = 1 .. 128
        for batch, row in found[method].items():
            assert list(row) == [str(n) for n in SIZES[5:]]  # L = 32 .. 8192
            for context, value in row.items():
                assert value == throughput.multiplier(
                    pair, method, tau=tau, batch=int(batch), context=int(context), variant="paper"
                )
    assert round(found["spire"]["64"]["512"], 2) == 2.78


def test_the_module_runs_as_documented() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spire_jax.throughput", "--config=configs/paper_67m.py",
         "--config.throughput.hoi=300", "--format=json"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    expected = throughput.multiplier(
        files.load(PAPER_67M), "spire", tau=3.401, batch=64, context=512, hoi=300.0
    )
    assert json.loads(done.stdout)["spire"]["64"]["512"] == expected


def test_tables_show_every_chip_and_variant(capsys: pytest.CaptureFixture[str]) -> None:
    throughput.main([f"--config={PAPER_67M}"])
    shown = capsys.readouterr().out
    for word in (*throughput.CHIPS, *throughput.VARIANTS, *TAU, "2.78", "Modeled, not measured"):
        assert word in shown
    assert "354,974 " in shown  # tokens/s of an H100 without speculation fit its memory
    throughput.main([f"--config={PAPER_70B}"])
    assert "284*" in capsys.readouterr().out  # the 70B model's do not


def test_documented_output_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The tables in the configs' docstrings, cell by cell."""
    for path in (PAPER_67M, PAPER_70B):
        spec = importlib.util.spec_from_file_location("documented", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        throughput.main([f"--config={path}"])
        printed = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
        rows = [line.split() for line in (module.__doc__ or "").splitlines() if " paper  " in line]
        assert len(rows) == 3
        for row in rows:
            assert row in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.throughput.hoy=1"], "error: unknown config key 'throughput.hoy'; did you"),
        (["--config.throughput.hoi=fast"], "error: throughput.hoi='fast' should be float"),
        (["--config.throughput.hoi=0"], "error: throughput.hoi=0.0 must be above 0"),
        (["--config.throughput.hoi"], "set as --config.throughput.hoi=value"),
        (["--hoi=300"], "error: unknown argument '--hoi=300'; config values are set as --config."),
        (["300"], "error: unknown argument '300'"),
        (["--config.throughput.variant=papers"], "error: throughput.variant='papers'; choose from"),
        (["--config.throughput.compute_bytes=4"], "use 1 (FP8, INT8) or 2 (bf16)"),
        (["--config.throughput.batch_sizes="], "error: throughput.batch_sizes is empty"),
        (["--config.throughput.context_lengths=0,8"], "(0, 8) must all be 1 or more"),
        (["--config.throughput.tau.spire=5.5"], "error: throughput.tau.spire=5.5 must lie between"),
        (["--config.drafts.magicdec.window=0"], "magicdec.window=0 must be above 0"),
        (["--config.drafts.magicdec.sink=-1"], "magicdec.sink=-1 is negative"),
    ],
)
def test_bad_command_lines(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        throughput.main([f"--config={PAPER_67M}", *arguments])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.out == ""


def test_configs_without_acceptance_lengths_say_so(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(text: str) -> str:
        path = tmp_path / "some.py"
        path.write_text(f"def get_config():\n    return {text}\n", encoding="utf-8")
        with pytest.raises(SystemExit) as ended:
            throughput.main([f"--config={path}"])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "set throughput.tau.NAME of a draft in []" in error("{}")
    assert "no draft named 'spire'" in error("{'throughput': {'tau': {'spire': 2.0}}}")


def test_a_missing_config_file_is_an_error_without_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spire_jax.throughput", "--config=configs/none.py"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: config file configs/none.py does not exist")
    assert len(done.stderr.splitlines()) == 1

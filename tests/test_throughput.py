"""The cost model against the paper's numbers, the chips, and the command line."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import types
from typing import Any

import pytest

from spire_jax import chips, config, config_files, cost_model, throughput

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAPER_67M = str(ROOT / "configs/paper_67m.py")
PAPER_70B = str(ROOT / "configs/paper_llama3_70b.py")
TAU = {"vanilla": 2.647, "magicdec": 3.891, "spire": 3.401}
SIZES = [2**n for n in range(14)]


@pytest.fixture(scope="module")
def pair() -> config.ExperimentConfig:
    return config_files.load(PAPER_67M)


@pytest.fixture(scope="module")
def llama() -> config.ExperimentConfig:
    return config_files.load(PAPER_70B)


# Method.md section 5: (variant, L): vanilla, MagicDec, SPIRe at B = 64.
TABLE = {
    ("paper", 32): (1.59, 1.00, 1.98),
    ("paper", 512): (1.36, 2.05, 2.78),
    ("paper", 4096): (1.33, 2.50, 2.99),
    ("fixed_window", 32): (1.59, 0.77, 1.69),
    ("fixed_window", 512): (1.36, 2.05, 2.78),
    ("fixed_window", 4096): (1.33, 3.46, 3.30),
    ("per_operator", 32): (1.55, 0.77, 1.66),
    ("per_operator", 512): (1.36, 2.04, 2.76),
    ("per_operator", 4096): (1.33, 3.46, 3.30),
    ("with_head", 32): (1.33, 0.77, 1.27),
    ("with_head", 512): (1.33, 1.91, 2.45),
    ("with_head", 4096): (1.32, 3.39, 3.22),
}


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
    loaded = config_files.load(path)
    model = loaded.target
    if draft:
        model = config.draft_model(model, loaded.draft(draft))
    assert config.body_parameters(model) == count


@pytest.mark.parametrize(("variant", "context"), TABLE)
def test_the_four_variants(pair: config.ExperimentConfig, variant: str, context: int) -> None:
    found = tuple(
        round(throughput.multiplier(pair, method, tau=tau, batch=64, context=context,
                                    variant=variant), 2)
        for method, tau in TAU.items()
    )  # fmt: skip
    assert found == TABLE[variant, context]


def test_llama3_70b_at_its_headline_point(llama: config.ExperimentConfig) -> None:
    def at(method: str) -> float:
        value = throughput.multiplier(llama, method, tau=TAU[method], batch=64, context=65536)
        return round(value, 2)

    assert (at("magicdec"), at("spire")) == (2.14, 2.82)


def test_round_times_over_an_autoregressive_step(pair: config.ExperimentConfig) -> None:
    def delta_t(method: str, context: int) -> float:
        cost = throughput.round_cost(pair, method, batch=64, context=context)
        return round(cost.delta_t, 2)

    assert [delta_t("spire", 512), delta_t("magicdec", 512)] == [1.22, 1.90]
    assert [delta_t("spire", 4096), delta_t("magicdec", 4096)] == [1.14, 1.55]


def test_magicdec_overtakes_spire_between_2048_and_4096_with_a_fixed_window(
    pair: config.ExperimentConfig,
) -> None:
    grid = throughput.grid(pair, TAU, batch_sizes=[64], variant="fixed_window")
    ahead = [n for n in SIZES[5:] if grid["magicdec"][64][n] > grid["spire"][64][n]]
    assert ahead == [4096, 8192]


def test_the_metric_summed_over_64_generated_tokens(pair: config.ExperimentConfig) -> None:
    found = [
        round(throughput.multiplier_over_generation(pair, m, tau=tau, batch=64, context=512), 2)
        for m, tau in TAU.items()
    ]
    assert found == [1.31, 2.04, 2.78]


def test_generation_of_one_token_costs_one_whole_round(pair: config.ExperimentConfig) -> None:
    found = throughput.multiplier_over_generation(
        pair, "spire", tau=3.4, batch=64, context=512, tokens=1
    )
    assert found == pytest.approx(
        1 / throughput.round_cost(pair, "spire", batch=64, context=512).delta_t
    )


def test_critical_contexts(pair: config.ExperimentConfig, llama: config.ExperimentConfig) -> None:
    assert throughput.critical_context(pair) == 32
    assert throughput.critical_context(llama) == 4096
    assert throughput.critical_context(pair, k=5) == 64  # k + 1 verified tokens would give 64
    assert throughput.critical_context(pair, hoi=1e9) == 0


@pytest.mark.parametrize("verified", [2, 4, 7])
def test_critical_context_agrees_with_the_costs(
    pair: config.ExperimentConfig, verified: int
) -> None:
    """The pass over so many tokens is compute-bound at L_crit for a huge batch, not at twice."""

    def compute_bound(context: int) -> bool:
        at: dict[str, Any] = {"batch": 2**30, "context": context, "k": verified - 1}
        cost = throughput.round_cost(pair, "vanilla", **at).verification
        return cost == 2 * config.body_parameters(pair.target) * 2**30 * verified

    found = throughput.critical_context(pair, k=verified)
    assert compute_bound(found)
    assert not compute_bound(2 * found)


def test_paper_config_trains_on_20_tokens_per_parameter(pair: config.ExperimentConfig) -> None:
    trained = [(pair.target, pair.train.steps)]
    trained += [(config.draft_model(pair.target, draft), draft.steps) for _, draft in pair.drafts]
    for model, steps in trained:
        parameters = config.body_parameters(model) + model.d_model * (2 * model.vocab_size + 1)
        tokens = steps * pair.train.batch_size * pair.train.seq_len
        assert tokens / parameters == pytest.approx(20, rel=1e-3)


# --- the formula, term by term -----------------------------------------------------------------


def _small(
    magicdec: dict[str, int] | None = None, **throughput_values: float
) -> config.ExperimentConfig:
    """Sizes so small that costs can be counted by hand."""
    full = config_files.defaults(
        {
            "target": {"n_layers": 3, "d_model": 5, "n_kv_heads": 2, "q_per_kv": 2, "d_head": 4,
                       "d_ff": 7, "n_tokens": 16},
            "drafts": {
                "spire": {"n_layers": 1, "window": 6, "sink": 2},
                "vanilla": {"kind": "vanilla", "n_layers": 1, "d_model": 3, "init": "random",
                            "window": 0, "loss": "hard"},
                "sparse": {"kind": "vanilla", "n_layers": 1, "window": 6, "sink": 2},
            },
            "decode": {"k": 3},
            "throughput": throughput_values,
            "magicdec": magicdec or {},
        }
    )  # fmt: skip
    return config_files.build(full)


# Of `_small`, by hand: body parameters, elements of a cached token, unembedding.
# Attention 5 * 4 * (2 * 4 + 2 * 2), SwiGLU 3 * 5 * 7, two norms of 5; per layer 355.
_TARGET = (3 * 355, 2 * 3 * 2 * 4, 5 * 16)
_DRAFT = (355, 2 * 2 * 4, 5 * 16)
_VANILLA = (3 * 4 * 12 + 3 * 3 * 7 + 6, 2 * 2 * 4, 3 * 16)

# (variant, draft, HOI): draft step, target step and verification at B = 10, L = 40, k = 3, with
# weights of 2 bytes and a cache of half a byte.
_BY_HAND = {
    ("paper", "spire", 1e-6): (
        2 * 10 * 355 + 2 * 10 * 16 * 5,  # compute-bound: the memory's projection shows
        2 * 10 * 1065,
        2 * 10 * 1065 * 4,
    ),
    ("paper", "sparse", 1e-6): (2 * 10 * 355, 2 * 10 * 1065, 2 * 10 * 1065 * 4),
    ("paper", "spire", 1000.0): (
        1000 * (2 * 355 + 0.5 * 10 * (2 + 5) * 16),
        1000 * (2 * 1065 + 0.5 * 10 * 40 * 48),
        1000 * (2 * 1065 + 0.5 * 10 * 40 * 48),
    ),
    ("paper", "vanilla", 1000.0): (
        1000 * (2 * _VANILLA[0] + 0.5 * 10 * 40 * 16),
        1000 * (2 * 1065 + 0.5 * 10 * 40 * 48),
        1000 * (2 * 1065 + 0.5 * 10 * 40 * 48),
    ),
    ("fixed_window", "sparse", 1000.0): (
        1000 * (2 * 355 + 0.5 * 10 * (2 + 6) * 16),
        1000 * (2 * 1065 + 0.5 * 10 * 40 * 48),
        1000 * (2 * 1065 + 0.5 * 10 * 40 * 48),
    ),
    ("per_operator", "spire", 1.0): (
        2 * 10 * 355 + 2 * 10 * 16 * 5 + 0.5 * 10 * (2 + 6) * 16,
        2 * 10 * 1065 + 0.5 * 10 * 40 * 48,
        2 * 10 * 1065 * 4 + 0.5 * 10 * 40 * 48,
    ),
    ("with_head", "vanilla", 15.0): (
        15 * (2 * _VANILLA[0] + 0.5 * 10 * 40 * 16) + 15 * 2 * 48,
        15 * (2 * 1065 + 0.5 * 10 * 40 * 48) + 15 * 2 * 80,
        2 * 10 * 1065 * 4 + 15 * 0.5 * 10 * 40 * 48 + 2 * 10 * 80 * 4,
    ),
}


@pytest.mark.parametrize(("variant", "draft", "hoi"), _BY_HAND)
def test_costs_counted_by_hand(variant: str, draft: str, hoi: float) -> None:
    small = _small(weight_bytes=2.0, cache_bytes=0.5)
    found = throughput.round_cost(small, draft, batch=10, context=40, hoi=hoi, variant=variant)
    step, target, verification = _BY_HAND[variant, draft, hoi]
    assert found.draft_step == pytest.approx(step)
    assert found.target_step == pytest.approx(target)
    assert found.verification == pytest.approx(verification)
    assert found.delta_t == pytest.approx((3 * step + verification) / target)


_MUTANTS = {
    "one token fewer verified": ("tokens=k + 1", "tokens=k"),
    "one draft step fewer": ("self.k * self.draft_step", "(self.k - 1) * self.draft_step"),
    "verification free": ("self.draft_step + self.verification", "self.draft_step"),
    "a FLOP per weight": ("flops = 2.0 * weights", "flops = 1.0 * weights"),
    "keys without values": ("return 2 * model.n_layers", "return model.n_layers"),
    "no sink": ("return self.sink + (", "return 0 + ("),
    "window of a quarter": ("context // 8", "context // 4"),
    "window beyond the context": ("min(context, self.window)", "self.window"),
    "dense draft is sparse": ("return context\n", "return context // 8\n"),
    "free memory projection": ("if memory:", "if False:"),
    "memory projected once for keys and values": (
        "flops += 2 * batch * tokens * row",
        "flops += batch * tokens * row",
    ),
    "weights of one byte": ("weights * self.weight_bytes", "weights"),
    "cache of one byte": ("row * self.cache_bytes", "row"),
    "weights read for free": ("max(flops, weight_reads + cache_reads)", "max(flops, cache_reads)"),
    "cache read for free": ("max(flops, weight_reads + cache_reads)", "max(flops, weight_reads)"),
    "no overlap": (
        "max(flops, weight_reads + cache_reads)",
        "flops + weight_reads + cache_reads",
    ),
    "per operator: weights never overlap": (
        "max(flops, weight_reads) + cache_reads",
        "flops + weight_reads + cache_reads",
    ),
    "per operator: as the paper": (
        "max(flops, weight_reads) + cache_reads",
        "max(flops, weight_reads + cache_reads)",
    ),
    "head read, never multiplied": ("max(2 * head * batch * tokens, ", "max(0, "),
    "head multiplied, never read": (
        ", head * self.weight_bytes * self.hoi)",
        ", 0)",
    ),
    "head of one token": ("2 * head * batch * tokens", "2 * head * batch"),
}


def _numbers(pair: config.ExperimentConfig) -> list[float]:
    """Everything the tests above compare."""
    numbers = [
        round(throughput.multiplier(pair, method, tau=tau, batch=64, context=context,
                                    variant=variant), 2)
        for variant, context in TABLE for method, tau in TAU.items()
    ]  # fmt: skip
    small = _small(weight_bytes=2.0, cache_bytes=0.5)
    for variant, draft, hoi in _BY_HAND:
        cost = throughput.round_cost(small, draft, batch=10, context=40, hoi=hoi, variant=variant)
        numbers += [cost.draft_step, cost.target_step, cost.verification, cost.delta_t]
    return numbers


@pytest.mark.parametrize("mutant", _MUTANTS)
def test_the_numbers_catch_a_change_of_any_term(
    mutant: str, pair: config.ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = _MUTANTS[mutant]
    assert cost_model.__file__
    source = pathlib.Path(cost_model.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    right = _numbers(pair)
    changed = types.ModuleType("changed_cost_model")
    monkeypatch.setitem(sys.modules, changed.__name__, changed)  # dataclasses look it up
    exec(compile(source.replace(old, new), mutant, "exec"), changed.__dict__)
    monkeypatch.setattr(cost_model.RoundCost, "total", changed.RoundCost.total)
    monkeypatch.setattr(cost_model.Draft, "rows", changed.Draft.rows)
    monkeypatch.setattr(cost_model.Roofline, "forward", changed.Roofline.forward)
    monkeypatch.setattr(cost_model.Roofline, "round", changed.Roofline.round)
    monkeypatch.setattr(changed, "RoundCost", cost_model.RoundCost)
    assert _numbers(pair) != pytest.approx(right, rel=1e-9)


# --- properties --------------------------------------------------------------------------------


def test_autoregressive_decoding_is_the_unit(pair: config.ExperimentConfig) -> None:
    for variant in throughput.VARIANTS:
        cost = throughput.round_cost(pair, "autoregressive", batch=8, context=100, variant=variant)
        assert cost.delta_t == 1
        assert cost.total == cost.target_step
    at: dict[str, Any] = {"tau": 1.0, "batch": 8, "context": 100}
    assert throughput.multiplier(pair, "autoregressive", **at) == 1
    assert throughput.multiplier_over_generation(pair, "autoregressive", **at) == 1


def test_a_round_grows_with_k_and_its_gain_with_tau(pair: config.ExperimentConfig) -> None:
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


def test_magicdec_with_nothing_left_out_drafts_at_the_target_s_cost() -> None:
    small = _small(magicdec={"window": 40, "sink": 0})
    cost = throughput.round_cost(small, "magicdec", batch=2, context=40, variant="fixed_window")
    assert cost.draft_step == cost.target_step


def test_a_windowed_target_reads_its_window(pair: config.ExperimentConfig) -> None:
    target = dataclasses.replace(pair.target, window=60, sink=4)
    windowed = dataclasses.replace(pair, target=target)
    cost = throughput.round_cost(windowed, "spire", batch=64, context=4096)
    assert (
        cost.target_step == throughput.round_cost(pair, "spire", batch=64, context=64).target_step
    )
    with pytest.raises(config.ConfigError, match=r"target\.window"):
        throughput.critical_context(windowed)


def test_tokens_per_second_are_the_multiplier_times_autoregressive_ones(
    pair: config.ExperimentConfig,
) -> None:
    at: dict[str, Any] = {"batch": 64, "context": 512}
    for chip in throughput.CHIPS.values():
        base = throughput.tokens_per_s_per_chip(pair, "autoregressive", tau=1.0, chip=chip, **at)
        fast = throughput.tokens_per_s_per_chip(pair, "spire", tau=3.4, chip=chip.name, **at)
        gain = throughput.multiplier(pair, "spire", tau=3.4, hoi=chip.hoi(1), **at)
        assert fast / base == pytest.approx(gain)


def test_memory_bound_steps_take_the_time_of_their_bytes(pair: config.ExperimentConfig) -> None:
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


def test_compute_bound_steps_take_the_time_of_their_flops(pair: config.ExperimentConfig) -> None:
    wide = dataclasses.replace(
        pair, throughput=dataclasses.replace(pair.throughput, compute_bytes=2.0)
    )
    rate = throughput.tokens_per_s_per_chip(
        wide, "autoregressive", tau=1.0, batch=100_000, context=1, chip="v5p"
    )
    assert rate == pytest.approx(459e12 / (2 * 67_117_056))


def test_memory_counts_weights_embeddings_and_caches(pair: config.ExperimentConfig) -> None:
    target = 67_117_056 + 2 * 512 * 50264 + 64 * 512 * 16_384
    at = {"batch": 64, "context": 512}
    assert throughput.memory_bytes(pair, "autoregressive", **at) == target
    assert throughput.memory_bytes(pair, "magicdec", **at) == target
    draft = 16_779_264 + 2 * 512 * 50264 + 64 * (1 + 64) * 4096
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
    pair: config.ExperimentConfig, method: str, values: dict[str, Any], message: str
) -> None:
    at: dict[str, Any] = {"tau": 2.0, "batch": 1, "context": 8}
    with pytest.raises(config.ConfigError, match=message):
        throughput.multiplier(pair, method, **(at | values))


# --- chips -------------------------------------------------------------------------------------


def test_the_config_knows_the_chips_and_the_variants() -> None:
    for name in chips.CHIPS:
        assert config_files.load(PAPER_67M, [f"throughput.chip={name}"]).throughput.chip == name
    for name in throughput.VARIANTS:
        assert (
            config_files.load(PAPER_67M, [f"throughput.variant={name}"]).throughput.variant == name
        )
    with pytest.raises(config.ConfigError, match=r"throughput\.chip='h300'") as of_config:
        config_files.load(PAPER_67M, ["throughput.chip=h300"])
    with pytest.raises(config.ConfigError, match=r"throughput\.chip='h300'") as of_chips:
        chips.chip("h300")
    for name in chips.CHIPS:
        assert name in str(of_config.value)
        assert name in str(of_chips.value)


def test_peaks_are_dense_and_cited() -> None:
    assert list(chips.CHIPS) == ["v5e", "v5p", "v6e", "v7x", "h100", "h200", "b200"]
    for name, chip in chips.CHIPS.items():
        assert chip.name == name
        assert chip.source
        # FP8 or INT8 runs at twice bf16 on all of them; a sparse peak would be four times.
        assert chip.peak(1) / chip.peak(2) == pytest.approx(2, rel=0.01)
        assert chip.hoi(1) == chip.peak(1) / chip.hbm_bytes_per_s
    assert chips.chip("h100").hoi(1) == pytest.approx(600, rel=0.02)  # the paper's, in FP8
    with pytest.raises(config.ConfigError, match="no peak is given for v5e"):
        chips.chip("v5e").peak(4)


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "v7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),  # another part, with other peaks
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("TPU v4", None),
        ("cpu", None),
    ],
)
def test_devices_are_recognised(device_kind: str, name: str | None) -> None:
    found = chips.device_chip(device_kind)
    assert (found.name if found else None) == name


# --- command line ------------------------------------------------------------------------------


def test_json_of_the_whole_grid_without_jax(pair: config.ExperimentConfig) -> None:
    """In a process of its own: only JSON on stdout, and neither jax nor the models imported."""
    code = (
        "import sys; from spire_jax import throughput; throughput.main(); "
        "print(*{'jax', 'flax', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"--config={PAPER_67M}", "--format=json"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stderr.strip() == ""
    found = json.loads(done.stdout)
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
    expected = throughput.multiplier(
        config_files.load(PAPER_67M), "spire", tau=3.401, batch=64, context=512, hoi=300.0
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
        (["--config.throughput.tau_spire=5.5"], "error: throughput.tau_spire=5.5 must lie between"),
        (["--config.magicdec.window=0"], "magicdec.window=0 must be above 0"),
        (["--config.magicdec.sink=-1"], "magicdec.sink=-1 is negative"),
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

    assert "set throughput.tau_vanilla" in error("{}")
    assert "no draft named 'spire'" in error("{'throughput': {'tau_spire': 2.0}}")
    assert "drafts.magicdec" in error("{'drafts': {'magicdec': {}}}")


def test_a_missing_config_file_is_an_error_without_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spire_jax.throughput", "--config=configs/none.py"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: config file configs/none.py does not exist")
    assert len(done.stderr.splitlines()) == 1

"""The cost model's formula, term by term: against costs counted by hand, and with terms changed."""

import pathlib
import sys
import types

import pytest
from paper_numbers import PAPER_67M, TABLE, TAU

from spire_jax.config import drafts, files, schema
from spire_jax.costs import roofline, throughput


@pytest.fixture(scope="module")
def pair() -> schema.ExperimentConfig:
    return files.load(PAPER_67M)


def _small(
    magicdec: dict[str, int] | None = None, **throughput_values: float
) -> schema.ExperimentConfig:
    """Sizes so small that costs can be counted by hand."""
    return files.build(
        {
            "target": {"n_layers": 3, "d_model": 5, "n_kv_heads": 2, "q_per_kv": 2, "d_head": 4,
                       "d_ff": 7, "n_tokens": 16},
            "drafts": {
                "spire": {"kind": "spire", "n_layers": 1, "window": 6, "sink": 2},
                "vanilla": {"kind": "vanilla", "n_layers": 1, "d_model": 3, "init": "random",
                            "window": 0, "loss": "hard"},
                "sparse": {"kind": "vanilla", "n_layers": 1, "window": 6, "sink": 2},
                "magicdec": {"kind": "magicdec", **(magicdec or {})},
            },
            "decode": {"k": 3},
            "throughput": throughput_values,
        }
    )  # fmt: skip


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
    "one draft step fewer": (
        "self.passes * self.draft_step",
        "(self.passes - 1) * self.draft_step",
    ),
    "verification free": ("self.draft_step + self.verification", "self.draft_step"),
    "a FLOP per weight": ("flops = 2.0 * weights", "flops = 1.0 * weights"),
    "keys without values": ("return 2 * model.n_layers", "return model.n_layers"),
    "free memory projection": ("if projections:", "if False:"),
    "memory projected once for keys and values": (
        "flops += 2 * projections * batch",
        "flops += projections * batch",
    ),
    "weights of one byte": ("weights * self.weight_bytes", "weights"),
    "cache of one byte": ("cached * self.cache_bytes", "cached"),
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
    "head read, never multiplied": ("max(2 * table * batch * drafted, ", "max(0, "),
    "head multiplied, never read": (
        ", table * self.weight_bytes * self.hoi)",
        ", 0)",
    ),
    "head of one token": ("2 * table * batch * drafted", "2 * table * batch"),
}


# What drafting costs is the draft's own to say (config/drafts.py), the paper's window throughput's.
_OF_DRAFTS = {
    "no sink": ("lambda v: v.sink + min", "lambda v: min"),
    "window beyond the context": ("min(context, v.window)", "v.window"),
    "dense draft is sparse": ("v.window), float(context))", "v.window), context // 8)"),
    "one pass fewer": ("passes=(Pass(),) * k", "passes=(Pass(),) * (k - 1)"),
}  # fmt: skip
_OF_THE_PAPER = {"window of a quarter": ("context // 8", "context // 4"),
                 "the paper's sparse draft has no sink": ("float(sink +", "float(")}  # fmt: skip


def _numbers(pair: schema.ExperimentConfig) -> list[float]:
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


def _changed(module: types.ModuleType, old: str, new: str, monkeypatch) -> types.ModuleType:
    """The module with a change in its source."""
    assert module.__file__
    source = pathlib.Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    changed = types.ModuleType("changed_cost_model")
    monkeypatch.setitem(sys.modules, changed.__name__, changed)  # dataclasses look it up
    exec(compile(source.replace(old, new), old, "exec"), changed.__dict__)
    return changed


@pytest.mark.parametrize("mutant", [*_MUTANTS, *_OF_DRAFTS, *_OF_THE_PAPER])
def test_the_numbers_catch_a_change_of_any_term(
    mutant: str, pair: schema.ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _numbers(pair)
    if mutant in _MUTANTS:
        changed = _changed(roofline, *_MUTANTS[mutant], monkeypatch)
        monkeypatch.setattr(roofline.RoundCost, "total", changed.RoundCost.total)
        monkeypatch.setattr(roofline.Roofline, "forward", changed.Roofline.forward)
        monkeypatch.setattr(roofline.Roofline, "round", changed.Roofline.round)
        monkeypatch.setattr(changed, "RoundCost", roofline.RoundCost)
    elif mutant in _OF_DRAFTS:
        changed = _changed(drafts, *_OF_DRAFTS[mutant], monkeypatch)
        monkeypatch.setattr(drafts.DraftOptions, "cost", changed.DraftOptions.cost)
    else:
        changed = _changed(throughput, *_OF_THE_PAPER[mutant], monkeypatch)
        monkeypatch.setattr(throughput, "_draft", changed._draft)
    assert _numbers(pair) != pytest.approx(right, rel=1e-9)


def test_magicdec_with_nothing_left_out_drafts_at_the_target_s_cost() -> None:
    small = _small(magicdec={"window": 40, "sink": 0})
    cost = throughput.round_cost(small, "magicdec", batch=2, context=40, variant="fixed_window")
    assert cost.draft_step == cost.target_step

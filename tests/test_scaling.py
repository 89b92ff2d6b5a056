"""Tensor parallelism in the cost model: against costs counted by hand, and with terms changed."""

import dataclasses
import pathlib
import sys
import types
from typing import Any

import pytest

from spire_jax.config import files, schema
from spire_jax.costs import chips, roofline, scaling, throughput
from spire_jax.costs.roofline import Group
from spire_jax.costs.scaling import TensorParallel

AT: dict[str, Any] = {"batch": 10, "context": 40}


def _toy() -> schema.ExperimentConfig:
    """Sizes so small that costs can be counted by hand, and that 2 and 4 chips divide."""
    sizes = {"n_layers": 3, "d_model": 5, "n_kv_heads": 2, "q_per_kv": 2, "d_head": 4, "d_ff": 8,
             "n_tokens": 16}  # fmt: skip
    spire = {"kind": "spire", "n_layers": 1, "window": 6, "sink": 2}
    return files.build(
        {
            "target": sizes,
            "drafts": {
                "spire": spire,
                "shared": {**spire, "share_embedding": True},
                "vanilla": {"kind": "vanilla", "n_layers": 1, "d_model": 3, "init": "random",
                            "window": 0, "loss": "hard"},
                "magicdec": {"kind": "magicdec", "window": 6, "sink": 2},
            },
            "decode": {"k": 3},
            "throughput": {"weight_bytes": 2.0, "cache_bytes": 0.5},
        }
    )  # fmt: skip


TOY = _toy()
# 100 FLOP/s, 10 bytes/s from memory, 5000 bytes of it, 5 bytes/s over 4 links.
CHIP = chips.Chip("toy", {1: 100.0}, 10.0, 5000.0, 5.0, 4, "made up")

# Of `_toy`, by hand. Body parameters of the target: per layer attention 5 * 4 * (2 * 4 + 2 * 2),
# SwiGLU 3 * 5 * 8, norms 10; 370, of which 80 make keys and values. Of the vanilla draft:
# 3 * 4 * 12 + 3 * 3 * 8 + 6 = 222 and 48. A cached token: 48 elements, 16 in a draft.
TARGET = {1: 3 * 370, 2: 3 * 370 / 2, 4: 3 * (290 / 4 + 80 / 2)}  # per chip
SPIRE = {1: 370, 2: 370 / 2, 4: 290 / 4 + 80 / 2}
VANILLA = {1: 222, 2: 222 / 2, 4: 174 / 4 + 48 / 2}

# (variant, method, HOI, group): draft step, target step, verification, hand-over; B = 10, L = 40,
# k = 3, weights of 2 bytes, a cache of half a byte. An all-reduce of the target's activations is
# of 10 * 5 * 2 bytes per token, of which a chip sends 2 * 1/2 or 2 * 3/4.
BY_HAND: dict[str, tuple[str, str, float, Group, tuple[float, float, float, float]]] = {
    "compute, two chips": (
        "paper", "spire", 1e-6, Group(2, 7.0),
        (2 * 10 * SPIRE[2] + 2 * 10 * 16 * 5 / 2 + 7 * 2 * 100,
         2 * 10 * TARGET[2] + 7 * 6 * 100,
         2 * 10 * TARGET[2] * 4 + 7 * 6 * 100 * 4, 0),
    ),
    "compute, more chips than KV heads": (
        "paper", "spire", 1e-6, Group(4, 7.0),
        (2 * 10 * SPIRE[4] + 2 * 10 * 16 * 5 / 2 + 7 * 2 * 150,
         2 * 10 * TARGET[4] + 7 * 6 * 150,
         2 * 10 * TARGET[4] * 4 + 7 * 6 * 150 * 4, 0),
    ),
    "memory, a dense draft": (
        "paper", "vanilla", 1000.0, Group(4, 7.0),
        (1000 * (2 * VANILLA[4] + 0.5 * 10 * 40 * 16 / 2) + 7 * 2 * 1.5 * 10 * 3 * 2,
         1000 * (2 * TARGET[4] + 0.5 * 10 * 40 * 48 / 2) + 7 * 6 * 150,
         1000 * (2 * TARGET[4] + 0.5 * 10 * 40 * 48 / 2) + 7 * 6 * 150 * 4, 0),
    ),
    "a latency per collective, activations of 4 bytes": (
        "per_operator", "magicdec", 1000.0, Group(2, 7.0, 11.0, 4.0),
        (1000 * (2 * TARGET[2] + 0.5 * 10 * 8 * 48 / 2) + 7 * 6 * 200 + 11 * 6,
         1000 * (2 * TARGET[2] + 0.5 * 10 * 40 * 48 / 2) + 7 * 6 * 200 + 11 * 6,
         1000 * (2 * TARGET[2] + 0.5 * 10 * 40 * 48 / 2) + 7 * 6 * 200 * 4 + 11 * 6, 0),
    ),
    # 12 bytes per token for sampling; the embedding's all-reduce; 1/2 or 1/4 of 80 in the head.
    "with the head, read": (
        "with_head", "spire", 1000.0, Group(2, 7.0, 11.0),
        (1000 * (2 * SPIRE[2] + 0.5 * 10 * 8 * 16 / 2 + 2 * 40) + 7 * (300 + 120) + 11 * 4,
         1000 * (2 * TARGET[2] + 0.5 * 10 * 40 * 48 / 2 + 2 * 40) + 7 * (700 + 120) + 11 * 8,
         1000 * (2 * TARGET[2] + 0.5 * 10 * 40 * 48 / 2 + 2 * 40) + 7 * (700 + 120) * 4 + 11 * 8,
         0),
    ),
    "with the head, multiplied": (
        "with_head", "autoregressive", 1e-6, Group(4, 7.0),
        (0, 2 * 10 * (TARGET[4] + 20) + 7 * (7 * 150 + 3 * 120),
         2 * 10 * (TARGET[4] + 20) + 7 * (7 * 150 + 3 * 120), 0),
    ),
    # Three requests at most per chip; they send 3 proposals of 8 bytes to 3 others, and 3/4 of a
    # distribution over 16 tokens of 4 bytes.
    "replicated, with the head": (
        "with_head", "vanilla", 1000.0, Group(4, 7.0, 11.0, replicated_draft=True),
        (1000 * (2 * VANILLA[1] + 0.5 * 3 * 40 * 16 + 2 * 48),
         1000 * (2 * TARGET[4] + 0.5 * 10 * 40 * 48 / 2 + 2 * 20)
         + 7 * (7 * 150 + 3 * 120) + 11 * 8,
         1000 * (2 * TARGET[4] + 0.5 * 10 * 40 * 48 / 2 + 2 * 20)
         + 7 * (7 * 150 + 3 * 120) * 4 + 11 * 8,
         7 * (3 * 3 * 3 * 8 + 3 / 4 * 3 * 16 * 4) + 11 * 2),
    ),
    "replicated": (
        "paper", "spire", 1e-6, Group(2, 7.0, replicated_draft=True),
        (2 * 5 * SPIRE[1] + 2 * 5 * 16 * 5,
         2 * 10 * TARGET[2] + 7 * 600, 2 * 10 * TARGET[2] * 4 + 7 * 600 * 4, 0),
    ),
    # A step hides what is sent behind 11,100 FLOPs; a verification takes what its sending takes.
    "overlap": (
        "paper", "autoregressive", 1e-6, Group(2, 18.0, overlap=True),
        (0, 2 * 10 * TARGET[2], 2 * 10 * TARGET[2], 0),
    ),
    "overlap, bound by the links": (
        "paper", "spire", 1e-6, Group(2, 19.0, overlap=True),
        (2 * 10 * SPIRE[2] + 2 * 10 * 16 * 5 / 2, 19 * 600, 19 * 600 * 4, 0),
    ),
}  # fmt: skip


def _costs(case: str) -> roofline.RoundCost:
    variant, method, hoi, group, _ = BY_HAND[case]
    return throughput.round_cost(TOY, method, hoi=hoi, variant=variant, group=group, **AT)


@pytest.mark.parametrize("case", BY_HAND)
def test_costs_counted_by_hand(case: str) -> None:
    found = _costs(case)
    step, target, verification, handover = BY_HAND[case][-1]
    assert found.draft_step == pytest.approx(step)
    assert found.target_step == pytest.approx(target)
    assert found.verification == pytest.approx(verification)
    assert found.handover == pytest.approx(handover)
    assert found.total == pytest.approx(found.k * step + verification + handover)


# (method, chips, draft): weights and tables of 2 bytes, caches of half a byte, per chip. A ring
# has room for 2 sinks, a window of 6 and 3 drafted tokens.
MEMORY = {
    ("autoregressive", 2, "tensor"): 2 * (TARGET[2] + 5 * 32 / 2) + 0.5 * 10 * 40 * 48 / 2,
    ("magicdec", 4, "tensor"): 2 * (TARGET[4] + 5 * 32 / 4) + 0.5 * 10 * (40 + 11) * 48 / 2,
    ("spire", 2, "tensor"): 6070 + 2 * (SPIRE[2] + 5 * 32 / 2) + 0.5 * 10 * 11 * 16 / 2,
    ("spire", 2, "replicated"): 6070 + 2 * (SPIRE[1] + 5 * 32) + 0.5 * 5 * 11 * 16,
    ("shared", 2, "tensor"): 6070 + 2 * (SPIRE[2] + 5 * 16 / 2) + 0.5 * 10 * 11 * 16 / 2,
    ("shared", 2, "replicated"): 6070 + 2 * (SPIRE[1] + 5 * 32) + 0.5 * 5 * 11 * 16,
    ("shared", 1, "replicated"): 2 * (TARGET[1] + 160 + SPIRE[1] + 80) + 0.5 * 10 * (1920 + 176),
    ("vanilla", 4, "replicated"): 2 * (TARGET[4] + 40 + VANILLA[1] + 3 * 32)
    + 0.5 * (10 * 1920 / 2 + 3 * 640),
}


def _point(method: str, parallel: TensorParallel, **values: Any) -> scaling.Point:
    at = {"tau": 1.0, "chip": CHIP, "variant": "paper", **AT, **values}
    return scaling.point(TOY, method, parallel=parallel, **at)


@pytest.mark.parametrize("case", MEMORY)
def test_memory_counted_by_hand(case: tuple[str, int, str]) -> None:
    method, n, how = case
    assert _point(method, TensorParallel(n, how)).memory_bytes == MEMORY[case]


def test_rates_counted_by_hand() -> None:
    """Two toy chips: a step takes 59,100 FLOP-equivalents of reading, and 20 per byte sent."""
    found = _point("autoregressive", TensorParallel(2, latency_s=0.25))
    sent = 20 * 600 + 6 * 25
    assert found.tokens_per_s_per_chip == pytest.approx(10 * 100 / (59_100 + sent) / 2)
    assert found.communication == pytest.approx(sent / (59_100 + sent))
    assert (found.multiplier, found.draft_communication) == (1, None)
    assert (found.memory_bytes, found.fits) == (6070, False)
    half = _point("autoregressive", TensorParallel(2, links=2))
    assert half.communication == pytest.approx(40 * 600 / (59_100 + 40 * 600))
    # A draft step reads 10 * (2 * 185 + 10 * 7 * 16 * 0.5 / 2) of the paper's window, 40 // 8.
    drafted = _point("spire", TensorParallel(2), tau=2.0)
    assert drafted.draft_communication == pytest.approx(20 * 200 / (6500 + 20 * 200))
    verified, step = 59_100 + 20 * 600 * 4, 59_100 + 20 * 600
    assert drafted.multiplier == pytest.approx(2 * step / (3 * 10_500 + verified))
    assert drafted.communication == pytest.approx(
        20 * (3 * 200 + 4 * 600) / (3 * 10_500 + verified)
    )


def _largest(method: str, chip: chips.Chip = CHIP, **values: Any) -> int:
    return scaling.largest_batch(
        TOY, method, context=40, chip=chip, parallel=TensorParallel(**{"chips": 2, **values})
    )


def test_largest_batch_counted_by_hand() -> None:
    """4500 of 5000 bytes: 1270 of weights and 480 per request; the draft's 530 or 1060, and 32
    per request or 64 for two."""
    assert [_largest("autoregressive"), _largest("spire")] == [6, 5]
    assert _largest("spire", draft_parallelism="replicated") == 4
    exact = dataclasses.replace(CHIP, hbm_bytes=1270.0 + 6 * 480)
    less = dataclasses.replace(CHIP, hbm_bytes=1269.0 + 6 * 480)
    assert [_largest("autoregressive", chip, reserve=0.0) for chip in (exact, less)] == [6, 5]
    assert _largest("autoregressive", dataclasses.replace(CHIP, hbm_bytes=1000.0)) == 0
    for chip, n in ((3500.0, 1), (3499.0, 2), (1749.0, 4), (1234.0, None)):
        found = scaling.smallest_group(
            TOY, "autoregressive", context=40, chip=dataclasses.replace(CHIP, hbm_bytes=chip),
            parallel=TensorParallel(1, reserve=0.0),
        )  # fmt: skip
        assert found == n


# --- the numbers catch a change of any term ------------------------------------------------------

_GROUP = {
    "all-reduces of half a ring": ("all_reduces * 2 * (self", "all_reduces * (self"),
    "all-reduces of whole activations": ("* 2 * (self.chips - 1) / self.chips", "* 2"),
    "one all-reduce per layer": ("2 * model.n_layers + with_head", "model.n_layers + with_head"),
    "no all-reduce of embeddings": ("model.n_layers + with_head", "model.n_layers"),
    "one token's activations": ("batch * tokens * model.d_model *", "batch * model.d_model *"),
    "activations of two bytes": ("self.activation_bytes\n        sent", "2.0\n        sent"),
    "sampling sends nothing": ("sent += (self.chips - 1) * batch", "sent += 0 * batch"),
    "sampling's shards are one": ("(self.chips - 1) * batch", "1 * batch"),
    "the all-gather waits for nothing": ("(all_reduces + with_head) *", "all_reduces *"),
    "no latency": ("(all_reduces + with_head) * self.collective_cost", "0.0"),
    "a group of one sends": ("        if self.chips == 1:\n            return 0.0\n", ""),
    "keys and values never repeated": ("values / self.cache_shards(model)", "values / self.chips"),
    "caches split beyond the heads": ("min(self.chips, model.n_kv_heads)", "self.chips"),
    "whole weights": ("others / self.chips + keys", "others + keys"),
    "whole caches": ("self.hoi / shards", "self.hoi"),
    "memory projected whole": ("_keys_values(model) / shards", "_keys_values(model)"),
    "whole head": ("head_size(model) / self.group.chips", "head_size(model)"),
    "overlap adds": ("max(cost, sent) if", "cost + sent if"),
    "sending always overlaps": ("else cost + sent", "else max(cost, sent)"),
    "requests dealt out with a rest": ("math.ceil(batch / self.chips)", "batch // self.chips"),
    "replicated drafts draft for all": ("batch=group.drafted(batch)", "batch=batch"),
    "replicated drafts send": ("group=group.drafting)", "group=group)"),
    "no hand-over": ("+ self.handover", ""),
    "proposals of one token": ("others * rows * k *", "others * rows *"),
    "whole distributions": ("others / self.chips * rows", "others * rows"),
    "no proposals": ("(proposals + distributions)", "distributions"),
    "one collective in the hand-over": ("2 * self.collective_cost", "1 * self.collective_cost"),
    "hand-over without a head": ('and self.variant == "with_head"', "and True"),
}
_SCALING = {
    "rates of the group": ("cost.total / parallel.chips", "cost.total"),
    "links as fast as memory": ("chip.interconnect_bytes_per_s *", "chip.hbm_bytes_per_s *"),
    "every link counts": ("* links / chip.links", ""),
    "latency free": ("parallel.latency_s * peak", "0.0"),
    "activations always of two bytes": ("=parallel.activation_bytes", "=2.0"),
    "overlap ignored": ('parallel.overlap == "full"', "False"),
    "replication ignored": ('draft=parallel.draft_parallelism == "replicated"', "draft=False"),
    "nothing reserved": ("(1 - parallel.reserve)", "1"),
    "latency counts as computing": ("byte_cost=0.0, collective_cost=0.0", "byte_cost=0.0"),
    "one request too many": ("range(1, 1 << 40)", "range(0, 1 << 40)"),
    "what fills the memory does not fit": ("bisect_right", "bisect_left"),
    "a draft step is the round": ("without.draft_step / cost.draft_step", "1"),
}
_MEMORY = {
    "whole tables": ("model.d_model * tables / of.chips", "model.d_model * tables"),
    "whole weights": ("of.weights(model)", "model.body_parameters()"),
    "whole caches": ("/ of.cache_shards(model)", ""),
    "replicated drafts cache all requests": ("group.drafted(batch), cost", "batch, cost"),
    "replicated drafts are sharded": (
        "weights(drafting, model, rows",
        "weights(group, model, rows",
    ),
    "a shared table is never whole": (" if drafting is group else ()", ""),
}


def _numbers(of: Any = scaling) -> list[float]:
    """Everything the tests above compare."""
    numbers: list[float] = []
    for case in BY_HAND:
        cost = _costs(case)
        numbers += [cost.draft_step, cost.target_step, cost.verification, cost.total]
    ways = [TensorParallel(2, latency_s=0.25), TensorParallel(4, links=2, activation_bytes=4.0),
            TensorParallel(2, "replicated"), TensorParallel(2, overlap="full"),
            TensorParallel(1, "replicated", latency_s=1.0)]  # fmt: skip
    exact = dataclasses.replace(CHIP, hbm_bytes=1270.0 + 6 * 480)
    full = TensorParallel(2, reserve=0.0)
    for way in ways:
        for method in ("autoregressive", "spire", "shared", "vanilla"):
            found = of.point(TOY, method, tau=1.0, chip=CHIP, parallel=way, variant="paper", **AT)
            numbers += [found.memory_bytes, found.tokens_per_s_per_chip, found.communication]
            numbers += [found.multiplier, found.draft_communication or 0.0]
            numbers.append(of.largest_batch(TOY, method, context=40, chip=CHIP, parallel=way))
    where: dict[str, Any] = {"context": 40, "chip": exact, "parallel": full}
    return [*numbers, of.largest_batch(TOY, "autoregressive", **where)]


RIGHT = _numbers()


def _changed(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    assert module.__file__
    source = pathlib.Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    changed = types.ModuleType(f"changed_{module.__name__}")
    sys.modules[changed.__name__] = changed  # dataclasses look it up
    try:
        exec(compile(source.replace(old, new), changed.__name__, "exec"), changed.__dict__)
    finally:
        del sys.modules[changed.__name__]
    return changed


@pytest.mark.parametrize("mutant", _GROUP)
def test_the_numbers_catch_a_change_of_the_group(
    mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = _changed(roofline, *_GROUP[mutant])
    monkeypatch.setattr(changed, "ALONE", roofline.ALONE)
    monkeypatch.setattr(roofline.RoundCost, "total", changed.RoundCost.total)
    monkeypatch.setattr(changed, "RoundCost", roofline.RoundCost)
    for name in ("cache_shards", "weights", "communication", "handover", "drafting", "drafted"):
        monkeypatch.setattr(roofline.Group, name, getattr(changed.Group, name))
    for name in ("forward", "round"):
        monkeypatch.setattr(roofline.Roofline, name, getattr(changed.Roofline, name))
    assert _numbers() != pytest.approx(RIGHT, rel=1e-9)


@pytest.mark.parametrize("mutant", _SCALING)
def test_the_numbers_catch_a_change_of_the_rates(mutant: str) -> None:
    assert _numbers(_changed(scaling, *_SCALING[mutant])) != pytest.approx(RIGHT, rel=1e-9)


@pytest.mark.parametrize("mutant", _MEMORY)
def test_the_numbers_catch_a_change_of_the_memory(
    mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = _changed(throughput, *_MEMORY[mutant])
    monkeypatch.setattr(throughput, "memory_bytes", changed.memory_bytes)
    assert _numbers() != pytest.approx(RIGHT, rel=1e-9)

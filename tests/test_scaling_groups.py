"""The paper's models on groups of real chips: what must hold, errors, and the command."""

import dataclasses
import itertools
import json
from typing import Any

import pytest
from paper_numbers import PAPER_67M, PAPER_70B, ROOT, TAU

from spire_jax.config import files, schema
from spire_jax.costs import chips, scaling, throughput
from spire_jax.costs.scaling import TensorParallel

METHODS = {"autoregressive": 1.0, **TAU}
DOCUMENT = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


def _points(
    of: schema.ExperimentConfig, method: str, sizes: list[int], how: str = "tensor", **values: Any
) -> list[scaling.Point]:
    at = {"tau": METHODS[method], "batch": 64, "context": 512, "chip": "v5p", **values}
    return [scaling.point(of, method, parallel=TensorParallel(n, how), **at) for n in sizes]


# --- what must hold ------------------------------------------------------------------------------

# tokens/s of one v5p at B = 64, L = 512, and bytes. MagicDec has a cache of its own, of 69 tokens.
_ALONE = {
    "autoregressive": ("0x1.1e1e7e023aa8bp+18", "0x1.388c000000000p+29"),
    "vanilla": ("0x1.857f75253d1fdp+18", "0x1.88d1c00000000p+29"),
    "magicdec": ("0x1.259bb8593e02cp+19", "0x1.5b0c000000000p+29"),
    "spire": ("0x1.8d83bfcd64253p+19", "0x1.61b7400000000p+29"),
}


@pytest.mark.parametrize("method", METHODS)
def test_one_chip_is_the_model_without_groups_to_the_bit(
    pair: schema.ExperimentConfig, llama: schema.ExperimentConfig, method: str
) -> None:
    """Whatever is assumed of links that a group of one does not use."""
    how = "replicated" if method in ("vanilla", "spire") else "tensor"
    alone = TensorParallel(1, how, links=1, activation_bytes=4.0, latency_s=1.0)
    found = scaling.point(pair, method, tau=METHODS[method], batch=64, context=512, chip="v5p",
                          parallel=alone)  # fmt: skip
    assert (found.tokens_per_s_per_chip.hex(), found.memory_bytes.hex()) == _ALONE[method]
    for of in (pair, llama):
        for variant in throughput.VARIANTS:
            for batch, context in ((1, 30), (64, 512), (1000, 65536)):
                at: dict[str, Any] = {"batch": batch, "context": context}
                more: dict[str, Any] = {"tau": METHODS[method], "variant": variant, **at}
                for chip in chips.CHIPS.values():
                    found = scaling.point(of, method, chip=chip, parallel=alone, **more)
                    assert found.tokens_per_s_per_chip == throughput.tokens_per_s_per_chip(
                        of, method, chip=chip, **more
                    )
                    assert found.multiplier == throughput.multiplier(
                        of, method, hoi=chip.hoi(1), **more
                    )
                    assert found.memory_bytes == throughput.memory_bytes(of, method, **at)
                    assert found.communication == 0


@pytest.mark.parametrize("variant", throughput.VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_group_never_gives_more_per_chip_than_one_chip_at_the_same_batch(
    pair: schema.ExperimentConfig, llama: schema.ExperimentConfig, method: str, variant: str
) -> None:
    ways = scaling.DRAFT_PARALLELISM if method in ("vanilla", "spire") else ("tensor",)
    for of in (pair, llama):
        for how in ways:
            for batch in (1, 9, 64, 3000):
                found = _points(of, method, [1, 2, 4, 8], how, batch=batch, variant=variant)
                rates = [at.tokens_per_s_per_chip for at in found]
                assert rates == sorted(rates, reverse=True)
                assert rates[1] < rates[0]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_sent_grows_with_the_group(pair: schema.ExperimentConfig, method: str) -> None:
    found = _points(pair, method, [1, 2, 4, 8])
    shares = [at.communication for at in found]
    assert shares[0] == 0
    assert all(less < more for less, more in itertools.pairwise(shares))
    memory = [at.memory_bytes for at in found]
    assert memory == pytest.approx([memory[0] / n for n in (1, 2, 4, 8)])


def test_without_cost_of_links_a_group_is_as_good_as_its_chips(
    pair: schema.ExperimentConfig,
) -> None:
    free = dataclasses.replace(chips.chip("v5p"), interconnect_bytes_per_s=1e30)
    for method in METHODS:
        for variant in throughput.VARIANTS:
            one, *more = _points(pair, method, [1, 2, 4, 8], chip=free, variant=variant)
            for found in more:
                assert found.tokens_per_s_per_chip == pytest.approx(one.tokens_per_s_per_chip)
                assert found.multiplier == pytest.approx(one.multiplier)


def test_a_larger_batch_can_make_a_larger_group_better(llama: schema.ExperimentConfig) -> None:
    batches, rates = [], []
    for n in (4, 8):
        where: dict[str, Any] = {"context": 65536, "chip": "v5p", "parallel": TensorParallel(n)}
        batches.append(scaling.largest_batch(llama, "autoregressive", **where))
        rates.append(scaling.point(llama, "autoregressive", tau=1.0, batch=batches[-1], **where))
        assert rates[-1].fits
        more = scaling.point(llama, "autoregressive", tau=1.0, batch=batches[-1] + 1, **where)
        assert not more.fits
    assert batches[1] > 2 * batches[0]
    assert rates[1].tokens_per_s_per_chip > rates[0].tokens_per_s_per_chip


def test_full_overlap_and_all_links_are_bounds(llama: schema.ExperimentConfig) -> None:
    def rate(**assumed: Any) -> float:
        parallel = TensorParallel(8, **assumed)
        return scaling.point(llama, "spire", tau=3.401, batch=64, context=512, chip="v5p",
                             parallel=parallel).tokens_per_s_per_chip  # fmt: skip

    assert rate(overlap="full") > rate() > rate(links=5) > rate(links=2) > rate(links=1)
    assert rate(links=6) == rate()
    assert rate() > rate(latency_s=1e-6) > rate(latency_s=2e-6)
    assert rate(activation_bytes=1.0) > rate() > rate(activation_bytes=4.0)


def test_beyond_the_kv_heads_caches_are_repeated(llama: schema.ExperimentConfig) -> None:
    eight, sixteen = _points(llama, "autoregressive", [8, 16], context=65536)
    cache = 64 * 65536 * 2 * 80 * 8 * 128 / 8
    weights = (68_452_352_000 + 2 * 8192 * 128256) / 8
    assert eight.memory_bytes == cache + weights
    keys_values = 80 * 2 * 8192 * 8 * 128
    assert sixteen.memory_bytes == cache + weights / 2 + keys_values / 16
    # Requests of a replicated draft are split further, and a dense cache gains by it.
    ways = [_points(llama, "vanilla", [n], how, context=65536)[0].tokens_per_s_per_chip
            for n in (8, 16) for how in scaling.DRAFT_PARALLELISM]  # fmt: skip
    assert ways[0] > ways[1]
    assert ways[2] < ways[3]


@pytest.mark.parametrize("n", [2, 8])
def test_replicated_drafting_pays_from_one_batch_on_while_memory_binds(
    pair: schema.ExperimentConfig, n: int
) -> None:
    """docs/scaling.md: 16,779,264 * 600 / (4 * 2 * 512 * 2 * 2765) = 444.5 requests."""
    patient = dataclasses.replace(chips.chip("v5p"), peak_flops={1: 1e30})

    def seconds(batch: int, how: str) -> float:
        group = scaling.group_of(pair, patient, TensorParallel(n, how))
        return throughput.round_cost(pair, "spire", batch=batch, context=512, hoi=patient.hoi(1),
                                     group=group).draft_step / 1e30  # fmt: skip

    assert seconds(440, "tensor") < seconds(440, "replicated")
    assert seconds(448, "tensor") > seconds(448, "replicated")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("spire", {"chip": "v9"}, "'v9' is unknown; choose from \\['v5e', 'v5p'"),
        ("spire", {"chips": 0}, "chips=0 must be 1 or more"),
        ("spire", {"chips": 3}, "target.n_kv_heads=8 is not a multiple of chips=3, nor"),
        ("spire", {"chips": 16}, "that divides the 8 query heads"),
        ("spire", {"draft_parallelism": "both"}, "choose from \\['tensor', 'replicated'\\]"),
        ("magicdec", {"draft_parallelism": "replicated"}, "magicdec drafts with the target"),
        ("spire", {"overlap": "half"}, "overlap='half'; choose from \\['none', 'full'\\]"),
        ("spire", {"links": 7}, "links=7: a v5p has 6; 0 stands for all"),
        ("spire", {"links": -1}, "links=-1: a v5p has 6"),
        ("spire", {"activation_bytes": 0.0}, "activation_bytes=0.0 must be above 0"),
        ("spire", {"latency_s": -1.0}, "latency_s=-1.0 must be 0 or more"),
        ("spire", {"reserve": 1.0}, "reserve=1.0 must be 0 or more and below 1"),
        ("medusa", {}, "no draft named 'medusa'"),
        ("spire", {"batch": 0}, "batch=0 must be above 0"),
        ("spire", {"context": 0}, "context=0 must be above 0"),
        ("spire", {"tau": 5.5}, "between 1 and k \\+ 1 = 5"),
    ],
)
def test_bad_input_is_named(
    pair: schema.ExperimentConfig, method: str, values: dict[str, Any], message: str
) -> None:
    at: dict[str, Any] = {"chip": "v5p", "tau": 2.0, "batch": 1, "context": 8}
    given = {"chips": 2, **{key: value for key, value in values.items() if key not in at}}
    at |= {key: value for key, value in values.items() if key in at}
    with pytest.raises(schema.ConfigError, match=message):
        scaling.point(pair, method, parallel=TensorParallel(**given), **at)


@pytest.mark.parametrize(
    ("section", "key", "size", "message"),
    [
        ("target", "d_ff", 4097, "target.d_ff=4097 is not a multiple of chips=2"),
        ("drafts.vanilla", "d_ff", 2047, "drafts.vanilla.d_ff=2047 is not a multiple of chips=2"),
        ("drafts.vanilla", "n_kv_heads", 3, "drafts.vanilla.n_kv_heads=3 is not"),
        ("drafts.spire", "head_tokens", 1001, "drafts.spire.head_tokens=1001 is not"),
        ("target", "vocab_size", 50259, "target.vocab_size=50259 is not a multiple of chips=2"),
    ],
)
def test_sizes_that_the_chips_do_not_divide(
    section: str, key: str, size: int, message: str
) -> None:
    of = files.load(PAPER_67M, [f"{section}.{key}={size}"])
    method = section.removeprefix("drafts.") if "." in section else "autoregressive"
    with pytest.raises(schema.ConfigError, match=message):
        _points(of, method, [2])
    with pytest.raises(schema.ConfigError, match=message):
        scaling.largest_batch(of, method, context=8, chip="v5p", parallel=TensorParallel(2))
    if method != "autoregressive":  # a draft that is not sharded may have any size
        assert _points(of, method, [2], "replicated")[0].fits


def test_no_context_has_no_largest_batch(pair: schema.ExperimentConfig) -> None:
    with pytest.raises(schema.ConfigError, match="context=0 must be above 0"):
        scaling.largest_batch(pair, "spire", context=0, chip="v5p", parallel=TensorParallel(2))


# --- command line --------------------------------------------------------------------------------


def _printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The cells of every row of every table."""
    scaling.main(list(arguments))
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]


def test_json(llama: schema.ExperimentConfig, capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main([f"--config={PAPER_70B}", "--chip=v5e", "--chips=4,16", "--batch=8",
                  "--format=json"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert (found["chip"], found["context"], found["batch"], found["k"]) == ("v5e", 65536, 8, 4)
    rows = {(r["chips"], r["method"], r["draft_parallelism"]): r for r in found["groups"]}
    ways = [("autoregressive", None), ("vanilla", "tensor"), ("vanilla", "replicated"),
            ("magicdec", None), ("spire", "tensor"), ("spire", "replicated")]  # fmt: skip
    assert list(rows) == [(n, *way) for n in (4, 16) for way in ways]
    where: dict[str, Any] = {"context": 65536, "chip": "v5e"}
    for (n, method, how), row in rows.items():
        where["parallel"] = TensorParallel(n, how or "tensor")
        fixed = scaling.point(llama, method, tau=METHODS[method], batch=8, **where)
        assert row["at_batch"] == dataclasses.asdict(fixed)
        most = scaling.largest_batch(llama, method, **where)
        assert row["largest_batch"] == most
        if most:
            largest = scaling.point(llama, method, tau=METHODS[method], batch=most, **where)
            assert row["at_largest_batch"] == dataclasses.asdict(largest)
            unit = rows[n, "autoregressive", None]["at_largest_batch"]["tokens_per_s_per_chip"]
            assert row["gain"] == largest.tokens_per_s_per_chip / unit
        else:
            assert (row["at_largest_batch"], row["gain"]) == (None, None)
            assert row["smallest_group"] == (None if how == "replicated" else 8)
    assert rows[4, "spire", "tensor"]["largest_batch"] == 0
    assert rows[16, "spire", "tensor"]["largest_batch"] == 6


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main([f"--config={PAPER_70B}", "--chip=v5e", "--chips=2,16"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "spire tensor from 8 chips on, spire replicated on no number of chips" in shown
    assert "*" in shown
    with pytest.raises(SystemExit) as ended:
        scaling.main([f"--config={PAPER_70B}", "--chip=v5e", "--chips=2,4"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    # (68,452,352,000 + 2 * 8192 * 128,256) / 4 of weights and 65,536 * 163,840 / 4 of caches
    assert printed.err.startswith("error: nothing fits")
    assert "take 20.3 GB of each chip, which has 14.4 for them; chips=8 would do" in printed.err


def _rows(header: str) -> list[list[str]]:
    """The rows of the document's table that has this header."""
    table = DOCUMENT[DOCUMENT.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table]


def test_the_document_s_table_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _printed(
        capsys, f"--config={PAPER_70B}", "--chip=v5p", "--chips=4,8,16", "--context=65536"
    )
    rows = _rows("| chips | method | draft | B |")
    assert printed[: len(rows)] == rows
    assert len(rows) == 18


def test_the_document_s_assumptions_do_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _rows("| assumption |")
    assert len(rows) == 7
    for flags, *cells in rows:
        given = flags.strip("`").replace("configs/", f"{ROOT}/configs/").split()
        given = [] if flags == "as above" else given
        if not any(flag.startswith("--config=") for flag in given):
            given += [f"--config={PAPER_70B}", "--context=65536"]
        printed = _printed(capsys, "--chip=v5p", "--chips=8", "--batch=64", *given)
        name = ["8", "spire", "tensor"]
        found = next(row for row in reversed(printed) if row[:3] == name)
        assert found[4:] == cells


def test_the_document_s_links_are_the_chips() -> None:
    for names, _, sent, links in _rows("| chip | printed |"):
        for name in names.split(", "):
            chip = chips.chip(name)
            assert chip.interconnect_bytes_per_s == float(sent.removesuffix(" GB/s")) * 1e9
            assert chip.links == int(links)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chips=4,x"], "error: --chips=4,x is not a list of integers such as 4,8,16"),
        (["--chips=4,0"], "error: chips=0 must be 1 or more"),
        (["--chips=4,3"], "error: target.n_kv_heads=8 is not a multiple of chips=3"),
        (["--chips=4", "--chip=v9"], "error: throughput.chip='v9' is unknown"),
        (["--chips=4", "--batch=0"], "error: batch=0 must be above 0"),
        (["--chips=4", "--context=0"], "error: context=0 must be above 0"),
        (["--chips=4", "--links=7"], "error: links=7: a v5p has 6"),
        (["--chips=4", "--latency=1"], "error: unknown argument '--latency=1'"),
        (["--chips=4", "--config.throughput.tau.vanilla=0", "--config.throughput.tau.magicdec=0",
          "--config.throughput.tau.spire=0"], "gives no acceptance length; set throughput.tau."),
    ],
)  # fmt: skip
def test_bad_command_lines(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        scaling.main([f"--config={PAPER_67M}", "--config.throughput.chip=v5p", *arguments])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""

"""The modeled throughput of speculative decoding (method.md section 5).

    delta_t = (k * cost_draft + cost_verification) / cost_target
    multiplier = tau / delta_t

with the costs of `spire_jax.costs.roofline`: the paper's, and variants of it that flatter
speculation less. Everything here is modeled, nothing measured.

    python -m spire_jax.throughput --config=configs/paper_67m.py
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from spire_jax.config.drafts import DraftCost, TrainedOptions
from spire_jax.config.files import command_line, ends_in_a_line
from spire_jax.config.schema import (
    AUTOREGRESSIVE,
    ConfigError,
    ExperimentConfig,
    ModelConfig,
    head_size,
)
from spire_jax.costs import chips
from spire_jax.costs.acceptance import Tau, at_context
from spire_jax.costs.chips import CHIPS, Chip
from spire_jax.costs.roofline import (
    ALONE,
    VARIANTS,
    Group,
    Roofline,
    RoundCost,
    visible_rows,
)

# --- the model ---------------------------------------------------------------------------------


def round_cost(
    config: ExperimentConfig,
    method: str,
    *,
    batch: int,
    context: int | Sequence[float],
    k: int | None = None,
    hoi: float | Chip | None = None,
    variant: str | None = None,
    group: Group = ALONE,
) -> RoundCost:
    """Cost of one round of `method` on `batch` requests of `context` tokens each.

    `method` is the name of a draft in the config, or "autoregressive". `context` may be several
    lengths, which the requests have by turns: a cache is read as far as its own text goes, so that
    the lengths' sum counts. `hoi` is in FLOPs per byte, or a chip's at throughput.compute_bytes;
    `k`, `hoi` and `variant` default to decode.k, throughput.hoi and throughput.variant. Of a
    `group` of chips the cost is each chip's, the batch the group's. ConfigError for an unknown
    method or variant and for sizes that are not positive. Method.md section 5.
    """
    contexts = _listed(context)
    shortest = context if isinstance(context, int) else min(contexts)
    k, roofline = _resolve(config, method, batch, shortest, k, hoi, variant)
    roofline = dataclasses.replace(roofline, group=group)
    draft = _draft(config, method, contexts, k, roofline.variant)
    return roofline.round(config.target, draft, batch=batch, k=k, contexts=contexts)


def depth_prices(config: ExperimentConfig, method: str, k: int) -> tuple[float, ...]:
    """What a round costs that drafts k tokens and verifies the first 0 .. k of them.

    In autoregressive steps, at throughput.batch_size and context_length, of which all rows are
    taken to verify as many.
    """
    at = config.throughput

    def of(j: int) -> RoundCost:
        return round_cost(config, method, batch=at.batch_size, context=at.context_length, k=j)

    whole = of(k)
    drafting, step = whole.total - whole.verification, whole.target_step
    verifying = [of(j).verification for j in range(1, k + 1)]
    return tuple((drafting + each) / step for each in (step, *verifying))


def multiplier(
    config: ExperimentConfig,
    method: str,
    *,
    tau: float,
    batch: int,
    context: int | Sequence[float],
    k: int | None = None,
    hoi: float | Chip | None = None,
    variant: str | None = None,
) -> float:
    """Throughput multiplier over autoregressive decoding: tau / delta_t.

    `tau` is the average generation length in tokens per round, from 1 to k + 1 (1 for
    "autoregressive"); everything else as in `round_cost`. Method.md sections 1 and 5.
    """
    cost = round_cost(config, method, batch=batch, context=context, k=k, hoi=hoi, variant=variant)
    check_tau(method, tau, cost.k)
    return tau / cost.delta_t


def tokens_per_s_per_chip(
    config: ExperimentConfig,
    method: str,
    *,
    tau: float,
    batch: int,
    context: int | Sequence[float],
    chip: str | Chip,
    k: int | None = None,
    variant: str | None = None,
) -> float:
    """Modeled tokens/s of one chip that decodes `batch` requests: batch * tau / round time.

    The HOI is the chip's own, its peak at throughput.compute_bytes; weights and cache count
    throughput.weight_bytes and cache_bytes per element. Whether weights and caches fit into the
    chip's memory is not asked here: compare `memory_bytes`. Method.md section 5.
    """
    chip = chips.chip(chip) if isinstance(chip, str) else chip
    cost = round_cost(config, method, batch=batch, context=context, k=k, hoi=chip, variant=variant)
    check_tau(method, tau, cost.k)
    return batch * tau * chip.peak(config.throughput.compute_bytes) / cost.total


def memory_bytes(
    config: ExperimentConfig,
    method: str,
    *,
    batch: int,
    context: int | Sequence[float],
    k: int | None = None,
    group: Group = ALONE,
) -> float:
    """Bytes of all weights, embeddings included, and of all caches at `context` tokens.

    As method.md section 1 counts: final norms are left out, and SPIRe's memory weights.
    `context` and `k` as of `round_cost`. Of a `group` of chips: on each of them, the batch being
    the group's.
    """
    at, target, drafting = config.throughput, config.target, group.drafting
    contexts, k = _listed(context), config.decode.k if k is None else k

    def weights(of: Group, model: ModelConfig, tables: int) -> float:
        return at.weight_bytes * (of.weights(model) + model.d_model * tables / of.chips)

    def cache(of: Group, model: ModelConfig, requests: int, slots: float) -> float:
        return at.cache_bytes * requests * slots * model.cache_row() / of.cache_shards(model)

    held = weights(group, target, (1 if target.tied else 2) * target.vocab_size)
    held += cache(group, target, batch, math.fsum(contexts) / len(contexts))
    draft = _draft(config, method, contexts, k, "fixed_window")
    if draft is None:
        return held
    model, cost = draft
    if config.weights(method):  # else it has the target's
        options = config.draft(method)
        assert isinstance(options, TrainedOptions)
        # A chip that drafts alone needs the whole of a table that the target has sharded.
        lent = options.shared if drafting is group else ()
        rows = 0 if "embedding" in lent else model.vocab_size
        columns = 0 if model.tied or "unembedding" in lent else head_size(model)
        held += weights(drafting, model, rows + columns) + at.weight_bytes * cost.more
    return held + cache(drafting, model, group.drafted(batch), cost.slots)


def grid(
    config: ExperimentConfig,
    methods_tau: Mapping[str, Tau],
    *,
    batch_sizes: Sequence[int] | None = None,
    context_lengths: Sequence[int] | None = None,
    k: int | None = None,
    hoi: float | None = None,
    variant: str | None = None,
) -> dict[str, dict[int, dict[int, float]]]:
    """Multipliers as {method: {B: {L: multiplier}}}; `methods_tau` gives each method's tau.

    Batch sizes and context lengths default to throughput.batch_sizes and context_lengths.
    """
    at = config.throughput
    return {
        method: {
            batch: {
                context: multiplier(config, method, tau=at_context(tau, context), batch=batch,
                                    context=context, k=k, hoi=hoi, variant=variant)
                for context in context_lengths or at.context_lengths
            }
            for batch in batch_sizes or at.batch_sizes
        }
        for method, tau in methods_tau.items()
    }  # fmt: skip


def multiplier_over_generation(
    config: ExperimentConfig,
    method: str,
    *,
    tau: float,
    batch: int,
    context: int,
    tokens: int = 64,
    k: int | None = None,
    hoi: float | None = None,
    variant: str | None = None,
) -> float:
    """The alternative metric: time to generate `tokens` tokens, autoregressive over speculative.

    The context grows on the way: the autoregressive steps are at context, context + 1, ...; a
    round starts with g tokens generated, from g = 0 in steps of tau while g < tokens, and the
    last round counts in full (the authors' code, not the paper's formula with floors). A sparse
    draft's rows are those of the first context: the window is sized once, a dense draft's grow.
    Verification covers k + 1 tokens. Method.md section 5.
    """
    k, roofline = _resolve(config, method, batch, context, k, hoi, variant)
    check_tau(method, tau, k)
    if tokens < 1:
        raise ConfigError(f"tokens={tokens} must be 1 or more")
    reads = (visible_rows(config.target, float(context + g)) for g in range(tokens))
    autoregressive = math.fsum(
        roofline.forward(config.target, batch=batch, tokens=1, rows=rows) for rows in reads
    )
    sparse = method != AUTOREGRESSIVE and config.draft(method).kept()[0]
    speculative, g = 0.0, 0.0
    while g < tokens:
        at = context if sparse else context + g
        draft = _draft(config, method, [at], k, roofline.variant)
        speculative += roofline.round(
            config.target, draft, batch=batch, k=k, contexts=[context + g]
        ).total
        g += tau
    return autoregressive / speculative


def net_saving(multiplier: float, decoding: float, training: float) -> float:
    """What speculation saves over autoregressive decoding, the draft's training paid for.

    In units of the target's training: `decoding` is what autoregressive decoding would cost, and
    `training` what training the draft does. Method.md section 6.
    """
    if multiplier <= 0 or decoding < 0 or training < 0:
        raise ConfigError(f"multiplier={multiplier}, decoding={decoding} and training={training} "
                          f"must not be negative, the first above 0")  # fmt: skip
    return decoding - decoding / multiplier - training


def critical_context(
    config: ExperimentConfig, *, k: int | None = None, hoi: float | None = None
) -> int:
    """L_crit: the longest context, a power of two, at which verification can be compute-bound.

    Compute-bound at some batch size, however large, and under full overlap; the verification of
    *k* tokens, as in the paper's figure 3 (the multiplier verifies k + 1). 0 where even one
    cached token is too many; ConfigError for a target with a window, whose reads stop growing.
    Method.md section 5.
    """
    if any(view.window for view in config.target.views()):
        raise ConfigError("target.window: L_crit is defined for a dense cache; the target has "
                          "layers with a window")  # fmt: skip
    _, roofline = _resolve(config, AUTOREGRESSIVE, 1, 1, k, hoi, "paper")
    k = config.decode.k if k is None else k
    # With B growing, the weights' share of the reads vanishes: 2 N k B > B L row HOI remains.
    limit = (
        2 * config.target.body_parameters() * k
        / (config.target.cache_row() * roofline.cache_bytes * roofline.hoi)
    )  # fmt: skip
    longest = math.ceil(limit) - 1  # strictly below the limit
    return 1 << (longest.bit_length() - 1) if longest >= 1 else 0


def given_tau(
    config: ExperimentConfig, where: str = "the config", remedy: str = ""
) -> dict[str, float]:
    """The drafts whose acceptance length the config gives, and that length; in its order.

    ConfigError, naming `where` it is looked for and another `remedy`, where there is none.
    """
    given = {name: tau for name, tau in config.throughput.tau if tau}
    if not given:
        names = [name for name, _ in config.drafts]
        raise ConfigError(
            f"{where} gives no acceptance length; set throughput.tau.NAME of a draft in "
            f"{names}{remedy}"
        )
    return given


def _listed(context: int | Sequence[float]) -> list[float]:
    return [float(context)] if isinstance(context, int) else [float(n) for n in context]


def _draft(
    config: ExperimentConfig, method: str, contexts: Sequence[float], k: int, variant: str
) -> tuple[ModelConfig, DraftCost] | None:
    """A draft's sizes, and what it costs under a variant of the model; None without one."""
    if method == AUTOREGRESSIVE:
        return None
    options = config.draft(method)
    (window, sink), costs = options.kept(), [options.cost(config.target, n, k) for n in contexts]
    rows = [cost.rows for cost in costs]
    if variant == "paper" and window:
        rows = [float(sink + n // 8) for n in contexts]
    # Of passes and weights, which no context changes, the first speaks for all.
    cost = dataclasses.replace(costs[0], rows=math.fsum(rows) / len(rows),
                               slots=math.fsum(c.slots for c in costs) / len(costs))  # fmt: skip
    return options.model(config.target), cost


def _resolve(
    config: ExperimentConfig,
    method: str,
    batch: int,
    context: float,
    k: int | None,
    hoi: float | Chip | None,
    variant: str | None,
) -> tuple[int, Roofline]:
    """Defaults from the config, checked; without a draft k is 0."""
    at = config.throughput
    chip = hoi if isinstance(hoi, Chip) else chips.chip(at.chip)
    hoi = at.hoi if hoi is None else hoi.hoi(at.compute_bytes) if isinstance(hoi, Chip) else hoi
    variant = at.variant if variant is None else variant
    if variant not in VARIANTS:
        raise ConfigError(f"throughput.variant={variant!r}; choose from {list(VARIANTS)}")
    for name, value in (("batch", batch), ("context", context), ("hoi", hoi), ("k", k)):
        if value is not None and value <= 0:
            raise ConfigError(f"{name}={value} must be above 0")
    k = (config.decode.k if k is None else k) if method != AUTOREGRESSIVE else 0
    launch = at.launch_us and at.launch_us * 1e-6 * chip.peak(at.compute_bytes)
    return k, Roofline(hoi, variant, at.weight_bytes, at.cache_bytes, launch=launch)


def check_tau(method: str, tau: float, k: int) -> None:
    """ConfigError for an average generation length that rounds of k drafted tokens cannot have."""
    if not 1 <= tau <= k + 1:
        raise ConfigError(
            f"tau={tau} of {method!r} must lie between 1 and k + 1 = {k + 1}: a round emits the "
            f"accepted tokens and one more"
        )


# --- command line ------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Print the modeled multipliers of a config that gives its acceptance lengths."""
    parser = argparse.ArgumentParser(
        prog="python -m spire_jax.throughput",
        description="Modeled throughput of speculative decoding, from acceptance lengths.",
    )
    parser.add_argument(
        "--format",
        choices=("table", "json"),
        default="table",
        help="json: {method: {B: {L: multiplier}}} of the config's variant",
    )
    args, config = command_line(parser, argv)
    with ends_in_a_line(ConfigError):
        methods_tau = given_tau(config, args.config)
        if args.format == "json":
            print(json.dumps(grid(config, methods_tau)))
        else:
            _print_tables(config, methods_tau)


def _print_tables(config: ExperimentConfig, methods_tau: Mapping[str, float]) -> None:
    console = rich.console.Console(highlight=False)
    if not console.is_terminal:
        console = rich.console.Console(width=100, highlight=False)
    for table in (
        _by_variant(config, methods_tau),
        _by_batch(config, methods_tau),
        _by_chip(config, methods_tau),
    ):
        console.print(table, "")
    taus = ", ".join(f"{method} {tau:g}" for method, tau in methods_tau.items())
    console.print(f"Modeled, not measured. tau: {taus} tokens per round, the same at every point.")
    console.print("Each variant keeps what the one before it changed:")
    assumptions = rich.table.Table.grid(padding=(0, 2, 0, 0))
    for variant, assumption in VARIANTS.items():
        assumptions.add_row(variant, assumption)
    console.print(assumptions)


def _by_variant(config: ExperimentConfig, methods_tau: Mapping[str, float]) -> rich.table.Table:
    at = config.throughput
    table = _table(f"multiplier by variant (B = {at.batch_size}, {_point(config)})",
                   "method", "variant", *map(str, at.context_lengths))  # fmt: skip
    for method, tau in methods_tau.items():
        for variant in VARIANTS:
            row = grid(config, {method: tau}, batch_sizes=[at.batch_size], variant=variant)
            values = row[method][at.batch_size].values()
            table.add_row(method, variant, *(f"{value:.2f}" for value in values))
        table.add_section()
    return table


def _by_batch(config: ExperimentConfig, methods_tau: Mapping[str, float]) -> rich.table.Table:
    at = config.throughput
    table = _table(f"multiplier by batch (variant {at.variant}, {_point(config)})",
                   "method", "B", *map(str, at.context_lengths))  # fmt: skip
    for method, rows in grid(config, methods_tau).items():
        for batch, row in rows.items():
            table.add_row(method, str(batch), *(f"{value:.2f}" for value in row.values()))
        table.add_section()
    return table


def _by_chip(config: ExperimentConfig, methods_tau: Mapping[str, float]) -> rich.table.Table:
    at = config.throughput
    where: dict[str, Any] = {"batch": at.batch_size, "context": at.context_length}
    methods = {AUTOREGRESSIVE: 1.0, **methods_tau}
    table = _table(f"tokens/s per chip (B = {at.batch_size}, L = {at.context_length})",
                   "chip", "HOI", "variant", *methods)  # fmt: skip
    for chip in CHIPS.values():
        for variant in VARIANTS:
            cells = []
            for method, tau in methods.items():
                rate = tokens_per_s_per_chip(
                    config, method, tau=tau, chip=chip, variant=variant, **where
                )
                fits = memory_bytes(config, method, **where) <= chip.hbm_bytes
                cells.append(f"{rate:,.0f}{' ' if fits else '*'}")
            table.add_row(chip.name, f"{chip.hoi(at.compute_bytes):.0f}", variant, *cells)
        table.add_section()
    table.caption = (
        f"each chip at its own HOI; bytes per element: weights {at.weight_bytes:g}, cache "
        f"{at.cache_bytes:g}, compute {at.compute_bytes:g}\n"
        f"* weights and caches exceed the chip's memory: the figure is for more of it"
    )
    return table


def _point(config: ExperimentConfig) -> str:
    return f"k = {config.decode.k}, HOI = {config.throughput.hoi:g}"


def _table(title: str, *columns: str) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        words = column in ("method", "variant", "chip")
        table.add_column(column, justify="left" if words else "right")
    return table

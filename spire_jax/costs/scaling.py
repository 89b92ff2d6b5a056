"""Modeled throughput of chips that share one target by tensor parallelism.

Each of n chips has 1/n of the computing and of the weights and 1/min(n, KV heads) of the caches;
what it sends to the others costs time of its own (`cost_model.Group`). The paper's metric is the
case n = 1. Data parallelism on top is a plain factor, so that everything is per chip of one group.
Everything here is modeled, nothing measured.

    python -m spire_jax.scaling --config=configs/paper_llama3_70b.py --chip=v5p --chips=4,8,16
"""

import argparse
import bisect
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from spire_jax.config.files import command_line, exit_with_error
from spire_jax.config.schema import (
    AUTOREGRESSIVE,
    ConfigError,
    ExperimentConfig,
)
from spire_jax.config.values import MOST, convert
from spire_jax.costs import chips, throughput
from spire_jax.costs.chips import Chip
from spire_jax.costs.roofline import Group
from spire_jax.costs.scaling_tables import print_tables

DRAFT_PARALLELISM = ("tensor", "replicated")
OVERLAPS = ("none", "full")

# --- the model ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """How many chips share the target, and what is assumed of the draft, the links, the memory."""

    chips: int
    # "tensor": the draft is sharded as the target; "replicated": every chip holds all of it and
    # drafts for its share of the batch. Only for drafts with weights of their own.
    draft_parallelism: str = "tensor"
    overlap: str = "none"  # of sending with the rest of a pass; "full" is the bound
    links: int = 0  # of a chip, that lead to others of the group; 0 = all of them
    activation_bytes: float = 2.0  # per element of an all-reduce: bf16
    latency_s: float = 0.0  # of a collective, beside its bytes; no data sheet gives one
    reserve: float = 0.1  # of a chip's memory, kept for temporaries, programs and fragmentation

    def __post_init__(self) -> None:
        if self.chips < 1:
            raise ConfigError(f"chips={self.chips} must be 1 or more")
        for name, known in (("draft_parallelism", DRAFT_PARALLELISM), ("overlap", OVERLAPS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}; choose from {list(known)}")
        if not 0 < self.activation_bytes < math.inf:
            raise ConfigError(f"activation_bytes={self.activation_bytes} must be above 0, and "
                              f"finite")  # fmt: skip
        if not 0 <= self.latency_s < math.inf:
            raise ConfigError(f"latency_s={self.latency_s} must be 0 or more, and finite")
        if not 0 <= self.reserve < 1:
            raise ConfigError(f"reserve={self.reserve} must be 0 or more and below 1")


@dataclasses.dataclass(frozen=True)
class Point:
    """A method on a group of chips at one batch; the batch is the group's."""

    batch: int
    fits: bool  # weights, caches and the reserve fit into each chip's memory
    memory_bytes: float  # of each chip, without the reserve
    tokens_per_s_per_chip: float
    multiplier: float  # tau / delta_t: over autoregressive decoding of this batch on these chips
    communication: float  # share of a round that links without cost would save
    draft_communication: float | None  # and of a draft step; None without drafting


def check_sharding(config: ExperimentConfig, method: str, parallel: TensorParallel) -> None:
    """ConfigError where the chips do not divide what is sharded over them, or cannot be used so.

    As `sharding.check_mesh`, and one case more: a multiple of the KV heads is allowed where it
    divides the query heads (keys and values are then repeated).
    """
    n = parallel.chips
    models = [("target", config.target)]
    if config.weights(method) and parallel.draft_parallelism == "tensor":
        models.append((f"drafts.{method}", config.draft(method).model(config.target)))
    elif (
        parallel.draft_parallelism == "replicated"
        and method != AUTOREGRESSIVE
        and not config.weights(method)
    ):
        raise ConfigError(f"draft_parallelism='replicated': {method} drafts with the target, whose "
                          f"weights are sharded; use 'tensor'")  # fmt: skip
    elif (
        parallel.draft_parallelism == "replicated"
        and method != AUTOREGRESSIVE
        and config.draft(method).cost(config.target, 1.0, 1).target_rows
    ):
        raise ConfigError(f"draft_parallelism='replicated': {method} reads the target's cache, "
                          f"which is sharded; use 'tensor'")  # fmt: skip
    for name, model in models:
        kv_heads, heads = model.n_kv_heads, model.n_kv_heads * model.q_per_kv
        if (kv_heads % n and n % kv_heads) or heads % n:
            raise ConfigError(
                f"{name}.n_kv_heads={kv_heads} is not a multiple of chips={n}, nor is chips a "
                f"multiple of it that divides the {heads} query heads"
            )
        for key in ("d_ff", "vocab_size", "head_tokens"):
            if (size := getattr(model, key)) % n:
                raise ConfigError(f"{name}.{key}={size} is not a multiple of chips={n}")


def group_of(config: ExperimentConfig, chip: str | Chip, parallel: TensorParallel) -> Group:
    """The cost model's group: bytes and seconds of sending, in FLOP-equivalents of the chip.

    The chip's peak is that at throughput.compute_bytes. ConfigError for an unknown chip and for
    more links than it has.
    """
    chip = _chip(chip)
    peak, links = chip.peak(config.throughput.compute_bytes), parallel.links or chip.links
    if not 1 <= links <= chip.links:
        raise ConfigError(f"links={links}: a {chip.name} has {chip.links}; 0 stands for all")
    return Group(
        chips=parallel.chips,
        byte_cost=peak / (chip.interconnect_bytes_per_s * links / chip.links),
        collective_cost=parallel.latency_s * peak,
        activation_bytes=parallel.activation_bytes,
        overlap=parallel.overlap == "full",
        replicated_draft=parallel.draft_parallelism == "replicated",
    )


def point(
    config: ExperimentConfig,
    method: str,
    *,
    tau: float,
    batch: int,
    context: int,
    chip: str | Chip,
    parallel: TensorParallel,
    k: int | None = None,
    variant: str | None = None,
) -> Point:
    """Throughput, multiplier and memory of `method` on the chips of `parallel`.

    `batch` requests of `context` tokens each are decoded by the group together; `tau` is in tokens
    per round. Rates are per chip: the group's over its chips. Whether it fits is said, not
    required. ConfigError as in `throughput.round_cost`, `group_of` and `check_sharding`.
    """
    chip = _chip(chip)
    check_sharding(config, method, parallel)
    group = group_of(config, chip, parallel)
    free = dataclasses.replace(group, byte_cost=0.0, collective_cost=0.0)
    width = config.throughput.compute_bytes
    cost, without = (
        throughput.round_cost(config, method, batch=batch, context=context, k=k,
                              hoi=chip, variant=variant, group=of)
        for of in (group, free)
    )  # fmt: skip
    throughput.check_tau(method, tau, cost.k)
    memory = throughput.memory_bytes(config, method, batch=batch, context=context, group=group)
    return Point(
        batch=batch,
        fits=memory <= _room(chip, parallel),
        memory_bytes=memory,
        tokens_per_s_per_chip=batch * tau * chip.peak(width) / cost.total / parallel.chips,
        multiplier=tau / cost.delta_t,
        communication=1 - without.total / cost.total,
        draft_communication=1 - without.draft_step / cost.draft_step if cost.k else None,
    )


def largest_batch(
    config: ExperimentConfig,
    method: str,
    *,
    context: int,
    chip: str | Chip,
    parallel: TensorParallel,
) -> int:
    """The most requests of `context` tokens that the group holds; 0 where not even one fits.

    Weights, embeddings included, and caches fit into what the reserve leaves of every chip's
    memory. ConfigError as in `point`.
    """
    if context < 1:
        raise ConfigError(f"context={context} must be above 0")
    check_sharding(config, method, parallel)
    group = group_of(config, chip, parallel)

    def memory(batch: int) -> float:
        return throughput.memory_bytes(config, method, batch=batch, context=context, group=group)

    # Memory grows with the batch; bisection, since a replicated draft makes it grow in steps.
    return bisect.bisect_right(range(1, 1 << 40), _room(_chip(chip), parallel), key=memory)


def smallest_group(
    config: ExperimentConfig,
    method: str,
    *,
    context: int,
    chip: str | Chip,
    parallel: TensorParallel,
) -> int | None:
    """The fewest chips that hold one request of `context` tokens, else as `parallel` says.

    None where no number of chips that the target's query heads allow is enough.
    """
    for n in range(1, config.target.n_kv_heads * config.target.q_per_kv + 1):
        some = dataclasses.replace(parallel, chips=n)
        try:
            check_sharding(config, method, some)
        except ConfigError:
            continue
        if largest_batch(config, method, context=context, chip=chip, parallel=some):
            return n
    return None


def _chip(chip: str | Chip) -> Chip:
    return chips.chip(chip) if isinstance(chip, str) else chip


def _room(chip: Chip, parallel: TensorParallel) -> float:
    return chip.hbm_bytes * (1 - parallel.reserve)


# --- a table of groups -------------------------------------------------------------------------


def rows(
    config: ExperimentConfig,
    methods_tau: Mapping[str, float],
    sizes: Sequence[int],
    *,
    batch: int,
    context: int,
    chip: str | Chip,
    parallel: TensorParallel,
) -> list[dict[str, Any]]:
    """One record per number of chips in `sizes`, method and way to shard its draft.

    Each has the `Point` at the largest batch that fits (None where none does, with the fewest
    chips that would do) and the one at `batch`; `gain` is tokens/s per chip over autoregressive
    decoding on the same chips, each at its own largest batch. ConfigError where a size does not
    divide the models, and where nothing fits anywhere.
    """
    asked = [
        (n, method, tau, how)
        for n in sizes
        for method, tau in {AUTOREGRESSIVE: 1.0, **methods_tau}.items()
        for how in _ways(config, method, n)
    ]
    for n, method, _, how in asked:
        check_sharding(config, method, _at(parallel, n, how))
    records: list[dict[str, Any]] = []
    unit = 0.0
    for n, method, tau, how in asked:
        at = _at(parallel, n, how)
        where: dict[str, Any] = {"context": context, "chip": chip, "parallel": at}
        most = largest_batch(config, method, **where)
        largest = point(config, method, tau=tau, batch=most, **where) if most else None
        if largest and method == AUTOREGRESSIVE:  # first, and it fits where anything does
            unit = largest.tokens_per_s_per_chip
        records.append({
            "chips": n,
            "method": method,
            "draft_parallelism": how if len(_ways(config, method, n)) > 1 else None,
            "largest_batch": most,
            "smallest_group": None if most else smallest_group(config, method, **where),
            "gain": largest and largest.tokens_per_s_per_chip / unit,
            "at_largest_batch": largest and dataclasses.asdict(largest),
            "at_batch": dataclasses.asdict(point(config, method, tau=tau, batch=batch, **where)),
        })  # fmt: skip
    if not any(record["largest_batch"] for record in records):
        fewest = [r["smallest_group"] for r in records if r["smallest_group"]]
        remedy = f"chips={min(fewest)} would do" if fewest else "no number of chips would do"
        least = min(point(config, method, tau=tau, batch=1, context=context, chip=chip,
                          parallel=_at(parallel, n, how)).memory_bytes
                    for n, method, tau, how in asked)  # fmt: skip
        room = _room(_chip(chip), parallel)
        raise ConfigError(f"nothing fits: the weights and one request of {context} tokens take "
                          f"{least / 1e9:,.1f} GB of each chip, which has {room / 1e9:,.1f} for "
                          f"them; {remedy}")  # fmt: skip
    return records


def _ways(config: ExperimentConfig, method: str, n: int) -> tuple[str, ...]:
    both = n > 1 and bool(config.weights(method))
    return DRAFT_PARALLELISM if both else DRAFT_PARALLELISM[:1]


def _at(parallel: TensorParallel, n: int, how: str) -> TensorParallel:
    return dataclasses.replace(parallel, chips=n, draft_parallelism=how)


# --- command line ------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Print what groups of chips are modeled to do with a config that gives its tau."""
    parser = argparse.ArgumentParser(
        prog="python -m spire_jax.scaling",
        description="Modeled throughput of chips that share a target by tensor parallelism.",
        allow_abbrev=False,  # --latency would hide its unit
    )
    add = parser.add_argument
    add("--chips", required=True, metavar="N,N", help="numbers of chips that share the target")
    add("--chip", help="their kind; default: throughput.chip")
    add("--context", type=int, help="tokens per request; default: throughput.context_length")
    add("--batch", type=int, help="requests of a group; default: throughput.batch_size")
    add("--overlap", choices=OVERLAPS, default="none", help="of sending with computing")
    add("--links", type=int, default=0, help="links of a chip into its group; 0 = all it has")
    add("--activation-bytes", type=float, default=2.0, help="per element of an all-reduce")
    add("--latency-us", type=float, default=0.0, help="of every collective, beside its bytes")
    add("--reserve", type=float, default=0.1, help="share of the memory kept for temporaries")
    add("--format", choices=("table", "json"), default="table")
    args, config = command_line(parser, argv)
    at = config.throughput
    try:
        sizes = _sizes(args.chips)
        parallel = TensorParallel(
            chips=sizes[0], overlap=args.overlap, links=args.links, reserve=args.reserve,
            activation_bytes=args.activation_bytes, latency_s=args.latency_us * 1e-6,
        )  # fmt: skip
        chip = _chip(at.chip if args.chip is None else args.chip)
        context, batch = (usual if given is None else convert(given, int, f"--{name}", usual)
                          for name, given, usual in (
                              ("context", args.context, at.context_length),
                              ("batch", args.batch, at.batch_size)))  # fmt: skip
        methods_tau = throughput.given_tau(config, args.config)
        records = rows(config, methods_tau, sizes, batch=batch, context=context, chip=chip,
                       parallel=parallel)  # fmt: skip
    except ConfigError as error:
        exit_with_error(error)
    assumed = dataclasses.asdict(parallel)
    del assumed["chips"], assumed["draft_parallelism"]  # a record's own
    about = {"chip": chip.name, "context": context, "batch": batch, "variant": at.variant,
             "k": config.decode.k, "tau": methods_tau, "bytes": {"weights": at.weight_bytes,
             "cache": at.cache_bytes, "compute": at.compute_bytes}, **assumed}  # fmt: skip
    if args.format == "json":
        print(json.dumps({**about, "groups": records}))
    else:
        print_tables(about, records)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--chips={text} is not a list of integers such as 4,8,16") from None
    for n in sizes:
        if not 1 <= n < MOST:
            raise ConfigError(f"chips={n} must be 1 or more, and under {MOST}")
    return sizes

"""What `python -m spire_jax.scaling` prints: groups of chips at two batches, what is assumed."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table


def print_tables(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Both tables and what they assume; `records` are of `scaling.rows`, `about` says of what."""
    console = rich.console.Console(highlight=False)
    if not console.is_terminal:
        console = rich.console.Console(width=100, highlight=False)
    console.print(_at_largest_batch(about, records), "", _at_batch(about, records), "",
                  _assumptions(about), sep="\n")  # fmt: skip


def _at_largest_batch(
    about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> rich.table.Table:
    table = _table(f"per chip, at the largest batch that fits ({about['chip']}, L = "
                   f"{about['context']})", "B", "tokens/s", "gain", "multiplier", "sending",
                   "drafting")  # fmt: skip
    fewest: dict[str, int | None] = {}
    for record, last in zip(records, _ends(records), strict=True):
        name, found = _name(record), record["at_largest_batch"]
        if found:
            rate, *ratios = _figures(found)
            cells = [str(found["batch"]), rate, f"{record['gain']:.2f}", *ratios]
        else:
            cells = ["-"] * 6
            fewest[" ".join(name[1:]).strip()] = record["smallest_group"]
        table.add_row(*name, *cells, end_section=last)
    if fewest:
        needs = (f"{who} from {n} chips on" if n else f"{who} on no number of chips"
                 for who, n in fewest.items())  # fmt: skip
        table.caption = "- does not fit; one request does: " + ", ".join(needs)
    return table


def _at_batch(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> rich.table.Table:
    table = _table(f"per chip, at B = {about['batch']} ({about['chip']}, L = {about['context']})",
                   "GB", "tokens/s", "multiplier", "sending", "drafting")  # fmt: skip
    for record, last in zip(records, _ends(records), strict=True):
        found = record["at_batch"]
        memory = f"{found['memory_bytes'] / 1e9:.1f}{' ' if found['fits'] else '*'}"
        table.add_row(*_name(record), memory, *_figures(found), end_section=last)
    if not all(record["at_batch"]["fits"] for record in records):
        table.caption = "* does not fit beside what is kept: the rate is for more memory"
    return table


def _assumptions(about: Mapping[str, Any]) -> str:
    taus = ", ".join(f"{method} {tau:g}" for method, tau in about["tau"].items())
    width, links = about["bytes"], about["links"] or "all"
    return (
        f"Modeled, not measured: variant {about['variant']}, k = {about['k']}, tau {taus}; bytes "
        f"per element: weights {width['weights']:g}, cache {width['cache']:g}, compute "
        f"{width['compute']:g}, all-reduce {about['activation_bytes']:g}; {links} links of a chip "
        f"into its group, {about['latency_s'] * 1e6:g} us per collective, overlap "
        f"{about['overlap']}; {about['reserve']:.0%} of the memory kept for temporaries.\n"
        f"gain: over autoregressive decoding at its own largest batch; multiplier: at the same "
        f"batch; sending: share of a round that links without cost would save; drafting: the same "
        f"share of a draft step."
    )


def _name(record: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(record["chips"]), record["method"], record["draft_parallelism"] or ""


def _ends(records: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether a record is the last of its number of chips."""
    sizes = [record["chips"] for record in records]
    return [a != b for a, b in zip(sizes, [*sizes[1:], None], strict=True)]


def _figures(found: Mapping[str, Any]) -> list[str]:
    drafting = found["draft_communication"]
    return [
        f"{found['tokens_per_s_per_chip']:,.1f}",
        f"{found['multiplier']:.2f}",
        f"{found['communication']:.1%}",
        "" if drafting is None else f"{drafting:.1%}",
    ]


def _table(title: str, *columns: str) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left", caption_justify="left")
    for column in ("chips", "method", "draft", *columns):
        words = column in ("method", "draft")
        table.add_column(column, justify="left" if words else "right", no_wrap=words)
    return table

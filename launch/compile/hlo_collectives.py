"""What a compiled program sends between devices: its collectives, read from XLA's text.

A compiled module names every collective with the shape that one device gets, the groups of devices
that take part, and, through the computations that call each other, how often it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Others that XLA has, under the kind that they are one of.
_ALSO = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "collective-permute"}

# A TPU's reduce-scatter is a fusion of this name: an all-reduce, of which a device keeps its share.
_SCATTERED = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal collectives of a program, as one device takes part in them."""

    kind: str  # of KINDS
    shapes: tuple[str, ...]  # "bf16[4,5,8192]", the whole arrays: the larger side of the two
    bytes: int  # of these arrays, once
    group: int  # devices that take part together; 0 where XLA does not say
    count: int  # runs, each loop's trips multiplied; in a loop of unknown length, of one iteration
    per_iteration: bool  # whether it is in a loop whose number of iterations is not known
    source: str = ""  # what it was in the program that was traced

    @property
    def sent(self) -> float:
        """Bytes that one device sends for all runs, over a ring."""
        share = (self.group - 1) / self.group if self.group else 1.0
        once = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.count * self.bytes * once


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a compiled module's text (`compiled.as_text()`), equal ones together.

    An asynchronous one counts where it starts. The conditions of loops count as often as their
    bodies.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations, entry = _computations(hlo)
    runs = _runs(computations, entry)
    found: dict[Collective, int] = {}
    chains = set()
    for name, lines in computations.items():
        for line in lines if name in runs else ():
            one = _collective(line)
            if one is None:
                continue
            if name.startswith(_SCATTERED):
                one = dataclasses.replace(one, kind="reduce-scatter")
            # A TPU spreads one over the fusions that it overlaps with; each names it again.
            if chain := re.search(r'channel_id=(\d+).*chain_id="(\d+)"', line):
                if chain.groups() in chains:
                    continue
                chains.add(chain.groups())
            for times, unknown in runs[name]:
                key = dataclasses.replace(one, per_iteration=unknown)
                found[key] = found.get(key, 0) + times
    return _counted(found)


def merged(of: Iterable[Collective]) -> list[Collective]:
    """Those that differ in their source alone as one, without it."""
    found: dict[Collective, int] = {}
    for one in of:
        key = dataclasses.replace(one, count=1, source="")
        found[key] = found.get(key, 0) + one.count
    return _counted(found)


def _counted(found: dict[Collective, int]) -> list[Collective]:
    """The one that sends most first."""
    result = [dataclasses.replace(one, count=times) for one, times in found.items()]
    return sorted(result, key=lambda c: -c.sent)


# --- computations and how often they run -------------------------------------------------------


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation, and the entry's name."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in hlo.splitlines():
        begin = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if begin and not line.startswith("HloModule"):
            lines = computations[begin[2]] = []
            entry = begin[2] if begin[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of a compiled HLO module")
    return computations, entry


def _runs(computations: dict[str, list[str]], entry: str) -> dict[str, list[tuple[int, bool]]]:
    """How often each computation runs, apart for runs in loops of unknown length."""
    calls = {name: list(_calls(lines, computations)) for name, lines in computations.items()}
    order: list[str] = []  # callers before those whom they call

    def visit(name: str) -> None:
        for called, *_ in calls.get(name, ()):
            if called not in seen:
                seen.add(called)
                visit(called)
        order.append(name)

    seen = {entry}
    visit(entry)
    times: dict[str, dict[bool, int]] = {entry: {False: 1}}
    for name in reversed(order):
        for called, trips, unknown in calls.get(name, ()):
            for inside, count in times.get(name, {}).items():
                into = times.setdefault(called, {})
                into[inside or unknown] = into.get(inside or unknown, 0) + count * trips
    return {name: [(n, unknown) for unknown, n in of.items()] for name, of in times.items()}


def _calls(lines: list[str], computations: dict[str, list[str]]) -> Iterator[tuple[str, int, bool]]:
    """(computation, trips, whether their number is unknown) of all that these lines call."""
    for line in lines:
        trips = _trips(line, lines, computations) if re.search(r"[ )]while\(", line) else 1
        for called in re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)", line):
            yield called, trips or 1, not trips
        for names in re.findall(r"(?:branch|called)_computations=\{([^}]*)\}", line):
            for called in re.findall(r"%?([\w.\-]+)", names):
                yield called, 1, False


def _trips(loop: str, around: list[str], computations: dict[str, list[str]]) -> int:
    """How often a `while` runs; 0 = unknown.

    As XLA says it. A TPU's text does not; a counter from 0 in ones up to a constant is read there.
    """
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop):
        return int(known[1])
    parts = [re.search(rf"{part}=%?([\w.\-]+)", loop) for part in ("condition", "body")]
    lines = [computations.get(part[1], []) if part else [] for part in parts]
    here, asked, inside = (_Values(of) for of in (around, *lines))
    test = re.match(r"compare\(%([\w.\-]+), %([\w.\-]+)\), direction=LT", asked.of("ROOT"))
    initial = re.search(r"while\(%([\w.\-]+)\)", loop)
    if test is None or initial is None:
        return 0
    counter = re.match(r"get-tuple-element\(.*index=(\d+)", asked.of(test[1]))
    limit = re.match(r"constant\((\d+)\)", asked.of(test[2]))
    if counter is None or limit is None:
        return 0
    at = int(counter[1])
    first, last = here.operand(initial[1], at), inside.operand("ROOT", at)
    step, by = inside.operand(last, 0), inside.operand(last, 1)
    counts = (
        here.of(first).startswith("constant(0)")
        and inside.of(last).startswith("add(")
        and re.match(rf"get-tuple-element\(.*index={at}\b", inside.of(step))
        and inside.of(by).startswith("constant(1)")
    )
    return int(limit[1]) if counts else 0


class _Values:
    """What the instructions of a computation are, copies and bitcasts looked through."""

    def __init__(self, lines: list[str]):
        found = (re.match(r"\s*(ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*\(.*)$", x) for x in lines)
        self._values = {name: x[3] for x in found if x for name in (x[2], *["ROOT"] * bool(x[1]))}

    def of(self, name: str) -> str:
        """ "add(%a, %b), ..." of "%name = s32[] add(%a, %b), ..."; "" if there is none."""
        value = self._values.get(name, "")
        passed = re.match(r"(?:copy|bitcast)\(%([\w.\-]+)\)", value)
        return self.of(passed[1]) if passed else value

    def operand(self, name: str, index: int) -> str:
        """The name of an instruction's operand; "" if it has not so many."""
        names = re.findall(r"%([\w.\-]+)", self.of(name).partition(")")[0])
        return names[index] if index < len(names) else ""


# --- one instruction ---------------------------------------------------------------------------

_OPCODES = "|".join((*KINDS, *_ALSO))
_LINE = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({_OPCODES})(-start)?\((.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


def _collective(line: str) -> Collective | None:
    """The collective that an instruction is or begins, run once; None if it is none."""
    found = _LINE.match(line)
    if found is None:
        return None
    result, opcode, start, rest = found.groups()
    kind, group = _ALSO.get(opcode, opcode), _group(rest)
    arrays = _ARRAY.findall(result)
    if start and kind in ("all-gather", "collective-permute"):
        arrays = arrays[1:2] if result.count("(") else arrays  # (operand, result, contexts)
        if result.startswith("(("):  # ((operands), (results), contexts)
            arrays = _ARRAY.findall(result.split("), (")[1].split("))")[0])
    # A reduce-scatter returns a device's share of what it adds up.
    whole = max(group, 1) if kind == "reduce-scatter" else 1
    size = whole * sum(array_bytes(dtype, shape) for dtype, shape in arrays)
    shapes = tuple(f"{dtype}[{shape}]" + f"x{whole}" * (whole > 1) for dtype, shape in arrays)
    source = re.search(r'op_name="([^"]*)"', rest)
    return Collective(kind, shapes, size, group, 1, False, source[1] if source else "")


def array_bytes(dtype: str, shape: str) -> int:
    """Bytes of an HLO array: ("bf16", "4,5"); pred and types under a byte take one a number."""
    bits = re.match(r"[a-z]+(\d+)", dtype)
    width = max(int(bits[1]) // 8, 1) if bits else 1
    return width * math.prod(int(n) for n in shape.split(",") if n)


def _group(attributes: str) -> int:
    """Devices of one replica group, in any of XLA's ways of writing them; 0 for all of them."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, _, part in axes)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    # A permutation has pairs: those that send to each other are as many as its longest cycle,
    # and each sends what it has once.
    return 2 if "source_target_pairs=" in attributes else 0

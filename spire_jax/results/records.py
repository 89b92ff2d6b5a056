"""The records that a report is made of, read and checked.

Training leaves ``metrics/<model>.jsonl``; evaluation leaves ``eval/<method>.jsonl``, one line
per context and context length, and ``eval/evaluation.json``. What is missing, torn, of another
experiment or not paired is an error that names the file and the row, never a gap in a table.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from spire_jax.config import schema
from spire_jax.config.schema import AUTOREGRESSIVE
from spire_jax.storage.paths import Place

EVALUATE_AGAIN = "run the stage `evaluate` again"
PIECES = ("accepted", "correction", "bonus", "target")  # where an emitted token came from


class ReportError(ValueError):
    """Records that are missing, torn or at odds; the message names the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """One method at one context length: sums over the contexts of each document.

    Rows are documents, in an order that all methods share. Without an oracle `depths` is 0;
    without decoded samples the decoder's rounds are all 0.
    """

    places: tuple[tuple[int, str, int], ...]  # (context, document, cut): what must be paired
    documents: tuple[str, ...]
    lengths: Float[np.ndarray, "documents depths"]  # tokens emitted by rounds of depth 1 .. k
    rounds: Float[np.ndarray, "documents depths"]
    reached: Float[np.ndarray, "documents depths"]  # rounds that reach depth d
    accepted: Float[np.ndarray, "documents depths"]  # rounds that accept at depth d
    decoder_lengths: Float[np.ndarray, " documents"]
    decoder_rounds: Float[np.ndarray, " documents"]
    accepted_counts: Float[np.ndarray, " outcomes"]  # decoded rounds with 0 .. k accepted


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All that a report is made of, read and checked."""

    counts: dict[str, dict[int, Counts]]  # method -> context length -> counts
    evaluation: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]


def read_inputs(workdir: Place, config: schema.ExperimentConfig) -> Inputs:
    """Read and check every record of a work directory.

    Raises ReportError for a file that is missing, torn, from another config, or not paired with
    the others (the same documents and cuts for every method and length).
    """
    evaluation_path = workdir / "eval" / "evaluation.json"
    evaluation = _parse(_text(evaluation_path, EVALUATE_AGAIN), evaluation_path, EVALUATE_AGAIN)
    _check_evaluation(evaluation, evaluation_path)
    names = [name for name, _ in config.drafts]
    counts = read_counts(workdir / "eval", [AUTOREGRESSIVE, *names], config)
    metrics = {}
    trained = [name for name in names if name in config.trained]
    for name in [*(() if config.pretrained.path else ("target",)), *trained]:
        path = workdir / "metrics" / f"{name}.jsonl"
        rows = _rows(path, f"train {name} again")
        for number, row in rows:
            for key in ("step", "tokens", "loss"):
                _get(row, key, (int, float), f"{path}:{number}")
        metrics[name] = [row for _, row in rows]
    return Inputs(counts, evaluation, metrics)


def read_counts(
    folder: Place, names: Sequence[str], config: schema.ExperimentConfig
) -> dict[str, dict[int, Counts]]:
    """Method -> context length -> counts, of the files ``<method>.jsonl`` of a folder.

    Raises ReportError for a file that is missing, torn, of another config, or of other contexts
    than the first method's.
    """
    counts = {name: _counts(folder / f"{name}.jsonl", name, config) for name in names}
    first = next(iter(counts[names[0]].values())).places
    for name, by_length in counts.items():
        for length, found in by_length.items():
            if found.places != first:
                odd = min(set(found.places) ^ set(first))
                raise ReportError(
                    f"{folder / name}.jsonl: the contexts of length {length} are not those of "
                    f"{names[0]}.jsonl (first difference: context {odd[0]}, document {odd[1]!r}, "
                    f"cut {odd[2]}); {EVALUATE_AGAIN}"
                )
    return counts


def _check_evaluation(evaluation: Any, path: Place) -> None:
    for key in ("corpus", "heldout_bits_per_byte", "machine", "timing"):
        _get(evaluation, key, dict, path)
    for name, row in evaluation["timing"].items():
        where = f"{path}: timing of {name}"
        _numbers(row, "tokens_per_s", len(_get(row, "tokens_per_s", list, where)), where)
        for key in ("context_length", "batch_size"):
            _get(row, key, int, where)
    for number, example in enumerate(_get(evaluation, "examples", list, path)):
        where = f"{path}: example {number}"
        for key in ("method", "document", "context_text"):
            _get(example, key, str, where)
        for piece in _get(example, "pieces", list, where):
            kind, text = piece if isinstance(piece, list) and len(piece) == 2 else (None, None)
            if kind not in PIECES or not isinstance(text, str):
                raise ReportError(
                    f"{where}: a piece should be [one of {PIECES}, text], not {piece!r}; "
                    f"{EVALUATE_AGAIN}"
                )


def _counts(path: Place, method: str, config: schema.ExperimentConfig) -> dict[int, Counts]:
    """Context length -> counts of one method's file."""
    rows: dict[int, dict[int, dict[str, Any]]] = {n: {} for n in config.eval.context_lengths}
    for number, row in _rows(path, EVALUATE_AGAIN):
        where = f"{path}:{number}"
        expected: dict[str, Any] = {"method": method, "output_length": config.eval.output_length}
        expected |= {} if method == AUTOREGRESSIVE else {"k": config.decode.k}
        for key, value in expected.items():
            if _get(row, key, type(value), where) != value:
                raise ReportError(
                    f"{where}: {key} is {row[key]!r} where the config has {value!r}: the records "
                    f"are of another experiment; {EVALUATE_AGAIN}"
                )
        length = _get(row, "context_length", int, where)
        if length not in rows:
            raise ReportError(
                f"{where}: context_length {length} is not in eval.context_lengths="
                f"{config.eval.context_lengths}; {EVALUATE_AGAIN}"
            )
        for key, kind in {"context": int, "document": str, "cut": int}.items():
            _get(row, key, kind, where)
        if row["context"] in rows[length]:
            raise ReportError(
                f"{where}: context {row['context']} of length {length} occurs twice; "
                f"{EVALUATE_AGAIN}"
            )
        rows[length][row["context"]] = row | {"where": where}
    for length, found in rows.items():
        if not found:
            raise ReportError(f"{path} has no row of context length {length}; {EVALUATE_AGAIN}")
    return {length: _sum_documents(list(found.values()), path) for length, found in rows.items()}


def _sum_documents(rows: list[dict[str, Any]], path: Place) -> Counts:
    documents = sorted({row["document"] for row in rows})
    row_of = {document: i for i, document in enumerate(documents)}
    oracles = [row.get("oracle") for row in rows]
    depths = {o["k"] if o else 0 for o in oracles}
    if len(depths) != 1:
        raise ReportError(
            f"{path}: the oracle's k differs between rows: {depths}; {EVALUATE_AGAIN}"
        )
    (depth,) = depths
    outcomes = {len((row.get("decoder") or {}).get("accepted_counts", ())) for row in rows}
    if len(outcomes) != 1:
        raise ReportError(
            f"{path}: decoder counts are missing, or of another k, in some rows; {EVALUATE_AGAIN}"
        )
    parts = {"lengths": "lengths_by_k", "rounds": "rounds_by_k", "reached": "reached",
             "accepted": "accepted"}  # fmt: skip
    sums: dict[str, Any] = {part: np.zeros((len(documents), depth)) for part in parts}
    sums |= {part: np.zeros(len(documents)) for part in ("decoder_lengths", "decoder_rounds")}
    sums["accepted_counts"] = np.zeros(outcomes.pop())
    for row in rows:
        i = row_of[row["document"]]
        if oracle := row.get("oracle"):
            for part, key in parts.items():
                sums[part][i] += _numbers(oracle, key, depth, row["where"])
        if decoder := row.get("decoder"):
            sums["decoder_lengths"][i] += _get(decoder, "lengths", (int, float), row["where"])
            sums["decoder_rounds"][i] += _get(decoder, "rounds", (int, float), row["where"])
            sums["accepted_counts"] += _numbers(
                decoder, "accepted_counts", len(sums["accepted_counts"]), row["where"]
            )
    places = sorted((row["context"], row["document"], row["cut"]) for row in rows)
    return Counts(places=tuple(places), documents=tuple(documents), **sums)


def _numbers(row: Mapping[str, Any], key: str, size: int, where: str) -> np.ndarray:
    values = _get(row, key, list, where)
    good = len(values) == size and all(isinstance(v, int | float) for v in values)
    if not good or not np.isfinite(values).all() or (values and min(values) < 0):
        raise ReportError(
            f"{where}: {key} should hold {size} finite numbers, not {values}; {EVALUATE_AGAIN}"
        )
    return np.asarray(values, float)


def _get(row: Any, key: str, kind: Any, where: Any) -> Any:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        raise ReportError(f"{where}: {key} is missing or of the wrong type ({value!r})")
    return value


def _text(path: Place, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReportError(f"{path} does not exist; {remedy}") from None


def _parse(text: str, where: Any, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ReportError(f"{where} is not whole JSON ({error}); {remedy}") from None


def _rows(path: Place, remedy: str) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file that holds at least one."""
    lines = enumerate(_text(path, remedy).split("\n"), start=1)
    rows = [(n, _parse(line, f"{path}:{n}", remedy)) for n, line in lines if line.strip()]
    if not rows:
        raise ReportError(f"{path} is empty; {remedy}")
    return rows

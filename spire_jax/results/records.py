"""The records that a report is made of, read and summed.

Training leaves ``metrics/<model>.jsonl``; evaluation leaves ``eval/<method>.jsonl``, one line
per context and context length, and ``eval/evaluation.json``. What is missing, torn or not paired
is an error that names the file, never a gap in a table. That they are of this experiment is what
the stages' stamps say.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from spire_jax.config import schema
from spire_jax.config.schema import AUTOREGRESSIVE
from spire_jax.config.values import parse_json
from spire_jax.storage.paths import Place

EVALUATE_AGAIN = "run the stage `evaluate` again"


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
    """All that a report is made of."""

    counts: dict[str, dict[int, Counts]]  # method -> context length -> counts
    evaluation: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]


def read_inputs(workdir: Place, config: schema.ExperimentConfig) -> Inputs:
    """Every record of a work directory.

    Raises ReportError for a file that is missing, torn, or not paired with the others (the same
    documents and cuts for every method and length).
    """
    path = workdir / "eval" / "evaluation.json"
    with _usable(path, EVALUATE_AGAIN):
        evaluation = parse_json(path.read_bytes())
    names = [name for name, _ in config.drafts]
    counts = read_counts(workdir / "eval", [AUTOREGRESSIVE, *names], config)
    metrics = {}
    trained = [name for name in names if name in config.trained]
    for name in [*(() if config.pretrained.path else ("target",)), *trained]:
        path = workdir / "metrics" / f"{name}.jsonl"
        with _usable(path, f"train {name} again"):
            metrics[name] = _rows(path)
    return Inputs(counts, evaluation, metrics)


def read_counts(
    folder: Place, names: Sequence[str], config: schema.ExperimentConfig
) -> dict[str, dict[int, Counts]]:
    """Method -> context length -> counts, of the files ``<method>.jsonl`` of a folder.

    Raises ReportError for a file that is missing, torn, or of other contexts than the first
    method's.
    """
    counts: dict[str, dict[int, Counts]] = {}
    for name in names:
        path = folder / f"{name}.jsonl"
        rows: dict[int, list[dict[str, Any]]] = {n: [] for n in config.eval.context_lengths}
        with _usable(path, EVALUATE_AGAIN):
            for row in _rows(path):
                rows[row["context_length"]].append(row)
            counts[name] = {length: _sum_documents(found) for length, found in rows.items()}
    first = next(iter(counts[names[0]].values())).places
    for name, by_length in counts.items():
        for length, found in by_length.items():
            for one, other in itertools.zip_longest(found.places, first):
                if one != other:
                    raise ReportError(
                        f"{folder / name}.jsonl: the contexts of length {length} are not those of "
                        f"{names[0]}.jsonl (context, document and cut {one}, there {other}); "
                        f"{EVALUATE_AGAIN}"
                    )
    return counts


def _sum_documents(rows: list[dict[str, Any]]) -> Counts:
    documents = sorted({row["document"] for row in rows})
    number = {document: i for i, document in enumerate(documents)}
    of_row = [number[row["document"]] for row in rows]

    def sums(part: str, key: str, *empty: int) -> np.ndarray:
        if rows[0].get(part) is None:
            return np.zeros((len(documents), *empty))
        values = np.array([row[part][key] for row in rows], float)
        total = np.zeros((len(documents), *values.shape[1:]))
        np.add.at(total, of_row, values)
        return total

    return Counts(
        places=tuple(sorted((row["context"], row["document"], row["cut"]) for row in rows)),
        documents=tuple(documents),
        lengths=sums("oracle", "lengths_by_k", 0),
        rounds=sums("oracle", "rounds_by_k", 0),
        reached=sums("oracle", "reached", 0),
        accepted=sums("oracle", "accepted", 0),
        decoder_lengths=sums("decoder", "lengths"),
        decoder_rounds=sums("decoder", "rounds"),
        accepted_counts=sums("decoder", "accepted_counts", 0).sum(axis=0),
    )


def _rows(path: Place) -> list[dict[str, Any]]:
    rows = [parse_json(line) for line in path.read_bytes().split(b"\n") if line]
    if not rows:
        raise ValueError("it is empty")
    return rows


@contextlib.contextmanager
def _usable(path: Place, remedy: str) -> Iterator[None]:
    """A ReportError for a file that is missing, or that is not what we wrote."""
    try:
        yield
    except FileNotFoundError:
        raise ReportError(f"{path} does not exist; {remedy}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise ReportError(f"{path} cannot be used ({error!r:.200}); {remedy}") from error

"""How tau grows with training: every draft at each of its kept checkpoints, and before training.

    python -m launch.bench.tau_by_tokens --config=configs/smollm2_135m.py --workdir=runs/smollm2

By the oracle, on the evaluation's contexts and one set of the target's samples for all, so that
differences are paired; MagicDec beside them. Keep the checkpoints with
`--config.train.checkpoints_kept`. Writes WORKDIR/tau_by_tokens.json.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import rich.console
import rich.table

from spire_jax.config.files import command_line, exit_with_error
from spire_jax.config.paths import path_or_url
from spire_jax.config.schema import ExperimentConfig, oracle_depth
from spire_jax.data.pipeline import most_frequent
from spire_jax.decoding.build import for_decoding
from spire_jax.models.transformer import Params
from spire_jax.results.evaluate import (
    about,
    choose_contexts,
    in_batches,
    oracle_records,
    sample_texts,
    target_pass,
)
from spire_jax.results.study import tau_by_depth
from spire_jax.storage.checkpoint_files import abstract_tree_of, read, read_metadata
from spire_jax.storage.metrics import Progress, write_whole
from spire_jax.training.tasks import draft_task, initial_draft, with_shared
from spire_jax.training.workdir import ERRORS, WorkDir


def stages_of(at: WorkDir, name: str, target: Params) -> Iterator[tuple[int, Params]]:
    """(steps, parameters) of a draft: before training, and at each checkpoint that was kept."""
    config, task = at.config, draft_task(at.config, name)
    rows = at.written_rows()

    def frequent(n: int) -> Any:
        return most_frequent(at.dataset, rows, config.target.n_tokens, n)

    fresh = initial_draft(config, name, task, target, at.mesh, frequent)
    yield 0, with_shared(task, fresh, target)
    folder = at.place(at.plan.drafts[name]) / "checkpoints"
    for path in sorted(folder.glob("[0-9]*"), key=lambda path: int(path.name)):
        state = read(path, abstract_tree_of(read_metadata(path)["leaves"]))
        yield (
            int(path.name),
            with_shared(task, {**state["params"], **state.get("fixed", {})}, target),
        )


def evaluate(at: WorkDir) -> list[dict[str, Any]]:
    """tau by (method, steps, context length, depth)."""
    config = at.config
    target = at.target()
    names = [name for name, _ in config.drafts]
    # Methods may share trained weights and differ in how they decode.
    drafts = {(name, steps): params
              for trained in dict.fromkeys(filter(None, map(config.weights, names)))
              for steps, params in stages_of(at, trained, target)
              for name in names if config.weights(name) == trained}  # fmt: skip
    cast, untrained = for_decoding(config, target, {})
    for (name, steps), params in drafts.items():
        drafts[name, steps] = for_decoding(config, target, {config.weights(name): params})[1][name]
    methods = drafts | {(name, 0): params for name, params in untrained.items()}
    contexts, per_step = choose_contexts(config, at.corpus), tokens_per_step(config)
    lengths, size = config.eval.context_lengths, config.eval.batch_size
    results = []
    total = len(lengths) * len(list(in_batches(len(contexts), size)))
    with Progress("tau by tokens", total=total) as progress:
        for length in lengths:
            records: dict[Any, list[Any]] = {key: [] for key in methods}
            for rows in in_batches(len(contexts), size):
                batch = [contexts[i] for i in rows]
                texts, cache = sample_texts(config, cast, batch, rows, length)
                along = target_pass(config, cast, names, texts, cache, length)
                places = [about(config, i, contexts[i], length) for i in dict.fromkeys(rows)]
                for (name, steps), params in methods.items():
                    found = oracle_records(
                        config, name, params, texts, along, length, oracle_depth(config)
                    )
                    records[name, steps] += [{"oracle": r} for r in found[: len(places)]]
                progress.advance()
            for (name, steps), lines in records.items():
                tokens = steps * per_step if config.weights(name) else None
                results.append({
                    "method": name, "steps": steps, "tokens": tokens,
                    "context_length": length, "contexts": len(lines), "tau": tau_by_depth(lines),
                })  # fmt: skip
    return results


def tokens_per_step(config: ExperimentConfig) -> int:
    return config.train.batch_size * config.train.seq_len


def print_table(results: Sequence[dict[str, Any]], k: int) -> None:
    lengths = sorted({r["context_length"] for r in results})
    table = rich.table.Table(title=f"tau by training tokens, k = {k}", title_justify="left")
    for column in ("method", "tokens", *(f"context {length}" for length in lengths)):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, steps in dict.fromkeys((r["method"], r["steps"]) for r in results):
        rows = {r["context_length"]: r for r in results
                if (r["method"], r["steps"]) == (method, steps)}  # fmt: skip
        seen = rows[lengths[0]]["tokens"]
        tokens = "-" if seen is None else f"{seen:,}"
        table.add_row(method, tokens, *(f"{rows[length]['tau'][k - 1]:.3f}" for length in lengths))
    rich.console.Console(highlight=False).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m launch.bench.tau_by_tokens", None,
                                     __doc__.split("\n", 1)[0])  # fmt: skip
    parser.add_argument("--workdir", type=path_or_url, required=True,
                        help="where the drafts were trained")  # fmt: skip
    args, config = command_line(parser, argv)
    try:
        at = WorkDir(config, args.workdir)
        with jax.set_mesh(at.mesh):
            results = evaluate(at)
    except ERRORS as error:
        exit_with_error(error)
    path = at.folder / "tau_by_tokens.json"
    write_whole(path, json.dumps(results, indent=1) + "\n")
    print_table(results, config.decode.k)
    print(path)


if __name__ == "__main__":
    main()

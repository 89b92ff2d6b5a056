"""Speed of a study on this machine: drafts trained together, and the oracle.

    bash launch/study.sh
    .venv/bin/python -m launch.bench.study --config=configs/study.py --workdir=runs/study

(about six minutes on 2 CPU cores, most of them compiling). Prints a line per figure. A step of all
drafts together is compared with the target's pass and the drafts' own steps, each by itself, in
one process on random tokens; the oracle is timed on the trained models of the work directory.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np

from launch.bench.command_line import count
from launch.bench.timing import interleaved
from spire_jax.config.files import command_line, ends_in_a_line
from spire_jax.config.paths import path_or_url
from spire_jax.config.schema import ExperimentConfig
from spire_jax.costs.hardware import describe
from spire_jax.data.pipeline import Batch
from spire_jax.models.sharding import make_mesh
from spire_jax.results.evaluate import (
    choose_contexts,
    in_batches,
    oracle_records,
    sample_texts,
    target_pass,
)
from spire_jax.results.study import tau_by_depth
from spire_jax.storage.checkpoints import Checkpoints
from spire_jax.training.loop import Learner, to_device, train
from spire_jax.training.tasks import (
    draft_task,
    init_params,
    initial_draft,
    target_task,
    teach,
    teacher,
)
from spire_jax.training.workdir import ERRORS, WorkDir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", type=path_or_url, default="runs/study",
                        help="of a finished run")  # fmt: skip
    parser.add_argument("--steps", type=count, default=6, help="steps of every timed piece")
    args, config = command_line(parser)
    print(" | ".join(describe().values()))
    bench_oracle(config, args.workdir)
    with jax.set_mesh(make_mesh(config.mesh)):
        bench_together(config, args.steps)


def bench_oracle(config: ExperimentConfig, workdir: str) -> None:
    """Seconds of the oracle for the studied draft at the longest context, from nothing."""
    name, length = config.study.of, max(config.eval.context_lengths)
    at = WorkDir(config, workdir)
    with jax.set_mesh(at.mesh):
        target, draft = at.target(), at.draft(name)
        contexts = choose_contexts(config, at.corpus)[: config.study.contexts]
        batches = list(in_batches(len(contexts), config.eval.batch_size))
        records: list[dict] = []

        def run(rows: list[int]) -> list[dict]:
            texts, cache = sample_texts(config, target, [contexts[i] for i in rows], rows, length)
            along = target_pass(config, target, [name], texts, cache, length)
            return oracle_records(config, name, draft, texts, along, length, config.decode.k)

        run(batches[0])  # compiles
        begin = time.perf_counter()
        for rows in batches:
            records += [{"oracle": record} for record in run(rows)[: len(set(rows))]]
        seconds = time.perf_counter() - begin
    print(f"oracle, {name}: {seconds:.1f} s for {len(contexts)} contexts of {length} and "
          f"{config.eval.output_length} output tokens, the target's samples and its pass over them "
          f"included; tau {tau_by_depth(records)[-1]:.3f}")  # fmt: skip


def bench_together(config: ExperimentConfig, steps: int) -> None:
    """A step of all drafts of one order of the batches against its parts."""
    mesh, settings = jax.sharding.get_mesh(), config.train
    settings = dataclasses.replace(settings, log_every=10**9, checkpoint_every=10**9)
    names = [name for name, draft in config.trained.items() if not draft.seed]
    full = dataclasses.replace(config, drafts=config.drafts + config.variants, variants=())
    tasks = [dataclasses.replace(draft_task(full, name), steps=1 + steps) for name in names]
    frozen = init_params(target_task(full).model, jax.random.key(0), mesh)
    taught_by = teacher(full, tasks)
    rng = np.random.default_rng(0)
    shape = (settings.batch_size, settings.seq_len)

    def batches(_: int) -> Iterator[Batch]:
        while True:
            tokens = rng.integers(0, full.target.n_tokens, (2, *shape), np.int32)
            yield Batch(tokens[0], tokens[1], np.ones(shape, bool), np.arange(shape[0]))

    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        learners = []
        for task in tasks:
            kept = stack.enter_context(Checkpoints(folder / task.name, kept=1, identity={}))
            initial = functools.partial(initial_draft, full, task.name, task, frozen, mesh)
            metrics = folder / f"{task.name}.jsonl"
            learner = Learner(task, settings, mesh, initial, kept, metrics, frozen)
            learners.append(stack.enter_context(learner))
        train(learners, settings, mesh, taught_by, frozen, batches)
        together = shape[0] * shape[1] / json.loads(metrics.read_text())["tokens_per_s"]
        batch = to_device(next(batches(0)), mesh)
        lesson = teach(taught_by, frozen, batch)
        work = {"the target's pass": lambda: jax.block_until_ready(teach(taught_by, frozen, batch))}
        for learner in learners:

            def run(learner=learner) -> None:
                learner.step(next(batches(0)), batch, lesson, False)
                learner.settle(0)

            work[learner.task.name] = run
        seconds = interleaved(work, steps)
    for name, value in seconds.items():
        print(f"training, {name}: {value:.2f} s a step of {shape[0]} x {shape[1]} tokens")
    parts = sum(seconds.values())
    print(f"training {len(names)} drafts together: {together:.2f} s a step, "
          f"{together / parts:.2f} times the sum of the above ({parts:.2f} s)")  # fmt: skip


if __name__ == "__main__":
    with ends_in_a_line(*ERRORS):
        main()

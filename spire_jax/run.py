"""The whole pipeline: target -> (its continuations) -> drafts -> evaluate -> report -> study.

    python -m spire_jax.run --config=configs/quickstart.py --workdir=runs/quickstart
    python -m spire_jax.run --config=... --workdir=... --stages=evaluate,report --config.decode.k=8

Every stage can be resumed. A stage is identified by the config values that it uses and by the
stages before it. One that is complete is skipped, one that was interrupted goes on. Training that
was made from other values is refused, with the values that differ; evaluations and reports made
from other values are set aside under their own hash, since making them again is cheap.
"""

import argparse
import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console

from spire_jax.config.files import command_line, in_words, is_out_of_memory
from spire_jax.config.identity import Stage, batch_seed
from spire_jax.config.paths import path_or_url
from spire_jax.config.readers import STAGES
from spire_jax.config.schema import ConfigError, ExperimentConfig
from spire_jax.config.values import to_dict
from spire_jax.data.pipeline import most_frequent, train_batches
from spire_jax.decoding.build import for_decoding
from spire_jax.models.transformer import Params
from spire_jax.results.evaluate import choose_contexts, evaluate
from spire_jax.results.records import ReportError
from spire_jax.results.report import print_table, write_report
from spire_jax.results.study import evaluate_study, study_config
from spire_jax.results.study_report import print_study, write_study
from spire_jax.storage.bucket import check_bucket, in_bucket, trouble
from spire_jax.storage.checkpoints import Checkpoints, save_params
from spire_jax.storage.metrics import write_whole
from spire_jax.storage.paths import free_bytes, locate, read_record
from spire_jax.storage.processes import (
    PREEMPTED,
    Preempted,
    add_arguments,
    by_first,
    check_alike,
    ends_on_sigterm,
    facts,
    is_first,
    of_first,
    only_one,
    say,
    start,
)
from spire_jax.training.continuations import write_continuations, written
from spire_jax.training.loop import Learner, train
from spire_jax.training.tasks import (
    Task,
    Teacher,
    draft_task,
    init_params,
    initial_draft,
    stream_key,
    target_task,
    teacher,
)
from spire_jax.training.workdir import ERRORS, WorkDir


class Pipeline:
    """The stages of one config in one work directory."""

    def __init__(self, config: ExperimentConfig, workdir: str | os.PathLike[str]):
        self.config, self.at = config, WorkDir(config, workdir)
        self.console = Console(stderr=True)

    def run(self, stages: Sequence[str]) -> dict[str, Any] | None:
        """Run the stages named, in order; returns the report's summary if it was among them."""
        names = list(self.config.trained)
        if not stages:
            raise ConfigError(f"--stages is empty; there are {[*STAGES, *names]}")
        unknown = set(stages) - set(STAGES) - set(names)
        if unknown:
            raise ConfigError(f"--stages: unknown {sorted(unknown)}; there are {[*STAGES, *names]}")
        if "study" in stages and not self.config.study.of and set(stages) != set(STAGES):
            raise ConfigError("--stages=study: the config names no study; set study.of to a draft")
        chosen = [name for name in names if "drafts" in stages or name in stages]
        self._check_workdir("target" in stages, chosen)
        self._check_continuations("continuations" in stages, chosen)
        study = "study" in stages and self.config.study.of
        # What would fail after hours of training fails now.
        if "evaluate" in stages:
            choose_contexts(self.config, self.at.corpus)
        if study:
            choose_contexts(study_config(self.config), self.at.corpus)
        summary = None
        with jax.set_mesh(self.at.mesh):
            if "target" in stages:
                self.train_target()
            if "continuations" in stages:
                self.write_continuations()
            self.train_drafts(chosen)
            if "evaluate" in stages:
                self.evaluate()
            if "report" in stages:
                summary = self.report()
            if study:
                self.study()
        return summary

    # --- training ------------------------------------------------------------------------------

    def train_target(self) -> None:
        """Train the target, unless it is complete, or pretrained."""
        task = target_task(self.config)
        key = stream_key(self.config.seed, "init target")
        job = _Job(self.at.plan.target, task, lambda: init_params(task.model, key, self.at.mesh))
        self._train([job], batch_seed(self.config.seed, 0), None, None)

    def write_continuations(self) -> None:
        """Let the target write the rows that drafts are trained on besides text."""
        stage = self.at.plan.continuations
        if stage is None or self._continuations_left() == 0:
            return
        target, _ = for_decoding(self.config, self.at.target(), {})
        write_continuations(self.config, target, self.at.corpus, self.at.place(stage), stage.values)

    def _continuations_left(self) -> int:
        """Rows that are still to be written."""
        stage = self.at.plan.continuations
        if stage is None:
            return 0
        return self.config.continuations.rows - written(self.at.place(stage), stage.values)

    def _check_continuations(self, to_write: bool, drafts: Sequence[str]) -> None:
        """Fail before anything expensive: rows of another config, rows that drafts would miss."""
        waiting = self._untrained(drafts)
        left = self._continuations_left()
        if left and waiting and not to_write:
            raise ConfigError(
                f"{left} of continuations.rows={self.config.continuations.rows} are not written in "
                f"{self.at.folder}; run --stages=continuations first"
            )

    def train_drafts(self, names: Sequence[str]) -> None:
        """Train drafts on the frozen target, those of the same batches together."""
        names = self._untrained(names)
        if not names:
            return
        target, trained = self.at.target(), self.config.trained
        rows, n_tokens = self.at.written_rows(), self.config.target.n_tokens
        frequent = functools.partial(most_frequent, self.at.dataset, rows, n_tokens)
        for seed in sorted({trained[name].seed for name in names}):
            tasks = {name: draft_task(self.config, name)
                     for name in names if trained[name].seed == seed}  # fmt: skip
            jobs = [
                _Job(self.at.plan.drafts[name], task, functools.partial(
                    initial_draft, self.config, name, task, target, self.at.mesh, frequent))
                for name, task in tasks.items()
            ]  # fmt: skip
            order = batch_seed(self.config.seed, seed)
            self._train(jobs, order, teacher(self.config, list(tasks.values())), target)

    def _untrained(self, drafts: Sequence[str]) -> list[str]:
        return [name for name in drafts if not self.at.trained(self.at.plan.drafts[name])]

    def _train(
        self, jobs: Sequence["_Job"], order: int, taught_by: Teacher | None, frozen: Params
    ) -> None:
        """Train what is not complete."""
        jobs = [job for job in jobs if not self.at.trained(job.stage)]
        if not jobs:
            return
        config, metrics, dataset = self.config.train, self.at.folder / "metrics", self.at.dataset
        rows = self.at.written_rows() if frozen is not None else None

        def describe(example: int) -> str:
            if rows is not None and example >= rows.first_example:
                return rows.describe(example)
            return dataset.describe(example)

        def batches(examples: int):
            return train_batches(
                dataset,
                batch_size=config.batch_size,
                seed=order,
                start_example=examples,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                workers=self.config.data.workers,
                written=rows,
                written_share=self.config.continuations.share,
            )

        with contextlib.ExitStack() as stack:
            learners = []
            for job in jobs:
                checkpoints = stack.enter_context(self._checkpoints(job.stage))
                path = metrics / f"{job.task.name}.jsonl"
                events = self.at.folder / "tensorboard" / job.task.name
                learner = Learner(
                    job.task, config, self.at.mesh, job.initial, checkpoints, path, frozen, events
                )
                learners.append(stack.enter_context(learner))
            train(learners, config, self.at.mesh, taught_by, frozen, batches, describe)
        for job, learner in zip(jobs, learners, strict=True):
            save_params(self.at.place(job.stage) / "params", learner.params, job.stage.values)

    def _checkpoints(self, stage: Stage) -> Checkpoints:
        """CheckpointError where those that are there are another config's."""
        kept = self.config.train.checkpoints_kept
        return Checkpoints(self.at.place(stage) / "checkpoints", kept=kept, identity=stage.values)

    # --- evaluation and report -----------------------------------------------------------------

    def evaluate(self) -> None:
        """Evaluate every method, unless that is done."""
        stage = self.at.plan.evaluate
        if self.at.current(stage):
            return
        target = self.at.target()
        drafts = {name: self.at.draft(name, target)
                  for name, _ in self.config.drafts if name in self.config.trained}  # fmt: skip
        self._set_aside(stage)
        evaluate(self.config, target, drafts, self.at.dataset, self.at.place(stage))
        self.at.stamp(stage)

    def report(self) -> dict[str, Any]:
        """Write the report, unless it is there; returns its summary."""
        plan = self.at.plan
        if not self.at.current(plan.evaluate):
            raise ConfigError(f"{self.at.place(plan.evaluate)} holds no evaluation of this config; "
                              f"run --stages=evaluate first")  # fmt: skip
        if not self.at.current(plan.report) and is_first():
            self._set_aside(plan.report)
            write_report(self.at.folder, self.config, stages=plan.hashes)
            self.at.stamp(plan.report)
        of_first(True)  # it is there
        return read_record(self.at.place(plan.report) / "summary.json")

    def study(self) -> None:
        """Evaluate every variant and write what the study found, unless it is there."""
        stage = self.at.plan.study
        assert stage is not None  # `run` asks whether the config names one
        folder = self.at.place(stage)
        if not self.at.current(stage):
            target = self.at.target()
            drafts = {name: self.at.draft(name, target) for name in self.config.trained}
            self._set_aside(stage)
            evaluate_study(self.config, target, drafts, self.at.dataset, folder)
            if is_first():
                write_study(self.config, folder)
            self.at.stamp(stage)
        if is_first():
            print_study(folder, Console(stderr=False))

    def _set_aside(self, stage: Stage) -> None:
        if said := self.at.set_aside(stage):
            self.console.print(said)

    def _check_workdir(self, with_target: bool, drafts: Sequence[str]) -> None:
        """Fail before anything expensive: identities, and room on the disk."""
        plan, config = self.at.plan, self.config
        wanted = [(plan.target, target_task(config))] if with_target else []
        wanted += [(plan.drafts[name], draft_task(config, name)) for name in drafts]
        need = 0
        for stage, task in wanted:
            if not self.at.trained(stage):
                with self._checkpoints(stage):
                    pass
                copies = 3 * (config.train.checkpoints_kept + 1) + 1
                need += 4 * task.model.count() * copies
        free = free_bytes(self.at.folder)
        if need > free:
            raise ConfigError(
                f"--workdir={self.at.folder} has {free / 1e9:.2f} GB free, but checkpoints need "
                f"about {need / 1e9:.2f} GB; free some, or lower train.checkpoints_kept"
            )


class _Job(NamedTuple):
    """What is to be trained."""

    stage: Stage
    task: Task
    initial: Callable[[], Params]


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m spire_jax.run", None, __doc__, formatter_class=raw)
    parser.add_argument("--workdir", type=path_or_url, required=True,
                        help="where everything is written")  # fmt: skip
    choices = f"comma-separated, of {', '.join(STAGES)} or a draft's name; by default all"
    parser.add_argument("--stages", default=",".join(STAGES), help=choices)
    add_arguments(parser)
    args, config = command_line(parser, argv)
    # Orbax logs the traceback of a failed save thread by thread; CheckpointError says it in a line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        start(args)
        with ends_on_sigterm():
            check_alike({**facts(), "stages": args.stages, "config": to_dict(config)})
            if in_bucket(workdir := locate(args.workdir)):
                by_first(functools.partial(check_bucket, workdir))
            pipeline = Pipeline(config, args.workdir)
            check_alike({"data": pipeline.at.corpus.sha256, "stages": pipeline.at.plan.hashes})
            with only_one(pipeline.at.folder):
                values = json.dumps(to_dict(config), indent=1)
                write_whole(pipeline.at.folder / "config.json", values)
                summary = pipeline.run([s for s in args.stages.split(",") if s])
    except (*ERRORS, ReportError) as error:
        nameless = isinstance(error, OSError) and error.filename is None
        where = f" (work directory: {args.workdir})" if nameless else ""
        say(f"error: {in_words(error)}{where}")
        return 2
    except Preempted as stopped:
        say(f"{stopped}; the same command goes on")
        return PREEMPTED
    except Exception as error:
        said = in_words(error) if is_out_of_memory(error) else trouble(error)
        if said is None:
            raise
        say(f"error: {said} (work directory: {args.workdir})")
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if summary is not None and is_first():
        console = Console()
        print_table(summary, console)
        console.print(f"report: {pipeline.at.folder / 'report' / 'index.html'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

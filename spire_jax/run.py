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
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from spire_jax.config.files import command_line
from spire_jax.config.identity import batch_seed, differences, plan
from spire_jax.config.schema import (
    ConfigError,
    ExperimentConfig,
    digest,
    to_dict,
)
from spire_jax.data.pipeline import Dataset, WrittenRows, most_frequent, train_batches
from spire_jax.data.sources import Corpus, DataError, load_corpus
from spire_jax.decoding import DecodeError
from spire_jax.models.sharding import check_mesh, make_mesh, shardings
from spire_jax.models.transformer import Params
from spire_jax.pretrained import PretrainedError
from spire_jax.pretrained.checkpoint import open_checkpoint
from spire_jax.results.evaluate import choose_contexts, evaluate, for_decoding
from spire_jax.results.records import ReportError
from spire_jax.results.report import print_table, write_report
from spire_jax.results.study import evaluate_study, study_config
from spire_jax.results.study_report import print_study, write_study
from spire_jax.storage.bucket import check_bucket, in_bucket, trouble
from spire_jax.storage.checkpoints import (
    CheckpointError,
    Checkpoints,
    has_params,
    load_params,
    save_params,
)
from spire_jax.storage.metrics import MetricsError, write_whole
from spire_jax.storage.paths import Place, cache_folder, free_bytes, locate, move_aside
from spire_jax.storage.processes import (
    PREEMPTED,
    Preempted,
    ProcessError,
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
from spire_jax.training.continuations import read_continuations, write_continuations, written
from spire_jax.training.loop import Learner, TrainingError, train
from spire_jax.training.tasks import (
    Task,
    Teacher,
    draft_task,
    init_params,
    initial_draft,
    stream_key,
    target_task,
    teacher,
    with_shared,
)

ERRORS = (  # what a user can mend: shown without a traceback
    ConfigError, DataError, CheckpointError, MetricsError, TrainingError, DecodeError, ReportError,
    PretrainedError, ProcessError, OSError,
)  # fmt: skip
STAGES = ("target", "continuations", "drafts", "evaluate", "report", "study")


class Pipeline:
    """The stages of one config in one work directory."""

    def __init__(self, config: ExperimentConfig, workdir: str | os.PathLike[str]):
        self.config = config
        self.workdir = locate(workdir)
        self.console = Console(stderr=True)
        self.mesh = make_mesh(config.mesh)
        check_mesh(self.mesh, config)
        self.corpus: Corpus = load_corpus(config.data, cache_folder(self.workdir))
        self.dataset = Dataset(self.corpus, config.train.seq_len)
        self.pretrained = open_checkpoint(path) if (path := config.pretrained.path) else None
        of_target = self.target_sha256 if self.pretrained else ""
        self.plan = plan(config, self.corpus.sha256, of_target)

    def run(self, stages: Sequence[str]) -> dict[str, Any] | None:
        """Run the stages named, in order; returns the report's summary if it was among them."""
        names = [name for name, _ in self.config.trained]
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
            choose_contexts(self.config, self.corpus)
        if study:
            choose_contexts(study_config(self.config), self.corpus)
        summary = None
        with jax.set_mesh(self.mesh):
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
        jobs = {"target": (task, lambda: init_params(task.model, key, self.mesh))}
        self._train(jobs, self.config.seed, None, None)

    def write_continuations(self) -> None:
        """Let the target write the rows that drafts are trained on besides text."""
        stage, folder = "continuations", self.workdir / "continuations"
        if not self.config.continuations.rows or self._continuations_left() == 0:
            return
        target, _ = for_decoding(self.config, self.params("target"), {})
        write_continuations(self.config, target, self.corpus, folder, self.plan.stages[stage])

    def _continuations_left(self) -> int:
        """Rows that are still to be written."""
        if not self.config.continuations.rows:
            return 0
        folder, values = self.workdir / "continuations", self.plan.stages["continuations"]
        return self.config.continuations.rows - written(folder, values)

    def _check_continuations(self, to_write: bool, drafts: Sequence[str]) -> None:
        """Fail before anything expensive: rows of another config, rows that drafts would miss."""
        waiting = [name for name in drafts if not self._complete(f"draft {name}")]
        left = self._continuations_left()
        if left and waiting and not to_write:
            raise ConfigError(
                f"{left} of continuations.rows={self.config.continuations.rows} are not written in "
                f"{self.workdir}; run --stages=continuations first"
            )

    def train_drafts(self, names: Sequence[str]) -> None:
        """Train drafts on the frozen target, those of the same batches together."""
        names = [name for name in names if not self._complete(f"draft {name}")]
        if not names:
            return
        target = self.params("target")
        rows, n_tokens = self.written_rows(), self.config.target.n_tokens
        frequent = functools.partial(most_frequent, self.dataset, rows, n_tokens)
        for seed in sorted({self.config.draft(name).seed for name in names}):
            tasks = {name: draft_task(self.config, name)
                     for name in names if self.config.draft(name).seed == seed}  # fmt: skip
            jobs = {
                f"draft {name}": (task, functools.partial(
                    initial_draft, self.config, name, task, target, self.mesh, frequent))
                for name, task in tasks.items()
            }  # fmt: skip
            order = batch_seed(self.config.seed, seed)
            self._train(jobs, order, teacher(self.config, list(tasks.values())), target)

    def _train(
        self,
        jobs: Mapping[str, tuple[Task, Callable[[], Params]]],
        order: int,
        taught_by: Teacher | None,
        frozen: Params,
    ) -> None:
        """Train what is not complete of stage -> (task, its initial parameters)."""
        jobs = {stage: job for stage, job in jobs.items() if not self._complete(stage)}
        if not jobs:
            return
        config, metrics = self.config.train, self.workdir / "metrics"
        rows = self.written_rows() if frozen is not None else None

        def describe(example: int) -> str:
            if rows is not None and example >= rows.first_example:
                return rows.describe(example)
            return self.dataset.describe(example)

        def batches(examples: int):
            return train_batches(
                self.dataset,
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
            for stage, (task, initial) in jobs.items():
                checkpoints = stack.enter_context(
                    Checkpoints(self._folder(stage) / "checkpoints", kept=config.checkpoints_kept,
                                identity=self.plan.stages[stage])
                )  # fmt: skip
                path = metrics / f"{task.name}.jsonl"
                events = self.workdir / "tensorboard" / task.name
                learner = Learner(
                    task, config, self.mesh, initial, checkpoints, path, frozen, events
                )
                learners.append(stack.enter_context(learner))
            train(learners, config, self.mesh, taught_by, frozen, batches, describe)
        for stage, learner in zip(jobs, learners, strict=True):
            save_params(self._folder(stage) / "params", learner.params, self.plan.stages[stage])

    def written_rows(self) -> WrittenRows | None:
        """The target's continuations, where the config asks for them."""
        if not self.config.continuations.rows:
            return None
        return read_continuations(self.workdir / "continuations", len(self.dataset))

    def params(self, stage: str, target: Params = None) -> Params:
        """The parameters of a finished stage, on the mesh; an error says what to run first.

        `target` lends a draft what it shares with the target; it is loaded unless given.
        """
        task = (
            target_task(self.config)
            if stage == "target"
            else draft_task(self.config, stage.removeprefix("draft "))
        )
        if not self._complete(stage):
            name = "target" if stage == "target" else "drafts"
            raise ConfigError(
                f"{stage} is not trained in {self.workdir}; run --stages={name} first"
            )
        if stage == "target" and self.pretrained is not None:
            return self.pretrained.load(task.model, self.mesh, self.config.pretrained.dtype)
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            task.model.shapes(),
            shardings(self.mesh, task.model.axes()),
        )
        own = {name: value for name, value in abstract.items() if name not in task.shared}
        params = load_params(self._folder(stage) / "params", own, self.plan.stages[stage])
        if not task.shared:
            return params
        return with_shared(task, params, self.params("target") if target is None else target)

    @functools.cached_property
    def target_sha256(self) -> str:
        """The hash of the target's weights: of its checkpoint, or of what was trained here."""
        if self.pretrained is not None:
            return self.pretrained.cached_sha256(cache_folder(self.workdir))
        content = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params("target")):
            content.update(jax.tree_util.keystr(path).encode())
            content.update(np.ascontiguousarray(leaf).tobytes())
        return content.hexdigest()

    # --- evaluation and report -----------------------------------------------------------------

    def evaluate(self) -> None:
        """Evaluate every method, unless that is done."""
        folder = self.workdir / "eval"
        if self._current(folder, "evaluate"):
            return
        target = self.params("target")
        drafts = {name: self.params(f"draft {name}", target) for name, _ in self.config.drafts}
        self._set_aside(folder, "evaluate")
        evaluate(self.config, target, drafts, self.dataset, folder)
        self._stamp(folder, "evaluate")

    def report(self) -> dict[str, Any]:
        """Write the report, unless it is there; returns its summary."""
        folder = self.workdir / "report"
        if not self._current(self.workdir / "eval", "evaluate"):
            raise ConfigError(f"{self.workdir / 'eval'} holds no evaluation of this config; run "
                              f"--stages=evaluate first")  # fmt: skip
        if not self._current(folder, "report") and is_first():
            self._set_aside(folder, "report")
            write_report(self.workdir, self.config, stages=self.plan.hashes)
            self._stamp(folder, "report")
        of_first(True)  # it is there
        return json.loads((folder / "summary.json").read_text())

    def study(self) -> None:
        """Evaluate every variant and write what the study found, unless it is there."""
        folder = self.workdir / "study"
        if not self._current(folder, "study"):
            target = self.params("target")
            drafts = {name: self.params(f"draft {name}", target)
                      for name, _ in self.config.trained}  # fmt: skip
            self._set_aside(folder, "study")
            evaluate_study(self.config, target, drafts, self.dataset, folder)
            if is_first():
                write_study(self.config, folder)
            self._stamp(folder, "study")
        if is_first():
            print_study(folder, Console(stderr=False))

    # --- what is in the work directory ---------------------------------------------------------

    def _folder(self, stage: str) -> Place:
        draft = stage.removeprefix("draft ")
        return self.workdir / "target" if stage == "target" else self.workdir / "drafts" / draft

    def _complete(self, stage: str) -> bool:
        """Whether a training stage is finished; CheckpointError if it is another config's."""
        if stage == "target" and self.pretrained is not None:
            return True
        folder = self._folder(stage) / "params"
        if not has_params(folder):
            return False
        load_params(folder, None, self.plan.stages[stage], check_only=True)
        return True

    def _current(self, folder: Place, stage: str) -> bool:
        stamp = folder / "identity.json"
        return of_first(stamp.exists() and json.loads(stamp.read_text()) == self.plan.stages[stage])

    def _stamp(self, folder: Place, stage: str) -> None:
        write_whole(folder / "identity.json", json.dumps(self.plan.stages[stage], indent=1))

    def _set_aside(self, folder: Place, stage: str) -> None:
        """Move results of other values out of the way, under the hash of those values."""
        stamp = folder / "identity.json"
        if not is_first() or not stamp.exists():
            return
        old = json.loads(stamp.read_text())
        kept = folder.with_name(f"{folder.name}-{digest(old)}")
        move_aside(folder, kept, stamp.name)  # over one of the same values: the same results
        changed = differences(old, self.plan.stages[stage])
        self.console.print(f"{folder.name}/ was made with {changed}; kept as {kept.name}/")

    def _check_workdir(self, with_target: bool, drafts: Sequence[str]) -> None:
        """Fail before anything expensive: identities, and room on the disk."""
        wanted = [*(["target"] if with_target else []), *(f"draft {name}" for name in drafts)]
        need = 0
        for stage in wanted:
            if self._complete(stage):
                continue
            with Checkpoints(
                self._folder(stage) / "checkpoints",
                kept=self.config.train.checkpoints_kept,
                identity=self.plan.stages[stage],
            ):
                pass
            task = (target_task(self.config) if stage == "target"
                    else draft_task(self.config, stage.removeprefix("draft ")))  # fmt: skip
            copies = 3 * (self.config.train.checkpoints_kept + 1) + 1
            need += 4 * task.model.count() * copies
        free = free_bytes(self.workdir)
        if need > free:
            raise ConfigError(
                f"--workdir={self.workdir} has {free / 1e9:.2f} GB free, but checkpoints need "
                f"about {need / 1e9:.2f} GB; free some, or lower train.checkpoints_kept"
            )


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m spire_jax.run", None, __doc__, formatter_class=raw)
    parser.add_argument("--workdir", required=True, help="where everything is written")
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
            check_alike({"data": pipeline.corpus.sha256, "stages": pipeline.plan.hashes})
            with only_one(pipeline.workdir):
                values = json.dumps(to_dict(config), indent=1)
                write_whole(pipeline.workdir / "config.json", values)
                summary = pipeline.run([s for s in args.stages.split(",") if s])
    except ERRORS as error:
        nameless = isinstance(error, OSError) and error.filename is None
        where = f" (work directory: {args.workdir})" if nameless else ""
        say(f"error: {error}{where}")
        return 2
    except Preempted as stopped:
        say(f"{stopped}; the same command goes on")
        return PREEMPTED
    except Exception as error:
        if (said := trouble(error)) is None:
            raise
        say(f"error: {said} (work directory: {args.workdir})")
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if summary is not None and is_first():
        console = Console()
        print_table(summary, console)
        console.print(f"report: {pipeline.workdir / 'report' / 'index.html'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

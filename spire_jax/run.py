"""The whole pipeline: target -> drafts -> evaluate -> report -> study, each stage resumable.

    python -m spire_jax.run --config=configs/quickstart.py --workdir=runs/quickstart
    python -m spire_jax.run --config=... --workdir=... --stages=evaluate,report --config.decode.k=8

A stage is identified by the config values that it uses and by the stages before it. One that is
complete is skipped, one that was interrupted goes on. Training that was made from other values
is refused, with the values that differ; evaluations and reports made from other values are set
aside under their own hash, since making them again is cheap.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import json
import logging
import os
import pathlib
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from spire_jax.checkpoints import CheckpointError, Checkpoints, load_params, save_params
from spire_jax.config import (
    ConfigError,
    DraftConfig,
    ExperimentConfig,
    digest,
    draft_model,
    identity,
    oracle_depth,
    self_drafting,
    to_dict,
    trained_depth,
)
from spire_jax.config_files import command_line
from spire_jax.data.pipeline import Dataset, train_batches
from spire_jax.data.sources import Corpus, DataError, load_corpus
from spire_jax.decode import DecodeError
from spire_jax.evaluate import choose_contexts, evaluate
from spire_jax.metrics import MetricsError, write_whole
from spire_jax.models.transformer import Params
from spire_jax.report import print_table, write_report
from spire_jax.report_records import ReportError
from spire_jax.sharding import check_mesh, make_mesh, shardings
from spire_jax.study import evaluate_study, study_config
from spire_jax.study_report import print_study, write_study
from spire_jax.tasks import (
    Task,
    Teacher,
    draft_task,
    init_params,
    initial_draft,
    stream_key,
    target_task,
    teacher,
)
from spire_jax.train import Learner, TrainingError, train

ERRORS = (  # what a user can mend: shown without a traceback
    ConfigError, DataError, CheckpointError, MetricsError, TrainingError, DecodeError, ReportError,
    OSError,
)  # fmt: skip
STAGES = ("target", "drafts", "evaluate", "report", "study")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every stage is made from; the hash of each entry identifies that stage."""

    stages: dict[str, dict[str, Any]]  # stage or "draft <name>" -> the values that it uses

    @property
    def hashes(self) -> dict[str, str]:
        return {name: digest(values) for name, values in self.stages.items()}


def plan(config: ExperimentConfig, corpus_sha256: str) -> Plan:
    """The identity of every stage of `config` on a corpus."""
    train_values = identity(config.train)
    train_values.pop("k")
    data = {"corpus": corpus_sha256, "seed": config.seed}
    stages = {"target": {**data, "target": identity(config.target), "train": train_values}}
    made = {"target": digest(stages["target"])}
    for name, draft in config.trained:
        stage = f"draft {name}"
        rollout = {"k": trained_depth(config, name)} if draft.kind == "spire" else {}
        stages[stage] = {
            **data,
            "draft": _used(draft),
            "sizes": identity(draft_model(config.target, draft)),
            "train": train_values | rollout,
            "made_from": {"target": made["target"]},
        }
        made[stage] = digest(stages[stage])
    evaluation = {
        "eval": identity(config.eval),
        "decode": identity(config.decode),
        "depth": oracle_depth(config),
        "made_from": {n: h for n, h in made.items()
                      if n.removeprefix("draft ") not in dict(config.variants)},
    }  # fmt: skip
    if self_drafting(config):
        evaluation["magicdec"] = identity(config.magicdec)
    stages["evaluate"] = evaluation
    stages["report"] = {
        "throughput": identity(config.throughput),
        "magicdec": identity(config.magicdec),
        "made_from": {"evaluate": digest(evaluation)},
    }
    if config.study.of:
        stages["study"] = {
            "study": identity(config.study),
            "eval": {"output_length": config.eval.output_length,
                     "batch_size": config.eval.batch_size, "bootstrap": config.eval.bootstrap},
            "decode": identity(config.decode),
            "magicdec": identity(config.magicdec),
            "throughput": identity(config.throughput),
            "made_from": made,
        }  # fmt: skip
    return Plan(stages)


def _used(draft: DraftConfig) -> dict[str, Any]:
    """The values of a draft that its training reads."""
    values = identity(draft)
    unused = ["k"] if draft.steps or draft.peak_lr else ["k", "steps", "peak_lr"]
    if draft.kind == "vanilla":
        unused += ["attend_self", "feedback", "memory", "memory_init"]
    if draft.loss != "mixed":
        unused.append("omega")
    return {key: value for key, value in values.items() if key not in unused}


def batch_seed(seed: int, draft_seed: int) -> int:
    """The order of a draft's batches; by default the target's."""
    return zlib.crc32(f"{seed}/{draft_seed}".encode()) if draft_seed else seed


class Pipeline:
    """The stages of one config in one work directory."""

    def __init__(self, config: ExperimentConfig, workdir: str | os.PathLike[str]):
        self.config = config
        self.workdir = pathlib.Path(workdir).absolute()
        self.console = Console(stderr=True)
        self.mesh = make_mesh(config.mesh)
        check_mesh(self.mesh, config)
        self.corpus: Corpus = load_corpus(config.data, self.workdir)
        self.dataset = Dataset(self.corpus, config.train.seq_len)
        self.plan = plan(config, self.corpus.sha256)

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
        """Train the target, unless it is complete."""
        task = target_task(self.config)
        key = stream_key(self.config.seed, "init target")
        jobs = {"target": (task, lambda: init_params(task.model, key, self.mesh))}
        self._train(jobs, self.config.seed, None, None)

    def train_drafts(self, names: Sequence[str]) -> None:
        """Train drafts on the frozen target, those of the same batches together."""
        names = [name for name in names if not self._complete(f"draft {name}")]
        target = self.params("target") if names else None
        for seed in sorted({self.config.draft(name).seed for name in names}):
            tasks = {name: draft_task(self.config, name)
                     for name in names if self.config.draft(name).seed == seed}  # fmt: skip
            jobs = {
                f"draft {name}": (task, functools.partial(
                    initial_draft, self.config, name, task, target, self.mesh))
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
        metrics.mkdir(exist_ok=True)

        def batches(examples: int):
            return train_batches(
                self.dataset,
                batch_size=config.batch_size,
                seed=order,
                start_example=examples,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                workers=self.config.data.workers,
            )

        with contextlib.ExitStack() as stack:
            learners = []
            for stage, (task, initial) in jobs.items():
                checkpoints = stack.enter_context(
                    Checkpoints(self._folder(stage) / "checkpoints", kept=config.checkpoints_kept,
                                identity=self.plan.stages[stage])
                )  # fmt: skip
                path = metrics / f"{task.name}.jsonl"
                learner = Learner(task, config, self.mesh, initial, checkpoints, path)
                learners.append(stack.enter_context(learner))
            train(learners, config, self.mesh, taught_by, frozen, batches, self.dataset.describe)
        for stage, learner in zip(jobs, learners, strict=True):
            save_params(
                self._folder(stage) / "params", learner.state["params"], self.plan.stages[stage]
            )

    def params(self, stage: str) -> Params:
        """The parameters of a finished stage, on the mesh; an error says what to run first."""
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
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            task.model.shapes(),
            shardings(self.mesh, task.model.axes()),
        )
        return load_params(self._folder(stage) / "params", abstract, self.plan.stages[stage])

    # --- evaluation and report -----------------------------------------------------------------

    def evaluate(self) -> None:
        """Evaluate every method, unless that is done."""
        folder = self.workdir / "eval"
        if self._current(folder, "evaluate"):
            return
        target = self.params("target")
        drafts = {name: self.params(f"draft {name}") for name, _ in self.config.drafts}
        self._set_aside(folder, "evaluate")
        evaluate(self.config, target, drafts, self.dataset, folder)
        self._stamp(folder, "evaluate")

    def report(self) -> dict[str, Any]:
        """Write the report, unless it is there; returns its summary."""
        folder = self.workdir / "report"
        if not self._current(self.workdir / "eval", "evaluate"):
            raise ConfigError(f"{self.workdir / 'eval'} holds no evaluation of this config; run "
                              f"--stages=evaluate first")  # fmt: skip
        if not self._current(folder, "report"):
            self._set_aside(folder, "report")
            write_report(self.workdir, self.config, stages=self.plan.hashes)
            self._stamp(folder, "report")
        return json.loads((folder / "summary.json").read_text())

    def study(self) -> None:
        """Evaluate every variant and write what the study found, unless it is there."""
        folder = self.workdir / "study"
        if not self._current(folder, "study"):
            target = self.params("target")
            drafts = {name: self.params(f"draft {name}") for name, _ in self.config.trained}
            self._set_aside(folder, "study")
            evaluate_study(self.config, target, drafts, self.dataset, folder)
            write_study(self.config, folder)
            self._stamp(folder, "study")
        print_study(folder, Console(stderr=False))

    # --- what is in the work directory ---------------------------------------------------------

    def _folder(self, stage: str) -> pathlib.Path:
        draft = stage.removeprefix("draft ")
        return self.workdir / "target" if stage == "target" else self.workdir / "drafts" / draft

    def _complete(self, stage: str) -> bool:
        """Whether a training stage is finished; CheckpointError if it is another config's."""
        folder = self._folder(stage) / "params"
        if not folder.exists():
            return False
        load_params(folder, None, self.plan.stages[stage], check_only=True)
        return True

    def _current(self, folder: pathlib.Path, stage: str) -> bool:
        stamp = folder / "identity.json"
        return stamp.is_file() and json.loads(stamp.read_text()) == self.plan.stages[stage]

    def _stamp(self, folder: pathlib.Path, stage: str) -> None:
        write_whole(folder / "identity.json", json.dumps(self.plan.stages[stage], indent=1))

    def _set_aside(self, folder: pathlib.Path, stage: str) -> None:
        """Move results of other values out of the way, under the hash of those values."""
        stamp = folder / "identity.json"
        if not stamp.is_file():
            return
        old = json.loads(stamp.read_text())
        kept = folder.with_name(f"{folder.name}-{digest(old)}")
        if kept.exists():
            shutil.rmtree(kept)  # the same values: the same results
        folder.rename(kept)
        changed = _differences(old, self.plan.stages[stage])
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
        free = shutil.disk_usage(self.workdir).free
        if need > free:
            raise ConfigError(
                f"--workdir={self.workdir} has {free / 1e9:.2f} GB free, but checkpoints need "
                f"about {need / 1e9:.2f} GB; free some, or lower train.checkpoints_kept"
            )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> str:
    parts = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if a != b:
                parts.append(_differences(a, b, f"{path}{key}."))
        elif a != b:
            parts.append(f"{path}{key}={a!r} (now {b!r})")
    return ", ".join(parts)


@contextlib.contextmanager
def _only_one(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the work directory: two runs in it would overwrite each other."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        held = open(workdir / ".lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be written ({error.strerror}); choose another"
        ) from error
    with held as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--workdir={workdir} is in use by another run; wait for it, or "
                              f"choose another") from None  # fmt: skip
        yield


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m spire_jax.run", None, __doc__, formatter_class=raw)
    parser.add_argument("--workdir", required=True, help="where everything is written")
    choices = f"comma-separated, of {', '.join(STAGES)} or a draft's name; by default all"
    parser.add_argument("--stages", default=",".join(STAGES), help=choices)
    args, config = command_line(parser, argv)
    # Orbax logs the traceback of a failed save thread by thread; CheckpointError says it in a line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        pipeline = Pipeline(config, args.workdir)
        with _only_one(pipeline.workdir):
            (pipeline.workdir / "config.json").write_text(json.dumps(to_dict(config), indent=1))
            summary = pipeline.run([s for s in args.stages.split(",") if s])
    except ERRORS as error:
        nameless = isinstance(error, OSError) and error.filename is None
        where = f" (work directory: {args.workdir})" if nameless else ""
        print(f"error: {error}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if summary is not None:
        console = Console()
        print_table(summary, console)
        console.print(f"report: {pipeline.workdir / 'report' / 'index.html'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a work directory holds for a config: the parameters of its stages, and their identities."""

import functools
import hashlib
import json
import os

import jax
import numpy as np

from spire_jax.config.identity import Stage, differences, digest, plan
from spire_jax.config.schema import ConfigError, ExperimentConfig
from spire_jax.data.corpus import Corpus, DataError
from spire_jax.data.pipeline import Dataset, WrittenRows
from spire_jax.data.sources import load_corpus
from spire_jax.decoding import DecodeError
from spire_jax.models.sharding import check_mesh, make_mesh, shardings
from spire_jax.models.transformer import Params
from spire_jax.pretrained import PretrainedError
from spire_jax.pretrained.checkpoint import open_checkpoint
from spire_jax.storage.bucket import in_bucket
from spire_jax.storage.checkpoints import CheckpointError, has_params, load_params
from spire_jax.storage.metrics import MetricsError, write_whole
from spire_jax.storage.paths import Place, cache_folder, locate, move_aside, read_record
from spire_jax.storage.processes import ProcessError, is_first, of_first
from spire_jax.training.continuations import read_continuations
from spire_jax.training.loop import TrainingError
from spire_jax.training.tasks import Task, draft_task, target_task, with_shared

ERRORS = (  # what a user can mend: shown without a traceback
    ConfigError, DataError, CheckpointError, MetricsError, TrainingError, DecodeError,
    PretrainedError, ProcessError, OSError,
)  # fmt: skip


class WorkDir:
    """The stages of one config in one folder: what is there, and whether it is this config's."""

    def __init__(self, config: ExperimentConfig, folder: str | os.PathLike[str]):
        self.config = config
        self.folder = locate(folder)
        if not in_bucket(self.folder) and self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"--workdir={self.folder} is no folder; name another")
        self.mesh = make_mesh(config.mesh)
        check_mesh(self.mesh, config)
        self.corpus: Corpus = load_corpus(config.data, cache_folder(self.folder))
        n_tokens, of_data = config.target.n_tokens, self.corpus.tokenizer.n_tokens
        if n_tokens < of_data:
            raise ConfigError(
                f"target.n_tokens={n_tokens} is under the {of_data} tokens of data.tokenizer="
                f"{config.data.tokenizer!r}; leave it out"
            )
        self.dataset = Dataset(self.corpus, config.train.seq_len)
        self.pretrained = open_checkpoint(path) if (path := config.pretrained.path) else None
        of_target = self.target_sha256 if self.pretrained else ""
        begin = self.corpus.tokenizer.begin
        self.plan = plan(config, self.corpus.sha256, of_target, begin)

    def place(self, stage: Stage) -> Place:
        """The folder of a stage."""
        return self.folder / stage.folder

    # --- what is trained -----------------------------------------------------------------------

    def target(self) -> Params:
        """The target's parameters, on the mesh; ConfigError, with what to run, before they are."""
        task, stage = target_task(self.config), self.plan.target
        self._require(stage, "target")
        if self.pretrained is not None:
            return self.pretrained.load(task.model, self.mesh, self.config.pretrained.dtype)
        return self._load(stage, task)

    def draft(self, name: str, target: Params = None) -> Params:
        """A draft's parameters, on the mesh; ConfigError, with what to run, before they are.

        They may be another draft's (`weights_of`). `target` lends what the draft shares with it,
        all of it where nothing is trained; it is loaded unless given.
        """
        if not (of := self.config.weights(name)):
            return self.target() if target is None else target
        task, stage = draft_task(self.config, of), self.plan.drafts[of]
        self._require(stage, "drafts")
        params = self._load(stage, task)
        if not task.shared:
            return params
        return with_shared(task, params, self.target() if target is None else target)

    def _load(self, stage: Stage, task: Task) -> Params:
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            task.model.shapes(),
            shardings(self.mesh, task.model.axes()),
        )
        own = {name: value for name, value in abstract.items() if name not in task.shared}
        return load_params(self.place(stage) / "params", own, stage.values)

    def trained(self, stage: Stage) -> bool:
        """Whether a training stage is finished; CheckpointError if it is another config's."""
        if stage is self.plan.target and self.pretrained is not None:
            return True
        folder = self.place(stage) / "params"
        if not has_params(folder):
            return False
        load_params(folder, None, stage.values, check_only=True)
        return True

    def _require(self, stage: Stage, stages: str) -> None:
        if not self.trained(stage):
            raise ConfigError(
                f"{stage.name} is not trained in {self.folder}; run --stages={stages} first"
            )

    @functools.cached_property
    def target_sha256(self) -> str:
        """The hash of the target's weights: of its checkpoint, or of what was trained here."""
        if self.pretrained is not None:
            return self.pretrained.cached_sha256(cache_folder(self.folder))
        return params_sha256(self.target())

    def written_rows(self) -> WrittenRows | None:
        """The target's continuations, where the config asks for them."""
        if self.plan.continuations is None:
            return None
        return read_continuations(self.place(self.plan.continuations), len(self.dataset))

    # --- what is made again where it is another config's ----------------------------------------

    def current(self, stage: Stage) -> bool:
        """Whether the stage's results are there, and this config's."""
        stamp = self._stamp(stage)
        return of_first(stamp.exists() and read_record(stamp) == stage.values)

    def stamp(self, stage: Stage) -> None:
        """Say that the stage's results are there."""
        write_whole(self._stamp(stage), json.dumps(stage.values, indent=1))

    def set_aside(self, stage: Stage) -> str:
        """Move results of other values out of the way, under their hash; what was done, in words.

        "" where there was nothing to move.
        """
        stamp = self._stamp(stage)
        if not is_first() or not stamp.exists():
            return ""
        old, folder = read_record(stamp), self.place(stage)
        kept = folder.with_name(f"{folder.name}-{digest(old)}")
        move_aside(folder, kept, stamp.name)  # over one of the same values: the same results
        changed = differences(old, stage.values)
        return f"{folder.name}/ was made with {changed}; kept as {kept.name}/"

    def _stamp(self, stage: Stage) -> Place:
        return self.place(stage) / "identity.json"


def params_sha256(params: Params) -> str:
    """A hash of parameters: their names and their bytes."""
    content = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        content.update(jax.tree_util.keystr(path).encode())
        content.update(np.ascontiguousarray(leaf).tobytes())
    return content.hexdigest()

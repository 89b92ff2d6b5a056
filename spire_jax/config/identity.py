"""What every stage of a pipeline is made from: the values that identify it.

A stage's identity is the config values that it reads (which these are, their fields say: `read_by`
of readers.py), what came of the data and of a given target, and the stages before it.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from spire_jax.config.drafts import DraftOptions, TrainedOptions
from spire_jax.config.readers import Reader
from spire_jax.config.schema import ExperimentConfig
from spire_jax.config.values import to_dict


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of one config."""

    name: str  # as messages call it
    folder: str  # in the work directory
    reader: Reader
    values: dict[str, Any]  # what identifies it

    @property
    def hash(self) -> str:
        return digest(self.values)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages of a config, each with what it is made from."""

    target: Stage
    continuations: Stage | None
    drafts: dict[str, Stage]  # by name: those that are trained
    evaluate: Stage
    report: Stage
    study: Stage | None

    @property
    def hashes(self) -> dict[str, str]:
        """Stage -> its hash."""
        stages = [self.target, self.continuations, *self.drafts.values(), self.evaluate,
                  self.report, self.study]  # fmt: skip
        return {stage.name: stage.hash for stage in stages if stage}


def plan(
    config: ExperimentConfig,
    corpus_sha256: str,
    target_sha256: str = "",
    begin_token: int | None = None,
) -> Plan:
    """The stages of `config` on a corpus, its texts after a begin token; on a pretrained target."""

    def stage(name: str, folder: str, reader: Reader, *made_from: Stage | None, draft: str = ""):
        values = values_read(config, reader, draft)
        # What the files hold counts, not where they lie.
        if values.pop("data", None):
            values["corpus"] = corpus_sha256
            if begin_token is not None:
                values["begin_token"] = begin_token
        if reader == Reader.PRETRAINED:
            del values["pretrained"]["path"]
            values["sha256"] = target_sha256
        values["made_from"] = {before.name: before.hash for before in made_from if before}
        return Stage(name, folder, reader, values)

    of_target = Reader.PRETRAINED if config.pretrained.path else Reader.TARGET
    target = stage("target", "target", of_target)
    continuations = None
    if config.continuations.rows:
        continuations = stage("continuations", "continuations", Reader.CONTINUATIONS, target)
    drafts = {
        name: stage(f"draft {name}", f"drafts/{name}", Reader.DRAFT, target, continuations,
                    draft=name)
        for name in config.trained
    }  # fmt: skip
    own = [of for name, of in drafts.items() if name not in dict(config.variants)]
    evaluate = stage("evaluate", "eval", Reader.EVALUATE, target, *own)
    report = stage("report", "report", Reader.REPORT, evaluate)
    study = None
    if config.study.of:
        study = stage("study", "study", Reader.STUDY, target, *drafts.values())
    return Plan(target, continuations, drafts, evaluate, report, study)


def values_read(config: ExperimentConfig, reader: Reader, draft: str = "") -> dict[str, Any]:
    """What a stage reads of a config, section by section; a draft's own stage names the draft."""
    values = {}
    for field in dataclasses.fields(config):
        value, readers = getattr(config, field.name), field.metadata.get("read_by", ())
        if dataclasses.is_dataclass(value):
            if part := _read(value, reader, readers):
                values[field.name] = part
        elif reader in readers:
            values[field.name] = value
    named = [(draft, config.draft(draft))] if draft else config.drafts
    if drafts := {
        name: part
        for name, of in named
        if (part := _read(of.filled(config.train), reader, draft_readers(of)))
    }:
        values["drafts"] = drafts  # fmt: skip
    return json.loads(json.dumps(values))


def draft_readers(draft: DraftOptions) -> tuple[Reader, ...]:
    """The stages that read a draft's options where these do not say it themselves."""
    if isinstance(draft, TrainedOptions):
        return (Reader.DRAFT,)
    return (Reader.EVALUATE, Reader.STUDY)  # nothing is trained


def _read(section: Any, reader: Reader, readers: Iterable[Reader]) -> dict[str, Any]:
    values = to_dict(section)
    for field in dataclasses.fields(section):
        when = field.metadata.get("when")
        if reader not in field.metadata.get("read_by", readers) or (when and not when(section)):
            del values[field.name]
    return values


def made_with(config: ExperimentConfig) -> dict[str, Any]:
    """What an evaluation and all the stages before it read; of equal ones results are the same."""
    of_target = Reader.PRETRAINED if config.pretrained.path else Reader.TARGET
    readers = [of_target, *([Reader.CONTINUATIONS] if config.continuations.rows else []),
               Reader.DRAFT, Reader.EVALUATE]  # fmt: skip
    values: dict[str, Any] = {}
    for reader in readers:
        _merge(values, values_read(config, reader))
    return values


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


def batch_seed(seed: int, draft_seed: int) -> int:
    """The seed of the order of a draft's batches, in Grain's 32 bits; by default the target's."""
    if draft_seed or seed >= 2**32:
        return zlib.crc32(f"{seed}/{draft_seed}".encode())
    return seed


def digest(values: Any) -> str:
    """Sixteen hex digits that identify JSON-able values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> str:
    """The values that differ, key by key, for a message."""
    parts = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if a != b:
                parts.append(differences(a, b, f"{path}{key}."))
        elif a != b:
            parts.append(f"{path}{key}={a!r} (now {b!r})")
    return ", ".join(parts)

"""What every stage of a pipeline is made from: the values that identify it.

A stage's identity names the config values that it uses and the identities of the stages before it.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

from spire_jax.config.schema import (
    DraftConfig,
    ExperimentConfig,
    digest,
    draft_model,
    identity,
    oracle_depth,
    self_drafting,
    trained_depth,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every stage is made from; the hash of each entry identifies that stage."""

    stages: dict[str, dict[str, Any]]  # stage or "draft <name>" -> the values that it uses

    @property
    def hashes(self) -> dict[str, str]:
        return {name: digest(values) for name, values in self.stages.items()}


def plan(config: ExperimentConfig, corpus_sha256: str, target_sha256: str = "") -> Plan:
    """The identity of every stage of `config` on a corpus; and on a pretrained target."""
    train_values = identity(config.train)
    train_values.pop("k")
    data = {"corpus": corpus_sha256, "seed": config.seed}
    stages = {"target": {**data, "target": identity(config.target), "train": train_values}}
    if target_sha256:
        stages = {"target": {"target": identity(config.target), "sha256": target_sha256,
                             "dtype": config.pretrained.dtype}}  # fmt: skip
    made = {"target": digest(stages["target"])}
    if config.continuations.rows:
        stages["continuations"] = {
            **data,
            "continuations": {key: value for key, value in identity(config.continuations).items()
                              if key not in ("share", "batch_size")},
            "seq_len": config.train.seq_len,
            "dtype": config.decode.dtype,
            "made_from": {"target": made["target"]},
        }  # fmt: skip
        data["continuations"] = digest(stages["continuations"])
        data["share"] = config.continuations.share
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

"""The paper's ablations, and what else a study trains, as named overrides of one draft.

``config.study`` names them; `variants` turns the names into drafts. All differ from the base draft
in the values listed here and in nothing else: the same batches, the same number of steps.
"""

import dataclasses
from typing import Any

from spire_jax.config.checks import ConfigError, check
from spire_jax.config.drafts import DraftOptions
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.config.schema import StudyConfig


@dataclasses.dataclass(frozen=True)
class Ablation:
    """One thing taken away from the base draft."""

    overrides: tuple[tuple[str, Any], ...]
    says: str
    paper: float | None  # tau at context 512, k = 4 (method.md section 6); None: not reported


FULL_PAPER_TAU = 3.401
MOST_SEEDS = 100

ABLATIONS = {
    "no_sparse_cache": Ablation(
        (("window", 0),), "dense KV cache: every earlier position is visible", FULL_PAPER_TAU
    ),
    "random_init": Ablation((("init", "random"),), "random initialization, not pruned", 3.105),
    "distillation_only": Ablation(
        (("loss", "distillation"),), "distillation without the acceptance term (omega = 1)", 3.375
    ),
    "hard_target": Ablation((("loss", "hard"),), "cross-entropy on the text's next token", 3.069),
    "no_feedback": Ablation(
        (("feedback", False),), "drafted tokens' memories are each layer's own input", 3.352
    ),
    "no_feedback_no_target": Ablation(
        (("kind", "vanilla"),),
        "no memories at all: an ordinary pruned draft with the sparse mask",
        2.959,
    ),
    "shared_memory": Ablation(
        (("memory", "final"),),
        "one memory for all layers: the target's post-final-layer activations",
        None,
    ),
    "own_embeddings": Ablation(
        (("memory", "embedding"),),
        "memories of verified tokens are the draft's own embeddings",
        None,
    ),
    "strict_self": Ablation(
        (("attend_self", False),), "no attention to the token's own layer input", None
    ),
}


def variants(study: StudyConfig, base: DraftOptions) -> tuple[tuple[str, DraftOptions], ...]:
    """The drafts of a study besides its base, by name.

    Raises:
        ConfigError: an ablation that does not exist (lists those that do), or one of an option that
            the base does not have.
    """
    check(study.seeds <= MOST_SEEDS, f"study.seeds={study.seeds} orders of the batches are more "
                                     f"than anybody trains; use {MOST_SEEDS} or fewer")  # fmt: skip
    check(len(set(study.trained_k)) == len(study.trained_k),
          f"study.trained_k={study.trained_k} names a depth twice; leave one out")  # fmt: skip
    names = names_in("study.ablations", study.ablations)
    found = [(f"{study.of}-{name}", _apply(name, base)) for name in names]
    found += [(f"{study.of}-k{k}", changed("study.trained_k", base, k=k)) for k in study.trained_k]
    start = getattr(base, "seed", 0)
    for seed in range(1, study.seeds):
        seeded = [(study.of, base)]
        seeded += [(f"{study.of}-{name}", _apply(name, base))
                   for name in names_in("study.seeded", study.seeded)]  # fmt: skip
        found += [(f"{name}-seed{seed}", changed("study.seeds", draft, seed=start + seed))
                  for name, draft in seeded]  # fmt: skip
    return tuple((name, dataclasses.replace(draft, of=study.of)) for name, draft in found)


def names_in(key: str, value: str) -> list[str]:
    """A comma-separated list of ablations, or "all"."""
    if value == "all":
        return list(ABLATIONS)
    names = [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        if name not in ABLATIONS:
            raise ConfigError(f"{key}: there is no ablation {name!r}; there are {list(ABLATIONS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"{key}={value!r} names an ablation twice")
    return names


def changed(key: str, base: DraftOptions, **overrides: Any) -> DraftOptions:
    """The draft with other options; of another `kind` it keeps those that both have.

    ConfigError, naming the config's `key`, for an option that it does not have.
    """
    cls = DRAFT_KINDS.get(overrides.get("kind", base.kind))
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(overrides.keys() - known):
        raise ConfigError(f"{key} changes the option {unknown[0]!r}, which the draft of study.of, "
                          f"of kind {base.kind!r}, does not have")  # fmt: skip
    kept = {field.name: getattr(base, field.name)
            for field in dataclasses.fields(base) if field.name in known}  # fmt: skip
    return cls(**(kept | overrides))


def _apply(name: str, base: DraftOptions) -> DraftOptions:
    one = changed(f"study.ablations: {name!r}", base, **dict(ABLATIONS[name].overrides))
    if one == base:
        raise ConfigError(f"study.ablations: {name!r} takes away what the draft of study.of does "
                          f"not have")  # fmt: skip
    return one

"""What figures are drawn from: the paper's acceptance lengths, or what a finished run found."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from spire_jax.config.schema import (
    AUTOREGRESSIVE,
    ConfigError,
    ExperimentConfig,
    StudyConfig,
    to_dict,
)
from spire_jax.config.variants import variants
from spire_jax.costs import throughput
from spire_jax.storage.paths import Place


@dataclasses.dataclass(frozen=True)
class Given:
    """What the figures are drawn from."""

    tau: Mapping[str, float]  # method -> tokens per round
    source: str  # where those come from, in words
    training: Mapping[str, float]  # method -> cost of training its draft; the target's is 1
    study: Mapping[str, Any] | None = None  # study.json
    by_context: Mapping[str, Mapping[int, Mapping[str, Any]]] | None = None  # tau, tau_ci95


def paper_inputs(config: ExperimentConfig) -> Given:
    """The acceptance lengths of the config.

    Raises:
        ConfigError: it gives none.
    """
    tau = throughput.given_tau(config)
    if not tau:
        raise ConfigError(
            "the config gives no acceptance length; set throughput.tau_vanilla, tau_magicdec or "
            "tau_spire, or name a finished run with --workdir"
        )
    listed = ", ".join(f"{name} {value:g}" for name, value in tau.items())
    return Given(tau, f"tau of the config: {listed}", training_costs(config, tau))


def own_inputs(config: ExperimentConfig, workdir: Place) -> Given:
    """What a finished run of this config found.

    Raises:
        ConfigError: no report there, or one of another config.
    """
    path = workdir / "report" / "summary.json"
    if not path.is_file():
        raise ConfigError(f"--workdir={workdir} has no report; run the pipeline there first")
    summary = json.loads(path.read_text())
    mine, its = to_dict(config), summary["config"]
    for section in ("data", "target", "drafts", "magicdec", "train", "decode", "eval", "seed"):
        if mine[section] != its.get(section):
            raise ConfigError(f"--workdir={workdir} is of another config: its section {section} is "
                              f"{its.get(section)}, here it is {mine[section]}")  # fmt: skip
    methods = {n: r for n, r in summary["methods"].items() if n != AUTOREGRESSIVE}
    tau = {name: round(row["tau"], 9) for name, row in methods.items()}
    listed = ", ".join(f"{name} {value:.3f}" for name, value in tau.items())
    study = workdir / "study" / "study.json"
    return Given(
        tau,
        f"tau measured at context {summary['context_length']}: {listed}",
        training_costs(config, tau),
        json.loads(study.read_text()) if study.is_file() else None,
        {
            name: {int(n): of for n, of in row["by_context"].items()}
            for name, row in methods.items()
        },
    )


def training_costs(config: ExperimentConfig, methods: Mapping[str, Any]) -> dict[str, float]:
    """FLOPs of training each method's draft, the target's pass included, over the target's.

    Or, for SPIRe, what the config gives (the paper counts a quarter).
    """
    from spire_jax.training.tasks import (  # jax, which the rest does without
        draft_task,
        target_task,
        teacher,
    )

    of_target = target_task(config)
    costs = {}
    for name in methods:
        costs[name] = 0.0  # nothing is trained
        if name == "spire" and config.throughput.training_cost_spire:
            costs[name] = config.throughput.training_cost_spire
        elif name in dict(config.drafts):
            task = draft_task(config, name)
            flops = task.flops_per_token
            if task.reads is not None:
                flops += teacher(config, [task]).pass_flops(config.train.seq_len)
            costs[name] = task.steps * flops / (of_target.steps * of_target.flops_per_token)
    return costs


def with_ablations(config: ExperimentConfig) -> ExperimentConfig:
    """The config with all ablations of its SPIRe draft, whose cost the model can then tell."""
    base = config.study.of or "spire"
    if base not in dict(config.drafts):
        raise ConfigError(f"the config has no draft {base!r}; name one by study.of")
    study = StudyConfig(of=base, trained_k=(), seeds=1)
    return dataclasses.replace(config, variants=variants(study, config.draft(base)))

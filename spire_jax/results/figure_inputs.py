"""What figures are drawn from: the paper's acceptance lengths, or what a finished run found."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from spire_jax.config.identity import differences, made_with
from spire_jax.config.schema import AUTOREGRESSIVE, ConfigError, ExperimentConfig, StudyConfig
from spire_jax.config.variants import variants
from spire_jax.costs import throughput
from spire_jax.costs.acceptance import Tau
from spire_jax.storage.paths import Place, read_record


@dataclasses.dataclass(frozen=True)
class Given:
    """What the figures are drawn from."""

    tau: Mapping[str, Tau]  # method -> tokens per round, at every context or by context
    source: str  # where those come from, in words
    training: Mapping[str, float]  # method -> cost of training its draft; the target's is 1
    study: Mapping[str, Any] | None = None  # study.json
    by_context: Mapping[str, Mapping[int, Mapping[str, Any]]] | None = None  # tau, tau_ci95


def paper_inputs(config: ExperimentConfig) -> Given:
    """The acceptance lengths of the config.

    Raises:
        ConfigError: it gives none.
    """
    tau = throughput.given_tau(config, remedy=", or name a finished run with --workdir")
    listed = ", ".join(f"{name} {value:g}" for name, value in tau.items())
    source = f"tau of the config, the same at every context: {listed}"
    return Given(tau, source, training_costs(config, tau))


def read_summary(config: ExperimentConfig, workdir: Place) -> dict[str, Any]:
    """The summary.json of a finished run of this config.

    Raises:
        ConfigError: no report there, or one of another config.
    """
    path = workdir / "report" / "summary.json"
    if not path.is_file():
        raise ConfigError(f"--workdir={workdir} has no report; run the pipeline there first")
    summary = read_record(path)
    if changed := differences(summary["made_with"], made_with(config)):
        raise ConfigError(f"--workdir={workdir} is of another config: it was made with {changed}")
    return summary


def own_inputs(config: ExperimentConfig, workdir: Place) -> Given:
    """What a finished run of this config found; ConfigError as `read_summary`."""
    summary = read_summary(config, workdir)
    methods = {n: r for n, r in summary["methods"].items() if n != AUTOREGRESSIVE}
    tau = {name: {int(n): round(of["tau"], 9) for n, of in row["by_context"].items()}
           for name, row in methods.items()}  # fmt: skip
    listed = ", ".join(f"{name} {row['tau']:.3f}" for name, row in methods.items())
    study = workdir / "study" / "study.json"
    return Given(
        tau,
        f"tau measured by context (at {summary['context_length']}: {listed}), between and beyond "
        f"those of the run as in the nearest",
        training_costs(config, tau),
        read_record(study) if study.is_file() else None,
        {
            name: {int(n): of for n, of in row["by_context"].items()}
            for name, row in methods.items()
        },
    )


def training_costs(config: ExperimentConfig, methods: Mapping[str, Any]) -> dict[str, float]:
    """FLOPs of training each method's draft, the target's pass included, over the target's.

    Or what the config gives for it (of SPIRe the paper counts a quarter).
    """
    from spire_jax.training.tasks import (  # jax, which the rest does without
        draft_task,
        target_task,
        teacher,
    )

    of_target, given = target_task(config), dict(config.throughput.training_cost)
    costs = {}
    for name in methods:
        costs[name] = given.get(name, 0.0)  # where nothing is trained, 0
        if not costs[name] and name in config.trained:
            task = draft_task(config, name)
            flops = task.flops_per_token
            if task.reads is not None:
                flops += teacher(config, [task]).pass_flops(config.train.seq_len)
            costs[name] = task.steps * flops / (of_target.steps * of_target.flops_per_token)
    return costs


def with_ablations(config: ExperimentConfig) -> ExperimentConfig:
    """The config with all ablations of one draft, whose cost the model can then tell.

    The draft is that of the config's study, or the first that has what they take away.
    """
    names, refused = [config.study.of] if config.study.of else [n for n, _ in config.drafts], []
    for name in names:
        study = StudyConfig(of=name, trained_k=(), seeds=1)
        try:
            all_of_it = variants(study, config.draft(name))
        except ConfigError as error:
            refused.append(f"{name}: {error}")
            continue
        return dataclasses.replace(config, study=study, variants=all_of_it)
    raise ConfigError(f"no draft of the config has what the ablations take away; "
                      f"{'; '.join(refused)}")  # fmt: skip

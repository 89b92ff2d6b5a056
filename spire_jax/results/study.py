"""A study: every variant of one draft, by the oracle, on the same samples of the target.

All methods see the same contexts and the same texts, so that their differences are paired. What
effect the study can detect is computed before it, on a pilot of other contexts, from two drafts
that differ in nothing but the order of their training batches (`plan.json`). The depths of the
rollout (train.k) are followed up to the deepest that was trained, and three of the depths that the
cost model then prefers are checked by decoding.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spire_jax.config.schema import ConfigError, ExperimentConfig, oracle_depth
from spire_jax.costs import chips, throughput
from spire_jax.costs.hardware import describe
from spire_jax.data.pipeline import Context, Dataset
from spire_jax.decoding import Weights
from spire_jax.decoding.build import for_decoding
from spire_jax.models.transformer import Params
from spire_jax.results.evaluate import (
    about,
    choose_contexts,
    decode_counts,
    decoder_record,
    in_batches,
    oracle_records,
    sample_texts,
    target_pass,
)
from spire_jax.results.intervals import mean_generation_length
from spire_jax.storage.metrics import Progress, write_whole
from spire_jax.storage.paths import Place

# Two-sided 5% and 80% power: a true effect of this many standard errors is called in 4 of 5 cases.
DETECTABLE = 1.96 + 0.84


def study_config(config: ExperimentConfig) -> ExperimentConfig:
    """The config of a study's evaluation: variants are drafts, contexts are the study's."""
    at = config.study
    ev = dataclasses.replace(
        config.eval, contexts=at.contexts, context_lengths=(at.context_length,), decoder_samples=0
    )
    everything = config.drafts + config.variants
    return dataclasses.replace(config, drafts=everything, variants=(), eval=ev)


def deep_methods(config: ExperimentConfig) -> list[str]:
    """The methods whose acceptance is followed to the deepest trained rollout."""
    by_k = [f"{config.study.of}-k{k}" for k in config.study.trained_k]
    return [*dict(config.drafts), *by_k]


def evaluate_study(
    config: ExperimentConfig,
    target: Params,
    drafts: Mapping[str, Params],
    dataset: Dataset,
    directory: Place,
) -> None:
    """Write `plan.json`, `<method>.jsonl` for every variant, and `decoded.json` to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    deep, full = set(deep_methods(config)), study_config(config)
    target, models = for_decoding(full, target, drafts)
    depths = {n: oracle_depth(full) if n in deep else config.decode.k for n in models}
    twins = twin_names(config)
    pilot = dataclasses.replace(
        full,
        eval=dataclasses.replace(full.eval, contexts=config.study.detectable),
        seed=full.seed + 1,  # other cuts of the documents
    )
    chosen = choose_contexts(full, dataset.corpus)
    n_batches = sum(-(-n // full.eval.batch_size) for n in (len(chosen), pilot.eval.contexts))
    with Progress("study", total=n_batches) as progress:
        pilot_records = _records(
            pilot, target, {n: models[n] for n in twins}, depths,
            choose_contexts(pilot, dataset.corpus), progress,
        )  # fmt: skip
        plan = smallest_effect(pilot_records, twins, config)
        write_whole(directory / "plan.json", json.dumps(plan, indent=1))
        records = _records(full, target, models, depths, chosen, progress)
    for name, lines in records.items():
        write_whole(directory / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in lines))
    taus = tau_by_depth(records[config.study.of])
    checked = [
        {"k": k, "tau_oracle": taus[k - 1]} | _decoded(full, target, models, chosen, k)
        for k in depths_to_check(config, taus)
    ]
    summary = {"machine": describe(), "corpus": dataset.corpus.summary(), "decoded": checked}
    write_whole(directory / "decoded.json", json.dumps(summary, indent=1))


def _records(
    config: ExperimentConfig,
    target: Params,
    models: Mapping[str, Params],
    depths: Mapping[str, int],
    contexts: Sequence[Context],
    progress: Progress,
) -> dict[str, list[dict[str, Any]]]:
    """The oracle's records of every method, context by context."""
    (length,) = config.eval.context_lengths
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for rows in in_batches(len(contexts), config.eval.batch_size):
        batch = [contexts[i] for i in rows]
        texts, cache = sample_texts(config, target, batch, rows, length)
        along = target_pass(config, target, models, texts, cache, length)
        places = [about(config, i, contexts[i], length) for i in dict.fromkeys(rows)]
        for name, params in models.items():
            found = oracle_records(config, name, params, texts, along, length, depths[name])
            for place, oracle in zip(places, found, strict=False):  # the rest fills the batch up
                head = {"method": name, "k": config.decode.k}
                records[name].append(place | head | {"oracle": oracle})
        progress.advance()
    return records


def twin_names(config: ExperimentConfig) -> tuple[str, str]:
    """Two drafts that differ in the seed alone; without seeds, the draft and its first variant."""
    base, names = config.study.of, [name for name, _ in config.variants]
    if not names:
        raise ConfigError("study.ablations, study.trained_k and study.seeds name nothing to "
                          "compare with; name an ablation")  # fmt: skip
    return base, (f"{base}-seed1" if f"{base}-seed1" in names else names[0])


def smallest_effect(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    twins: tuple[str, str],
    config: ExperimentConfig,
) -> dict[str, Any]:
    """The smallest true difference of tau that the study will call resolved in 4 of 5 cases.

    From the spread, over the pilot's contexts, of the difference between two drafts: of a ratio of
    sums, whose standard error is that of the mean of (length - tau rounds) / mean rounds.
    """
    k, terms = config.decode.k, []
    for name in twins:
        lengths, rounds = (
            np.array([r["oracle"][key][k - 1] for r in records[name]])
            for key in ("lengths_by_k", "rounds_by_k")
        )
        tau = float(mean_generation_length(lengths, rounds))
        terms.append((lengths - tau * rounds) / rounds.mean())
    spread = float(np.std(terms[0] - terms[1], ddof=1)) if len(terms[0]) > 1 else float("nan")
    n = config.study.contexts
    return {
        "pilot_contexts": len(records[twins[0]]),
        "twins": list(twins),
        "spread_per_context": spread,
        "contexts": n,
        "smallest_detectable_effect": DETECTABLE * spread / n**0.5,
        "power": 0.8,
    }


def tau_by_depth(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """tau for depth 1, 2, ... over all of a method's records."""
    lengths, rounds = (
        [r["oracle"][key] for r in records] for key in ("lengths_by_k", "rounds_by_k")
    )
    return mean_generation_length(lengths, rounds, axis=0).tolist()


def best_k(
    config: ExperimentConfig,
    method: str,
    taus: Sequence[float],
    *,
    batch: int,
    context: int,
    hoi: float | chips.Chip,
    variant: str,
) -> tuple[int, float]:
    """The depth at which the modeled multiplier is largest, and that multiplier."""
    found = [
        throughput.multiplier(config, method, tau=round(tau, 9), batch=batch, context=context, k=k,
                              hoi=hoi, variant=variant)
        for k, tau in enumerate(taus, start=1)
    ]  # fmt: skip
    k = int(np.argmax(found))
    return k + 1, found[k]


def depths_to_check(config: ExperimentConfig, taus: Sequence[float]) -> list[int]:
    """Up to three depths, of those that the cost model prefers somewhere: both ends and between."""
    at = config.throughput
    preferred = sorted(
        {
            best_k(config, config.study.of, taus, batch=batch, context=context, hoi=chip,
                   variant=at.variant)[0]
            for chip in throughput.CHIPS.values()
            for batch in at.batch_sizes
            for context in at.context_lengths
        }
    )  # fmt: skip
    middle = preferred[len(preferred) // 2]
    return sorted({preferred[0], middle, preferred[-1]})


def _decoded(
    config: ExperimentConfig,
    target: Params,
    models: Mapping[str, Params],
    contexts: Sequence[Context],
    k: int,
) -> dict[str, Any]:
    """tau of the studied draft by decoding the study's contexts once at depth k."""
    config = dataclasses.replace(config, decode=dataclasses.replace(config.decode, k=k))
    name, (length,) = config.study.of, config.eval.context_lengths
    counts = np.zeros(k + 1, np.int64)
    for rows in in_batches(len(contexts), config.eval.batch_size):
        found = decode_counts(config, name, Weights(target, models[name]),
                              [contexts[i] for i in rows], rows, length, 0)  # fmt: skip
        counts += found[: len(dict.fromkeys(rows))].sum(axis=0)
    record = decoder_record(counts)
    tau = float(mean_generation_length(record["lengths"], record["rounds"]))
    return {"tau_decoder": tau, **record}

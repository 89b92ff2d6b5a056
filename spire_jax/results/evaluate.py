"""Evaluation: held-out contexts -> records, by the oracle, by the decoder and by the clock.

One set of autoregressive samples of the target serves the oracle of every draft, so that their
differences are paired; the decoder's tau stands beside it. What is *measured* here is this
machine's speed, autoregressive and speculative in turn; the modeled throughput is the report's.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from spire_jax.config.schema import AUTOREGRESSIVE, ExperimentConfig, oracle_depth
from spire_jax.costs.hardware import describe, peak_memory_bytes
from spire_jax.data.corpus import Corpus
from spire_jax.data.pipeline import Context, Dataset, cut_contexts, held_out_batches
from spire_jax.data.tokenizer import end_tokens, make_tokenizer
from spire_jax.decoding import (
    ACCEPTED,
    BONUS,
    CORRECTION,
    DecodeState,
    Weights,
    finish,
    generate,
    generation_lengths,
    start,
)
from spire_jax.decoding.build import for_decoding, make_decoder
from spire_jax.decoding.oracle import TargetAlong, ratios_along, round_statistics, target_along
from spire_jax.decoding.verification import VERIFICATIONS
from spire_jax.drafting.build import strategy
from spire_jax.models.caches import Caches
from spire_jax.models.transformer import Params
from spire_jax.storage.metrics import Progress, write_whole
from spire_jax.storage.paths import Place
from spire_jax.storage.processes import to_host
from spire_jax.training.loop import evaluate_batch, to_device
from spire_jax.training.tasks import draft_task, target_task, teach, teacher

KINDS = {ACCEPTED: "accepted", CORRECTION: "correction", BONUS: "bonus"}


def choose_contexts(config: ExperimentConfig, corpus: Corpus) -> list[Context]:
    """The held-out contexts of an evaluation; DataError if no document is long enough."""
    return cut_contexts(
        corpus,
        n_contexts=config.eval.contexts,
        context_length=max(config.eval.context_lengths),
        room=config.eval.output_length + oracle_depth(config),
        seed=config.seed,
    )


def cache_width(config: ExperimentConfig) -> int:
    """Positions of every cache in an evaluation: one shape, so that rounds compile once."""
    return max(config.eval.context_lengths) + config.eval.output_length + oracle_depth(config)


def evaluate(
    config: ExperimentConfig,
    target: Params,
    drafts: Mapping[str, Params],
    dataset: Dataset,
    directory: Place,
) -> None:
    """Write `<method>.jsonl` for every method and `evaluation.json` into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    ev = config.eval
    contexts = choose_contexts(config, dataset.corpus)
    teacher_forced = held_out(config, target, drafts, dataset)
    target, drafts = for_decoding(config, target, drafts)
    seconds: dict[str, float] = {}
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in (AUTOREGRESSIVE, *drafts)}
    batches = -(-len(contexts) // ev.batch_size)
    total = len(ev.context_lengths) * batches * (1 + len(drafts) * (1 + ev.decoder_samples))
    with Progress("evaluate", total=total) as progress:
        clock = _Clock(seconds, progress)
        for length in ev.context_lengths:
            for rows in in_batches(len(contexts), ev.batch_size):
                batch = [contexts[i] for i in rows]
                places = [about(config, i, contexts[i], length) for i in dict.fromkeys(rows)]
                with clock(AUTOREGRESSIVE):
                    texts, cache = sample_texts(config, target, batch, rows, length)
                    along = target_pass(config, target, drafts, texts, cache, length)
                records[AUTOREGRESSIVE] += [r | {"method": AUTOREGRESSIVE, "k": 0} for r in places]
                for name, params in drafts.items():
                    weights = Weights(target, params)
                    with clock(f"{name} oracle"):
                        oracle = oracle_records(
                            config, name, params, texts, along, length, oracle_depth(config)
                        )
                    counts = np.zeros((len(rows), config.decode.k + 1), np.int64)
                    for sample in range(ev.decoder_samples):
                        with clock(f"{name} decoder"):
                            counts += decode_counts(
                                config, name, weights, batch, rows, length, sample
                            )
                    for row, record in enumerate(places):  # the rest fills the batch up
                        record = record | {"method": name, "k": config.decode.k}
                        record["oracle"] = oracle[row]
                        if ev.decoder_samples:
                            record["decoder"] = decoder_record(counts[row])
                        records[name].append(record)
    summary = {
        "corpus": dataset.corpus.summary() | {"padding_share": dataset.padding_share()},
        "heldout_bits_per_byte": teacher_forced["bits_per_byte"],
        "heldout_alpha": teacher_forced["alpha"],
        "timing": measure_speed(config, target, drafts, contexts),
        "examples": examples(config, target, drafts, contexts, dataset),
        "machine": describe(),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    for name, lines in records.items():
        write_whole(directory / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in lines))
    write_whole(directory / "evaluation.json", json.dumps(summary, indent=1))


# --- acceptance --------------------------------------------------------------------------------


def sample_texts(
    config: ExperimentConfig,
    target: Params,
    contexts: Sequence[Context],
    indices: Sequence[int],
    length: int,
) -> tuple[np.ndarray, Caches]:
    """Autoregressive samples, [B, length + output + k - 1], as the oracle needs them, and the
    target's cache over them."""
    budget = config.eval.output_length + oracle_depth(config) - 1
    state = generate(
        make_decoder(config, AUTOREGRESSIVE),
        Weights(target),
        [c.last(length) for c in contexts],
        [budget] * len(contexts),
        [request_seed(config, "oracle", i, length) for i in indices],
        width=cache_width(config),
        rounds_per_call=config.decode.rounds_per_call,
    )
    return to_host(state.tokens)[:, : length + budget], state.target_cache


def request_seed(config: ExperimentConfig, purpose: str, context: int, length: int) -> int:
    """A request's random seed: the same for every method, none used for two purposes."""
    return zlib.crc32(f"{config.seed}/{purpose}/{context}/{length}".encode())


def target_pass(
    config: ExperimentConfig,
    target: Params,
    names: Iterable[str],
    texts: np.ndarray,
    cache: Caches,
    length: int,
) -> TargetAlong:
    """The target's one pass along its samples, with what every draft of `names` reads."""
    decoder = make_decoder(config, AUTOREGRESSIVE)
    strategies = tuple(strategy(config, name, decoder.target.compute) for name in names)
    return target_along(decoder.target, target, cache, texts, length, strategies, decoder.sampling)


def oracle_records(
    config: ExperimentConfig,
    name: str,
    params: Params,
    texts: np.ndarray,
    along: TargetAlong,
    length: int,
    k: int,
) -> list[dict[str, Any]]:
    """The oracle's expectations for one draft with depths 1 .. k, text by text."""
    decoder, output = make_decoder(config, name), config.eval.output_length
    assert decoder.strategy is not None
    ratios = ratios_along(
        decoder.strategy, params, texts[:, : length + output + k - 1], along, length, output, k,
        decoder.sampling,
    )  # fmt: skip
    found = {v: round_statistics(to_host(ratios), v) for v in VERIFICATIONS}
    head = {"k": k, "trained_k": config.draft(name).rollout(config.train)}
    of = {v: [{f.name: getattr(s, f.name)[row].tolist() for f in dataclasses.fields(s)}
              for row in range(len(texts))] for v, s in found.items()}  # fmt: skip
    # Both verifications cost the same texts; the decoder's own comes first.
    return [
        head | of[config.decode.verification][row] | {v: of[v][row] for v in VERIFICATIONS}
        for row in range(len(texts))
    ]


def decode_counts(
    config: ExperimentConfig,
    name: str,
    weights: Weights,
    batch: Sequence[Context],
    rows: Sequence[int],
    length: int,
    sample: int,
) -> np.ndarray:
    """Rounds with 0 .. k acceptances, [B, k + 1], of decoding each context once."""
    state = generate(
        make_decoder(config, name, _ends(config)),
        weights,
        [c.last(length) for c in batch],
        [config.eval.output_length] * len(batch),
        [request_seed(config, f"decode {sample}", i, length) for i in rows],
        width=cache_width(config),
        rounds_per_call=config.decode.rounds_per_call,
    )
    return to_host(state.counts)


def _ends(config: ExperimentConfig) -> tuple[int, ...]:
    """The tokens that end a row."""
    if not config.decode.stop_at_eos:
        return ()
    return end_tokens(make_tokenizer(config.data.tokenizer))


def decoder_record(counts: np.ndarray) -> dict[str, Any]:
    emitted, rounds = generation_lengths(counts)
    return {"lengths": emitted, "rounds": rounds, "accepted_counts": counts.tolist()}


def about(config: ExperimentConfig, index: int, context: Context, length: int) -> dict[str, Any]:
    return {
        "context": index,
        "document": context.document,
        "cut": context.cut,
        "context_length": length,
        "output_length": config.eval.output_length,
    }


def in_batches(n: int, size: int) -> Iterator[list[int]]:
    """Indices 0 .. n - 1 in batches of one size: the last is filled up with its own first rows."""
    for begin in range(0, n, size):
        rows = list(range(begin, min(begin + size, n)))
        yield [rows[i % len(rows)] for i in range(size)]


@dataclasses.dataclass(frozen=True)
class _Clock:
    """Adds up the seconds of named work and moves the progress bar."""

    seconds: dict[str, float]
    progress: Progress

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        spent = time.perf_counter() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self.progress.advance(description=f"evaluate: {name}")


# --- the clock, held-out loss, examples --------------------------------------------------------


def measure_speed(
    config: ExperimentConfig,
    target: Params,
    drafts: Mapping[str, Params],
    contexts: Sequence[Context],
) -> dict[str, Any]:
    """Decoded tokens per second on this machine, every method in turn, in one process.

    Prefill and compilation are left out: each repeat decodes the same number of tokens per row
    from a prefilled state. Methods alternate within a repeat, so that drift hits all alike.
    """
    ev, decode = config.eval, config.decode
    length = max(ev.context_lengths)
    rows = next(in_batches(len(contexts), ev.batch_size))
    prompts = [contexts[i].last(length) for i in rows]
    runs = {AUTOREGRESSIVE: Weights(target)}
    runs |= {name: Weights(target, params) for name, params in drafts.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rounds: dict[str, list[int]] = {name: [] for name in runs}
    for repeat in range(ev.timing_repeats + 1):
        for name, weights in runs.items():
            decoder = make_decoder(config, name)
            seeds = [request_seed(config, f"speed {repeat}", i, length) for i in rows]
            budgets = [ev.output_length] * len(rows)
            state = start(decoder, weights, prompts, budgets, seeds, width=cache_width(config))
            jax.block_until_ready(state)
            begin = time.perf_counter()
            state = jax.block_until_ready(finish(decoder, weights, state, decode.rounds_per_call))
            if repeat:  # repeat 0 compiles
                seconds[name].append(time.perf_counter() - begin)
                rounds[name].append(int(to_host(state.rounds).max()))
    tokens = ev.output_length * len(rows)
    return {
        name: {
            "context_length": length,
            "batch_size": len(rows),
            "dtype": decode.dtype,
            "seconds": seconds[name],
            "rounds": rounds[name],
            "tokens_per_s": [tokens / s for s in seconds[name]],
        }
        for name in runs
    }


def held_out(
    config: ExperimentConfig, target: Params, drafts: Mapping[str, Params], dataset: Dataset
) -> dict[str, dict[str, float]]:
    """Bits per byte of the target and acceptance of the drafts, teacher-forced on held-out text."""
    mesh, corpus = jax.sharding.get_mesh(), dataset.corpus
    of_target = target_task(config)
    tasks = {name: draft_task(config, name) for name in drafts}
    taught_by = teacher(config, list(tasks.values()))
    nats = tokens = n_bytes = 0.0
    alpha = dict.fromkeys(tasks, 0.0)
    for rows in held_out_batches(
        corpus,
        seq_len=config.train.seq_len,
        batch_size=config.eval.batch_size,
        max_rows=config.eval.heldout_rows,
    ):
        batch, count = to_device(rows, mesh), int(rows.mask_BxT.sum())
        tokens += count
        n_bytes += corpus.tokenizer.count_bytes(rows.targets_BxT[rows.mask_BxT])
        metrics = evaluate_batch(of_target, target, None, batch)
        nats += float(metrics["loss"]) * count
        lesson = teach(taught_by, target, batch) if tasks else None
        for name, task in tasks.items():
            metrics = evaluate_batch(task, drafts[name], lesson, batch)
            alpha[name] += float(metrics["alpha"]) * count
    return {
        "bits_per_byte": {"target": nats / n_bytes / math.log(2)},
        "alpha": {name: total / tokens for name, total in alpha.items()},
    }


def examples(
    config: ExperimentConfig,
    target: Params,
    drafts: Mapping[str, Params],
    contexts: Sequence[Context],
    dataset: Dataset,
) -> list[dict[str, Any]]:
    """Generated texts of every method from the same contexts, cut into pieces by kind."""
    ev = config.eval
    shown = contexts[: ev.examples]
    if not shown:
        return []
    length = max(ev.context_lengths)
    rows = [i % len(shown) for i in range(ev.batch_size)]
    results = []
    for name, params in {AUTOREGRESSIVE: None, **drafts}.items():
        state = generate(
            make_decoder(config, name, _ends(config)),
            Weights(target, params),
            [shown[i].last(length) for i in rows],
            [ev.output_length] * len(rows),
            [request_seed(config, "example", i, length) for i in rows],
            width=cache_width(config),
        )
        for row, context in enumerate(shown):
            results.append(
                {
                    "method": name,
                    "document": context.document,
                    "context_text": dataset.corpus.tokenizer.decode(context.last(length)),
                    "pieces": pieces(state, row, length, dataset.corpus.tokenizer.decode, name),
                }
            )
    return results


def pieces(state: DecodeState, row: int, length: int, decode, name: str) -> list[list[str]]:
    """A row's output as [kind, text] runs."""
    end = int(to_host(state.lengths)[row])
    tokens = to_host(state.tokens)[row, length:end]
    kinds = to_host(state.kinds)[row, length:end]
    starts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(tokens)]
    return [
        ["target" if name == AUTOREGRESSIVE else KINDS[int(kinds[a])], decode(tokens[a:b])]
        for a, b in itertools.pairwise(starts)
        if b > a
    ]

"""Speed of training, decoding and the oracle on this machine.

    bash launch/quickstart.sh
    .venv/bin/python -m launch.bench.pipeline --config=configs/quickstart.py

(about four minutes on 2 CPU cores). Prints a line per figure. Figures that are compared are
measured in turn in one process; every figure is a median. Training is timed at 0.8M body
parameters with random weights and tokens, on which its speed does not depend; decoding and the
oracle on the trained models of a work directory of the same config.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np

from launch.bench.command_line import count
from launch.bench.train_steps import measure, trained
from spire_jax.config.files import command_line, ends_in_a_line
from spire_jax.config.paths import path_or_url
from spire_jax.config.schema import ExperimentConfig, oracle_depth
from spire_jax.costs.hardware import describe, peak_memory_bytes
from spire_jax.data.pipeline import Context
from spire_jax.decoding import Weights, decode_rounds, finish, generation_lengths, start
from spire_jax.decoding.build import make_decoder
from spire_jax.models.sharding import make_mesh
from spire_jax.results.evaluate import (
    AUTOREGRESSIVE,
    choose_contexts,
    decode_counts,
    oracle_records,
    sample_texts,
    target_pass,
)
from spire_jax.training.workdir import ERRORS, WorkDir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", type=path_or_url, default="runs/quickstart",
                        help="of a finished run")  # fmt: skip
    parser.add_argument("--repeats", type=count, default=7)
    args, config = command_line(parser)
    print(" | ".join(describe().values()))
    sized = dataclasses.replace(
        config, target=dataclasses.replace(config.target, d_model=96, d_ff=224)
    )
    for seq_len, batch in ((256, 16), (1024, 4)):
        train = dataclasses.replace(sized.train, seq_len=seq_len, batch_size=batch)
        with jax.set_mesh(make_mesh(config.mesh)):
            bench_training(dataclasses.replace(sized, train=train), args.repeats)
    at = WorkDir(config, args.workdir)
    with jax.set_mesh(at.mesh):
        target = at.target()
        weights = {AUTOREGRESSIVE: Weights(target)}
        for name, _ in config.drafts:
            weights[name] = Weights(target, at.draft(name, target))
        contexts = choose_contexts(config, at.corpus)[: config.eval.batch_size]
        bench_decoding(config, weights, contexts, args.repeats)
        bench_oracle(config, weights, contexts)
    print(f"peak memory of this process: {peak_memory_bytes() / 1e6:.0f} MB")


def bench_training(config: ExperimentConfig, repeats: int) -> None:
    """Tokens per second of the target's and of every draft's training step."""
    target, *drafts = measure(config, trained(config), repeats)
    for found in (target, *drafts):
        print(f"training, sequence {config.train.seq_len}, {found['model']}: "
              f"{found['tokens/s']:,.0f} tokens/s "
              f"({found['tokens/s'] / target['tokens/s']:.2f} x the target's rate, "
              f"{found['of peak']:.0%} of the peak, "
              f"{config.target.body_parameters():,} body parameters)")  # fmt: skip


def bench_decoding(
    config: ExperimentConfig, weights: dict[str, Weights], contexts: list[Context], repeats: int
) -> None:
    """Generation's wall time against its number of rounds times one jitted round."""
    prompts = [context.tokens for context in contexts]
    budgets, seeds = [config.eval.output_length] * len(prompts), range(len(prompts))
    for name in weights:
        decoder = make_decoder(config, name)

        def whole(decoder=decoder, name=name):
            state = start(decoder, weights[name], prompts, budgets, seeds)
            jax.block_until_ready(state)
            begin = time.perf_counter()
            state = jax.block_until_ready(finish(decoder, weights[name], state))
            return time.perf_counter() - begin, int(np.asarray(state.rounds).max())

        def one_round(decoder=decoder, name=name):
            # The median of many single rounds of one batch, each a call of its own.
            state = start(decoder, weights[name], prompts, budgets, seeds)
            times = []
            for _ in range(8):
                jax.block_until_ready(state)
                begin = time.perf_counter()
                state = decode_rounds(decoder, weights[name], state, 1)
                jax.block_until_ready(state)
                times.append(time.perf_counter() - begin)
            return statistics.median(times)

        whole(), one_round()
        ratios, rates = [], []
        for _ in range(repeats):
            single = one_round()
            wall, rounds = whole()
            ratios.append(wall / (rounds * single))
            rates.append(len(prompts) * config.eval.output_length / wall)
        print(f"decoding, B={len(prompts)}, context {len(prompts[0])}, {name}: "
              f"{statistics.median(rates):,.0f} tokens/s; wall time "
              f"{statistics.median(ratios):.2f} x (rounds x one jitted round)")  # fmt: skip


def bench_oracle(
    config: ExperimentConfig, weights: dict[str, Weights], contexts: list[Context]
) -> None:
    """Time of the oracle and of decoding to the same standard error of tau, for all drafts.

    Time to a given precision is time x variance. Both share the contexts; the oracle's samples
    and its pass of the target are drawn once and serve every draft.
    """
    names, repeats = [name for name, _ in config.drafts], 6
    length, rows = len(contexts[0].tokens), range(len(contexts))
    target = weights[AUTOREGRESSIVE].target
    seconds = dict.fromkeys(["samples", "target", *names], 0.0)
    decoding = dict.fromkeys(names, 0.0)
    by_oracle: dict[str, list] = {name: [] for name in names}
    by_decoder: dict[str, list] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        if repeat == 1:  # repeat 0 compiles
            seconds, decoding = dict.fromkeys(seconds, 0.0), dict.fromkeys(decoding, 0.0)
        at = [repeat * 1000 + row for row in rows]
        begin = time.perf_counter()
        texts, cache = sample_texts(config, target, contexts, at, length)
        seconds["samples"] += time.perf_counter() - begin
        begin = time.perf_counter()
        along = jax.block_until_ready(target_pass(config, target, names, texts, cache, length))
        seconds["target"] += time.perf_counter() - begin
        for name in names:
            begin = time.perf_counter()
            records = oracle_records(
                config, name, weights[name].draft, texts, along, length, oracle_depth(config)
            )
            seconds[name] += time.perf_counter() - begin
            by_oracle[name] += [(r["lengths_by_k"][-1], r["rounds_by_k"][-1]) for r in records]
            begin = time.perf_counter()
            counts = decode_counts(config, name, weights[name], contexts, at, length, 0)
            decoding[name] += time.perf_counter() - begin
            by_decoder[name] += [generation_lengths(row) for row in counts]
    own = sum(seconds[name] for name in names)
    total = sum(decoding.values())
    for name in names:
        ratio = _variance(by_decoder[name]) / _variance(by_oracle[name])
        faster = ratio * decoding[name] / seconds[name]
        print(
            f"oracle, {name}: tau {_tau(by_oracle[name]):.3f} (decoder "
            f"{_tau(by_decoder[name]):.3f}); variance {ratio:.2f} times smaller than decoding's; "
            f"{faster:.1f} times faster at equal precision, given the target's pass"
        )
    ratio = statistics.mean(_variance(by_decoder[n]) / _variance(by_oracle[n]) for n in names)
    shared = own + seconds["target"]
    print(f"oracle, all {len(names)} drafts at equal precision: {ratio * total / shared:.1f} times "
          f"faster than decoding with the target's pass, "
          f"{ratio * total / (shared + seconds['samples']):.1f} times with sampling")  # fmt: skip


def _tau(results) -> float:
    lengths, rounds = np.array(results, float).T
    return lengths.sum() / rounds.sum()


def _variance(results) -> float:
    """Variance of the ratio sum(lengths) / sum(rounds) by linearization, as its interval shows."""
    lengths, rounds = np.array(results, float).T
    residual = lengths - lengths.sum() / rounds.sum() * rounds
    return float(np.sum(residual**2) / rounds.sum() ** 2)


if __name__ == "__main__":
    with ends_in_a_line(*ERRORS):
        main()

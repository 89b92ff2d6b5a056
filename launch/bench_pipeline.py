"""Speed of training, decoding and the oracle on this machine.

    python -m launch.bench_pipeline            (about four minutes on 2 CPU cores)

Prints a line per figure. Figures that are compared are measured in turn in one process; every
figure is a median. The models are those of configs/quickstart.py at 0.8M body parameters, with
random weights and random tokens: speed does not depend on either, except where the number of
accepted tokens matters, and there it is counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from spire_jax import config as configs
from spire_jax.config import ExperimentConfig, body_parameters
from spire_jax.data.pipeline import Batch
from spire_jax.decode import Weights, decode_rounds, finish, generate, generation_lengths, start
from spire_jax.evaluate import AUTOREGRESSIVE, make_decoder
from spire_jax.hardware import describe, peak_memory_bytes
from spire_jax.models.transformer import Params
from spire_jax.oracle import acceptance_along, round_statistics
from spire_jax.sharding import make_mesh
from spire_jax.train import (
    Task,
    draft_task,
    init_params,
    init_state,
    initial_draft,
    make_optimizer,
    target_task,
    to_device,
    train_step,
)

SIZE = ["target.d_model=96", "target.d_ff=192", "train.steps=1000"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(" | ".join(describe().values()))
    for seq_len, batch in ((256, 16), (1024, 4)):
        config = configs.load(
            args.config, [*SIZE, f"train.seq_len={seq_len}", f"train.batch_size={batch}"]
        )
        with jax.set_mesh(make_mesh(config.mesh)):
            bench_training(config, args.repeats)
    config = configs.load(args.config, SIZE)
    with jax.set_mesh(make_mesh(config.mesh)):
        bench_decoding(config, args.repeats)
        bench_oracle(config)
    print(f"peak memory of this process: {peak_memory_bytes() / 1e6:.0f} MB")


def interleaved(work: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each piece of work, run in turn, after one run that compiles."""
    for run in work.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bench_training(config: ExperimentConfig, repeats: int) -> None:
    """Tokens per second of the target's and of every draft's training step."""
    mesh, train = jax.sharding.get_mesh(), config.train
    rng = np.random.default_rng(0)
    shape = (train.batch_size, train.seq_len)
    tokens = rng.integers(0, config.target.n_tokens, (2, *shape), np.int32)
    batch = to_device(
        Batch(tokens[0], tokens[1], np.ones(shape, bool), np.arange(train.batch_size)), mesh
    )
    task = target_task(config)
    target = init_params(task.model, jax.random.key(0), mesh)
    tasks: dict[str, tuple[Task, Params, Params]] = {"target": (task, target, None)}
    for name, _ in config.drafts:
        task = draft_task(config, name)
        tasks[name] = (task, initial_draft(config, name, task, target, mesh), target)
    target = init_params(tasks["target"][0].model, jax.random.key(0), mesh)
    work: dict[str, Callable[[], None]] = {}
    for name, (task, params, frozen) in tasks.items():
        optimizer = make_optimizer(train, task)
        copy = jax.tree.map(lambda x: x.copy(), params)
        state = {"now": init_state(task, optimizer, copy, mesh)}

        def run(task=task, optimizer=optimizer, state=state, frozen=frozen):
            state["now"], metrics = train_step(task, train, optimizer, state["now"], frozen, batch)
            jax.block_until_ready(metrics)

        work[name] = run
    seconds = interleaved(work, repeats)
    for name, value in seconds.items():
        rate = train.batch_size * train.seq_len / value
        ratio = seconds["target"] / value
        print(f"training, sequence {train.seq_len}, {name}: {rate:,.0f} tokens/s "
              f"({ratio:.2f} x the target's rate, "
              f"{body_parameters(config.target):,} body parameters)")  # fmt: skip


def bench_decoding(config: ExperimentConfig, repeats: int) -> None:
    """Generation's wall time against its number of rounds times one jitted round."""
    weights, prompts, length = _pair(config)
    budgets, seeds = [config.eval.output_length] * len(prompts), range(len(prompts))
    names = (AUTOREGRESSIVE, *(name for name, _ in config.drafts))
    for name in names:
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
        print(f"decoding, B={len(prompts)}, context {length}, {name}: "
              f"{statistics.median(rates):,.0f} tokens/s; wall time "
              f"{statistics.median(ratios):.2f} x (rounds x one jitted round)")  # fmt: skip


def bench_oracle(config: ExperimentConfig) -> None:
    """Time of the oracle and of decoding for the same standard error of tau."""
    weights, prompts, length = _pair(config)
    ev, k = config.eval, config.train.k
    for name, _ in config.drafts:
        decoder = make_decoder(config, name)
        autoregressive = make_decoder(config, AUTOREGRESSIVE)
        budget = ev.output_length + k - 1

        def sample(seed: int, autoregressive=autoregressive, name=name, budget=budget):
            state = generate(autoregressive, weights[name], prompts, [budget] * len(prompts),
                             _seeds(seed, prompts))  # fmt: skip
            return np.asarray(state.tokens)[:, : length + budget]

        def oracle(texts, decoder=decoder, name=name):
            along = acceptance_along(decoder.target, decoder.strategy, weights[name], texts, length,
                                     ev.output_length, k, decoder.sampling)  # fmt: skip
            statistics_ = round_statistics(np.asarray(along))
            return statistics_.lengths_by_k[:, -1], statistics_.rounds_by_k[:, -1]

        def decode(seed: int, decoder=decoder, name=name):
            state = generate(decoder, weights[name], prompts, [ev.output_length] * len(prompts),
                             _seeds(seed, prompts))  # fmt: skip
            counts = np.asarray(state.counts)
            pairs = [generation_lengths(row) for row in counts]
            return tuple(np.array(x, float) for x in zip(*pairs, strict=True))

        texts = sample(0)
        oracle(texts), decode(0)
        repeats = 4
        begin = time.perf_counter()
        texts = [sample(seed) for seed in range(1, repeats + 1)]
        sampling = time.perf_counter() - begin
        begin = time.perf_counter()
        by_oracle = [oracle(text) for text in texts]
        teacher_forcing = time.perf_counter() - begin
        begin = time.perf_counter()
        by_decoder = [decode(seed) for seed in range(1, repeats + 1)]
        decoding = time.perf_counter() - begin
        variances = [_variance(x) for x in (by_oracle, by_decoder)]
        # Time to a given precision is time x variance. The samples are drawn once for all drafts.
        alone = decoding * variances[1] / (teacher_forcing * variances[0])
        with_samples = decoding * variances[1] / ((teacher_forcing + sampling) * variances[0])
        print(f"oracle, {name}: variance {variances[1] / variances[0]:.1f} times smaller than "
              f"decoding's; {alone:.1f} times faster at equal precision given the samples, "
              f"{with_samples:.1f} times with drawing them (shared by all drafts)")  # fmt: skip


def _seeds(seed: int, prompts) -> list[int]:
    return [seed * 1000 + row for row in range(len(prompts))]


def _variance(results) -> float:
    """Variance of the ratio sum(lengths) / sum(rounds), by linearization."""
    lengths = np.concatenate([r[0] for r in results])
    rounds = np.concatenate([r[1] for r in results])
    tau = lengths.sum() / rounds.sum()
    return float(np.sum((lengths - tau * rounds) ** 2) / rounds.sum() ** 2)


def _pair(config: ExperimentConfig):
    mesh = jax.sharding.get_mesh()
    task = target_task(config)
    target = init_params(task.model, jax.random.key(0), mesh)
    weights = {AUTOREGRESSIVE: Weights(target)}
    for name, _ in config.drafts:
        params = initial_draft(config, name, draft_task(config, name), target, mesh)
        weights[name] = Weights(target, params)
    length = max(config.eval.context_lengths)
    rng = np.random.default_rng(0)
    shape = (config.eval.batch_size, length)
    return weights, list(rng.integers(0, config.target.n_tokens, shape, np.int32)), length


if __name__ == "__main__":
    main()

"""Training and decoding as a whole with the attention kernels and without, side by side.

    .venv/bin/python -m launch.bench.attention --config=configs/paper_67m.py \
        --config.decode.dtype=bfloat16 --config.train.batch_size=16

Random weights and tokens of the config's sizes. For the target and every draft: the loss after a
few steps from the same parameters, and the time of a step; for decoding, greedily, the share of
tokens that are the same, and the time per token. On a CPU the kernels are interpreted, so that
times mean nothing there; `--layers=1 --length=64` makes it a minute's work.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from launch.bench.command_line import count
from launch.bench.timing import interleaved
from spire_jax.config.drafts import TransformerOptions
from spire_jax.config.files import command_line, ends_in_a_line
from spire_jax.config.schema import AUTOREGRESSIVE, ExperimentConfig
from spire_jax.costs.hardware import describe
from spire_jax.data.pipeline import Batch
from spire_jax.decoding import Weights, generate
from spire_jax.decoding.build import make_decoder
from spire_jax.models.sharding import make_mesh
from spire_jax.training.loop import init_state, make_optimizer, to_device, train_step
from spire_jax.training.tasks import (
    draft_task,
    init_params,
    initial_draft,
    target_task,
    teach,
    teacher,
    trainable,
    with_shared,
)
from spire_jax.training.workdir import ERRORS

KERNELS = {"tpu": "tpu", "gpu": "gpu", "cpu": "interpret"}  # of each platform


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=count, default=3, help="of training, then losses are held")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--layers", type=count, default=0, help="of the target; 0 = the config's")
    parser.add_argument("--length", type=count, default=0, help="of training and of the context")
    args, config = command_line(parser, argv)
    config = sized(config, args.layers, args.length)
    platform = jax.devices()[0].platform
    print(" | ".join(describe().values()))
    if platform == "cpu":
        print("A CPU: the kernels are interpreted here, and no time below says anything of them.")
    with jax.set_mesh(make_mesh(config.mesh)):
        if platform != "gpu":  # no kernel of ours trains there
            bench_training(config, KERNELS[platform], args.steps, args.repeats)
        bench_decoding(config, KERNELS[platform], args.repeats)


def sized(config: ExperimentConfig, layers: int, length: int) -> ExperimentConfig:
    """The config with fewer layers and shorter texts, where they are given."""
    drafts = [(name, dataclasses.replace(draft, n_layers=min(draft.n_layers, layers or 10**9))
               if isinstance(draft, TransformerOptions) else draft)
              for name, draft in config.drafts]  # fmt: skip
    layers, length = layers or config.target.n_layers, length or config.train.seq_len
    return dataclasses.replace(
        config,
        target=dataclasses.replace(config.target, n_layers=layers),
        drafts=tuple(drafts),
        train=dataclasses.replace(config.train, seq_len=length),
    )


def with_attention(config: ExperimentConfig, attention: str) -> ExperimentConfig:
    """The config with one implementation for training and decoding."""
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, attention=attention),
        decode=dataclasses.replace(config.decode, attention=attention, temperature=0.0),
    )


def bench_training(config: ExperimentConfig, kernel: str, steps: int, repeats: int) -> None:
    """Losses and step times of the target and of every draft."""
    mesh, shape = jax.sharding.get_mesh(), (config.train.batch_size, config.train.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.target.n_tokens, (2, *shape), np.int32)
    rows = np.ones(shape, bool), np.arange(shape[0])
    batch = to_device(Batch(tokens[0], tokens[1], *rows), mesh)
    target = init_params(target_task(config).model, jax.random.key(0), mesh)
    for name in ("target", *(name for name, _ in config.drafts)):
        losses: dict[str, list[float]] = {}
        work: dict[str, Callable[[], None]] = {}
        for attention in ("xla", kernel):
            chosen = with_attention(config, attention)
            task = target_task(chosen) if name == "target" else draft_task(chosen, name)
            params = target if name == "target" else initial_draft(chosen, name, task, target, mesh)
            params, fixed = trainable(task, with_shared(task, params, target))
            optimizer = make_optimizer(chosen.train, task)
            copied = jax.tree.map(lambda x: x.copy(), params)
            state = {"now": init_state(task, optimizer, copied, mesh)}
            losses[attention] = []

            def run(task=task, chosen=chosen, optimizer=optimizer, state=state, fixed=fixed,
                    losses=losses[attention]):  # fmt: skip
                lesson = None
                if task.reads is not None:
                    lesson = teach(teacher(chosen, [task]), target, batch)
                state["now"], metrics = train_step(
                    task, chosen.train, optimizer, state["now"], lesson, batch, fixed
                )
                losses.append(float(metrics["loss"]))

            work[attention] = run
        seconds = interleaved(work, max(repeats, steps - 1))
        xla, other = (losses[attention][steps - 1] for attention in ("xla", kernel))
        apart, longer = abs(other / xla - 1), seconds[kernel] / seconds["xla"]
        print(f"training {name}: loss of step {steps} {xla:.5f} (xla), {other:.5f} ({kernel}), "
              f"{apart:.1e} apart; a step takes {longer:.2f} x as long with the kernels",
              flush=True)  # fmt: skip


def bench_decoding(config: ExperimentConfig, kernel: str, repeats: int) -> None:
    """Greedy tokens and times, autoregressive and with every draft."""
    mesh, rng = jax.sharding.get_mesh(), np.random.default_rng(0)
    batch, length = config.eval.batch_size, config.train.seq_len
    prompts = [rng.integers(0, config.target.n_tokens, length // 2 + i) for i in range(batch)]
    budgets, seeds = [config.eval.output_length] * batch, range(batch)
    target = init_params(target_task(config).model, jax.random.key(0), mesh)
    for name in (AUTOREGRESSIVE, *(name for name, _ in config.drafts)):
        texts: dict[str, Any] = {}
        work: dict[str, Callable[[], None]] = {}
        for attention in ("xla", kernel):
            chosen = with_attention(config, attention)
            decoder = make_decoder(chosen, name)
            weights = Weights(decoder.target.cast(target))
            if decoder.strategy is not None:
                task = draft_task(chosen, name)
                draft = with_shared(task, initial_draft(chosen, name, task, target, mesh), target)
                weights = weights._replace(draft=decoder.strategy.model.cast(draft))
            run = functools.partial(generate, decoder, weights, prompts, budgets, seeds)

            def decode(run=run, attention=attention, texts=texts):
                texts[attention] = np.asarray(run().tokens)

            work[attention] = decode
        seconds = interleaved(work, repeats)
        at = [slice(len(prompt), len(prompt) + budgets[0]) for prompt in prompts]
        same = np.mean([np.mean(texts["xla"][i, s] == texts[kernel][i, s])
                        for i, s in enumerate(at)])  # fmt: skip
        longer = seconds[kernel] / seconds["xla"]
        print(f"decoding {name}, B={batch}: {same:.2%} of the greedy tokens are the same; "
              f"{longer:.2f} x as long with the kernels", flush=True)  # fmt: skip


if __name__ == "__main__":
    with ends_in_a_line(*ERRORS):
        main()

"""Decoding a small model on CPUs against the memory's bandwidth.

    python -m launch.bench.cpu --dtype=float32 --batch=1 --context=256,2048 --tokens=1,2,5,9

Random weights in SmolLM2-135M's sizes. For every batch, context and number of tokens a row (1: an
autoregressive step; k + 1: a verification) it prints the time of a pass, the bytes of weights and
cache that it must read, the GB/s that makes, their share of the read bandwidth measured in the
same alternation (two cores' matrix-vector products over 402 MB), and the time relative to the
first number of tokens. Then the GB/s of the products of one layer, and of the unembedding, alone.
Figures are the least of `--repeats`.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from launch.bench.command_line import count, sizes
from launch.bench.round_pieces import normal, random_like, random_params
from spire_jax.config.schema import ModelConfig
from spire_jax.models.attention import Compute
from spire_jax.models.caches import empty_full
from spire_jax.models.layers import product
from spire_jax.models.transformer import Model, Params, Transformer

SMOLLM2_135M = ModelConfig(
    n_layers=30, d_model=576, n_kv_heads=3, q_per_kv=3, d_head=64, d_ff=1536, vocab_size=49152,
    n_tokens=49152, tied=True, scale_in_init=False, max_len=8192,
)  # fmt: skip


def passes(model: Model, params: Params, batch: int, context: int, tokens: int, times: int):
    """A function that makes `times` passes over `tokens` a row behind `context`, and returns
    nothing; and the bytes that one pass reads."""
    config = model.config
    shape = jax.eval_shape(
        functools.partial(empty_full, config, batch, context + tokens, model.compute)
    )
    cache = random_like(shape, 1, lambda name: 1.0)
    positions = jnp.full((batch, 1), context) + jnp.arange(tokens)

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(params, cache, block):
        def one(_, carry):
            block, cache = carry
            logits, _, cache = model.bind(params).extend(cache, block, positions)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, times, one, (block, cache))

    block = jnp.zeros((batch, tokens), jnp.int32)
    compiled = loop.lower(params, cache, block).compile()
    state = [block, cache]

    def run() -> None:
        state[:] = jax.block_until_ready(compiled(params, state[1], state[0]))

    read = sum(x.nbytes for x in jax.tree.leaves((params, cache)))
    return run, read


def products(config: ModelConfig, compute: Compute, rows: int) -> dict[str, tuple[Callable, int]]:
    """Each product of a layer for all layers, and the unembedding; with the bytes of weights."""
    d, h, f = config.d_model, config.d_head, config.d_ff
    heads = config.n_kv_heads * config.q_per_kv * h
    sizes = {"query": (d, heads), "out": (heads, d), "gate": (d, f), "down": (f, d)}
    sizes |= {"unembedding": (d, config.vocab_size)}
    found: dict[str, tuple[Callable, int]] = {}
    for name, (inner, outer) in sizes.items():
        one = name == "unembedding"
        # A tied unembedding is the embedding, transposed.
        shape = (outer, inner) if one else (inner, outer)
        layers = range(1 if one else config.n_layers)
        weights = [normal(jax.random.key(i), shape, compute.dtype, 0.03) for i in layers]
        x = normal(jax.random.key(99), (rows, inner), compute.dtype, 1.0)

        @jax.jit
        def chain(x, weights, one=one):
            y = x
            for w in weights:
                z = jax.lax.optimization_barrier(product(y, w, transposed=one, compute=compute))
                y = x + z[:, :1] * jnp.asarray(0.01, x.dtype)
            return y

        run = functools.partial(lambda c, *a: jax.block_until_ready(c(*a)), chain, x, weights)
        found[name] = run, sum(w.nbytes for w in weights)
    return found


def read_all() -> tuple[Callable, int]:
    """A function that reads two large matrices in products with a vector, and their bytes."""
    weights = [normal(jax.random.key(i), (12288, 4096), "float32", 1.0) for i in range(2)]
    dot = jax.jit(lambda v, ws: [w @ v for w in ws])
    v = jnp.ones(4096)
    return lambda: jax.block_until_ready(dot(v, weights)), sum(w.nbytes for w in weights)


def least(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Least seconds of each run, all of them in turn."""
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats + 1):  # the first round warms up
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.cpu", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, default in (("batch", (1,)), ("context", (256,)), ("tokens", (1, 2, 5, 9))):
        parser.add_argument(f"--{name}", type=sizes, default=default, help="such as 1,4")
    parser.add_argument("--products", choices=("auto", "xla"), default="auto",
                        help="auto: the kernel for a few rows; xla: without it")  # fmt: skip
    parser.add_argument("--repeats", type=count, default=10)
    args = parser.parse_args(argv)
    report(SMOLLM2_135M, args)


def report(config: ModelConfig, args: argparse.Namespace) -> None:
    """Measure and print, for one model."""
    compute = Compute(dtype=args.dtype, products=args.products)
    model, times = Model(Transformer, config, compute), 2
    params = random_params(model, 0)
    reader, reader_bytes = read_all()
    for batch, context in itertools.product(args.batch, args.context):
        made = {str(t): passes(model, params, batch, context, t, times) for t in args.tokens}
        seconds = least({"read": reader} | {t: run for t, (run, _) in made.items()}, args.repeats)
        peak = reader_bytes / seconds["read"]
        first = seconds[str(args.tokens[0])]
        for t, (_, read) in made.items():
            rate = read * times / seconds[t]
            print(f"{args.dtype}, {args.products}, B = {batch}, L = {context}, {t} tokens a row: "
                  f"{1e3 * seconds[t] / times:.1f} ms, {read / 1e6:.0f} MB, {rate / 1e9:.1f} GB/s, "
                  f"{rate / peak:.0%} of {peak / 1e9:.1f}; {seconds[t] / first:.2f}",
                  flush=True)  # fmt: skip
    for rows in sorted({b * t for b in args.batch for t in args.tokens}):
        pieces = products(config, compute, rows)
        runs = {"read": reader} | {name: run for name, (run, _) in pieces.items()}
        seconds = least(runs, args.repeats)
        rates = (f"{name} {read / seconds[name] / 1e9:.1f}" for name, (_, read) in pieces.items())
        print(f"{rows} rows, GB/s: {', '.join(rates)}; "
              f"read {reader_bytes / seconds['read'] / 1e9:.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

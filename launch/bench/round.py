"""The cost model held against the clock: one speculation round, piece by piece, on this machine.

    python -m launch.bench.round --out=runs/round                 # a Llama-3-8B shape, bfloat16
    python -m launch.bench.round --small --out=runs/round_small   # under four minutes on a CPU core

Random weights, and caches filled with random numbers; nothing is prefilled or trained. For every
batch B, context L and depth k it times

    step          an autoregressive step: a round of depth 0, its sampling included
    draft_step    one step of the SPIRe draft, up to its logits
    verification  the target's pass over k + 1 tokens, up to its logits
    sampling      logits -> q and k drafted tokens, logits -> p, acceptance, the token that follows
    refresh       the draft's entries of k + 1 tokens, from the target's activations
    round         all of it, as the decoder does it; delta_t = round / step

and, in the same alternation, a large copy (bytes/s) and a large matrix product (FLOP/s), from
which `round_report` predicts the same times. `--operators` times the parts of a pass as well:
weight products, attention over the cache, unembedding.

Each piece is a jitted loop over donated buffers of which each pass depends on the one before, so
that caches are updated in place and nothing is computed ahead of the loop. The context stays at
L: a round's tokens are written, but the row's length is not advanced. A figure is the median over
loops; all pieces of one B and L take turns. Points are added to OUT/rounds.json as they are
measured, so that a grid can be split over several commands (`--batch=8`, then `--batch=32`).
"""

import argparse
import dataclasses
import functools
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench import round_report
from launch.bench.command_line import count, sizes
from launch.bench.round_pieces import (
    Buffers,
    normal,
    random_like,
    random_params,
    repeat,
    run_attention,
    run_copy,
    run_draft_step,
    run_product,
    run_products,
    run_refresh,
    run_round,
    run_sampling,
    run_unembedding,
    run_verification,
)
from launch.bench.round_report import DRAFT, LLAMA_3_8B, SMALL, Shape, experiment
from launch.bench.timing import interleaved
from spire_jax.config.files import ends_in_a_line
from spire_jax.config.paths import local_path
from spire_jax.config.schema import AUTOREGRESSIVE, ConfigError
from spire_jax.costs.hardware import describe
from spire_jax.costs.throughput import memory_bytes
from spire_jax.decoding import Decoder, Weights
from spire_jax.decoding.build import make_decoder
from spire_jax.models.caches import empty_full

# --- a point of the grid ------------------------------------------------------------------------


@dataclasses.dataclass
class Bench:
    """A shape's weights, and the programs compiled so far."""

    shape: Shape
    repeats: int = 5  # timed loops of each piece
    operators: bool = False  # time the parts of the target's passes too
    seconds: float = 0.1  # of one timed loop, at least

    def __post_init__(self) -> None:
        self.config = experiment(self.shape)
        self.autoregressive = make_decoder(self.config, AUTOREGRESSIVE)
        self.compiled: dict[Any, Any] = {}

    @functools.cached_property
    def weights(self) -> Weights:
        """Random parameters of the target and of the draft."""
        decoder = self.decoder(1)
        assert decoder.strategy is not None
        return Weights(random_params(decoder.target, 0), random_params(decoder.strategy.model, 1))

    def decoder(self, k: int) -> Decoder:
        """The speculative decoder of depth k."""
        decode = dataclasses.replace(self.config.decode, k=k)
        return make_decoder(dataclasses.replace(self.config, decode=decode), DRAFT)

    def needed_bytes(self, batch: int, context: int, k: int) -> float:
        """A lower bound of the device memory of a point: weights, caches, logits, the copy."""
        logits = 4.0 * batch * (k + 1) * self.shape.target.vocab_size
        held = memory_bytes(self.config, DRAFT, batch=batch, context=context + k)
        return held + 2 * logits + self.shape.copied

    def point(self, batch: int, context: int, ks: Sequence[int]) -> list[dict[str, Any]]:
        """One record for each depth, as `round_report` describes them."""
        store = self._shared_buffers(batch, context, max(ks))
        work: dict[tuple[str, int], tuple[Any, Decoder, tuple[str, ...]]] = {
            ("copy", 0): (run_copy, self.autoregressive, ("copied",)),
            ("product", 0): (run_product, self.autoregressive, ("product", "factor")),
            ("step", 0): (run_round, self.autoregressive, ("text", "target_cache")),
        }
        if self.operators:
            work |= self._operators(store, batch, 0)
        for k in ks:
            decoder = self.decoder(k)
            self._add_buffers(store, decoder, batch, context)
            held = "target_cache", "lengths", "block"
            pieces: dict[str, tuple[Any, tuple[str, ...]]] = {
                "draft_step": (run_draft_step, ("draft_state", "draft_logits", *held)),
                "verification": (run_verification, ("logits", "activations", *held)),
                "sampling": (run_sampling, ("token", "seeds", "draft_logits", "logits")),
                "refresh": (run_refresh, ("draft_state", "activations", *held)),
                "round": (run_round, ("text", "target_cache", "draft_state")),
            }
            work |= {(name, k): (body, decoder, needs) for name, (body, needs) in pieces.items()}
            if self.operators:
                work |= self._operators(store, batch, k)
        seconds, programs = self._time(store, work)
        copied = 2 * self.shape.copied / seconds["copy", 0]
        flops = 2.0 * self.shape.product**3 / seconds["product", 0]
        records = []
        for k in ks:
            caches = _bytes(store["target_cache", 0]) + _bytes(store["draft_state", k])
            records.append({
                **self.describe(), "batch": batch, "context": context, "k": k,
                "bytes_per_s": copied, "flops_per_s": flops,
                "seconds": {name: s for (name, at), s in seconds.items() if at in (0, k)
                            and name not in ("copy", "product")},
                "cache_bytes": caches, "temporary_bytes": _temporaries(programs["round", k]),
            })  # fmt: skip
        return [round_report.with_predictions(self.config, record) for record in records]

    def describe(self) -> dict[str, Any]:
        """What every record says of the machine and the models."""
        return {"shape": self.shape.name, "dtype": self.shape.dtype, **describe()}

    def _shared_buffers(self, batch: int, context: int, k: int) -> dict[tuple[str, int], Any]:
        """Buffers of all depths, under depth 0."""
        shape, target = self.shape, self.autoregressive.target
        full = functools.partial(empty_full, target.config, batch, context + k + 1, target.compute)
        one = {"copied": jax.ShapeDtypeStruct((shape.copied // 4,), jnp.int32)}
        square = jax.ShapeDtypeStruct((shape.product, shape.product), shape.dtype)
        drawn = random_like(
            {**one, "product": square, "factor": square}, 3,
            lambda name: shape.product**-0.5 if name == "factor" else 1.0,
        )  # fmt: skip
        shared = {
            **drawn,
            "target_cache": random_like(jax.eval_shape(full), 4, lambda name: 1.0),
            "draft_logits": normal(
                jax.random.key(5), (batch, target.config.vocab_size), jnp.float32, 1.0
            ),
            "lengths": jnp.full(batch, context, jnp.int32),
            "token": jnp.zeros(batch, jnp.int32),
            "seeds": jax.vmap(jax.random.key)(np.arange(batch, dtype=np.uint32)),
        }
        return {(name, 0): value for name, value in shared.items()} | {
            ("text", 0): self._text(batch, context, 0, k)
        }

    def _text(self, batch: int, context: int, k: int, room: int) -> Buffers:
        """A text of `context` random tokens per row, and the counters of a decoder of depth k."""
        width = context + room + 1
        tokens = np.random.default_rng(0).integers(0, self.shape.target.n_tokens, (batch, width))
        return {
            "tokens": jnp.asarray(tokens, jnp.int32),
            "kinds": jnp.zeros((batch, width), jnp.int8),
            "lengths": jnp.full(batch, context, jnp.int32),
            "ends": jnp.full(batch, width, jnp.int32),
            "done": jnp.zeros(batch, bool),
            "rounds": jnp.zeros(batch, jnp.int32),
            "counts": jnp.zeros((batch, k + 1), jnp.int32),
            "seeds": jax.vmap(jax.random.key)(np.arange(batch, dtype=np.uint32)),
        }

    def _add_buffers(self, store, decoder: Decoder, batch: int, context: int) -> None:
        """The buffers of one depth."""
        assert decoder.strategy is not None
        k, target = decoder.k, decoder.target
        empty = functools.partial(decoder.strategy.empty, None, batch, k, context + k + 1)
        state = jax.eval_shape(empty)
        wide = (batch, k + 1, target.config.d_model)
        dtype = jnp.dtype(target.compute.dtype)
        key = jax.random.key(6)
        store |= {
            ("text", k): self._text(batch, context, k, k),
            ("draft_state", k): random_like(state, 2, lambda name: 1.0),
            ("block", k): jnp.zeros((batch, k + 1), jnp.int32),
            ("logits", k): normal(key, (*wide[:2], target.config.vocab_size), jnp.float32, 1.0),
            ("activations", k): tuple(
                normal(key, wide, dtype, 1.0) for _ in decoder.strategy.collect
            ),
        }

    def _operators(self, store, batch: int, k: int):
        """The parts of the target's pass over k + 1 tokens, and their buffers."""
        c = self.shape.target
        dtype = jnp.dtype(self.shape.dtype)
        wide, key = (batch, k + 1), jax.random.key(7)
        store |= {
            ("x", k): normal(key, (*wide, c.d_model), dtype, 1.0),
            ("q", k): normal(key, (*wide, c.n_kv_heads, c.q_per_kv, c.d_head), dtype, 0.1),
        }
        if k == 0:
            store["block", 0] = jnp.zeros(wide, jnp.int32)
            store["logits", 0] = normal(key, (*wide, c.vocab_size), jnp.float32, 1.0)
        prefix = "verification_" if k else "step_"
        pieces: dict[str, tuple[Any, tuple[str, ...]]] = {
            "products": (run_products, ("x", "lengths", "block")),
            "attention": (run_attention, ("q", "target_cache", "lengths", "block")),
            "unembedding": (run_unembedding, ("x", "logits")),
        }
        return {
            (prefix + name, k): (body, self.autoregressive, held)
            for name, (body, held) in pieces.items()
        }

    def _time(self, store, work) -> tuple[dict[Any, float], dict[Any, Any]]:
        """Seconds of one pass of each piece, taken in turn, and the compiled programs."""
        programs = {}
        runs: dict[str, Callable[[], None]] = {}
        passes: dict[str, int] = {}
        for (name, k), (body, decoder, held) in work.items():
            at = {b: (b, k) if (b, k) in store else (b, 0) for b in held}
            weights = self.weights if decoder.k else Weights(self.weights.target)
            program = self._compile(body, decoder, weights, {b: store[at[b]] for b in held})

            def run(times: int, program=program, weights=weights, at=at) -> None:
                buffers = {b: store.pop(place) for b, place in at.items()}
                buffers = jax.block_until_ready(program(weights, buffers, jnp.int32(times)))
                store.update({place: buffers[b] for b, place in at.items()})

            run(1)
            begin = time.perf_counter()
            run(1)
            label = f"{name}, k = {k}"
            passes[label] = max(3, int(np.ceil(self.seconds / (time.perf_counter() - begin))))
            programs[name, k] = program
            runs[label] = functools.partial(run, passes[label])
        medians = interleaved(runs, self.repeats)
        seconds = [medians[label] / passes[label] for label in runs]
        return dict(zip(work, seconds, strict=True)), programs

    def _compile(self, body, decoder: Decoder, weights: Weights, buffers: Buffers):
        """A piece's program; those that do not depend on the context are compiled once."""
        leaves, structure = jax.tree.flatten(buffers)
        key = body, decoder, structure, tuple((x.shape, str(x.dtype)) for x in leaves)
        if key not in self.compiled:
            lowered = repeat.lower(body, decoder, weights, buffers, jnp.int32(1))
            self.compiled[key] = lowered.compile()
        return self.compiled[key]


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _temporaries(program: Any) -> int | None:
    """Bytes that a compiled program needs beside its arguments; None where jax does not say."""
    analysis = program.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def device_bytes() -> float:
    """Memory that jax may use on the first device; a CPU's is the machine's."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


# --- command line -------------------------------------------------------------------------------


def run_grid(bench: Bench, grid: Mapping[str, Sequence[int]], out: pathlib.Path) -> list[str]:
    """Measure every point and add it to OUT/rounds.json; what was left out, and why."""
    left_out: list[str] = []
    limit = device_bytes()
    for batch, context in itertools.product(grid["batch"], grid["context"]):
        point = f"B = {batch}, L = {context}"
        needed = bench.needed_bytes(batch, context, max(grid["k"]))
        begin, why = time.perf_counter(), ""
        if needed > limit:
            why = f"needs {needed / 1e9:.0f} GB, the device has {limit / 1e9:.0f}"
        else:
            try:
                records = bench.point(batch, context, grid["k"])
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                why = f"out of memory: {needed / 1e9:.0f} GB and temporaries"
        if why:
            left_out.append(f"{point} ({why})")
            print(f"left out: {left_out[-1]}", flush=True)
            continue
        round_report.add(out, records)
        taken = time.perf_counter() - begin
        print(f"{point}: {round_report.line(records)} [{taken:.0f} s]", flush=True)
    return left_out


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the grid, print the tables, write OUT/rounds.json and OUT/delta_t.png."""
    parser = argparse.ArgumentParser(prog="python -m launch.bench.round",
                                     description=__doc__.split("\n", 1)[0])  # fmt: skip
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, default=None,
                        help="a small shape in float32; the default on a CPU")  # fmt: skip
    parser.add_argument("--out", type=local_path, default=pathlib.Path("runs/round"))
    for name in ("batch", "context", "k"):
        parser.add_argument(f"--{name}", type=sizes, help="such as 8,32; default: by shape")
    parser.add_argument("--repeats", type=count, default=5, help="timed loops of each piece")
    parser.add_argument(
        "--operators",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="time the parts of a pass too; the default where --small is",
    )
    args = parser.parse_args(argv)
    on_cpu = jax.devices()[0].platform == "cpu"
    shape = SMALL if (on_cpu if args.small is None else args.small) else LLAMA_3_8B
    operators = shape is SMALL if args.operators is None else args.operators
    grid = {name: getattr(args, name) or getattr(shape, name) for name in ("batch", "context", "k")}
    with ends_in_a_line(ConfigError):
        if min(grid["context"]) < 2:
            raise ConfigError(f"--context={min(grid['context'])} must be 2 or more")
        bench = Bench(shape, args.repeats, operators)
        print(" | ".join([*describe().values(), shape.name, shape.dtype]), flush=True)
        left_out = run_grid(bench, grid, args.out)
        round_report.write(args.out, bench.describe(), left_out)


if __name__ == "__main__":
    main()

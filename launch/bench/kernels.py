"""The attention kernels on this device: whether they are right, and what they reach.

    .venv/bin/python -m launch.bench.kernels [--small] [--parts=check,decode,streaming] [--out=FILE]

(made to fit ten minutes on a GPU or a TPU; `--small` takes about a minute on two CPU cores, where
kernels are interpreted: that it runs is all it shows.) Prints a line per figure, and at the end
one per goal; FILE, a JSON file, has all so far, should a kernel never return. What is timed:
`timing`.

Decode attention is held against the bytes per second of a large copy, the visible keys and values
counted once; beside the kernel stand the XLA path of the models and, on a GPU and for one query,
cuDNN. Streaming attention, at the same number of tokens for all lengths, is held against the
fastest; beside the kernel (TPU) stand the XLA path and, without the sink, cuDNN's local window
(GPU) or jax's splash attention (TPU, with its default blocks). On a GPU the XLA path is ours.
"""

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench import timing
from launch.bench.command_line import minutes
from launch.bench.timing import Call, Run, compiled, seconds, verdict
from pallas_kernels.decode_attention import gpu, reference, tpu
from pallas_kernels.decode_attention.specs import Spec
from pallas_kernels.heads import GEMMA_2B, LLAMA_8B, PAPER_67M, SMOLLM2
from pallas_kernels.platform import cores_per_device
from pallas_kernels.streaming_attention import reference as streaming_reference
from pallas_kernels.streaming_attention import tpu as streaming_tpu
from pallas_kernels.streaming_attention.specs import Spec as Text
from spire_jax.config.paths import local_path
from spire_jax.costs.hardware import describe
from spire_jax.models.attention import Compute, attention, cached_attention
from spire_jax.models.caches import FullCache
from spire_jax.models.masks import View

PARTS = "check", "decode", "streaming"
UNIFORM, RAGGED = 0.85, 0.75  # goals: share of the copy's bytes per second
AS_FAST = 1.03  # times within this factor count as equal
LINEAR = 1.15  # how much the time per token may grow from 8k to 64k
# The models' own chunks of 128 queries take many minutes to compile at 64k.
XLA = Compute(attention="xla", attention_chunk=512)
WINDOW: dict[str, Any] = dict(window=64, sink=1)
RING: dict[str, Any] = dict(tokens=1, slots=69, ring=True, include_self=False, **WINDOW)
CHECKS = (
    Spec("verify", batch=8, slots=2056, **LLAMA_8B),
    Spec("one token", batch=8, tokens=1, slots=1100, **LLAMA_8B),
    Spec("SPIRe's draft step", batch=8, **RING, **LLAMA_8B),
    Spec("window in the cache", batch=8, slots=1100, window=300, sink=4, **PAPER_67M),
    Spec("16 tokens, heads of 64", batch=4, tokens=16, slots=500, **SMOLLM2),
    Spec("heads of 256", batch=4, slots=500, **GEMMA_2B),
)


def parts(text: str) -> tuple[str, ...]:
    """Of PARTS, in their order."""
    given = text.split(",")
    if unknown := set(given) - set(PARTS):
        raise argparse.ArgumentTypeError(f"unknown {sorted(unknown)}; there are {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in given)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--small", action="store_true", help="tiny shapes; all that a CPU runs")
    parser.add_argument("--parts", type=parts, default=PARTS, help="of check, decode, streaming")
    parser.add_argument("--minutes", type=minutes, default=7.0, help="after which nothing is begun")
    parser.add_argument("--out", type=local_path, help="a JSON file for all figures")
    args = parser.parse_args(argv)
    platform = jax.devices()[0].platform
    print(" | ".join(describe().values()))
    if platform == "cpu":
        if not args.small:
            parser.error("a CPU runs --small only: the real shapes need a GPU or a TPU")
        print("A CPU: kernels are interpreted here, and no time below says anything about them.")
        print("Here are:", ", ".join(decode_kernels(platform)), "(gpu: from jax 0.11.1 on).")
    run = Run(platform, args.small, time.perf_counter() + 60 * args.minutes)
    if args.out:
        run.keep = lambda: timing.save(args.out, {
            "machine": describe(), "copy_bytes_per_second": run.copy_rate, "goals": goals(run),
            "figures": run.records,
        })  # fmt: skip
    if "check" in args.parts:
        check_streaming(run)
        check_decode(run)
    if args.parts != ("check",):
        run.copy_rate = timing.copy_rate(args.small)
        print(f"a large copy: {run.copy_rate / 1e9:,.1f} GB/s, read and written", flush=True)
    if "decode" in args.parts:
        bench_decode(run)
    if "streaming" in args.parts:
        bench_streaming(run)
    print("\n".join(goals(run)))


# --- what is compared --------------------------------------------------------------------------


def decode_kernels(platform: str) -> dict[str, Call]:
    """Our kernels that run here, or are interpreted."""
    if platform == "tpu":
        return {"tpu kernel": functools.partial(tpu.decode_attention, cores=cores_per_device())}
    if platform == "gpu":
        return {"gpu kernel": gpu.decode_attention}
    on_cpu: dict[str, Call] = {
        "tpu kernel": functools.partial(tpu.decode_attention, block=128, interpret=True)
    }
    if hasattr(gpu.plgpu, "InterpretGPUParams"):
        on_cpu["gpu kernel"] = functools.partial(gpu.decode_attention, splits=4, interpret=True)
    return on_cpu


def decode_ways(platform: str, spec: Spec) -> dict[str, Call]:
    """All that computes decode attention here: (q, k, v, lengths, first positions)."""
    scale = spec.head_dim**-0.5

    def xla(q, k, v, lengths, first):
        positions = first[:, None] + jnp.arange(q.shape[1])
        return cached_attention(q, FullCache(k, v), positions, View(scale=scale), compute=XLA)

    def cudnn(q, k, v, lengths, first):
        heads = q.reshape(spec.batch, 1, -1, spec.head_dim)
        k, v = (x.reshape(spec.batch, -1, spec.kv_heads, spec.head_dim) for x in (k, v))
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        out = attend(heads, k, v, scale=scale, key_value_seq_lengths=lengths)
        return (out.reshape(q.shape),)

    # Ours come last, should one never return.
    ways: dict[str, Call] = {"cudnn": cudnn} if platform == "gpu" and spec.tokens == 1 else {}
    kernels = decode_kernels(platform).items()
    return ways | {"xla": xla} | {name: functools.partial(f, scale=scale) for name, f in kernels}


def streaming_ways(platform: str, text: Text) -> dict[str, Callable]:
    """All that computes streaming attention here: (q, k, v) -> output."""
    at, scale, left = np.arange(text.keys), text.head_dim**-0.5, WINDOW["window"] - 1
    interpret = platform == "cpu"

    def kernel(q, k, v):
        return streaming_tpu.streaming_attention(
            q, k, v, at, at, **WINDOW, scale=scale, interpret=interpret
        )[0]

    def xla(q, k, v):
        return attention(q, k, v, at, at, View(**WINDOW, scale=scale), compute=XLA)[0]

    def cudnn(q, k, v):
        heads = q.reshape(*q.shape[:2], -1, text.head_dim)
        return jax.nn.dot_product_attention(
            heads, k, v, scale=scale, is_causal=True, local_window_size=(left, 0),
            implementation="cudnn",
        ).reshape(q.shape)  # fmt: skip

    def splash(q, k, v):
        from jax.experimental.pallas.ops.tpu import splash_attention as library

        local = library.LocalMask((text.keys, text.keys), (left, 0), 0)
        mask = library.MultiHeadMask([local] * (text.kv_heads * text.q_per_kv))
        attend = library.make_splash_mha_single_device(mask, interpret=interpret)
        heads = (q * scale).reshape(*q.shape[:2], -1, text.head_dim)
        # It wants heads before tokens; the transposes are in its time, as they are in XLA's.
        out = jax.vmap(attend)(*(jnp.moveaxis(x, 1, 2) for x in (heads, k, v)))
        return jnp.moveaxis(out, 1, 2).reshape(q.shape)

    # XLA's program takes longest to compile, and comes last.
    if platform == "gpu":
        return {"cudnn": cudnn, "xla": xla}
    others: dict[str, Callable] = {"splash": splash} if platform == "tpu" else {}
    return {"tpu kernel": kernel, **others, "xla": xla}


# --- correctness -------------------------------------------------------------------------------


def check_decode(run: Run) -> None:
    """Our kernels against the references; what a row does not hold is nan."""
    for spec in CHECKS:
        if run.small:
            spec = dataclasses.replace(spec, batch=3, kv_heads=1, slots=min(spec.slots, 200))
        most = spec.slots * 3 if spec.ring else spec.slots
        chosen = np.random.default_rng(0).integers(2, most, spec.batch)
        texts = np.array([0, 1, most, *chosen])[: spec.batch]
        q, k, v, lengths, *rest = spec.arrays(jax.random.key(0), texts)
        width = spec.kv_heads * spec.head_dim  # the rest of a slot is not used
        dense = functools.partial(reference.decode_attention, **spec.options)
        wanted = timing.exactly(dense, q, k[..., :width], v[..., :width], lengths, *rest)
        beyond = (jnp.arange(k.shape[1]) >= lengths[:, None])[..., None]
        k, v = (jnp.where(beyond, jnp.nan, x).astype(x.dtype) for x in (k, v))
        for name, kernel in decode_kernels(run.platform).items():
            work = functools.partial(kernel, q, k, v, lengths, *rest, **spec.options)
            case = {"case": "check decode", "spec": spec.name, "way": name}
            run.attempt(case, functools.partial(timing.compared, work, wanted))


def check_streaming(run: Run) -> None:
    """Outputs and gradients against the reference's, by the ways that know a sink."""
    text = Text("", batch=1, keys=200 if run.small else 1000, **WINDOW, **_heads(run))
    q, k, v = text.arrays(jax.random.key(1))
    inputs = q, k, v, jnp.roll(q, 1, axis=1)

    def dense(q, k, v):
        return streaming_reference.streaming_attention(q, k, v, *text.positions, **text.options)[0]

    wanted = timing.exactly(timing.gradients(dense), *inputs)
    for name, way in streaming_ways(run.platform, text).items():
        if name in ("tpu kernel", "xla"):
            work = functools.partial(jax.jit(timing.gradients(way)), *inputs)
            case = {"case": "check streaming", "spec": "output, gradients", "way": name}
            run.attempt(case, functools.partial(timing.compared, work, wanted))


# --- speed -------------------------------------------------------------------------------------


def _heads(run: Run) -> dict[str, Any]:
    return LLAMA_8B | (dict(kv_heads=1) if run.small else {})


def bench_decode(run: Run) -> None:
    """Bytes per second of visible keys and values."""
    for name in decode_ways(run.platform, Spec("", tokens=1)):
        for slots in (64,) if run.small else (2048, 8192, 32768):
            spec = Spec("", batch=4 if run.small else 64, slots=slots, **_heads(run))
            shape = spec.shapes[1].shape
            row = jax.random.normal(jax.random.key(0), (2, 1, *shape[1:]), spec.dtype)
            copies = 2 if run.small else math.ceil(3 * timing.GIB / (4 * math.prod(shape)))
            sets = [[jnp.tile(x, (spec.batch, 1, 1)) for x in row] for _ in range(copies)]
            for tokens in (1, 5):
                spec = dataclasses.replace(spec, tokens=tokens)
                ways = decode_ways(run.platform, spec)
                if name in ways:
                    _time_decode(run, spec, name, ways[name], sets)


def _time_decode(run: Run, spec: Spec, name: str, way: Call, sets: list) -> None:
    """One program, with rows that are all full and with rows of any length."""
    q = jax.random.normal(jax.random.key(1), spec.shapes[0].shape, spec.dtype)
    slot_bytes = 4 * spec.kv_heads * spec.head_dim  # key and value
    rounds = run.rounds(len(sets) * spec.batch * spec.slots * slot_bytes)
    some = jnp.zeros(spec.batch, jnp.int32)
    program = functools.cache(lambda: compiled(way, q, sets, (some, some), rounds))

    def work(lengths: np.ndarray) -> dict[str, float]:
        common = jnp.asarray(lengths, jnp.int32), jnp.asarray(lengths - spec.tokens, jnp.int32)
        loop = program()
        spent = seconds(lambda: loop(q, sets, common)) / (rounds * len(sets))
        rate = int(lengths.sum()) * slot_bytes / spent
        return {"us": spent * 1e6, "GB/s": rate / 1e9, "of copy": rate / run.copy_rate}

    ragged = np.random.default_rng(0).integers(1, spec.slots + 1, spec.batch)
    for lengths, values in (("uniform", np.full(spec.batch, spec.slots)), ("ragged", ragged)):
        case = {"case": "decode", "L": spec.slots, "T": spec.tokens, "lengths": lengths}
        if not run.attempt(case | {"way": name}, functools.partial(work, values)):
            break  # the other would fail too


def bench_streaming(run: Run) -> None:
    """Time of a call, forward and with the gradients."""
    tokens, lengths = (512, (128, 256)) if run.small else (65536, (1024, 8192, 65536))
    for keys in lengths:
        text = Text("", batch=tokens // keys, keys=keys, **WINDOW, **_heads(run))
        q, k, v = text.arrays(jax.random.key(0))
        sets = [[k, v, jnp.roll(q, 1, axis=1)]]  # with q and its output, ten times any cache
        for part in ("forward", "forward+backward"):
            rounds = run.rounds(2 * (q.nbytes + k.nbytes) * (1 if part == "forward" else 3))
            for name, way in streaming_ways(run.platform, text).items():
                case = {"case": "streaming", "L": keys, "part": part, "way": name}
                run.attempt(case, functools.partial(_time_text, way, part, q, sets, rounds))


def _time_text(way: Callable, part: str, q, sets: list, rounds: int) -> dict[str, float]:
    def forward(q, k, v, _):
        return (way(q, k, v),)

    loop = compiled(forward if part == "forward" else timing.gradients(way), q, sets, (), rounds)
    return {"us": seconds(lambda: loop(q, sets, ())) / rounds * 1e6}


# --- goals -------------------------------------------------------------------------------------


def goals(run: Run) -> list[str]:
    """A line for each goal."""
    return [f"goal: {goal}: {said}" for goal, said in summary(run)]


def summary(run: Run) -> Iterator[tuple[str, str]]:
    """Each goal, and whether it is met."""
    checks = [r for r in run.records if r["case"].startswith("check")]
    right = [r for r in checks if r.get("right") and r["same bits twice"]]
    name = "kernels right on this device" + (" (interpreted)" if run.platform == "cpu" else "")
    found = f"{len(right)} of {len(checks)}"
    yield name, verdict(bool(checks), len(right) == len(checks), found)
    real = not run.small and run.platform != "cpu"
    ours = "tpu kernel" if run.platform == "tpu" else "gpu kernel"
    for lengths, goal in (("uniform", UNIFORM), ("ragged", RAGGED)):
        rows = list(run.found("of copy", case="decode", lengths=lengths, way=ours))
        worst = min((r["of copy"] for r in rows), default=0.0)
        name = f"decode attention, {lengths} lengths, at {goal:.0%} of a copy's bytes per second"
        yield name, verdict(real and len(rows) == 6, worst >= goal, f"worst {worst:.0%}")
    ours = "tpu kernel" if run.platform == "tpu" else "xla"
    for part in ("forward", "forward+backward"):
        name = f"streaming attention, {part} ({ours}),"
        rows = list(run.found("us", case="streaming", way=ours, part=part))
        whole = real and len(rows) == 3
        shares = [run.share_of_best(r) for r in rows]
        said = ", ".join(f"{x:.0%} at L={r['L']}" for r, x in zip(rows, shares, strict=True))
        met = min(shares, default=0) * AS_FAST >= 1
        yield f"{name} as fast as the fastest", verdict(whole, met, said)
        growth = rows[-1]["us"] / rows[-2]["us"] if whole else math.nan
        said = f"{growth:.2f} times the time per token at 64k as at 8k"
        yield f"{name} linear in the length", verdict(whole, growth <= LINEAR, said)


if __name__ == "__main__":
    main()

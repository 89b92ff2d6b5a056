"""Requests of all kinds through continuous batching, for a while, in one process.

    python -m launch.bench.soak --minutes=10 --seed=0

Servers of several methods, depths and samplings take turns, a call of rounds each, at waves of
random requests: texts, ids, messages and questions of several turns, with and without ids, seeds,
budgets and stop strings of their own, and lines that must fail. Weights are random and small. Held
after every wave:

    outputs   every line is answered once, a bad one by its error; a sample of the others, decoded
              again alone, comes out the same, and what is greedy at changing depths is what the
              target writes by itself (but for ties within rounding, which are counted)
    memory    the process's resident memory and the arrays that are alive
    programs  how often anything was compiled

Prints what was found and ends with status 1 where outputs differ, memory grows or something was
compiled after the first two waves. `--out=FILE` keeps the figures as JSON.
"""

import argparse
import dataclasses
import json
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from spire_jax.config.files import build
from spire_jax.config.paths import local_path
from spire_jax.config.schema import AUTOREGRESSIVE, ExperimentConfig
from spire_jax.costs.hardware import describe
from spire_jax.data.tokenizer import ByteTokenizer
from spire_jax.decoding import Weights
from spire_jax.decoding.build import make_decoder
from spire_jax.models.sampling import Sampling
from spire_jax.models.sharding import make_mesh
from spire_jax.serving.batching import Server, Serving
from spire_jax.serving.records import Failure, Request, Result
from spire_jax.serving.requests import Defaults, read_requests
from spire_jax.storage.metrics import write_whole
from spire_jax.training.tasks import draft_task, init_params, target_task

CONFIG = {
    "target": {"n_layers": 2, "d_model": 32, "n_kv_heads": 2, "q_per_kv": 2, "d_head": 8,
               "d_ff": 48, "max_len": 160},
    "drafts": {"spire": {"kind": "spire", "n_layers": 1, "window": 16, "init": "random"},
               "vanilla": {"kind": "vanilla", "n_layers": 1, "window": 0, "init": "random"},
               "magicdec": {"kind": "magicdec", "window": 16}},
    "train": {"seq_len": 64},
    "eval": {"context_lengths": (32,), "output_length": 16},
}  # fmt: skip
SHARPNESS = 8.0  # of the random target's distributions: few ties
SHAPES = Serving(batch=4, width=166, chunk=16, rounds_per_call=4)
ENDS = (256, *range(7))  # random outputs shall meet one now and then
# Name, method, depths (the first alone, or all of them by turns), sampling.
SERVERS: tuple[tuple[str, str, tuple[int, ...], Sampling], ...] = (
    ("autoregressive", AUTOREGRESSIVE, (0,), Sampling()),
    ("spire", "spire", (4,), Sampling()),
    ("vanilla", "vanilla", (2,), Sampling(0.8, top_k=20)),
    ("magicdec", "magicdec", (3,), Sampling(1.2, top_p=0.9)),
    ("greedy", AUTOREGRESSIVE, (0,), Sampling(0.0)),
    ("spire, greedy, depths 1, 2, 6", "spire", (1, 2, 6), Sampling(0.0)),
)
BAD = ('{"prompt": 3}', "{", '{"prompt": "a", "tokens": [1]}', '{"turns": []}', '{"tokens": [257]}',
       json.dumps({"prompt": "x" * 200}))  # fmt: skip
WARM = 2  # waves before memory and programs must stay as they are
GROWTH = 0.03  # of resident memory, from the waves after them to the last ones
TIE = 1e-4  # logits nearer than this are equal but for rounding


class Chatty(ByteTokenizer):
    """Bytes, and conversations."""

    def chat(self, messages):
        return self.encode("".join(f"<{m['role']}>{m['content']}\n" for m in messages))


def servers(config: ExperimentConfig) -> dict[str, Server]:
    """One for each of SERVERS, on the same random weights."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    target = init_params(target_task(config).model, jax.random.key(0), mesh)
    target["unembedding"] = SHARPNESS * target["unembedding"]
    drafts = {name: init_params(draft_task(config, name).model, jax.random.key(1), mesh)
              for name in config.trained}  # fmt: skip
    made = {}
    for name, method, depths, sampling in SERVERS:
        decode = dataclasses.replace(config.decode, k=max(*depths, 1))
        of = dataclasses.replace(config, decode=decode)
        decoder = make_decoder(of, method, ENDS, sampling)
        draft = drafts.get(method, target if decoder.strategy else None)
        made[name] = Server(decoder, Weights(target, draft), Chatty(), SHAPES, depths)
    return made


def line(rng: random.Random, index: int) -> tuple[dict[str, Any] | str, bool]:
    """A line of a prompt file, and whether it can be served."""
    if rng.random() < 0.1:
        return rng.choice(BAD), False

    def text(longest: int) -> str:
        return "".join(rng.choices("abcdef é\n", k=rng.randint(1, longest)))

    def message(role: str) -> dict[str, str]:
        return {"role": role, "content": text(20)}

    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"prompt": text(60)},
        lambda: {"tokens": rng.choices(range(257), k=rng.choice([1, 2, 16, 17, 90]))},
        lambda: {"messages": [message("system"), message("user")]},
        lambda: {"turns": [text(5) for _ in range(rng.randint(1, 3))],
                 "max_tokens": rng.randint(1, 9), "category": rng.choice("ab")},
    ]  # fmt: skip
    values = rng.choice(kinds)()
    if rng.random() < 0.5:
        values["id"] = rng.choice([f"é{index}", 1000 + index])
    if rng.random() < 0.3:
        values["seed"] = rng.randrange(2**32)
    if rng.random() < 0.5 and "turns" not in values:
        values["max_tokens"] = rng.randint(1, 40)
    if rng.random() < 0.5:
        values["stop"] = ["".join(rng.choices("abcXYZ12 ", k=rng.randint(1, 2)))
                          for _ in range(rng.randint(1, 4))]  # fmt: skip
    return values, True


class Soak:
    """Waves of requests through the servers, and what was found."""

    def __init__(self, made: dict[str, Server], seed: int):
        self.servers, self.rng = made, random.Random(seed)
        self.found: list[str] = []  # what is wrong
        self.counts = dict.fromkeys(("requests", "failed", "tokens", "alone", "ties"), 0)
        self.memory: list[int] = []  # bytes after every wave
        self.arrays: list[int] = []
        self.compiled: list[int] = []
        self._compilations = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        self._compilations += event == "/jax/core/compile/backend_compile_duration"

    def wave(self, size: int, sample: float) -> None:
        """`size` lines for every server, its outputs held against those that it gives alone."""
        answers: dict[str, list[Result | Failure]] = {name: [] for name in self.servers}
        wanted, good, going = {}, {}, {}
        for name, server in self.servers.items():
            lines = [line(self.rng, i) for i in range(size)]
            coded = [(each if isinstance(each, str) else json.dumps(each)).encode()
                     for each, _ in lines]  # fmt: skip
            defaults = Defaults(12, self.rng.randrange(2**31))
            wanted[name] = list(read_requests(coded, "jsonl", server.tokenizer, defaults))
            good[name] = [fine for _, fine in lines]
            going[name] = server.serve(wanted[name])
        while going:  # whoever is next, as many as come before the next one's turn
            name = self.rng.choice(sorted(going))
            answer = next(going[name], None)
            if answer is None:
                del going[name]
            else:
                answers[name].append(answer)
        for name in self.servers:
            self._judge(name, wanted[name], good[name], answers[name], sample)
        self.memory.append(resident())
        self.arrays.append(len(jax.live_arrays()))
        self.compiled.append(self._compilations)

    def _judge(
        self, name: str, wanted: Sequence[Request | Failure], good: Sequence[bool],
        answers: Sequence[Result | Failure], sample: float,
    ) -> None:  # fmt: skip
        served = {a.request.id: a for a in answers if isinstance(a, Result)}
        failed = [a for a in answers if isinstance(a, Failure)]
        self.counts["requests"] += len(wanted)
        self.counts["failed"] += len(failed)
        if len(answers) != len(wanted) or len(served) != sum(good):
            self.found.append(f"{name}: {len(wanted)} lines of which {sum(good)} can be served "
                              f"got {len(served)} results and {len(failed)} errors")  # fmt: skip
        for request in wanted:
            if not isinstance(request, Request) or request.id not in served:
                continue
            every = served[request.id].every
            self.counts["tokens"] += sum(len(result.tokens) for result in every)
            if self.rng.random() < sample:
                self._alone(name, request, every)

    def _alone(self, name: str, request: Request, found: Sequence[Result]) -> None:
        server = self.servers[name]
        greedy = len(server.controller.depths) > 1  # what is drawn there depends on the clock
        [alone] = (self.servers["greedy"] if greedy else server).serve([request])
        assert isinstance(alone, Result)
        self.counts["alone"] += 1
        for mine, its in zip(found, alone.every, strict=True):
            if (mine.tokens, mine.text, mine.finish_reason) == (
                its.tokens, its.text, its.finish_reason
            ):  # fmt: skip
                continue
            compiled = self._compilations
            tie = greedy and tied(server, mine, its)
            self._compilations = compiled  # a text of this length
            if tie:
                self.counts["ties"] += 1
                return  # what follows is another text
            self.found.append(f"{name}: {request} gave {mine.tokens} and, alone, {its.tokens}")

    def check(self) -> None:
        """Whether memory and programs stayed as they were."""
        if self.compiled[-1] != self.compiled[WARM - 1]:
            more = self.compiled[-1] - self.compiled[WARM - 1]
            self.found.append(f"{more} compilations after the first {WARM} waves")
        if self.arrays[-1] > self.arrays[WARM - 1]:
            self.found.append(f"arrays alive: {self.arrays[WARM - 1]}, then {self.arrays[-1]}")
        before, after = self.ends()
        if after > before * (1 + GROWTH):
            self.found.append(f"memory: {before / 2**20:.0f} MiB, then {after / 2**20:.0f}")

    def ends(self) -> tuple[float, float]:
        """Resident bytes after the first waves, and after the last: medians of a quarter each."""
        settled = self.memory[WARM:]
        part = max(len(settled) // 4, 1)
        return statistics.median(settled[:part]), statistics.median(settled[-part:])


def tied(server: Server, mine: Result, its: Result) -> bool:
    """Whether two greedy outputs part where the target's two best logits are the same."""
    prompt, tokens = mine.request.tokens.tolist(), [mine.tokens, its.tokens]
    if prompt != its.request.tokens.tolist():
        return True  # a turn after answers that parted
    same = next((i for i, pair in enumerate(zip(*tokens, strict=False)) if pair[0] != pair[1]),
                min(map(len, tokens)))  # fmt: skip
    text = np.array([[*prompt, *mine.tokens[:same]]], np.int32)
    logits = np.asarray(server.decoder.target.bind(server.weights.target)(text))[0, -1]
    best = np.sort(logits)[-2:]
    return bool(best[1] - best[0] < TIE)


def resident() -> int:
    """Bytes of this process that are in memory (Linux)."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def run(minutes: float, seed: int, size: int = 24, sample: float = 0.15) -> dict[str, Any]:
    """Waves until the time is over, three at least; the figures."""
    soak = Soak(servers(build(CONFIG)), seed)
    begin = time.perf_counter()
    for number in waves(begin + 60 * minutes):
        soak.wave(size, sample)
        print(
            f"wave {number}: {soak.counts}, {soak.memory[-1] / 2**20:.0f} MiB, "
            f"{soak.arrays[-1]} arrays, {soak.compiled[-1]} compilations",
            flush=True,
        )
    soak.check()
    before, after = soak.ends()
    return {
        "machine": describe(),
        "seconds": time.perf_counter() - begin,
        "waves": len(soak.memory),
        **soak.counts,
        "rounds": {name: sum(server.rounds.values()) for name, server in soak.servers.items()},
        "memory_mib": [round(before / 2**20, 1), round(after / 2**20, 1)],
        "compilations_after_warm_up": soak.compiled[-1] - soak.compiled[WARM - 1],
        "found": soak.found,
    }


def waves(end: float) -> Iterator[int]:
    """1, 2, ... until the clock says `end`."""
    number = 0
    while number <= WARM or time.perf_counter() < end:
        number += 1
        yield number


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m launch.bench.soak", None, __doc__,
                                     formatter_class=raw)  # fmt: skip
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=local_path, help="the figures, as JSON")
    args = parser.parse_args(argv)
    figures = run(args.minutes, args.seed)
    text = json.dumps(figures, indent=1)
    print(text)
    if args.out:
        write_whole(args.out, text + "\n")
    return 1 if figures["found"] else 0


if __name__ == "__main__":
    sys.exit(main())

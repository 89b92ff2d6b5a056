"""Decode prompts with a target and a draft of it: trained ones, pretrained, or exported.

    python -m spire_jax.decode --config=configs/quickstart.py --workdir=runs/quickstart \\
        --method=spire --prompts=prompts.jsonl --out=outputs.jsonl
    echo "def main():" | python -m spire_jax.decode ... --method=spire --prompts=- --out=-
    python -m spire_jax.decode --target=CHECKPOINT --draft=FOLDER --interactive

A line of a JSONL file has one of prompt (text), tokens (ids), messages (for a chat model) and turns
(questions, each asked on top of the answer before), and may have id (or question_id), category,
max_tokens, seed and stop. Each request's output is a JSON line, written when it is finished. A seed
reproduces a request's output whatever the other requests are, for the same method, k and shapes
(batch, width and chunk: they are printed). With decode.depths it does not: depths are chosen by the
clock. Status: 0, 1 if a request failed, 2 if nothing could be served.

In the summary tau is the mean of accepted + 1 over all rounds; beside it is what of it was kept:
output tokens a round, without what a budget, an end of sequence or a stop string cut off.
"""

import argparse
import collections
import contextlib
import dataclasses
import logging
import os
import pathlib
import stat
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from rich.console import Console

from spire_jax.config.files import command_line, in_words
from spire_jax.config.paths import local, local_path, path_or_url
from spire_jax.config.schema import ConfigError, ExperimentConfig
from spire_jax.config.values import MOST
from spire_jax.results.intervals import mean_generation_length
from spire_jax.serving.batching import Inbox, Server, Serving
from spire_jax.serving.interactive import converse
from spire_jax.serving.loading import Loaded, for_method, load_for_decoding
from spire_jax.serving.outputs import Results, open_results
from spire_jax.serving.prompts import RequestError
from spire_jax.serving.records import Failure, Request, Result
from spire_jax.serving.requests import FORMATS, Defaults, prompt_length, read_requests
from spire_jax.training.workdir import ERRORS

WIDTH = 2048  # of a row, without k, where the requests are not known beforehand
STEP = 256  # a width that follows from the requests is a multiple of it
SIDE_BY_SIDE = 8  # requests, where there may be many


def arguments() -> argparse.ArgumentParser:
    """The command's own flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m spire_jax.decode", None, __doc__,
                                     formatter_class=raw)  # fmt: skip
    add = parser.add_argument
    add("--target", type=local, metavar="PATH", help="a pretrained target, by itself (no config is "
        "needed) or in place of the config's: a GGUF file, or a folder with config.json and "
        "safetensors")  # fmt: skip
    add("--workdir", type=path_or_url, help="where target or draft were trained; not needed for a "
        "pretrained target by itself, or with a --draft")  # fmt: skip
    add("--draft", type=local_path, metavar="FOLDER", help="a draft that python -m "
        "spire_jax.export has written")  # fmt: skip
    add("--method", help="a draft's name, or its kind where that is plain; or autoregressive; "
        "by default the --draft, without one the config's only draft, if it has any")  # fmt: skip
    add("--prompts", type=local, metavar="FILE", help="prompts; - reads stdin")
    add("--format", choices=FORMATS, help="jsonl (also where the name ends so), text (all of it "
        "one prompt; otherwise), or lines (one prompt a line)")  # fmt: skip
    add("--out", type=local, default="-", metavar="FILE", help="JSON lines; - writes to stdout")
    add("--resume", action="store_true", help="append to --out what is not served in it")
    add(
        "--interactive", action="store_true", help="prompts from the keyboard, answers as they come"
    )
    add("--batch-size", type=int, help="requests side by side; by default 8, 1 for a text or "
        "--interactive, and on several devices the next multiple of their data x fsdp")  # fmt: skip
    add("--width", type=int, help="positions of a request: prompt + output + k; by default what "
        f"the requests need, or, where they are not known beforehand, {WIDTH} + k")  # fmt: skip
    add("--chunk", type=int, help="prompt tokens read at once (decode.chunk)")
    add("--max-tokens", type=int, default=128, help="tokens to generate, unless a line says; of "
        "several turns, in each")  # fmt: skip
    add("--temperature", type=float, help="0 = greedy (decode.temperature)")
    add("--top-k", type=int, help="0 = off (decode.top_k)")
    add("--top-p", type=float, help="1 = off (decode.top_p)")
    add("--seed", type=int, default=0, help="each request's own is derived from it")
    add("--stop", action="append", default=[], metavar="TEXT", help="end an output before this "
        "text; may be given more than once")  # fmt: skip
    add("--ignore-eos", action="store_true", help="go on after an end of sequence")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, config = command_line(arguments(), argv, decoding=True)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    compiled = _CompileClock()
    try:
        return _run(args, config, compiled)
    except (*ERRORS, RequestError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        print(f"error: {reason}; if this is about memory, lower --width or --batch-size (the last "
              f"lines above say what they are)", file=sys.stderr)  # fmt: skip
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is written", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace, config: ExperimentConfig, compiled: "_CompileClock") -> int:
    _check(args)
    for_method(args, config)  # before anything is opened
    defaults = Defaults(args.max_tokens, args.seed, tuple(args.stop))
    if args.interactive:
        loaded = load_for_decoding(args, config)
        with jax.set_mesh(loaded.mesh):
            server = _server(args, config, loaded, 1, args.width or WIDTH + loaded.deepest)
            converse(server, defaults, Console())
        return 0
    form = args.format or ("jsonl" if args.prompts.endswith(".jsonl") else "text")
    with _lines(args.prompts) as lines, open_results(args.out, args.resume) as results:
        loaded = load_for_decoding(args, config)
        source = read_requests(lines, form, loaded.tokenizer, defaults)

        results.made_by(loaded.made_by)
        requests: list[Request | Failure] | Inbox
        if args.prompts == "-" and form != "text":
            requests = Inbox(results.left(source))
            width = args.width or WIDTH + loaded.deepest
        else:
            everything = list(source)
            # Of those that are done too: outputs depend on the width.
            width = args.width or _needed(everything, loaded, args.max_tokens)
            requests = list(results.left(everything))
            if not everything:
                raise RequestError(f"--prompts={args.prompts} holds no prompt")
            if not requests:
                print(f"all of {args.prompts} is in {args.out}", file=sys.stderr)
                return 0
        with jax.set_mesh(loaded.mesh):
            batch = 1 if form == "text" else SIDE_BY_SIDE
            server = _server(args, config, loaded, batch, width)
            return _serve(server, requests, results, compiled)


def _serve(
    server: Server, requests: Iterable[Request | Failure] | Inbox, results: Results,
    compiled: "_CompileClock",
) -> int:  # fmt: skip
    """Serve, write, sum up on stderr; the command's status."""
    served = failed = 0
    total, categories = _Tally(), collections.defaultdict[str, _Tally](_Tally)
    waited: list[float] = []
    seconds = time.perf_counter()
    try:
        for found in server.serve(requests):
            results.write(found)
            if isinstance(found, Failure):
                failed += 1
                print(f"error: {found.id!r}: {found.error}", file=sys.stderr)
                continue
            served += 1
            waited.append(found.every[0].first_token)
            for result in found.every:
                total.add(result)
                if found.request.category:
                    categories[found.request.category].add(result)
    finally:
        seconds = time.perf_counter() - seconds
        first = ""
        if waited:
            began = server.first_token - compiled.began
            first = (f"\ntime to first token: {statistics.median(waited):.3f} s (median of the "
                     f"requests), the first of all {began:.1f} s after the start")  # fmt: skip
        for name, tally in sorted(categories.items()):
            print(f"{name}: {tally}", file=sys.stderr)
        s, by_depth = server.serving, {k: n for k, n in server.rounds.items() if n}
        print(
            f"{served} requests, {failed} failed; {total.tokens} tokens in {seconds:.2f} s, "
            f"{total.tokens / max(seconds, 1e-9):.1f} tokens/s; {total}; "
            f"rounds by depth {by_depth}{first}\n"
            f"batch {s.batch}, width {s.width}, chunk {s.chunk}; {server.compilations} programs "
            f"for serving, {compiled.count} compilations in all, {compiled.seconds:.1f} s",
            file=sys.stderr,
        )
    if not served and not failed and not results.written:
        raise RequestError("stdin held no prompt")
    return 1 if failed else 0


@dataclasses.dataclass
class _Tally:
    """Rounds, what they accepted, and what of it became output."""

    rounds: int = 0
    emitted: int = 0  # accepted + 1, round by round
    tokens: int = 0

    def add(self, result: Result) -> None:
        self.rounds += len(result.generation_lengths)
        self.emitted += sum(result.generation_lengths)
        self.tokens += len(result.tokens)

    def __str__(self) -> str:
        if not self.rounds:
            return "no rounds"
        kept = mean_generation_length(self.tokens, self.rounds)
        return (f"tau {mean_generation_length(self.emitted, self.rounds):.3f}, of which "
                f"{kept:.3f} tokens a round were kept")  # fmt: skip


def _server(
    args: argparse.Namespace, config: ExperimentConfig, loaded: Loaded, least: int, width: int
) -> Server:
    """A server of `--batch-size` slots; without one, of as many from `least` as the mesh allows."""
    decode, model = config.decode, loaded.decoder.target.config
    width = min(width, model.max_len + loaded.deepest) if model.max_len else width
    chunk_rows = loaded.mesh.shape["data"] * loaded.mesh.shape["fsdp"]
    batch = args.batch_size or -(-least // chunk_rows) * chunk_rows
    if batch % chunk_rows:
        raise ConfigError(f"--batch-size={batch} is not a multiple of mesh data x fsdp = "
                          f"{chunk_rows}")  # fmt: skip
    serving = Serving(batch, width, min(args.chunk or decode.chunk, width), chunk_rows,
                      decode.chunks_per_round,
                      1 if args.interactive else min(decode.rounds_per_call, 8))  # fmt: skip
    return Server(loaded.decoder, loaded.weights, loaded.tokenizer, serving, loaded.depths)


def _needed(requests: Sequence[Request | Failure], loaded: Loaded, max_tokens: int) -> int:
    """Positions for the longest of requests, in steps.

    Those that no model's context limits are not to be had for the asking: a line whose own
    max_tokens goes beyond `WIDTH`, and beyond what the others need with `max_tokens`, fails alone.
    Of several turns as many as there is room for are answered. (As if answers, read as text, took
    no more tokens than they were written in.)
    """
    asked = [(r, prompt_length(r, loaded.tokenizer), max(len(r.turns), 1))
             for r in requests if isinstance(r, Request)]  # fmt: skip
    longest = max((length + max_tokens * turns for _, length, turns in asked), default=0)
    most = loaded.decoder.target.config.max_len or max(WIDTH, longest)
    needs = [min(length + r.max_tokens * turns, most)
             for r, length, turns in asked if len(r.tokens) + r.max_tokens <= most]  # fmt: skip
    return -(-(max(needs, default=1) + loaded.deepest) // STEP) * STEP


def _check(args: argparse.Namespace) -> None:
    if args.interactive == bool(args.prompts):
        raise RequestError("give --prompts=FILE (or -), or --interactive")
    if args.workdir and not args.config:
        raise RequestError(f"--workdir={args.workdir}: give the --config that it was made with")
    for name in ("batch_size", "width", "chunk", "max_tokens"):
        value = getattr(args, name)
        if value is not None and not 1 <= value < MOST:
            raise RequestError(f"--{name.replace('_', '-')}={value}: use 1 or more, under {MOST}")
    if "" in args.stop:
        raise RequestError("--stop is empty; give the text that ends an output")
    if args.resume and args.out == "-":
        raise RequestError("--resume needs --out=FILE")
    if args.interactive and args.out != "-":
        raise RequestError("--interactive writes no file: leave out --out, or give --prompts")


def _lines(path: str) -> contextlib.AbstractContextManager[Any]:
    if path == "-":
        # A stream of its own: a thread may be reading it (`Inbox`), and to close it, as the
        # interpreter does in the end with stdin's, would wait for the next line.
        return contextlib.nullcontext(os.fdopen(sys.stdin.buffer.fileno(), "rb", closefd=False))
    lines = pathlib.Path(path).open("rb")  # noqa: SIM115
    found = os.fstat(lines.fileno())
    if stat.S_ISREG(found.st_mode) and not found.st_size:  # a pipe's size is 0 too
        lines.close()
        raise RequestError(f"--prompts={path} is empty")
    return lines


class _CompileClock:
    """Compilations since it began, and the time; listens to JAX's own events."""

    def __init__(self) -> None:
        self.count, self.seconds, self.began = 0, 0.0, time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count, self.seconds = self.count + 1, self.seconds + duration_secs

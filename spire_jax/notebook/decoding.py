"""Decoded text as HTML, every token coloured by who chose it."""

import dataclasses
import html
from collections.abc import Sequence

import jax
import numpy as np

from spire_jax.config.files import command_line
from spire_jax.config.schema import ExperimentConfig
from spire_jax.data.tokenizer import Tokenizer
from spire_jax.models.transformer import Params
from spire_jax.results.intervals import mean_generation_length
from spire_jax.serving.batching import Server, Serving
from spire_jax.serving.command import arguments as flags_of_decoder
from spire_jax.serving.interactive import visible
from spire_jax.serving.loading import load_for_decoding
from spire_jax.serving.prompts import RequestError
from spire_jax.serving.records import Failure, Request, Result, acceptance
from spire_jax.serving.requests import Defaults, request_of
from spire_jax.serving.text import TextStream

KINDS = {
    "accepted": "drafted and accepted",
    "correction": "the target's correction",
    "bonus": "its bonus token",
}
# Translucent, so that the page's own text colour stays legible on them, light or dark; the lines
# tell the kinds apart without colour. A round begins where there is a gap.
STYLE = """<style>
.spire-text { white-space: pre-wrap; font-family: monospace; line-height: 1.7; margin: 0.5em 0 }
.spire-text .prompt { opacity: 0.65 }
.spire-text .accepted { background: rgba(27, 160, 100, 0.28) }
.spire-text .correction { background: rgba(230, 150, 20, 0.42); border-bottom: 2px dotted }
.spire-text .bonus { background: rgba(60, 130, 230, 0.36); border-bottom: 2px solid }
.spire-text .first { margin-left: 3px }
.spire-rounds { display: flex; align-items: flex-end; gap: 2px }
.spire-rounds span { width: 7px; background: rgba(27, 160, 100, 0.8) }
</style>"""
BAR = 7  # pixels per token of a round


@dataclasses.dataclass(frozen=True)
class Round:
    """A round's tokens, `accepted` of `k` drafted, then the target's own."""

    tokens: tuple[int, ...]
    accepted: int
    k: int

    def kind(self, place: int) -> str:
        """A key of KINDS, or "" where nothing was drafted."""
        if place < self.accepted:
            return "accepted"
        return "" if self.k == 0 else "bonus" if self.accepted == self.k else "correction"


@dataclasses.dataclass(frozen=True)
class Answer:
    """A prompt, its continuation round by round, and the decoder's own record of it."""

    prompt: str
    rounds: tuple[Round, ...]
    result: Result


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What one method made of the prompts."""

    method: str
    config: ExperimentConfig
    answers: tuple[Answer, ...]
    tokenizer: Tokenizer
    draft: Params  # its parameters; None without a draft

    @property
    def tau(self) -> float:
        """Tokens per round over all answers, as the report counts them."""
        lengths = [n for answer in self.answers for n in answer.result.generation_lengths]
        return float(mean_generation_length(lengths, len(lengths)))


def decode(
    arguments: Sequence[str], prompts: Sequence[str], method: str, max_tokens: int = 128
) -> Decoded:
    """Continue prompts as `python -m spire_jax.decode` does, with these arguments and a method.

    `arguments` are --config, --workdir and --config.section.key=value. RequestError for prompts
    that cannot be served; ConfigError where weights are missing.
    """
    args, config = command_line(
        flags_of_decoder(), [*arguments, f"--method={method}"], decoding=True
    )
    loaded = load_for_decoding(args, config)
    defaults = Defaults(max_tokens)
    requests = [
        request_of({"prompt": prompt}, i, loaded.tokenizer, defaults)
        for i, prompt in enumerate(prompts)
    ]
    rows = loaded.mesh.shape["data"] * loaded.mesh.shape["fsdp"]
    width = max((len(r.tokens) for r in requests), default=1) + max_tokens + loaded.deepest
    rounds: dict[int | str, list[Round]] = {request.id: [] for request in requests}

    def watch(request: Request, tokens: list[int], accepted: int, k: int) -> None:
        rounds[request.id].append(Round(tuple(tokens), accepted, k))

    results: dict[int | str, Result] = {}
    with jax.set_mesh(loaded.mesh):
        serving = Serving(-(-len(requests) // rows) * rows, width, min(config.decode.chunk, width),
                          rows)  # fmt: skip
        server = Server(loaded.decoder, loaded.weights, loaded.tokenizer, serving, loaded.depths)
        for found in server.serve(requests, watch):
            if isinstance(found, Failure):
                raise RequestError(f"prompt {found.id}: {found.error}")
            results[found.request.id] = found
    answers = [
        Answer(prompt, tuple(rounds[request.id]), results[request.id])
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    return Decoded(method, config, tuple(answers), loaded.tokenizer, loaded.weights.draft)


def coloured(decoded: Decoded) -> str:
    """HTML: a legend, then each text with its rounds' lengths; nothing in the text is markup."""
    legend = " &nbsp; ".join(f'<span class="{k}">{what}</span>' for k, what in KINDS.items())
    parts = [STYLE, f'<div class="spire-text"><b>{html.escape(decoded.method)}</b>, tau = '
             f"{decoded.tau:.2f} tokens per round &nbsp; {legend}</div>"]  # fmt: skip
    for answer in decoded.answers:
        result = answer.result
        lengths = result.generation_lengths
        share = acceptance(lengths, result.depths)
        parts.append(
            f'<div class="spire-text"><span class="prompt">{_escaped(answer.prompt)}</span>'
            f"{_tokens(answer, decoded.tokenizer)}</div>{_bars(lengths)}"
            f"<div>{len(result.tokens)} tokens in {len(lengths)} rounds: tau {result.tau:.2f}, "
            f"{result.kept:.2f} kept a round; {share['accepted']} of {share['drafted']} drafted "
            f"tokens accepted</div>"
        )
    return "\n".join(parts)


def _tokens(answer: Answer, tokenizer: Tokenizer) -> str:
    """A span per token; the bytes of one character are shown with the last of them."""
    stream, spans = TextStream(tokenizer.decode), []
    for number, one in enumerate(answer.rounds, 1):
        for place, token in enumerate(one.tokens):
            kind = one.kind(place)
            name = f"{kind} first" if place == 0 else kind
            title = f"round {number}, token {place + 1}: {KINDS.get(kind, 'the target')}"
            text = _escaped(stream.feed([token]))
            spans.append(f'<span class="{name}" title="{title}">{text}</span>')
    return "".join(spans) + _escaped(stream.end())


def _bars(lengths: Sequence[int]) -> str:
    """The rounds' lengths as a row of bars."""
    bars = "".join(
        f'<span style="height: {BAR * n}px" title="round {i}: {n}"></span>'
        for i, n in enumerate(np.asarray(lengths).tolist(), 1)
    )
    return f'<div class="spire-rounds">{bars}</div>'


def _escaped(text: str) -> str:
    return html.escape(visible(text))

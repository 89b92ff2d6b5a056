"""A request, and what comes back for it: a result, or a failure; each with its output line."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from spire_jax.results.intervals import mean_generation_length

Id = str | int
EOS, STOP, LENGTH = "eos", "stop", "length"  # why a request ended


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to be continued."""

    id: Id
    tokens: Int[np.ndarray, " n"]
    max_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    line: int = 0  # of the prompt file, from 1; 0 = there is none
    category: str = ""
    turns: tuple[str, ...] = ()  # of a conversation, all of them
    answers: tuple["Result", ...] = ()  # to the turns before the one that `tokens` end with
    asked: str = ""  # a hash of what was asked for: prompt, budget, seed and stop strings


@dataclasses.dataclass(frozen=True)
class Failure:
    """A request that was not served, and why."""

    id: Id
    error: str
    line: int = 0
    category: str = ""
    answers: tuple["Result", ...] = ()  # to the turns before the one that failed

    def record(self) -> dict[str, Any]:
        """The output line."""
        values: dict[str, Any] = {"id": self.id, "line": self.line}
        if self.category:
            values["category"] = self.category
        if self.answers:
            values["turns"] = [answer.answer() for answer in self.answers]
        return values | {"error": self.error}


def refused(request: Request, error: str) -> Failure:
    """A request, or a later turn of one, that cannot be served."""
    if request.answers:
        error = f"turn {len(request.answers) + 1}: {error}"
    return Failure(request.id, error, request.line, request.category, request.answers)


@dataclasses.dataclass(frozen=True)
class Result:
    """A request that was served."""

    request: Request
    tokens: list[int]  # emitted, without an end of sequence and what a stop string cut off
    text: str
    generation_lengths: list[int]  # round by round: accepted + 1, even where the end cut it
    depths: list[int]  # drafted tokens, round by round
    finish_reason: str
    queued: float  # seconds from when it was read to when it got a slot
    prefill: float  # ... to its first round
    decode: float  # ... to its end
    first_token: float = 0.0  # seconds from when it was read to its first token

    @property
    def tau(self) -> float:
        """Tokens per round, of what the rounds accepted (docs/words.md)."""
        return float(mean_generation_length(self.generation_lengths, len(self.generation_lengths)))

    @property
    def kept(self) -> float:
        """Tokens per round, of what became output."""
        return float(mean_generation_length(len(self.tokens), len(self.generation_lengths)))

    @property
    def every(self) -> "tuple[Result, ...]":
        """The answers to all turns."""
        return (*self.request.answers, self)

    def record(self) -> dict[str, Any]:
        """The output line; of several turns, their answers in a list."""
        request = self.request
        values: dict[str, Any] = {"id": request.id, "line": request.line}
        if request.category:
            values["category"] = request.category
        if request.turns:
            return values | {"turns": [result.answer() for result in self.every]}
        return values | self.answer()

    def answer(self) -> dict[str, Any]:
        """What the output line says of one answer."""
        return {
            "prompt_tokens": len(self.request.tokens),
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "generation_lengths": self.generation_lengths,
            "tau": round(self.tau, 6),
            "kept_per_round": round(self.kept, 6),
            "acceptance": acceptance(self.generation_lengths, self.depths),
            "timing": {
                "queued": round(self.queued, 6),
                "prefill": round(self.prefill, 6),
                "decode": round(self.decode, 6),
                "first_token": round(self.first_token, 6),
                "tokens_per_s": round(len(self.tokens) / max(self.decode, 1e-9), 3),
            },
        }


def acceptance(generation_lengths: list[int], depths: list[int]) -> dict[str, Any]:
    """Accepted and drafted tokens, and the share accepted at each depth of those that got there."""
    accepted, drafted = np.array(generation_lengths) - 1, np.array(depths)
    shares = []
    for depth in range(1, max(depths, default=0) + 1):
        tried = int(np.sum((drafted >= depth) & (accepted >= depth - 1)))
        passed = int(np.sum(accepted >= depth))
        shares.append(round(passed / tried, 6) if tried else None)
    return {"accepted": int(accepted.sum()), "drafted": int(drafted.sum()), "by_depth": shares}

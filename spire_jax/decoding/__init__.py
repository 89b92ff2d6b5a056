"""Decoding: rounds (`rounds`), a batch of slots that requests pass through (`slots`, `batching`),
and the command `python -m spire_jax.decode`."""

from spire_jax.decoding.rounds import (
    ACCEPTED,
    BONUS,
    CORRECTION,
    PROMPT,
    DecodeError,
    Decoder,
    DecodeState,
    Weights,
    decode_rounds,
    finish,
    generate,
    generation_lengths,
    speculation_round,
    start,
)

__all__ = [
    "ACCEPTED", "BONUS", "CORRECTION", "PROMPT", "DecodeError", "DecodeState", "Decoder",
    "Weights", "decode_rounds", "finish", "generate", "generation_lengths",
    "speculation_round", "start",
]  # fmt: skip

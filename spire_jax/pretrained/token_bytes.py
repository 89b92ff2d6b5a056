"""The bytes that each token stands for, read from a tokenizer's vocabulary and decoder.

With them decoding, streaming and counting are one table; a byte of a character that is cut in
two tokens is not lost, as it is in a token's text.
"""

import json
import re
from typing import Any

import tokenizers

from spire_jax.pretrained import PretrainedError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _alphabet() -> dict[str, int]:
    """Byte-level BPE's characters: a printable byte is itself, others follow from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(0x100) if b not in shown]
    return {chr(b): b for b in shown} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


def token_bytes(
    backend: tokenizers.Tokenizer, n_tokens: int, where: str
) -> tuple[list[bytes], bool]:
    """For each id below `n_tokens` its bytes (none without a token); and whether a text's first
    space was put there by the tokenizer, so that decoding takes it away.

    PretrainedError, naming `where`, for a decoder that is neither byte-level nor SentencePiece's.
    """
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    parts: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    kinds = [str(part["type"]) for part in parts]
    known = {"ByteLevel"} if "ByteLevel" in kinds else {"Replace", "ByteFallback", "Fuse", "Strip",
                                                        "Metaspace"}  # fmt: skip
    if not set(kinds) <= known or not {"ByteLevel", "ByteFallback", "Metaspace"} & set(kinds):
        raise PretrainedError(
            f"{where}: the tokenizer decodes by {' + '.join(kinds)}; byte-level BPE and "
            "SentencePiece's are supported"
        )
    strip = any(part.get("start", 0) > 0 or part.get("prepend_scheme", "never") != "never"
                for part in parts)  # fmt: skip
    added = set(backend.get_added_tokens_decoder())
    alphabet = _alphabet()
    table = [b""] * n_tokens
    for token, i in backend.get_vocab().items():
        byte = _BYTE.fullmatch(token) if "ByteFallback" in kinds else None
        if i in added:
            table[i] = token.encode()
        elif kinds == ["ByteLevel"]:
            known_bytes = [alphabet[c] for c in token if c in alphabet]
            table[i] = bytes(known_bytes) if len(known_bytes) == len(token) else token.encode()
        elif byte:
            table[i] = bytes([int(byte[1], 16)])
        else:
            table[i] = token.replace("▁", " ").encode()
    return table, strip

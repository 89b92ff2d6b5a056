"""Tiny tokenizers of pretrained models, as a directory and as GGUF's metadata."""

import functools
import json
import pathlib
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken

from spire_jax.data.tokenizer import train_bpe
from spire_jax.pretrained.tokenizer import PretrainedTokenizer, load_tokenizer
from spire_jax.pretrained.tokenizer_sources import from_gguf

TEXTS = [f"def f_{i}(x):\n    return x + {i}  # naïve, don't\n" for i in range(200)]
SPECIAL = ["<|end|>", "<|user|>", "<|bot|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
ROWS = 304  # 300 tokens of text, three special ones and a row that is no token's


@functools.cache
def trained() -> tokenizers.Tokenizer:
    """Byte-level BPE with the special tokens; not to be changed."""
    bpe = train_bpe(TEXTS, 301)
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return bpe


def write_directory(folder: pathlib.Path) -> pathlib.Path:
    """What a directory of Hugging Face says of it."""
    trained().save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", eos_token={"content": "<|end|>"},
          bos_token="<|user|>", chat_template=TEMPLATE)  # fmt: skip
    write(folder / "generation_config.json", eos_token_id=[302, 300])
    return folder


def write(path: pathlib.Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


def metadata(bpe: tokenizers.Tokenizer, pre: str = "gpt-2", **values: Any) -> dict[str, Any]:
    """What a GGUF file says about a byte-level tokenizer."""
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(bpe.get_vocab(), key=bpe.get_vocab().__getitem__)
    given = {
        "model": "gpt2", "pre": pre, "tokens": tokens,
        "merges": [" ".join(m) for m in model["merges"]],
        "token_type": np.array([3 if t in SPECIAL else 1 for t in tokens], np.int32),
        "eos_token_id": 300, "bos_token_id": 301, "eot_token_id": 302,
    }  # fmt: skip
    return {f"tokenizer.ggml.{k}": v for k, v in (given | values).items() if v is not None}


def of_gguf(folder: pathlib.Path, given: dict[str, Any], rows: int = ROWS) -> PretrainedTokenizer:
    return PretrainedTokenizer(from_gguf(folder / "m.gguf", given), rows)


def of_either(kind: str, folder: pathlib.Path) -> PretrainedTokenizer:
    """The same tokenizer from the directory or from metadata."""
    if kind == "directory":
        return load_tokenizer(folder, ROWS)
    return of_gguf(folder, metadata(trained()) | {"tokenizer.chat_template": TEMPLATE})


SPM = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abel", "ab", "▁a", "el",
       "abel", "<tool>"]  # fmt: skip


def spm(**values: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary."""
    types = [2, 3, 3, *[6] * 256, *[1] * (len(SPM) - 260), 4]
    scores = [0.0] * 259 + [float(-i) for i in range(len(SPM) - 259)]
    given = {"model": "llama", "tokens": list(SPM), "token_type": np.array(types),
             "scores": np.array(scores, np.float32), "bos_token_id": 1, "eos_token_id": 2,
             "unknown_token_id": 0}  # fmt: skip
    return {f"tokenizer.ggml.{k}": v for k, v in (given | values).items() if v is not None}

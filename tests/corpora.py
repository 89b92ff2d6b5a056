"""Small corpora for tests."""

import hashlib

import numpy as np

from spire_jax.config.schema import DataConfig
from spire_jax.data.sources import load_corpus
from spire_jax.data.tokenizer import ByteTokenizer

SEPARATOR = 256
BEGIN = 257


class Beginning(ByteTokenizer):
    """Bytes of a model that wants a token in front of every text."""

    n_tokens = 258
    begin = BEGIN


def names(heldout, count, percent=50):
    """Paths that fall to one split, by the definition."""
    every = (f"{i // 10}/{i}.txt" for i in range(10_000))
    hashed = ((n, hashlib.sha256(n.encode()).digest()[:8]) for n in every)
    chosen = [n for n, h in hashed if (int.from_bytes(h, "big") % 100 < percent) == heldout]
    return chosen[:count]


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def corpus_of(root, files=None, percent=50):
    return load_corpus(DataConfig(source=str(write(root, files or {})), heldout_percent=percent))


def words(seed, length):
    """Random letters."""
    return bytes(np.random.default_rng(seed).integers(97, 123, length, np.uint8))

"""Train a byte-level BPE tokenizer on the training documents of a config's corpus.

    python -m launch.train_tokenizer --config=configs/study.py --out=data/python_bpe_4096.json

(37 s for the 99 MB that it learns from, on 2 CPU cores). The file is what ``data.tokenizer`` names;
the same documents give the same file. Nothing is learned from held-out documents. An existing file
is not overwritten.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from spire_jax.config.files import command_line, ends_in_a_line, exit_with_error
from spire_jax.config.paths import local_path
from spire_jax.config.schema import BYTES
from spire_jax.data.corpus import DataError
from spire_jax.data.sources import load_corpus
from spire_jax.data.tokenizer import make_tokenizer, train_bpe

SMALLEST, LARGEST = 257, 2**24  # every byte, and the separator; what `tokenizers` can count to


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m launch.train_tokenizer", None, __doc__, formatter_class=raw
    )
    parser.add_argument("--out", type=local_path, required=True, help="the tokenizer's file")
    parser.add_argument("--n-tokens", type=int, default=4096, help="vocabulary, 4096 by default")
    given = list(sys.argv[1:] if argv is None else argv)
    # The config's own tokenizer is the one to be made: the corpus is read as bytes.
    args, config = command_line(parser, [*given, f"--config.data.tokenizer={BYTES}"])
    if not SMALLEST <= args.n_tokens <= LARGEST:
        exit_with_error(f"--n-tokens={args.n_tokens}; use {SMALLEST} to {LARGEST}")
    with ends_in_a_line(DataError):
        if args.out.exists():
            exit_with_error(f"--out={args.out} exists; remove it, or name another file")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        corpus = load_corpus(config.data)
        texts = (corpus.tokens_of(d)[:-1].astype("uint8").tobytes().decode()
                 for d in corpus.split(heldout=False))  # fmt: skip
        bpe = train_bpe(texts, args.n_tokens)
        if (size := bpe.get_vocab_size() + 1) != args.n_tokens:
            raise DataError(f"the corpus yields only {size} tokens, not --n-tokens="
                            f"{args.n_tokens}; use fewer, or more text")  # fmt: skip
        temporary = args.out.with_name(f".{args.out.name}.tmp")
        bpe.save(str(temporary))
        os.replace(temporary, args.out)
    print(f"{args.out}: {make_tokenizer(str(args.out)).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

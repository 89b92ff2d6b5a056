"""What training and evaluation leave in a work directory, made up, for tests of the report."""

import json
import pathlib

import numpy as np

from spire_jax.config import files, schema
from spire_jax.results import report

HOSTILE = (
    "<script>alert('x')</script> & \"</pre><img src=http://evil.example/x>\" {{ 7 * 7 }} \x00\x1b"
)
HOSTILE_NAME = 'lib/"><svg onload=alert(1)>.py'
LENGTHS = (48, 96, 184)
K = 4
ALPHA = {"spire": 0.84, "vanilla": 0.62, "magicdec": 0.9}
STAGES = {"target": "0123456789abcdef", "evaluate": "fedcba9876543210"}


def experiment(**evaluation) -> schema.ExperimentConfig:
    values = {
        "target": dict(n_layers=8, d_model=96, n_kv_heads=4, d_head=32, d_ff=288),
        "drafts": {
            "spire": dict(kind="spire", n_layers=2, window=32, sink=1),
            "vanilla": dict(kind="vanilla", n_layers=2, d_model=64, n_kv_heads=2, d_ff=192,
                            window=0, init="random", loss="hard"),
            "magicdec": dict(kind="magicdec", window=32, sink=1),
        },
        "train": dict(steps=300, seq_len=256, k=K),
        "decode": dict(k=K),
        "eval": dict(context_lengths=LENGTHS, bootstrap=300) | evaluation,
    }  # fmt: skip
    return files.build(values)


def write_lines(path: pathlib.Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fill(workdir: pathlib.Path, documents: int = 20, per_document: int = 2) -> pathlib.Path:
    """Records as evaluation and training leave them: 4 methods, 3 lengths, 20 documents."""
    rng = np.random.default_rng(7)
    names = [HOSTILE_NAME] + [f"lib/module_{i}.py" for i in range(1, documents)]
    hardness = rng.normal(0, 0.04, documents)
    for method in ("autoregressive", *ALPHA):
        rows = []
        for context in range(documents * per_document):
            document = context % documents
            for length in LENGTHS:
                row = {"method": method, "context": context, "document": names[document],
                       "cut": 1000 + context, "context_length": length, "output_length": 64,
                       "k": 0}  # fmt: skip
                if method != "autoregressive":
                    alpha = ALPHA[method] + hardness[document] - 0.001 * (LENGTHS[0] / length)
                    row |= {"k": K, **counts(rng, float(np.clip(alpha, 0.05, 0.99)))}
                rows.append(row)
        write_lines(workdir / "eval" / f"{method}.jsonl", rows)
    for model in ("target", "spire", "vanilla"):
        write_lines(workdir / "metrics" / f"{model}.jsonl", training_rows(rng, model))
    (workdir / "eval" / "evaluation.json").write_text(json.dumps(evaluation()))
    return workdir


def counts(rng: np.random.Generator, alpha: float) -> dict:
    """Oracle and decoder counts of 64 tokens whose drafts are accepted with one probability."""
    tau = [sum(alpha**j for j in range(k + 1)) for k in range(1, K + 1)]
    rounds = [64 / t for t in tau]
    reached = [rounds[-1] * alpha**d for d in range(K)]
    decoded = np.bincount(np.minimum(rng.geometric(1 - alpha, 20) - 1, K), minlength=K + 1)
    return {
        "oracle": {"k": K, "lengths_by_k": [64.0] * K, "rounds_by_k": rounds, "reached": reached,
                   "accepted": [r * alpha for r in reached]},
        "decoder": {"lengths": int((decoded * (1 + np.arange(K + 1))).sum()), "rounds": 20,
                    "accepted_counts": decoded.tolist()},
    }  # fmt: skip


def training_rows(rng: np.random.Generator, model: str) -> list[dict]:
    rows = []
    for step in range(10, 310, 10):
        row = {"step": step, "examples": 16 * step, "tokens": 4096 * step,
               "loss": 5.5 * np.exp(-step / 80) + 1 + rng.normal(0, 0.03), "learning_rate": 3e-3,
               "grad_norm": 1.0, "tokens_per_s": 6000 + rng.normal(0, 100),
               "peak_share": None}  # fmt: skip
        if model == "spire":
            row |= {"alpha": 0.84 - 0.6 * np.exp(-step / 60), "alpha_by_depth": [0.84] * K}
        rows.append(row)
    return rows


def evaluation() -> dict:
    code = "def cross_entropy(logits, labels):\n    return -log_softmax(logits)[labels]\n\n\n"
    pieces = [["accepted", c] for c in "class Pars"] + [["bonus", "e"], ["accepted", "r(obj"]]
    pieces += [["correction", "\n"], ["accepted", HOSTILE], ["correction", "a<b>"]]
    examples = [
        {"method": method, "document": HOSTILE_NAME, "context_text": code * 12 + HOSTILE,
         "pieces": pieces if method != "autoregressive" else [["target", HOSTILE + "\nx = 1"]]}
        for method in ("autoregressive", "spire", "vanilla")
    ]  # fmt: skip
    rates = {"autoregressive": [200.0, 100.0, 150.0], "spire": [300.0, 240.0, 330.0],
             "vanilla": [180.0, 170.0, 260.0], "magicdec": [90.0, 80.0, 85.0]}  # fmt: skip
    return {
        "corpus": {"sha256": "ab" * 32, "train_bytes": 21_000_000, "heldout_bytes": 2_400_000,
                   "train_documents": 1400, "heldout_documents": 150},
        "heldout_bits_per_byte": {"target": 1.71, "vanilla": 2.2},
        "heldout_alpha": {"spire": 0.8125, "vanilla": 0.625},
        "machine": {"hardware": "2 cores of a test <CPU>", "jax": "0.10.2", "python": "3.11.4",
                    "devices": "cpu:0"},
        "timing": {name: {"context_length": 184, "batch_size": 16, "tokens_per_s": values,
                          "seconds": [1.0, 1.0, 1.0]} for name, values in rates.items()},
        "examples": examples,
        "seconds": {"evaluate": 41.2, "target": 240.0},
    }  # fmt: skip


def reported(folder: pathlib.Path) -> pathlib.Path:
    """A work directory with its report."""
    report.write_report(fill(folder), experiment(), stages=STAGES)
    return folder


def edit(path: pathlib.Path, change) -> None:
    rows = read_lines(path)
    change(rows)
    write_lines(path, rows)


def edit_evaluation(workdir: pathlib.Path, change) -> None:
    path = workdir / "eval" / "evaluation.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))

"""A SPIRe draft for any pretrained target: give its path, a folder of text, and a depth.

    .venv/bin/python -m spire_jax.run --config=configs/pretrained.py --workdir=runs/mine \
        --config.pretrained.path=CHECKPOINT --config.data.source=TEXTS \
        --config.drafts.spire.n_layers=4

CHECKPOINT is a GGUF file or a folder with config.json and safetensors. The draft takes the target's
last n_layers; a quarter of them is the paper's choice. What it costs and gives depends on the
target: configs/smollm2_135m.py is such a config with its figures.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.pretrained = {"path": "CHECKPOINT"}  # given on the command line
    config.drafts = {
        "spire": {
            "kind": "spire",
            "n_layers": 4,
            "window": 64,
            "sink": 1,
            "share_embedding": True,
            "head_tokens": 8192,
        },
        "magicdec": {"kind": "magicdec", "window": 64, "sink": 1},
    }
    config.continuations = {"rows": 1024}
    config.train = {
        "steps": 2000,
        "batch_size": 16,
        "seq_len": 512,
        "k": 4,
        "peak_lr": 3e-4,
        "checkpoint_every": 100,
    }
    config.eval = {
        "contexts": 32,
        "context_lengths": (128, 512),
        "batch_size": 8,
        "heldout_rows": 64,
    }
    return config

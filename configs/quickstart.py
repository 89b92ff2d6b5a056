"""The whole method in minutes on a laptop's CPU: Python's own source files, as bytes.

    bash launch/quickstart.sh

or, in an environment of your own,

    python -m spire_jax.run --config=configs/quickstart.py --workdir=runs/quickstart

Trains a target of 0.9M body parameters for 1.6M tokens, a vanilla draft an eighth of its size
and a SPIRe draft of its last two layers, which learns to draft 1, 2 and 4 tokens a pass, then
evaluates them and MagicDec (which needs no training) and reports. It takes about eight minutes on
two cores, the installation included, and printed (python -m launch.sample)

                                   Context 184, k = 4

      method                   tau [95%]   decoder   modeled   measured   tokens/s
     ──────────────────────────────────────────────────────────────────────────────
      autoregressive                1.00      1.00      1.00       1.00      4,189
      magicdec         4.60 [4.57, 4.62]      4.62      2.93       1.16      4,859
      spire            3.28 [3.19, 3.36]      3.32      2.87       1.18      4,925
      stride2          2.66 [2.59, 2.73]      2.68      2.48       0.86      3,592
      stride4          2.50 [2.43, 2.56]      2.54      2.41       0.91      3,808
      vanilla          3.04 [2.97, 3.12]      3.04      1.83       0.97      4,082

    tau: tokens per round, by the oracle and by the decoder. modeled: multiplier by the
    paper cost model at HOI 600, batch 64, context 512. measured: multiplier and tokens/s.
    Measured: AMD EPYC, 2 cores, batch 16, context 184, median of 3 alternating repeats.

on AMD EPYC, 2 cores, Python 3.11.7, jax 0.10.2, 2.8 GiB of memory: the run b580cd928c3e26ff.
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
        # The last quarter of the target; the window is an eighth of the training sequence. It is
        # trained once, for 1, 2 and 4 tokens a pass, and drafts in three ways.
        spire=dict(kind="stride", strides=(1, 2, 4), n_layers=2, window=32, sink=1, steps=450),
        stride2=dict(weights_of="spire", stride=2),
        stride4=dict(weights_of="spire", stride=4),
        magicdec=dict(kind="magicdec", window=32, sink=1),
    )  # fmt: skip
    config.train = dict(steps=800, batch_size=8, seq_len=256, k=4)
    config.eval = dict(contexts=64, context_lengths=(48, 96, 184), output_length=64)
    return config

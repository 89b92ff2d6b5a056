"""The paper's 67M pair (arXiv 2504.06419): target, vanilla draft, SPIRe draft.

The modeled throughput multiplier at every batch size and context, for every variant of the
cost model and every chip:

    python -m spire_jax.throughput --config=configs/paper_67m.py

takes 2 s on 2 CPU cores. The first table it printed (rows of the paper's own variant):

    multiplier by variant (B = 64, k = 4, HOI = 600)
    method     variant          32     64    128    256    512   1024   2048   4096   8192
    vanilla    paper          1.59   1.51   1.44   1.39   1.36   1.34   1.33   1.33   1.33
    magicdec   paper          1.00   1.19   1.45   1.76   2.05   2.28   2.42   2.50   2.55
    spire      paper          1.98   2.17   2.39   2.61   2.78   2.89   2.95   2.99   3.00

``--format=json`` prints the same multipliers as {method: {B: {L: multiplier}}}.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    # n_tokens: GPT-2's vocabulary.
    config.target = dict(
        n_layers=8, d_model=512, n_kv_heads=8, q_per_kv=1, d_head=128, d_ff=4096, n_tokens=50257
    )
    # Steps: 20 tokens per parameter, embedding and unembedding included (119M, 34M, 68M), as in
    # the paper. It does not publish its batch size; 256 is ours.
    config.train = dict(steps=9048, batch_size=256, seq_len=1024, k=4, dtype="bfloat16")
    config.drafts = dict(
        vanilla=dict(kind="vanilla", n_layers=4, d_model=256, d_head=64, d_ff=2048, window=0,
                     init="random", loss="hard", steps=2604),
        spire=dict(kind="spire", n_layers=2, window=64, sink=1, steps=5208),
        magicdec=dict(kind="magicdec", window=64, sink=1),
    )  # fmt: skip
    config.decode = dict(k=4)
    config.eval = dict(context_lengths=(256, 512, 960), output_length=64)
    config.throughput = dict(
        chip="h100",
        hoi=600.0,
        variant="paper",
        batch_sizes=(1, 2, 4, 8, 16, 32, 64, 128),
        context_lengths=(32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
        batch_size=64,
        context_length=512,
        # What the paper measured at context 512, over 64 output tokens.
        tau=dict(vanilla=2.647, magicdec=3.891, spire=3.401),
        training_cost=dict(spire=0.25),
    )
    return config

"""Llama 3 70B, frozen in bfloat16, and a SPIRe draft of 20 of its 80 layers, on TPU slices.

    python -m launch.compile --config=configs/pod_llama3_70b.py --topology=v5p:2x4x4

compiles the draft's training, and decoding of 64 requests of 65,536 tokens, without the chips
(docs/scaling.md, "Compiled", has the meshes, what it says and how long it takes). To train the
draft, name the checkpoint: --config.pretrained.path=FOLDER; the sizes below are its own.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.target = dict(
        n_layers=80, d_model=8192, n_kv_heads=8, q_per_kv=8, d_head=128, d_ff=28672,
        n_tokens=128256, rope_base=500000.0, norm_eps=1e-5, scale_in_init=False,
    )  # fmt: skip
    config.pretrained = dict(dtype="bfloat16")
    config.train = dict(
        steps=10000, batch_size=16, seq_len=8192, k=4, dtype="bfloat16", remat=True, peak_lr=3e-4
    )
    # A window of an eighth of the modeled context.
    config.drafts = dict(spire=dict(kind="spire", n_layers=20, window=8192, sink=1))
    config.decode = dict(k=4, dtype="bfloat16")
    config.throughput = dict(chip="v5p", batch_size=64, context_length=65536)
    config.mesh = dict(data=-1, tensor=8)
    return config

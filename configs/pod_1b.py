"""A 1.3B target and its SPIRe draft, for a slice of 256 TPU v5e: what training at scale would take.

    python -m launch.compile --config=configs/pod_1b.py --topology=v5e:16x16 --steps=train

compiles the training steps for the whole slice without one (docs/scaling.md, "Compiled", has what
it says and how long it takes). Decoding has another mesh: --config.mesh.fsdp=1
--config.mesh.tensor=16. To train it, give it data: --config.data.source=... of GPT-2's tokens.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    # The layer of TinyLlama 1.1B with a KV head for each query head; GPT-2's vocabulary.
    config.target = dict(
        n_layers=22,
        d_model=2048,
        n_kv_heads=16,
        q_per_kv=1,
        d_head=128,
        d_ff=5632,
        n_tokens=50257,
        vocab_size=50304,
    )
    # A million tokens a step; 20 tokens per parameter (1.34B, and 0.51B for the draft).
    config.train = dict(
        steps=25500, batch_size=512, seq_len=2048, k=4, dtype="bfloat16", remat=True, peak_lr=6e-4
    )
    # A quarter of the layers, rounded up, and a window of an eighth of the modeled context.
    config.drafts = dict(spire=dict(kind="spire", n_layers=6, window=1024, sink=1, steps=9800))
    config.decode = dict(k=4, dtype="bfloat16")
    config.throughput = dict(chip="v5e", batch_size=256, context_length=8192)
    config.eval = dict(batch_size=256)  # over data x fsdp
    config.mesh = dict(data=-1, fsdp=16)
    return config

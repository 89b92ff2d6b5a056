"""The paper's tables and figures at 1/40 of its size: BPE tokens, two CPU cores.

bash launch/study.sh
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data = dict(source="data/python_packages", split="folder",
                       tokenizer="data/python_bpe_4096.json")  # fmt: skip
    # 1.5M body parameters; the paper's 8 layers.
    config.target = dict(n_layers=8, d_model=128, n_kv_heads=2, d_head=64, d_ff=320)
    config.drafts = dict(
        # As the paper's, half of everything: an eighth of the target's body.
        vanilla=dict(kind="vanilla", n_layers=4, d_model=64, d_head=32, d_ff=160, window=0,
                     init="random", loss="hard", steps=900),
        spire=dict(kind="spire", n_layers=2, window=64, sink=1, steps=900),
    )  # fmt: skip
    config.magicdec = dict(evaluate=True, window=64, sink=1)
    config.study = dict(of="spire", trained_k=(8, 16), seeds=3, context_length=256, contexts=256)
    config.train = dict(steps=2400, batch_size=8, seq_len=512, k=4, checkpoint_every=200)
    # The paper's 256, 512 and 960 of 1024, halved: the longest with its output fills a sequence.
    config.eval = dict(contexts=256, context_lengths=(128, 256, 448), output_length=64)
    return config

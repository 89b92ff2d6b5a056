"""The paper's tables and figures at 1/40 of its size: BPE tokens, two CPU cores.

    bash launch/study.sh

A target of 1.51M body parameters (2.56M in all) sees 9.8M tokens of the source of 48 Python
packages; 19 drafts (SPIRe, vanilla, nine ablations, rollouts of depth 8 and 16, two more orders of
the batches for three of them) see 3.7M each. On two cores of an AMD EPYC (jax 0.10.2, other work at
times) it took 2 h 41 min of training (target 39, thirteen drafts together 80, twice three 42), 8 of
evaluation, 4 for the study, 2.4 GB of memory, and printed (among others)

                                   Context 448, k = 4

      method                   tau [95%]   decoder   modeled   measured   tokens/s
      autoregressive                1.00      1.00      1.00       1.00      2,091
      spire            3.07 [3.03, 3.10]      3.07      2.68       0.74      1,556
      vanilla          2.00 [1.97, 2.03]      2.01      1.01       0.43        890
      magicdec         4.18 [4.16, 4.21]      4.18      2.64       0.67      1,405

docs/results.md has all of it, beside the paper's numbers.
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
        magicdec=dict(kind="magicdec", window=64, sink=1),
    )  # fmt: skip
    config.study = dict(of="spire", trained_k=(8, 16), seeds=3, context_length=256, contexts=256)
    config.train = dict(steps=2400, batch_size=8, seq_len=512, k=4, checkpoint_every=200)
    # The paper's 256, 512 and 960 of 1024, halved: the longest with its output fills a sequence.
    config.eval = dict(contexts=256, context_lengths=(128, 256, 448), output_length=64)
    return config

"""The whole method in minutes on a laptop's CPU: Python's own source files, as bytes."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data = dict(source="stdlib")
    config.target = dict(n_layers=8, d_model=96, n_kv_heads=2, d_head=48, d_ff=256)
    config.drafts = dict(
        # An eighth of the target's body: half its depth, half its widths, a dense cache.
        vanilla=dict(kind="vanilla", n_layers=2, d_model=64, d_head=32, d_ff=192, window=0,
                     init="random", loss="hard", steps=1000),
        # The target's last quarter, a window of a third of the shortest context.
        spire=dict(kind="spire", n_layers=2, window=32, sink=1, steps=450),
    )  # fmt: skip
    config.train = dict(steps=900, batch_size=8, seq_len=256, k=4)
    config.eval = dict(contexts=64, context_lengths=(48, 96, 184), output_length=64)
    return config

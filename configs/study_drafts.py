"""One draft for every stride against its rivals, on the study's target and corpus: BPE tokens.

    bash launch/study_drafts.sh

Not run to its end yet (docs/drafts.md has what was measured, on configs/drafts.py): the target is
the study's, on sequences of 528, and takes about 35 minutes of two idle cores of an AMD EPYC; each
of the fifteen drafts sees 7.4M tokens, twice those of docs/results.md.

Drafts are the target's last two of eight layers (EAGLE-3 and LongSpec: one layer), with a window of
64. `all` is SPIRe trained for 1, 2, 3, 4, 6 and 12 tokens a pass in rounds of 12; `all2` and so on
decode with its weights. What was expected, before anything was trained:

1. Acceptance at depth 1 is equal for all strides (the first slot is SPIRe's first step).
2. Within a pass it falls with the slot, between passes it recovers. On bytes an independent trial
   had 0.81, 0.60, 0.50, 0.44; with a Markov head 0.81, 0.70, 0.61, 0.55.
3. A draft trained for all strides loses little to one trained for its own (`own4` less `all4`).
4. At B = 64 stride 4 wins at L = 32 by 15% or more, stride 2 at 512 by a little once the head
   counts, stride 1 with a deeper k at 4096.

Goals, by one trained draft and the choice of stride and k per cell, over SPIRe at k = 4, B = 64, at
L = 32 / 512 / 4096: 1.35 / 1.12 / 1.30 (per_operator), 1.55 / 1.15 / 1.30 (with_head); over
autoregressive decoding at the paper's sizes, acceptances scaled so that SPIRe has the paper's tau:
2.3 / 3.2 / 4.5 and 2.1 / 2.9 / 4.3 (the paper's SPIRe: 1.66 / 2.76 / 3.30 and 1.27 / 2.45 / 3.22).
"""

import ml_collections

# Tokens of data/python_bpe_4096.json with a line end in them.
LINE_ENDS = (198, 259, 263, 268, 270, 284, 296, 314, 330, 374, 378, 437, 441, 666, 741, 808, 838,
             865, 1207, 1393, 1476, 1953, 1966, 2400, 2991, 3160, 3194)  # fmt: skip


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data = dict(source="data/python_packages", split="folder",
                       tokenizer="data/python_bpe_4096.json")  # fmt: skip
    config.target = dict(n_layers=8, d_model=128, n_kv_heads=2, d_head=64, d_ff=320)
    size = dict(n_layers=2, window=64, sink=1)
    spire = dict(kind="spire", k=4, **size)
    every = dict(kind="stride", strides=(1, 2, 3, 4, 6, 12), **size)
    block = dict(kind="block", k=12, gamma=4.0, **size)
    trained = dict(
        spire=spire,
        spire_seed1=dict(seed=1, **spire),
        spire_seed2=dict(seed=2, **spire),
        all=every,
        all_seed1=dict(seed=1, **every),
        all_seed2=dict(seed=2, **every),
        own4=every | dict(strides=(4,), stride=4),
        markov=dict(head="markov", **every),
        fused=dict(memory="fused", **every),
        dflash=dict(loss="hard", draws="argmax", **block),
        dspark=dict(loss="dspark", head="markov", confidence=True, **block),
        eagle3=dict(kind="eagle3", k=4, window=64, sink=1),
        longspec=dict(kind="longspec", window=64, d_ff=720),
        anchor=dict(kind="anchor", n_layers=2, anchors=LINE_ENDS, full_every=2, line=64),
        ring=dict(kind="vanilla", **size),
    )  # fmt: skip
    for draft in trained.values():
        draft["steps"] = 1800
    others = dict(magicdec=dict(kind="magicdec", window=64, sink=1))
    for name in ("all", "markov", "fused"):
        for stride in (2, 3, 4, 6, 8, 12) if name != "fused" else (4,):
            others[f"{name}{stride}"] = dict(weights_of=name, stride=stride)
    config.drafts = trained | others
    config.train = dict(steps=2400, batch_size=8, seq_len=528, k=12, checkpoint_every=200,
                        checkpoints_kept=9)  # fmt: skip
    config.eval = dict(contexts=256, context_lengths=(128, 256, 448), output_length=64)
    return config

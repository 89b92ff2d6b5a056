"""Every kind of draft on one footing, small: the quickstart's target and bytes, equal steps.

    python -m spire_jax.run --config=configs/drafts.py --workdir=runs/drafts
    python -m launch.draft_tables --workdir=runs/drafts --ks=4,8 --family=all,all2,all4,all8
    python -m spire_jax.choose --workdir=runs/drafts --chip=v6e --variant=with_head

Drafts of a quarter of the target's layers (EAGLE-3 and LongSpec: one), a window of 32; each sees
0.92M tokens, all on one pass of the target, and is judged by the oracle on the same samples. `all`
is SPIRe trained for 1, 2, 4 and 8 tokens a pass; what is called after it decodes with its weights.

Training took 20 minutes on two cores of an AMD EPYC (the target 5, with other work), compilation
included; an evaluation at one context, without decoding, 4. It printed (docs/drafts.md) tau at k =
4, context 184: spire 3.60, anchor 3.42, ring 3.31, markov 3.22, fused 3.18, all 3.16, eagle3 2.97,
longspec 2.91, markov4 2.71, dspark 2.68, all4 2.43, dflash 1.75; magicdec 4.57.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data = dict(source="stdlib")
    config.target = dict(n_layers=8, d_model=96, n_kv_heads=2, d_head=48, d_ff=256)
    small = dict(n_layers=2, window=32, sink=1)
    strided = dict(kind="stride", strides=(1, 2, 4, 8), **small)
    block = dict(kind="block", k=8, gamma=4.0, **small)
    config.drafts = dict(
        spire=dict(kind="spire", k=4, **small),
        all=strided,
        all2=dict(weights_of="all", stride=2),
        all4=dict(weights_of="all", stride=4),
        all8=dict(weights_of="all", stride=8),
        markov=dict(head="markov", **strided),
        markov2=dict(weights_of="markov", stride=2),
        markov4=dict(weights_of="markov", stride=4),
        markov8=dict(weights_of="markov", stride=8),
        fused=dict(memory="fused", **strided),
        fused4=dict(weights_of="fused", stride=4),
        dflash=dict(loss="hard", draws="argmax", **block),
        dspark=dict(loss="dspark", head="markov", confidence=True, **block),
        eagle3=dict(kind="eagle3", k=4, window=32, sink=1),
        longspec=dict(kind="longspec", window=32, d_ff=576),
        anchor=dict(kind="anchor", n_layers=2, anchors=(10,), full_every=2, line=32),
        ring=dict(kind="vanilla", **small),
        magicdec=dict(kind="magicdec", window=32, sink=1),
    )  # fmt: skip
    config.train = dict(steps=800, batch_size=8, seq_len=256, k=8)
    for draft in config.drafts.values():
        if "weights_of" not in draft and draft.kind != "magicdec":
            draft.steps = 450
    config.eval = dict(contexts=64, context_lengths=(48, 96, 184), output_length=64,
                       timing_repeats=1)  # fmt: skip
    return config

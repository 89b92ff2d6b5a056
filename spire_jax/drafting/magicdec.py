"""MagicDec: the target drafts for itself, reading only sinks and a window (method.md 3.5)."""

import dataclasses

from spire_jax.config.schema import ModelConfig
from spire_jax.drafting.spire import Spire
from spire_jax.models.attention import Compute
from spire_jax.models.spire import SpireDraft
from spire_jax.models.transformer import Model


def magicdec(target: ModelConfig, window: int, sink: int, compute: Compute) -> Spire:
    """The strategy; its draft's parameters are the target's own.

    It is SPIRe with nothing pruned and no mix: for tokens that the target has processed, layer i
    reads keys and values of y^(i-1), which are the target's own; for drafted ones those of its
    own layer inputs. Positions are those within the cache (StreamingLLM).
    """
    sizes = dataclasses.replace(target, window=window, sink=sink)
    options = (("feedback", False), ("streaming", True))
    return Spire(Model(SpireDraft, sizes, compute, options), target.n_layers)

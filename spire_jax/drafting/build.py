"""From a config to models and strategies: the one place that knows every draft's kind."""

import dataclasses

from spire_jax.config.schema import (
    MAGICDEC,
    SNAPKV,
    DecodeConfig,
    DraftConfig,
    ExperimentConfig,
    ModelConfig,
    TrainConfig,
    draft_model,
)
from spire_jax.drafting.magicdec import magicdec
from spire_jax.drafting.snapkv import snapkv
from spire_jax.drafting.spire import Spire, SpireDraft
from spire_jax.drafting.strategy import Strategy
from spire_jax.drafting.vanilla import Vanilla
from spire_jax.models.attention import XLA, Compute
from spire_jax.models.masks import View
from spire_jax.models.transformer import Model, Transformer, layer_views


def compute_for(section: TrainConfig | DecodeConfig, train: TrainConfig) -> Compute:
    """How models compute while training or decoding."""
    remat = train.remat and section is train
    products = section.products if isinstance(section, DecodeConfig) else XLA
    return Compute(section.dtype, train.attention_chunk, remat, products, section.attention)


def target_model(config: ExperimentConfig, compute: Compute) -> Model:
    """The target's structure."""
    return Model(Transformer, config.target, compute)


def strategy(config: ExperimentConfig, name: str, compute: Compute) -> Strategy:
    """The drafting strategy of a method: a draft's name, MAGICDEC or SNAPKV."""
    window, sink = config.magicdec.window, config.magicdec.sink
    if name == MAGICDEC:
        return magicdec(config.target, window, sink, compute)
    if name == SNAPKV:
        return snapkv(config.target, sink + window, compute)
    draft: DraftConfig = config.draft(name)
    sizes = draft_model(config.target, draft)
    if draft.kind == "vanilla":
        views = draft_views(config.target, sizes, draft.window, draft.sink)
        return Vanilla(Model(Transformer, sizes, compute, (("views", views),)))
    options = {"views": draft_views(config.target, sizes, draft.window, draft.sink),
               "feedback": draft.feedback, "attend_self": draft.attend_self,
               "memory": draft.memory, "memory_init": draft.memory_init}  # fmt: skip
    return Spire(Model(SpireDraft, sizes, compute, tuple(options.items())), config.target.n_layers)


def draft_views(
    target: ModelConfig, sizes: ModelConfig, window: int, sink: int
) -> tuple[View, ...]:
    """What each layer of a draft sees: what the target's last layers do, of what the draft keeps.

    `sizes` are the draft's own; a draft deeper than the target has the views of its own depth.
    """
    deep = dataclasses.replace(sizes, n_layers=max(target.n_layers, sizes.n_layers))
    views = layer_views(deep)[-sizes.n_layers :]
    return tuple(view.keeping(window, sink) for view in views)

"""From a config to models and strategies."""

import dataclasses

from spire_jax.config.schema import (
    DecodeConfig,
    DraftOptions,
    ExperimentConfig,
    ModelConfig,
    TrainConfig,
)
from spire_jax.drafting.strategy import Strategy
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
    """The drafting strategy of a draft."""
    return config.draft(name).strategy(config.target, compute)


def draft_views(target: ModelConfig, draft: DraftOptions) -> tuple[View, ...]:
    """What each layer of a draft sees: what the target's last layers do, of what the draft keeps.

    A draft deeper than the target has the views of its own depth.
    """
    sizes = draft.model(target)
    deep = dataclasses.replace(sizes, n_layers=max(target.n_layers, sizes.n_layers))
    views = layer_views(deep)[-sizes.n_layers :]
    return tuple(view.keeping(*draft.kept()) for view in views)

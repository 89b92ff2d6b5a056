"""From a config to models and strategies."""

from spire_jax.config.schema import DecodeConfig, ExperimentConfig, TrainConfig
from spire_jax.drafting.strategy import Strategy
from spire_jax.models.attention import XLA, Compute
from spire_jax.models.transformer import Model


def compute_for(section: TrainConfig | DecodeConfig, train: TrainConfig) -> Compute:
    """How models compute while training or decoding."""
    remat = train.remat and section is train
    products = section.products if isinstance(section, DecodeConfig) else XLA
    return Compute(section.dtype, train.attention_chunk, remat, products, section.attention)


def target_model(config: ExperimentConfig, compute: Compute) -> Model:
    """The target's structure."""
    return Model(config.target.module(), config.target, compute)


def strategy(config: ExperimentConfig, name: str, compute: Compute) -> Strategy:
    """The drafting strategy of a draft."""
    return config.draft(name).strategy(config.target, compute)

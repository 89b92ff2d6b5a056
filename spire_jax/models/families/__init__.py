"""Model families: what a target may be. Each is a class of sizes, by `target.family`."""

from spire_jax.config.registry import FAMILIES
from spire_jax.config.schema import ModelConfig

FAMILIES.register("llama")(ModelConfig)

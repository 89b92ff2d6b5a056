"""From a config to decoders and their parameters."""

from collections.abc import Mapping

from spire_jax.config.schema import AUTOREGRESSIVE, ExperimentConfig
from spire_jax.decoding.rounds import Decoder
from spire_jax.drafting.build import compute_for, strategy, target_model
from spire_jax.models.sampling import Sampling
from spire_jax.models.transformer import Params


def make_decoder(
    config: ExperimentConfig,
    name: str,
    eos: int | tuple[int, ...] = -1,
    sampling: Sampling | None = None,
) -> Decoder:
    """The decoder of a method: a draft's name, or `AUTOREGRESSIVE`.

    `sampling` is the config's unless given.
    """
    compute = compute_for(config.decode, config.train)
    target = target_model(config, compute)
    decode = config.decode
    sampling = sampling or Sampling(decode.temperature, decode.top_k, decode.top_p)
    if name == AUTOREGRESSIVE:
        return Decoder(target, None, 0, sampling, eos)
    drafting = strategy(config, name, compute)
    return Decoder(target, drafting, decode.k, sampling, eos, decode.verification)


def for_decoding(
    config: ExperimentConfig, target: Params, drafts: Mapping[str, Params]
) -> tuple[Params, dict[str, Params]]:
    """Parameters in decode.dtype: the target's, and those of drafts.

    `drafts` holds those that were trained. With them come the config's drafts that use theirs, and
    those that nothing is trained for: the target's are theirs.
    """
    compute = compute_for(config.decode, config.train)
    target = target_model(config, compute).cast(target)
    return target, {
        name: strategy(config, name, compute).model.cast(drafts[of]) if of else target
        for name, _ in config.drafts + config.variants
        if not (of := config.weights(name)) or of in drafts
    }

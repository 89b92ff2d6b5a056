"""How two models are compared: logits over a text, and greedy continuations up to near-ties."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jaxtyping import Float, Int

from spire_jax.decoding import Decoder, Weights, generate
from spire_jax.models.attention import Compute
from spire_jax.models.sampling import Sampling
from spire_jax.models.transformer import Model, Params, Transformer
from spire_jax.pretrained.checkpoint import Checkpoint

TOLERANCE = 2e-4  # of the largest logit


def loaded(checkpoint: Checkpoint) -> tuple[Model, Params]:
    """The model of a checkpoint, computing in float32, and its parameters."""
    model = Model(Transformer, checkpoint.model, Compute("float32"))
    return model, checkpoint.load(model, None)


def our_logits(
    model: Model, params: Params, tokens: Int[np.ndarray, " T"]
) -> Float[np.ndarray, "T N"]:
    """Logits of the model's tokens, without the padding of the vocabulary."""
    logits = jax.jit(lambda p, t: model.bind(p).forward(t)[0])(params, jnp.asarray(tokens)[None])
    return np.asarray(logits[0, :, : model.config.n_tokens])


def their_logits(
    theirs: torch.nn.Module, tokens: Int[np.ndarray, " T"]
) -> Float[np.ndarray, "T N"]:
    """Logits of a transformers model in float32."""
    with torch.no_grad():
        return theirs(torch.tensor(np.asarray(tokens, np.int64))[None]).logits[0].numpy()


def relative_error(ours: Float[np.ndarray, "T N"], theirs: Float[np.ndarray, "T N"]) -> float:
    """Largest difference, of the largest absolute logit."""
    assert ours.shape == theirs.shape and np.isfinite(ours).all()
    assert theirs.std() > 0.1, "flat logits would be equal whatever the model"
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def greedy_agreement(
    model: Model, params: Params, theirs: torch.nn.Module, prompt: Int[np.ndarray, " n"], n: int
) -> str:
    """Compare greedy continuations of `n` tokens; fails unless they part at a near-tie, if at all.

    Ours are decoded with a KV cache by `spire_jax.decoding`, theirs by `generate`.
    """
    state = generate(
        Decoder(target=model, sampling=Sampling(0.0)), Weights(params), [prompt], [n], [0]
    )
    ours = np.asarray(state.tokens)[0, len(prompt) : len(prompt) + n]
    given = torch.tensor(np.asarray(prompt, np.int64))[None]
    greedy = transformers.GenerationConfig(do_sample=False, max_new_tokens=n, pad_token_id=0)
    theirs.generation_config = greedy  # no end of text: both go on
    with torch.no_grad():
        out = theirs.generate(given, attention_mask=torch.ones_like(given))
    reference = out[0, len(prompt) :].numpy()
    assert len(ours) == len(reference) == n
    differing = np.flatnonzero(ours != reference)
    if not differing.size:
        return f"{n} of {n} tokens equal"
    at = int(differing[0])
    logits = their_logits(theirs, np.concatenate([prompt, reference[:at]]))[-1]
    gap = float(logits[reference[at]] - logits[ours[at]]) / float(np.abs(logits).max())
    assert abs(gap) <= 2 * TOLERANCE, f"token {at} differs though theirs leads by {gap:.1e}"
    return f"{at} of {n} tokens equal, then a tie (gap {gap:.1e})"

"""Random models of every family, made and saved by transformers: equal logits, equal tokens."""

import numpy as np
import pytest
import torch
import transformers

from spire_jax.pretrained.checkpoint import open_checkpoint
from tests.parity.compare import (
    TOLERANCE,
    greedy_agreement,
    loaded,
    our_logits,
    relative_error,
    their_logits,
)

SIZES = {
    "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3,
    "intermediate_size": 160, "vocab_size": 331, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SCALED = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 128}  # fmt: skip
# Name, config, what differs from SIZES, how it is saved.
CASES = [
    ("llama untied", transformers.LlamaConfig, {"tie_word_embeddings": False}, {}),
    ("llama tied, sharded", transformers.LlamaConfig, {"tie_word_embeddings": True},
     {"max_shard_size": "200KB"}),
    ("llama 3 rope scaling", transformers.LlamaConfig, {"rope_parameters": SCALED}, {}),
    ("qwen2 biases", transformers.Qwen2Config, {"tie_word_embeddings": True}, {}),
    ("qwen3 qk norm", transformers.Qwen3Config, {"head_dim": 32}, {}),
    ("mistral window 64", transformers.MistralConfig, {"sliding_window": 64}, {}),
]  # fmt: skip


def random_model(config: transformers.PretrainedConfig) -> torch.nn.Module:
    """A model whose every parameter is random, norms and biases too, and whose logits are not
    flat."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            elif "embed" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
    return model.float().eval()


@pytest.fixture(scope="module", params=CASES, ids=[case[0] for case in CASES])
def case(request, tmp_path_factory):
    name, config, differing, saving = request.param
    theirs = random_model(config(**(SIZES | differing)))
    path = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(path, **saving)
    assert (len(list(path.glob("*.safetensors"))) > 1) == bool(saving)
    return name, theirs, *loaded(open_checkpoint(path))


def test_logits_over_512_tokens(case, figure):
    name, theirs, model, params = case
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], 512).astype(np.int32)
    error = relative_error(our_logits(model, params, tokens), their_logits(theirs, tokens))
    figure(f"{name}: logits, 512 tokens", f"{error:.1e} relative")
    assert error <= TOLERANCE


def test_greedy_continuations(case, figure):
    name, theirs, model, params = case
    for seed in range(3):  # the prompt alone is longer than a window
        prompt = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], 100).astype(np.int32)
        agreement = greedy_agreement(model, params, theirs, prompt, 64)
        figure(f"{name}: greedy, prompt {seed}", agreement)

"""What config.json and GGUF's metadata mean, and what of it is refused."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest
from pretrained_models import LLAMA3, rope_divisors, tiny, write_gguf

from spire_jax.config.schema import ModelConfig
from spire_jax.models.layers import rope_frequencies
from spire_jax.pretrained import PretrainedError
from spire_jax.pretrained.architectures import from_config_json, from_gguf
from spire_jax.pretrained.checkpoint import open_checkpoint
from spire_jax.pretrained.gguf_file import read_gguf

PLACE = pathlib.Path("folder/config.json")
# Values of published config.json files, less what does not change the function.
LLAMA_32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA_32_1B_MODEL = ModelConfig(
    n_layers=16, d_model=2048, n_kv_heads=8, q_per_kv=4, d_head=64, d_ff=8192, vocab_size=128256,
    n_tokens=128256, max_len=131072, tied=True, scale_in_init=False, norm_eps=1e-5,
    rope_base=5e5, rope_scaling=32.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0,
    rope_original_len=8192,
)  # fmt: skip
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
QWEN3 = {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
         "attention_bias": False, "head_dim": 128, "rope_scaling": None}  # fmt: skip


def model(config: dict[str, Any], **changes: Any) -> ModelConfig:
    return from_config_json({**config, **changes}, PLACE)[1]


def test_published():
    assert from_config_json(LLAMA_32_1B, PLACE) == ("llama", LLAMA_32_1B_MODEL)
    qwen2, qwen3 = model(QWEN2), model(QWEN3)
    assert (qwen2.d_head, qwen2.qkv_bias, qwen2.qk_norm, qwen2.window) == (64, True, False, 0)
    assert (qwen3.d_head, qwen3.qkv_bias, qwen3.qk_norm, qwen3.tied) == (128, False, True, True)
    mistral = model(MISTRAL)
    assert (mistral.d_head, mistral.q_per_kv, mistral.window, mistral.tied) == (128, 4, 4096, False)


def test_newer_and_older_files():
    """Positions in `rope_parameters` (transformers 5), `type` for `rope_type`, absent values."""
    rope = {**LLAMA_32_1B["rope_scaling"], "rope_theta": LLAMA_32_1B["rope_theta"]}
    newer = {k: v for k, v in LLAMA_32_1B.items() if k not in ("rope_scaling", "rope_theta")}
    assert model(newer, rope_parameters=rope) == LLAMA_32_1B_MODEL
    rope["type"] = rope.pop("rope_type")
    assert model(newer, rope_parameters=rope) == LLAMA_32_1B_MODEL
    plain = model(newer, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    assert (plain.rope_base, plain.rope_scaling) == (7.0, 1.0)

    old = {k: v for k, v in MISTRAL.items() if k not in (
        "num_key_value_heads", "rope_theta", "tie_word_embeddings", "sliding_window")}  # fmt: skip
    llama1 = model(old, model_type="llama", num_key_value_heads=None,
                   architectures=["LLaMAForCausalLM"])  # fmt: skip
    assert (llama1.n_kv_heads, llama1.q_per_kv, llama1.rope_base) == (32, 1, 10000.0)
    assert (llama1.tied, llama1.window) == (False, 0)


ROPE3 = {**LLAMA_32_1B["rope_scaling"], "rope_theta": 500000.0}
NO_ROPE: dict[str, Any] = {"rope_scaling": None, "rope_theta": None}
# Fields in both generations, or given beside what they do not contradict.
AGREEING: list[dict[str, Any]] = [
    dict(rope_parameters=ROPE3),
    dict(rope_parameters=ROPE3, rope_theta=None),
    dict(rope_parameters=ROPE3, rope_scaling={}),
    dict(rope_parameters={**ROPE3, "type": "llama3", "attention_factor": None}, rope_scaling=None),
    dict(rope_parameters={}),
    dict(NO_ROPE, rope_parameters={k: v for k, v in ROPE3.items() if "original" not in k},
         original_max_position_embeddings=8192),
    dict(original_max_position_embeddings=8192),
    dict(torch_dtype="float16", dtype="bfloat16", transformers_version="9", my_notes={"a": 1}),
    dict(logits_scaling=1.0, num_experts=0, attn_logit_softcapping=None, no_rope_layers=None),
    dict(sliding_window=None), dict(sliding_window=4096, use_sliding_window=False),
    dict(sliding_window=131072), dict(layer_types=["full_attention"] * 16),
]  # fmt: skip


@pytest.mark.parametrize("changes", AGREEING)
def test_names_of_two_generations_agree(changes):
    assert model(LLAMA_32_1B, **changes) == LLAMA_32_1B_MODEL


def test_padding():
    for tokens, rows in ((32000, 32000), (32001, 32008), (7, 8)):
        found = model(MISTRAL, vocab_size=tokens)
        assert (found.n_tokens, found.vocab_size) == (tokens, rows)


FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWS = [
    (MISTRAL, dict(sliding_window=None), 0),
    (MISTRAL, dict(sliding_window=16), 16),
    (QWEN2, dict(use_sliding_window=True, max_window_layers=24), 0),
    (QWEN2, dict(use_sliding_window=True, max_window_layers=28), 0),
    (QWEN2, dict(use_sliding_window=True, max_window_layers=0), 32768),
    (QWEN2, dict(use_sliding_window=True, max_window_layers=0, sliding_window=None), 0),
    (QWEN2, dict(use_sliding_window=True, layer_types=[SLIDING] * 24), 32768),
    (QWEN3, dict(layer_types=[FULL] * 24), 0),
]


@pytest.mark.parametrize("config, changes, window", WINDOWS)
def test_window(config, changes, window):
    assert model(config, **changes).window == window


def test_absent_window():
    """As `transformers`: 4096 where a Mistral says nothing, none where it says null."""
    absent = {k: v for k, v in MISTRAL.items() if k != "sliding_window"}
    assert model(absent).window == 4096


def test_linear_scaling():
    """Every frequency divided by the factor, exactly, however long the model's context is."""
    for length in (16, 131072):
        for base in (10.0, 1e6):
            found = model(MISTRAL, max_position_embeddings=length, rope_theta=base,
                          rope_scaling={"type": "linear", "factor": 4.0})  # fmt: skip
            plain = dataclasses.replace(found, rope_scaling=1.0)
            np.testing.assert_array_equal(rope_frequencies(found), rope_frequencies(plain) / 4)


SCALING = LLAMA_32_1B["rope_scaling"]
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (MISTRAL, dict(model_type="gemma2"), r"'gemma2': supported are llama, mistral, qwen2, qwen3"),
    (MISTRAL, dict(model_type=None), r"model_type=''"),
    (MISTRAL, dict(model_type=["llama"]), r"model_type=\['llama'\]"),
    (MISTRAL, dict(architectures=["MistralForSequenceClassification"]), "only causal language"),
    (MISTRAL, dict(architectures=3), "architectures=3"),
    (MISTRAL, dict(hidden_act="gelu"), "hidden_act='gelu': only silu"),
    (MISTRAL, dict(quantization_config={"bits": 4}), "use the unquantized model, or a GGUF"),
    (LLAMA_32_1B, dict(attention_bias=True), "attention_bias=True: .* q, k and v are Qwen2's"),
    (QWEN3, dict(attention_bias=True), "attention_bias=True"),
    (LLAMA_32_1B, dict(mlp_bias=True), "mlp_bias=True: biases in the MLP are not supported"),
    (LLAMA_32_1B, dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (LLAMA_32_1B, dict(rope_scaling={**SCALING, "partial_rotary_factor": 0.5}), "partial_rotary"),
    (MISTRAL, dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
     "'yarn': supported are default, linear, llama3"),
    (MISTRAL, dict(rope_scaling={"type": "dynamic", "factor": 4.0}), "'dynamic': supported are"),
    (MISTRAL, dict(rope_scaling={"rope_type": "longrope"}), "'longrope': supported are"),
    (MISTRAL, dict(rope_scaling={"rope_type": "linear"}), "factor=None: it must be a positive"),
    (MISTRAL, dict(rope_scaling="llama3"), "rope_scaling='llama3': it must be an object"),
    (LLAMA_32_1B, dict(rope_scaling={**SCALING, "high_freq_factor": 1.0}), "must be above low"),
    (LLAMA_32_1B, dict(rope_scaling={**SCALING, "low_freq_factor": None}), "low_freq_factor=None"),
    (LLAMA_32_1B, dict(rope_theta=0), "rope_theta=0: it must be a positive"),
    (LLAMA_32_1B, dict(rope_theta=10**400), "it must be a positive, finite number"),
    (LLAMA_32_1B, dict(rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    (LLAMA_32_1B, dict(hidden_size="2048"), "hidden_size='2048': it must be an int"),
    (LLAMA_32_1B, dict(num_hidden_layers=True), "num_hidden_layers=True: it must be an int"),
    (LLAMA_32_1B, dict(vocab_size=0), "vocab_size=0: it must be an int from 1"),
    (LLAMA_32_1B, dict(intermediate_size=10**12), "intermediate_size=1000000000000: it must be"),
    (LLAMA_32_1B, dict(tie_word_embeddings="no"), "'no': it must be true or false"),
    (LLAMA_32_1B, dict(num_key_value_heads=5), "must be a multiple of the KV heads"),
    (LLAMA_32_1B, dict(head_dim=63), "their size even"),
    (LLAMA_32_1B, dict(head_dim=2**23), "heads of size"),
    (LLAMA_32_1B, dict(head_dim=None, hidden_size=2050), "2050: not a multiple of 32 heads"),
    (QWEN2, dict(num_key_value_heads=None), "num_key_value_heads=None"),
    (QWEN2, dict(use_sliding_window=True), r"layer_types=\['full_attention', .* in all layers"),
    (QWEN2, dict(layer_types=[SLIDING] * 24), r"in all of them .* \(here 0\)"),
    (QWEN2, dict(layer_types=["chunked_attention"] * 24), r"\['chunked_attention'"),
    (QWEN2, dict(layer_types=[FULL] * 23), "supported are full_attention in all layers"),
    (QWEN2, dict(use_sliding_window=1), "use_sliding_window=1: it must be true or false"),
    (MISTRAL, dict(sliding_window="4096"), "sliding_window='4096': it must be an int"),
]  # fmt: skip


PARTS = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
CONTRADICTING: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LLAMA_32_1B, dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
     "rope_scaling=.*: rope_parameters, its newer name, says something else"),
    (LLAMA_32_1B, dict(rope_parameters={**ROPE3, "rope_theta": 1e4}, rope_scaling=ROPE3),
     "rope_theta=500000.0: elsewhere in the file it is 10000.0; remove the one"),
    (LLAMA_32_1B, dict(rope_scaling={**ROPE3, "type": "linear"}),
     "type='linear': rope_type, its newer name, is 'llama3'; remove one"),
    (LLAMA_32_1B, dict(original_max_position_embeddings=4096), "=4096: elsewhere .* it is 8192"),
    (LLAMA_32_1B, dict(NO_ROPE, rope_parameters=PARTS), "full_attention=.* 'default' have no such"),
    (MISTRAL, dict(rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 9}), "beta_fast=9"),
    (LLAMA_32_1B, dict(sliding_window=4096), "sliding_window=4096: .* say null if not"),
    (LLAMA_32_1B, dict(layer_types=[SLIDING] * 16), "supported are full_attention in all layers"),
    (MISTRAL, dict(use_sliding_window=False), "sliding_window=4096: .* not plain whether"),
    (MISTRAL, dict(layer_types=[FULL] * 32), "supported are full_attention in all layers"),
    (MISTRAL, dict(model_type="llama", sliding_window=None),
     r"architectures=\['MistralForCausalLM'\]: .* of model_type='llama' that is LlamaForCausalLM"),
    (LLAMA_32_1B, dict(hidden_activation="gelu"), "hidden_activation='gelu': only silu"),
    (LLAMA_32_1B, dict(compression_config={"format": "int"}), "compression_config=.* use the unq"),
    (LLAMA_32_1B, dict(embedding_multiplier=12.0), "embedding_multiplier=12.0: .* another arch"),
    (LLAMA_32_1B, dict(attention_multiplier=1.0), "attention_multiplier=1.0: .* another arch"),
    (LLAMA_32_1B, dict(no_rope_layers=[1, 0]), r"no_rope_layers=\[1, 0\]: .* another arch"),
    (QWEN3, dict(num_experts=128), "num_experts=128: it is another architecture's"),
    (QWEN3, dict(final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
]  # fmt: skip


@pytest.mark.parametrize("config, changes, message", REFUSED + CONTRADICTING)
def test_refused(config, changes, message):
    with pytest.raises(PretrainedError, match=rf"config.json: .*{message}"):
        model(config, **changes)


# --- GGUF ----------------------------------------------------------------------------------------


def opened(tmp_path, family="llama", **metadata):
    """The model of a tiny GGUF file with more or other metadata."""
    path = write_gguf(tmp_path / "m.gguf", *tiny(family))
    file = read_gguf(path)
    return from_gguf(dataclasses.replace(file, metadata={**file.metadata, **metadata}))


def test_gguf_sizes(tmp_path):
    kind, found = opened(tmp_path, "qwen3")
    assert kind == "qwen3" and found.tied and found.qk_norm and not found.qkv_bias
    assert (found.d_head, found.q_per_kv, found.norm_eps, found.rope_base) == (32, 2, 1e-5, 500.0)
    kind, found = opened(tmp_path, "mistral")
    assert (kind, found.window, found.tied) == ("llama", 5, False)


def test_a_factor_without_a_type(tmp_path):
    """Linear, as llama.cpp reads it; beside the tensor of another scaling it is refused."""
    linear = opened(tmp_path, "linear")
    factor = {"llama.rope.scaling.factor": 4.0}
    assert opened(tmp_path, **factor) == linear and linear[1].rope_scaling == 4.0
    for kind, scaling in (("none", 1.0), ("linear", 4.0)):
        found = opened(tmp_path, **factor, **{"llama.rope.scaling.type": kind})[1]
        assert found.rope_scaling == scaling
    with pytest.raises(PretrainedError, match=r"factor=4.0: .* scaled by rope_freqs.weight too"):
        opened(tmp_path, "llama3", **factor)


@pytest.mark.parametrize("length", [8192, 64])
@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("base, head", [(500000.0, 64), (500000.0, 128), (500.0, 16)])
def test_rope_freqs(base, head, factor, length, tmp_path):
    """The four numbers of Llama 3's scaling from the tensor that is made of them."""
    scaling = {**LLAMA3, "factor": factor, "original_max_position_embeddings": length}
    config, tensors = tiny("llama3", rope_theta=base, head_dim=head, rope_scaling=scaling)
    divisors = rope_divisors(config)
    if length == 8192 and (base, head) == (500.0, 16):
        assert divisors.max() == 1  # no pair is slow enough to be scaled
    found = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors)).model
    plain = dataclasses.replace(found, rope_scaling=1.0)
    np.testing.assert_allclose(rope_frequencies(found), rope_frequencies(plain) / divisors, 1e-6)
    if divisors.max() > 1:
        assert (found.rope_scaling, found.rope_original_len) == (factor, length)


def test_other_rope_freqs(tmp_path, monkeypatch):
    config, tensors = tiny("llama3")
    for divisors, message in (
        (np.linspace(1, 4, 8), "is not Llama 3's scaling of positions .* supported are default"),
        (np.array([1, 1, 1, np.nan, 2, 2, 2, 2]), "is not Llama 3's scaling"),
        (np.zeros(8), "is not Llama 3's scaling"),
        (np.array([1, 1] + [np.inf] * 6), "is not Llama 3's scaling"),
        (np.ones(7), r"rope_freqs.weight has the shape \(7,\), not \(8,\)"),
    ):
        monkeypatch.setattr(
            "pretrained_models.rope_divisors", lambda c, d=divisors: d.astype(np.float32)
        )
        with pytest.raises(PretrainedError, match=message):
            open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors))


REFUSED_GGUF: list[tuple[dict[str, Any], str]] = [
    ({"general.architecture": "gemma2"}, "'gemma2': supported are llama, qwen2, qwen3"),
    ({"general.architecture": np.arange(3)}, "supported are llama"),
    ({"split.count": 3}, "is one of 3 parts; merge them"),
    ({"llama.expert_count": 8}, "mixtures of experts are not supported"),
    ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type='yarn': supported are none, linear"),
    ({"llama.rope.scaling.type": "linear"}, "rope.scaling.factor=None"),
    ({"llama.rope.scale_linear": 4.0}, "use rope.scaling.type"),
    ({"llama.attention.scale": 0.1}, "attention.scale=0.1: it is another architecture's"),
    ({"llama.logit_scale": 8.0}, "logit_scale=8.0: it is another architecture's"),
    ({"llama.attention.causal": False}, "attention.causal=False"),
    ({"llama.rope.dimension_count": 8}, "another size than the heads' 16 is not supported"),
    ({"llama.attention.value_length": 32}, "another size than the heads' 16"),
    ({"llama.attention.head_count": np.array([4, 4])}, r"head_count=array.* must be an int"),
    ({"llama.attention.head_count": 3}, "64: not a multiple of 3 heads"),
    ({"llama.attention.head_count_kv": 3}, "multiple of the KV heads"),
    ({"llama.block_count": -1}, "block_count=-1: it must be an int from 1"),
    ({"llama.embedding_length": None}, "embedding_length=None"),
    ({"llama.attention.layer_norm_rms_epsilon": float("inf")}, "epsilon=inf"),
    ({"llama.attention.sliding_window": np.arange(2)}, "sliding_window=array"),
]


@pytest.mark.parametrize("metadata, message", REFUSED_GGUF)
def test_refused_gguf(metadata, message, tmp_path):
    with pytest.raises(PretrainedError, match=rf"m.gguf.*{message}"):
        opened(tmp_path, **metadata)

"""Tiny random checkpoints of each family, in both formats, and what they compute.

`logits` is written from the definitions of `transformers` in NumPy's float64 and imports nothing
of `spire_jax`; the GGUF files are written by the `gguf` package's own writer, their rows permuted
as its converter of Hugging Face models does.
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]

SIZES = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 96, "vocab_size": 53, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 500.0, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3": {"model_type": "llama", "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 5},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
}
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd",
    "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
}  # fmt: skip


def tiny(family: str, seed: int = 0, **config: Any) -> tuple[dict[str, Any], Tensors]:
    """(values of config.json, tensors by Hugging Face's names), all of them random."""
    c = {**SIZES, **FAMILIES[family], **config}
    rng = np.random.default_rng(seed)
    width, head, ff = c["hidden_size"], head_dim(c), c["intermediate_size"]
    heads, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head

    def matrix(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    tensors = {"model.embed_tokens.weight": rng.normal(size=(c["vocab_size"], width)),
               "model.norm.weight": norm(width)}  # fmt: skip
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", heads, width), ("self_attn.k_proj", kv, width),
            ("self_attn.v_proj", kv, width), ("self_attn.o_proj", width, heads),
            ("mlp.gate_proj", ff, width), ("mlp.up_proj", ff, width), ("mlp.down_proj", width, ff),
        ):  # fmt: skip
            tensors[f"{at}{name}.weight"] = matrix(rows, columns) * (1 + (name[-6] in "qk"))
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = norm(width)
        if c["model_type"] == "qwen2":
            for name, size in (("q", heads), ("k", kv), ("v", kv)):
                tensors[f"{at}self_attn.{name}_proj.bias"] = rng.normal(size=size)
        if c["model_type"] == "qwen3":
            for name in "qk":
                tensors[f"{at}self_attn.{name}_norm.weight"] = norm(head)
    if not c["tie_word_embeddings"]:
        tensors["lm_head.weight"] = 2 * matrix(c["vocab_size"], width)
    return c, {name: value.astype(np.float32) for name, value in tensors.items()}


def head_dim(c: dict[str, Any]) -> int:
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


# --- files ---------------------------------------------------------------------------------------


def write_safetensors(
    folder: pathlib.Path, config: dict[str, Any], tensors: Tensors, shards: int = 1, dtype="float32"
) -> pathlib.Path:
    """A Hugging Face directory; with several shards, beside an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: value.astype(dtype) for name, value in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_gguf(
    path: pathlib.Path,
    config: dict[str, Any],
    tensors: Tensors,
    quantized: str = "F32",
    more: Callable[[GGUFWriter], None] = lambda writer: None,
) -> pathlib.Path:
    """A GGUF file; matrices are stored as `quantized`, and `more` can add metadata."""
    c = config
    kind = {"mistral": "llama"}.get(c["model_type"], c["model_type"])
    path.parent.mkdir(parents=True, exist_ok=True)
    w = GGUFWriter(path, kind)
    w.add_block_count(c["num_hidden_layers"])
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_freq_base(c["rope_theta"])
    if "head_dim" in c:
        w.add_key_length(c["head_dim"])
        w.add_value_length(c["head_dim"])
    if c["model_type"] == "mistral" and c["sliding_window"]:
        w.add_sliding_window(c["sliding_window"])
    scaling = c.get("rope_scaling") or {}
    if scaling.get("type") == "linear":
        w.add_string(f"{kind}.rope.scaling.type", "linear")
        w.add_rope_scaling_factor(scaling["factor"])
    elif scaling:
        w.add_tensor("rope_freqs.weight", rope_divisors(c))
    more(w)
    for name, value in tensors.items():
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        if kind == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = c["num_attention_heads" if "attn_q" in name else "num_key_value_heads"]
            value = permute(value, heads)
        dtype = GGMLQuantizationType[quantized if value.ndim == 2 else "F32"]
        w.add_tensor(name, quantize(value, dtype), raw_dtype=dtype)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """As the converter of llama.cpp: from halves of a head to pairs side by side."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def rope_divisors(c: dict[str, Any]) -> np.ndarray:
    """The tensor rope_freqs.weight, as the converter of llama.cpp makes it."""
    s, head = c["rope_scaling"], head_dim(c)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    length, divisors = s["original_max_position_embeddings"], []
    for frequency in 1 / c["rope_theta"] ** (np.arange(0, head, 2) / head):
        wave = 2 * math.pi / frequency
        if wave < length / high:
            divisors.append(1.0)
        elif wave > length / low:
            divisors.append(s["factor"])
        else:
            smooth = (length / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / s["factor"] + smooth))
    return np.array(divisors, np.float32)


# --- what they compute ---------------------------------------------------------------------------


def logits(c: dict[str, Any], tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """Float64 logits [T V] of one text [T]."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    heads, kv, head = c["num_attention_heads"], c["num_key_value_heads"], head_dim(c)
    n, eps = len(tokens), c["rms_norm_eps"]
    frequency = 1 / c["rope_theta"] ** (np.arange(0, head, 2) / head)
    scaling = c.get("rope_scaling") or {}
    if scaling.get("type") == "linear":
        frequency /= scaling["factor"]
    elif scaling:
        frequency /= rope_divisors(c)
    angle = np.outer(np.arange(n), np.concatenate([frequency, frequency]))
    distance = np.arange(n)[:, None] - np.arange(n)
    visible = distance >= 0
    if c["model_type"] == "mistral" and c["sliding_window"]:
        visible &= distance < c["sliding_window"]

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def rotate(x):
        half = np.concatenate([-x[..., head // 2 :], x[..., : head // 2]], -1)
        return x * np.cos(angle)[:, None] + half * np.sin(angle)[:, None]

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        y = norm(x, f"{at}input_layernorm")
        q, k, v = (linear(y, f"{at}self_attn.{p}_proj").reshape(n, -1, head) for p in "qkv")
        if c["model_type"] == "qwen3":
            q, k = norm(q, f"{at}self_attn.q_norm"), norm(k, f"{at}self_attn.k_norm")
        k, v = (np.repeat(z, heads // kv, axis=1) for z in (rotate(k), v))
        scores = np.einsum("thd,shd->hts", rotate(q), k) / np.sqrt(head)
        scores = np.exp(np.where(visible, scores, -np.inf))
        attended = np.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), v)
        x = x + linear(attended.reshape(n, -1), f"{at}self_attn.o_proj")
        y = norm(x, f"{at}post_attention_layernorm")
        gate = linear(y, f"{at}mlp.gate_proj")
        up = linear(y, f"{at}mlp.up_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{at}mlp.down_proj")
    x = norm(x, "model.norm")
    name = "model.embed_tokens" if c["tie_word_embeddings"] else "lm_head"
    return x @ w[f"{name}.weight"].T

"""What a checkpoint's config says, as a ModelConfig: the Llama family, and nothing near it.

Two dialects, Hugging Face's config.json and GGUF's metadata. Whatever changes the function that
is computed and that ModelConfig cannot express is refused by name; what only concerns training
(dropout, initializers) or storing (dtype: tensors say theirs) is not looked at. Of a field with an
older and a newer name either will do, and two that differ are refused: engines disagree on which
of them counts. Meanings follow `transformers` 5.23.
"""

import dataclasses
import pathlib
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from spire_jax.config.schema import ModelConfig
from spire_jax.models.layers import rope_frequencies
from spire_jax.pretrained import PretrainedError
from spire_jax.pretrained.gguf_file import GgufFile

MAX_SIZE = 1 << 24  # beyond any model's sizes, so that products of a lie stay within 64 bits
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, in `layer_types`
WINDOW = 4096  # where a window is used and its size is absent (null means none)
# Keys beside the type and the base, by the type of scaling.
_ROPE_KEYS = {"default": (), "linear": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}  # fmt: skip
ROPE_TYPES = tuple(_ROPE_KEYS)  # the scalings of rotary positions that are supported
# What other architectures compute and these do not, and the values that change nothing (null is
# one always): a file with another is a model of theirs under one of our names.
_FOREIGN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling",
                     "logit_scale", "scale_emb", "partial_rotary_factor", "rotary_pct",
                     "rope_condense_ratio"), (1,)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "scale_depth",
                     "no_rope_layers", "no_rope_layer_interval", "attention_chunk_size"), ()),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "alibi",
                     "use_parallel_residual", "use_bidirectional_attention",
                     "is_encoder_decoder"), (0,)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0, 1)),
}  # fmt: skip
_FOREIGN_GGUF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention.scale", "attn_logit_softcapping", "final_logit_softcapping",
                     "attention.clamp_kqv", "attention.max_alibi_bias"), (0,)),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale",
                     "rope.scaling.attn_factor"), (0, 1)),
    "attention.causal": (True,), "use_parallel_residual": (False,),
}  # fmt: skip
_LLAMA3_FACTORS, _LLAMA3_LENGTH = (1.0, 4.0), 8192  # low and high, and original length, in all


@dataclasses.dataclass(frozen=True)
class Family:
    """What distinguishes an architecture beyond its sizes."""

    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family(),  # Llama 1 to 3.x, SmolLM, SmolLM2
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
}
GGUF_FAMILIES = ("llama", "qwen2", "qwen3")  # "llama" is Mistral's too


class _Values:
    """A config's values, each taken with the type that it must have."""

    def __init__(self, values: Mapping[str, Any], path: pathlib.Path, prefix: str = ""):
        self.values, self.path, self.prefix = values, path, prefix

    def refuse(self, key: str, value: Any, why: str) -> NoReturn:
        raise PretrainedError(f"{self.path}: {self.prefix}{key}={reprlib.repr(value)}: {why}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where it is absent or null."""
        value = self.values.get(self.prefix + key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """An int from `least` to MAX_SIZE; PretrainedError if it is none, and without default."""
        value = self.get(key, default)
        if type(value) is not int or not least <= value <= MAX_SIZE:
            self.refuse(key, value, f"it must be an int from {least} to {MAX_SIZE}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; PretrainedError if it is none, and without default."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            self.refuse(key, value, "it must be a positive, finite number")
        return float(value)

    def only(self, key: str, *allowed: Any, why: str) -> None:
        """Refuse a value other than these; absent and null are fine."""
        value = self.get(key)
        if value is not None and not (isinstance(value, str | int | float) and value in allowed):
            self.refuse(key, value, why)

    def none_of(self, foreign: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse the keys of other architectures, but for values that change nothing."""
        for key, neutral in foreign.items():
            self.only(key, *neutral, why="it is another architecture's, and not supported")

    def flag(self, key: str) -> bool:
        """A truth value that is false where absent."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            self.refuse(key, value, "it must be true or false")
        return value


def _model(at: _Values, n_tokens: int, heads: int, kv_heads: int, **fields: Any) -> ModelConfig:
    if heads % kv_heads or fields["d_head"] % 2 or heads * fields["d_head"] > MAX_SIZE:
        raise PretrainedError(
            f"{at.path}: {heads} heads of size {fields['d_head']} on {kv_heads} KV heads: the "
            f"heads must be a multiple of the KV heads, and their size even"
        )
    return ModelConfig(
        n_kv_heads=kv_heads,
        q_per_kv=heads // kv_heads,
        n_tokens=n_tokens,
        vocab_size=-(-n_tokens // 8) * 8,
        scale_in_init=False,
        **fields,
    )


# --- Hugging Face's config.json ------------------------------------------------------------------


def from_config_json(config: Mapping[str, Any], path: pathlib.Path) -> tuple[str, ModelConfig]:
    """(architecture, model) of a config.json's values; `path` is for the errors.

    PretrainedError for an unsupported architecture, scaling of positions or option (it says which
    are supported), and for a size that is missing or wrong.
    """
    at = _Values(config, path)
    kind = at.get("model_type", "")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        at.refuse("model_type", kind, f"supported are {', '.join(FAMILIES)}")
    classes, wanted = at.get("architectures", []), f"{kind.capitalize()}ForCausalLM"
    # Without case: the first Llamas are LLaMAForCausalLM.
    if not isinstance(classes, list) or {str(c).lower() for c in classes} - {wanted.lower()}:
        at.refuse("architectures", classes, f"only causal language models; of model_type={kind!r} "
                  f"that is {wanted}")  # fmt: skip
    for key in ("hidden_act", "hidden_activation"):
        at.only(key, "silu", "swish", why="only silu is supported")
    at.none_of(_FOREIGN)
    at.only("attention_bias", False, why="biases of the attention's output are not supported; "
            "those of q, k and v are Qwen2's")  # fmt: skip
    at.only("mlp_bias", False, why="biases in the MLP are not supported")
    for key in ("quantization_config", "compression_config"):
        if at.get(key):
            at.refuse(key, at.get(key), "use the unquantized model, or a GGUF")
    width, heads = at.size("hidden_size"), at.size("num_attention_heads")
    if at.get("head_dim") is None and width % heads and kind != "qwen3":
        at.refuse("hidden_size", width, f"not a multiple of {heads} heads, and no head_dim")
    layers = at.size("num_hidden_layers")
    max_len = at.size("max_position_embeddings")
    # Llama 1 and 2 say nothing of KV heads where there are as many; the others' defaults are
    # numbers of one model.
    kv_heads = at.size("num_key_value_heads", heads if kind == "llama" else None)
    model = _model(
        at,
        at.size("vocab_size"),
        heads,
        kv_heads,
        n_layers=layers,
        d_model=width,
        d_head=at.size("head_dim", 128 if kind == "qwen3" else width // heads),
        d_ff=at.size("intermediate_size"),
        max_len=max_len,
        window=_window(at, kind, layers, max_len),
        tied=at.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        norm_eps=at.positive("rms_norm_eps", 1e-6),
        **_rope(at, max_len),
    )
    return kind, model


def _window(at: _Values, kind: str, layers: int, max_len: int) -> int:
    """Keys that a query sees, itself included (in `transformers` k > q - sliding_window)."""
    absent, stated = "sliding_window" not in at.values, at.get("use_sliding_window")
    window = at.size("sliding_window", WINDOW if absent and kind != "llama" else 0, least=0)
    qwen = kind.startswith("qwen")
    # Only Qwen's is switched on and off; elsewhere engines do not agree what the file says.
    unclear = {"llama": stated is not False, "mistral": stated is False}.get(kind, False)
    if unclear and 0 < window < max_len:
        at.refuse("sliding_window", window, f"with model_type={kind!r} and use_sliding_window="
                  f"{stated} it is not plain whether it counts; say null if not, else "
                  f"model_type='mistral' and no use_sliding_window")  # fmt: skip
    if not (at.flag("use_sliding_window") if qwen else kind == "mistral"):
        window = 0
    full = min(at.size("max_window_layers", 28, least=0), layers) if qwen else 0
    derived = [FULL] * full + [SLIDING] * (layers - full) if window else [FULL] * layers
    alike = [[FULL] * layers] + [[SLIDING] * layers] * (window > 0)
    kinds = at.get("layer_types", derived)
    if kinds not in (alike if qwen else [derived]):
        at.refuse("layer_types", kinds, f"supported are {FULL} in all layers, or in all of them "
                  f"{SLIDING} of sliding_window positions (here {window})")  # fmt: skip
    return window if kinds == [SLIDING] * layers else 0


def _rope(at: _Values, max_len: int) -> dict[str, Any]:
    """The fields of rotary positions; newer files have them in `rope_parameters`."""
    inner = []
    for key in ("rope_parameters", "rope_scaling"):
        if value := at.get(key):
            if not isinstance(value, Mapping):
                at.refuse(key, value, "it must be an object")
            inner.append(_Values(value, at.path))
    base = _agreed([at, *inner], "rope_theta", lambda v: v.positive("rope_theta")) or 1e4
    found = [_rope_scaling(at, values, max_len) for values in inner]
    if found[1:] and found[0] != found[1]:
        at.refuse("rope_scaling", at.get("rope_scaling"), "rope_parameters, its newer name, says "
                  "something else; remove the one that is not the model's")  # fmt: skip
    return {"rope_base": base, **(found[0] if found else {})}


def _agreed(places: list[_Values], key: str, read: Callable[[_Values], Any]) -> Any:
    """The value of a key that may stand in several places; None where it is in none of them."""
    found = [read(at) for at in places if at.get(key) is not None]
    for other in found:
        if other != found[0]:
            places[0].refuse(key, found[0], f"elsewhere in the file it is {other}; remove the one "
                             f"that is not the model's")  # fmt: skip
    return found[0] if found else None


def _rope_scaling(at: _Values, inner: _Values, max_len: int) -> dict[str, Any]:
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind not in ROPE_TYPES:
        at.refuse("rope_scaling", kind, f"supported are {', '.join(ROPE_TYPES)}")
    inner.only("type", kind, why=f"rope_type, its newer name, is {kind!r}; remove one of them")
    inner.only("partial_rotary_factor", 1, why="rotating a part of each head is not supported")
    length = "original_max_position_embeddings"
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", length, *_ROPE_KEYS[kind]}
    for key in sorted(inner.values.keys() - known):
        inner.only(key, why=f"rotary positions of the type {kind!r} have no such value")
    if kind == "default":
        return {}
    factor = inner.positive("factor")
    if kind == "linear":
        return linear_scaling(factor, max_len)
    low, high = inner.positive("low_freq_factor"), inner.positive("high_freq_factor")
    if high <= low:
        at.refuse("high_freq_factor", high, f"it must be above low_freq_factor={low}")
    original = _agreed([at, inner], length, lambda v: v.size(length)) or inner.size(length)
    return _scaling(factor, low, high, original)


def _scaling(factor: float, low: float, high: float, length: int) -> dict[str, Any]:
    return {"rope_scaling": factor, "rope_low_freq_factor": low, "rope_high_freq_factor": high,
            "rope_original_len": length}  # fmt: skip


def linear_scaling(factor: float, length: int) -> dict[str, Any]:
    """All frequencies divided by `factor`, in the terms of Llama 3's scaling.

    No pair turns more often than length / 2 pi times in `length` positions: with a low factor of
    `length` all count as slow.
    """
    return _scaling(factor, float(length), 2.0 * length, length)


# --- GGUF's metadata -----------------------------------------------------------------------------


def from_gguf(file: GgufFile) -> tuple[str, ModelConfig]:
    """(architecture, model) of a GGUF file's metadata; errors as `from_config_json`.

    The architecture "llama" is every model whose queries and keys its converter stores permuted:
    Llama, SmolLM and Mistral.
    """
    kind = file.metadata.get("general.architecture", "")
    if not isinstance(kind, str) or kind not in GGUF_FAMILIES:
        raise PretrainedError(
            f"{file.path}: general.architecture={kind!r}: supported are {', '.join(GGUF_FAMILIES)}"
        )
    parts = _Values(file.metadata, file.path).size("split.count", 1, least=0)
    if parts > 1:
        raise PretrainedError(
            f"{file.path} is one of {parts} parts; merge them (llama-gguf-split --merge)"
        )
    at = _Values(file.metadata, file.path, f"{kind}.")
    at.only("expert_count", 0, why="mixtures of experts are not supported")
    at.none_of(_FOREIGN_GGUF)
    at.only("rope.scaling.type", "none", "linear",
            why="supported are none, linear, and, as rope_freqs.weight, Llama 3's")  # fmt: skip
    at.only("rope.scale_linear", 1, why="use rope.scaling.type and rope.scaling.factor")
    width, heads = at.size("embedding_length"), at.size("attention.head_count")
    if at.get("attention.key_length") is None and width % heads:
        at.refuse("embedding_length", width, f"not a multiple of {heads} heads")
    d_head = at.size("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        at.only(key, d_head, why=f"another size than the heads' {d_head} is not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise PretrainedError(
            f"{file.path}: the tensor 'token_embd.weight' is missing; give a whole model's file"
        )
    base, max_len = at.positive("rope.freq_base", 1e4), at.size("context_length")
    scaling: dict[str, Any] = {}
    if "rope_freqs.weight" in file.tensors:
        scaling = _recognise(file, base, d_head)
    # A factor without a type is a linear one, to llama.cpp too.
    factor = at.get("rope.scaling.factor")
    if at.get("rope.scaling.type", "none" if factor is None else "linear") == "linear":
        if scaling:
            at.refuse("rope.scaling.factor", factor, "positions are scaled by rope_freqs.weight "
                      "too; one of them is supported")  # fmt: skip
        scaling = linear_scaling(_shortest(at.positive("rope.scaling.factor")), max_len)
    family = FAMILIES[kind]
    eps = at.positive("attention.layer_norm_rms_epsilon")
    model = _model(
        at,
        embedding.shape[0],
        heads,
        at.size("attention.head_count_kv", heads),
        n_layers=at.size("block_count"),
        d_model=width,
        d_head=d_head,
        d_ff=at.size("feed_forward_length"),
        max_len=max_len,
        window=at.size("attention.sliding_window", 0, least=0),
        tied="output.weight" not in file.tensors,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        norm_eps=_shortest(eps),
        rope_base=_shortest(base),
        **scaling,
    )
    return kind, model


def _shortest(value: float) -> float:
    """The decimal that a float32 was written as: 1e-05 rather than 9.99999974e-06."""
    return float(str(np.float32(value)))


def _recognise(file: GgufFile, base: float, d_head: int) -> dict[str, Any]:
    """Llama 3's scaling from what its converter makes of it, a divisor per rotated pair."""
    divisors = file.read("rope_freqs.weight")
    if divisors.shape != (d_head // 2,):
        raise PretrainedError(f"{file.path}: rope_freqs.weight has the shape {divisors.shape}, "
                              f"not ({d_head // 2},)")  # fmt: skip
    if (divisors == 1).all():
        return {}
    low, high = _LLAMA3_FACTORS
    unknown = PretrainedError(
        f"{file.path}: rope_freqs.weight is not Llama 3's scaling of positions with the factors "
        f"{low} and {high}; supported are {', '.join(ROPE_TYPES)}"
    )
    if not (np.isfinite(divisors) & (divisors >= 1)).all():
        raise unknown
    plain = ModelConfig(d_head=d_head, rope_base=base)
    wanted = rope_frequencies(plain) / divisors
    factor = _shortest(float(divisors.max()))
    # Between the two, 1 / divisor goes from 1 / factor to 1 as the turns within the original
    # length go from the low factor to the high one: a pair there tells that length.
    share = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (share > 1e-3) & (share < 1 - 1e-3)
    turns = low + (high - low) * share[between]
    lengths = 2 * np.pi * turns / rope_frequencies(plain)[between]
    for length in (_LLAMA3_LENGTH, *np.rint(lengths).astype(int)[:1]):
        scaling = _scaling(factor, low, high, int(length))
        found = rope_frequencies(dataclasses.replace(plain, **scaling))
        if np.allclose(found, wanted, rtol=1e-5, atol=0):
            return scaling
    raise unknown

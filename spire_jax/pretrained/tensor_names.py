"""Which tensor of a checkpoint holds which parameter, and how its rows and columns lie there.

A tensor is the transposed matrix of a parameter in both formats: [outputs, inputs]. Heads come
in the order of `transformers`: head = KV head * queries per KV head + g.
"""

import dataclasses
import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from spire_jax.config.schema import ModelConfig
from spire_jax.models.attention import Compute
from spire_jax.models.transformer import Model, Transformer

Path = tuple[str | int, ...]  # keys of a parameter in the tree
CHUNK = 1 << 22  # values that are read and converted at once
_SIZES = ("d_model", "n_kv_heads", "q_per_kv", "d_head", "d_ff", "vocab_size", "n_tokens", "tied",
          "qkv_bias", "qk_norm")  # fmt: skip

# Parameter -> names in Hugging Face's files and in GGUF's, {} for the number of the block.
_NAMES = {
    "embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "unembedding": ("lm_head.weight", "output.weight"),
    "norm_final": ("model.norm.weight", "output_norm.weight"),
}
_BLOCK_NAMES = {
    "norm_attention": ("input_layernorm.weight", "attn_norm.weight"),
    "query": ("self_attn.q_proj.weight", "attn_q.weight"),
    "key": ("self_attn.k_proj.weight", "attn_k.weight"),
    "value": ("self_attn.v_proj.weight", "attn_v.weight"),
    "query_bias": ("self_attn.q_proj.bias", "attn_q.bias"),
    "key_bias": ("self_attn.k_proj.bias", "attn_k.bias"),
    "value_bias": ("self_attn.v_proj.bias", "attn_v.bias"),
    "norm_query": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "norm_key": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    "out": ("self_attn.o_proj.weight", "attn_output.weight"),
    "norm_mlp": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "gate": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "up": ("mlp.up_proj.weight", "ffn_up.weight"),
    "down": ("mlp.down_proj.weight", "ffn_down.weight"),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensor of one parameter."""

    tensor: str
    tensor_shape: tuple[int, ...]
    shape: tuple[int, ...]  # the parameter's
    split: int  # the parameter's axes before it are the tensor's columns, the others its rows
    transposed: bool = True  # ... or the other way round, for the embedding
    interleaved: int = 0  # size of heads that hold rotated pairs side by side; 0 = half by half


@runtime_checkable
class Weights(Protocol):
    """Tensors that can be read in parts: a GgufFile or SafetensorsFiles."""

    def read(self, name: str, rows: slice = ..., columns: slice = ...) -> np.ndarray: ...


@functools.cache
def _shapes(model: ModelConfig) -> tuple[tuple[Path, tuple[int, ...]], ...]:
    """Keys and shapes of a model's parameters."""
    shapes = Model(Transformer, model, Compute()).shapes()
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    return tuple((tuple(key.key for key in keys), leaf.shape) for keys, leaf in leaves)


def sources(model: ModelConfig, *, gguf: bool, interleaved: bool = False) -> dict[Path, Source]:
    """The source of every parameter of `model`, by the keys that lead to it.

    `interleaved`: rows of queries and keys are in the order that GGUF's architecture "llama" has.
    """
    out: dict[Path, Source] = {}
    # Of one layer: tracing a deep model takes seconds, and what is not a size changes nothing.
    sizes = {key: getattr(model, key) for key in _SIZES}
    for path, shape in _shapes(ModelConfig(n_layers=1, **sizes)):
        if path[0] != "blocks":
            out[path] = _source(_NAMES[str(path[0])][gguf], path[0], shape, model, 0)
            continue
        pairs = model.d_head if interleaved and path[2] in ("query", "key") else 0
        name = _BLOCK_NAMES[str(path[2])][gguf]
        for i in range(model.n_layers):
            block = f"blk.{i}." if gguf else f"model.layers.{i}."
            out["blocks", i, *path[2:]] = _source(block + name, path[2], shape, model, pairs)
    return out


def _source(
    name: str, parameter: Any, shape: tuple[int, ...], model: ModelConfig, interleaved: int
) -> Source:
    if parameter.startswith("norm") or parameter.endswith("_bias"):
        return Source(name, (math.prod(shape),), shape, len(shape))
    if parameter == "embedding":
        return Source(name, (model.n_tokens, model.d_model), shape, 1, transposed=False)
    split = len(shape) - 1 if parameter == "out" else 1
    columns, rows = math.prod(shape[:split]), math.prod(shape[split:])
    rows = model.n_tokens if parameter == "unembedding" else rows
    return Source(name, (rows, columns), shape, split, interleaved=interleaved)


def read_part(weights: Weights, source: Source, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """The part of a parameter at `index`, reading no more of its tensor than that.

    Values go through float32, `CHUNK` at a time; what lies beyond the tensor (the padding of the
    vocabulary) is 0.

    Args:
        index: a slice per axis of the parameter. Several axes that are one of the tensor's, as
            heads are, can only be cut along the first of them.
    """
    spans = [s.indices(n)[:2] for s, n in zip(index, source.shape, strict=True)]
    out = np.zeros([end - begin for begin, end in spans], dtype)
    first = _span(spans[: source.split], source.shape[: source.split])
    if len(source.tensor_shape) == 1:
        out[...] = weights.read(source.tensor, columns=slice(*first)).reshape(out.shape)
        return out
    second = _span(spans[source.split :], source.shape[source.split :])
    matrix = out.reshape(first[1] - first[0], second[1] - second[0])
    (begin, end), columns = (second, first) if source.transposed else (first, second)
    matrix = matrix.T if source.transposed else matrix
    unit = source.interleaved or 1
    step = max(CHUNK // max(columns[1] - columns[0], 1) // unit, 1) * unit
    last = min(end, source.tensor_shape[0])
    for at in range(begin, last, step):
        rows = slice(at, min(at + step, last))
        values = weights.read(source.tensor, rows, slice(*columns))
        if source.interleaved:
            pairs = values.reshape(-1, source.interleaved // 2, 2, values.shape[-1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        matrix[rows.start - begin : rows.stop - begin] = values
    return out


def _span(spans: list[tuple[int, int]], shape: tuple[int, ...]) -> tuple[int, int]:
    """The range, along one axis of the tensor, of a range of the axes that it is made of."""
    if any(span != (0, n) for span, n in zip(spans[1:], shape[1:], strict=True)):
        raise ValueError(f"axes {shape} are one of the tensor's: cut along the first only")
    inner = math.prod(shape[1:])
    return spans[0][0] * inner, spans[0][1] * inner

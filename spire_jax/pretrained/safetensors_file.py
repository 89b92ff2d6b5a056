"""Safetensors: one file, or the shards of a Hugging Face directory, read in parts.

The header is parsed by the library `safetensors`, which checks it against the file before it
gives anything out: sizes, dtypes, shapes, offsets without holes or overlaps.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from spire_jax.config.values import parse_json
from spire_jax.pretrained import PretrainedError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
READABLE = {"F32": 4, "F16": 2, "BF16": 2}  # types of weights, and their bytes
MAX_NAME = 255  # bytes of a file's name, in most file systems
MAX_JSON = 1 << 27  # bytes of an index or a config; an index of 100,000 tensors takes a tenth


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor's place: the open file, and what that file's header says of it."""

    file: Any  # a `safe_open`
    path: pathlib.Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, e.g. "BF16"


@dataclasses.dataclass(frozen=True)
class SafetensorsFiles:
    """Tensors of one or more files by name; values are read when asked for."""

    files: tuple[pathlib.Path, ...]
    tensors: Mapping[str, Tensor]

    def raw(self, name: str, *at: slice) -> np.ndarray:
        """A tensor in its own dtype, or a part of it; KeyError for an unknown name."""
        tensor = self.tensors[name]
        try:
            return tensor.file.get_slice(name)[at] if at else tensor.file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise PretrainedError(f"{tensor.path}: tensor {name!r}: {error}") from error

    def stored(self, name: str) -> np.ndarray:
        """The bytes of a tensor as they lie in its file."""
        return self.raw(name).reshape(-1).view(np.uint8)

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Float[np.ndarray, "..."]:
        """Float32 values of a tensor, of some `rows` (axis 0) and `columns` (the last axis).

        A tensor of one axis has columns only. KeyError for an unknown name, PretrainedError for
        a type that is no unquantized weight's.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in READABLE:
            raise PretrainedError(
                f"{tensor.path}: tensor {name!r} is of type {tensor.dtype}; weights of "
                f"{', '.join(READABLE)} are supported: export the model unquantized, or as GGUF"
            )
        at = (rows, columns) if len(tensor.shape) > 1 else (columns,)
        return self.raw(name, *at).astype(np.float32)


def read_safetensors(*paths: pathlib.Path) -> SafetensorsFiles:
    """The headers of files whose tensors make up one model.

    PretrainedError, naming the file, if one is cut or contradicts itself, or if two hold a tensor
    of the same name.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        if not path.is_file():
            raise PretrainedError(f"{path} does not exist; fetch the checkpoint again, whole")
        try:
            file = safe_open(path, "numpy")
            names = list(file.keys())
            described = [(name, file.get_slice(name)) for name in names]
            found = {n: Tensor(file, path, tuple(s.get_shape()), s.get_dtype())
                     for n, s in described}  # fmt: skip
        except (SafetensorError, OSError, ValueError) as error:
            raise PretrainedError(
                f"{path} is no whole safetensors file: {error}; fetch it again"
            ) from error
        for name in found.keys() & tensors.keys():
            raise PretrainedError(
                f"{path} and {tensors[name].path} both hold {name!r}; keep one of them"
            )
        tensors |= found
    return SafetensorsFiles(paths, tensors)


def read_directory(directory: pathlib.Path) -> SafetensorsFiles:
    """The weights of a Hugging Face directory: model.safetensors, or the shards of an index; or all
    files of safetensors, where they are called otherwise.

    PretrainedError if there are none, or if index and shards do not agree.
    """
    # Of a link to nothing it is said which; a cache's links go to files without a suffix.
    if os.path.lexists(directory / WEIGHTS):
        return read_safetensors(directory / WEIGHTS)
    if not os.path.lexists(directory / INDEX):
        if found := sorted(directory.glob("*.safetensors")):
            return read_safetensors(*found)
        raise PretrainedError(f"{directory}: {_no_weights(directory)}")
    path = directory / INDEX
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise PretrainedError(f"{path}: weight_map must give a file for each tensor's name")
    shards = sorted(set(places.values()))
    for shard in shards:
        bad = shard in ("", ".", "..") or {"/", "\\", "\0"} & set(shard)
        if bad or len(shard.encode(errors="replace")) > MAX_NAME:
            raise PretrainedError(
                f"{path}: {shard!r:.100} is no plain file name; shards lie beside the index"
            )
    weights = read_safetensors(*(directory / shard for shard in shards))
    held = {name: tensor.path.name for name, tensor in weights.tensors.items()}
    wrong = sorted(n for n in held.keys() | places.keys() if held.get(n) != places.get(n))
    if wrong:
        first = wrong[0]
        raise PretrainedError(
            f"{path} puts {first!r} into {places.get(first, 'no file')}, and it is in "
            f"{held.get(first, 'no shard')} ({len(wrong)} such tensors); fetch index and shards "
            f"again, from one revision"
        )
    return weights


def _no_weights(directory: pathlib.Path) -> str:
    if ggufs := sorted(directory.glob("*.gguf")):
        return f"there are no safetensors; give the file {ggufs[0].name} itself"
    pickles = [*sorted(directory.glob("*.bin")), *sorted(directory.glob("*.pt*"))]
    has = f"only {pickles[0].name}, a pickle, which is never read" if pickles else "neither"
    return f"there is {has}; {WEIGHTS} or {INDEX} is needed: convert to safetensors"


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file of one JSON object; PretrainedError naming it for anything else."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise PretrainedError(f"{path} does not exist; fetch the checkpoint again, whole")
    if path.stat().st_size > MAX_JSON:
        raise PretrainedError(f"{path} is larger than {MAX_JSON} bytes, no file of this kind")
    try:
        values = parse_json(path.read_bytes())
    except ValueError as error:
        raise PretrainedError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise PretrainedError(f"{path} holds {type(values).__name__}, not a JSON object")
    return values

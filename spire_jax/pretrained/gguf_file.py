"""GGUF files: the header, checked against the file before use, and rows of (quantized) tensors.

A header states counts, lengths and offsets; a file that is cut or lies must be refused without
memory or time being spent on what it states. So every read is held against the end of the file,
and the header as a whole against `MAX_HEADER`. Dequantization is that of the package `gguf`.
"""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import struct
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from jaxtyping import Float

from spire_jax.pretrained import PretrainedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 1 << 27  # bytes; vocabularies of 256k tokens with their merges take a tenth of it
MAX_AXES = 4
MAX_KEY, MAX_NAME = 65535, 64  # bytes of metadata keys and of tensors' names, by the format
# Types of tensors that `gguf` turns into float32.
READABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
            "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS",
            "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")  # fmt: skip
# Types of metadata values: number of the type -> NumPy's name of a scalar.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
            10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor of a GGUF file; `begin` and `end` are byte offsets from the file's start."""

    name: str
    shape: tuple[int, ...]  # as NumPy has it: the last axis varies fastest
    dtype: str  # GGUF's name of the type, e.g. "F32" or "Q4_K"
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The checked header of a GGUF file; tensors are read from the file when asked for."""

    path: pathlib.Path
    metadata: dict[str, Any]  # scalars and strings of Python; arrays of NumPy, or lists of strings
    tensors: dict[str, TensorInfo]

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, mode="r")

    def stored(self, name: str) -> np.ndarray:
        """The bytes of a tensor as they lie in the file."""
        info = self.tensors[name]
        if len(self._bytes) < info.end:
            raise PretrainedError(f"{self.path} has become shorter; fetch it again")
        return self._bytes[info.begin : info.end]

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Float[np.ndarray, "..."]:
        """Float32 values of a tensor, of some `rows` (axis 0) and `columns` (the last axis).

        Only the blocks that hold them are read. A tensor of one axis has columns only. KeyError
        for a name that is not in `tensors`; PretrainedError for a type that is not `READABLE`,
        or if the file has become shorter since its header was read.
        """
        info = self.tensors[name]
        if info.dtype not in READABLE:
            raise PretrainedError(
                f"{self.path}: tensor {name!r} is of type {info.dtype}; convert the file to one "
                f"of {', '.join(READABLE)}"
            )
        kind = GGMLQuantizationType[info.dtype]
        block, size = GGML_QUANT_SIZES[kind]
        stored = self.stored(name).reshape(*info.shape[:-1], info.shape[-1] // block * size)
        begin, end, _ = columns.indices(info.shape[-1])
        first = begin // block
        if len(info.shape) > 1:
            stored = stored[rows]
        stored = np.array(stored[..., first * size : -(-end // block) * size])
        values = dequantize(stored, kind)
        return values[..., begin - first * block : end - first * block]


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as GGUF does, whatever it is called."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:  # a directory, or nothing
        return False


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """The header of a GGUF file of version 2 or 3.

    PretrainedError, naming the file, for a header that is cut, that contradicts itself or that
    states anything beyond the end of the file: lengths, counts, types, names given twice,
    offsets that are not aligned or that overlap.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise PretrainedError(f"{path} is no file; give a .gguf file")
    size = path.stat().st_size
    head = memoryview(np.memmap(path, np.uint8, mode="r")[:MAX_HEADER].data if size else b"")
    reader = _Reader(path, head, cut=size > len(head))
    if head[:4] != MAGIC:
        raise PretrainedError(
            f"{path} is no GGUF file: it begins with {bytes(head[:4])!r}; of safetensors give the "
            f"directory, with config.json in it"
        )
    reader.at = 4
    version = reader.u32("the version")
    if version not in VERSIONS:
        why = "big-endian" if version and not version & 0xFFFF else f"of version {version}"
        reader.refuse(f"it is {why}; versions {VERSIONS}, little-endian, are supported")
    n_tensors, n_values = reader.u64("the number of tensors"), reader.u64("the number of keys")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = reader.string("a key", MAX_KEY)
        shown = f"{key!r:.100}"
        if key in metadata:
            reader.refuse(f"the key {shown} is given twice")
        metadata[key] = reader.value(reader.u32(f"the type of {shown}"), f"the value of {shown}")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        reader.refuse(f"general.alignment is {alignment!r}, no power of two")
    stated: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n_tensors):
        name = reader.string("a tensor's name", MAX_NAME)
        if name in stated:
            reader.refuse(f"the tensor {name!r} is given twice")
        n_axes = reader.u32(f"the axes of {name!r}")
        if not 1 <= n_axes <= MAX_AXES:
            reader.refuse(f"tensor {name!r} has {n_axes} axes, not 1 to {MAX_AXES}")
        shape = tuple(reader.u64(f"the shape of {name!r}") for _ in range(n_axes))[::-1]
        stated[name] = shape, reader.u32(f"the type of {name!r}"), reader.u64(f"{name!r}'s offset")
    data = -(-reader.at // alignment) * alignment
    tensors = {
        name: _tensor(reader, name, shape, number, offset, data, alignment, size)
        for name, (shape, number, offset) in stated.items()
    }
    ordered = sorted(tensors.values(), key=lambda info: info.begin)
    for before, after in itertools.pairwise(ordered):
        if after.begin < before.end:
            reader.refuse(f"tensors {before.name!r} and {after.name!r} overlap")
    return GgufFile(path, metadata, tensors)


def _tensor(reader, name, shape, number, offset, data, alignment, size) -> TensorInfo:
    try:
        kind = GGMLQuantizationType(number)
        block, block_size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        reader.refuse(
            f"tensor {name!r} is of an unknown type, {number}; supported: {', '.join(READABLE)}"
        )
    if 0 in shape or shape[-1] % block:
        reader.refuse(f"tensor {name!r} of shape {shape} is not made of blocks of {block}")
    if offset % alignment:
        reader.refuse(f"tensor {name!r} is at {offset}, which is no multiple of {alignment}")
    begin = data + offset
    end = begin + math.prod(shape) // block * block_size
    if end > size:
        reader.refuse(f"tensor {name!r} ends at byte {end} of {size}")
    return TensorInfo(name, shape, kind.name, begin, end)


class _Reader:
    """A position in the header; every read is checked against its end first."""

    def __init__(self, path: pathlib.Path, head: memoryview, *, cut: bool):
        self.path, self.head, self.cut = path, head, cut
        self.at = 0

    def refuse(self, why: str) -> NoReturn:
        raise PretrainedError(f"{self.path}: {why}; fetch or convert the file again")

    def take(self, count: int, what: str) -> memoryview:
        """The next `count` bytes; PretrainedError if there are fewer."""
        left = len(self.head) - self.at
        if count > left:
            end = f"the header's limit of {MAX_HEADER} bytes" if self.cut else "the file's end"
            self.refuse(f"{what} takes {count} bytes, and {end} is {left} bytes away")
        self.at += count
        return self.head[self.at - count : self.at]

    def u32(self, what: str) -> int:
        return _U32.unpack(self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack(self.take(8, what))[0]

    def string(self, what: str, most: int = MAX_HEADER) -> str:
        """A text of up to `most` bytes, preceded by its length."""
        length = self.u64(what)
        if length > most:
            self.refuse(f"{what} takes {length} bytes, more than {most}")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            self.refuse(f"{what}, before byte {self.at}, is no UTF-8")

    def value(self, kind: int, what: str) -> Any:
        """A metadata value of the type with this number."""
        if kind == _STRING:
            return self.string(what)
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        if kind != _ARRAY:
            self.refuse(f"{what} is of an unknown type, {kind}")
        item, count = self.u32(what), self.u64(what)
        if item == _STRING:
            # Each takes 8 bytes or more: a count that is a lie ends at the header's end.
            return [self.string(what) for _ in range(count)]
        if item not in _SCALARS:
            self.refuse(f"{what} is an array of type {item}; numbers and strings are supported")
        dtype = np.dtype(_SCALARS[item])
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype).copy()

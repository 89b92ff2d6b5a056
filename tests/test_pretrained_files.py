"""Headers of GGUF and safetensors files: parts that are read, and lies that are refused."""

import json
import pathlib
import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from pretrained_models import tiny, write_safetensors
from safetensors.numpy import save_file

from spire_jax.pretrained import PretrainedError
from spire_jax.pretrained.gguf_file import READABLE, read_gguf
from spire_jax.pretrained.safetensors_file import (
    read_directory,
    read_json,
    read_safetensors,
)

# --- GGUF: what is read --------------------------------------------------------------------------


def test_gguf_metadata(tmp_path):
    path = tmp_path / "m.gguf"
    w = GGUFWriter(path, "llama")
    w.add_uint32("a.u32", 2**32 - 1)
    w.add_int64("a.i64", -5)
    w.add_float32("a.f32", 0.5)
    w.add_bool("a.bool", True)
    w.add_string("a.text", "naïve 文")
    w.add_array("a.strings", ["", "é", "🙂"])
    w.add_array("a.numbers", [3, -1, 2])
    w.add_array("a.floats", [0.5, 1.5])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    found = read_gguf(path).metadata
    expected = {"general.architecture": "llama", "a.u32": 2**32 - 1, "a.i64": -5, "a.f32": 0.5,
                "a.bool": True, "a.text": "naïve 文", "a.strings": ["", "é", "🙂"],
                "a.numbers": [3, -1, 2], "a.floats": [0.5, 1.5]}  # fmt: skip
    assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()} == expected
    assert type(found["a.bool"]) is bool and type(found["a.u32"]) is int


@pytest.mark.parametrize("kind", READABLE)
def test_quantized(kind, tmp_path):
    """Every type, whole and in parts that begin and end inside blocks."""
    dtype = GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[dtype]
    rng, width = np.random.default_rng(0), 2 * block if block > 1 else 7
    # Bytes of small value make sane scales in every format.
    stored = rng.integers(0, 60, (5, width // block * size)).astype(np.uint8)
    path = tmp_path / "m.gguf"
    w = GGUFWriter(path, "llama")
    w.add_tensor("t", stored, raw_shape=stored.shape, raw_dtype=dtype)
    w.add_tensor("u", np.arange(6, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    file = read_gguf(path)
    expected = gguf.dequantize(stored, dtype)
    assert file.tensors["t"].shape == (5, width) == expected.shape
    whole = file.read("t")
    assert whole.dtype == np.float32 and np.isfinite(whole).all() and whole.any()
    np.testing.assert_array_equal(whole, expected)
    for rows, columns in ((slice(1, 3), slice(3, width - 2)), (slice(2, 3), slice(0, 1))):
        np.testing.assert_array_equal(file.read("t", rows, columns), expected[rows, columns])
    np.testing.assert_array_equal(file.read("u", columns=slice(2, 5)), [2, 3, 4])


def test_unreadable_type(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(tensors=[("t", (4,), 24, 0)], data=bytes(32)))
    assert read_gguf(path).tensors["t"].dtype == "I8"
    with pytest.raises(PretrainedError, match=r"'t' is of type I8; convert .* F32, F16, .*IQ4_XS"):
        read_gguf(path).read("t")


# --- GGUF: what is refused -----------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IIQ", 9, kind, count) + content


def u32(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def gguf_bytes(
    values=(), tensors=(), data=b"", *, version=3, n_values=None, n_tensors=None, magic=b"GGUF"
) -> bytes:
    """A file made of (key, type and value) pairs and (name, axes, type, offset) of tensors."""
    out = magic + struct.pack("<I", version)
    out += struct.pack("<QQ", len(tensors) if n_tensors is None else n_tensors,
                       len(values) if n_values is None else n_values)  # fmt: skip
    for key, value in values:
        out += text(key) + value
    for name, axes, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
        out += struct.pack("<IQ", kind, offset)
    return out + bytes(-len(out) % 32) + data


F32, Q8_0 = 0, 8
BAD_GGUF = {
    "empty": (b"", "is no GGUF file: it begins with b''"),
    "magic": (gguf_bytes(magic=b"GGML"), "it begins with b'GGML'"),
    "version": (gguf_bytes(version=1), r"of version 1; versions \(2, 3\)"),
    "big-endian": (gguf_bytes(version=3 << 24), "it is big-endian"),
    "no counts": (gguf_bytes()[:12], "the number of tensors takes 8 bytes, .* 4 bytes away"),
    "many keys": (gguf_bytes(n_values=2**63), "the type of '' takes 4 bytes"),
    "many tensors": (gguf_bytes(n_tensors=2**63), "the axes of '' takes 4 bytes"),
    "long key": (gguf_bytes(n_values=1)[:24] + struct.pack("<Q", 2**62), "key takes .* than 65535"),
    "long text": (gguf_bytes([("a", struct.pack("<IQ", 8, 2**62))]), "'a' takes 4.* more than"),
    "long array": (gguf_bytes([("a", array(4, 2**61))]), "the value of 'a' takes 92233"),
    "many texts": (gguf_bytes([("a", array(8, 2**61))]), "the value of 'a' takes 8 bytes"),
    "long name": (gguf_bytes(tensors=[("t" * 65, (4,), F32, 0)]), "takes 65 bytes, more than 64"),
    "nested": (gguf_bytes([("a", array(9, 1, array(4, 0)))]), "an array of type 9"),
    "kind": (gguf_bytes([("a", struct.pack("<I", 13))]), "of an unknown type, 13"),
    "not UTF-8": (gguf_bytes([("a", struct.pack("<I", 8) + text(b"\xff"))]), "is no UTF-8"),
    "long key shown": (gguf_bytes([("a" * 5000, struct.pack("<I", 13))]),
                       f"the value of '{'a' * 99} is of an unknown"),
    "key twice": (gguf_bytes([("a", u32(1)), ("a", u32(1))]), "key 'a' is given twice"),
    "alignment": (gguf_bytes([("general.alignment", u32(33))]), "is 33, no power of two"),
    "no alignment": (gguf_bytes([("general.alignment", u32(0))]), "is 0, no power of two"),
    "alignment of text": (gguf_bytes([("general.alignment", struct.pack("<I", 8) + text("8"))]),
                          "is '8', no power of two"),
    "no axes": (gguf_bytes(tensors=[("t", (), F32, 0)]), "has 0 axes"),
    "many axes": (gguf_bytes(tensors=[("t", (2,) * 5, F32, 0)]), "has 5 axes"),
    "no size": (gguf_bytes(tensors=[("t", (0,), F32, 0)]), r"'t' of shape \(0,\) is not made of"),
    "block": (gguf_bytes(tensors=[("t", (33,), Q8_0, 0)]), "not made of blocks of 32"),
    "tensor's type": (gguf_bytes(tensors=[("t", (4,), 999, 0)]), "unknown type, 999; supported"),
    "too large": (gguf_bytes(tensors=[("t", (2**62, 2**62), F32, 0)], data=bytes(64)), "ends at"),
    "beyond": (gguf_bytes(tensors=[("t", (9,), F32, 32)], data=bytes(64)), "at byte 132 of 128"),
    "offset": (gguf_bytes(tensors=[("t", (4,), F32, 2**64 - 32)], data=bytes(64)), "ends at byte"),
    "aligned": (gguf_bytes(tensors=[("t", (4,), F32, 4)], data=bytes(64)), "no multiple of 32"),
    "tensor twice": (gguf_bytes(tensors=[("t", (4,), F32, 0), ("t", (4,), F32, 32)],
                                data=bytes(64)), "tensor 't' is given twice"),
    "overlap": (gguf_bytes(tensors=[("t", (9,), F32, 0), ("u", (4,), F32, 32)], data=bytes(64)),
                "'t' and 'u' overlap"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_GGUF)
def test_bad_gguf(case, tmp_path):
    content, message = BAD_GGUF[case]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(PretrainedError, match=rf"m.gguf.*{message}"):
        read_gguf(tmp_path / "m.gguf")


def test_header_limit(tmp_path, monkeypatch):
    """A header ends somewhere, however long the file is."""
    monkeypatch.setattr("spire_jax.pretrained.gguf_file.MAX_HEADER", 64)
    (tmp_path / "m.gguf").write_bytes(gguf_bytes([("a", array(8, 99, text("") * 99))]))
    with pytest.raises(PretrainedError, match="the header's limit of 64 bytes"):
        read_gguf(tmp_path / "m.gguf")


def test_shrunk_gguf(tmp_path):
    """A file that is cut after it was opened is refused, not read beyond its end."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(tensors=[("t", (8,), F32, 0)], data=bytes(32)))
    file = read_gguf(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(PretrainedError, match="has become shorter"):
        file.read("t")


# --- safetensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_safetensors_parts(dtype, tmp_path):
    values = np.random.default_rng(0).normal(size=(7, 9)).astype(dtype)
    save_file({"t": values, "u": values[0].copy()}, tmp_path / "m.safetensors")
    files = read_safetensors(tmp_path / "m.safetensors")
    assert files.tensors["t"].shape == (7, 9) and files.raw("t").dtype == dtype
    np.testing.assert_array_equal(files.read("t"), values.astype(np.float32))
    part = files.read("t", slice(2, 5), slice(3, 8))
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, values[2:5, 3:8].astype(np.float32))
    np.testing.assert_array_equal(files.read("u", columns=slice(1, 3)), values[0, 1:3])


def header(tensors: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    content = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def at(begin: int, end: int, *shape: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWICE = json.dumps({"t": at(0, 8, 2)})[:-1] + ", " + json.dumps({"t": at(8, 16, 2)})[1:]
BAD_SAFETENSORS = {
    "empty": b"",
    "short": b"\1\0",
    "length": header({"t": at(0, 16, 4)}, length=2**62),
    "past the end": header({"t": at(0, 16, 4)}, length=200),
    "no JSON": header(b"{'t': 1}"),
    "no object": header([1, 2]),
    "deep": header(b'{"t":' + b"[" * 100_000),
    "not UTF-8": header(b'{"\xff": 1}'),
    "dtype": header({"t": at(0, 16, 4, dtype="F33")}),
    "shape": header({"t": at(0, 16, 5)}),
    "negative": header({"t": at(0, 16, -4)}),
    "huge": header({"t": at(0, 16, 2**40, 2**40)}),
    "beyond": header({"t": at(0, 32, 8)}),
    "backwards": header({"t": at(16, 0, 4)}),
    "hole": header({"t": at(8, 16, 2)}),
    "overlap": header({"t": at(0, 12, 3), "u": at(8, 16, 2)}),
    "twice": header(TWICE.encode()),
    "rest": header({"t": at(0, 8, 2)}),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_bad_safetensors(case, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(BAD_SAFETENSORS[case])
    with pytest.raises(PretrainedError, match=r"m.safetensors is no whole safetensors file"):
        read_safetensors(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").write_bytes(header({"t": at(0, 16, 4)}))
    assert read_safetensors(tmp_path / "m.safetensors").tensors["t"].shape == (4,)


def test_quantized_safetensors(tmp_path):
    save_file({"t": np.ones((2, 2), np.int8)}, tmp_path / "m.safetensors")
    with pytest.raises(PretrainedError, match=r"'t' is of type I8; weights of F32, F16, BF16 are"):
        read_safetensors(tmp_path / "m.safetensors").read("t")


# --- directories ---------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def sharded(folder: pathlib.Path, **changes: str | None) -> pathlib.Path:
    """A directory of two shards whose index says something else of some tensors."""
    write_safetensors(folder, *tiny("llama"), shards=2)
    index = json.loads((folder / INDEX).read_text())
    for name, file in changes.items():
        del index["weight_map"][name]
        if file is not None:
            index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))
    return folder


NORM, SECOND = "model.norm.weight", "model-00002-of-00002.safetensors"
BAD_INDEX: dict[str, tuple[dict[str, str | None], str]] = {
    "path": ({NORM: "../other.safetensors"}, "'../other.safetensors' is no plain file name"),
    "absolute": ({NORM: "/etc/passwd"}, "'/etc/passwd' is no plain file name"),
    "parent": ({NORM: ".."}, "'..' is no plain file name"),
    "long": ({NORM: "é" * 128}, "éé.* is no plain file name; shards lie beside the index"),
    "absent": ({NORM: "model-3.safetensors"}, "model-3.safetensors does not exist"),
    "elsewhere": ({NORM: SECOND}, rf"puts '{NORM}' into .*2.safetensors, and it is in .*1-of"),
    "not listed": ({NORM: None}, f"puts '{NORM}' into no file"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_bad_index(case, tmp_path):
    changes, message = BAD_INDEX[case]
    with pytest.raises(PretrainedError, match=message):
        read_directory(sharded(tmp_path, **changes))


def test_bad_directories(tmp_path):
    for content, message in (
        ("{", "is not JSON"), ("[]", "holds list"), ("{}", "weight_map must give a file"),
        ('{"weight_map": {"a": 1}}', "weight_map must give"), ("[" * 10**5, "is not JSON"),
    ):  # fmt: skip
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(PretrainedError, match=message):
            read_directory(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(PretrainedError, match=r"there is neither; .* convert to safetensors"):
        read_directory(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(PretrainedError, match=r"only pytorch_model.bin, a pickle, .* convert to"):
        read_directory(tmp_path)
    with pytest.raises(PretrainedError, match=r"x.json does not exist"):
        read_json(tmp_path / "x.json")


def test_same_name_in_two_files(tmp_path):
    for name in ("a", "b"):
        save_file({"t": np.ones(2, np.float32)}, tmp_path / name)
    with pytest.raises(PretrainedError, match="both hold 't'"):
        read_safetensors(tmp_path / "a", tmp_path / "b")

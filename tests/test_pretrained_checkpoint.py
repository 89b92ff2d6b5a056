"""Checkpoints of every family: what they compute, how they are read, what is refused.

A mesh of eight devices needs a process of its own, which this file is run as
(`python tests/test_pretrained_checkpoint.py RESULTS DIRECTORY`).
"""

import dataclasses
import json
import pathlib
import sys
import tracemalloc

import devices
import jax
import numpy as np
import pytest

if __name__ == "__main__":
    import conftest  # noqa: F401  (shapes are checked in this process too)

from pretrained_models import FAMILIES, logits, tiny, write_gguf, write_safetensors

from spire_jax.config.schema import MeshConfig
from spire_jax.drafting.spire import SpireDraft
from spire_jax.models.attention import Compute
from spire_jax.models.sharding import make_mesh, shardings
from spire_jax.models.transformer import Model, Transformer
from spire_jax.pretrained import PretrainedError, checkpoint, tensor_names
from spire_jax.pretrained.checkpoint import open_checkpoint
from spire_jax.pretrained.safetensors_file import SafetensorsFiles

MESHES = {"whole": MeshConfig(8, 1, 1), "cut": MeshConfig(data=2, fsdp=2, tensor=2)}


def model_of(opened: checkpoint.Checkpoint, dtype: str = "float32") -> Model:
    return Model(Transformer, opened.model, Compute(dtype=dtype))


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


class Reads:
    """Counts the values that files give out."""

    def __init__(self, monkeypatch_setattr):
        self.values, self.largest, read = 0, 0, SafetensorsFiles.read

        def counted(files, *args, **kwargs):
            out = read(files, *args, **kwargs)
            self.values += out.size
            self.largest = max(self.largest, out.size)
            return out

        monkeypatch_setattr(SafetensorsFiles, "read", counted)


# --- in the process of eight devices -------------------------------------------------------------


def on_meshes(directory: str) -> dict[str, dict]:
    opened = open_checkpoint(directory)
    model = model_of(opened)
    whole = opened.load(model, None)
    out = {}
    for name, sizes in MESHES.items():
        mesh, reads = make_mesh(sizes), Reads(setattr)
        params = opened.load(model, mesh)
        assert_equal(params, whole)
        expected = shardings(mesh, model.axes())
        same = jax.tree.map(lambda x, s: x.sharding == s, params, expected)
        shard = params["blocks"][0]["gate"].addressable_shards[0].data
        out[name] = {"values": reads.values, "as_stated": all(jax.tree.leaves(same)),
                     "gate": list(shard.shape)}  # fmt: skip
    return out


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_text(json.dumps(on_meshes(sys.argv[2])))
    sys.exit()


def test_meshes(tmp_path):
    """Shards equal the whole, lie where the model wants them, and each value is read once."""
    config, tensors = tiny("llama")
    folder = write_safetensors(tmp_path / "model", config, tensors)
    found = devices.found_by(__file__, 8, tmp_path, folder)
    values = sum(tensor.size for tensor in tensors.values())
    assert found["whole"] == {"values": values, "as_stated": True, "gate": [64, 96]}
    assert found["cut"] == {"values": values, "as_stated": True, "gate": [32, 48]}


# --- what they compute ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family, tmp_path):
    """Logits as the definition's, beyond the window and the original length of scaled positions;
    both formats, and shards, hold the same model and the same parameters."""
    config, tensors = tiny(family)
    opened = open_checkpoint(write_safetensors(tmp_path / "hf", config, tensors, shards=3))
    model = model_of(opened)
    assert (opened.format, opened.architecture) == ("safetensors", config["model_type"])
    assert (opened.model.n_tokens, opened.model.vocab_size, opened.model.max_len) == (53, 56, 128)
    params = opened.load(model, None)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.shapes()
    )
    tokens = np.random.default_rng(1).integers(0, 53, 100).astype(np.int32)
    found = np.asarray(jax.jit(lambda p, x: model.bind(p).forward(x)[0])(params, tokens[None]))
    expected = logits(config, tensors, tokens)
    assert np.abs(found[0, :, :53] - expected).max() < 5e-6 * np.abs(expected).max()
    assert (found[0, :, 53:] == -np.inf).all()

    gguf = open_checkpoint(write_gguf(tmp_path / "model.gguf", config, tensors))
    assert gguf.model == opened.model
    assert_equal(gguf.load(model, None), params)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_narrow(stored, tmp_path):
    """bfloat16 is what Model.cast makes of the float32 parameters, however they are stored."""
    config, tensors = tiny("qwen2")
    opened = open_checkpoint(write_safetensors(tmp_path, config, tensors, dtype=stored))
    model = model_of(opened, "bfloat16")
    assert_equal(opened.load(model, None, "bfloat16"), model.cast(opened.load(model, None)))


def test_more_padding(tmp_path):
    """A vocabulary may be padded further, as a mesh can ask for; the padding is zeros."""
    config, tensors = tiny("llama")
    opened = open_checkpoint(write_safetensors(tmp_path, config, tensors))
    wider = dataclasses.replace(opened.model, vocab_size=64, max_len=0)
    params = opened.load(Model(Transformer, wider, Compute()), None)
    np.testing.assert_array_equal(params["embedding"][:53], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["unembedding"][:, :53].T, tensors["lm_head.weight"])
    assert not params["embedding"][53:].any() and not params["unembedding"][:, 53:].any()


@pytest.mark.parametrize("gguf", [False, True])
@pytest.mark.parametrize("chunk", [100, 1 << 22])
def test_parts(gguf, chunk, tmp_path, monkeypatch):
    """A part of a parameter is that part of the whole, and no more is read for it."""
    monkeypatch.setattr(tensor_names, "CHUNK", chunk)
    config, tensors = tiny("llama")
    path = tmp_path / "m.gguf"
    path = write_gguf(path, config, tensors) if gguf else write_safetensors(
        tmp_path / "m", config, tensors)  # fmt: skip
    opened = open_checkpoint(path)
    whole = opened.load(model_of(opened), None)
    cut, rest = slice(1, 2), slice(None)
    middle = slice(13, 47)
    for name, index in {
        "query": (middle, cut, rest, rest), "key": (middle, cut, rest),
        "out": (cut, rest, rest, middle), "gate": (middle, slice(30, 61)),
        "down": (slice(30, 61), middle),
    }.items():  # fmt: skip
        read = []
        source = opened.sources["blocks", 1, name]
        part = tensor_names.read_part(Counted(opened.weights, read), source, index, "float32")
        np.testing.assert_array_equal(part, whole["blocks"][1][name][index])
        assert sum(read) == part.size
    with pytest.raises(ValueError, match="cut along the first only"):
        source = opened.sources["blocks", 1, "query"]
        tensor_names.read_part(opened.weights, source, (rest, rest, cut, rest), "float32")


@dataclasses.dataclass
class Counted:
    weights: tensor_names.Weights
    read_values: list[int]

    def read(self, name, rows=slice(None), columns=slice(None)):
        values = self.weights.read(name, rows, columns)
        self.read_values.append(values.size)
        return values


@pytest.mark.parametrize("gguf", [False, True])
def test_memory(gguf, tmp_path, monkeypatch):
    """Beside the finished parameters the host holds about one of them, not the file."""
    monkeypatch.setattr(tensor_names, "CHUNK", 1 << 14)
    config, tensors = tiny("mistral", hidden_size=256, intermediate_size=512,
                           num_hidden_layers=16)  # fmt: skip
    path = tmp_path / "m.gguf"
    path = write_gguf(path, config, tensors, "Q8_0") if gguf else write_safetensors(
        tmp_path / "m", config, tensors, dtype="bfloat16")  # fmt: skip
    largest = max(tensor.nbytes for tensor in tensors.values())
    all_bytes = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    opened = open_checkpoint(path)
    model = model_of(opened)
    model.axes()
    opened.load(model, None)  # what jax and the readers keep for good
    tracemalloc.start()
    try:
        params = opened.load(model, None)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(x.nbytes for x in jax.tree.leaves(params)) > 0.9 * all_bytes
    assert all_bytes > 40 * largest
    assert peak - held < 3 * largest


# --- identity ------------------------------------------------------------------------------------


def test_hash(tmp_path, monkeypatch):
    """Of the function, not of names and notes; kept until a file changes."""
    config, tensors = tiny("llama3")
    here = write_safetensors(tmp_path / "here", config, tensors, shards=2)
    there = write_safetensors(tmp_path / "there", config, tensors, shards=2)
    index = there / "model.safetensors.index.json"
    names = {"00001-of": "x-of", "00002-of": "a-of"}
    text = index.read_text()
    for old, new in names.items():
        text = text.replace(old, new)
        (there / f"model-{old}-00002.safetensors").rename(there / f"model-{new}-00002.safetensors")
    index.write_text(text)
    same = open_checkpoint(here).sha256
    assert open_checkpoint(there).sha256 == same
    write_safetensors(tmp_path / "whole", config, tensors)
    for notes in ({"transformers_version": "9.0"}, {"max_position_embeddings": 64}):
        (there / "config.json").write_text(json.dumps({**config, **notes}))
        assert open_checkpoint(there).sha256 == open_checkpoint(tmp_path / "whole").sha256 == same
    write_safetensors(there, config, tensors, dtype="float16")
    assert open_checkpoint(there).sha256 != same

    cache = tmp_path / "cache"
    first = open_checkpoint(here).cached_sha256(cache)
    assert first == open_checkpoint(here).sha256
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsFiles, "stored", None)
        assert open_checkpoint(here).cached_sha256(cache) == first
    nowhere = here / "config.json" / "cache"
    assert open_checkpoint(here).cached_sha256(nowhere) == first
    kept = json.loads(next(cache.iterdir()).read_text())
    of_files = json.dumps({"files": kept["files"], "sha256": "of the files"})  # once kept so
    for damaged in ("{", "[]", "{}", of_files):
        next(cache.iterdir()).write_text(damaged)
        assert open_checkpoint(here).cached_sha256(cache) == first
    tensors["model.norm.weight"][3] += 1
    write_safetensors(here, config, tensors, shards=2)
    other = open_checkpoint(here).cached_sha256(cache)
    assert other != first and other == open_checkpoint(here).sha256
    (here / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    assert open_checkpoint(here).cached_sha256(cache) not in (first, other)

    first = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors)).sha256
    named = write_gguf(tmp_path / "named.gguf", config, tensors, more=lambda w: w.add_name("x"))
    assert open_checkpoint(named).sha256 == first
    tensors["model.norm.weight"][3] += 1
    assert open_checkpoint(write_gguf(named, config, tensors)).sha256 != first


def test_a_cache_of_links(tmp_path):
    """Hugging Face's: snapshots are links to blobs, which have no suffix."""
    config, tensors = tiny("llama")
    plain = open_checkpoint(write_safetensors(tmp_path / "plain", config, tensors))
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/abc"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(plain.files):
        (blobs / f"{i}f").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{i}f")
    opened = open_checkpoint(snapshot)
    assert opened.model == plain.model and opened.sha256 == plain.sha256
    with pytest.raises(PretrainedError, match=r"no config.json; give the folder .*snapshots/abc"):
        open_checkpoint(tmp_path / "models--x")
    with pytest.raises(PretrainedError, match=r"1f is no GGUF file: .* give the directory, with c"):
        open_checkpoint(blobs / "1f")
    (blobs / "1f").unlink()
    with pytest.raises(PretrainedError, match=r"snapshots/abc/model.safetensors does not exist"):
        open_checkpoint(snapshot)


def test_names_of_weights(tmp_path):
    config, tensors = tiny("llama")
    plain = open_checkpoint(write_safetensors(tmp_path, config, tensors))
    before = plain.sha256
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert open_checkpoint(tmp_path).sha256 == before
    write_gguf(tmp_path / "x" / "blob", config, tensors)
    assert open_checkpoint(tmp_path / "x" / "blob").model == plain.model
    (tmp_path / "weights.safetensors").unlink()
    write_gguf(tmp_path / "m.gguf", config, tensors)
    with pytest.raises(PretrainedError, match=r"no safetensors; give the file m.gguf itself"):
        open_checkpoint(tmp_path)


# --- what is refused -----------------------------------------------------------------------------


def without(name):
    return lambda config, tensors: tensors.pop(name)


def with_tensor(name, *shape):
    return lambda config, tensors: tensors.update({name: np.zeros(shape, np.float32)})


def with_value(**values):
    return lambda config, tensors: config.update(values)


LAYER = "model.layers.1."
WRONG = {
    "missing": (without(f"{LAYER}mlp.up_proj.weight"),
                "missing: model.layers.1.mlp.up_proj.weight;"),
    "a bias": (with_tensor(f"{LAYER}self_attn.q_proj.bias", 64),
               "unexpected: model.layers.1.self_attn.q_proj.bias;"),
    "a shape": (with_tensor(f"{LAYER}mlp.up_proj.weight", 96, 32),
                r"shape: model.layers.1.mlp.up_proj.weight \(96, 32\) instead of \(96, 64\)"),
    "more layers": (with_value(num_hidden_layers=3),
                    r"missing: model.layers.2.input_layernorm.weight, .* and 4 more;"),
    "fewer layers": (with_value(num_hidden_layers=1),
                     r"unexpected: model.layers.1.input_layernorm.weight, .* and 4 more;"),
    "absurd layers": (with_value(num_hidden_layers=10**6), "says 1000000 layers"),
    "vocabulary": (with_value(vocab_size=54), r"\(53, 64\) instead of \(54, 64\)"),
    "untied": (with_value(tie_word_embeddings=True), "lm_head.weight differs from model.embed"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors(case, tmp_path):
    config, tensors = tiny("llama")
    change, message = WRONG[case]
    change(config, tensors)
    write_safetensors(tmp_path, config, tensors)
    with pytest.raises(PretrainedError, match=message):
        opened = open_checkpoint(tmp_path)
        opened.load(model_of(opened), None)


def test_harmless_tensors(tmp_path):
    """Frequencies of rotary positions, and a tied unembedding that equals the embedding."""
    config, tensors = tiny("llama3")
    plain = open_checkpoint(write_safetensors(tmp_path / "plain", config, tensors))
    more = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
                      f"{LAYER}self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}  # fmt: skip
    opened = open_checkpoint(write_safetensors(tmp_path / "more", config, more))
    assert_equal(opened.load(model_of(opened), None), plain.load(model_of(plain), None))


def test_wrong_gguf_tensors(tmp_path):
    config, tensors = tiny("qwen2")
    del tensors[f"{LAYER}self_attn.k_proj.bias"]
    path = write_gguf(tmp_path / "m.gguf", config, tensors)
    with pytest.raises(PretrainedError, match=r"m.gguf: .* missing: blk.1.attn_k.bias;"):
        open_checkpoint(path)
    tensors = {n: t for n, t in tensors.items() if "embed_tokens" not in n}
    path = write_gguf(tmp_path / "n.gguf", config, tensors)
    with pytest.raises(PretrainedError, match=r"'token_embd.weight' is missing"):
        open_checkpoint(path)


def test_wrong_model(tmp_path):
    """Parameters are not given to a model that computes something else with them."""
    opened = open_checkpoint(write_safetensors(tmp_path, *tiny("llama")))
    for change, message in (
        (dict(n_layers=1), r"n_layers=1 \(here 2\)"), (dict(window=7), r"window=7 \(here 0\)"),
        (dict(scale_in_init=True), "scale_in_init=True"), (dict(vocab_size=48), "here 53 tokens"),
    ):  # fmt: skip
        config = dataclasses.replace(opened.model, **change)
        with pytest.raises(PretrainedError, match=message):
            opened.load(Model(Transformer, config, Compute()), None)
    with pytest.raises(PretrainedError, match="not a SpireDraft"):
        opened.load(Model(SpireDraft, opened.model, Compute()), None)
    with pytest.raises(ValueError, match="dtype='float64'; choose from"):
        opened.load(model_of(opened), None, "float64")


def test_nothing_there(tmp_path):
    with pytest.raises(PretrainedError, match=r"does not exist; give a .gguf file or a directory"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(PretrainedError, match=r"no config.json; fetch"):
        open_checkpoint(tmp_path)
    write_gguf(tmp_path / "m.gguf", *tiny("llama"))
    with pytest.raises(PretrainedError, match=r"no config.json; give the file m.gguf itself"):
        open_checkpoint(tmp_path)

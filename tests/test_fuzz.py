"""Files and lines of any content: success or a named error, in bounded time and memory.

Each property mutates what is valid: bytes at random places, values of JSON at random paths, pieces
of a template. 50 cases of each in the fast tier, always the same; 1,000 others with --full.
"""

import dataclasses
import itertools
import json
import pathlib
import re
import struct

import hypothesis
import numpy as np
import pretrained_models
import pytest
from hypothesis import strategies as st
from models import TINY
from mutations import (
    JSON,
    LEAVES,
    bounded,
    changed,
    dumped,
    edited,
    mutated,
    named,
    noise,
    places,
    replaced,
)
from pretrained_tokenizers import (
    ROWS,
    SPM,
    TEMPLATE,
    TEXTS,
    metadata,
    spm,
    trained,
    write_directory,
)
from token_arrays import ids, opened, store_array

from spire_jax.config import files
from spire_jax.config.checks import ConfigError
from spire_jax.config.validation import tokenizer_size
from spire_jax.data.corpus import DataError
from spire_jax.data.tokenizer import BpeTokenizer, ByteTokenizer, train_bpe
from spire_jax.drafting.spire import SpireOptions
from spire_jax.models.attention import Compute
from spire_jax.models.transformer import Model, Transformer
from spire_jax.pretrained import PretrainedError, chat
from spire_jax.pretrained.checkpoint import open_checkpoint
from spire_jax.pretrained.exported_draft import export_draft, import_draft
from spire_jax.pretrained.gguf_file import read_gguf
from spire_jax.pretrained.tokenizer import load_tokenizer
from spire_jax.serving.outputs import open_results
from spire_jax.serving.prompts import PROMPTS, RequestError
from spire_jax.serving.records import Failure
from spire_jax.serving.requests import Defaults, read_requests

# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face directory of two shards, tokenizer and all."""
    path = tmp_path_factory.mktemp("folder")
    config, tensors = pretrained_models.tiny("llama3", num_hidden_layers=1, vocab_size=ROWS)
    pretrained_models.write_safetensors(path, config, tensors, shards=2)
    return write_directory(path)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def gguf_file(request, tmp_path_factory):
    """The file, of a byte-level or a SentencePiece vocabulary, and its rows."""
    given, rows = (metadata(trained()), ROWS) if request.param == "gpt2" else (spm(), len(SPM))
    config, tensors = pretrained_models.tiny("llama3", num_hidden_layers=1, vocab_size=rows)

    def tokenizer(writer):
        for key, value in (given | {"tokenizer.chat_template": TEMPLATE}).items():
            if isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value if isinstance(value, list) else value.tolist())

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return pretrained_models.write_gguf(path, config, tensors, "Q8_0", tokenizer), rows


def use_weights(path: pathlib.Path) -> None:
    with named(PretrainedError, of=path, mib=64):
        found = open_checkpoint(path)
        params = found.load(Model(Transformer, found.model, Compute()), None)
        assert params["embedding"].shape == (found.model.vocab_size, found.model.d_model)


def use_tokenizer(path: pathlib.Path, rows: int) -> None:
    tokenizer = None
    with named(PretrainedError, of=path):
        tokenizer = load_tokenizer(path, rows)
    if tokenizer:
        with named(PretrainedError):
            assert isinstance(tokenizer.decode(tokenizer.encode("def f(x):\n")), str)
            assert (tokenizer.chat([{"role": "user", "content": "<|bot|>x"}]) < rows).all()


@hypothesis.given(st.data())
def test_gguf(gguf_file, data):
    path, rows = gguf_file
    begin = min(info.begin for info in read_gguf(path).tensors.values())
    with replaced(path, data.draw(noise(path.read_bytes(), begin))):
        use_weights(path)
        use_tokenizer(path, rows)


@hypothesis.given(st.data())
def test_safetensors(folder, data):
    weights = folder / "model-00001-of-00002.safetensors"
    content = weights.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    what = data.draw(st.sampled_from(["bytes", "header", "index"]))
    if what == "index":
        other = mutated(folder / "model.safetensors.index.json", data)
    elif what == "bytes":
        other = replaced(weights, data.draw(noise(content, 8 + size)))
    else:
        header = data.draw(changed(json.loads(content[8 : 8 + size])))
        other = replaced(weights, struct.pack("<Q", len(header)) + header + content[8 + size :])
    with other:
        use_weights(folder)


@hypothesis.given(st.data())
def test_config_json(folder, data):
    with mutated(folder / "config.json", data):
        use_weights(folder)


@hypothesis.given(st.data())
def test_tokenizer_files(folder, data):
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    with mutated(folder / data.draw(st.sampled_from([names[0], *names])), data):
        use_tokenizer(folder, ROWS)


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    train_bpe(TEXTS, 301).save(str(path))
    return path


@hypothesis.given(st.data())
def test_tokenizer_of_data(bpe_file, data):
    with mutated(bpe_file, data), named(ConfigError, of=bpe_file):
        assert type(tokenizer_size(str(bpe_file))) is int
        tokenizer = BpeTokenizer(bpe_file)
        assert isinstance(tokenizer.decode(tokenizer.encode("def f(x):\n")), str)


DRAFT = {"blocks": {0: {"query": np.ones((4, 2), np.float32)}}, "mix": np.ones(())}


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    target = dataclasses.replace(TINY, rope_base=500000.0)
    where = tmp_path_factory.mktemp("draft") / "draft"
    return export_draft(where, DRAFT, SpireOptions(n_layers=1, window=6), target, "a" * 64,
                        {"text": "a folder", "steps": 12})  # fmt: skip


@hypothesis.given(st.data())
def test_exported_drafts(draft, data):
    with mutated(draft / "config.json", data), named(PretrainedError, of=draft):
        assert import_draft(draft, "a" * 64).load(DRAFT)["blocks"][0]["query"].shape == (4, 2)


TEMPLATES = """
{% for m in messages %} {% endfor %} {{ m.content }} {{ m['role']|trim }} {% if loop.first %}
{% endif %} {{ raise_exception('no') }} {{ 2**999999 }} {% set x = messages[0] %} {{ x|tojson }}
{% macro a(b) %}{{ a(b) }}{% endmacro %} {{ a(1) }} {% for i in range(10**9) %}x{% endfor %}
{{ 'a'*10**10 }} {{ messages.__class__.__mro__ }} {{ cycler.__init__.__globals__ }}
{% include 'x' %} {{ messages[1:]|map(attribute='content')|join('-') }} {{ strftime_now('%Y') }}
{%- for k, v in messages[0].items() -%} {{ m.content.encode('utf-7') }} {{ }} {# #} {% raw %}
{{ '%1000000000d' % 1 }} {{ namespace(a=1).a }}
"""
PIECES = [*re.findall(r"\{.*?[%}#]\}(?=\s)|\S+", TEMPLATES), "\0"]


@pytest.fixture(scope="module")
def soon():
    """Templates are stopped after half a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "SECONDS", 0.5)
        yield


@hypothesis.given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=9),
                  st.booleans(), JSON)  # fmt: skip
def test_chat_templates(soon, pieces, whole, messages):
    """A template that does not end is stopped; one that would fill the memory is, too."""
    template = TEMPLATE + "".join(pieces) if whole else "".join(pieces)
    given = messages if isinstance(messages, list) else [{"role": "user", "content": messages}]
    with named(PretrainedError, of="chat template"):
        assert isinstance(chat.render(template, given), str)


# --- prompts, arrays, configs --------------------------------------------------------------------

LINE = {"prompt": "a", "tokens": [1], "messages": [{"role": "user", "content": "hi"}],
        "turns": ["a", "b"], "id": 3, "question_id": "q", "category": "c", "max_tokens": 3,
        "seed": 1, "stop": ["x"], "reference": ["y"]}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(folder):
    return ByteTokenizer(), load_tokenizer(folder, ROWS)


@hypothesis.given(st.data())
def test_prompt_lines(tokenizers, data):
    kept = data.draw(st.sets(st.sampled_from(sorted(LINE)), min_size=1))
    content = data.draw(changed({key: value for key, value in LINE.items() if key in kept}))
    form = data.draw(st.sampled_from(["jsonl", "jsonl", "jsonl", "lines", "text"]))
    tokenizer = data.draw(st.sampled_from(tokenizers))
    with bounded():
        for found in read_requests([content], form, tokenizer, Defaults()):
            assert len(json.dumps(found.record() if isinstance(found, Failure) else 0)) < 10_000
            if not isinstance(found, Failure):
                assert found.tokens.dtype == np.int32 and len(found.tokens)
                assert 0 <= found.tokens.min() <= found.tokens.max() < tokenizer.n_tokens


@hypothesis.given(st.data())
def test_resumed_outputs(tmp_path_factory, data):
    """What --resume goes on with may be any file that --out names."""
    line = {"id": 3, "line": 1, "text": "a", "asked": "b" * 16, "made_by": {"k": {"of": 1}}}
    place = tmp_path_factory.mktemp("resumed") / "out.jsonl"
    content = data.draw(changed(line))
    place.write_bytes(dumped(line) + b"\n" + content + data.draw(st.sampled_from([b"", b"\n"])))
    (request,) = read_requests([b'{"tokens": [1], "id": 3}'], "jsonl", ByteTokenizer(), Defaults())
    with named(RequestError):
        with open_results(str(place), resume=True) as results:
            results.made_by(line["made_by"])
            list(results.left([dataclasses.replace(request, asked="b" * 16)]))


@pytest.fixture(scope="module", params=[2, 3])
def arrays(request, tmp_path_factory):
    """The files of a folder of zarr that describe its arrays: ids, lengths, and who wrote them."""
    folder, version = tmp_path_factory.mktemp("zarr"), request.param
    store_array(folder / "train.zarr", ids(20, 16), (4, 8), version)
    store_array(folder / "train.lengths.zarr", np.full(20, 16, np.uint32), (20,), version)
    about = {"train.zarr": {"rows": 20, "sha256": "c" * 64}}
    manifest = {"tokenizer": ByteTokenizer().name, "row_tokens": 16, "arrays": about}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    name = "zarr.json" if version == 3 else ".zarray"
    return [folder / "train.zarr" / name, folder / "train.lengths.zarr" / name,
            folder / "manifest.json"]  # fmt: skip


@hypothesis.given(st.data())
def test_zarr_metadata(arrays, data):
    path = data.draw(st.sampled_from([arrays[0], *arrays]))
    fill = data.draw(st.sampled_from(["error", "fill"]))
    with mutated(path, data), named(DataError, of=arrays[2].parent):
        corpus = opened(arrays[2].parent, missing_chunks=fill)
        for document in itertools.islice(corpus.documents, 30):
            corpus.tokens[document.begin : min(document.end, document.begin + 999)]


QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
VALUES = {
    "target": {"n_layers": 2, "d_model": 32, "n_kv_heads": 2, "q_per_kv": 2, "d_head": 8,
               "d_ff": 48, "max_len": 2000, "rope_base": 1e4, "tied": False},
    "drafts": {"spire": {"kind": "spire", "n_layers": 1, "window": 16, "omega": 0.5},
               "vanilla": {"kind": "vanilla", "n_layers": 1, "loss": "hard", "steps": 3},
               "magicdec": {"kind": "magicdec", "window": 16},
               "snapkv": {"kind": "snapkv", "budget": 40, "observed": 8}},
    "data": {"source": "stdlib", "tokenizer": "bytes", "heldout_percent": 10},
    "train": {"seq_len": 64, "batch_size": 4, "k": 4, "peak_lr": 1e-3, "dtype": "float32"},
    "decode": {"k": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "depths": [1, 2]},
    "eval": {"context_lengths": [64, 128], "output_length": 16, "batch_size": 4},
    "throughput": {"chip": "h100", "tau": {"spire": 3.0}, "batch_sizes": [1, 2]},
    "study": {"of": "spire", "ablations": "no_feedback", "trained_k": [8]},
    "continuations": {"rows": 2, "prompt": 8, "share": 0.5},
    "mesh": {"data": -1, "fsdp": 1}, "seed": 0, "plugins": [],
}  # fmt: skip


@hypothesis.given(st.data())
def test_configs(data):
    """Of a file, and of the command line, whose values are text."""
    with named(ConfigError):
        if data.draw(st.booleans()):
            values = data.draw(edited(VALUES))
            files.build(values)
        else:
            keys = [".".join(map(str, path)) for path in places(VALUES)]
            made = [f"{data.draw(st.sampled_from(keys) | st.text(max_size=9))}={data.draw(LEAVES)}"
                    for _ in range(data.draw(st.integers(1, 3)))]  # fmt: skip
            files.load(QUICKSTART, made)


def test_what_is_mutated_is_valid(folder, gguf_file, draft, bpe_file, arrays):
    """Or else every property would hold of a first error."""
    for path, rows in ((folder, ROWS), gguf_file):
        assert open_checkpoint(path).model.n_tokens == rows == load_tokenizer(path, rows).n_tokens
    assert import_draft(draft, "a" * 64).load(DRAFT)["mix"] == 1
    assert tokenizer_size(str(bpe_file)) == 301
    assert len(opened(arrays[2].parent).documents) == 20
    assert files.build(VALUES).seed == 0
    for kind in PROMPTS:
        line = {key: value for key, value in LINE.items() if key == kind or key not in PROMPTS}
        (found,) = read_requests([dumped(line)], "jsonl", load_tokenizer(folder, ROWS), Defaults())
        assert found.id == 3

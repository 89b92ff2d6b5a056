"""Files and lines of any content: success or a named error, in bounded time and memory.

Each property mutates what is valid: bytes at random places, values of JSON at random paths, pieces
of a template. 50 cases of each in the fast tier, always the same; 1,000 others with --full.
"""

import contextlib
import copy
import itertools
import json
import pathlib
import re
import struct
import time
import tracemalloc

import hypothesis
import numpy as np
import pretrained_models
import pytest
from hypothesis import strategies as st
from pretrained_tokenizers import ROWS, TEMPLATE, metadata, trained, write_directory
from token_arrays import ids, opened, store_array

from spire_jax.config import files
from spire_jax.config.checks import ConfigError
from spire_jax.data.corpus import DataError
from spire_jax.data.tokenizer import ByteTokenizer
from spire_jax.models.attention import Compute
from spire_jax.models.transformer import Model, Transformer
from spire_jax.pretrained import PretrainedError, chat
from spire_jax.pretrained.checkpoint import open_checkpoint
from spire_jax.pretrained.gguf_file import read_gguf
from spire_jax.pretrained.tokenizer import load_tokenizer
from spire_jax.serving.records import Failure
from spire_jax.serving.requests import Defaults, read_requests

SECONDS, MIB = 20, 2**20


@pytest.fixture(scope="module", autouse=True)
def traced():
    """Memory is counted; hypothesis' own too, which is why what counts is the peak of a case."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


@contextlib.contextmanager
def bounded(size: int = 0):
    """Whatever an input of so many bytes holds, it takes no more time and memory than this."""
    begin, before = time.perf_counter(), tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    yield
    assert time.perf_counter() - begin < SECONDS
    assert tracemalloc.get_traced_memory()[1] - before < 32 * size + 64 * MIB


@contextlib.contextmanager
def named(*kinds: type[Exception], of: object = ""):
    """Nothing but these errors, each a line that says something, about `of`."""
    try:
        yield
    except kinds as error:
        assert "\n" not in str(error).strip() and len(str(error)) > 20, error
        assert str(of) in str(error), error


# --- what is done to valid content ---------------------------------------------------------------

EXTREMES = [0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**64 - 1]
NUMBERS = st.one_of(
    st.sampled_from([*EXTREMES, *(-x for x in EXTREMES), 10**400]), st.integers(-9, 9), st.floats()
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=9))
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
) | st.just(json.loads("[" * 60 + "]" * 60))  # fmt: skip


@st.composite
def noise(draw, content: bytes, end: int | None = None) -> bytes:
    """Bytes changed, put in, taken out, and the rest cut off, before `end`."""
    out, end = bytearray(content), end or len(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(end, len(out))))
        what = draw(st.sampled_from(["byte", "number", "insert", "remove", "cut"]))
        if what == "byte":
            out[at : at + 1] = bytes([draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x7D]))])
        elif what == "number":
            kind = draw(st.sampled_from(["<I", "<Q", "<d"]))
            value = draw(st.sampled_from(EXTREMES)) % 2 ** (8 * struct.calcsize(kind))
            packed = struct.pack(kind, float(value) if kind == "<d" else value)
            out[at : at + len(packed)] = packed
        elif what == "insert":
            out[at:at] = draw(st.binary(max_size=9))
        elif what == "remove":
            del out[at : at + draw(st.integers(1, 30))]
        elif draw(st.integers(0, 3)) == 0:
            del out[at:]
    return bytes(out)


def places(value, path=()):
    """Every path into nested lists and objects."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else ()  # fmt: skip
    for key, item in itertools.islice(inner, 40):  # of a vocabulary some are as good as all
        yield from places(item, (*path, key))


@st.composite
def edited(draw, value):
    """Nested JSON with one to three values replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return copy.deepcopy(draw(JSON))
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "rename", "double"]))
        old = parent[path[-1]]
        if what == "replace":
            near = [-old, old + 1, old * 1000, str(old)] if type(old) is int else [[old], {"": old}]
            parent[path[-1]] = copy.deepcopy(draw(st.sampled_from(near) | JSON))
        elif what == "remove":
            del parent[path[-1]]
        elif what == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=9))] = parent.pop(path[-1])
        elif isinstance(parent, list):
            parent.append(old)
    return value


def dumped(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face directory, tokenizer and all."""
    path = tmp_path_factory.mktemp("folder")
    config, tensors = pretrained_models.tiny("llama3", num_hidden_layers=1, vocab_size=ROWS)
    pretrained_models.write_safetensors(path, config, tensors)
    return write_directory(path)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    config, tensors = pretrained_models.tiny("llama3", num_hidden_layers=1, vocab_size=ROWS)

    def tokenizer(writer):
        for key, value in (metadata(trained()) | {"tokenizer.chat_template": TEMPLATE}).items():
            if isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value if isinstance(value, list) else value.tolist())

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return pretrained_models.write_gguf(path, config, tensors, "Q8_0", tokenizer)


def use_checkpoint(path: pathlib.Path, of: pathlib.Path) -> None:
    """Open, load and tokenize, whatever of it works."""
    size = sum(p.stat().st_size for p in (path.iterdir() if path.is_dir() else [path]))
    with bounded(size), named(PretrainedError, of=of):
        found = open_checkpoint(path)
        params = found.load(Model(Transformer, found.model, Compute()), None)
        assert params["embedding"].shape == (found.model.vocab_size, found.model.d_model)
    with bounded(size), named(PretrainedError, of=of):
        tokenizer = load_tokenizer(path, ROWS)
        text = tokenizer.decode(tokenizer.encode("def f(x):\n"))
        assert isinstance(text, str)
        assert (tokenizer.chat([{"role": "user", "content": "<|bot|>x"}]) < ROWS).all()


@contextlib.contextmanager
def replaced(path: pathlib.Path, content: bytes):
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@hypothesis.given(st.data())
def test_gguf(gguf_file, data):
    begin = min(info.begin for info in read_gguf(gguf_file).tensors.values())
    with replaced(gguf_file, data.draw(noise(gguf_file.read_bytes(), begin))):
        use_checkpoint(gguf_file, gguf_file)


@hypothesis.given(st.data())
def test_safetensors(folder, data):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    if data.draw(st.booleans()):
        changed = data.draw(noise(content, 8 + size))
    else:
        header = dumped(data.draw(edited(json.loads(content[8 : 8 + size]))))
        changed = struct.pack("<Q", len(header)) + header + content[8 + size :]
    with replaced(weights, changed):
        use_checkpoint(folder, folder)


@hypothesis.given(st.data())
def test_config_json(folder, data):
    path = folder / "config.json"
    with replaced(path, dumped(data.draw(edited(json.loads(path.read_text()))))):
        use_checkpoint(folder, folder)


@hypothesis.given(st.data())
def test_tokenizer_files(folder, data):
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    path = folder / data.draw(st.sampled_from([names[0], *names]))
    changed = data.draw(
        st.one_of(edited(json.loads(path.read_text())).map(dumped), noise(path.read_bytes()))
    )
    with replaced(path, changed):
        use_checkpoint(folder, folder)


PIECES = """
{% for m in messages %} {% endfor %} {{ m.content }} {{ m['role']|trim }} {% if loop.first %}
{% endif %} {{ raise_exception('no') }} {{ 2**999999 }} {% set x = messages[0] %} {{ x|tojson }}
{% macro a(b) %}{{ a(b) }}{% endmacro %} {{ a(1) }} {% for i in range(10**9) %}x{% endfor %}
{{ 'a'*10**10 }} {{ messages.__class__.__mro__ }} {{ cycler.__init__.__globals__ }}
{% include 'x' %} {{ messages[1:]|map(attribute='content')|join('-') }} {{ strftime_now('%Y') }}
{%- for k, v in messages[0].items() -%} {{ m.content.encode('utf-7') }} {{ }} {# #} {% raw %}
{{ '%1000000000d' % 1 }} {{ namespace(a=1).a }}
"""
PIECES = [*re.findall(r"\{.*?[%}#]\}(?=\s)|\S+", PIECES), "\0"]


@hypothesis.given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=9),
                  st.booleans(), JSON)  # fmt: skip
def test_chat_templates(monkeypatch_module, pieces, whole, messages):
    """A template that does not end is stopped; one that would fill the memory is, too."""
    template = TEMPLATE + "".join(pieces) if whole else "".join(pieces)
    given = messages if isinstance(messages, list) else [{"role": "user", "content": messages}]
    with bounded(), named(PretrainedError, of="chat template"):
        assert isinstance(chat.render(template, given), str)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "SECONDS", 0.5)
        chat._worker.cache_clear()
        yield
    chat._worker.cache_clear()


# --- prompts, arrays, configs --------------------------------------------------------------------

LINE = {"prompt": "a", "tokens": [1], "messages": [{"role": "user", "content": "hi"}],
        "turns": ["a", "b"], "id": 3, "question_id": "q", "category": "c", "max_tokens": 3,
        "seed": 1, "stop": ["x"], "reference": ["y"]}  # fmt: skip


@hypothesis.given(st.data())
def test_prompt_lines(folder, data):
    kept = data.draw(st.sets(st.sampled_from(sorted(LINE)), min_size=1))
    line = {key: value for key, value in LINE.items() if key in kept}
    content = data.draw(st.one_of(edited(line).map(dumped), noise(dumped(line))))
    form = data.draw(st.sampled_from(["jsonl", "jsonl", "lines", "text"]))
    pretrained = data.draw(st.booleans())
    tokenizer = load_tokenizer(folder, ROWS) if pretrained else ByteTokenizer()
    with bounded(len(content)):
        for found in read_requests([content], form, tokenizer, Defaults()):
            json.dumps(found.record() if isinstance(found, Failure) else found.id)
            if not isinstance(found, Failure):
                assert found.tokens.dtype == np.int32 and len(found.tokens)
                assert 0 <= found.tokens.min() <= found.tokens.max() < tokenizer.n_tokens


@pytest.mark.parametrize("version", [2, 3])
@hypothesis.given(st.data())
def test_zarr_metadata(version, tmp_path_factory, data):
    place = tmp_path_factory.mktemp("zarr") / "train.zarr"
    store_array(place, ids(20, 16), (4, 16), version)
    path = place / ("zarr.json" if version == 3 else ".zarray")
    path.write_bytes(data.draw(st.one_of(
        edited(json.loads(path.read_text())).map(dumped), noise(path.read_bytes())
    )))  # fmt: skip
    with bounded(), named(DataError, of=place):
        corpus = opened(place)
        for document in itertools.islice(corpus.documents, 30):
            corpus.tokens_of(document)


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
    with bounded(), named(ConfigError):
        if data.draw(st.booleans()):
            values = data.draw(edited(VALUES))
            files.build(values if isinstance(values, dict) else {"seed": values})
        else:
            keys = [".".join(map(str, path)) for path in places(VALUES) if path]
            made = [f"{data.draw(st.sampled_from(keys))}={data.draw(LEAVES)}"
                    for _ in range(data.draw(st.integers(1, 3)))]  # fmt: skip
            files.load("configs/quickstart.py", made)

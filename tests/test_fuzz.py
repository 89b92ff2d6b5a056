"""Files and lines of any content: success or a named error, in bounded time and memory.

Each property mutates what is valid: bytes at random places, values of JSON at random paths, pieces
of a template. 50 cases of each in the fast tier, always the same; 1,000 others with --full.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import pathlib
import re
import resource
import signal
import struct

import hypothesis
import numpy as np
import pretrained_models
import pytest
from hypothesis import strategies as st
from models import TINY
from pretrained_tokenizers import ROWS, TEMPLATE, TEXTS, metadata, trained, write_directory
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
from spire_jax.serving.prompts import RequestError
from spire_jax.serving.records import Failure
from spire_jax.serving.requests import Defaults, positions, read_requests

SECONDS = 20
INDEX = "model.safetensors.index.json"


@contextlib.contextmanager
def bounded(mib: int = 512):
    """Whatever an input holds, it takes no more time, nor more memory beside what was taken before.

    The system refuses what is beyond, as a MemoryError; to count it is slow. The stacks of threads
    are memory, too: 8 MiB each.
    """

    def late(*_):
        raise AssertionError(f"it takes longer than {SECONDS} s")

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_DATA)
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + mib * 2**20, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


@contextlib.contextmanager
def named(*kinds: type[Exception], of: object = "", mib: int = 512):
    """Nothing but these errors, each a line that says something, about `of`; all in bounds."""
    try:
        with bounded(mib):
            yield
    except kinds as error:
        said = files.in_words(error)
        assert said.isprintable() and 20 < len(said) < 3000 and str(of) in said, said


# --- what is done to valid content ---------------------------------------------------------------

EXTREMES = [0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**64 - 1]
NUMBERS = st.one_of(
    st.sampled_from([*EXTREMES, *(-x for x in EXTREMES), 10**400]), st.integers(-9, 9), st.floats()
)
# What Python's own values cannot be, or not without trouble in the test: written when dumped.
DEEP, LONG = "<nested 95 times>", "<5000 digits>"
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=9),
    st.sampled_from([DEEP, LONG, "\ud800", "x" * 4000]),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
WHOLE = [b"", b"[]", b"{}", b"null", b'"error"', b"1" * 5000, b"[" * 10**5, b'{"a":' * 10**5]


def dumped(value) -> bytes:
    text = json.dumps(value, ensure_ascii=False)
    text = text.replace(f'"{DEEP}"', "[" * 95 + "]" * 95).replace(f'"{LONG}"', "1" * 5000)
    return text.encode(errors="surrogatepass")


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
    inner = [*value.items()] if isinstance(value, dict) else []
    inner = [*enumerate(value)] if isinstance(value, list) else inner
    for key, item in inner if len(inner) < 40 else inner[:3]:  # of a vocabulary some are as good
        yield from places(item, (*path, key))


@st.composite
def edited(draw, value):
    """Nested JSON with one to three values replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in places(value) if path]
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "rename", "double"]))
        old = parent[path[-1]]
        if what == "replace":
            near = [-old, old + 1, old * 1000, str(old)] if type(old) is int else [[old], {"": old}]
            parent[path[-1]] = draw(st.sampled_from(near) | JSON)
        elif what == "remove":
            del parent[path[-1]]
        elif what == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=9))] = parent.pop(path[-1])
        elif isinstance(parent, list):
            parent.append(old)
    return value


def changed(value):
    """The JSON of a value, or what is left of it."""
    whole = st.sampled_from(WHOLE) | JSON.map(dumped)
    return edited(value).map(dumped) | edited(value).map(dumped) | noise(dumped(value)) | whole


@contextlib.contextmanager
def replaced(path: pathlib.Path, content: bytes):
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face directory of two shards, tokenizer and all."""
    path = tmp_path_factory.mktemp("folder")
    config, tensors = pretrained_models.tiny("llama3", num_hidden_layers=1, vocab_size=ROWS)
    pretrained_models.write_safetensors(path, config, tensors, shards=2)
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


def use_weights(path: pathlib.Path) -> None:
    with named(PretrainedError, of=path, mib=64):
        found = open_checkpoint(path)
        params = found.load(Model(Transformer, found.model, Compute()), None)
        assert params["embedding"].shape == (found.model.vocab_size, found.model.d_model)


def use_tokenizer(path: pathlib.Path) -> None:
    with named(PretrainedError, of=path):
        tokenizer = load_tokenizer(path, ROWS)
    with named(PretrainedError):
        tokenizer = load_tokenizer(path, ROWS)
        assert isinstance(tokenizer.decode(tokenizer.encode("def f(x):\n")), str)
        assert (tokenizer.chat([{"role": "user", "content": "<|bot|>x"}]) < ROWS).all()


@hypothesis.given(st.data())
def test_gguf(gguf_file, data):
    begin = min(info.begin for info in read_gguf(gguf_file).tensors.values())
    with replaced(gguf_file, data.draw(noise(gguf_file.read_bytes(), begin))):
        use_weights(gguf_file)
        use_tokenizer(gguf_file)


@hypothesis.given(st.data())
def test_safetensors(folder, data):
    weights, index = folder / "model-00001-of-00002.safetensors", folder / INDEX
    content = weights.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    what = data.draw(st.sampled_from(["bytes", "header", "index"]))
    if what == "index":
        path, content = index, data.draw(changed(json.loads(index.read_text())))
    elif what == "bytes":
        path, content = weights, data.draw(noise(content, 8 + size))
    else:
        header = data.draw(changed(json.loads(content[8 : 8 + size])))
        path = weights
        content = struct.pack("<Q", len(header)) + header + content[8 + size :]
    with replaced(path, content):
        use_weights(folder)


@hypothesis.given(st.data())
def test_config_json(folder, data):
    path = folder / "config.json"
    with replaced(path, data.draw(changed(json.loads(path.read_text())))):
        use_weights(folder)


@hypothesis.given(st.data())
def test_tokenizer_files(folder, data):
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    path = folder / data.draw(st.sampled_from([names[0], *names]))
    with replaced(path, data.draw(changed(json.loads(path.read_text())))):
        use_tokenizer(folder)


@hypothesis.given(st.data())
def test_tokenizer_of_data(bpe_file, data):
    with replaced(bpe_file, data.draw(changed(json.loads(bpe_file.read_text())))):
        with named(ConfigError, of=bpe_file):
            assert type(tokenizer_size(str(bpe_file))) is int
            tokenizer = BpeTokenizer(bpe_file)
            assert tokenizer.decode(tokenizer.encode("def f(x):\n")) is not None


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    train_bpe(TEXTS, 301).save(str(path))
    return path


DRAFT = {"blocks": {0: {"query": np.ones((4, 2), np.float32)}}, "mix": np.ones(())}


@hypothesis.given(st.data())
def test_exported_drafts(draft, data):
    path = draft / "config.json"
    with replaced(path, data.draw(changed(json.loads(path.read_text())))):
        with named(PretrainedError, of=draft):
            assert import_draft(draft, "a" * 64).load(DRAFT)["blocks"][0]["query"].shape == (4, 2)


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    target = dataclasses.replace(TINY, rope_base=500000.0)
    where = tmp_path_factory.mktemp("draft") / "draft"
    return export_draft(where, DRAFT, SpireOptions(n_layers=1, window=6), target, "a" * 64,
                        {"text": "a folder", "steps": 12})  # fmt: skip


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
    with named(PretrainedError, of="chat template"):
        assert isinstance(chat.render(template, given), str)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "SECONDS", 0.5)
        yield


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
                assert found.tokens.dtype == np.int32
                assert 0 < len(found.tokens) < positions(found, tokenizer)
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
    with replaced(path, data.draw(changed(json.loads(path.read_text())))):
        with named(DataError, of=path.parents[path.name != "manifest.json"]):
            corpus = opened(arrays[2].parent, missing_chunks=fill)
            for document in itertools.islice(corpus.documents, 30):
                corpus.tokens_of(document)


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
            files.build(values if isinstance(values, dict) else {"seed": values})
        else:
            keys = [".".join(map(str, path)) for path in places(VALUES)]
            made = [f"{data.draw(st.sampled_from(keys) | st.text(max_size=9))}={data.draw(LEAVES)}"
                    for _ in range(data.draw(st.integers(1, 3)))]  # fmt: skip
            files.load(QUICKSTART, made)

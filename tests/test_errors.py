"""What a person gets wrong is one line that says what to do, before anything runs: values of every
field, files that are no configs, and the commands' own flags and paths."""

import dataclasses
import re

import pytest
from corpora import words

from launch import fetch_packages, sample, train_tokenizer
from launch.bench import command_line
from spire_jax import export, run
from spire_jax.config import files
from spire_jax.config.checks import ConfigError
from spire_jax.costs import scaling, throughput
from spire_jax.data import write_zarr
from spire_jax.results import figures
from spire_jax.serving import command
from spire_jax.storage import processes

QUICKSTART = "configs/quickstart.py"
BASE = ("drafts.snap.kind=snapkv", "drafts.snap.budget=40", "throughput.tau.spire=2.5")
LONG = "x" * 5000  # no file system has such names


def load(*overrides: str):
    return files.load(QUICKSTART, (*BASE, *overrides))


# --- values --------------------------------------------------------------------------------------


def numbers(section, path=""):
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{path}{field.name}.")
        elif field.name in ("drafts", "variants"):
            for name, draft in value:
                yield from numbers(draft, f"drafts.{name}.")
        elif type(value) in (int, float) or (value and isinstance(value, tuple)):
            yield path + field.name, value


def test_no_number_is_beyond_what_arrays_hold():
    """NaN and infinities, of which no comparison finds all, and whole numbers that overflow."""
    keys = [(key, value) for key, value in numbers(load())
            if not key.startswith(("throughput.tau", "plugins"))]  # fmt: skip
    assert len(keys) > 90
    for key, value in [*keys, ("throughput.tau.spire", 2.5)]:
        kinds = {type(v) for v in (value if isinstance(value, tuple) else (value,))}
        for text in ("nan", "-inf", "1e39") if float in kinds else ("9" * 5000, str(2**64)):
            with pytest.raises(ConfigError) as error:
                load(f"{key}={text}")
            said = str(error.value)
            assert said.startswith(f"{key}=") and "\n" not in said and len(said) < 250, said
            assert "beyond all use" in said or "should be" in said
    assert load(f"seed={2**64 - 1}").seed == 2**64 - 1
    with pytest.raises(ConfigError, match=r"train.peak_lr=.* is beyond all use"):
        files.build({"train": {"peak_lr": 10**400}})


@pytest.mark.parametrize(
    "overrides, words",
    [
        # What only optax finds, or nobody before the loss is no number.
        ("train.b1=1", r"train.b1=1.0 must lie in \[0, 1\)"),
        ("train.b2=-0.5", r"train.b2=-0.5 must lie in \[0, 1\)"),
        ("train.eps=0", "train.eps=0.0 must be above 0"),
        ("train.clip_norm=0", "train.clip_norm=0.0 must be above 0"),
        ("train.clip_norm=-1", "train.clip_norm=-1.0 must be above 0"),
        ("train.weight_decay=-1", "train.weight_decay=-1.0 is negative"),
        ("train.final_lr_fraction=2", r"train.final_lr_fraction=2.0 must lie in \[0, 1\]"),
        ("train.warmup_fraction=-1", r"train.warmup_fraction=-1.0 must lie in \[0, 1\)"),
        ("train.warmup_fraction=0.99 train.steps=9", "train.steps=9 are all taken by the warm-up"),
        ("train.warmup_fraction=0.99 drafts.spire.steps=9", "drafts.spire.steps=9 are all taken"),
        # What only the model, Grain or the memory finds.
        ("target.norm_eps=-1", "target.norm_eps=-1.0 is negative"),
        ("target.rope_base=0", "target.rope_base=0.0 must be above 0"),
        ("target.rope_scaling=0", "target.rope_scaling=0.0 must be above 0"),
        ("target.rope_high_freq_factor=1", "must be above target.rope_low_freq_factor=1.0"),
        ("target.n_tokens=-5", "target.n_tokens=-5 is negative; use 0 or more"),
        ("target.head_tokens=5", "target.head_tokens=5: a target's head has all tokens"),
        ("target.n_layers=1001", "target.n_layers=1001 is deeper than any model; use 1000"),
        ("drafts.vanilla.d_model=-8", "drafts.vanilla.d_model=-8 is negative"),
        ("drafts.vanilla.d_head=7 drafts.vanilla.init=random", "drafts.vanilla.d_head=7 is odd"),
        ("data.workers=100000", "data.workers=100000 are too many threads; use 1000 or fewer"),
        ("train.batch_size=2147483647", "than an array can count; use fewer or shorter ones"),
        ("eval.bootstrap=2147483647", "resamples do not fit into memory; use 1000000 or fewer"),
        ("study.of=spire study.seeds=2147483647", "more than anybody trains; use 100 or fewer"),
        ("study.of=spire study.trained_k=8,8", "names a depth twice; leave one out"),
        # What files and folders are called after, and paths.
        ("study.of=spire drafts.spire-k8.kind=vanilla", "name means a draft of the study; rename"),
        (f"drafts.{'x' * 101}.kind=vanilla", "the name has 101 letters, .*use 100 or fewer"),
        ("data.source=", "data.source is empty; give a folder, or 'stdlib'"),
        ("data.tokenizer=", "data.tokenizer is empty; use 'bytes', or make a file"),
        ("data.tokenizer=configs", "data.tokenizer: configs has no config.json"),
        (f"data.tokenizer={LONG}", "cannot be read .File name too long.; use 'bytes', or"),
        (f"pretrained.path={LONG}", "File name too long; check the path and its permissions"),
        ("data.missing_chunks=zero", "data.missing_chunks='zero'; choose from"),
    ],
)
def test_values_that_others_find_wrong(overrides, words):
    with pytest.raises(ConfigError, match=words) as error:
        load(*overrides.split(" "))
    assert "\n" not in str(error.value)


TOKENIZERS = {  # what `tokenizers` cannot load, or not as byte-level BPE
    '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}}': "by `tokenizers`",
    '{"model": {"type": "WordPiece", "vocab": {"a": 0}}}': "is no BPE tokenizer",
    '{"model": {"type": "BPE", "vocab": {}, "merges": []}}': "is no BPE tokenizer",
    '{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}': "is no BPE tokenizer",
    '{"added_tokens": [{"id": 1, "content": "<s>", "single_word": false, "lstrip": false, '
    '"rstrip": false, "normalized": false, "special": true}], '
    '"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}': "has special tokens of a model",
}


@pytest.mark.parametrize("content", TOKENIZERS)
def test_tokenizers_that_do_not_load(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=TOKENIZERS[content]) as error:
        write_zarr.make_tokenizer(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("name, content, words", [
    ("c.py", "def get_config(:", "c.py, line 1: SyntaxError: "),
    ("c.py", "import ml_collections\n\nraise ValueError('no\\nway')", "line 3: ValueError: no; me"),
    ("c.py", "x = 1", "has no attribute 'get_config'; mend it .docs/config.md: a function"),
    ("c.py", "def get_config():\n    return 1 / 0", "c.py, line 2: ZeroDivisionError: division"),
    ("c.py", "def get_config(): return dict(seed=float('nan'))", "seed=nan should be int, like 0"),
    ("c.txt", "def get_config(): return {}", "c.txt is no Python file; give one of configs/"),
    ("c.py", b"\xff\x00", "c.py.*: (SyntaxError|ValueError): "),
])  # fmt: skip
def test_files_that_are_no_configs(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=words) as error:
        files.load(path)
    assert "\n" not in str(error.value)


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A file, bytes that are no text, an empty folder, and a corpus."""
    place = tmp_path_factory.mktemp("place")
    (place / "file").write_text("x")
    (place / "bytes").write_bytes(b"\xff\0")
    (place / "folder").mkdir()
    (place / "text").mkdir()
    for i in range(20):
        (place / "text" / f"{i}").write_bytes(words(i, 300))
    return place


RUN = (run.main, f"--config={QUICKSTART} --config.data.source=PLACE/text")
DECODE = (command.main, f"{RUN[1]} --workdir=PLACE/w --method=spire --prompts=PLACE/file")
SCALING = (scaling.main, "--config=configs/paper_llama3_70b.py --chips=8")
TOKENIZER = (train_tokenizer.main, RUN[1])
FETCH, ZARR = (fetch_packages.main, ""), (write_zarr.main, "--source=PLACE/text --workers=1")
FIGURES = (figures.main, "--config=configs/paper_67m.py")
THROUGHPUT = (throughput.main, "--config=configs/paper_67m.py")
SAMPLE, EXPORT = (sample.main, ""), (export.main, f"{RUN[1]} --workdir=PLACE/w --out=PLACE/o")


@pytest.mark.parametrize("base, more, says", [
    (RUN, "--workdir=PLACE/file", "file is no folder; name another"),
    (RUN, "--workdir=PLACE/file/w", "cannot be written .Not a directory.; choose another"),
    (RUN, f"--workdir={LONG}", "cannot be written .File name too long.; choose another"),
    (RUN, "--workdir=", "argument --workdir: the path is empty; name one"),
    (RUN, "--workdir=PLACE/w --stages=", "--stages is empty; there are"),
    (RUN, "--workdir=PLACE/w --config.data.source=PLACE/file", "is not a folder; give a folder"),
    (RUN, f"--workdir=PLACE/w --config.data.source={LONG}", "File name too long; check the path"),
    (RUN, "--workdir=PLACE/w --config.mesh.data=7", "does not fit 1 devices; the product"),
    (RUN, "--workdir=PLACE/w --config.target.n_tokens=9", "is under the 257 tokens of data.tokeni"),
    (RUN, "--workdir=PLACE/w --connect-timeout=-1", "--connect-timeout=-1: give 1 second or more"),
    (RUN, "--workdir=PLACE/w --config.target.d_ff=2147483640", "checkpoints need about .*; free"),
    (DECODE, f"--prompts={LONG}", "File name too long; check the path"),
    (DECODE, "--prompts=PLACE/folder", "Is a directory; check the path"),
    (DECODE, "--prompts=PLACE/none", "none': No such file or directory; check the path"),
    (DECODE, "--out=PLACE/none/x", "No such file or directory; check the path"),
    (DECODE, "--width=99999999999", "--width=99999999999: use 1 or more, under 2147483648"),
    (DECODE, "--temperature=nan", "--temperature=nan is beyond all use; give a finite number"),
    (DECODE, "--top-k=99999999999", "--top-k=99999999999 is beyond all use"),
    (EXPORT, "--draft=none", "no draft named 'none'; drafts: "),
    (THROUGHPUT, "--config.throughput.hoi=inf", "throughput.hoi='inf' is beyond all use"),
    (SCALING, "--latency-us=nan", "latency_s=nan must be 0 or more, and finite"),
    (SCALING, "--activation-bytes=inf", "activation_bytes=inf must be above 0, and finite"),
    (SCALING, f"--context={'9' * 400}", "--context=9.* is beyond all use"),
    (SCALING, f"--chips={'9' * 400}", "must be 1 or more, and under 2147483648"),
    (FIGURES, f"--out={LONG}", "File name too long; check the path"),
    (FIGURES, "--out=PLACE/o --workdir=PLACE/file", "has no report; run the pipeline there first"),
    (TOKENIZER, "--out=PLACE/t --n-tokens=99999999999", "use 257 to 16777216"),
    (TOKENIZER, "--out=PLACE/file/x", "File exists|Not a directory"),
    (TOKENIZER, f"--out={LONG}", "File name too long; check the path"),
    (FETCH, "--list=PLACE/bytes --out=PLACE/p", "is no text .*; name a list of pip's"),
    (FETCH, "--list=PLACE/folder --out=PLACE/p", "is no file; name a list of pip's"),
    (FETCH, f"--list=PLACE/file --out={LONG}", "File name too long; check the path"),
    (SAMPLE, "--workdir=", "argument --workdir: the path is empty; name one"),
    (SAMPLE, f"--workdir={LONG}", "has no report; run the pipeline there first"),
    (ZARR, "--out=", "argument --out: the path is empty; name one"),
    (ZARR, "--out=PLACE/z --source=", "argument --source: the path is empty; name one"),
    (ZARR, "--out=PLACE/z --row-tokens=9999999999999", "out of memory .*; lower the sizes"),
    (ZARR, "--out=PLACE/z2 --tokenizer=PLACE/bytes", "is no BPE tokenizer of `tokenizers`"),
])  # fmt: skip
def test_commands_end_with_a_line(place, capsys, base, more, says):
    main, usual = base
    argv = [word.replace("PLACE", str(place)) for word in f"{usual} {more}".split()]
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    *usage, line = capsys.readouterr().err.splitlines()  # how to use it, of a flag's own value
    assert not usage or (usage[0].startswith("usage: ") and ": error: argument --" in line)
    assert status == 2 and "error: " in line
    assert re.search(says, line), line


def test_no_device_is_a_line(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu': no\nsuch thing")

    monkeypatch.setattr(processes.jax, "devices", devices)
    with pytest.raises(ConfigError, match=r"finds no device .Unable to.*; set JAX_PLATFORMS to wh"):
        processes.devices()


@pytest.mark.parametrize("error, says", [
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"), "lower the siz"),
    (MemoryError(), "out of memory .no more of it.; lower the sizes"),
    (OSError(28, "No space left on device", "a/b"), "'a/b': No space left on device; check the p"),
    (PermissionError(13, "Permission denied", b"a"), "'a': Permission denied; check the path and"),
    (ConfigError("drafts.a\n\x1b[2J\u2028é: rename"), r"drafts.a\\n\\x1b\[2J\\u2028é: rename"),
])  # fmt: skip
def test_what_the_system_refuses_is_a_line(capsys, error, says):
    with pytest.raises(SystemExit) as status, files.ends_in_a_line(ConfigError):
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert status.value.code == 2 and re.search(says, line), line
    with pytest.raises(RuntimeError, match="another"), files.ends_in_a_line():
        raise RuntimeError("another")


def test_counts_and_minutes_of_benchmarks():
    assert command_line.count("3") == 3 and command_line.minutes("0.5") == 0.5
    for parse, text in ((command_line.count, "0"), (command_line.count, "-1"),
                        (command_line.minutes, "nan"), (command_line.minutes, "0")):  # fmt: skip
        with pytest.raises(command_line.argparse.ArgumentTypeError, match="use "):
            parse(text)

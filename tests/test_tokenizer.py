"""Byte-level BPE: lossless, counted in bytes, identified by content; made by a command."""

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from launch import train_tokenizer
from spire_jax.config.schema import ConfigError, DataConfig
from spire_jax.config.validation import tokenizer_size
from spire_jax.data.sources import load_corpus
from spire_jax.data.tokenizer import BpeTokenizer, make_tokenizer, train_bpe

TEXTS = [f"def f_{i}(x):\n    return x + {i}  # naïve\n" for i in range(200)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    train_bpe(TEXTS, 300).save(str(path))
    return path


@pytest.mark.parametrize(
    "text", ["", "def f(x):\n\n\n    return 1\r\n", "日本語 😀 \t\x00", " a  b"]
)
def test_every_text_comes_back(path, text):
    tokenizer = BpeTokenizer(path)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
    assert tokenizer.count_bytes(ids) == len(text.encode())
    np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)
    (together,) = tokenizer.encode_all([text.encode()])
    np.testing.assert_array_equal(together, ids)


def test_text_is_shorter_than_its_bytes_and_no_text_is_the_separator(path):
    tokenizer = BpeTokenizer(path)
    assert tokenizer.n_tokens == tokenizer_size(str(path)) == 300
    assert tokenizer.separator == 299
    assert len(tokenizer.encode(TEXTS[0])) < 0.6 * len(TEXTS[0].encode())
    assert max(tokenizer.encode("".join(TEXTS) + "<|endoftext|>")) < tokenizer.separator
    ids = [*tokenizer.encode("a"), tokenizer.separator, *tokenizer.encode("b")]
    assert tokenizer.decode(np.array(ids)) == "a␞b"
    assert tokenizer.count_bytes(np.array(ids)) == 2
    half = tokenizer.encode("é")[:1] if len(tokenizer.encode("é")) > 1 else np.array([200])
    assert isinstance(tokenizer.decode(half), str)


def test_names_tell_the_content(path, tmp_path):
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    same.write_bytes(path.read_bytes())
    train_bpe(TEXTS[:50], 300).save(str(other))
    names = [make_tokenizer(str(p)).name for p in (path, same, other)]
    assert names[0] == names[1] != names[2]


NO_BPE = ["", "{}", "[1]", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": 1.5}}}',
          '{"model": {"vocab": {"a": -3}}}', '{"model": {"vocab": {"a": 4294967296}}}',
          "[" * 10**5]  # fmt: skip


@pytest.mark.parametrize("content", NO_BPE, ids=lambda content: content[:40])
def test_other_files_are_refused(tmp_path, content):
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    with pytest.raises(ConfigError, match="is no BPE tokenizer"):
        tokenizer_size(str(bad))


@pytest.mark.parametrize("how", ["in front", "beyond"])
def test_a_model_s_own_file_is_refused(path, tmp_path, how):
    """Its begin token would stand in every text, or be taken for the separator."""
    bpe, at = tokenizers.Tokenizer.from_file(str(path)), tmp_path / "model.json"
    if how == "in front":
        begin = [("a", bpe.token_to_id("a"))]
        bpe.post_processor = processors.TemplateProcessing("a $A", None, begin)
    else:
        bpe.add_special_tokens(["<|begin|>"])
    bpe.save(str(at))
    with pytest.raises(ConfigError, match=r"model\.json' has special tokens .* the model's folder"):
        make_tokenizer(str(at))


# --- the command, and the corpus in its tokens ---------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    for i, text in enumerate(TEXTS):
        folder = root / f"package_{i % 9}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module_{i}.py").write_text(text * 5)
    return root


def arguments(corpus, *more: str) -> list[str]:
    return ["--config=configs/quickstart.py", f"--config.data.source={corpus}",
            "--config.data.heldout_percent=40", "--config.data.split=folder", *more]  # fmt: skip


def test_the_command_reads_the_training_documents_alone(corpus, tmp_path, capsys):
    out = tmp_path / "made.json"
    given = arguments(corpus, f"--out={out}", "--n-tokens=280")
    assert train_tokenizer.main(given) == 0
    assert "bpe-280-" in capsys.readouterr().out
    config = DataConfig(str(corpus), heldout_percent=40, split="folder")
    for document in load_corpus(config).split(heldout=True):
        (corpus / document.path).write_text("something else entirely\n" * 50)
    again = tmp_path / "again.json"
    assert train_tokenizer.main([*given[:-2], f"--out={again}", "--n-tokens=280"]) == 0
    assert out.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("size, message", [(100, "use 257 to 16777216"), (60_000, "yields only")])
def test_sizes_that_cannot_be(corpus, tmp_path, capsys, size, message):
    with pytest.raises(SystemExit) as status:
        train_tokenizer.main(arguments(corpus, f"--out={tmp_path / 'x'}", f"--n-tokens={size}"))
    assert status.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_is_not_overwritten(corpus, path, capsys):
    before = path.read_bytes()
    with pytest.raises(SystemExit):
        train_tokenizer.main(arguments(corpus, f"--out={path}"))
    assert "exists; remove it" in capsys.readouterr().err and path.read_bytes() == before


def test_corpora_are_split_by_folder_and_kept_in_tokens(corpus, path, tmp_path, monkeypatch):
    config = DataConfig(str(corpus), str(path), heldout_percent=40, split="folder")
    first = load_corpus(config, tmp_path / "cache")
    sides = {heldout: {d.path.split("/")[0] for d in first.split(heldout)}
             for heldout in (False, True)}  # fmt: skip
    assert sides[True] and sides[False] and not sides[True] & sides[False]
    document = first.documents[3]
    text = (corpus / document.path).read_text()
    assert first.tokenizer.decode(first.tokens_of(document)) == text + "␞"

    def never(self, texts):
        raise AssertionError("the tokens are at hand")

    monkeypatch.setattr(BpeTokenizer, "encode_all", never)
    again = load_corpus(config, tmp_path / "cache")
    assert again.sha256 == first.sha256 and again.documents == first.documents
    np.testing.assert_array_equal(again.tokens, first.tokens)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])  # torn: made again
    with pytest.raises(AssertionError, match="at hand"):
        load_corpus(config, tmp_path / "cache")
    by_file = load_corpus(DataConfig(str(corpus), heldout_percent=40))
    assert by_file.sha256 != first.sha256

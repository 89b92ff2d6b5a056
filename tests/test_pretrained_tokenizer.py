"""Pretrained tokenizers: both sources, what they make of text, and streaming."""

import gguf
import numpy as np
import pytest
import tokenizers
from pretrained_tokenizers import (
    ROWS,
    SPM,
    metadata,
    of_either,
    of_gguf,
    spm,
    trained,
    write,
    write_directory,
)
from tokenizers import pre_tokenizers

from spire_jax.config.validation import is_checkpoint
from spire_jax.data.tokenizer import Tokenizer
from spire_jax.pretrained import PretrainedError
from spire_jax.pretrained.tokenizer import load_tokenizer
from spire_jax.pretrained.tokenizer_sources import LLAMA3, SPLITS, from_gguf
from spire_jax.serving.text import TextStream

FAMILY = "\N{WOMAN}\u200d\N{WOMAN}\u200d\N{GIRL}\u200d\N{BOY}"
HARD = ["", "def f(x):\r\n\n\n    return 1\r\n", "日本語 한국어 العربية", f"{FAMILY} 👍🏽 e\u0301",
        "\x00\x01\x1b[0m\x7f", " a  b   12345  67 ", "\ufeff\u200b\ufdd0\U0010ffff",
        "don't DON'T we'LL", "\t\t \n \n  x"]  # fmt: skip


@pytest.fixture
def bpe():
    return trained()


@pytest.fixture
def directory(tmp_path):
    return write_directory(tmp_path)


@pytest.fixture(params=["directory", "gguf"])
def tokenizer(request, directory):
    return of_either(request.param, directory)


@pytest.mark.parametrize("text", HARD)
def test_every_text_comes_back(tokenizer, text, bpe):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
    assert ids.tolist() == bpe.encode(text).ids
    assert tokenizer.count_bytes(ids) == len(text.encode())
    np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)
    (together,) = tokenizer.encode_all([text.encode()])
    np.testing.assert_array_equal(together, ids)


def test_it_is_a_tokenizer_of_the_library(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.n_tokens == ROWS and tokenizer.separator == 300
    assert set(tokenizer.eos) == {300, 302} and tokenizer.eos[0] == 300
    assert tokenizer.bos == 301 and not tokenizer.add_bos
    assert tokenizer.special == {"<|end|>": 300, "<|user|>": 301, "<|bot|>": 302}
    ids = np.array([*tokenizer.encode("a"), 300, *tokenizer.encode("b"), 301, 303])
    assert tokenizer.decode(ids) == "a␞b<|user|>" and tokenizer.count_bytes(ids) == 2


# --- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_stream_gives_whole_characters_as_soon_as_they_are_whole(tokenizer, size):
    text = f"naïve 日本 {FAMILY} x"
    ids = tokenizer.encode(text).tolist()
    stream = TextStream(tokenizer.decode)
    pieces = [stream.feed(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) + stream.end() == text and "\ufffd" not in "".join(pieces)
    if size == 1:
        assert "" in pieces and len([p for p in pieces if p]) > 5, "as soon as"


def test_a_character_that_is_cut_is_shown_at_the_end(tokenizer):
    stream, cut = TextStream(tokenizer.decode), tokenizer.encode("日")[:1].tolist()
    assert stream.feed(cut) == "" and stream.feed(tokenizer.encode("a").tolist()) == "\ufffda"
    assert stream.feed(cut) == "" and stream.end() == "\ufffd" == tokenizer.decode(np.array(cut))


# --- GGUF ----------------------------------------------------------------------------------------


def test_a_gguf_file_and_the_directory_it_was_made_from_agree(directory, bpe):
    writer = gguf.GGUFWriter(directory / "m.gguf", "llama")
    given = metadata(bpe)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(given["tokenizer.ggml.tokens"])
    writer.add_token_merges(given["tokenizer.ggml.merges"])
    writer.add_token_types(given["tokenizer.ggml.token_type"].tolist())
    writer.add_eos_token_id(300)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    one, other = (load_tokenizer(p, ROWS) for p in (directory / "m.gguf", directory))
    for text in HARD:
        np.testing.assert_array_equal(one.encode(text), other.encode(text))


def test_a_file_is_what_it_holds(directory, bpe):
    """Not what it is called: a cache keeps files under their hashes, behind links."""
    writer = gguf.GGUFWriter(directory / "f00d", "llama")
    for key, value in metadata(bpe).items():
        add = writer.add_array if isinstance(value, list | np.ndarray) else writer.add_uint32
        add = writer.add_string if isinstance(value, str) else add
        add(key, value.tolist() if isinstance(value, np.ndarray) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (directory / "link.json").symlink_to("f00d")
    (directory / "t.gguf").write_bytes((directory / "tokenizer.json").read_bytes())
    names = {n: load_tokenizer(directory / n, ROWS).name for n in ("f00d", "link.json", "t.gguf")}
    assert names["f00d"] == names["link.json"] != names["t.gguf"]
    assert names["t.gguf"] == load_tokenizer(directory, ROWS).name
    assert [is_checkpoint(str(directory / n)) for n in (*names, ".", "none.gguf")] == [
        True, True, False, True, False]  # fmt: skip
    (directory / "generation_config.json").unlink()
    (directory / "generation_config.json").symlink_to("gone")
    with pytest.raises(PretrainedError, match=r"generation_config.json cannot be read: No such"):
        load_tokenizer(directory, ROWS)


def words(tmp_path, bpe, pre, text):
    """Text as the tokenizer splits it, seen through a vocabulary that merges nothing across."""
    backend = from_gguf(tmp_path / "m.gguf", metadata(bpe, pre)).backend
    assert backend.pre_tokenizer is not None
    spans = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [text[a:b] for a, b in spans]


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("gpt-2", ["it", "'s", " WE", "'", "LL", " 12345", " ", " 6", " \n\n", " x", "?!", "\n"]),
        ("smollm", ["it", "'s", " WE", "'", "LL", " ", "1", "2", "3", "4", "5", "  ", "6", " \n\n",
                    " x", "?!", "\n"]),
        ("llama-bpe", ["it", "'s", " WE", "'LL", " ", "123", "45", " ", " ", "6", " \n\n", " x",
                       "?!\n"]),
        ("qwen2", ["it", "'s", " WE", "'LL", " ", "1", "2", "3", "4", "5", " ", " ", "6", " \n\n",
                   " x", "?!\n"]),
    ],
)  # fmt: skip
def test_text_is_split_as_the_model_wants_it(tmp_path, bpe, pre, expected):
    assert words(tmp_path, bpe, pre, "it's WE'LL 12345  6 \n\n x?!\n") == expected


def test_qwen_composes_characters_first(tmp_path, bpe):
    for pre, same in (("qwen2", True), ("gpt-2", False)):
        tokenizer = of_gguf(tmp_path, metadata(bpe, pre))
        assert np.array_equal(tokenizer.encode("e\u0301"), tokenizer.encode("é")) == same


def test_words_of_the_model_are_taken_as_they_are_written(tmp_path, bpe):
    given = metadata(bpe)
    given["tokenizer.ggml.tokens"].append("né")  # in a word of bytes, "é" stands for one
    given["tokenizer.ggml.token_type"] = np.append(given["tokenizer.ggml.token_type"], 4)
    tokenizer = of_gguf(tmp_path, given)
    assert tokenizer.encode("x né")[-1] == 303 and "né" not in tokenizer.special
    assert tokenizer.decode(tokenizer.encode("x né é")) == "x né é"


def test_llama_3_takes_words_that_are_tokens_before_merges(tmp_path, bpe):
    given = metadata(bpe)
    given["tokenizer.ggml.tokens"].append("xyzzy")  # no merge leads there
    given["tokenizer.ggml.token_type"] = np.append(given["tokenizer.ggml.token_type"], 1)
    for pre, split in SPLITS.items():
        tokenizer = of_gguf(tmp_path, given | {"tokenizer.ggml.pre": pre})
        assert (tokenizer.encode("xyzzy").tolist() == [303]) == (split == LLAMA3), pre


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path):
    tokenizer = of_gguf(tmp_path, spm(), len(SPM))
    ids = {token: i for i, token in enumerate(SPM)}

    def pieces(text):
        return [SPM[i] for i in tokenizer.encode(text)]

    assert pieces("ab") == ["▁", "ab"]  # of the higher score; then there is no "▁a" any more
    assert pieces("abel") == ["▁", "abel"] and pieces("al") == ["▁a", "l"]
    assert pieces("é\n") == ["▁", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert pieces("</s>")[-1] == "<0x3E>" and ids["</s>"] not in tokenizer.encode("</s>")
    assert pieces("<tool>") == ["<tool>"]  # no special token: the model's own word
    assert tokenizer.add_bos and tokenizer.encode_prompt("a").tolist() == [1, ids["▁a"]]
    for text in HARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    stream = TextStream(tokenizer.decode)
    assert stream.feed([ids["▁a"], ids["<0xC3>"]]) == "a" and stream.feed([ids["<0xA9>"]]) == "é"
    bare = of_gguf(tmp_path, spm(add_space_prefix=False), len(SPM))
    assert [SPM[i] for i in bare.encode("abel")] == ["abel"]
    assert bare.decode(np.array([ids["▁a"]])) == " a"
    long = [*SPM[:-1], "x" * 1000]
    with pytest.raises(PretrainedError, match=r"a token has 1000 characters, .* than 512; fetch"):
        of_gguf(tmp_path, spm(tokens=long), len(SPM))


# --- names and errors ----------------------------------------------------------------------------


def test_names_tell_the_content(directory, bpe, tmp_path):
    names = [load_tokenizer(directory, ROWS).name, load_tokenizer(directory, ROWS + 1).name]
    bpe.save(str(directory / "copy.json"))
    names.append(load_tokenizer(directory / "copy.json", ROWS).name)
    write(directory / "generation_config.json", eos_token_id=301)
    names.append(load_tokenizer(directory, ROWS).name)
    given = metadata(bpe)
    names += [of_gguf(tmp_path, given).name, of_gguf(tmp_path, metadata(bpe, "smollm")).name]
    assert names[0].startswith("pretrained-304-") and names[2] == names[0]
    assert len(set(names)) == 5


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("tokenizer.json", "{", "`tokenizers` cannot use"),
        ("tokenizer_config.json", "{", "no JSON"),
        ("tokenizer_config.json", "[1]", "no JSON object"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', "eos_token '</s>' is no token"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ("generation_config.json", '{"eos_token_id": 303}', "id 303, which is no token"),
        ("generation_config.json", '{"eos_token_id": 9999}', "id 9999, which is no token"),
        ("chat_template.jinja", b"\xff", "no UTF-8"),
    ],
)
def test_files_that_are_wrong_are_named(directory, file, content, words):
    (directory / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PretrainedError, match=words) as caught:
        load_tokenizer(directory, ROWS)
    assert str(directory) in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(directory, tmp_path):
    for rows, words in ((302, "ids up to 302, the model 302 rows"), (400, "303 tokens for 400")):
        with pytest.raises(PretrainedError, match=words):
            load_tokenizer(directory, rows)
    with pytest.raises(PretrainedError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere", 10)


def test_ids_and_text_that_are_none(tokenizer):
    for ids in ([0, ROWS], [-1]):
        for use in (tokenizer.decode, tokenizer.count_bytes):
            with pytest.raises(PretrainedError, match="is no id"):
                use(np.array(ids))
    for bad in (b"a\xff", "half \ud83d"):
        for use in (tokenizer.encode, tokenizer.encode_special):
            with pytest.raises(PretrainedError, match="no UTF-8"):
                use(bad)
    with pytest.raises(PretrainedError, match="no UTF-8"):
        tokenizer.encode_all([b"ok", b"\xc3"])


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"model": None}, "tokenizer.ggml.model is None"),
        ({"pre": "tekken"}, "is 'tekken'; supported are gpt-2, .*qwen2"),
        ({"pre": None}, "is 'default'; supported are"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": [1, 2]}, "no list of str"),
        ({"token_type": np.ones(5)}, "no list of int"),
        ({"token_type": np.ones(5, int)}, "5 entries for 303 tokens"),
        ({"merges": ["a"]}, "`tokenizers` cannot use"),
        ({"merges": ["a q q"]}, "`tokenizers` cannot use"),
        ({"eos_token_id": 303}, "eos_token_id is 303, of 303 tokens"),
        ({"eos_token_id": None, "eot_token_id": None}, "<ends>"),
        ({"tokens": ["a"] * 303}, "'a' is given twice"),
    ],
)
def test_metadata_that_is_wrong_is_named(tmp_path, bpe, values, words):
    given = metadata(bpe, **values)
    if words == "<ends>":  # <|end|> ends turns, whoever names it
        assert of_gguf(tmp_path, given).eos == (300,)
        given["tokenizer.ggml.tokens"][300] = "<|turn|>"
        words = "no token is named that ends a text"
    with pytest.raises(PretrainedError, match=words):
        of_gguf(tmp_path, given)


def test_other_decoders_are_refused(directory, bpe):
    other = tokenizers.Tokenizer.from_str(bpe.to_str())
    other.decoder = tokenizers.decoders.WordPiece()
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.save(str(directory / "tokenizer.json"))
    with pytest.raises(PretrainedError, match="decodes by WordPiece; byte-level"):
        load_tokenizer(directory, ROWS)


def test_where_a_chat_template_is_found(directory):
    chat = [{"role": "user", "content": "x"}]
    assert load_tokenizer(directory, ROWS).render_chat(chat) == "<|user|><|user|>x<|end|><|bot|>"
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert load_tokenizer(directory, ROWS).render_chat(chat) == "x!"
    (directory / "chat_template.jinja").unlink()
    write(directory / "tokenizer_config.json", eos_token="<|end|>")
    with pytest.raises(PretrainedError, match="has no chat template"):
        load_tokenizer(directory, ROWS).chat(chat)

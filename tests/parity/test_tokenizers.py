"""Ids, text and chats as transformers and llama.cpp have them."""

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from spire_jax.pretrained.tokenizer import load_tokenizer
from spire_jax.pretrained.tokenizer_sources import describe
from spire_jax.serving.text import TextStream

FAMILY = "\N{WOMAN}\u200d\N{WOMAN}\u200d\N{GIRL}\u200d\N{BOY}"
TEXTS = [
    "", " ", "Hello world! 123", "Café déjà vu: naïve, coöperate.", "  two,   three, \t tab\t\t",
    "def f(x: int) -> int:\r\n\tif x<=0:\r\n\t\treturn 0x7f & ~x\r\n\r\n    # done\n",
    f"{FAMILY} 👍🏽🇫🇷 ❤️‍🔥 ☕", "日本語のテキスト、한국어 문장。简体中文\uff01",
    "\x00\x01\x07\x08\x1b[31m\x7f\x80\u0085", "line\r\nline\rline\n\n\n\nline\u2028x",
    " \n \n  x" + " " * 70 + "y\t\n  ", "1234567890 3.14159 1e-9 ½ Ⅷ ٣٤٥ 12 345",
    "русский العربية עברית ελληνικά हिन्दी ไทย", "don't DON'T we'LL it'S 'tis \u017f '\u017f K'S",
    "\ufeffBOM \u200b\u2060 \ufffd \ufffe \U0010ffff \ue000", "a\u00a0b\u2003c\u3000d",
    "{\"key\": [1, 2.0, null], 'k': `x`} <a href=\"#\">&amp;</a>", "e\u0301 A\u030a ﬁ Å 각",
    "�� Ã© â€™ \\x80\\xff", "x" * 300 + "!" * 100,
]  # fmt: skip
SPECIAL = ["<|begin|>", "<|end|>", "<|user|>", "<|im_start|>", "<|im_end|>"]
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATS = [
    [{"role": "user", "content": "Hi <b>&</b> 'there' 😀\n"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "日本?"},
     {"role": "assistant", "content": "はい"}, {"role": "user", "content": ""}],
]  # fmt: skip
TEMPLATES = {
    "gpt-2": "{% for m in messages %}{{ m.role | upper }}: {{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "llama-3": "{{- bos_token }}\n{%- set ns = namespace(first=true) %}\n"
    "{%- for message in messages %}\n    {%- if ns.first %}{% set ns.first = false %}{% endif %}\n"
    "    {{- '<|user|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|end|>' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|user|>assistant\\n\\n' }}\n"
    "{%- endif %}\n",
    "qwen": "{%- if messages[0].role == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- for message in messages[::-1] %}{% if loop.index > 9 %}{% break %}{% endif %}\n"
    "{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message | tojson ~ '<|im_end|>' }}\n"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}


def trained(kind: str) -> tokenizers.Tokenizer:
    """A small tokenizer that splits text as GPT-2, Llama 3 or Qwen does."""
    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama-3"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind != "gpt-2":
        digits = r"\p{N}{1,3}" if kind == "llama-3" else r"\p{N}"
        bpe.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(WORDS + digits + REST), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    if kind == "qwen":
        bpe.normalizer = normalizers.NFC()
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TEXTS * 3, trainer)
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    bpe.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if kind == "llama-3":
        first = bpe.token_to_id("<|begin|>")
        bpe.post_processor = TemplateProcessing("<|begin|> $A", None, [("<|begin|>", first)])
    return bpe


def ids_of(path) -> int:
    """Ids that a file's tokenizer has: its highest and one more."""
    return max(describe(path).backend.get_vocab().values()) + 1


def differing(ours, theirs, texts) -> list[str]:
    """Texts whose ids differ, special tokens recognised, or that do not come back."""
    bad = []
    for text in texts:
        expected = theirs(text, add_special_tokens=False).input_ids
        ids = ours.encode_special(text)
        back = theirs.decode(expected, clean_up_tokenization_spaces=False)
        stream = TextStream(ours.decode)
        pieces = "".join(stream.feed([i]) for i in ids.tolist()) + stream.end()
        if ids.tolist() != expected or not ours.decode(ids) == pieces == back:
            bad.append(text)
    return bad


@pytest.mark.parametrize("kind", ["gpt-2", "llama-3", "qwen"])
def test_trained_tokenizers(tmp_path, kind, figure):
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained(kind), bos_token="<|begin|>", eos_token="<|end|>"
    )
    made.chat_template = TEMPLATES[kind]
    made.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path, len(theirs))
    assert differing(ours, theirs, TEXTS) == []
    marked = ["<|user|>a<|end|> b <think>c</think>", "<|begin|><|begin|> x"]
    for text in marked:
        assert (
            ours.encode_special(text).tolist() == theirs(text, add_special_tokens=False).input_ids
        )
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text).tolist() == plain
    assert ours.encode_prompt("x").tolist() == theirs("x").input_ids
    assert ours.add_bos == (kind == "llama-3")
    compare_chats(ours, theirs)
    figure(f"{kind}-style tokenizer", f"ids and text of {len(TEXTS)} texts equal")


def compare_chats(ours, theirs):
    for messages in CHATS:
        for ask in (True, False):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
            assert ours.render_chat(messages, add_generation_prompt=ask) == text
            ids = theirs(text, add_special_tokens=False).input_ids
            assert ours.chat(messages, add_generation_prompt=ask).tolist() == ids


def of_transformers(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_smollm2(smollm2, figure):
    """transformers leaves out what `tokenizer.ggml.pre` says, that digits are split one by one,
    which shows after two spaces and in signs such as ½; put back, all ids are equal."""
    ours, theirs = load_tokenizer(smollm2, 49152), of_transformers(smollm2)
    without = differing(ours, theirs, TEXTS)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = theirs.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    assert differing(ours, theirs, [*TEXTS, "a  12"]) == []
    assert all(any(c.isnumeric() for c in text) for text in without)
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text
    compare_chats(ours, theirs)
    figure("SmolLM2 tokenizer", f"ids and text of {len(TEXTS)} texts equal, of {len(without)} "
           "once transformers splits digits")  # fmt: skip


@pytest.mark.parametrize(
    "name", ["gpt-2", "starcoder", "refact", "llama-bpe", "qwen2", "llama-spm", "phi-3"]
)
def test_llama_cpp(vocabularies, name, figure):
    """The ids that llama.cpp keeps beside the vocabularies of real models."""
    path = vocabularies / f"ggml-vocab-{name}.gguf"
    ours = load_tokenizer(path, ids_of(path))
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = path.with_suffix(".gguf.out").read_text().split("\n")
    bad = []
    for text, expected in zip(texts, ids, strict=False):
        got = ours.encode(text)
        if got.tolist() != [int(i) for i in expected.split()] or ours.decode(got) != text:
            bad.append(text)
    assert len(texts) > 40 and bad == []
    figure(f"{name} vocabulary", f"ids of {len(texts)} texts as llama.cpp's")


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "llama-spm", "phi-3"])
def test_real_vocabularies_in_transformers(vocabularies, name, figure):
    """Real vocabularies through transformers' own reading of GGUF.

    That reading leaves out Qwen2's normalizer (NFC), which its tokenizer.json has, and where
    Llama 2 puts a space in front of every text it does so only where none is there.
    """
    path = vocabularies / f"ggml-vocab-{name}.gguf"
    ours, theirs = load_tokenizer(path, ids_of(path)), of_transformers(path)
    texts = TEXTS
    if name == "qwen2":
        theirs.backend_tokenizer.normalizer = normalizers.NFC()
    if name == "llama-spm":
        texts = [text for text in TEXTS if not text.startswith(" ")]
    bad = []
    for text in texts:
        expected = theirs(text, add_special_tokens=False).input_ids
        if ours.encode(text).tolist() != expected:
            bad.append(text)
    assert bad == []
    figure(f"{name} vocabulary", f"ids of {len(texts)} texts as transformers'")

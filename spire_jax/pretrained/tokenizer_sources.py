"""Where a pretrained tokenizer is described: `tokenizer.json` and its neighbours, or GGUF metadata.

Both become a `Description`. GGUF names its way of splitting text into words only by a word
(`tokenizer.ggml.pre`); the splits here are those whose ids were compared with llama.cpp's and
with transformers' (tests/parity); others are refused.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from spire_jax.config.values import parse_json
from spire_jax.pretrained import PretrainedError
from spire_jax.pretrained.chat import choose_template
from spire_jax.pretrained.gguf_file import is_gguf, read_gguf

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What splits text: the name in GGUF -> one of these.
GPT2, DIGITS, LLAMA3, QWEN2 = "gpt2", "digits", "llama3", "qwen2"
SPLITS = {"gpt-2": GPT2, "smollm": DIGITS, "starcoder": DIGITS, "refact": DIGITS,
          "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "qwen2": QWEN2}  # fmt: skip
_PATTERNS = {LLAMA3: _WORDS + r"\p{N}{1,3}" + _REST, QWEN2: _WORDS + r"\p{N}" + _REST}
MAX_PIECE = 512  # characters; its merges are found by trying every place to cut it
# Types of tokens in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Tokens that end a turn or a text, of whatever type; GGUF often names one of several. As llama.cpp.
_ENDS = frozenset({"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>",
                   "<|end|>", "</s>", "<EOT>", "[EOT]", "[EOS]", "<eos>", "<end_of_turn>",
                   "<end_of_utterance>"})  # fmt: skip
# What a control token looks like, whatever a file says of it. As llama.cpp's converter.
_CONTROL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused\d+>|<pad>|<mask>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Description:
    """A tokenizer as its source describes it."""

    path: pathlib.Path
    backend: tokenizers.Tokenizer
    content: str  # SHA-256 of what decides about ids
    eos: tuple[int, ...]  # the tokenizer's own first
    bos: int | None
    add_bos: bool  # the model expects `bos` in front of a text
    chat_template: str | None
    names: Mapping[str, str]  # bos_token, eos_token, ... -> the token's text, for templates


@contextlib.contextmanager
def refusals(path: pathlib.Path) -> Iterator[None]:
    """What `tokenizers` raises over a description becomes a PretrainedError that names the file.

    It raises nothing narrower than Exception, and for some descriptions Rust panics, which
    Python sees as a BaseException.
    """
    try:
        yield
    except PretrainedError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise PretrainedError(
            f"{path}: `tokenizers` cannot use its description: {error}; fetch it again"
        ) from None


def describe(path: str | os.PathLike[str]) -> Description:
    """The tokenizer of a GGUF file, of a `tokenizer.json` or of a directory that holds one.

    A file is what it begins as, whatever it is called. PretrainedError if there is none, or none
    that is understood.
    """
    path = pathlib.Path(path)
    if is_gguf(path):
        return from_gguf(path, read_gguf(path).metadata)
    if path.is_file():
        return from_directory(path.parent, path)
    return from_directory(path, path / "tokenizer.json")


# --- a directory ---------------------------------------------------------------------------------


def from_directory(directory: pathlib.Path, file: pathlib.Path) -> Description:
    """The tokenizer in `file`, and what its neighbours say about special tokens and chat."""
    if not file.is_file():
        raise PretrainedError(
            f"{directory} has no tokenizer.json; write one with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    content = file.read_bytes()
    with refusals(file):
        backend = tokenizers.Tokenizer.from_buffer(content)
    backend.no_padding()
    backend.no_truncation()
    config = _json(directory / "tokenizer_config.json")
    names = _names(_json(directory / "special_tokens_map.json")) | _names(config)
    ids: dict[str, int] = {}
    for name in ("bos_token", "eos_token"):
        text = names.get(name)
        found = None if text is None else backend.token_to_id(text)
        if found is not None:
            ids[name] = found
        elif text is not None:
            raise PretrainedError(
                f"{directory}: the {name} {text!r} is no token of {file.name}; the files belong "
                "to different models: fetch them again"
            )
    eos = [ids["eos_token"]] if "eos_token" in ids else []
    eos += _ids_of_model(directory, "eos_token_id")
    bos = ids.get("bos_token")
    if bos is None and "bos_token" not in config:
        bos = next(iter(_ids_of_model(directory, "bos_token_id")), None)
    content += _make_special(backend, {names.get("bos_token"), *_called_special(config)}, eos)
    first = backend.encode("").ids[:1]  # with what the post-processor puts in front
    adds = config.get("add_bos_token")
    template = directory / "chat_template.jinja"
    where = str(directory / "tokenizer_config.json")
    return Description(
        directory,
        backend,
        hashlib.sha256(content).hexdigest(),
        tuple(dict.fromkeys(eos)),
        bos,
        bos is not None and (first == [bos] if adds is None else bool(adds)),
        _text(template) if os.path.lexists(template)
        else choose_template(config.get("chat_template"), where),
        names,
    )  # fmt: skip


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PretrainedError(f"{path} is no UTF-8: {error}; fetch it again") from None
    except OSError as error:  # a link of a cache to what is no longer there
        raise PretrainedError(f"{path} cannot be read: {error.strerror}; fetch it again") from None


def _json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file of JSON; an empty one where there is no file."""
    if not os.path.lexists(path):
        return {}
    try:
        value = parse_json(_text(path))
    except ValueError as error:
        raise PretrainedError(f"{path} is no JSON: {error}; fetch it again") from None
    if not isinstance(value, dict):
        raise PretrainedError(f"{path} is no JSON object; fetch it again")
    return value


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    """`..._token` -> text; a token is a string or an object with `content`."""
    names = {}
    for name, value in config.items():
        value = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(value, str):
            names[name] = value
    return names


def _called_special(config: Mapping[str, Any]) -> Iterator[str]:
    """Texts of the tokens that tokenizer_config.json calls special, in its several versions."""
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        tokens = config.get(key)
        tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
        for token in tokens if isinstance(tokens, list) else ():
            if isinstance(token, dict) and token.get("special", key != "added_tokens_decoder"):
                token = token.get("content")
            if isinstance(token, str):
                yield token


def _make_special(
    backend: tokenizers.Tokenizer, named: Container[str | None], ends: Container[int]
) -> bytes:
    """Make special what bounds turns and texts, though tokenizer.json takes it for words.

    Words of a model's own, as `<think>`, stay words. Returns the texts of what was made special.
    """
    made = []
    for i, token in backend.get_added_tokens_decoder().items():
        control = token.content in named or i in ends or _CONTROL.fullmatch(token.content)
        if control and not token.special:
            token.special = True
            made.append(token)
    backend.add_special_tokens(made)
    return "".join(token.content for token in made).encode()


def _ids_of_model(directory: pathlib.Path, key: str) -> list[int]:
    """Ids that generation_config.json names; those of config.json where it names none.

    As `transformers` generates. A config.json may still have those of the model it was made from:
    2 is the end of text of Llama 2, and in Llama 3 an ordinary token.
    """
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if ids := _ids(_json(path).get(key), f"{path}: {key}"):
            return ids
    return []


def _ids(value: Any, where: str) -> list[int]:
    """Ids from null, a number or a list of numbers."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise PretrainedError(f"{where} is {value!r:.80}; give a token's id or a list of ids")
    return ids


# --- GGUF ----------------------------------------------------------------------------------------


def from_gguf(path: pathlib.Path, metadata: Mapping[str, Any]) -> Description:
    """The tokenizer in the metadata of a GGUF file."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise PretrainedError(
            f"{path}: tokenizer.ggml.model is {kind!r}; 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece BPE) are supported"
        )
    tokens = _list(path, metadata, "tokens", str)
    ids = {
        f"{name}_token": i
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (i := _id(path, metadata, key, len(tokens))) is not None
    }
    ends = [ids.get("eos_token"), *(_id(path, metadata, k, len(tokens)) for k in ("eot", "eom"))]
    ends += [i for i, token in enumerate(tokens) if token in _ENDS]
    given = zip(tokens, _list(path, metadata, "token_type", int, len(tokens)), strict=True)
    types = [_type(token, kind, i in ends) for i, (token, kind) in enumerate(given)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocabulary[t] != i)
        raise PretrainedError(f"{path}: the token {twice!r} is given twice; fetch the file again")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", kind == "llama"))
    with refusals(path):
        if kind == "gpt2":
            split = _split_of(path, pre)
            merges = [_pair(m) for m in _list(path, metadata, "merges", str)]
            backend = _byte_level(vocabulary, merges, split, prefix)
        else:
            split, scores = "", _list(path, metadata, "scores", float, len(tokens))
            if (longest := max(map(len, tokens), default=0)) > MAX_PIECE:
                raise PretrainedError(
                    f"{path}: a token has {longest} characters, and of SentencePiece's none has "
                    f"more than {MAX_PIECE}; fetch the file again"
                )
            merges = _merges_of_scores(vocabulary, scores, types)
            backend = _sentencepiece(vocabulary, merges, ids.get("unk_token"), tokens, prefix)
    special = [t for t, k in zip(tokens, types, strict=True) if k in (CONTROL, UNKNOWN)]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    own = [t for t, k in zip(tokens, types, strict=True) if k == USER_DEFINED]
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in own])
    default = kind == "llama" or split == LLAMA3
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", default))
    template = metadata.get("tokenizer.chat_template")
    facts = [kind, split, prefix, tokens, types, merges]
    return Description(
        path,
        backend,
        hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        tuple(dict.fromkeys(i for i in ends if i is not None)),
        ids.get("bos_token"),
        add_bos and "bos_token" in ids,
        choose_template(template, f"{path}: tokenizer.chat_template"),
        {name: tokens[i] for name, i in ids.items()},
    )


def _type(token: str, kind: int, ends: bool) -> int:
    """A token's type: CONTROL where the converter took what bounds turns for a word.

    Two of three tell: how it looks, that it ends a text, that it is no ordinary piece.
    """
    looks = token in _ENDS or _CONTROL.fullmatch(token) is not None
    return CONTROL if looks + ends + (kind == USER_DEFINED) >= 2 else kind


def _list(
    path: pathlib.Path, metadata: Mapping[str, Any], key: str, kind: type, length: int | None = None
) -> list[Any]:
    """A list in the metadata, its elements of one `kind`, as many as there are tokens."""
    values = metadata.get(f"tokenizer.ggml.{key}")
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list) or not all(isinstance(v, kind) for v in values):
        raise PretrainedError(
            f"{path}: tokenizer.ggml.{key} is missing, or no list of {kind.__name__}; fetch the "
            "file again, or use the directory that it was made from"
        )
    if length is not None and len(values) != length:
        raise PretrainedError(
            f"{path}: tokenizer.ggml.{key} has {len(values)} entries for {length} tokens; fetch "
            "the file again"
        )
    return values


def _id(path: pathlib.Path, metadata: Mapping[str, Any], name: str, n: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is not None and not (isinstance(value, int) and 0 <= value < n):
        raise PretrainedError(
            f"{path}: tokenizer.ggml.{name}_token_id is {value!r}, of {n} tokens; fetch the file "
            "again"
        )
    return value


def _split_of(path: pathlib.Path, pre: Any) -> str:
    if not isinstance(pre, str) or pre not in SPLITS:
        raise PretrainedError(
            f"{path}: tokenizer.ggml.pre is {pre!r}; supported are {', '.join(SPLITS)}. Use the "
            "directory with tokenizer.json that the file was made from"
        )
    return SPLITS[pre]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _byte_level(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], split: str, prefix: bool
) -> tokenizers.Tokenizer:
    """Byte-level BPE; Llama 3 takes a word that is a token as it is, before any merge."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == LLAMA3)
    )
    if split in _PATTERNS:
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_PATTERNS[split]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ])  # fmt: skip
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if split == DIGITS else []
        words = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, words])
    if split == QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges_of_scores(
    vocabulary: dict[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """SentencePiece's order of merges: the pieces' scores, then the ids of the two parts."""
    pieces = {t for t, i in vocabulary.items() if types[i] in (NORMAL, UNUSED, USER_DEFINED)}
    merges = []
    for piece in pieces:
        for i in range(1, len(piece)):
            left, right = piece[:i], piece[i:]
            if left in pieces and right in pieces:
                order = -scores[vocabulary[piece]], vocabulary[piece], vocabulary[left]
                merges.append((*order, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _sentencepiece(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: int | None,
    tokens: Sequence[str], prefix: bool,
) -> tokenizers.Tokenizer:  # fmt: skip
    """BPE over characters, bytes where a character is no piece; "▁" stands for a space."""
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            fuse_unk=True,
            byte_fallback=True,
            unk_token=None if unknown is None else tokens[unknown],
        )
    )
    space = normalizers.Replace(" ", "▁")
    before: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, space])
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        *([decoders.Strip(" ", 1, 0)] if prefix else []),
    ])  # fmt: skip
    return backend

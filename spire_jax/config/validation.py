"""What cannot work together in a config: errors that name the key and the remedy, at once."""

import dataclasses
import json
import math
import pathlib
from typing import Any

from pallas_kernels.checks import GPU_HEAD_DIMS, MAX_TOKENS, unsupported_heads
from spire_jax.config.schema import (
    AUTOREGRESSIVE,
    BYTES,
    MAGICDEC,
    SNAPKV,
    SNAPKV_OBSERVED,
    ConfigError,
    DraftConfig,
    ExperimentConfig,
    ModelConfig,
    draft_model,
    oracle_depth,
    self_drafting,
)


def is_checkpoint(tokenizer: str) -> bool:
    """Whether `data.tokenizer` names a pretrained checkpoint, whose tokenizer it means."""
    path = pathlib.Path(tokenizer)
    return path.suffix == ".gguf" or path.is_dir()


def tokenizer_size(tokenizer: str) -> int:
    """Number of tokens, the separator included, known before any data is read."""
    if tokenizer == BYTES:
        return 257
    path, at = pathlib.Path(tokenizer), f"data.tokenizer={tokenizer!r}"
    if is_checkpoint(tokenizer):
        from spire_jax.pretrained.checkpoint import open_checkpoint  # jax: only where it is needed

        return open_checkpoint(path).model.n_tokens
    make = f"use {BYTES!r}, or make a file with python -m launch.train_tokenizer"
    _check(path.is_file(), f"{at} does not exist; {make}")
    try:
        ids = json.loads(path.read_text())["model"]["vocab"].values()
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(f"{at} is no BPE tokenizer of `tokenizers`; {make}") from None
    return max(ids) + 2


def validate(config: ExperimentConfig) -> None:
    """Raise ConfigError for sizes that cannot work together, before anything is compiled."""
    t, train, decode, ev = config.target, config.train, config.decode, config.eval
    _positive(t, "target", "n_layers d_model n_kv_heads q_per_kv d_head d_ff")
    _positive(train, "train", "steps batch_size seq_len k accumulate log_every attention_chunk")
    _positive(train, "train", "checkpoint_every checkpoints_kept peak_lr")
    _positive(decode, "decode", "k rounds_per_call chunk chunks_per_round")
    _check(all(k >= 1 for k in decode.depths),
           f"decode.depths={decode.depths} must all be 1 or more; () = decode.k alone")  # fmt: skip
    _positive(ev, "eval", "contexts output_length batch_size bootstrap timing_repeats heldout_rows")
    for key, value in (("target.max_len", t.max_len), ("target.window", t.window),
                       ("target.sink", t.sink), ("eval.examples", ev.examples),
                       ("seed", config.seed), ("data.workers", config.data.workers),
                       ("decode.temperature", decode.temperature), ("decode.top_k", decode.top_k),
                       ("eval.decoder_samples", ev.decoder_samples)):  # fmt: skip
        _check(value >= 0, f"{key}={value} is negative; use 0 or more")
    _check(math.isfinite(decode.temperature), f"decode.temperature={decode.temperature}: use a "
                                              f"finite one, or 0 for greedy")  # fmt: skip
    _check(t.d_head % 2 == 0, f"target.d_head={t.d_head} is odd; RoPE rotates pairs")
    heldout = config.data.heldout_percent
    _check(0 < heldout < 100, f"data.heldout_percent={heldout} must lie between 1 and 99")
    _choice("decode.verification", decode.verification, "token block")
    _choice("data.split", config.data.split, "file folder")
    _check(0 < decode.top_p <= 1, f"decode.top_p={decode.top_p} must lie in (0, 1]")
    _check(0 <= train.warmup_fraction < 1,
           f"train.warmup_fraction={train.warmup_fraction} must lie in [0, 1)")  # fmt: skip
    for key, dtype in (("train.dtype", train.dtype), ("decode.dtype", decode.dtype)):
        _check(dtype in ("float32", "bfloat16"), f"{key}={dtype!r}; use 'float32' or 'bfloat16'")
    _validate_attention(config)
    _check(train.batch_size % train.accumulate == 0,
           f"train.accumulate={train.accumulate} does not divide "
           f"train.batch_size={train.batch_size}")  # fmt: skip
    _check(bool(ev.context_lengths), "eval.context_lengths is empty; give at least one")
    _check(all(n >= 1 for n in ev.context_lengths), "eval.context_lengths must all be 1 or more")
    _validate_continuations(config)
    _validate_study(config)
    for name, draft in config.trained:
        _validate_draft(name, draft, config)
    _validate_magicdec(config)
    _validate_throughput(config)
    longest = max(ev.context_lengths) + ev.output_length + oracle_depth(config)
    _check(t.max_len == 0 or longest <= t.max_len,
           f"eval.context_lengths + eval.output_length + k = {longest} goes beyond "
           f"target.max_len={t.max_len}; shorten the context or the output")  # fmt: skip
    _check(t.max_len == 0 or train.seq_len <= t.max_len,
           f"train.seq_len={train.seq_len} goes beyond target.max_len={t.max_len}")  # fmt: skip
    for axis, size in dataclasses.asdict(config.mesh).items():
        _check(size == -1 or size >= 1, f"mesh.{axis}={size}; use 1 or more, or -1 for the rest")
    _check(list(dataclasses.asdict(config.mesh).values()).count(-1) <= 1,
           "mesh: at most one axis can be -1")  # fmt: skip


def _validate_attention(config: ExperimentConfig) -> None:
    """A kernel that is asked for by name must take every model's heads, and a round's tokens."""
    _choice("decode.products", config.decode.products, "auto xla")
    models = [("target", config.target)]
    models += [(f"drafts.{name}", draft_model(config.target, d)) for name, d in config.trained]
    for section, choice in (("train", config.train.attention), ("decode", config.decode.attention)):
        key = f"{section}.attention"
        _choice(key, choice, "auto xla tpu interpret" + " gpu" * (section == "decode"))
        if choice in ("auto", "xla"):
            continue
        if choice == "gpu":
            _check(config.decode.dtype == "bfloat16", f"{key}='gpu' takes decode.dtype='bfloat16'")
        for name, model in models:
            reason = unsupported_heads(model.d_head, model.q_per_kv)
            _check(not reason, f"{key}={choice!r}, {name}: {reason}; use 'auto' or 'xla'")
            _check(choice != "gpu" or model.d_head in GPU_HEAD_DIMS,
                   f"{key}='gpu', {name}: head dimension {model.d_head}: the kernel takes "
                   f"{', '.join(map(str, GPU_HEAD_DIMS))}")  # fmt: skip
        deepest = max(config.decode.k, *config.decode.depths, 0)
        _check(section == "train" or deepest < MAX_TOKENS,
               f"{key}={choice!r}: a round of decode.k={deepest} verifies more than the "
               f"kernel's {MAX_TOKENS} tokens; use 'auto', 'xla' or a smaller k")  # fmt: skip


def _validate_continuations(config: ExperimentConfig) -> None:
    at = config.continuations
    _check(config.pretrained.dtype in ("float32", "bfloat16"),
           f"pretrained.dtype={config.pretrained.dtype!r}: 'float32' or 'bfloat16'")  # fmt: skip
    _check(at.rows >= 0, f"continuations.rows={at.rows} is negative; use 0 for none")
    _positive(at, "continuations", "prompt batch_size")
    _check(0 <= at.temperature < math.inf,
           f"continuations.temperature={at.temperature} must be 0 or more, and finite")  # fmt: skip
    _check(0 < at.share < 1, f"continuations.share={at.share} must lie between 0 and 1, both "
                             f"excluded")  # fmt: skip
    _check(not at.rows or at.prompt < config.train.seq_len,
           f"continuations.prompt={at.prompt} leaves nothing of train.seq_len="
           f"{config.train.seq_len} to the target; lower it")  # fmt: skip
    longest = config.target.max_len
    _check(not (at.rows and longest) or config.train.seq_len + 1 <= longest,
           f"continuations of train.seq_len + 1 = {config.train.seq_len + 1} tokens go beyond "
           f"target.max_len={longest}")  # fmt: skip


def _validate_draft(name: str, draft: DraftConfig, config: ExperimentConfig) -> None:
    at, target, train = f"drafts.{name}", config.target, config.train
    _check(name.replace("_", "").replace("-", "").isalnum(), f"{at}: use letters, digits, _ and -")
    _check(name != AUTOREGRESSIVE, f"{at}: the name means decoding without a draft; rename it")
    _choice(f"{at}.kind", draft.kind, "spire vanilla")
    _choice(f"{at}.init", draft.init, "pruned random")
    _choice(f"{at}.loss", draft.loss, "hard distillation mixed")
    _positive(draft, at, "n_layers")
    _check(0 <= draft.omega <= 1, f"{at}.omega={draft.omega} must lie in [0, 1]")
    _check(0 < draft.memory_init < 1, f"{at}.memory_init={draft.memory_init} must lie in (0, 1)")
    _choice(f"{at}.memory", draft.memory, "layers final embedding")
    _check(draft.window >= 0, f"{at}.window={draft.window} is under 1; the window counts the query "
                              f"itself (0 = dense)")  # fmt: skip
    for key in ("k", "seed", "steps", "peak_lr"):
        _check(getattr(draft, key) >= 0, f"{at}.{key}={getattr(draft, key)} is negative")
    _check(draft.sink >= 0, f"{at}.sink={draft.sink} is negative")
    shortest = min(config.eval.context_lengths)
    _check(not draft.window or draft.sink <= shortest,
           f"{at}.sink={draft.sink} is longer than the shortest context "
           f"(eval.context_lengths: {shortest})")  # fmt: skip
    model = draft_model(target, draft)
    _check(0 <= draft.head_tokens < target.n_tokens,
           f"{at}.head_tokens={draft.head_tokens} must lie between 1 and the target's "
           f"{target.n_tokens} tokens, or be 0 (all of them)")  # fmt: skip
    _check(not draft.head_tokens or draft.loss != "hard",
           f"{at}: a head of {draft.head_tokens} tokens cannot learn the hard target, which may be "
           f"any token; use loss='mixed' or 'distillation'")  # fmt: skip
    _check(not draft.share_embedding or model.d_model == target.d_model,
           f"{at}.share_embedding: the draft's d_model={model.d_model} is not the target's "
           f"{target.d_model}")  # fmt: skip
    if draft.init == "pruned" or draft.kind == "spire":
        why = "reads the target's activations" if draft.kind == "spire" else "is pruned from it"
        _check(draft.n_layers <= target.n_layers,
               f"{at}.n_layers={draft.n_layers} is deeper than the target "
               f"({target.n_layers}), but the draft {why}")  # fmt: skip
        for size in ("d_model",) if draft.init != "pruned" else (
            "d_model", "n_kv_heads", "q_per_kv", "d_head", "d_ff"):  # fmt: skip
            mine, its = getattr(model, size), getattr(target, size)
            _check(mine == its,
                   f"{at}.{size}={mine} differs from target.{size}={its}, but the draft {why}; "
                   f"use 0 (as the target)")  # fmt: skip
    if draft.kind == "spire":
        key, k = (f"{at}.k", draft.k) if draft.k else ("train.k", train.k)
        _check(train.seq_len % k == 0,
               f"{key}={k} does not divide train.seq_len={train.seq_len}")  # fmt: skip
        _check(train.seq_len > draft.sink, f"{at}.sink={draft.sink} fills train.seq_len")


def _validate_magicdec(config: ExperimentConfig) -> None:
    at, target = config.magicdec, config.target
    for name in (MAGICDEC, SNAPKV):
        _check(name not in dict(config.drafts),
               f"drafts.{name}: the name means the target as its own draft (section {MAGICDEC}); "
               f"rename it")  # fmt: skip
    _positive(at, MAGICDEC, "window")
    _check(at.sink >= 0, f"{MAGICDEC}.sink={at.sink} is negative")
    if not self_drafting(config):
        return
    _check(not at.snapkv or at.sink + at.window > SNAPKV_OBSERVED,
           f"{MAGICDEC}.snapkv keeps the last {SNAPKV_OBSERVED} tokens anyway: sink + window = "
           f"{at.sink + at.window} must be more")  # fmt: skip
    k = max(oracle_depth(config), *config.decode.depths, 0)
    longest = max(config.eval.context_lengths)
    _check(at.window > k, f"{MAGICDEC}.window={at.window} must be above k = {k}: the drafted "
                          f"tokens stay visible")  # fmt: skip
    _check(at.sink + at.window <= longest,
           f"{MAGICDEC}: a budget of sink + window = {at.sink + at.window} is larger than the "
           f"longest context ({longest}); lower {MAGICDEC}.window")  # fmt: skip
    _check(not target.window,
           f"{MAGICDEC}.evaluate: the target has a window of its own (target.window="
           f"{target.window}); use 0, a dense cache")  # fmt: skip


def _validate_study(config: ExperimentConfig) -> None:
    at = config.study
    if not at.of:
        return
    _check(at.of in dict(config.drafts), f"study.of={at.of!r} is no draft; there are "
                                         f"{[name for name, _ in config.drafts]}")  # fmt: skip
    kind = config.draft(at.of).kind
    _check(kind == "spire", f"study.of={at.of!r} is of kind {kind!r}; name a 'spire' draft")
    _positive(at, "study", "seeds context_length contexts detectable")
    for k in at.trained_k:
        _check(k >= 1 and config.train.seq_len % k == 0,
               f"study.trained_k={at.trained_k}: {k} does not divide train.seq_len="
               f"{config.train.seq_len}")  # fmt: skip


def _validate_throughput(config: ExperimentConfig) -> None:
    at = config.throughput
    _choice("throughput.chip", at.chip, "v5e v5p v6e v7x h100 h200 b200")
    _choice("throughput.variant", at.variant, "paper fixed_window per_operator with_head")
    _positive(at, "throughput", "hoi batch_size context_length weight_bytes cache_bytes")
    _positive(at, "throughput", "decode_to_train")
    widths = "use 1 (FP8, INT8) or 2 (bf16)"
    _check(at.compute_bytes in (1, 2), f"throughput.compute_bytes={at.compute_bytes}; {widths}")
    for key in ("batch_sizes", "context_lengths"):
        sizes = getattr(at, key)
        _check(bool(sizes), f"throughput.{key} is empty; give at least one")
        _check(all(n >= 1 for n in sizes), f"throughput.{key}={sizes} must all be 1 or more")
    for key in ("tau_vanilla", "tau_magicdec", "tau_spire"):
        tau, most = getattr(at, key), config.decode.k + 1
        _check(tau == 0 or 1 <= tau <= most,
               f"throughput.{key}={tau} must lie between 1 and decode.k + 1 = {most}, "
               f"or be 0 (not given)")  # fmt: skip


def with_vocabulary(config: ExperimentConfig) -> ModelConfig:
    tokens = config.target.n_tokens or tokenizer_size(config.data.tokenizer)
    size = config.target.vocab_size or -(-tokens // 8) * 8
    _check(size >= tokens, f"target.vocab_size={size} is under the data's {tokens} tokens; use "
                           f"{tokens} or more, or 0 for the smallest that fits")  # fmt: skip
    return dataclasses.replace(config.target, vocab_size=size, n_tokens=tokens)


def _check(good: bool, message: str) -> None:
    if not good:
        raise ConfigError(message)


def _choice(key: str, value: str, choices: str) -> None:
    _check(value in choices.split(), f"{key}={value!r}; choose from {choices.split()}")


def _positive(section: Any, name: str, keys: str) -> None:
    for key in keys.split():
        value = getattr(section, key)
        _check(value > 0, f"{name}.{key}={value} must be above 0")

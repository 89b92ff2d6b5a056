"""Configuration: frozen dataclasses, what they imply, and what cannot work together.

Dimension letters, for the whole library (a name like ``logits_BxTxV`` shows its shape):

    B  batch rows (sequences in training, requests in decoding)
    T  query tokens of one call            S  key slots (a sequence, or a cache)
    L  sequence or context length          J  speculation depths, 1 .. k
    R  rollout starts (blocks of k tokens) N  layers
    D  d_model                             F  d_ff
    K  KV heads                            G  query heads per KV head
    H  d_head                              V  vocabulary, padded
    P  slots of a ring cache: sink + window + k

A config file in ``configs/`` names only what differs from the defaults below. Everything can
be overridden on the command line: ``--config.train.steps=100``. Sizes of 0 in a draft mean "as
the target". Fields marked ``_free`` do not change what is computed, only how it is run or
shown, and stay out of the hashes that identify a stage.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

BYTES = "bytes"  # the tokenizer that needs no file
# Methods that no draft is trained for.
AUTOREGRESSIVE, MAGICDEC, SNAPKV = "autoregressive", "magicdec", "snapkv"
SNAPKV_OBSERVED = 32  # the last tokens of a prompt: SnapKV keeps them and asks them for the others


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the key and the remedy."""


def _free(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"identity": False})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"  # "stdlib": Python's own source files; otherwise a folder of text
    tokenizer: str = BYTES  # bytes 0..255 and a separator, 256; or a file of `tokenizers`
    heldout_percent: int = 10  # share held out, by a hash of the relative path
    split: str = "file"  # what is held out: single files, or folders at the top as a whole
    workers: int = _free(0)  # threads that read ahead; 0 = Grain's default


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer (method.md section 2)."""

    n_layers: int = 8
    d_model: int = 512
    n_kv_heads: int = 8
    q_per_kv: int = 1
    d_head: int = 128
    d_ff: int = 4096
    vocab_size: int = 0  # padded size; 0 = the tokenizer's, rounded up to a multiple of 8
    n_tokens: int = 0  # valid tokens, set from the tokenizer; the rest of V is -inf
    max_len: int = 0  # longest position + 1; 0 = no limit beyond memory (RoPE has none)
    window: int = 0  # visible keys, the query included; 0 = all earlier ones
    sink: int = 0  # first positions that stay visible beyond the window
    tied: bool = False  # unembedding = embedding transposed
    qkv_bias: bool = False
    qk_norm: bool = False
    scale_in_init: bool = True  # 1/sqrt(d_head) in the query's initializer, not in attention
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: float = 1.0  # Llama 3's rope scaling factor; 1 = none
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_len: int = 8192


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """One draft model and how it is trained."""

    kind: str = "spire"  # "spire" (feedback memory) or "vanilla" (a plain transformer)
    n_layers: int = 2
    d_model: int = 0  # sizes of 0: as the target
    n_kv_heads: int = 0
    q_per_kv: int = 0
    d_head: int = 0
    d_ff: int = 0
    window: int = 64  # 0 = dense cache (vanilla only)
    sink: int = 1
    init: str = "pruned"  # "pruned": the target's last n_layers blocks; "random"
    loss: str = "mixed"  # "hard", "distillation" or "mixed"
    omega: float = 0.5  # weight of distillation in the mixed loss
    attend_self: bool = True  # spire: also attend to the token's own layer input
    feedback: bool = True  # spire: memories mix all layers; False: each layer's own input
    memory: str = "layers"  # spire: what the memories of tokens the target has processed are:
    # "layers": the target's activations, layer by layer; "final": its last one for all layers,
    # with one mix for all; "embedding": none of it, the draft's own embeddings of the tokens
    memory_init: float = 0.95  # spire: initial softmax weight of the layer's own input
    k: int = 0  # spire: rollout depth in training; 0 = train.k
    seed: int = 0  # another order of the batches, and another random initialization
    of: str = _free("")  # the draft that this one is an ablation of
    steps: int = 0  # 0 = train.steps
    peak_lr: float = 0.0  # 0 = train.peak_lr


@dataclasses.dataclass(frozen=True)
class MagicDecConfig:
    """The target as its own draft, reading a sparse cache (method.md 3.5); nothing is trained."""

    evaluate: bool = False  # beside the drafts; its modeled throughput is always at hand
    snapkv: bool = False  # and the selection of SnapKV, of as many tokens: sink + window
    window: int = 64
    sink: int = 1


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What is compared with one draft, on the same batches and samples (ablations.py)."""

    of: str = ""  # the draft that is studied; "" = no study
    ablations: str = "all"  # comma-separated names of ablations.py, "all" or ""
    trained_k: tuple[int, ...] = (8, 16)  # rollout depths to train it at, besides its own
    seeds: int = 3  # orders of the batches, the first one the base's own
    seeded: str = "distillation_only,no_feedback"  # trained with every seed, as the draft itself
    context_length: int = 256
    contexts: int = 256
    detectable: int = 64  # contexts of a pilot from which the smallest detectable effect follows


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    batch_size: int = 16  # sequences per step, over all devices
    seq_len: int = 1024
    k: int = 4  # rollout depth of spire drafts; divides seq_len
    peak_lr: float = 3e-3
    warmup_fraction: float = 0.1
    final_lr_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    dtype: str = "float32"  # compute type; parameters and logits stay float32
    accumulate: int = 1  # micro-batches per step
    remat: bool = _free(False)  # recompute each layer in the backward pass
    attention_chunk: int = _free(128)  # queries per chunk of the XLA attention
    log_every: int = _free(10)
    checkpoint_every: int = _free(100)
    checkpoints_kept: int = _free(2)


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    k: int = 4  # drafted tokens per round
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    verification: str = "token"  # "token" by token, or a "block" at once
    stop_at_eos: bool = False  # the paper's evaluation ignores the end of sequence
    dtype: str = "float32"
    rounds_per_call: int = _free(64)  # rounds before the loop returns to the host


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    contexts: int = 64  # held-out contexts
    context_lengths: tuple[int, ...] = (256, 512, 960)
    output_length: int = 64
    batch_size: int = 16
    heldout_rows: int = 512  # rows of train.seq_len for the held-out loss
    decoder_samples: int = 1  # decoded samples per context, beside the oracle
    bootstrap: int = 2000
    timing_repeats: int = 3  # alternating autoregressive and speculative runs
    examples: int = 3  # generated texts shown in the report


@dataclasses.dataclass(frozen=True)
class ThroughputConfig:
    """The modeled multiplier (method.md section 5); byte widths are bytes per element."""

    chip: str = "h100"  # the chip that the report's headline uses
    hoi: float = 600.0  # peak FLOP/s over bytes/s of the paper's figures
    variant: str = "paper"  # "paper", "fixed_window", "per_operator" or "with_head"
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    context_lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    batch_size: int = 64  # the report's headline point
    context_length: int = 512
    decode_to_train: float = 10.0  # decoding to come, in units of the target's training
    training_cost_spire: float = 0.0  # training SPIRe, in the same units; 0 = by its FLOPs
    weight_bytes: float = 1.0
    cache_bytes: float = 1.0
    compute_bytes: float = 1.0  # the width whose peak FLOP/s counts: 1 = FP8/INT8, 2 = bf16
    # Acceptance lengths to use when none were measured; 0 = not given.
    tau_vanilla: float = 0.0
    tau_magicdec: float = 0.0
    tau_spire: float = 0.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (at most one) takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    data: DataConfig = DataConfig()
    target: ModelConfig = ModelConfig()
    drafts: tuple[tuple[str, DraftConfig], ...] = ()  # (name, draft), sorted by name
    magicdec: MagicDecConfig = MagicDecConfig()
    study: StudyConfig = StudyConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()
    eval: EvalConfig = EvalConfig()
    throughput: ThroughputConfig = ThroughputConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0
    variants: tuple[tuple[str, DraftConfig], ...] = ()  # the study's, made from its names

    def draft(self, name: str) -> DraftConfig:
        """The draft or variant called `name`; ConfigError lists those that exist."""
        trained = dict(self.trained)
        if name not in trained:
            raise ConfigError(f"no draft named {name!r}; drafts: {list(trained)}")
        return trained[name]

    @property
    def trained(self) -> tuple[tuple[str, DraftConfig], ...]:
        """Everything that is trained on the target: the drafts, and the study's variants."""
        return self.drafts + self.variants


# --- sizes derived from a config ---------------------------------------------------------------


def draft_model(target: ModelConfig, draft: DraftConfig) -> ModelConfig:
    """The draft's transformer: the target's conventions, the draft's sizes and mask."""
    sizes = ("d_model", "n_kv_heads", "q_per_kv", "d_head", "d_ff")
    return dataclasses.replace(
        target,
        n_layers=draft.n_layers,
        window=draft.window,
        sink=draft.sink if draft.window else 0,
        **{s: getattr(draft, s) or getattr(target, s) for s in sizes},
    )


def oracle_depth(config: ExperimentConfig) -> int:
    """Depths that the oracle follows: those trained, and those that the decoder uses."""
    return max(config.train.k, config.decode.k, *(draft.k for _, draft in config.drafts), 0)


def self_drafting(config: ExperimentConfig) -> tuple[str, ...]:
    """The methods to evaluate that draft with the target itself."""
    at = config.magicdec
    return (MAGICDEC,) * at.evaluate + (SNAPKV,) * at.snapkv


def trained_depth(config: ExperimentConfig, name: str) -> int:
    """Depths at which a draft (or the target itself, untrained) has learned to predict."""
    return (0 if name in (MAGICDEC, SNAPKV) else config.draft(name).k) or config.train.k


def body_parameters(model: ModelConfig) -> int:
    """Parameters without embedding, unembedding and final norm (method.md section 1)."""
    heads = model.n_kv_heads * model.q_per_kv
    attention = model.d_model * model.d_head * (2 * heads + 2 * model.n_kv_heads)
    if model.qkv_bias:
        attention += model.d_head * (heads + 2 * model.n_kv_heads)
    if model.qk_norm:
        attention += 2 * model.d_head
    return model.n_layers * (attention + 3 * model.d_model * model.d_ff + 2 * model.d_model)


# --- identity -----------------------------------------------------------------------------------


def as_dict(config: Any) -> dict[str, Any]:
    """One dataclass and those inside it as dicts; tuples stay tuples."""
    return {
        f.name: as_dict(v) if dataclasses.is_dataclass(v := getattr(config, f.name)) else v
        for f in dataclasses.fields(config)
    }


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain dicts, lists and scalars, ready for JSON."""
    values = as_dict(config)
    if isinstance(config, ExperimentConfig):
        values["drafts"] = {name: as_dict(draft) for name, draft in config.drafts}
        values["variants"] = {name: as_dict(draft) for name, draft in config.variants}
    return json.loads(json.dumps(values))


def identity(*parts: Any) -> dict[str, Any]:
    """The values of dataclasses (less their free fields) and plain mappings, as one dict."""
    values: dict[str, Any] = {}
    for part in parts:
        if dataclasses.is_dataclass(part):
            used = [f for f in dataclasses.fields(part) if f.metadata.get("identity", True)]
            part = {f.name: getattr(part, f.name) for f in used}
        values.update(part)
    return json.loads(json.dumps(values, sort_keys=True))


def digest(values: Any) -> str:
    """Sixteen hex digits that identify JSON-able values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- validation --------------------------------------------------------------------------------


def tokenizer_size(tokenizer: str) -> int:
    """Number of tokens, the separator included, known before any data is read."""
    if tokenizer == BYTES:
        return 257
    path, at = pathlib.Path(tokenizer), f"data.tokenizer={tokenizer!r}"
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
    _positive(decode, "decode", "k rounds_per_call")
    _positive(ev, "eval", "contexts output_length batch_size bootstrap timing_repeats heldout_rows")
    for key, value in (("target.max_len", t.max_len), ("target.window", t.window),
                       ("target.sink", t.sink), ("eval.examples", ev.examples),
                       ("seed", config.seed), ("data.workers", config.data.workers),
                       ("decode.temperature", decode.temperature), ("decode.top_k", decode.top_k),
                       ("eval.decoder_samples", ev.decoder_samples)):  # fmt: skip
        _check(value >= 0, f"{key}={value} is negative; use 0 or more")
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
    _check(train.batch_size % train.accumulate == 0,
           f"train.accumulate={train.accumulate} does not divide "
           f"train.batch_size={train.batch_size}")  # fmt: skip
    _check(bool(ev.context_lengths), "eval.context_lengths is empty; give at least one")
    _check(all(n >= 1 for n in ev.context_lengths), "eval.context_lengths must all be 1 or more")
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
    k, longest = oracle_depth(config), max(config.eval.context_lengths)
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

"""Configuration: frozen dataclasses, and what follows from their values.

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
from typing import Any

BYTES = "bytes"  # the tokenizer that needs no file
# Methods that no draft is trained for.
AUTOREGRESSIVE, MAGICDEC, SNAPKV = "autoregressive", "magicdec", "snapkv"
SNAPKV_OBSERVED = 32  # the last tokens of a prompt: SnapKV keeps them and asks them for the others


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the key and the remedy."""


def _free(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"identity": False})


def _added(default: Any) -> Any:
    """A field that came later: at its default it is left out of hashes, so that what was trained
    before it existed is still what the config asks for."""
    return dataclasses.field(default=default, metadata={"added": True})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"  # "stdlib": Python's own source files; otherwise a folder of text, or
    # of token arrays (train.zarr, heldout.zarr), or one array; of arrays also a gs:// or s3:// URL
    tokenizer: str = BYTES  # bytes 0..255 and a separator, 256; a file of `tokenizers`; a GGUF
    # file or a folder with tokenizer.json. With a pretrained target: the target's, whatever is here
    heldout_percent: int = 10  # share held out, by a hash of the relative path
    split: str = "file"  # what is held out: single files, or folders at the top as a whole
    heldout_source: str = ""  # an array of held-out rows; "" = beside the training rows, or some
    # of them
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
    head_tokens: int = _added(0)  # tokens that the unembedding covers; 0 = all (a draft's only)
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
class PretrainedConfig:
    """A target that somebody else trained; the section `target` and the tokenizer are then its."""

    path: str = ""  # a GGUF file, or a folder with config.json and safetensors; "" = none
    dtype: str = "float32"  # in which its matrices are held while drafts are trained


@dataclasses.dataclass(frozen=True)
class ContinuationsConfig:
    """Training rows that the target writes itself, from the beginnings of training documents."""

    rows: int = 0  # of train.seq_len tokens; 0 = none
    prompt: int = 64  # tokens at the start of each that are the document's own
    share: float = 0.5  # of the rows that drafts see; the others are text
    temperature: float = 1.0
    batch_size: int = 16  # rows that are written at a time


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
    share_embedding: bool = _added(False)  # the frozen target's own: neither trained nor stored
    head_tokens: int = _added(0)  # unembed these many most frequent tokens alone; 0 = all
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
    attention: str = _free("auto")  # "xla"; "tpu", the Pallas kernels; "auto": these on a TPU
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
    attention: str = _free("auto")  # as train.attention; "gpu", the kernel for Hopper (bfloat16)
    products: str = _free("auto")  # "auto": on CPUs the kernel for a few rows (few_rows); "xla"
    rounds_per_call: int = _free(64)  # rounds before the loop returns to the host
    # python -m spire_jax.decode: depths to choose k among, round by round; () = k alone
    depths: tuple[int, ...] = _free(())
    chunk: int = _free(128)  # prompt tokens that are read at once
    chunks_per_round: int = _free(1)  # ... between two rounds of the rows that decode


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
    pretrained: PretrainedConfig = PretrainedConfig()
    continuations: ContinuationsConfig = ContinuationsConfig()
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
    """The draft's transformer: the target's conventions, the draft's sizes and mask.

    A trimmed head is a matrix of its own, whether or not the target's is tied.
    """
    sizes = ("d_model", "n_kv_heads", "q_per_kv", "d_head", "d_ff")
    return dataclasses.replace(
        target,
        n_layers=draft.n_layers,
        tied=target.tied and not draft.head_tokens,
        head_tokens=draft.head_tokens,
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


def head_size(model: ModelConfig) -> int:
    """Tokens that the unembedding computes logits of, padding included."""
    return model.head_tokens or model.vocab_size


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
            part = {
                f.name: value
                for f in dataclasses.fields(part)
                if f.metadata.get("identity", True)
                and not ((value := getattr(part, f.name)) == f.default and "added" in f.metadata)
            }
        values.update(part)
    return json.loads(json.dumps(values, sort_keys=True))


def digest(values: Any) -> str:
    """Sixteen hex digits that identify JSON-able values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

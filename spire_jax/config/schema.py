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
be overridden on the command line: ``--config.train.steps=100``.

Every field says which stages read it, by `read_by`, or leaves it to its section. By this alone
stages are identified (identity.py): what no stage reads changes only how something is run or shown.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

from spire_jax.config.checks import ConfigError, check, not_negative, positive
from spire_jax.config.drafts import DraftOptions, TrainedOptions
from spire_jax.config.readers import (
    CONTINUATIONS,
    DRAFT,
    EVALUATE,
    PRETRAINED,
    REPORT,
    STUDY,
    TARGET,
    read_by,
)
from spire_jax.config.registry import below

if TYPE_CHECKING:  # what a model is made of is below this folder
    from spire_jax.models.masks import View
    from spire_jax.models.transformer import Transformer

BYTES = "bytes"  # the tokenizer that needs no file
AUTOREGRESSIVE = "autoregressive"  # the method without a draft
MOST_LAYERS = 1000


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
    # What a chunk of an array is that no file holds: an "error", or "fill": the fill value, which
    # its writer left out
    missing_chunks: str = read_by("error")
    workers: int = read_by(0)  # threads that read ahead; 0 = Grain's default


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer (method.md section 2); other families add their own fields."""

    family: str = "llama"  # models/families, or one of a module in `plugins`
    n_layers: int = 8
    d_model: int = 512
    n_kv_heads: int = 8
    q_per_kv: int = 1
    d_head: int = 128
    d_ff: int = 4096
    vocab_size: int = 0  # padded size; 0 = the tokenizer's, rounded up to a multiple of 8
    n_tokens: int = 0  # valid tokens, set from the tokenizer; the rest of V is -inf
    max_len: int = 0  # longest position + 1; 0 = no limit beyond memory (RoPE has none)
    # The target's own mask; what a draft keeps is its own option.
    window: int = 0  # visible keys, the query included; 0 = all earlier ones
    sink: int = 0  # first positions that stay visible beyond the window
    tied: bool = False  # unembedding = embedding transposed
    head_tokens: int = 0  # tokens that the unembedding covers; 0 = all (a draft's only)
    qkv_bias: bool = False
    qk_norm: bool = False
    scale_in_init: bool = True  # 1/sqrt(d_head) in the query's initializer, not in attention
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: float = 1.0  # Llama 3's rope scaling factor; 1 = none
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_len: int = 8192

    def views(self) -> tuple["View", ...]:
        """What each layer sees of a text."""
        return _views(self)

    def module(self) -> type["Transformer"]:
        """The module that has these sizes."""
        return below("models.transformer").Transformer

    def body_parameters(self) -> int:
        """Parameters without embedding, unembedding and final norm (method.md section 1)."""
        heads = self.n_kv_heads * self.q_per_kv
        attention = self.d_model * self.d_head * (2 * heads + 2 * self.n_kv_heads)
        if self.qkv_bias:
            attention += self.d_head * (heads + 2 * self.n_kv_heads)
        if self.qk_norm:
            attention += 2 * self.d_head
        return self.n_layers * (attention + 3 * self.d_model * self.d_ff + 2 * self.d_model)

    def cache_row(self) -> int:
        """Numbers that are cached of one token: its keys and values over all layers."""
        return 2 * self.n_layers * self.n_kv_heads * self.d_head

    def check(self, at: str, config: "ExperimentConfig") -> None:
        """ConfigError for sizes that no model can have; `at` is where they stand."""
        positive(self, at, "n_layers d_model n_kv_heads q_per_kv d_head d_ff")
        positive(self, at, "rope_base rope_scaling rope_low_freq_factor rope_original_len")
        not_negative(self, at, "max_len window sink vocab_size n_tokens head_tokens norm_eps")
        check(self.n_layers <= MOST_LAYERS, f"{at}.n_layers={self.n_layers} is deeper than any "
                                            f"model; use {MOST_LAYERS} or fewer")  # fmt: skip
        check(self.rope_high_freq_factor > self.rope_low_freq_factor,
              f"{at}.rope_high_freq_factor={self.rope_high_freq_factor} must be above "
              f"{at}.rope_low_freq_factor={self.rope_low_freq_factor}")  # fmt: skip
        check(self.d_head % 2 == 0, f"{at}.d_head={self.d_head} is odd; RoPE rotates pairs")


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """A target that somebody else trained; the section `target` and the tokenizer are then its."""

    path: str = ""  # a GGUF file, or a folder with config.json and safetensors; "" = none
    dtype: str = "float32"  # in which its matrices are held while drafts are trained


@dataclasses.dataclass(frozen=True)
class ContinuationsConfig:
    """Training rows that the target writes itself, from the beginnings of training documents."""

    rows: int = 0  # of train.seq_len tokens; 0 = none
    prompt: int = 64  # tokens at the start of each that are the document's own, after the begin
    # token where the tokenizer has one: that is one of them
    # Of the rows that drafts see; the others are text.
    share: float = read_by(0.5, DRAFT, when=lambda at: at.rows)
    temperature: float = 1.0
    batch_size: int = read_by(16)  # rows that are written at a time


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What is compared with one draft, on the same batches and samples (variants.py)."""

    of: str = ""  # the draft that is studied; "" = no study
    ablations: str = "all"  # comma-separated names of variants.py, "all" or ""
    trained_k: tuple[int, ...] = (8, 16)  # rollout depths to train it at, besides its own
    seeds: int = 3  # orders of the batches, the first one the base's own
    seeded: str = "distillation_only,no_feedback"  # trained with every seed, as the draft itself
    context_length: int = 256
    contexts: int = 256
    detectable: int = 64  # contexts of a pilot from which the smallest detectable effect follows


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = read_by(1000, TARGET)
    batch_size: int = 16  # sequences per step, over all devices
    seq_len: int = read_by(1024, TARGET, DRAFT, CONTINUATIONS, EVALUATE)
    # Depth of drafts' rollouts, which divides seq_len; the oracle follows at least as many.
    k: int = read_by(4, EVALUATE, STUDY)
    peak_lr: float = read_by(3e-3, TARGET)
    warmup_fraction: float = 0.1
    final_lr_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    dtype: str = "float32"  # compute type; parameters and logits stay float32
    accumulate: int = 1  # micro-batches per step
    remat: bool = read_by(False)  # recompute each layer in the backward pass
    attention_chunk: int = read_by(128)  # queries per chunk of the XLA attention
    attention: str = read_by("auto")  # "xla"; "tpu", the Pallas kernels; "auto": these on a TPU
    log_every: int = read_by(10)
    checkpoint_every: int = read_by(100)
    checkpoints_kept: int = read_by(2)


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    k: int = 4  # drafted tokens per round
    temperature: float = 1.0  # 0 = greedy, as are all below 1e-5
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    verification: str = "token"  # "token" by token, or a "block" at once
    stop_at_eos: bool = False  # the paper's evaluation ignores the end of sequence
    dtype: str = read_by("float32", CONTINUATIONS, EVALUATE, STUDY)
    attention: str = read_by("auto")  # as train.attention; "gpu", the kernel for Hopper (bfloat16)
    products: str = read_by("auto")  # "auto": on CPUs the kernel for a few rows (few_rows); "xla"
    rounds_per_call: int = read_by(64)  # rounds before the loop returns to the host
    # python -m spire_jax.decode: depths to choose k among, round by round, or, of a draft with
    # `confidence`, how many tokens of each request are verified; () = k alone
    depths: tuple[int, ...] = read_by(())
    chunk: int = read_by(128)  # prompt tokens that are read at once
    chunks_per_round: int = read_by(1)  # ... between two rounds of the rows that decode


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    contexts: int = 64  # held-out contexts
    context_lengths: tuple[int, ...] = (256, 512, 960)
    output_length: int = read_by(64, EVALUATE, STUDY)
    batch_size: int = read_by(16, EVALUATE, STUDY)
    heldout_rows: int = 512  # rows of train.seq_len for the held-out loss
    decoder_samples: int = 1  # decoded samples per context, beside the oracle
    bootstrap: int = read_by(2000, REPORT, STUDY)
    timing_repeats: int = 3  # alternating autoregressive and speculative runs
    examples: int = 3  # generated texts shown in the report


@dataclasses.dataclass(frozen=True)
class ThroughputConfig:
    """The modeled multiplier (method.md section 5); byte widths are bytes per element."""

    chip: str = "h100"  # the chip that the report's headline uses (costs/chips.py)
    hoi: float = 600.0  # peak FLOP/s over bytes/s of the paper's figures
    variant: str = "paper"  # of the cost model: VARIANTS of costs/roofline.py
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    context_lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    batch_size: int = 64  # the report's headline point
    context_length: int = 512
    # Decoding to come, in units of the target's training; and by name, what training a draft costs
    # in the same units; 0 = by its FLOPs.
    decode_to_train: float = read_by(10.0)
    training_cost: tuple[tuple[str, float], ...] = read_by(())
    weight_bytes: float = 1.0
    cache_bytes: float = 1.0
    compute_bytes: float = 1.0  # the width whose peak FLOP/s counts: 1 = FP8/INT8, 2 = bf16
    launch_us: float = 0.0  # microseconds that every pass takes besides, the target's too
    # By name, acceptance lengths to use when none were measured; 0 = not given.
    tau: tuple[tuple[str, float], ...] = read_by(())


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (at most one) takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """All of it. A section's readers are those of the fields in it that name none themselves."""

    plugins: tuple[str, ...] = read_by(())  # modules to import first: they register kinds
    data: DataConfig = read_by(DataConfig(), TARGET, CONTINUATIONS, DRAFT, EVALUATE, STUDY)
    target: ModelConfig = read_by(ModelConfig(), TARGET, PRETRAINED)
    pretrained: PretrainedConfig = read_by(PretrainedConfig(), PRETRAINED)
    continuations: ContinuationsConfig = read_by(ContinuationsConfig(), CONTINUATIONS)
    drafts: tuple[tuple[str, DraftOptions], ...] = ()  # (name, draft), sorted by name
    study: StudyConfig = read_by(StudyConfig(), STUDY)
    train: TrainConfig = read_by(TrainConfig(), TARGET, DRAFT)
    decode: DecodeConfig = read_by(DecodeConfig(), EVALUATE, STUDY)
    eval: EvalConfig = read_by(EvalConfig(), EVALUATE)
    throughput: ThroughputConfig = read_by(ThroughputConfig(), REPORT, STUDY)
    mesh: MeshConfig = read_by(MeshConfig())
    seed: int = read_by(0, TARGET, CONTINUATIONS, DRAFT, EVALUATE, STUDY)  # 0 to 2**64 - 1
    variants: tuple[tuple[str, DraftOptions], ...] = ()  # the study's, made from its names

    def draft(self, name: str) -> DraftOptions:
        """The draft or variant called `name`; ConfigError lists those that exist."""
        known = dict(self.drafts + self.variants)
        if name not in known:
            raise ConfigError(f"no draft named {name!r}; drafts: {list(known)}")
        return known[name]

    @property
    def trained(self) -> dict[str, TrainedOptions]:
        """Everything that is trained on the target, of the drafts and the study's variants."""
        return {name: draft for name, draft in self.drafts + self.variants
                if isinstance(draft, TrainedOptions) and not draft.weights_of}  # fmt: skip

    def weights(self, name: str) -> str:
        """The draft whose trained parameters a draft uses, itself or another; "": the target's."""
        draft = dict(self.drafts + self.variants).get(name)
        return draft.weights_of or name if isinstance(draft, TrainedOptions) else ""


# --- sizes derived from a config ---------------------------------------------------------------


def oracle_depth(config: ExperimentConfig) -> int:
    """Depths that the oracle follows: those trained, and those that the decoder uses."""
    trained = (draft.rollout(config.train) for _, draft in config.drafts)
    return max(config.train.k, config.decode.k, *trained, 0)


@functools.lru_cache(64)
def _views(model: ModelConfig) -> tuple["View", ...]:
    scale = 1.0 if model.scale_in_init else model.d_head**-0.5
    return (below("models.masks").View(model.window, model.sink, scale),) * model.n_layers


def head_size(model: ModelConfig) -> int:
    """Tokens that the unembedding computes logits of, padding included."""
    return model.head_tokens or model.vocab_size

"""What cannot work together in a config: errors that name the key and the remedy, at once."""

import dataclasses
import math
import pathlib

from pallas_kernels.checks import GPU_HEAD_DIMS, MAX_TOKENS, unsupported_heads
from spire_jax.config.checks import ConfigError, check, choice, not_negative, positive, share
from spire_jax.config.drafts import DraftOptions, check_warm_up
from spire_jax.config.readers import STAGES
from spire_jax.config.registry import below
from spire_jax.config.schema import (
    AUTOREGRESSIVE,
    BYTES,
    ExperimentConfig,
    ModelConfig,
    oracle_depth,
)
from spire_jax.config.values import MOST, parse_json

MOST_THREADS = 1000  # of `data.workers`
MOST_RESAMPLES = 10**6
MOST_LETTERS = 100  # of a draft's name: folders and files are called after it


def is_checkpoint(tokenizer: str) -> bool:
    """Whether `data.tokenizer` names a pretrained checkpoint, whose tokenizer it means."""
    path = pathlib.Path(tokenizer)
    return path.is_dir() or below("pretrained.gguf_file").is_gguf(path)


def tokenizer_size(tokenizer: str) -> int:
    """Number of tokens, the separator included, known before any data is read."""
    if tokenizer == BYTES:
        return 257
    path, at = pathlib.Path(tokenizer), f"data.tokenizer={tokenizer!r}"
    make = f"use {BYTES!r}, or make a file with python -m launch.train_tokenizer"
    check(bool(tokenizer), f"data.tokenizer is empty; {make}")
    try:
        if is_checkpoint(tokenizer):
            return below("pretrained.checkpoint").open_checkpoint(path).model.n_tokens
        check(path.is_file(), f"{at} does not exist; {make}")
        values = parse_json(path.read_bytes())
        check(values["model"].get("type", "BPE") == "BPE", "")
        ids = values["model"]["vocab"].values()
        check(all(type(i) is int and 0 <= i < MOST for i in ids), "")
        return max(ids) + 2
    except OSError as error:
        raise ConfigError(f"{at} cannot be read ({error.strerror}); {make}") from None
    except below("pretrained").PretrainedError as error:
        raise ConfigError(f"data.tokenizer: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ConfigError) and str(error):
            raise
        raise ConfigError(f"{at} is no BPE tokenizer of `tokenizers`; {make}") from None


def validate(config: ExperimentConfig) -> None:
    """Raise ConfigError for sizes that cannot work together, before anything is compiled."""
    validate_decoding(config)
    t, train, ev = config.target, config.train, config.eval
    positive(train, "train", "steps batch_size seq_len k accumulate log_every attention_chunk")
    positive(train, "train", "checkpoint_every checkpoints_kept peak_lr eps clip_norm")
    not_negative(train, "train", "weight_decay")
    share(train, "train", "b1 b2 warmup_fraction", whole=False)
    share(train, "train", "final_lr_fraction", whole=True)
    check_warm_up("train.steps", train.steps, train)
    positive(ev, "eval", "contexts output_length batch_size bootstrap timing_repeats heldout_rows")
    not_negative(ev, "eval", "examples decoder_samples")
    check(ev.bootstrap <= MOST_RESAMPLES,
          f"eval.bootstrap={ev.bootstrap} resamples do not fit into memory; use "
          f"{MOST_RESAMPLES} or fewer")  # fmt: skip
    not_negative(config.data, "data", "workers")
    check(config.data.workers <= MOST_THREADS,
          f"data.workers={config.data.workers} are too many threads; use {MOST_THREADS} or "
          f"fewer")  # fmt: skip
    check(bool(config.data.source), "data.source is empty; give a folder, or 'stdlib'")
    check(0 <= config.seed < 2**64, f"seed={config.seed} must lie between 0 and 2**64 - 1")
    heldout = config.data.heldout_percent
    check(0 < heldout < 100, f"data.heldout_percent={heldout} must lie between 1 and 99")
    choice("data.split", config.data.split, "file folder")
    choice("data.missing_chunks", config.data.missing_chunks, "error fill")
    _validate_kernels("train", train.attention, train.dtype, config)
    check(train.batch_size % train.accumulate == 0,
          f"train.accumulate={train.accumulate} does not divide "
          f"train.batch_size={train.batch_size}")  # fmt: skip
    check(bool(ev.context_lengths), "eval.context_lengths is empty; give at least one")
    check(all(n >= 1 for n in ev.context_lengths), "eval.context_lengths must all be 1 or more")
    _validate_continuations(config)
    _validate_study(config)
    for at, draft in _drafts(config):
        draft.check_run(at, config)
    _validate_throughput(config)
    longest = max(ev.context_lengths) + ev.output_length + oracle_depth(config)
    for section, rows, length in (("train", train.batch_size, train.seq_len),
                                  ("eval", ev.batch_size, longest)):  # fmt: skip
        check(rows * length < MOST,
              f"{section}.batch_size={rows} rows of {length} tokens are more than an array can "
              f"count; use fewer or shorter ones")  # fmt: skip
    _check_oracle("eval.context_lengths", max(ev.context_lengths), oracle_depth(config), config)
    check(t.max_len == 0 or train.seq_len <= t.max_len,
          f"train.seq_len={train.seq_len} goes beyond target.max_len={t.max_len}")  # fmt: skip


def validate_decoding(config: ExperimentConfig) -> None:
    """Raise ConfigError for what decoding uses: the target, the drafts, `decode` and the mesh."""
    decode = config.decode
    t = config.target
    t.check("target", config)
    check(not t.head_tokens, f"target.head_tokens={t.head_tokens}: a target's head has all tokens; "
                             f"use 0, or set it for a draft")  # fmt: skip
    positive(decode, "decode", "k rounds_per_call chunk chunks_per_round")
    check(all(k >= 1 for k in decode.depths),
          f"decode.depths={decode.depths} must all be 1 or more; () = decode.k alone")  # fmt: skip
    check(0 <= decode.temperature < math.inf,
          f"decode.temperature={decode.temperature} must be 0 (greedy) or more, and "
          f"finite")  # fmt: skip
    not_negative(decode, "decode", "top_k")
    choice("decode.verification", decode.verification, "token block")
    check(0 < decode.top_p <= 1, f"decode.top_p={decode.top_p} must lie in (0, 1]")
    choice("decode.products", decode.products, "auto xla")
    _validate_kernels("decode", decode.attention, decode.dtype, config)
    for axis, size in dataclasses.asdict(config.mesh).items():
        check(size == -1 or size >= 1, f"mesh.{axis}={size}; use 1 or more, or -1 for the rest")
    check(list(dataclasses.asdict(config.mesh).values()).count(-1) <= 1,
          "mesh: at most one axis can be -1")  # fmt: skip
    for name, _ in config.drafts:
        at = f"drafts.{name}"
        check(name.replace("_", "").replace("-", "").isalnum(),
              f"{at}: use letters, digits, _ and -")  # fmt: skip
        check(len(name) <= MOST_LETTERS, f"{at}: the name has {len(name)} letters, and folders "
                                         f"are called so; use {MOST_LETTERS} or fewer")  # fmt: skip
        check(name != AUTOREGRESSIVE, f"{at}: the name means decoding without a draft; rename it")
        check(name not in STAGES, f"{at}: the name means a stage of the pipeline; rename it")
    names = [name for name, _ in config.drafts]
    for name, _ in config.variants:
        check(name not in names, f"drafts.{name}: the name means a draft of the study; rename it")
    for at, draft in _drafts(config):
        draft.check(at, config)


def _drafts(config: ExperimentConfig) -> list[tuple[str, DraftOptions]]:
    """All drafts, with where they stand."""
    return [
        *((f"drafts.{name}", draft) for name, draft in config.drafts),
        *((f"the study's {name}", draft) for name, draft in config.variants),
    ]


def _validate_kernels(section: str, asked: str, dtype: str, config: ExperimentConfig) -> None:
    """A kernel that is asked for by name must take every model's heads, and a round's tokens."""
    key = f"{section}.attention"
    check(dtype in ("float32", "bfloat16"),
          f"{section}.dtype={dtype!r}; use 'float32' or 'bfloat16'")  # fmt: skip
    choice(key, asked, "auto xla tpu interpret" + " gpu" * (section == "decode"))
    if asked in ("auto", "xla"):
        return
    if asked == "gpu":
        check(dtype == "bfloat16", f"{key}='gpu' takes decode.dtype='bfloat16'")
    models = [("target", config.target)]
    models += [(at, draft.model(config.target)) for at, draft in _drafts(config)]
    for name, model in models:
        reason = unsupported_heads(model.d_head, model.q_per_kv)
        check(not reason, f"{key}={asked!r}, {name}: {reason}; use 'auto' or 'xla'")
        check(asked != "gpu" or model.d_head in GPU_HEAD_DIMS,
              f"{key}='gpu', {name}: head dimension {model.d_head}: the kernel takes "
              f"{', '.join(map(str, GPU_HEAD_DIMS))}")  # fmt: skip
    deepest = max(config.decode.k, *config.decode.depths, 0)
    check(section == "train" or deepest < MAX_TOKENS,
          f"{key}={asked!r}: a round of decode.k={deepest} verifies more than the "
          f"kernel's {MAX_TOKENS} tokens; use 'auto', 'xla' or a smaller k")  # fmt: skip


def _validate_continuations(config: ExperimentConfig) -> None:
    at = config.continuations
    check(config.pretrained.dtype in ("float32", "bfloat16"),
          f"pretrained.dtype={config.pretrained.dtype!r}: 'float32' or 'bfloat16'")  # fmt: skip
    check(at.rows >= 0, f"continuations.rows={at.rows} is negative; use 0 for none")
    positive(at, "continuations", "prompt batch_size")
    check(0 <= at.temperature < math.inf,
          f"continuations.temperature={at.temperature} must be 0 or more, and finite")  # fmt: skip
    check(0 < at.share < 1, f"continuations.share={at.share} must lie between 0 and 1, both "
                            f"excluded")  # fmt: skip
    check(not at.rows or at.prompt < config.train.seq_len,
          f"continuations.prompt={at.prompt} leaves nothing of train.seq_len="
          f"{config.train.seq_len} to the target; lower it")  # fmt: skip
    longest = config.target.max_len
    check(not (at.rows and longest) or config.train.seq_len + 1 <= longest,
          f"continuations of train.seq_len + 1 = {config.train.seq_len + 1} tokens go beyond "
          f"target.max_len={longest}")  # fmt: skip


def _validate_study(config: ExperimentConfig) -> None:
    at = config.study
    if not at.of:
        return
    check(at.of in dict(config.drafts), f"study.of={at.of!r} is no draft; there are "
                                        f"{[name for name, _ in config.drafts]}")  # fmt: skip
    positive(at, "study", "seeds context_length contexts detectable")
    check(
        all(k >= 1 for k in at.trained_k), f"study.trained_k={at.trained_k} must all be 1 or more"
    )
    depth = max(oracle_depth(config), *at.trained_k, 0)
    _check_oracle("study.context_length", at.context_length, depth, config)


def _check_oracle(key: str, context: int, depth: int, config: ExperimentConfig) -> None:
    """The target itself writes what the oracle reads: the output, and to where the last draft ends.

    A decoder's own drafts may go on beyond the model's context.
    """
    longest, most = context + config.eval.output_length + depth - 1, config.target.max_len
    check(most == 0 or longest <= most,
          f"{key} + eval.output_length + k - 1 = {longest} goes beyond target.max_len={most}; "
          f"shorten the context or the output")  # fmt: skip


def _validate_throughput(config: ExperimentConfig) -> None:
    at = config.throughput
    choice("throughput.chip", at.chip, below("costs.chips").CHIPS)
    choice("throughput.variant", at.variant, below("costs.roofline").VARIANTS)
    positive(at, "throughput", "hoi batch_size context_length weight_bytes cache_bytes")
    not_negative(at, "throughput", "launch_us")
    positive(at, "throughput", "decode_to_train")
    widths = "use 1 (FP8, INT8) or 2 (bf16)"
    check(at.compute_bytes in (1, 2), f"throughput.compute_bytes={at.compute_bytes}; {widths}")
    for key in ("batch_sizes", "context_lengths"):
        sizes = getattr(at, key)
        check(bool(sizes), f"throughput.{key} is empty; give at least one")
        check(all(n >= 1 for n in sizes), f"throughput.{key}={sizes} must all be 1 or more")
    names = [name for name, _ in config.drafts]
    for key, by_name in (("tau", at.tau), ("training_cost", at.training_cost)):
        for name, _ in by_name:
            at_name = f"throughput.{key}.{name}"
            check(name in names, f"{at_name}: no draft named {name!r}; there are {names}")
    for name, tau in at.tau:
        most = config.decode.k + 1
        check(tau == 0 or 1 <= tau <= most,
             f"throughput.tau.{name}={tau} must lie between 1 and decode.k + 1 = {most}, "
             f"or be 0 (not given)")  # fmt: skip
    for name, cost in at.training_cost:
        check(cost >= 0, f"throughput.training_cost.{name}={cost} is negative; 0 = by its FLOPs")


def with_vocabulary(config: ExperimentConfig) -> ModelConfig:
    tokens = config.target.n_tokens or tokenizer_size(config.data.tokenizer)
    size = config.target.vocab_size or -(-tokens // 8) * 8
    check(size >= tokens, f"target.vocab_size={size} is under the data's {tokens} tokens; use "
                          f"{tokens} or more, or 0 for the smallest that fits")  # fmt: skip
    return dataclasses.replace(config.target, vocab_size=size, n_tokens=tokens)

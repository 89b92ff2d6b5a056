"""What decoding needs, from a config and the work directory that was trained with it."""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from spire_jax.config.identity import digest
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.config.schema import AUTOREGRESSIVE, ConfigError, ExperimentConfig, StudyConfig
from spire_jax.config.validation import validate_decoding
from spire_jax.config.values import convert, to_dict
from spire_jax.costs.throughput import depth_prices
from spire_jax.data.tokenizer import Tokenizer, end_tokens, make_tokenizer
from spire_jax.decoding.build import for_decoding, make_decoder
from spire_jax.decoding.rounds import Decoder, Weights
from spire_jax.models.sharding import check_mesh, make_mesh, shardings
from spire_jax.models.transformer import Params
from spire_jax.pretrained.checkpoint import open_checkpoint
from spire_jax.pretrained.exported_draft import CONFIG, ExportedDraft, import_draft
from spire_jax.storage.paths import cache_folder
from spire_jax.training.tasks import draft_task, target_task, with_shared
from spire_jax.training.workdir import WorkDir, params_sha256

EXPORTED = "exported"  # what the draft of --draft is called


class Loaded(NamedTuple):
    """A decoder, ready to run under its mesh."""

    decoder: Decoder
    weights: Weights
    tokenizer: Tokenizer
    mesh: Mesh
    depths: tuple[int, ...]  # to choose k among; () = the decoder's alone
    made_by: Mapping[str, Any] = {}  # what decides what it makes of a prompt; {} = not asked for

    @property
    def deepest(self) -> int:
        """Tokens that a round may draft, and a row has room for beyond its output."""
        return max(self.decoder.k, *self.depths, 0)


def for_method(
    args: argparse.Namespace, config: ExperimentConfig
) -> tuple[ExperimentConfig, str | None]:
    """What the command's options leave of a config, and the method; None: that of `args.draft`.

    Args:
        args: with `workdir` and `draft`, None where not given; `method`, None for the exported
            draft, or the config's only one; `ignore_eos`; and `temperature`, `top_k` and
            `top_p`, None where the config's are used.

    Raises:
        ConfigError: an unknown method, or values of what decoding uses that cannot work.
    """
    usual = config.decode
    given = {name: convert(value, type(of), f"--{name.replace('_', '-')}", of)
             for name, of in (("temperature", usual.temperature), ("top_k", usual.top_k),
                              ("top_p", usual.top_p))
             if (value := getattr(args, name)) is not None}  # fmt: skip
    config = dataclasses.replace(config, decode=dataclasses.replace(config.decode, **given))
    if args.workdir is None and not config.pretrained.path:
        raise ConfigError(
            "give the --target that decodes, a GGUF file or a folder with config.json and "
            "safetensors; or the --workdir where it was trained"
        )
    if args.draft is not None and args.method != AUTOREGRESSIVE:
        if not (pathlib.Path(args.draft) / CONFIG).is_file():
            raise ConfigError(f"--draft={args.draft} holds no {CONFIG}; give a folder that python "
                              f"-m spire_jax.export has written")  # fmt: skip
        config = _only(config, ())
        validate_decoding(config)
        return config, None
    name = method_name(config, args.method)
    config = _only(config, () if name == AUTOREGRESSIVE else (name, config.weights(name)))
    _check_method(config, name)
    if config.weights(name) and args.workdir is None:
        raise ConfigError(f"--method={name}: give the --workdir where it was trained, or --draft, "
                          f"the folder it was exported to")  # fmt: skip
    return config, name


def load_for_decoding(args: argparse.Namespace, config: ExperimentConfig) -> Loaded:
    """The method `args.method` of `config`, its weights from a work directory, or a pretrained
    target's from its checkpoint and a draft's from where it was exported to.

    Args:
        args: as of `for_method`; with an `out` that is a file, `Loaded.made_by` is asked for.

    Raises:
        ConfigError: as `for_method`; stages that are not trained.
        CheckpointError: weights made from another config.
        PretrainedError: a draft that was exported for another target.
    """
    config, name = for_method(args, config)
    of_target, exported = _Target(config, args.workdir), None
    if name is None:
        exported = import_draft(args.draft, of_target.sha256)
        config = dataclasses.replace(config, drafts=((EXPORTED, exported.draft),))
        name = method_name(config, args.method or EXPORTED)
        _check_method(config, name)
    tokenizer = make_tokenizer(config.data.tokenizer)
    decoder = make_decoder(config, name, () if args.ignore_eos else end_tokens(tokenizer))
    target, drafts = of_target.params, {}
    if of := config.weights(name):
        drafts[of] = (of_target.draft(of, target) if exported is None
                      else _placed(exported, config, name, target, of_target.mesh))  # fmt: skip
    depths = config.decode.depths if decoder.strategy is not None else ()
    decoder = with_prices(config, name, decoder, depths)
    made_by = {}
    if args.out != "-":
        made_by = _made_by(config, name, decoder, depths)
        made_by |= {"target": of_target.sha256[:16], "tokenizer": tokenizer.name}
        if template := getattr(tokenizer, "chat_template", None):
            made_by["chat_template"] = digest(template)
        if of:
            made_by["draft"] = params_sha256(drafts[of])[:16]
    target, drafts = for_decoding(config, target, drafts)
    weights = Weights(target, drafts.get(name))
    return Loaded(decoder, weights, tokenizer, of_target.mesh, depths, made_by)


def with_prices(
    config: ExperimentConfig, name: str, decoder: Decoder, depths: Sequence[int]
) -> Decoder:
    """The decoder, of rows that choose among `depths` by themselves where the draft lets them.

    It then drafts as many as the deepest, and the cost model says what verifying costs.
    """
    if not depths or not getattr(config.draft(name), "confidence", False):
        return decoder
    k = max(depths)
    return dataclasses.replace(
        decoder, k=k, prices=depth_prices(config, name, k), widths=tuple(sorted({*depths}))
    )


def _only(config: ExperimentConfig, names: Collection[str]) -> ExperimentConfig:
    """The config with these drafts alone: the others decode nothing."""
    drafts, variants = (tuple((name, draft) for name, draft in of if name in names)
                        for of in (config.drafts, config.variants))  # fmt: skip
    return dataclasses.replace(config, drafts=drafts, variants=variants, study=StudyConfig())


def _check_method(config: ExperimentConfig, name: str) -> None:
    """ConfigError, before anything is read, for a method that cannot decode here."""
    validate_decoding(config)
    if name != AUTOREGRESSIVE and config.draft(name).whole_prompt:
        raise ConfigError(
            f"--method={name}: a draft of kind {config.draft(name).kind!r} selects over a whole "
            f"prompt at once, and here prompts are read in chunks; use another method"
        )


def _made_by(
    config: ExperimentConfig, name: str, decoder: Decoder, depths: Sequence[int]
) -> dict[str, Any]:
    """Beside weights, what decides what comes of a prompt.

    But for shapes, and for kernels: by those rounding alone differs.
    """
    decode, method = config.decode, {"kind": name}
    if name != AUTOREGRESSIVE:
        draft = config.draft(name)
        own = {f.name for f in dataclasses.fields(draft) if getattr(draft, f.name) != f.default}
        method = {key: x for key, x in to_dict(draft).items() if key == "kind" or key in own}
    return {
        "method": method,
        "k": list(depths) or decoder.k,
        **({"prices": list(decoder.prices)} if decoder.prices else {}),
        "verification": decode.verification,
        "sampling": dataclasses.asdict(decoder.sampling),
        "ends": list(decoder.ends),
        "dtype": decode.dtype,
        "pretrained_dtype": config.pretrained.dtype if config.pretrained.path else None,
    }


def _placed(
    exported: ExportedDraft, config: ExperimentConfig, name: str, target: Params, mesh: Mesh
) -> Params:
    """An exported draft's parameters on the mesh, with those that it shares with the target."""
    task = draft_task(config, name)
    shapes, axes = ({key: x for key, x in tree.items() if key not in task.shared}
                    for tree in (task.model.shapes(), task.model.axes()))  # fmt: skip
    own = jax.device_put(exported.load(shapes), shardings(mesh, axes))
    return with_shared(task, own, target)


class _Target:
    """The target of a config: in a work directory, or a checkpoint by itself."""

    def __init__(self, config: ExperimentConfig, workdir: str | None):
        self.config, self.workdir = config, None
        # A checkpoint by itself needs none, and no corpus, whose tokens may take long.
        if workdir is not None and (config.trained or not config.pretrained.path):
            self.workdir = WorkDir(config, workdir)
            self.mesh = self.workdir.mesh
        else:
            self.checkpoint = open_checkpoint(config.pretrained.path)
            self.mesh = make_mesh(config.mesh)
            check_mesh(self.mesh, config)

    @functools.cached_property
    def sha256(self) -> str:
        if self.workdir is None:
            return self.checkpoint.cached_sha256(cache_folder())
        if self.workdir.pretrained is not None:
            return self.workdir.target_sha256
        return params_sha256(self.params)  # of what was trained: loaded once

    @functools.cached_property
    def params(self) -> Params:
        if self.workdir is not None:
            return self.workdir.target()
        model = target_task(self.config).model
        return self.checkpoint.load(model, self.mesh, self.config.pretrained.dtype)

    def draft(self, name: str, target: Params) -> Params:
        assert self.workdir is not None  # `for_method` asks for a work directory
        return self.workdir.draft(name, target)


def method_name(config: ExperimentConfig, method: str | None) -> str:
    """A draft's name: by itself, by the kind of the config's only such draft, or as the only one.

    Or `AUTOREGRESSIVE`, also where there are no drafts. ConfigError for what is neither, or not
    plain.
    """
    names = [name for name, _ in config.drafts + config.variants]
    if not names and method is None:
        return AUTOREGRESSIVE
    if method in (AUTOREGRESSIVE, *names):
        return method
    alike = [name for name, draft in config.drafts if method in (None, draft.kind)]
    if len(alike) == 1:
        return alike[0]
    of = "" if method is None else " of this kind"
    why = f"the config has {len(alike)} drafts{of}" if alike or method is None else "unknown"
    make = ""
    if not alike and method in DRAFT_KINDS.names():
        why, make = "no draft is of this kind", f", or make one: --config.drafts.NAME.kind={method}"
    raise ConfigError(f"--method={method or ''}: {why}; choose from "
                      f"{[*names, AUTOREGRESSIVE]}{make}")  # fmt: skip

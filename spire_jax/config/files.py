"""Config files and the command line: from text to a validated ``ExperimentConfig``.

A file of ``configs/`` has a function ``get_config`` that returns a ConfigDict of what differs from
the defaults. The modules that `plugins` names are imported first; then ``drafts.NAME.kind`` and
``target.family`` say which dataclass a section is, and values.py fills it. docs/config.md.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import ml_collections

from spire_jax.config.checks import ConfigError
from spire_jax.config.drafts import DraftOptions
from spire_jax.config.paths import PathError, local, local_path, path_or_url
from spire_jax.config.registry import DRAFT_KINDS, FAMILIES, below
from spire_jax.config.schema import ExperimentConfig, ModelConfig
from spire_jax.config.validation import validate, with_vocabulary
from spire_jax.config.values import Text, convert, known, parse_json, section
from spire_jax.config.variants import variants

Check = Callable[[ExperimentConfig], None]  # raises ConfigError
MOST_SAID = 2000  # characters of an error
# Of a config, and what reads each.
PATHS = (("data", "source", path_or_url), ("data", "heldout_source", path_or_url),
         ("data", "tokenizer", local), ("pretrained", "path", local))  # fmt: skip


def load(
    path: str | pathlib.Path | None, overrides: Sequence[str] = (), check: Check = validate
) -> ExperimentConfig:
    """Read a config file, apply ``a.b=value`` overrides, validate; raises ConfigError.

    Without a file (None) there are the defaults. A run's own config.json is a file, too, unless it
    names `plugins`: what a run wrote names no code.
    """
    values: dict[str, Any] = {}
    if path is not None:
        path = pathlib.Path(path)
        recorded = path.suffix == ".json"
        values = _recorded(path) if recorded else _plain(_get_config(path), path)
    drafts = list(_mapping(values.setdefault("drafts", {})))
    written = {name: dict(_mapping(of, f"drafts.{name}")) for name, of in values["drafts"].items()}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        _override(values, key, text)
    for name, draft in _mapping(values["drafts"]).items():
        # The command line makes one by naming its kind, or whose weights it uses.
        if drafts and "kind" not in draft and "weights_of" not in draft:
            known(name, drafts, f"drafts.{name}")
    return build(values, check, _of_another_kind(written, values["drafts"], overrides))


def _of_another_kind(
    written: Mapping[str, Mapping[str, Any]], drafts: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, set[str]]:
    """By draft, what its file says of it that need not fit: the command line changed its kind, or
    that of the draft whose weights it uses."""
    given = {override.partition("=")[0] for override in overrides}
    found: dict[str, set[str]] = {}
    for name in sorted(written.keys() & drafts.keys(), key=lambda n: "weights_of" in written[n]):
        own, of = written[name], written[name].get("weights_of")
        if not isinstance(drafts[name], Mapping):
            continue  # which `build` says
        if drafts[name].get("kind") != own.get("kind") or of in found:
            found[name] = {key for key in own if f"drafts.{name}.{key}" not in given}
            found[name] |= found.get(of, set()) if of else set()
    return found


def _recorded(path: pathlib.Path) -> dict[str, Any]:
    """The values of a config that a run wrote."""
    try:
        values = dict(_mapping(parse_json(path.read_bytes()), str(path)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"config file {path} cannot be read: {in_words(error)}") from None
    if values.get("plugins"):
        raise ConfigError(f"config file {path} names code (plugins: {values['plugins']}); give the "
                          f"config that the run was started with")  # fmt: skip
    return {name: of for name, of in values.items() if name != "variants"}  # made of the study


def _get_config(path: pathlib.Path) -> Any:
    """What a file's get_config returns; ConfigError for whatever is wrong with the file."""
    if not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise ConfigError(f"config file {path} does not exist; there is {beside}")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file {path} is no Python file; give one of configs/, *.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config()
    except Exception as error:  # of a person's own code
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == str(path)]  # fmt: skip
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f", line {line}" if line else ""
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"config file {path}{where}: {type(error).__name__}: {reason}; mend it "
                          f"(docs/config.md: a function get_config)") from error  # fmt: skip


def build(
    values: Mapping[str, Any],
    check: Check = validate,
    may_go: Mapping[str, Collection[str]] = types.MappingProxyType({}),
) -> ExperimentConfig:
    """Frozen, validated dataclasses from a mapping of what differs from the defaults.

    `may_go`: by draft, options that are left out where its kind does not have them.
    """
    values = dict(values)
    of = ExperimentConfig()
    plugins = convert(values.get("plugins", ()), tuple[str, ...], "plugins", ("package.module",))
    for name in plugins:
        try:
            importlib.import_module(name)
        except Exception as error:  # of a stranger's code
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"plugins: {name!r} cannot be imported ({type(error).__name__}: "
                              f"{reason}); give a module's dotted name, found from where the "
                              f"command runs or on PYTHONPATH") from error  # fmt: skip
    named = _mapping(values.pop("drafts", {}))
    drafts = tuple((name, _draft(name, _as_trained(name, named), may_go.get(name, ())))
                   for name in sorted(named))  # fmt: skip
    target = _model(values.pop("target", {}))
    known_here = [f.name for f in dataclasses.fields(of) if f.name != "variants"]
    for name in values:
        known(name, known_here, name)
    config = dataclasses.replace(
        section(ExperimentConfig, values, ""), drafts=drafts, target=target
    )
    config = _with_paths(config)
    if config.pretrained.path:
        config = with_pretrained(config)
    config = dataclasses.replace(config, target=with_vocabulary(config))
    if config.study.of in dict(config.drafts):  # what else it may be, `validate` refuses
        more = variants(config.study, config.draft(config.study.of))
        config = dataclasses.replace(config, variants=more)
    check(config)
    return config


def _with_paths(config: ExperimentConfig) -> ExperimentConfig:
    """The config with its paths read (paths.py); ConfigError names the key."""
    for at, name, read in PATHS:
        part = getattr(config, at)
        try:
            path = read(given) if (given := getattr(part, name)) else ""
        except PathError as error:
            raise ConfigError(f"{at}.{name}: {error}") from None
        config = dataclasses.replace(config, **{at: dataclasses.replace(part, **{name: path})})
    return config


def _as_trained(name: str, named: Mapping[str, Any]) -> Any:
    """A draft's values, on top of those of the draft whose weights it uses."""
    values = _mapping(named[name], f"drafts.{name}")
    if not (of := values.get("weights_of")):
        return values
    known(of, [other for other in named if other != name], f"drafts.{name}.weights_of={of!r}")
    base = _mapping(named[of], f"drafts.{of}")
    if base.get("weights_of"):
        raise ConfigError(f"drafts.{name}.weights_of={of!r} has no weights of its own; name the "
                          f"draft whose they are, {base['weights_of']!r}")  # fmt: skip
    return {**base, **values}


def _draft(name: str, values: Any, may_go: Collection[str]) -> DraftOptions:
    at = f"drafts.{name}"
    values = _mapping(values, at)
    if "kind" not in values:
        raise ConfigError(f"{at}.kind is missing; choose from {DRAFT_KINDS.names()}")
    kind = convert(values["kind"], str, f"{at}.kind", "")
    try:
        cls = DRAFT_KINDS.get(kind)
    except ConfigError as error:
        raise ConfigError(f"{at}.kind={kind!r}: {error}") from None
    own = {field.name for field in dataclasses.fields(cls)}
    values = {key: value for key, value in values.items() if key in own or key not in may_go}
    for key in values:
        others = [f"{other!r}" for other, its in DRAFT_KINDS.items().items()
                  if key in {field.name for field in dataclasses.fields(its)}]  # fmt: skip
        if key not in own and others:
            raise ConfigError(
                f"unknown config key '{at}.{key}': a draft of kind {kind!r} has no such option; "
                f"it belongs to {' and '.join(sorted(others))}"
            )
    return section(cls, values, f"{at}.")


def _model(values: Any) -> ModelConfig:
    values = _mapping(values, "target")
    family = convert(values.get("family", ModelConfig.family), str, "target.family", "")
    try:
        cls = FAMILIES.get(family)
    except ConfigError as error:
        raise ConfigError(f"target.family={family!r}: {error}") from None
    return section(cls, values, "target.")


def with_pretrained(config: ExperimentConfig) -> ExperimentConfig:
    """The config with a pretrained target's own sizes and tokenizer; only its header is read.

    Raises:
        ConfigError: a checkpoint that cannot be used, or sizes in `target` that are not its own.
    """
    checkpoints = below("pretrained.checkpoint")
    path = config.pretrained.path
    try:
        model = checkpoints.open_checkpoint(path).model
    except (checkpoints.PretrainedError, OSError) as error:
        raise ConfigError(f"pretrained.path={path!r}: {in_words(error)}") from error
    size = config.target.vocab_size or model.vocab_size
    for field in dataclasses.fields(config.target):
        given, its = getattr(config.target, field.name), getattr(model, field.name)
        if given not in (field.default, its) and field.name != "vocab_size":
            raise ConfigError(f"target.{field.name}={given!r}, but the checkpoint {path!r} has "
                              f"{its!r}; leave it out")  # fmt: skip
    data = dataclasses.replace(config.data, tokenizer=path)
    target = dataclasses.replace(model, vocab_size=size)
    return dataclasses.replace(config, data=data, target=target)


def command_line(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    *,
    decoding: bool = False,
    recorded: str = "",
) -> tuple[argparse.Namespace, ExperimentConfig]:
    """Parse a program's own flags, ``--config=FILE`` and ``--config.section.key=value``.

    `parser` holds the program's own flags; ``--config`` is added to it here. `argv` defaults to
    the process's arguments. A bad config or an unknown argument ends the process with
    ``error: ...`` on stderr and status 2.

    For `decoding` there may be no file, a ``--target`` of the parser is a checkpoint's path and
    takes the place of the file's target, and nothing is validated yet: what the chosen method uses
    is (`serving.loading.for_method`). Without a file, the config.json of the folder that the flag
    called `recorded` names takes its place.
    """
    parser.add_argument("--config", required=not (decoding or recorded), type=local_path,
                        metavar="FILE", help="a file of configs/; change its values with "
                        "--config.section.key=value")  # fmt: skip
    args, rest = parser.parse_known_args(argv)
    prefix = "--config."
    for argument in rest:
        if not argument.startswith(prefix) or "=" not in argument:
            name = argument.removeprefix(prefix) if argument.startswith(prefix) else "section.key"
            exit_with_error(
                f"unknown argument {argument!r}; config values are set as {prefix}{name}=value, "
                f"and --help lists the flags"
            )
    overrides = [argument.removeprefix(prefix) for argument in rest]
    if decoding and args.target:
        overrides = ["target=", *overrides, f"pretrained.path={args.target}"]
    with ends_in_a_line(ConfigError):
        if recorded and args.config is None:
            args.config = local_path(os.path.join(getattr(args, recorded), "config.json"))
        return args, load(args.config, overrides, _unchecked if decoding else validate)


def _unchecked(config: ExperimentConfig) -> None:
    """What is used is checked later."""


def exit_with_error(error: Exception | str) -> NoReturn:
    """Print ``error: ...`` on stderr and end the process with status 2, without a traceback."""
    print(f"error: {in_words(error)}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def ends_in_a_line(*errors: type[Exception]) -> Iterator[None]:
    """Within it `errors`, and what the system or too large a size causes, `exit_with_error`."""
    mended: tuple[type[Exception], ...] = (*errors, OSError)
    try:
        yield
    except mended as error:
        exit_with_error(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        exit_with_error(error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether NumPy or XLA (a RuntimeError of jax's) had no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED")
    )


def in_words(error: Exception | str) -> str:
    """An error as one line: what is wrong, and what to do.

    Names and values in it are of files that others wrote: what a terminal would not show, or obey,
    is escaped, and of what is too long to read the middle is left out.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = (f"{os.fsdecode(error.filename)!r}: {error.strerror}; check the path and its "
                f"permissions, or name another")  # fmt: skip
    elif isinstance(error, Exception) and is_out_of_memory(error):
        reason = text.partition("\n")[0] or "no more of it"
        text = f"out of memory ({reason}); lower the sizes: batch, length, width, layers"
    if len(text) > MOST_SAID:
        text = f"{text[: MOST_SAID // 2]} ... {text[-MOST_SAID // 4 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _plain(config: Any, path: pathlib.Path) -> dict[str, Any]:
    """What a file's get_config returned, as nested dicts."""
    if not isinstance(config, ml_collections.ConfigDict):
        return _nested(_mapping(config, f"{path}: get_config()"))
    try:
        # As JSON a ConfigDict keeps the order in which it was written, which to_dict() does not.
        return json.loads(config.to_json())
    except TypeError as error:
        raise ConfigError(f"{path}: a value is no number, text, list or section: {error}") from None


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _nested(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _mapping(values: Any, at: str = "drafts") -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{at} is a section, not a value")
    return values


def _override(values: dict[str, Any], key: str, text: str) -> None:
    """Put a value of the command line in its place; what there is no place for, `build` says.

    An empty draft or target, ``drafts.NAME=``, takes that of the file away.
    """
    if key == "target" and not text:
        values[key] = {}
        return
    if (name := key.removeprefix("drafts.")) in values["drafts"] and not text:
        del values["drafts"][name]
        return
    *parents, leaf = key.split(".")
    for depth, name in enumerate(parents):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    values[leaf] = Text(text)

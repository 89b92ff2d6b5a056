"""Config files and the command line: from text to a validated ``ExperimentConfig``.

A file of ``configs/`` has a function ``get_config`` that returns a ConfigDict of what differs from
the defaults. Values are checked against the names and types of the dataclasses of ``config.py``.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import pathlib
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import ml_collections

from spire_jax.config.schema import ConfigError, DraftConfig, ExperimentConfig, ModelConfig, as_dict
from spire_jax.config.validation import validate, with_vocabulary
from spire_jax.config.variants import variants
from spire_jax.pretrained import PretrainedError


def defaults(
    file_config: Mapping[str, Any] | ml_collections.ConfigDict | None = None,
) -> ml_collections.ConfigDict:
    """A locked ConfigDict of every value: the defaults, with a config file's values over them."""
    values = as_dict(ExperimentConfig()) | {"drafts": {}}
    del values["variants"]  # made from the section `study`
    full = ml_collections.ConfigDict(values)
    given = file_config.to_dict() if isinstance(file_config, ml_collections.ConfigDict) else {}
    if file_config is not None and not given:
        given = dict(file_config)
    drafts = given.pop("drafts", {})
    if not isinstance(drafts, Mapping):
        raise ConfigError("drafts must be a mapping: drafts.<name> = {...}")
    for name, values in drafts.items():
        full.drafts[name] = ml_collections.ConfigDict(as_dict(DraftConfig()))
        _merge(full.drafts[name], values, f"drafts.{name}.")
    _merge(full, given, "")
    full.lock()
    return full


def load(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a config file, apply ``a.b=value`` overrides, validate; raises ConfigError."""
    path = pathlib.Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise ConfigError(f"config file {path} does not exist; there is {known}")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    full = defaults(module.get_config())
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        *parents, leaf = key.split(".")
        node = full
        for depth, name in enumerate(parents):
            _known(name, node, ".".join([*parents[:depth], name]))
            node = node[name]
        if not isinstance(node, ml_collections.ConfigDict):
            raise ConfigError(f"{key}: {'.'.join(parents)} is a value, not a section")
        _known(leaf, node, key)
        node[leaf] = _parse(text, node[leaf], key)
    return build(full)


def build(full: Mapping[str, Any] | ml_collections.ConfigDict) -> ExperimentConfig:
    """Frozen, validated dataclasses from a mapping with all the keys of `defaults`."""
    values = full.to_dict() if isinstance(full, ml_collections.ConfigDict) else dict(full)
    drafts = tuple(
        (name, _build(DraftConfig, v, f"drafts.{name}."))
        for name, v in sorted(values.pop("drafts", {}).items())
    )
    hints = typing.get_type_hints(ExperimentConfig)
    sections = {
        name: _build(hints[name], v, f"{name}.") if isinstance(v, Mapping) else v
        for name, v in values.items()
    }
    config = ExperimentConfig(drafts=drafts, **sections)
    if config.pretrained.path:
        config = with_pretrained(config)
    config = dataclasses.replace(config, target=with_vocabulary(config))
    base = dict(config.drafts).get(config.study.of)
    if base is not None and base.kind == "spire":  # what else it may be, `validate` refuses
        config = dataclasses.replace(config, variants=variants(config.study, base))
    validate(config)
    return config


def with_pretrained(config: ExperimentConfig) -> ExperimentConfig:
    """The config with a pretrained target's own sizes and tokenizer; only its header is read.

    Raises:
        ConfigError: a checkpoint that cannot be used, or sizes in `target` that are not its own.
    """
    from spire_jax.pretrained.checkpoint import open_checkpoint  # jax: only where it is needed

    path = config.pretrained.path
    try:
        model = open_checkpoint(path).model
    except PretrainedError as error:
        raise ConfigError(f"pretrained.path={path!r}: {error}") from error
    size = config.target.vocab_size or model.vocab_size
    for field in dataclasses.fields(ModelConfig):
        given, its = getattr(config.target, field.name), getattr(model, field.name)
        if given not in (field.default, its) and field.name != "vocab_size":
            raise ConfigError(f"target.{field.name}={given!r}, but the checkpoint {path!r} has "
                              f"{its!r}; leave it out")  # fmt: skip
    data = dataclasses.replace(config.data, tokenizer=path)
    target = dataclasses.replace(model, vocab_size=size)
    return dataclasses.replace(config, data=data, target=target)


def command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, ExperimentConfig]:
    """Parse a program's own flags, ``--config=FILE`` and ``--config.section.key=value``.

    `parser` holds the program's own flags; ``--config`` is added to it here. `argv` defaults to
    the process's arguments. A bad config or an unknown argument ends the process with
    ``error: ...`` on stderr and status 2.
    """
    parser.add_argument("--config", required=True, metavar="FILE", help="a file of configs/; "
                        "change its values with --config.section.key=value")  # fmt: skip
    args, rest = parser.parse_known_args(argv)
    prefix = "--config."
    for argument in rest:
        if not argument.startswith(prefix) or "=" not in argument:
            name = argument.removeprefix(prefix) if argument.startswith(prefix) else "section.key"
            exit_with_error(
                f"unknown argument {argument!r}; config values are set as {prefix}{name}=value, "
                f"and --help lists the flags"
            )
    try:
        return args, load(args.config, [argument.removeprefix(prefix) for argument in rest])
    except ConfigError as error:
        exit_with_error(error)


def exit_with_error(error: Exception | str) -> NoReturn:
    """Print ``error: ...`` on stderr and end the process with status 2, without a traceback."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _known(name: str, node: Any, key: str) -> None:
    if name in node:
        return
    close = difflib.get_close_matches(name, list(node), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known here: {sorted(node)}"
    raise ConfigError(f"unknown config key {key!r}{hint}")


def _merge(into: ml_collections.ConfigDict, values: Mapping[str, Any], path: str) -> None:
    for name, value in values.items():
        _known(name, into, path + name)
        if isinstance(into[name], ml_collections.ConfigDict):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path}{name} is a section, not a value")
            _merge(into[name], value, f"{path}{name}.")
        else:
            into[name] = _typed(value, into[name], path + name)


def _typed(value: Any, like: Any, key: str) -> Any:
    """`value` as the type of `like`, where nothing is lost; else a ConfigError."""
    if isinstance(like, bool) or isinstance(value, bool):
        good = isinstance(like, bool) and isinstance(value, bool)
    elif isinstance(like, float) and isinstance(value, int):
        return float(value)
    elif isinstance(like, tuple):
        good = isinstance(value, list | tuple) and all(isinstance(v, int) for v in value)
        value = tuple(value) if good else value
    else:
        good = isinstance(value, type(like))
    if not good:
        kind = type(like).__name__
        raise ConfigError(f"{key}={value!r} should be of type {kind}, like {like!r}")
    return value


def _parse(text: str, like: Any, key: str) -> Any:
    """A command-line value, of the type that the key has."""
    if isinstance(like, str):
        return text
    try:
        if isinstance(like, bool):
            value: Any = {"true": True, "false": False}[text.lower()]
        elif isinstance(like, tuple):
            value = tuple(int(v) for v in text.strip("()[] ").split(",") if v.strip())
        else:
            value = type(like)(text)
    except (ValueError, KeyError):
        kind = "a list of integers" if isinstance(like, tuple) else type(like).__name__
        raise ConfigError(f"{key}={text!r} should be {kind}, like {like!r}") from None
    return value


def _build(cls: Any, values: Mapping[str, Any], path: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
        _known(name, known, path + name)
    return cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})

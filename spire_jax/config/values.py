"""From text and plain values to config dataclasses, and back; JSON of others' files.

What a value may be is found from the annotations of the dataclass: ``bool``, ``int``, ``float``
and ``str``; ``tuple[int, ...]`` and the like for lists; ``tuple[tuple[str, float], ...]`` for a
mapping by names of the user's own; a dataclass for a section. On the command line a list is
``a,b`` and a mapping is set name by name, ``section.key.name=value``.
"""

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from spire_jax.config.checks import ConfigError

DEEPEST = 100  # of lists and objects in each other; what anyone writes goes a tenth as deep


def parse_json(content: bytes | str) -> Any:
    """The value that JSON stands for; a ValueError that says in one line what is wrong with it.

    That it goes deeper than `DEEPEST` is, too: over such a value Python's recursion would stumble,
    here or in whatever is done with it.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level, depth = [value], 0
    while level := [
        item
        for outer in level
        if isinstance(outer, dict | list)
        for item in (outer.values() if isinstance(outer, dict) else outer)
        if isinstance(item, dict | list)
    ]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} times")
    return value


class Text(str):
    """A value from the command line, still to be read as what its key is."""


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    found = typing.get_type_hints(cls)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def section(cls: type, values: Any, path: str) -> Any:
    """A dataclass from a mapping of what differs from its defaults; ConfigError.

    `path` is where it stands, with a dot at the end, for messages.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path.rstrip('.')} is a section, not a value")
    of = hints(cls)
    default = {field.name: field.default for field in dataclasses.fields(cls)}
    for name in values:
        known(name, of, path + name)
    return cls(**{
        name: section(of[name], value, f"{path}{name}.")
        if isinstance(of[name], type) and dataclasses.is_dataclass(of[name])
        else convert(value, of[name], path + name, default[name])
        for name, value in values.items()
    })  # fmt: skip


def known(name: str, names: Iterable[str], key: str) -> None:
    """ConfigError, with the nearest, unless `name` is among `names`; `key` is all of it."""
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known here: {sorted(names)}"
        raise ConfigError(f"unknown config key {key!r}{hint}")


# Whole numbers, seeds, and others from these on overflow in NumPy, JAX or Grain, each in its way.
MOST, MOST_SEED, MOST_FLOAT = 2**31, 2**64, 3.4e38


def convert(value: Any, hint: Any, key: str, default: Any) -> Any:
    """`value` as what `hint` says, where nothing is lost; else ConfigError.

    Numbers are finite, and such as arrays can hold.
    """
    if of := _mapped(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is a mapping, not a value: {key}.NAME=...")
        return tuple((name, convert(v, of, f"{key}.{name}", of())) for name, v in value.items())
    most = MOST_SEED if key.rpartition(".")[2] == "seed" else MOST
    given = repr(str(value) if isinstance(value, Text) else value)
    given = f"{key}={given if len(given) < 80 else given[:60] + ' ...'}"
    try:
        converted = _converted(value, hint)
        every = converted if isinstance(converted, tuple) else (converted,)
        if any(type(v) is float and not abs(v) < MOST_FLOAT for v in every):
            raise OverflowError
        if any(type(v) is int and abs(v) >= most for v in every):
            raise OverflowError
    except (TypeError, ValueError, KeyError):
        raise ConfigError(f"{given} should be {_words(hint)}, like {default!r}") from None
    except OverflowError:
        raise ConfigError(f"{given} is beyond all use; give a finite number, a whole one under "
                          f"{most}, like {default!r}") from None  # fmt: skip
    return converted


def _converted(value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        (of, _) = typing.get_args(hint)
        if isinstance(value, Text):
            parts = (part.strip() for part in value.strip("()[] ").split(","))
            value = [Text(part) for part in parts if part]
        elif not isinstance(value, list | tuple):
            raise TypeError
        return tuple(_converted(item, of) for item in value)
    if isinstance(value, Text):
        return {"true": True, "false": False}[value.lower()] if hint is bool else hint(str(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _mapped(hint: Any) -> Any:
    """What the values of a mapping are; None where the hint is of something else."""
    args = typing.get_args(hint)
    pair = typing.get_args(args[0]) if args else ()
    return pair[1] if len(pair) == 2 and pair[0] is str else None


def _words(hint: Any) -> str:
    plural = {"int": "integers", "float": "numbers", "str": "words"}
    if isinstance(hint, types.GenericAlias):
        name = typing.get_args(hint)[0].__name__
        return f"a list of {plural.get(name, name)}"
    return hint.__name__


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain dicts, lists and scalars, ready for JSON."""
    return json.loads(json.dumps(_plain(config, type(config))))


def _plain(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        of = hints(type(value))
        return {name: _plain(getattr(value, name), of[name]) for name in of}
    if of := _mapped(hint):
        return {name: _plain(v, of) for name, v in value}
    return value

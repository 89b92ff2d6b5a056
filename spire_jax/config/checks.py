"""What is wrong with a config, in one line: the error, and checks that raise it."""

from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the key and the remedy."""


def check(good: bool, message: str) -> None:
    """ConfigError unless `good`."""
    if not good:
        raise ConfigError(message)


def choice(key: str, value: Any, choices: Iterable[Any]) -> None:
    """ConfigError unless `value` is one of `choices`; a string holds words."""
    known = choices.split() if isinstance(choices, str) else list(choices)
    check(value in known, f"{key}={value!r}; choose from {known}")


def share(section: Any, name: str, keys: str, *, whole: bool) -> None:
    """ConfigError unless the section's values lie in [0, 1), or with `whole` in [0, 1]."""
    for key in keys.split():
        value = getattr(section, key)
        check(0 <= value < 1 or (whole and value == 1),
              f"{name}.{key}={value} must lie in [0, 1{']' if whole else ')'}")  # fmt: skip


def positive(section: Any, name: str, keys: str) -> None:
    """ConfigError unless the section's values are above 0; `keys` are words."""
    for key in keys.split():
        value = getattr(section, key)
        check(value > 0, f"{name}.{key}={value} must be above 0")


def not_negative(section: Any, name: str, keys: str) -> None:
    """ConfigError unless the section's values are 0 or more; `keys` are words."""
    for key in keys.split():
        value = getattr(section, key)
        check(value >= 0, f"{name}.{key}={value} is negative; use 0 or more")

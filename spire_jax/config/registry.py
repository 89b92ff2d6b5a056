"""Registries: what a config names and code elsewhere defines.

What is built in is a plugin that comes along: it is registered when its home is imported, which
the first question to a registry does, by name, so that nothing here depends on what is below. A
stranger's is registered by the module that `plugins` names.

    @DRAFT_KINDS.register("mine")
    @dataclasses.dataclass(frozen=True)
    class MyOptions(TrainedOptions): ...
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from spire_jax.config.checks import ConfigError

if TYPE_CHECKING:
    from spire_jax.config.drafts import DraftOptions
    from spire_jax.config.schema import ModelConfig

T = TypeVar("T")


class Registry(Generic[T]):
    """Things by name."""

    def __init__(self, what: str, home: str):
        """
        Args:
            what: what one of them is called in messages, such as "draft kind".
            home: the module that registers those built in; of a package, any module in it may.
        """
        self.what, self.home = what, home
        self._found: dict[str, T] = {}
        self._home_is_in = False

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator; ConfigError where the name stands for something else."""

        def add(thing: T) -> T:
            if self._found.setdefault(name, thing) is not thing:
                raise ConfigError(
                    f"{self.what} {name!r} is registered twice: {_place(self._found[name])} and "
                    f"{_place(thing)}; rename one"
                )
            return thing

        return add

    def get(self, name: str) -> T:
        """What is registered under `name`; ConfigError lists the names and the nearest."""
        if name not in (known := self.items()):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(
                f"unknown {self.what} {name!r}{hint}; there are {self.names()}, and one of your "
                f"own needs the module that registers it in `plugins`"
            )
        return known[name]

    def names(self) -> list[str]:
        return sorted(self.items())

    def items(self) -> dict[str, T]:
        """Everything by name."""
        if not self._home_is_in:
            home = importlib.import_module(self.home)
            for module in pkgutil.iter_modules(getattr(home, "__path__", ())):
                importlib.import_module(f"{self.home}.{module.name}")
            self._home_is_in = True
        return dict(self._found)


def _place(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing)}"


def below(module: str) -> ModuleType:
    """A module of a folder below this one, imported when it is asked for."""
    return importlib.import_module(f"spire_jax.{module}")


DRAFT_KINDS: "Registry[type[DraftOptions]]" = Registry("draft kind", "spire_jax.drafting")
FAMILIES: "Registry[type[ModelConfig]]" = Registry("model family", "spire_jax.models.families")
# Of a draft's tokens: (distillation, alpha, logits, targets, omega) -> its value per token, where
# the first two compare the draft with the target (drafting/losses.py).
LOSSES: Registry[Callable[..., Any]] = Registry("loss", "spire_jax.drafting.losses")

"""Frozen dataclasses as pytrees: what decoding and evaluation carry through jitted functions."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax

T = TypeVar("T")


def record(*static: str) -> Callable[[type[T]], type[T]]:
    """Class decorator that makes a frozen dataclass a pytree; fields in `static` are no leaves.

    JAX rebuilds records around placeholders (avals, shardings, None). So unflattening sets the
    fields without `__init__`, whose annotated shapes hold for arrays only.
    """

    def register(cls: type[T]) -> type[T]:
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        leaves = [name for name in names if name not in static]

        def flatten_with_keys(value: T):
            keyed = [(jax.tree_util.GetAttrKey(n), getattr(value, n)) for n in leaves]
            return keyed, tuple(getattr(value, n) for n in static)

        def flatten(value: T):
            return [getattr(value, n) for n in leaves], tuple(getattr(value, n) for n in static)

        def unflatten(meta, children) -> T:
            value = object.__new__(cls)
            for name, child in (*zip(leaves, children, strict=True),
                                *zip(static, meta, strict=True)):  # fmt: skip
                object.__setattr__(value, name, child)
            return value

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return register

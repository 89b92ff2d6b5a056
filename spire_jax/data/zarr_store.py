"""Folders and buckets of token arrays, through TensorStore, which reads and writes them in time."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorstore as ts

from spire_jax.config.values import parse_json
from spire_jax.data.corpus import DataError

SECONDS = 30.0  # for one request when a corpus is opened; TensorStore's own retries take minutes


def open_store(place: str) -> ts.KvStore:
    """The folder or bucket prefix that `place` names, as TensorStore's key-value store.

    Raises:
        DataError: no such kind of store, or one that cannot be reached.
    """
    if "://" in place:
        spec: Any = place.rstrip("/") + "/"
    else:
        spec = {"driver": "file", "path": f"{pathlib.Path(place).absolute()}/"}
    with asked(place, "use a folder or a gs:// or s3:// URL, and check network and credentials"):
        return ts.KvStore.open(spec).result(timeout=SECONDS)


@contextlib.contextmanager
def asked(place: str, remedy: str) -> Iterator[None]:
    """A DataError that names the place for whatever TensorStore raises."""
    try:
        yield
    except TimeoutError as error:
        raise DataError(f"{place}: no answer in {SECONDS:.0f} s; {remedy}") from error
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place}: {reason(error)}; {remedy}") from error


def reason(error: Exception) -> str:
    """TensorStore's message without the specification that it ends with."""
    return str(error).split(" [")[0].replace("\0", "/")


def read_key(store: ts.KvStore, key: str) -> bytes | None:
    """The content of a key, None if there is no such key; DataError if it cannot be read."""
    with asked(store.url + key, "check that it can be read"):
        found = store.read(key).result(timeout=SECONDS)
    return found.value if found.state == "value" else None


def read_json(store: ts.KvStore, key: str) -> dict[str, Any] | None:
    """What a key holds, None if there is no such key; DataError if that is no JSON object."""
    content = read_key(store, key)
    if content is None:
        return None
    try:
        value = parse_json(content)
    except ValueError as error:
        raise DataError(f"{store.url}{key} is no JSON ({error}); copy the data again") from error
    if not isinstance(value, dict):
        raise DataError(f"{store.url}{key} is no JSON object; copy the data again")
    return value

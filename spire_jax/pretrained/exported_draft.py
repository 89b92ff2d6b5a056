"""A trained draft as a directory to pass on: config.json and model.safetensors, nothing pickled.

A draft is of use with one target only, the one that it was trained on; so the config holds the
hash of what that target computes, and an import names the target that it has. It also holds the
hash of the tensors' file, which tells a draft that was damaged, or put together from two.

    draft/config.json         format, draft, target and its hash, what it was trained on, leaves
    draft/model.safetensors   the parameters by flattened names: blocks.0.query
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from spire_jax.config.checks import ConfigError
from spire_jax.config.drafts import DraftOptions
from spire_jax.config.registry import DRAFT_KINDS, FAMILIES, Registry
from spire_jax.config.schema import ModelConfig
from spire_jax.config.values import section, to_dict
from spire_jax.models.transformer import Params
from spire_jax.pretrained import PretrainedError
from spire_jax.pretrained.safetensors_file import WEIGHTS, read_json, read_safetensors
from spire_jax.storage.checkpoint_files import flatten, is_nested_dict
from spire_jax.storage.metrics import write_whole

FORMAT = 2  # in 1 the hash was that of the target's files
CONFIG = "config.json"
KEYS = {"format", "draft", "model", "target", "target_sha256", "trained_on", "leaves",
        "weights_sha256"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ExportedDraft:
    """An exported draft whose config is checked; `load` reads its parameters."""

    path: pathlib.Path
    draft: DraftOptions
    target: ModelConfig
    target_sha256: str
    trained_on: dict[str, Any]  # JSON values: what the exporter said of data and training
    leaves: tuple[tuple[tuple[str | int, ...], str, tuple[int, ...]], ...]  # path, dtype, shape
    weights_sha256: str

    @property
    def model(self) -> ModelConfig:
        """The draft's transformer."""
        return self.draft.model(self.target)

    def load(self, abstract: Params | None = None) -> Params:
        """The parameters as they were exported, bit for bit: nested dicts of NumPy arrays.

        Args:
            abstract: the ShapeDtypeStructs of the model that they are for, to be compared.

        PretrainedError if the file is not the one that was exported, or not for that model.
        """
        place = self.path / WEIGHTS
        stored = read_safetensors(place)
        with open(place, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.weights_sha256:
                raise PretrainedError(
                    f"{place} is not the file that was exported with {CONFIG}: its hash is "
                    f"another; copy or export the draft again"
                )
        arrays = {name: stored.raw(name) for name in stored.tensors}
        stated = {_name(path): (dtype, shape) for path, dtype, shape in self.leaves}
        found = {name: (str(value.dtype), value.shape) for name, value in arrays.items()}
        _compare(place, found, stated, f"its {CONFIG} says; export the draft again")
        if abstract is not None:
            _compare(place, stated, _kinds(abstract), "the model has; build it from this draft's "
                     "config and target")  # fmt: skip
            model = jax.tree_util.tree_flatten_with_path(abstract)[0]
            keys = {tuple(key.key for key in path) for path, _ in model}
            if keys != {path for path, *_ in self.leaves}:
                raise PretrainedError(
                    f"{self.path / CONFIG}: leaves has texts where the model's keys are numbers, "
                    f"or the reverse; export the draft again"
                )
        params: Params = {}
        for (*parents, last), *_ in self.leaves:
            node = params
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = arrays[_name((*parents, last))]
        return params


def export_draft(
    directory: str | os.PathLike[str],
    params: Params,
    draft: DraftOptions,
    target: ModelConfig,
    target_sha256: str,
    trained_on: Mapping[str, Any],
) -> pathlib.Path:
    """Write a draft to `directory`, whole or not at all; returns its path.

    Args:
        params: nested dicts (keys are strings or ints) of arrays that this process can read.
        target_sha256: of the target that the draft was trained on (`Checkpoint.sha256`, or of
            the parameters of one that was trained here).
        trained_on: JSON-able values for the reader: data, steps, losses.

    PretrainedError if the directory holds anything but this very draft, or for a parameter that
    cannot be stored.
    """
    directory = pathlib.Path(os.path.abspath(directory))  # "." has a name, too
    if not is_nested_dict(params) or not jax.tree.leaves(params):
        raise PretrainedError(f"{directory}: the draft's parameters are no nested dicts of arrays")
    arrays, metadata = flatten(params)
    values = {
        "format": FORMAT,
        "draft": to_dict(draft),
        "model": to_dict(draft.model(target)),
        "target": to_dict(target),
        "target_sha256": target_sha256,
        "trained_on": dict(trained_on),
        "leaves": metadata["leaves"],
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
    temporary.mkdir()
    try:
        # safetensors takes the memory as it lies, so strides must be those of the shape.
        on_host = {name: np.asarray(value, order="C") for name, value in arrays.items()}
        save_file(on_host, temporary / WEIGHTS)
        with open(temporary / WEIGHTS, "rb") as file:
            values["weights_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        write_whole(temporary / CONFIG, json.dumps(values, indent=1) + "\n")
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        shutil.rmtree(temporary)
        raise PretrainedError(f"{directory}: the draft cannot be stored: {error}") from error
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        same = all(_content(directory / f) == _content(temporary / f) for f in (CONFIG, WEIGHTS))
        shutil.rmtree(temporary)
        if not same:
            raise PretrainedError(
                f"{directory} exists and does not hold this draft; export to another directory, "
                f"or remove it"
            )
        return directory
    temporary.rename(directory)
    return directory


def import_draft(directory: str | os.PathLike[str], target_sha256: str) -> ExportedDraft:
    """An exported draft for the target with this hash; `load` reads its parameters.

    PretrainedError for a draft of another target, an unknown format or key, a kind that nothing
    registers (the file names no code, and none is imported for it), a value of the wrong type, and
    a config that contradicts itself.
    """
    path = pathlib.Path(directory) / CONFIG
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise PretrainedError(
            f"{path}: format={values.get('format')!r}, and this version reads {FORMAT}; it is "
            f"no exported draft, or one of another version of spire_jax"
        )
    _keys(path, "", values, KEYS)
    if missing := sorted(KEYS - values.keys()):
        raise PretrainedError(f"{path}: {', '.join(missing)} missing; export the draft again")
    found = values["target_sha256"]
    if found != target_sha256:
        raise PretrainedError(
            f"{path}: the draft was made for another target: for the weights "
            f"{str(found)[:16]}..., and these are {target_sha256[:16]}...; use that target, or "
            f"train a draft for this one"
        )
    draft = _build(path, "draft", DRAFT_KINDS, "kind", values["draft"])
    target = _build(path, "target", FAMILIES, "family", values["target"])
    if values["model"] != to_dict(draft.model(target)):
        raise PretrainedError(
            f"{path}: `model` is not what follows from `draft` and `target`; export the draft "
            f"again, with this version of spire_jax"
        )
    if not isinstance(values["trained_on"], dict):
        raise PretrainedError(f"{path}: trained_on must be an object; export the draft again")
    return ExportedDraft(
        path.parent,
        draft,
        target,
        found,
        values["trained_on"],
        _leaves(path, values["leaves"]),
        str(values["weights_sha256"]),
    )


def _name(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _kinds(tree: Params) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        _name(tuple(key.key for key in keys)): (str(leaf.dtype), tuple(leaf.shape))
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _compare(place: pathlib.Path, found: Any, wanted: Any, whose: str) -> None:
    wrong = [f"{name} ({found.get(name, 'missing')} instead of {wanted.get(name, 'none')})"
             for name in sorted(found.keys() | wanted.keys())
             if found.get(name) != wanted.get(name)]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise PretrainedError(f"{place}: {', '.join(wrong[:5])}{more}: not the tensors {whose}")


def _leaves(path: pathlib.Path, values: Any) -> Any:
    """The config's list of [path, dtype, shape], as tuples."""
    try:
        leaves = tuple((tuple(keys), str(dtype), tuple(shape)) for keys, dtype, shape in values)
        good = all(
            keys
            and all(type(key) in (str, int) for key in keys)
            and all(type(n) is int for n in shape)
            for keys, _, shape in leaves
        )
        names = {_name(keys) for keys, _, _ in leaves}
        inner = {keys[:n] for keys, _, _ in leaves for n in range(1, len(keys))}
        good &= len(names) == len(leaves) and not inner & {keys for keys, _, _ in leaves}
    except (TypeError, ValueError):
        good = False
    if not good:
        raise PretrainedError(
            f"{path}: leaves must be a list of [path, dtype, shape]; export the draft again"
        )
    return leaves


def _keys(path: pathlib.Path, where: str, values: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(values.keys() - known):
        raise PretrainedError(
            f"{path}: unknown key {where}{unknown[0]}; it was written by another version of "
            f"spire_jax: update, or export the draft again with this one"
        )


def _build(path: pathlib.Path, where: str, registry: Registry[Any], key: str, values: Any) -> Any:
    """A dataclass from an object; a field that came after the export keeps its default."""
    if not isinstance(values, dict) or not isinstance(values.get(key), str):
        raise PretrainedError(f"{path}: {where} must be an object with its {key}; export again")
    try:
        cls = registry.get(values[key])
    except ConfigError as error:
        raise PretrainedError(f"{path}: {where}.{key}: {error}") from None
    _keys(path, f"{where}.", values, {field.name for field in dataclasses.fields(cls)})
    try:
        return section(cls, values, f"{where}.")
    except ConfigError as error:
        raise PretrainedError(f"{path}: {error}; export the draft again") from None


def _content(path: pathlib.Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None

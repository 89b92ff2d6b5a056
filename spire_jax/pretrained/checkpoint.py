"""A pretrained checkpoint: what it is, and its parameters, tensor by tensor.

Opening reads headers only, and compares every tensor's name and shape with what the architecture
has. Loading makes one parameter after the other; each device's shard is read from the mapped
file on its own, so that the host holds about one parameter beside those that are on devices, and
a process of many reads what its devices need.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from spire_jax.config.schema import ModelConfig
from spire_jax.config.values import parse_json
from spire_jax.models.sharding import spec
from spire_jax.models.transformer import Model, Params, Transformer
from spire_jax.pretrained import PretrainedError
from spire_jax.pretrained.architectures import from_config_json, from_gguf
from spire_jax.pretrained.gguf_file import GgufFile, read_gguf
from spire_jax.pretrained.safetensors_file import SafetensorsFiles, read_directory, read_json
from spire_jax.pretrained.tensor_names import CHUNK, Path, Source, read_part, sources
from spire_jax.storage.metrics import write_whole

DTYPES = ("float32", "bfloat16")
TIED_COPY = "lm_head.weight"
FREE = ("vocab_size", "max_len")  # fields that another model of the same function may have
SHOWN = 5  # tensors that an error names, of however many


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; `open_checkpoint` makes it."""

    path: pathlib.Path
    format: str  # "gguf" or "safetensors"
    architecture: str
    model: ModelConfig
    files: tuple[pathlib.Path, ...]  # all that its hash is made from
    weights: GgufFile | SafetensorsFiles
    sources: dict[Path, Source]

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the function: of the model's values and of its tensors as they are stored.

        What only describes it does not count: names and number of files, versions, a chat
        template, how far positions may go. Reads everything once.
        """
        # Without defaults: fields that will be added leave the hashes of today's models alone.
        model = {f.name: getattr(self.model, f.name) for f in dataclasses.fields(self.model)
                 if getattr(self.model, f.name) != f.default and f.name not in FREE}  # fmt: skip
        content = hashlib.sha256(json.dumps(model, sort_keys=True).encode())
        for name, heads in sorted({(s.tensor, s.interleaved) for s in self.sources.values()}):
            tensor = self.weights.tensors[name]
            content.update(f"\n{name} {tensor.dtype} {tensor.shape} {heads}\n".encode())
            content.update(self.weights.stored(name).data)
        return content.hexdigest()

    def cached_sha256(self, cache_dir: str | os.PathLike[str]) -> str:
        """`sha256`, kept in `cache_dir`, where that can be, until a file's size or time changes."""
        stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
        files = [list(stat) for stat in sorted(stats)]
        names = json.dumps([name for name, _, _ in files])
        place = pathlib.Path(cache_dir) / f"{hashlib.sha256(names.encode()).hexdigest()[:16]}.json"
        try:
            kept = parse_json(place.read_bytes())
            if kept["files"] == files:
                return str(kept["model_sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # absent, damaged or a hash of the files: hashed again
        kept = {"files": files, "model_sha256": self.sha256}
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, json.dumps(kept, indent=1) + "\n")
        return self.sha256

    def load(self, model: Model, mesh: Mesh | None, dtype: str = "float32") -> Params:
        """The parameters of `model`, a tree as `model.shapes()`, on the devices of `mesh`.

        Args:
            model: a Transformer of `self.model`; vocab_size (the padding) and max_len may differ.
            mesh: None for the default device.
            dtype: "float32"; "bfloat16" narrows what `Model.cast` narrows.

        PretrainedError for another model, and for a tied model whose stored lm_head.weight
        differs from its embedding. ValueError for another dtype.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}; choose from {DTYPES}")
        self._check_model(model.config)
        shapes, axes = model.shapes(), model.axes()
        leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
        logical = jax.tree.leaves(axes, is_leaf=lambda x: type(x) is tuple)
        paths = [tuple(key.key for key in keys) for keys, _ in leaves]
        if model.module is not Transformer or set(paths) != self.sources.keys():
            raise PretrainedError(
                f"{self.path} holds a plain transformer, not a {model.module.__name__}"
            )
        if self.model.tied and isinstance(self.weights, SafetensorsFiles):
            self._check_tied()
        loaded = []
        for path, (_, leaf), names in zip(paths, leaves, logical, strict=True):
            source = dataclasses.replace(self.sources[path], shape=leaf.shape)
            kind = jnp.dtype(dtype if any(names) else "float32")
            loaded.append(_place(self.weights, source, names, mesh, kind))
        return jax.tree.unflatten(structure, loaded)

    def _check_model(self, config: ModelConfig) -> None:
        here = dataclasses.asdict(self.model)
        here |= {name: getattr(config, name) for name in FREE}
        differing = [f"{key}={value!r} (here {here[key]!r})"
                     for key, value in dataclasses.asdict(config).items()
                     if value != here[key]]  # fmt: skip
        if config.vocab_size < self.model.n_tokens:
            differing.append(f"vocab_size={config.vocab_size} (here {self.model.n_tokens} tokens)")
        if differing:
            raise PretrainedError(
                f"{self.path} holds another model than {', '.join(differing)}; build it from "
                f"the checkpoint's own `model`"
            )

    def _check_tied(self) -> None:
        """Refuse a second unembedding that is not the embedding: which one is meant?"""
        embedding = self.sources["embedding",]
        if TIED_COPY not in self.weights.tensors:
            return
        rows, width = embedding.tensor_shape
        step = max(CHUNK // width, 1)
        for at in range(0, rows, step):
            part = slice(at, min(at + step, rows))
            one = self.weights.read(embedding.tensor, part)
            if not np.array_equal(one, self.weights.read(TIED_COPY, part)):
                raise PretrainedError(
                    f"{self.path}: tie_word_embeddings is true, and {TIED_COPY} differs from "
                    f"{embedding.tensor}; say false in config.json, or remove the tensor"
                )


def _place(
    weights: Any, source: Source, axes: tuple[str | None, ...], mesh: Mesh | None, dtype: Any
) -> jax.Array:
    """One parameter on its devices."""
    if mesh is None:
        whole = (slice(None),) * len(source.shape)
        return jax.block_until_ready(jax.device_put(read_part(weights, source, whole, dtype)))
    parts: dict[Any, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # None is of extended dtypes, such as random keys
        key = tuple((s.start, s.stop) for s in index)
        if key not in parts:  # devices along the axis `data` hold the same
            parts[key] = read_part(weights, source, index, dtype)
        return parts[key]

    sharding = NamedSharding(mesh, spec(*axes))
    array = jax.make_array_from_callback(source.shape, sharding, part, dtype=dtype)
    # A transfer that is still under way would keep this parameter on the host beside the next.
    return jax.block_until_ready(array)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A .gguf file, or a directory with config.json and safetensors; reads no weights.

    PretrainedError, naming the file, for what is damaged or not supported, and for tensors that
    are missing, unexpected or of another shape than the config says.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        checkpoint = _open_directory(path)
    elif path.is_file():
        file = read_gguf(path)
        kind, model = from_gguf(file)
        _check_depth(path, model, len(file.tensors))
        known = sources(model, gguf=True, interleaved=kind == "llama")
        checkpoint = Checkpoint(path, "gguf", kind, model, (path,), file, known)
    else:
        raise PretrainedError(f"{path} does not exist; give a .gguf file or a directory")
    _check_tensors(checkpoint)
    return checkpoint


def _open_directory(path: pathlib.Path) -> Checkpoint:
    place = path / "config.json"
    if not place.is_file():
        found = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"give the file {found[0]} itself" if found else "fetch the checkpoint again, whole"
        if snapshots := sorted(path.glob("snapshots/*/config.json")):  # of Hugging Face's cache
            hint = f"give the folder {snapshots[0].parent}"
        raise PretrainedError(f"{path} has no config.json; {hint}")
    kind, model = from_config_json(read_json(place), place)
    weights = read_directory(path)
    _check_depth(place, model, len(weights.tensors))
    files = (place, *weights.files)
    return Checkpoint(path, "safetensors", kind, model, files, weights, sources(model, gguf=False))


def _check_depth(path: pathlib.Path, model: ModelConfig, n_tensors: int) -> None:
    """Before names are made for as many layers as a header says."""
    if model.n_layers > n_tensors:
        raise PretrainedError(
            f"{path} says {model.n_layers} layers, and there are {n_tensors} tensors; fetch config "
            f"and weights again, from one revision"
        )


def _check_tensors(checkpoint: Checkpoint) -> None:
    found = {name: tensor.shape for name, tensor in checkpoint.weights.tensors.items()}
    wanted = {s.tensor: s.tensor_shape for s in checkpoint.sources.values()}
    wrong = [f"{name} {found[name]} instead of {shape}" for name, shape in wanted.items()
             if name in found and found[name] != shape]  # fmt: skip
    extra = [n for n in found.keys() - wanted.keys() if not _harmless(n, checkpoint)]
    problems = [
        f"{what} {_few(names)}"
        for what, names in (("missing:", wanted.keys() - found.keys()),
                            ("of another shape:", wrong), ("unexpected:", extra))
        if names
    ]  # fmt: skip
    if problems:
        raise PretrainedError(
            f"{checkpoint.path}: the tensors are not those of its config "
            f"({checkpoint.architecture}, {checkpoint.model.n_layers} layers); "
            f"{'; '.join(problems)}; fetch config and weights again, from one revision"
        )


def _harmless(name: str, checkpoint: Checkpoint) -> bool:
    """Tensors that repeat what the config says, and a tied unembedding (compared when loaded)."""
    if checkpoint.format == "gguf":
        return name == "rope_freqs.weight"
    return name.endswith("rotary_emb.inv_freq") or (checkpoint.model.tied and name == TIED_COPY)


def _few(names: Iterable[str]) -> str:
    names = sorted(f"{name:.100}" for name in names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

"""What is asked of every stranger's module: one run by the command line, and of it the same."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pipelines
import pytest
from test_oracle import ratio

from spire_jax import run
from spire_jax.config import files
from spire_jax.config.registry import Registry
from spire_jax.config.schema import AUTOREGRESSIVE, ExperimentConfig
from spire_jax.decoding import Weights, generate
from spire_jax.decoding.build import for_decoding, make_decoder
from spire_jax.export import export
from spire_jax.models.sampling import Sampling
from spire_jax.pretrained import PretrainedError
from spire_jax.pretrained.exported_draft import import_draft
from spire_jax.training.tasks import draft_task
from spire_jax.training.workdir import WorkDir

VALUES = {key: value for key, value in pipelines.OVERRIDES.items() if "drafts." not in key} | {
    "train.peak_lr": 2e-2,
    "decode.k": 3,
    "train.log_every": 1,
    "train.checkpoint_every": 100,
    "eval.contexts": 16,
    "eval.context_lengths": "20",
    "eval.batch_size": 16,
    "eval.decoder_samples": 3,
}


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished run."""

    config: ExperimentConfig
    folder: pathlib.Path

    @functools.cached_property
    def at(self) -> WorkDir:
        return WorkDir(self.config, self.folder)

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "report" / "summary.json").read_text())

    def weights(self, name: str) -> Weights:
        """In the types in which they decode."""
        target = self.at.target()
        drafts = {name: self.at.draft(name, target)} if name in self.config.trained else {}
        target, drafts = for_decoding(self.config, target, drafts)
        return Weights(target, drafts[name])

    def losses(self, name: str) -> list[float]:
        lines = (self.folder / "metrics" / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]


def finished(corpus: pathlib.Path, folder: pathlib.Path, **values: Any) -> Finished:
    """A run whose config file says nothing: all is set on the command line. `__` stands for dots
    and `plugins` names the stranger's module."""
    folder.mkdir(exist_ok=True)
    file = folder / "config.py"
    file.write_text("def get_config():\n    return {}\n")
    named = {key.replace("__", "."): value for key, value in values.items()}
    overrides = [f"{key}={value}" for key, value in
                 ({"data.source": corpus} | VALUES | named).items()]  # fmt: skip
    flags = [f"--config={file}", f"--workdir={folder / 'run'}"]
    assert run.main([*flags, *(f"--config.{override}" for override in overrides)]) == 0
    return Finished(files.load(file, overrides), folder / "run")


def check_greedy(of: Finished, name: str) -> None:
    """Token for token what the target writes alone."""
    rng, lengths = np.random.default_rng(0), (1, 2, 7, 20)
    prompts = [rng.integers(97, 123, n).astype(np.int32) for n in lengths]
    weights, texts = of.weights(name), []
    with jax.set_mesh(of.at.mesh):
        for method in (AUTOREGRESSIVE, name):
            decoder = make_decoder(of.config, method, sampling=Sampling(0.0))
            state = generate(decoder, weights, prompts, [24] * 4, [0] * 4, width=48)
            texts.append([np.asarray(state.tokens)[i, : n + 24] for i, n in enumerate(lengths)])
    for alone, found in zip(*texts, strict=True):
        np.testing.assert_array_equal(found, alone)
    kept = np.asarray(state.counts) @ np.arange(decoder.k + 1)
    assert kept.sum() > 0, "no draft was accepted: nothing is shown"


def check_report(of: Finished, name: str) -> None:
    """The oracle and the decoder agree, and the summary and the page have it."""
    k, lines = of.config.decode.k, (of.folder / "eval" / f"{name}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    oracle = [np.array([r["oracle"][part][k - 1] for r in records])
              for part in ("lengths_by_k", "rounds_by_k")]  # fmt: skip
    decoder = [np.array([float(r["decoder"][part]) for r in records])
               for part in ("lengths", "rounds")]  # fmt: skip
    (expected, its_error), (tau, error) = ratio(*oracle), ratio(*decoder)
    assert 1.02 < tau < k + 1 and error < 0.2 * tau
    assert abs(tau - expected) < 4 * np.hypot(error, its_error)
    found = of.summary["methods"][name]
    assert found["tau"] == pytest.approx(expected)
    assert found["modeled_multiplier"] > 0 and found["measured_tokens_per_s"] > 0
    assert name in (of.folder / "report" / "index.html").read_text()


def check_export(of: Finished, name: str, folder: pathlib.Path) -> pathlib.Path:
    """Exported and imported bit for bit."""
    export(of.config, str(of.folder), name, str(folder))
    found, task = import_draft(folder, of.at.target_sha256), draft_task(of.config, name)
    assert found.draft == of.config.draft(name) and found.target == of.config.target
    shapes = {key: x for key, x in task.model.shapes().items() if key not in task.shared}
    own = {key: x for key, x in of.at.draft(name).items() if key not in task.shared}
    loaded = found.load(shapes)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), loaded, own)
    return folder


def check_refused(
    of: Finished, folder: pathlib.Path, registry: Registry, name: str, monkeypatch
) -> None:
    """Where nothing registers it, an exported draft is refused by the name of what is missing."""
    known = {other: thing for other, thing in registry.items().items() if other != name}
    monkeypatch.setattr(registry, "_found", known)
    with pytest.raises(PretrainedError, match=f"unknown {registry.what} '{name}'"):
        import_draft(folder, of.at.target_sha256)

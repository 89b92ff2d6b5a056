"""Drafts written and read back bit for bit, for their own target alone."""

import dataclasses
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from models import TINY

from spire_jax.config.drafts import TransformerOptions
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.drafting.spire import SpireOptions
from spire_jax.pretrained import PretrainedError, exported_draft
from spire_jax.pretrained.exported_draft import export_draft, import_draft

TARGET, SHA = dataclasses.replace(TINY, rope_base=500000.0), "a" * 64
DRAFT = SpireOptions(n_layers=2, window=6, d_ff=24)
TRAINED_ON = {"text": "a folder", "steps": 12, "loss": 2.5}
FILES = {"config.json", "model.safetensors"}


def params(seed: int = 0) -> dict:
    """Leaves of every kind: NaNs with payloads, -0, bfloat16, integers, a scalar, transposed."""
    rng = np.random.default_rng(seed)
    odd = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    odd[0:1].view(np.uint32)[0] |= 0x1234
    return {
        "blocks": {i: {"query": jnp.asarray(rng.normal(size=(4, 2, 3)), jnp.float32),
                       "norm": {"scale": odd * (i + 1)}} for i in range(11)},
        "unembedding": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "head_ids": rng.integers(0, 2**31, 7).astype(np.int32),
        "mix": jnp.float32(0.25).reshape(()),
        "transposed": rng.normal(size=(5, 3)).astype(np.float32).T,
        "name.with.dots": np.zeros((0, 3), np.float16),
    }  # fmt: skip


def export(folder: pathlib.Path, values=None, **changes) -> pathlib.Path:
    given = {"draft": DRAFT, "target": TARGET, "target_sha256": SHA, "trained_on": TRAINED_ON}
    return export_draft(folder, params() if values is None else values, **{**given, **changes})


def shapes(values: dict):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)


def test_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PretrainedError, match="exists and does not hold this draft"):
        (tmp_path / "other").write_text("")
        export(pathlib.Path())
    (tmp_path / "other").unlink()
    assert import_draft(export(pathlib.Path()), SHA).draft == DRAFT


def test_round_trip(tmp_path):
    folder = export(tmp_path / "made" / "draft")
    assert {p.name for p in folder.iterdir()} == FILES
    assert [p.name for p in folder.parent.iterdir()] == ["draft"]
    found = import_draft(folder, SHA)
    assert (found.draft, found.target, found.trained_on) == (DRAFT, TARGET, TRAINED_ON)
    assert found.model == DRAFT.model(TARGET)
    loaded, expected = found.load(shapes(params())), params()
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        y = np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
    assert type(loaded["blocks"]) is dict and sorted(loaded["blocks"]) == list(range(11))


def test_readable(tmp_path):
    """The file names for the reader what the draft is, and its tensors what they are."""
    folder = export(tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == 2 and config["target_sha256"] == SHA
    assert config["draft"]["window"] == 6 and config["model"]["d_ff"] == 24
    content = (folder / "model.safetensors").read_bytes()
    names = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert names["blocks.10.query"]["shape"] == [4, 2, 3]


def test_existing(tmp_path, monkeypatch):
    """The same draft again changes nothing; nothing else is ever overwritten."""
    folder = export(tmp_path / "draft")
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert export(folder) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == times
    for changed in (
        dict(values=params(1)), dict(target_sha256="b" * 64), dict(trained_on={"steps": 13}),
    ):  # fmt: skip
        with pytest.raises(PretrainedError, match="exists and does not hold this draft"):
            export(folder, **changed)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == times
    other = tmp_path / "other"
    other.mkdir()
    export(other)
    (tmp_path / "a file").write_text("")
    with pytest.raises(PretrainedError, match="a file exists"):
        export(tmp_path / "a file")
    assert {p.name for p in tmp_path.iterdir()} == {"draft", "other", "a file"}


def test_all_or_nothing(tmp_path, monkeypatch):
    """A kill at any moment leaves no directory of that name, and the next export works."""

    class KilledError(BaseException):
        pass

    def killed(*_):
        raise KilledError

    for place, name in ((exported_draft, "save_file"), (exported_draft, "write_whole"),
                        (pathlib.Path, "rename")):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(place, name, killed)
            with pytest.raises(KilledError):
                export(tmp_path / "draft")
        assert not (tmp_path / "draft").exists()
    assert import_draft(export(tmp_path / "draft"), SHA).load()
    assert os.listdir(tmp_path) == ["draft"]


def test_cannot_be_stored(tmp_path):
    for values, message in (
        ({}, "no nested dicts"), ({"a": [np.zeros(2)]}, "no nested dicts of arrays"),
        ({"a": np.array(["text"])}, "cannot be stored"),
    ):  # fmt: skip
        with pytest.raises(PretrainedError, match=message):
            export(tmp_path / "draft", values)
    with pytest.raises(PretrainedError, match=r"cannot be stored: .*not JSON serializable"):
        export(tmp_path / "draft", trained_on={"loss": np.float32(1)})
    assert not list(tmp_path.iterdir())


# --- what is refused -----------------------------------------------------------------------------


def test_another_target(tmp_path):
    folder = export(tmp_path / "draft")
    with pytest.raises(PretrainedError, match=r"for another target: .*aaaa\.\.\., .*bbbb\.\.\."):
        import_draft(folder, "b" * 64)


CONFIGS = {
    "format": (lambda c: c.update(format=1), "format=1, and this version reads 2"),
    "no format": (lambda c: c.pop("format"), "format=None, .* it is no exported draft"),
    "a key": (lambda c: c.update(more=1), "unknown key more; .* update, or export"),
    "no key": (lambda c: c.pop("leaves"), "leaves missing; export the draft again"),
    "draft's key": (lambda c: c["draft"].update(heads=1), "unknown key draft.heads; "),
    "target's key": (lambda c: c["target"].update(moe=1), "unknown key target.moe; "),
    "type": (lambda c: c["draft"].update(window="6"), "draft.window='6' should be int"),
    "bool": (lambda c: c["target"].update(tied=0), "target.tied=0 should be bool"),
    "no object": (lambda c: c.update(draft=[]), "draft must be an object"),
    "no kind": (lambda c: c["draft"].pop("kind"), "draft must be an object with its kind"),
    "unknown kind": (lambda c: c["draft"].update(kind="os"), "draft.kind: unknown draft kind 'os'"),
    "unknown family": (
        lambda c: c["target"].update(family="rwkv"),
        "target.family: unknown model fam",
    ),
    "contradiction": (lambda c: c["draft"].update(d_ff=16), "`model` is not what follows"),
    "target's sizes": (lambda c: c["target"].update(d_head=4), "`model` is not what follows"),
    "data": (lambda c: c.update(trained_on=1), "trained_on must be an object"),
    "leaves": (lambda c: c.update(leaves=[["a"]]), "leaves must be a list of"),
    "leaf twice": (lambda c: c["leaves"].append(c["leaves"][0]), "leaves must be a list of"),
    "leaf within": (lambda c: c["leaves"].append([["mix", "a"], "float32", []]), "leaves must be"),
    "key of a leaf": (lambda c: c["leaves"].append([[0.5], "float32", []]), "leaves must be"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_config(case, tmp_path):
    change, message = CONFIGS[case]
    folder = export(tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PretrainedError, match=rf"config.json: {message}"):
        import_draft(folder, SHA)


def test_later_field(tmp_path):
    """A field that did not exist when the draft was exported has its default."""
    folder = export(tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    del config["draft"]["omega"]
    (folder / "config.json").write_text(json.dumps(config))
    assert import_draft(folder, SHA).draft == DRAFT


@dataclasses.dataclass(frozen=True)
class OddOptions(TransformerOptions):
    kind: str = "odd"
    depths: tuple[int, ...] = ()
    words: tuple[str, ...] = ("a",)
    weights: tuple[tuple[str, float], ...] = ()


def test_any_option_of_any_kind_is_carried(tmp_path, monkeypatch):
    """Lists and mappings too; without the module that registers the kind the draft is refused."""
    draft = OddOptions(n_layers=2, depths=(1, 4), words=("x", "y"), weights=(("b", 0.5), ("a", 1)))
    folder = export(tmp_path / "draft", draft=draft)
    with pytest.raises(PretrainedError, match=r"kind 'odd'.* the module that registers it in `plu"):
        import_draft(folder, SHA)
    monkeypatch.setattr(DRAFT_KINDS, "_found", DRAFT_KINDS.items() | {"odd": OddOptions})
    found = import_draft(folder, SHA).draft
    assert found == draft and hash(found) == hash(draft)


def test_an_import_runs_no_code(tmp_path, monkeypatch):
    """Whatever the file names: a kind is looked up, never imported."""
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = export(tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    for more in ({"plugins": ["trap"]}, {"draft": config["draft"] | {"kind": "trap"}}):
        (folder / "config.json").write_text(json.dumps(config | more))
        with pytest.raises(PretrainedError, match="unknown"):
            import_draft(folder, SHA)
    assert "trap" not in sys.modules


def test_not_there(tmp_path):
    with pytest.raises(PretrainedError, match=r"config.json does not exist"):
        import_draft(tmp_path, SHA)
    folder = export(tmp_path / "draft")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PretrainedError, match=r"model.safetensors does not exist"):
        import_draft(folder, SHA).load()


def test_damaged_tensors(tmp_path):
    folder = export(tmp_path / "draft")
    place = folder / "model.safetensors"
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    with pytest.raises(
        PretrainedError, match=r"is not the file that was exported with config.json"
    ):
        import_draft(folder, SHA).load()
    place.write_bytes(content[:-1])
    with pytest.raises(PretrainedError, match=r"is no whole safetensors file"):
        import_draft(folder, SHA).load()


LEAVES = {  # what is done to the leaves, the last one of which is `unembedding`
    "missing": (lambda leaves: leaves.pop(), r"\('bfloat16', \(3, 5\)\) instead of none"),
    "surplus": (lambda leaves: leaves.append([["b"], "int32", [1]]), r"b \(missing instead of"),
    "shape": (lambda leaves: leaves[-1].__setitem__(2, [5, 3]), r"instead of .*\(5, 3\)"),
    "dtype": (lambda leaves: leaves[-1].__setitem__(1, "float16"), "instead of .*'float16'"),
}


@pytest.mark.parametrize("case", LEAVES)
def test_other_tensors(case, tmp_path):
    change, message = LEAVES[case]
    folder = export(tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    config["leaves"].sort(key=lambda leaf: leaf[0] == ["unembedding"])
    change(config["leaves"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PretrainedError, match=f"{message}.*not the tensors its config.json says"):
        import_draft(folder, SHA).load()


def test_other_model(tmp_path):
    """The abstract tree of the model that the parameters are for has the last word."""
    found = import_draft(export(tmp_path / "draft"), SHA)
    abstract = shapes(params())
    abstract["head_ids"] = jax.ShapeDtypeStruct((7,), jnp.float32)
    del abstract["mix"]
    abstract["bias"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(
        PretrainedError, match=r"bias \(missing.*, head_ids .*, mix .* the model has"
    ):
        found.load(abstract)


def test_keys_that_look_alike(tmp_path):
    """A text in the place of a number: the tensors' names are the same, the trees are not."""
    folder = export(tmp_path / "draft")
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    for path, *_ in config["leaves"]:
        path[:] = [str(key) if key == 3 else key for key in path]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PretrainedError, match="leaves has texts where the model's keys are number"):
        import_draft(folder, SHA).load(shapes(params()))

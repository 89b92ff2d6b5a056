"""Meshes of eight devices against one: loss, gradients, parameters, decoding.

Eight host-platform devices need a process of their own, which this file is run as
(`python tests/test_sharding.py RESULTS`); the tests read what it found.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np
import pytest

if __name__ == "__main__":
    import conftest  # noqa: F401  (shapes are checked in this process too)

import devices
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from models import ANCHORS, SINK, TINY, WINDOW, computed_by, init, pair, ragged, texts

from spire_jax.config.drafts import TrainedOptions
from spire_jax.config.schema import (
    ConfigError,
    ExperimentConfig,
    MeshConfig,
    TrainConfig,
)
from spire_jax.decoding import Weights, generate
from spire_jax.drafting.anchor import AnchorOptions
from spire_jax.drafting.block import BlockOptions
from spire_jax.drafting.eagle3 import Eagle3Options
from spire_jax.drafting.longspec import LongSpecOptions
from spire_jax.drafting.pruning import prune
from spire_jax.drafting.spire import SpireOptions
from spire_jax.drafting.stride import StrideOptions
from spire_jax.models.attention import Compute, attention
from spire_jax.models.masks import View
from spire_jax.models.sharding import check_mesh, constrain, make_mesh, shardings, spec
from spire_jax.models.transformer import Model, Transformer
from spire_jax.training.loop import init_state, make_optimizer, train_step
from spire_jax.training.tasks import (
    TrainBatch,
    draft_task,
    init_params,
    target_task,
    teach,
    teacher,
    with_shared,
)

MESHES = {
    "one": MeshConfig(1, 1, 1),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=-1),
}
# An axis alone is a case of all of them.
SHARDED = ["all", *(pytest.param(name, marks=pytest.mark.slow) for name in ("data", "fsdp"))]
SMALL = dataclasses.replace(TINY, n_layers=2)  # few layers and depths: compiling takes the time
WIDE = dataclasses.replace(SMALL, d_head=32)  # heads that the kernels take
CONFIG = ExperimentConfig(
    target=SMALL,
    drafts=(("spire", SpireOptions(n_layers=1, window=WINDOW, sink=SINK)),),
    train=TrainConfig(batch_size=8, seq_len=16, k=2),
)
# Kinds of the full tier.
LATER: dict[str, TrainedOptions] = {
    "longspec": LongSpecOptions(window=WINDOW),
    "anchor": AnchorOptions(anchors=ANCHORS, full_every=2, line=4, budget=2),
    "eagle3": Eagle3Options(window=WINDOW, sink=SINK, share_embedding=False),
    "block": BlockOptions(n_layers=1, window=WINDOW, sink=SINK, k=2, offsets=(1,), head="markov",
                          head_rank=4, confidence=True),
    "stride": StrideOptions(n_layers=1, window=WINDOW, sink=SINK, strides=(2,), head="recurrent",
                            head_rank=4),
}  # fmt: skip
EVERY = dataclasses.replace(CONFIG, drafts=(*CONFIG.drafts, *LATER.items()))
K, BUDGET = 2, 14
SHAPES = [  # meshes of six devices
    (MeshConfig(), (6, 1, 1)),
    (MeshConfig(data=2, fsdp=-1), (2, 3, 1)),
    (MeshConfig(data=1, fsdp=2, tensor=-1), (1, 2, 3)),
    (MeshConfig(data=3, fsdp=2, tensor=1), (3, 2, 1)),
]
LENGTHS = (1, 2, 5, 9, 14, 3, 1, 7)
# Message, mesh of eight devices, and what does not divide over it.
BAD: dict[str, tuple[MeshConfig, dict[str, Any]]] = {
    "train.batch_size / train.accumulate=12 is not a multiple of mesh data x fsdp = 8": (
        MeshConfig(), dict(train=TrainConfig(batch_size=24, accumulate=2))),
    "eval.batch_size=10 is not a multiple of mesh data x fsdp = 4": (
        MeshConfig(tensor=2), dict(eval=dataclasses.replace(CONFIG.eval, batch_size=10))),
    "target.n_kv_heads=2 is not a multiple of mesh.tensor=4": (
        MeshConfig(data=2, tensor=4), dict()),
    "target.d_model=36 is not a multiple of mesh.fsdp=8": (
        MeshConfig(data=1, fsdp=8), dict(target=dataclasses.replace(TINY, d_model=36))),
    "drafts.spire.d_ff=25 is not a multiple of mesh.tensor=2": (
        MeshConfig(tensor=2), dict(drafts=(("spire", SpireOptions(d_ff=25)),))),
}  # fmt: skip


# --- in the process of eight devices -----------------------------------------------------------


def recorder() -> optax.GradientTransformation:
    """An optimizer that changes nothing and whose state is the last gradient."""
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)  # noqa: E731
    return optax.GradientTransformation(zeros, lambda grads, state, params: (zeros(grads), grads))


def parameters(kind: str = "spire") -> tuple:
    target = init(Model(Transformer, SMALL, Compute()), 0, sharpness=2.0)
    task = draft_task(EVERY, kind)
    own = {name: x for name, x in init(task.model, 1).items() if name not in task.shared}
    # As deep as the target a pruned draft would agree with it, where acceptance has an edge.
    return target, prune(target, own) if kind == "spire" else own


def batch() -> TrainBatch:
    rows = texts(8, 17)
    mask = np.arange(16) < np.arange(9, 17)[:, None]  # rows of unlike numbers of tokens
    return TrainBatch(*(jnp.asarray(x) for x in (rows[:, :-1], rows[:, 1:], mask)))


def gradient(kind: str, mesh, accumulate: int = 1):
    """Loss, acceptance by depth and gradient of one step of the real training step."""
    task = target_task(CONFIG) if kind == "target" else draft_task(EVERY, kind)
    target, draft = parameters("spire" if kind == "target" else kind)
    placed = jax.device_put(target, shardings(mesh, target_task(CONFIG).model.axes()))
    params, frozen = (target, None) if kind == "target" else (draft, placed)
    optimizer = recorder()
    train = dataclasses.replace(CONFIG.train, accumulate=accumulate)
    state = init_state(task, optimizer, params, mesh)
    lesson = None if kind == "target" else teach(teacher(EVERY, [task]), frozen, batch())
    fixed = with_shared(task, {}, placed)
    state, metrics = train_step(task, train, optimizer, state, lesson, batch(), fixed)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state["opt_state"])])
    depths = metrics.get("alpha_by_depth", jnp.zeros(0))
    return float(metrics["loss"]), flat.astype(np.float64), np.asarray(depths), state


def sharding_of(x: jax.Array) -> dict[str, object]:
    assert isinstance(x.sharding, NamedSharding)
    return {"spec": list(x.sharding.spec), "share": x.addressable_shards[0].data.size / x.size}


def decode(mesh, kernels: bool = False, kind: str = "spire") -> tuple[list, dict]:
    """By the draft and the target; by the kernels, the target alone."""
    p = computed_by("interpret", pair("self", WIDE)) if kernels else pair(kind, SMALL)
    weights = Weights(
        jax.device_put(p.target_params, shardings(mesh, p.target.axes())),
        jax.device_put(p.draft_params, shardings(mesh, p.strategy.model.axes())),
    )
    prompts = ragged(LENGTHS)
    decoder = p.autoregressive(0.0) if kernels else p.decoder(K, 0.0)
    if kind == "block":  # rows choose how much is verified
        decoder = dataclasses.replace(decoder, prices=(1.0, 1.5, 2.05), widths=(1, 2))
    state = generate(decoder, weights, prompts, [BUDGET] * 8, range(8))
    if kernels or kind != "spire":
        return np.asarray(state.tokens).tolist(), {}
    arrays = {"tokens": state.tokens, "keys": state.target_cache[0].keys,
              "ring": state.draft_state[0].keys}  # fmt: skip
    return np.asarray(state.tokens).tolist(), {n: sharding_of(x) for n, x in arrays.items()}


def kernel_gradient() -> list:
    """Of a windowed attention over four rows, by the kernels, on the mesh in force."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(4, 40, 2, 2, 32)), jnp.float32)
    at, compute = np.arange(40), Compute(attention="interpret")

    def loss(q):
        out, lse = attention(q, q[..., 0, :], q[..., 1, :], at, at, View(window=9), compute=compute)
        return jnp.sum(out**2) + jnp.sum(lse)

    return np.asarray(jax.jit(jax.grad(loss))(q)).ravel().tolist()


def shardings_kept(mesh) -> bool:
    """Whether every array of the optimizer's state and the parameters stays where it was."""
    task = target_task(CONFIG)
    optimizer = make_optimizer(CONFIG.train, task)
    before = init_state(task, optimizer, parameters()[0], mesh)
    placed = [x.sharding for x in jax.tree.leaves(before)]
    after, _ = train_step(task, CONFIG.train, optimizer, before, None, batch())
    leaves = jax.tree.leaves(after)
    return all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in zip(leaves, placed, strict=True))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def main(path: str, *names: str) -> None:
    found: dict[str, Any] = {
        key: {} for key in ("gradients", "decoding", "sharding", "errors", "kernels")
    }
    one = {}
    for name in names:
        sizes = MESHES[name]
        mesh = make_mesh(sizes, jax.devices()[:1] if name == "one" else jax.devices())
        with jax.set_mesh(mesh):
            for kind in ("target", "spire", *(LATER if len(names) > 2 else ())):
                twice = name == "all" and kind in ("target", "longspec")
                for accumulate in (1, 2) if twice else (1,):
                    loss, grads, depths, state = gradient(kind, mesh, accumulate)
                    if name == "one":
                        one[kind] = loss, grads, depths
                        assert np.linalg.norm(grads) > 1e-2
                        continue
                    found["gradients"][f"{name} {kind} {accumulate}"] = [
                        abs(loss / one[kind][0] - 1),
                        relative(grads, one[kind][1]),
                        float(np.abs(depths - one[kind][2]).max(initial=0)),
                    ]
                block = state["params"]["blocks"][0]
                found["sharding"][f"{name} {kind}"] = {
                    leaf: sharding_of(block[leaf]) for leaf in ("query", "down")
                }
            if name == "all":
                found["step keeps shardings"] = shardings_kept(mesh)
            tokens, placed = decode(mesh)
            found["decoding"][name] = {"tokens": tokens, "sharding": placed}
            for kind in LATER if len(names) > 2 else ():
                found["decoding"][f"{name} {kind}"] = {"tokens": decode(mesh, kind=kind)[0]}
            if name in ("one", "all"):
                found["kernels"][name] = decode(mesh, kernels=True)[0], kernel_gradient()
    six = jax.devices()[:6]
    found["shapes"] = [list(make_mesh(sizes, six).shape.values()) for sizes, _ in SHAPES]
    narrow = dataclasses.replace(TINY, n_layers=1, d_model=16)
    small = Model(Transformer, narrow, Compute())
    mesh = make_mesh(MESHES["all"])
    with jax.set_mesh(mesh):
        made = init_params(small, jax.random.key(0), mesh)
    found["initial"] = sharding_of(made["blocks"][0]["query"])
    for message, (sizes, changes) in BAD.items():
        try:
            check_mesh(make_mesh(sizes), dataclasses.replace(CONFIG, **changes))
            found["errors"][message] = "no error"
        except ConfigError as error:
            found["errors"][message] = str(error)
    check_mesh(make_mesh(MESHES["all"]), CONFIG)  # this one fits
    pathlib.Path(path).write_text(json.dumps(found))


# --- the tests ---------------------------------------------------------------------------------

AFTER = [pytest.param(kind, marks=pytest.mark.slow) for kind in LATER]


@pytest.fixture(scope="module")
def found(tmp_path_factory, request) -> dict:
    names = list(MESHES)[: None if request.config.getoption("--full") else 2]
    return devices.found_by(__file__, 8, tmp_path_factory.mktemp("sharding"), *names)


@pytest.mark.parametrize("mesh", SHARDED)
@pytest.mark.parametrize("kind", ["target", "spire", *AFTER])
def test_loss_and_gradients_are_those_of_one_device(found, mesh, kind):
    loss, gradients, alpha = found["gradients"][f"{mesh} {kind} 1"]
    assert loss < 1e-5 and gradients < 1e-5 and alpha < 1e-5


@pytest.mark.parametrize("kind", ["target", pytest.param("longspec", marks=pytest.mark.slow)])
def test_accumulated_gradients_are_those_of_one_device_at_once(found, kind):
    loss, gradients, alpha = found["gradients"][f"all {kind} 2"]
    assert loss < 1e-5 and gradients < 1e-5 and alpha < 1e-5


@pytest.mark.parametrize("mesh", SHARDED)
@pytest.mark.parametrize("kind", ["", *AFTER])
def test_decoding_gives_the_tokens_of_one_device(found, mesh, kind):
    names = (f"{name} {kind}".strip() for name in ("one", mesh))
    one, other = (np.array(found["decoding"][name]["tokens"]) for name in names)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(one[row, : length + BUDGET], other[row, : length + BUDGET])
        assert one[row, length : length + BUDGET].any()


def test_kernels_on_a_mesh_are_those_of_one_device(found):
    """Each device computes its own rows and heads: tokens, and a gradient."""
    (one, one_gradient), (tokens, gradient) = (found["kernels"][name] for name in ("one", "all"))
    for a, b, length in zip(one, tokens, LENGTHS, strict=True):
        assert a[: length + BUDGET] == b[: length + BUDGET] and any(a[length:])
    np.testing.assert_allclose(gradient, one_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", SHARDED)
@pytest.mark.parametrize("kind", ["target", "spire"])
def test_parameters_are_sharded(found, mesh, kind):
    placed = found["sharding"][f"{mesh} {kind}"]
    share = {"all": 1 / 4, "data": 1, "fsdp": 1 / 8}[mesh]
    assert [placed[leaf]["share"] for leaf in ("query", "down")] == [share, share]
    if mesh == "all":
        assert placed["query"]["spec"][:2] == ["fsdp", "tensor"]
        assert placed["down"]["spec"] == ["tensor", "fsdp"]


def test_a_step_leaves_parameters_and_moments_where_they_are(found):
    assert found["step keeps shardings"]


def test_no_array_is_replicated_to_be_sharded_anew(found):
    """XLA warns of it; the embedding's look-up is where it would happen."""
    assert "Involuntary full rematerialization" not in found["stderr"]


@pytest.mark.parametrize("mesh", SHARDED)
def test_the_decode_batch_and_its_caches_are_sharded(found, mesh):
    """Rows over data and fsdp, KV heads over tensor."""
    placed = found["decoding"][mesh]["sharding"]
    assert placed["tokens"]["share"] == (1 / 4 if mesh == "all" else 1 / 8)
    assert placed["keys"]["share"] == placed["ring"]["share"] == 1 / 8


def test_initial_parameters_are_made_where_they_live(found):
    assert found["initial"]["share"] == 1 / 4


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_divide_over_the_mesh_is_an_error(found, message):
    assert found["errors"][message] == message


def test_mesh_takes_what_is_left(found):
    assert found["shapes"] == [list(shape) for _, shape in SHAPES]


@pytest.mark.parametrize(
    "sizes", [MeshConfig(data=4), MeshConfig(data=-1, fsdp=4), MeshConfig(data=6, fsdp=2)]
)
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(sizes):
    with pytest.raises(ConfigError, match=r"mesh: data=.* does not fit 6 devices") as error:
        make_mesh(sizes, [object()] * 6)
    assert "must be 6 (-1 takes what is left)" in str(error.value)


def test_no_mesh_no_constraint():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", None) is x
    assert spec("batch", None, "kv_heads") == jax.sharding.PartitionSpec(
        ("data", "fsdp"), None, "tensor"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

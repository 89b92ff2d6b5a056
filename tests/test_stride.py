"""SPIRe with a stride: its two ends, what a slot depends on, heads, and what is drawn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import SINK, TINY, WINDOW, init, target, texts
from models import pair as pair_of

from spire_jax.config import files
from spire_jax.config.checks import ConfigError
from spire_jax.config.identity import plan
from spire_jax.costs.throughput import round_cost
from spire_jax.decoding.build import for_decoding
from spire_jax.drafting.strategy import forced
from spire_jax.drafting.stride import StrideOptions, passes
from spire_jax.models.attention import Compute
from spire_jax.models.masks import may_attend
from spire_jax.models.sampling import Sampling
from spire_jax.models.transformer import Model

T, K = 20, 4
STARTS = np.arange(0, T - K + 1, 3)
VALID = slice(0, TINY.n_tokens)
DRAFT = StrideOptions(window=WINDOW, sink=SINK, head_rank=4)


@functools.cache
def strategy(**options):
    return dataclasses.replace(DRAFT, **options).strategy(TINY, Compute())


@functools.cache
def params(head: str = "none"):
    return init(strategy(head=head).model, 1)


@functools.cache
def given():
    """Texts, and the target's activations that a draft of two layers reads."""
    model, of_target = target()
    tokens = jnp.asarray(texts(2, T))
    return tokens, jax.jit(lambda w, x: model.bind(w).prefill(x, strategy().collect)[0])(
        of_target, tokens
    )


def rollout(own, stride: int, k: int = K, head: str = "none") -> np.ndarray:
    of = strategy(head=head).model
    run = jax.jit(lambda w, *x: of.bind(w).strided_rollout(*x, STARTS, k, stride))
    return np.asarray(run(own, *given()))[..., VALID]


@functools.cache
def plain(stride: int) -> np.ndarray:
    return rollout(params(), stride)


def spires() -> np.ndarray:
    """SPIRe's own rollout with the same parameters."""
    of, own = pair_of("spire").strategy.model, dict(params())
    del own["mask"]
    run = jax.jit(lambda w, *x: of.bind(w).rollout(*x, STARTS, K))
    return np.asarray(run(own, *given()))[..., VALID]


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)


def test_a_stride_of_one_is_spire_and_every_stride_begins_like_it():
    close(plain(1), spires())
    for stride in (2, 4):
        close(plain(stride)[:, :, 0], spires()[:, :, 0])
        assert np.abs(plain(stride)[:, :, 1] - spires()[:, :, 1]).max() > 0.1


def one_pass(start: int) -> np.ndarray:
    """The block draft by definition: the last token and masks, over the target's memories."""
    tokens, activations = given()
    module = strategy().model.bind(params())
    positions, read = start + np.arange(K), np.arange(start)
    mask = jnp.broadcast_to(module.mask[...], (2, K - 1, TINY.d_model))
    x = jnp.concatenate([module.embed(tokens[:, start : start + 1]), mask], axis=1)
    k_pos = np.concatenate([read, positions])
    sees = may_attend(positions[:, None], k_pos[None], WINDOW, SINK)
    for i, block in enumerate(module.blocks):
        q = block.queries(x, positions)
        memory = module.read_target(
            i, tokens[:, :start], tuple(y[:, :start] for y in activations), read
        )
        k, v = (jnp.concatenate(y, axis=1)
                for y in zip(memory, block.keys_values(x, positions), strict=True))  # fmt: skip
        logits = module.views[i].scale * jnp.einsum("btkgh,bskh->bkgts", q, k)
        weights = jax.nn.softmax(jnp.where(sees, logits, -jnp.inf), axis=-1)
        x = block.finish(x, jnp.einsum("bkgts,bskh->btkgh", weights, v))
    return np.asarray(module.unembed(x))[..., VALID]


def test_a_stride_of_k_is_a_block_draft():
    for r, start in enumerate(STARTS):
        close(plain(K)[:, r], one_pass(int(start)))


def test_a_shallower_round_is_the_beginning_of_a_deeper_one():
    close(rollout(params(), 2, 3), plain(2)[:, :, :3])


def test_passes_of_a_round():
    assert passes(4, 1) == [(1, 1)] * 4 and passes(4, 4) == [(1, 4)]
    assert passes(8, 3) == [(1, 3), (3, 3), (3, 2)] and passes(3, 8) == [(1, 3)]


def test_masks_leave_no_memory_and_known_tokens_do():
    """The first slot of a pass sees no mask at all, the others do; a pass sees those before it."""
    changed = params() | {"mask": params()["mask"] + 1.0}
    differs = np.abs(rollout(changed, 2) - plain(2)).max(axis=(0, 1, 3)) > 1e-3
    assert differs.tolist() == [False, True] * 2
    of, (tokens, activations), own = strategy().model, given(), params()
    run = jax.jit(lambda x: of.bind(own).strided_rollout(x, activations, STARTS, K, 2))
    for place, first in ((1, 2), (2, 2), (3, 4)):  # offsets of a known token: seen from pass 1 on
        other = tokens.at[:, STARTS[0] + place].add(1) % TINY.n_tokens
        after = np.asarray(run(other))[:, 0, :, VALID]
        differs = np.abs(after - plain(2)[:, 0]).max(axis=(0, 2)) > 1e-4
        assert differs.tolist() == [j >= first for j in range(K)], place


@pytest.mark.parametrize("head", ["markov", "recurrent"])
def test_heads_add_what_follows_from_the_tokens_before(head):
    own, base = params(head) | params(), plain(2)
    tokens = np.asarray(given()[0])
    expected = np.zeros_like(base)
    w1, w2 = np.asarray(own["head_in"]), np.asarray(own["head_out"])[:, VALID]
    for r, start in enumerate(STARTS):
        for j in range(K):
            h = w1[tokens[:, start + j]]
            if head == "recurrent":
                state = np.zeros_like(h) if j % 2 == 0 else state
                h = state = np.tanh(h + state @ np.asarray(own["head_mix"]))
            expected[:, r, j] = h @ w2
    close(rollout(own, 2, head=head) - base, expected, 2e-5)
    assert np.abs(expected).max() > 0.1
    own["head_out"] = jnp.zeros_like(own["head_out"])
    close(rollout(own, 2, head=head), base)


def test_before_training_the_mask_is_the_mean_embedding_and_the_head_says_nothing():
    draft = dataclasses.replace(DRAFT, head="markov")
    _, of_target = target()
    fresh = draft.strategy(TINY, Compute()).model.init(jax.random.key(0))
    begun = draft.initial(of_target, fresh)
    close(begun["mask"], np.asarray(of_target["embedding"]).mean(axis=0))
    assert not np.asarray(begun["head_out"]).any() and np.asarray(begun["head_in"]).any()
    shared = dataclasses.replace(draft, share_embedding=True)
    own = {name: x for name, x in fresh.items() if name != "embedding"}
    close(shared.initial(of_target, own)["mask"], begun["mask"])


def test_each_batch_is_of_one_of_the_strides():
    """Which, its tokens say: the same in another run, and all of them come up."""
    of, (tokens, activations), own = strategy(strides=(1, 2, 4)), given(), params()
    predict = jax.jit(lambda x: of.predict(own, x, activations, 4))
    starts, seen = np.arange(0, T, 4), set()
    run = jax.jit(
        lambda x, stride: of.model.bind(own).strided_rollout(x, activations, starts, 4, stride),
        static_argnums=1,
    )
    for shift in range(4):
        x = tokens.at[0, 0].set(shift)
        stride = (1, 2, 4)[int(x.sum()) % 3]
        close(predict(x)[..., VALID], run(x, stride).reshape(2, T, -1)[..., VALID])
        seen.add(stride)
    assert seen == {1, 2, 4}


@pytest.mark.parametrize(
    "context, wanted",
    [(32, [2.06, 2.68, 1.56, 1.86, 1.30, 1.46]), (512, [1.23, 1.39, 1.12, 1.20, 1.06, 1.11]),
     (4096, [1.03, 1.06, 1.02, 1.03, 1.01, 1.02])],
)  # fmt: skip
def test_a_rounds_cost_is_the_methods_table(pair, context, wanted):
    """method.md section 8: per operator, without and with the unembedding, strides 1, 2 and 4."""
    found = []
    for stride in (1, 2, 4):
        draft = StrideOptions(window=64, stride=stride)
        of = dataclasses.replace(pair, drafts=(("it", draft),))
        found += [round_cost(of, "it", batch=64, context=context, k=4, variant=variant).delta_t
                  for variant in ("per_operator", "with_head")]  # fmt: skip
    assert found == pytest.approx(wanted, abs=0.013)


@pytest.mark.parametrize("head, draws", [("markov", "sampled"), ("recurrent", "argmax")])
def test_a_step_is_a_round_of_one(head, draws):
    of, own = strategy(head=head, draws=draws), params(head)
    state = of.empty(own, 2, 1, T)
    last, at = jnp.asarray([3, 5]), jnp.asarray([0, 0])
    proposal, _ = of.propose(own, state, (), last, last, at, 1, forced(last[:, None], Sampling()))
    logits, _ = of.step(own, state, (), last[:, None], at[:, None])
    close(logits[:, VALID], proposal.q[:, 0, VALID])
    assert np.isfinite(np.asarray(logits)[:, VALID]).all() == (draws == "sampled")


# --- one draft, several ways to decode with it ---------------------------------------------------

CONFIG = ("drafts.spire.kind=stride", "drafts.wide.weights_of=spire", "drafts.wide.stride=4")


def test_another_stride_is_a_method_of_the_same_weights():
    of = files.load("configs/quickstart.py", CONFIG)
    assert (of.draft("wide").stride, of.draft("spire").stride) == (4, 1)
    assert dataclasses.replace(of.draft("wide"), stride=1, weights_of="") == of.draft("spire")
    assert "wide" not in of.trained and of.weights("wide") == of.weights("spire") == "spire"
    assert of.weights("magicdec") == of.weights("autoregressive") == ""
    narrow, wide = (
        plan(files.load("configs/quickstart.py", [*CONFIG[:2], f"drafts.wide.stride={s}"]), "")
        for s in (2, 4)
    )
    assert narrow.drafts == wide.drafts and list(wide.drafts) == ["spire", "vanilla"]
    assert narrow.evaluate.hash != wide.evaluate.hash
    params = {"spire": {"x": jnp.zeros(1)}}
    small = dataclasses.replace(of, drafts=tuple(d for d in of.drafts if d[0] != "vanilla"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "cast", lambda self, tree: tree)
        _, found = for_decoding(small, {"target": jnp.zeros(1)}, params)
    assert found["wide"] is found["spire"] is params["spire"] and "target" in found["magicdec"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["drafts.wide.weights_of=spir"], "drafts.wide.weights_of='spir'"),
        (["drafts.wide.weights_of=spire", "drafts.wide.window=9"],
         "drafts.wide.window=9, but spire, whose weights it uses, has 32; leave it out"),
        (["drafts.wide.weights_of=magicdec"], "weights_of"),
        (["drafts.wide.weights_of=spire", "drafts.more.weights_of=wide"],
         "has no weights of its own; name the draft whose they are, 'spire'"),
        (["drafts.spire.kind=stride", "drafts.spire.strides="], "must be one or more"),
        (["drafts.spire.kind=stride", "drafts.spire.attend_self=false"], "attend_self: the tokens"),
        (["drafts.spire.kind=stride", "drafts.spire.head=gru"], "head='gru'; choose from"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        files.load("configs/quickstart.py", overrides)

"""Block drafts: their ends in other kinds, what a slot sees, grids, losses, what heads can do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from models import SINK, TINY, WINDOW, init, target, texts
from test_stride import close

from spire_jax.config import files
from spire_jax.config.checks import ConfigError
from spire_jax.config.schema import ExperimentConfig, TrainConfig
from spire_jax.costs.throughput import round_cost
from spire_jax.drafting.block import BlockOptions, grid
from spire_jax.drafting.learning import TrainBatch
from spire_jax.drafting.losses import draft_loss
from spire_jax.drafting.spire import SpireOptions
from spire_jax.drafting.strategy import Processed, forced
from spire_jax.drafting.stride import StrideOptions
from spire_jax.models.attention import Compute
from spire_jax.models.masks import may_attend
from spire_jax.models.sampling import Sampling
from spire_jax.models.sharding import make_mesh
from spire_jax.training.loop import init_state, make_optimizer, train_step
from spire_jax.training.tasks import Lesson, draft_task

T, K = 20, 4
STARTS = np.arange(0, T - K + 1, 3)
VALID = slice(0, TINY.n_tokens)
DRAFT = BlockOptions(window=WINDOW, sink=SINK, head_rank=4, fused=(1, 3))


@functools.cache
def strategy(**options):
    return dataclasses.replace(DRAFT, **options).strategy(TINY, Compute())


@functools.cache
def params(**options):
    return init(strategy(**options).model, 1)


@functools.cache
def given():
    """Texts, and the target's activations that the drafts here fuse."""
    model, of_target = target()
    tokens = jnp.asarray(texts(2, T))
    return tokens, jax.jit(lambda w, x: model.bind(w).prefill(x, (1, 3))[0])(of_target, tokens)


def rollout(own, of, k: int = K, inputs=None, method: str = "strided_rollout") -> np.ndarray:
    stride = (k,) if method == "strided_rollout" else ()
    run = jax.jit(lambda w, *x: getattr(of.model.bind(w), method)(*x, STARTS, k, *stride))
    return np.asarray(run(own, *(inputs or given())))[..., VALID]


@functools.cache
def plain(bidirectional: bool, k: int = K) -> np.ndarray:
    return rollout(params(), strategy(bidirectional=bidirectional), k)


# --- other kinds at its ends -------------------------------------------------------------------

SAME = dict(window=WINDOW, sink=SINK, memory="fused", fused=(1, 3), feedback=False)


def test_a_causal_block_is_a_stride_of_k_and_begins_like_spire():
    strided = StrideOptions(**SAME, stride=K).strategy(TINY, Compute())
    close(plain(False), rollout(params(), strided))
    spire = SpireOptions(**SAME).strategy(TINY, Compute())
    own = {name: x for name, x in params().items() if name != "mask"}
    spires = rollout(own, spire, method="rollout")
    close(plain(False)[:, :, 0], spires[:, :, 0])
    for other in (plain(True)[:, :, :1], plain(False)[:, :, 1:]):
        assert np.abs(other - spires[:, :, : other.shape[2]]).max() > 0.1


@pytest.mark.slow
def test_a_causal_block_fed_the_true_tokens_is_spire_without_feedback():
    """A text of one token, which is what the mask is."""
    tokens = jnp.full((2, T), 3)
    own = params() | {"mask": params()["embedding"][3]}
    spire = SpireOptions(**SAME).strategy(TINY, Compute())
    spires = {name: x for name, x in own.items() if name != "mask"}
    inputs = tokens, given()[1]
    wanted = rollout(spires, spire, inputs=inputs, method="rollout")
    close(rollout(own, strategy(bidirectional=False), inputs=inputs), wanted)
    assert np.abs(np.diff(wanted, axis=2)).max() > 0.1


@pytest.mark.slow
def test_a_causal_rounds_beginning_is_a_shallower_round():
    close(plain(False), plain(False, 2 * K)[:, :, :K])
    assert np.abs(plain(True) - plain(True, 2 * K)[:, :, :K]).max() > 1e-2


@pytest.mark.slow
def test_a_bidirectional_round_is_of_all_slots_whatever_is_asked_for():
    of, own, (tokens, ys) = strategy(), params(), given()

    @functools.partial(jax.jit, static_argnums=0)
    def along(k: int):
        read = tuple(y[:, :-1] for y in ys)
        return of.along(own, tokens, read, (), np.arange(T - 1), np.arange(3, 12), k, Sampling())

    whole = along(K)
    close(along(2), whole[..., :2])
    deeper = np.asarray(along(K + 2))
    close(deeper[..., :K], whole)
    assert not deeper[..., K:].any() and np.asarray(whole).min() > 0
    with pytest.raises(ValueError, match="of 4 slots cannot draft 5 tokens"):
        of.width(5)
    narrow, wide = (DRAFT.cost(TINY, 16, k) for k in (2, K))
    assert [p.tokens for p in narrow.passes] == [p.tokens for p in wide.passes] == [K]
    assert narrow.passes[0].drafted == 2 and narrow.slots == wide.slots


# --- a block by definition ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_block_is_the_last_token_and_masks_over_fused_memories(bidirectional):
    tokens, ys = given()
    module = strategy(bidirectional=bidirectional).model.bind(params())
    for r, start in enumerate(STARTS.tolist()):
        positions, read = start + np.arange(K), np.arange(start)
        mask = jnp.broadcast_to(module.mask[...], (2, K - 1, TINY.d_model))
        x = jnp.concatenate([module.embed(tokens[:, start : start + 1]), mask], axis=1)
        k_pos = np.concatenate([read, positions])
        sees = may_attend(positions[:, None], k_pos[None], WINDOW, SINK)
        sees |= bidirectional & (k_pos[None] > positions[:, None])
        for i, block in enumerate(module.blocks):
            q = block.queries(x, positions)
            memory = module.read_target(i, tokens[:, :start], tuple(y[:, :start] for y in ys), read)
            k, v = (jnp.concatenate(y, axis=1)
                    for y in zip(memory, block.keys_values(x, positions), strict=True))  # fmt: skip
            logits = module.views[i].scale * jnp.einsum("btkgh,bskh->bkgts", q, k)
            weights = jax.nn.softmax(jnp.where(sees, logits, -jnp.inf), axis=-1)
            x = block.finish(x, jnp.einsum("bkgts,bskh->btkgh", weights, v))
        close(plain(bidirectional)[:, r], np.asarray(module.unembed(x))[..., VALID])


@pytest.mark.slow
def test_a_head_of_zeros_says_nothing():
    own = params(head="markov") | params()
    of = strategy(head="markov")
    assert np.abs(rollout(own, of) - plain(True)).max() > 0.1
    close(rollout(own | {"head_out": jnp.zeros_like(own["head_out"])}, of), plain(True))


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length, k, offset", [(12, 4, 0), (12, 4, 1), (12, 4, 3), (4, 4, 2)])
def test_a_grid_has_every_token_once(length, k, offset):
    starts, sizes = grid(length, k, offset)
    at = np.concatenate([s + np.arange(n) for s, n in zip(starts, sizes, strict=True)])
    assert at.tolist() == list(range(length)) and max(sizes) <= k
    assert (starts % k == offset)[1:].all() and starts[0] == 0


@pytest.mark.slow
def test_each_batch_draws_where_its_blocks_begin():
    of, (tokens, ys), own = strategy(head="markov"), given(), params(head="markov")
    predict = jax.jit(lambda x: (of.predict(own, x, ys, K), of.depths(x, K)))
    every = np.arange(T)
    run = jax.jit(lambda x: of.model.bind(own).strided_rollout(x, ys, every, K, K))
    seen = set()
    for shift in range(K):
        x = tokens.at[0, 0].set(shift)
        offset = int(x.sum()) % K
        logits, depths = predict(x)
        starts, sizes = grid(T, K, offset)
        wanted = np.concatenate([np.arange(n) for n in sizes])
        assert np.asarray(depths).tolist() == wanted.tolist()
        begins = np.repeat(starts, sizes)
        close(logits[..., VALID], np.asarray(run(x))[:, begins, wanted][..., VALID])
        seen.add(offset)
    assert seen == set(range(K))


@pytest.mark.slow
def test_losses_weigh_depths_and_teach_confidence():
    """exp(-(j - 1) / gamma) over its mean; cross-entropy against alpha, which it does not teach."""
    draft = dataclasses.replace(
        DRAFT, loss="dspark", gamma=2.0, confidence=True, confidence_weight=0.5, offsets=(1,)
    )
    of, (tokens, ys) = draft.strategy(TINY, Compute()), given()
    own = init(of.model, 1) | {"confidence_bias": jnp.asarray([0.3])}
    p = jax.nn.softmax(jnp.asarray(np.random.default_rng(0).normal(size=(2, T, TINY.vocab_size))))
    batch = TrainBatch(tokens, (tokens + 1) % TINY.n_tokens, jnp.ones((2, T), bool))
    lesson = Lesson(p, dict(zip((1, 3), ys, strict=True)), {})
    loss = draft.learns(of, K)
    values, alpha = jax.jit(loss)(own, lesson, batch)
    logits, confidence = jax.jit(lambda w: of.predict_slots(w, tokens, ys, K))(own)
    plain, expected = draft_loss("dspark", 0.5, p, logits, batch.targets)
    close(alpha, expected)
    chance = np.asarray(jax.nn.sigmoid(confidence))
    plain += 0.5 * -(alpha * np.log(chance) + (1 - alpha) * np.log(1 - chance))
    weights = np.exp(-np.array([0, *[0, 1, 2, 3] * 4, 0, 1, 2]) / 2)
    close(values, plain * weights / np.exp(-np.arange(K) / 2).mean())
    assert np.ptp(confidence) > 0.1

    def of_bce(w):
        return jnp.sum(loss(w, lesson, batch)[0]) - jnp.sum(
            dataclasses.replace(loss, confidence=0.0)(w, lesson, batch)[0]
        )

    gradient = jax.jit(jax.grad(of_bce))(own)
    assert np.abs(gradient["confidence_vector"]).max() > 0.1
    assert np.abs(gradient["unembedding"]).max() < 1e-4  # through alpha alone
    assert np.abs(gradient["mask"]).max() > 1e-3  # the body learns it, too


def test_dsparks_loss_is_a_tenth_of_the_hard_target_and_nine_tenths_of_a_distance():
    rng = np.random.default_rng(0)
    p = jax.nn.softmax(jnp.asarray(rng.normal(size=(3, 7))))
    logits, tokens = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32), jnp.asarray([2, 0, 6])
    q = np.asarray(jax.nn.softmax(logits))
    found, _ = draft_loss("dspark", 0.5, p, logits, tokens)
    close(found, 0.1 * -np.log(q[np.arange(3), tokens]) + 0.9 * np.abs(p - q).sum(axis=-1))


# --- its cost, and what cannot be --------------------------------------------------------------


def test_a_rounds_cost(pair):
    """As method.md's stride of 4; fused memories add their matrix."""
    found = []
    for memory in ("layers", "fused"):
        draft = BlockOptions(window=64, memory=memory)
        of = dataclasses.replace(pair, drafts=(("it", draft),))
        where = dict(batch=64, context=512, k=4, variant="per_operator")
        found.append(round_cost(of, "it", **where).delta_t)
    assert found[0] == pytest.approx(1.06, abs=0.013)
    assert found[0] < found[1] < found[0] + 0.01


BLOCK = "drafts.spire.kind=block"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["decode.k=6"], "spire.k=4 slots are all that a bidirectional block has been trained for, "
                         "but a round drafts 6 tokens"),
        (["decode.depths=2,8"], "drafts 8 tokens"),
        (["drafts.spire.offsets=0,4"], r"offsets=\(0, 4\) must be different ones of 0 to"),
        (["drafts.spire.feedback=true"], "feedback: a block feeds nothing back"),
        (["drafts.spire.gamma=-1"], "gamma=-1.0 is negative"),
        (["drafts.spire.k=5"], "drafts.spire.k=5 does not divide train.seq_len"),
        (["drafts.spire.stride=2"], "stride.* of kind 'stride'|'stride'"),
        (["drafts.spire.fused=1,12"], r"fused=\(1, 12\): the target has the activations y\^0"),
        (["drafts.spire.fused=1,1"], "names a layer twice"),
        (["drafts.spire.loss=dspark", "drafts.spire.head_tokens=100"], "cannot learn the hard"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        files.load("configs/quickstart.py", [BLOCK, *overrides])


def test_a_causal_block_may_go_on():
    of = files.load("configs/quickstart.py", [BLOCK, "drafts.spire.bidirectional=false",
                                              "decode.k=6", "eval.context_lengths=64"])  # fmt: skip
    assert of.draft("spire").k == 4


# --- confidence --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block", "stride_confident"])
def test_survival_is_the_product_of_what_the_rollout_is_sure_of(kind):
    """Whatever is drawn at the slot: what comes after it alone may know."""
    p = models.pair(kind)
    of, own, (tokens, start) = p.strategy, p.draft_params, (jnp.asarray(texts(2, T)), 7)

    @jax.jit
    def run(params, own, drafts):
        ys, _ = p.target.bind(params).prefill(tokens, of.collect)
        at = jnp.tile(jnp.arange(start), (2, 1))
        prompt = Processed(tokens[:, :start], at, tuple(y[:, :start] for y in ys), ())
        state = of.begin(own, prompt, jnp.full(2, start), K, T)
        last, place = tokens[:, start], jnp.full(2, start)
        given = forced(drafts, Sampling())
        proposal, _ = of.propose(own, state, (), last, last, place, K, given)
        text = tokens.at[:, start + 1 : start + 1 + K].set(drafts)
        module, slots = of.model.bind(own), 5 if kind == "block" else K
        stride = slots if kind == "block" else 1
        x = module.strided_slots(text, ys, np.array([start]), slots, stride)
        return proposal.survival, module.confidence(x)[:, 0, :K]

    drafts = tokens[:, 1 : K + 1]
    found, confidence = run(p.target_params, own, drafts)
    close(found, np.cumprod(jax.nn.sigmoid(confidence), axis=1))
    assert np.asarray(found).min() > 0 and np.ptp(confidence) > 0.1
    for j in range(K):
        moved, _ = run(p.target_params, own, (drafts.at[:, j].add(1)) % TINY.n_tokens)
        np.testing.assert_array_equal(moved[:, : j + 1], found[:, : j + 1])
        # One pass knows nothing of what is drawn; of several the later ones do.
        assert np.array_equal(moved, found) == (kind == "block" or j == K - 1)


# --- what a slot can know of those before it: sources whose next tokens are known exactly -------

SOURCE = dataclasses.replace(TINY, n_layers=1, vocab_size=8, n_tokens=8)


def course_or_problem(rng, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """0, then "of course" (1 3) or "no problem" (2 4): texts, and the next token's distribution."""
    first = rng.integers(1, 3, (rows, length // 3 + 1))
    text = np.stack([np.zeros_like(first), first, first + 2], axis=2).reshape(rows, -1)
    p = np.eye(8)[np.roll(text, -1, axis=1)]
    p[:, ::3] = np.eye(8)[[1, 2]].mean(axis=0)
    return text[:, : length + 1], p[:, :length]


def parity(rng, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """0, two coins (1 or 2, 3 or 4), then whether they are alike (5 or 6)."""
    a, b = rng.integers(0, 2, (2, rows, length // 4 + 1))
    text = np.stack([0 * a, 1 + a, 3 + b, 5 + (a ^ b)], axis=2).reshape(rows, -1)
    p = np.eye(8)[np.roll(text, -1, axis=1)]
    for place, coin in ((0, [1, 2]), (1, [3, 4])):
        p[:, place::4] = np.eye(8)[coin].mean(axis=0)
    return text[:, : length + 1], p[:, :length]


def tau_of(draft, source, period: int, k: int, steps: int = 200) -> float:
    """Tokens of a round of k that begins with the source's period, of a trained draft."""
    length = 24
    draft = dataclasses.replace(draft, n_layers=1, init="random", memory="embedding",
                                loss="distillation", window=0, head_rank=16)  # fmt: skip
    train = TrainConfig(steps=steps, batch_size=32, seq_len=length, k=draft.k or k, peak_lr=1e-2)
    config = ExperimentConfig(target=SOURCE, drafts=(("it", draft),), train=train)
    task, mesh = draft_task(config, "it"), make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        rng, optimizer = np.random.default_rng(0), make_optimizer(train, task)
        own = draft.initial({"embedding": jnp.zeros((8, 8))}, init(task.model, 0))
        own["mask"] = jnp.ones(TINY.d_model)
        state = init_state(task, optimizer, own, mesh)
        full = jnp.ones((32, length), bool)
        for _ in range(steps):
            text, p = source(rng, 32, length)
            text = jnp.asarray(text, jnp.int32)
            batch = TrainBatch(text[:, :-1], text[:, 1:], full)
            lesson = Lesson(jnp.asarray(p, jnp.float32), {}, {})
            state, _ = train_step(task, train, optimizer, state, lesson, batch)
        text, p = source(rng, 64, length)
        starts = np.arange(0, length - k, period)
        module = task.model.bind
        slots, stride = (k, 1) if isinstance(draft, StrideOptions) else (draft.k, draft.k)
        logits = jax.jit(lambda w, x: module(w).strided_rollout(x, (), starts, slots, stride))(
            state["params"], jnp.asarray(text[:, :-1], jnp.int32)
        )
    q = np.asarray(jax.nn.softmax(logits))[:, :, :k]
    alpha = np.minimum(q, p[:, starts[:, None] + np.arange(k)]).sum(axis=-1)
    return float(1 + np.cumprod(alpha, axis=-1).sum(axis=-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    "draft, tau",
    [(BlockOptions(k=2), 2.5), (BlockOptions(k=2, head="markov"), 3.0),
     (BlockOptions(k=2, head="markov", bidirectional=False), 3.0),
     (StrideOptions(strides=(1,)), 3.0)],
    ids=["block", "markov", "causal markov", "chain"],
)  # fmt: skip
def test_of_course_or_no_problem(draft, tau):
    """Without a head the second slot does not know which of the two the first one began."""
    assert tau_of(draft, course_or_problem, 3, 2) == pytest.approx(tau, abs=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("head, tau", [("none", 3.5), ("markov", 3.5), ("recurrent", 4.0)])
def test_what_two_tokens_decide_defeats_a_head_that_knows_one(head, tau):
    found = tau_of(BlockOptions(k=4, head=head, offsets=(0,)), parity, 4, 3, steps=400)
    assert found == pytest.approx(tau, abs=0.12)

"""The feedback draft: rollout against the target, decoding against rollout, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FUSED, SINK, TINY, WINDOW, init, pair, target, texts

from spire_jax.costs.roofline import Roofline
from spire_jax.drafting.spire import SpireDraft, SpireOptions, mean_of_blocks, target_layers
from spire_jax.drafting.strategy import Processed
from spire_jax.models.attention import Compute
from spire_jax.models.caches import empty_full, full_cache
from spire_jax.models.transformer import Model, Transformer

T, K = 24, 4  # a text well beyond window + sink + k = 11
KINDS = ["spire", "spire_strict", "spire_plain"]
# Other memories, and another mask.
MORE = ["spire_final", "spire_embedding", "spire_dense",
        pytest.param("spire_fused", marks=pytest.mark.slow)]  # fmt: skip
VALID = slice(0, TINY.n_tokens)
STARTS = np.arange(T - K + 1)


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(
        np.asarray(found)[..., VALID], np.asarray(expected)[..., VALID],
        atol=tolerance, rtol=tolerance,
    )  # fmt: skip


@functools.cache
def rollout_of(kind: str):
    """jitted (params, tokens, activations) -> logits (B, R, k, V) from every start."""
    model = pair(kind).strategy.model
    return jax.jit(lambda params, *given: model.bind(params).rollout(*given, STARTS, K))


@functools.cache
def reference(kind: str):
    """Texts of two rows, the target's activations that the draft reads, rollout's logits.

    MagicDec's rollout is over the target's keys and values instead.
    """
    p = pair(kind)
    tokens = jnp.asarray(texts(2, T))
    activations, keys_values = prefilled(kind)(p.target_params, tokens)
    if kind != "magicdec":
        return tokens, activations, rollout_of(kind)(p.draft_params, tokens, activations)
    bind, everything = p.strategy.model.bind, np.arange(T)
    logits = jax.jit(lambda w, kv, x: bind(w).rollout_over(kv, x, everything, STARTS, K))(
        p.draft_params, keys_values, tokens
    )
    return tokens, activations, logits


@functools.cache
def prefilled(kind: str):
    """jitted (params, tokens) -> the target's activations that the draft reads, keys and values."""
    p = pair(kind)
    return jax.jit(lambda params, x: p.target.bind(params).prefill(x, p.strategy.collect))


# --- the target's limit ------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [False, True], ids=["own inputs", "one-hot memories"])
def test_memories_of_the_layers_own_input_and_nothing_pruned_are_the_target(feedback):
    """All N layers, each reading its own input: the target under the draft's mask."""
    windowed = dataclasses.replace(TINY, window=WINDOW, sink=SINK)
    _, params = target()
    model = Model(Transformer, windowed, Compute())
    draft = Model(SpireDraft, windowed, Compute(), (("feedback", feedback),))
    memory = {}
    if feedback:  # softmax of 1e4 against 0 is one-hot to the last bit
        memory = {"memory_mix": 1e4 * jnp.eye(TINY.n_layers, TINY.n_layers + 1)}
    tokens = jnp.asarray(texts(2, T))
    layers = target_layers(TINY.n_layers, TINY.n_layers)

    @jax.jit
    def both(params, memory):
        logits, activations = model.bind(params).forward(tokens, layers)
        module = draft.bind(params | memory)
        rollout = module.rollout(tokens, activations, np.arange(0, T, K), K)
        return logits, rollout.reshape(logits.shape)

    close(*both(params, memory))
    if feedback:  # ... and what is learned at first is near it, not equal to it
        logits, mixed = both(params, {"memory_mix": init(draft, 0)["memory_mix"]})
        difference = np.abs(logits - mixed)[..., VALID]
        assert difference.max() > 1e-3
        assert difference[:, ::K].max() < 1e-4  # no drafted memory is read at depth 1


def test_target_layers_are_those_that_the_copied_layers_read():
    assert target_layers(8, 2) == (6, 7)
    assert target_layers(3, 3) == (0, 1, 2)
    assert target_layers(8, 2, "final") == (8,)
    assert target_layers(8, 2, "embedding") == ()


@pytest.mark.parametrize("kind", ["spire_final", "spire_embedding"])
def test_other_memories_are_other_activations_and_mixes(kind):
    """The same as SPIRe's own layers given by hand what the other kind reads."""
    p = pair(kind)
    tokens, activations, found = reference(kind)
    params = dict(p.draft_params)
    if kind == "spire_final":
        _, (last,) = jax.jit(lambda w, x: p.target.bind(w).forward(x, (TINY.n_layers,)))(
            p.target_params, tokens
        )
        params["memory_mix"] = jnp.tile(params["memory_mix"], (2, 1))
        assert np.argmax(params["memory_mix"], axis=1).tolist() == [2, 2]
        given = (last, last)
    else:
        assert activations == ()
        given = (params["embedding"][tokens],) * 2
    close(found, rollout_of("spire")(params, tokens, given))
    ordinary = rollout_of("spire")(params, tokens, reference("spire")[1])
    assert np.abs(found - ordinary)[..., VALID].max() > 1e-2


@pytest.mark.slow
def test_fused_memories_are_one_vector_for_all_layers():
    """RMSNorm(concat(y) F), by hand, as what every layer makes its own keys and values of."""
    p = pair("spire_fused")
    tokens, activations, found = reference("spire_fused")
    assert p.strategy.collect == FUSED and len(activations) == 2
    params = dict(p.draft_params)
    matrix, scale = params.pop("fuse"), params.pop("norm_fused")["scale"]
    assert matrix.shape == (2 * TINY.d_model, TINY.d_model)
    y = np.concatenate(activations, axis=-1) @ np.asarray(matrix)
    y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + TINY.norm_eps) * np.asarray(scale)
    close(found, rollout_of("spire")(params, tokens, (jnp.asarray(y),) * 2))
    other = p.draft_params | {"norm_fused": {"scale": scale * np.linspace(0.1, 2, TINY.d_model)}}
    moved = np.abs(found - rollout_of("spire_fused")(other, tokens, activations))
    assert moved[..., VALID].max() > 1e-2


@pytest.mark.slow
def test_a_pruned_draft_starts_with_the_mean_of_what_it_fuses():
    """Of one activation that is what the copied block read in the target."""
    of_target = target()[1]
    tokens, (_, last), _ = reference("spire")
    logits = []
    for memory in ("layers", "fused"):
        draft = SpireOptions(n_layers=1, window=WINDOW, sink=SINK, memory=memory)
        model = draft.strategy(TINY, Compute()).model
        begun = draft.initial(of_target, init(model, 1))
        rollout = jax.jit(lambda w, *x, model=model: model.bind(w).rollout(*x, STARTS[:1], 2))
        logits.append(rollout(begun, tokens, (last,)))
    close(*logits)
    fresh = jnp.ones((3 * TINY.d_model, TINY.d_model))
    ys = np.random.default_rng(0).normal(size=(5, 3, TINY.d_model))
    close(ys.reshape(5, -1) @ np.asarray(mean_of_blocks(fresh)), ys.mean(axis=1))
    random = SpireOptions(memory="fused", init="random")
    fresh = {"fuse": fresh}
    assert random.initial(of_target, fresh) is fresh


def test_what_fuses_costs_its_bytes_and_products():
    draft = SpireOptions(window=WINDOW, memory="fused", fused=FUSED)
    plain = dataclasses.replace(draft, memory="layers", fused=())
    found, without = (d.cost(TINY, 20, K) for d in (draft, plain))
    matrix = 2 * TINY.d_model**2
    assert found.more == without.more + matrix + TINY.d_model
    assert [p.weights for p in found.passes] == [matrix, 0, 0, 0]
    assert found.passes[0].products == (K + 1) * matrix
    sizes, read = draft.model(TINY), dict(batch=8, tokens=1, rows=10.0)
    memory, compute = Roofline(1e9, "paper", 1, 1), Roofline(1e-9, "paper", 1, 1)
    extra = dict(weights=matrix, products=(K + 1) * matrix)
    for of, more in ((memory, matrix * 1e9), (compute, 2 * 8 * (K + 1) * matrix)):
        assert of.forward(sizes, **read, **extra) - of.forward(sizes, **read) == pytest.approx(more)


def test_a_draft_without_a_window_sees_everything():
    """The first token, far outside the window of the others, changes the last prediction."""
    moved = {}
    for kind in ("spire", "spire_dense"):
        tokens, activations, before = reference(kind)
        other = tuple(y.at[:, SINK].add(1.0) for y in activations)  # the first that is no sink
        after = rollout_of(kind)(pair(kind).draft_params, tokens, other)
        moved[kind] = float(np.abs(after - before)[:, -1, :, VALID].max())
    assert moved["spire"] == 0 and moved["spire_dense"] > 1e-3


# --- decoding computes what training computed --------------------------------------------------


@functools.cache
def step_of(kind: str):
    """jitted draft step (params, cache, tokens, positions), to share between tests."""
    strategy = pair(kind).strategy

    @jax.jit
    def step(params, cache, tokens, positions):
        # None of these reads the target's cache while it drafts.
        return strategy.step(params, cache, (), tokens[:, None], positions[:, None])

    return step


@pytest.mark.parametrize("kind", [*KINDS, *MORE, "magicdec"])
def test_steps_after_prefill_are_the_rollout_from_every_start(kind):
    """One row per start, 0 to beyond window + sink + k, prefilled to its own length."""
    p = pair(kind)
    tokens, _, expected = reference(kind)
    rows = len(STARTS)
    one_text = jnp.tile(tokens[:1], (rows, 1))
    ys, keys_values = prefilled(kind)(p.target_params, one_text)
    target_cache = tuple(full_cache(*kv, T, Compute()) for kv in keys_values)
    at = jnp.tile(jnp.arange(T), (rows, 1))
    cache = jax.jit(lambda params, *x: p.strategy.begin(params, *x, K, T))(
        p.draft_params, Processed(one_text, at, ys, target_cache), jnp.asarray(STARTS)
    )
    for depth in range(K):
        positions = jnp.asarray(STARTS + depth)
        logits, cache = step_of(kind)(p.draft_params, cache, tokens[0, positions], positions)
        close(logits, expected[0, :, depth])


@pytest.mark.parametrize("kind", [*KINDS, *MORE, "magicdec"])
def test_steps_after_refresh_are_the_rollout_whatever_was_rejected(kind):
    """Rounds from an empty cache, rejected at every depth, rows at their own pace.

    Rejected drafts are wrong tokens, so that the target's activations of them, which the
    refresh stores, and the draft's own memories of them are wrong; nothing erases them.
    """
    p = pair(kind)
    tokens, _, expected = reference(kind)
    wrong = (tokens + 5) % TINY.n_tokens
    target_cache = empty_full(TINY, 2, T + K, Compute())
    cache = p.strategy.empty(p.draft_params, 2, K, T + K)

    @jax.jit
    def verify(target_cache, cache, block, positions):
        _, ys, target_cache = p.target.bind(p.target_params).extend(
            target_cache, block, positions, p.strategy.collect
        )
        processed = Processed(block, positions, ys, target_cache)
        return target_cache, p.strategy.commit(p.draft_params, cache, processed)

    start, rows, rejections = np.zeros(2, int), np.arange(2), set()
    for count in range(100):
        if (start + K >= T).all():
            break
        accepted = np.array([count % (K + 1), (count // 2 + 3) % (K + 1)])
        positions = np.minimum(start, T - K - 1)[:, None] + np.arange(K + 1)
        right = np.arange(K + 1) <= accepted[:, None]
        block = np.where(right, *(np.take_along_axis(np.asarray(x), positions, 1)
                                  for x in (tokens, wrong)))  # fmt: skip
        for depth in range(K):
            logits, cache = step_of(kind)(
                p.draft_params, cache, jnp.asarray(block[:, depth]),
                jnp.asarray(positions[:, depth], jnp.int32),
            )  # fmt: skip
            known = right[:, depth] & (start + K < T)
            close(logits[known], expected[rows, positions[:, 0], depth][known])
        target_cache, cache = verify(
            target_cache, cache, jnp.asarray(block), jnp.asarray(positions, jnp.int32)
        )
        rejections |= set(accepted[start + K < T])
        start = np.where(start + K < T, start + accepted + 1, start)
    assert rejections == set(range(K + 1)) and (start > WINDOW + SINK + K).all()


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_agree_with_the_oracles(kind):
    """Starts 0, k, 2k, ... compute what every start computes at those."""
    p = pair(kind)
    tokens, activations, expected = reference(kind)
    strided = jax.jit(lambda params, *given: p.strategy.model.bind(params).rollout(
        *given, np.arange(0, T, K), K))(p.draft_params, tokens, activations)  # fmt: skip
    close(strided, expected[:, ::K])


def test_drafts_of_the_three_kinds_differ():
    """The switches do something: no two agree beyond the first depths."""
    logits = [np.asarray(reference(kind)[2])[..., VALID] for kind in KINDS]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(logits[one] - logits[other])[:, -1, 1:].max() > 1e-3
    # Feedback is of drafted tokens: at depth 1 there are none.
    np.testing.assert_allclose(logits[0][:, :, 0], logits[2][:, :, 0], atol=1e-5)


@pytest.mark.slow  # in the fast tier a training step says so (test_train.py)
def test_rematerialized_rollout_has_the_same_gradients():
    p = pair("spire")
    tokens, activations, _ = reference("spire")
    gradients, recomputed = [], []
    for remat in (False, True):
        model = dataclasses.replace(p.strategy.model, compute=Compute(remat=remat))

        def loss(params, model=model):
            rollout = model.bind(params).rollout(tokens, activations, np.array([0, 9]), 2)
            return (rollout[..., VALID] ** 2).mean()

        recomputed.append(str(jax.make_jaxpr(jax.grad(loss))(p.draft_params)).count("= remat"))
        gradients.append(jax.jit(jax.grad(loss))(p.draft_params))
    assert recomputed[0] == 0 and recomputed[1] >= 2
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# --- who depends on whom, by gradients ---------------------------------------------------------


@functools.cache
def sensitivities(kind: str):
    """Largest gradient of each output (start, depth) by what it is taken with respect to.

    The text has distinct tokens, so that a row of the embedding belongs to one position.
    Returns arrays (R, k, T) for embeddings and for the target's activations, (R, k) for
    `memory_mix`.
    """
    p = pair(kind)
    length = 20
    starts = np.arange(length - K + 1)
    tokens = jnp.asarray(np.random.default_rng(3).permutation(TINY.n_tokens)[:length])[None]
    collect = p.strategy.collect
    _, activations = p.target.bind(p.target_params).forward(tokens, collect)

    def outputs(params, activations):
        logits = p.strategy.model.bind(params).rollout(tokens, activations, starts, K)
        return jax.nn.log_softmax(logits)[0, :, :, 3]

    @jax.jit
    def jacobians(params, activations):
        value, pull = jax.vjp(outputs, params, activations)
        units = jnp.eye(value.size).reshape(-1, *value.shape)

        def one(unit):
            by_params, by_activations = pull(unit)
            largest = jnp.abs(by_params["embedding"][tokens[0]]).max(axis=-1)
            ys = jnp.max(jnp.stack([jnp.abs(y[0]).max(axis=-1) for y in by_activations]), axis=0)
            return largest, ys, jnp.abs(by_params.get("memory_mix", jnp.zeros(1))).max()

        return jax.lax.map(one, units)

    found = jacobians(p.draft_params, activations)
    shape = (len(starts), K)
    return tuple(np.asarray(x).reshape(*shape, *x.shape[1:]) for x in found)


POSITION = np.arange(20)
START = np.arange(17)[:, None, None]
DEPTH = np.arange(K)[None, :, None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_learns_through_the_memories_of_earlier_tokens_of_its_block(kind):
    """Embeddings: positions start .. start + depth, none before (those are the target's), none
    after (causality). Earlier ones are reachable only through memories."""
    by_embedding, _, _ = sensitivities(kind)
    expected = np.broadcast_to(
        (POSITION >= START) & (POSITION <= START + DEPTH), by_embedding.shape
    )
    np.testing.assert_array_equal(by_embedding > 0, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_target_memories_end_before_the_block_and_obey_the_window(kind):
    """Activations at the start and later change nothing; those that the block's first token sees
    (the window counts that token), and the sinks, do."""
    _, by_activations, _ = sensitivities(kind)
    visible = (POSITION < START) & ((START - POSITION < WINDOW) | (POSITION < SINK))
    expected = np.broadcast_to(visible, by_activations.shape)
    np.testing.assert_array_equal(by_activations > 0, expected)


def test_memory_weights_learn_from_every_depth_but_the_first():
    _, _, by_mix = sensitivities("spire")
    assert (by_mix[:, 0] == 0).all() and (by_mix[:, 1:] > 0).all()
    # From start 0 a strict query's first depth sees nothing, and it too feeds what follows.
    _, _, strict = sensitivities("spire_strict")
    assert (strict[:, 0] == 0).all() and (strict[:, 1:] > 0).all()


def test_later_depths_read_memories_through_the_window():
    """At depth j the direct view ends window - 1 back from start + j: cut off the block's
    earlier tokens (strict, one layer), and the target's oldest memories drop out one by one."""
    config = dataclasses.replace(TINY, n_layers=1, window=WINDOW, sink=0)
    draft = Model(SpireDraft, config, Compute(), (("feedback", False), ("attend_self", False)))
    params = init(draft, 0)
    tokens = jnp.asarray(texts(1, 16))
    activations = (jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, TINY.d_model)),
                               jnp.float32),)  # fmt: skip

    @jax.jit
    def rollout(activations):
        return draft.bind(params).rollout(tokens, activations, np.array([10]), K)[0, 0, :, VALID]

    plain = rollout(activations)
    for position in range(16):
        moved = (activations[0].at[:, position].add(1.0),)
        changed = np.abs(rollout(moved) - plain).max(axis=-1) > 0
        expected = [position < 10 and 10 + j - position < WINDOW for j in range(K)]
        np.testing.assert_array_equal(changed, expected, err_msg=str(position))


# --- memories ----------------------------------------------------------------------------------


def test_memories_mix_the_layers_by_their_softmax():
    model = pair("spire").strategy.model
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(2, 3))
    xs = [jnp.asarray(x, jnp.float32) for x in rng.normal(size=(3, 4, 5, TINY.d_model))]
    params = pair("spire").draft_params | {"memory_mix": jnp.asarray(mix, jnp.float32)}
    weights = np.exp(mix) / np.exp(mix).sum(axis=1, keepdims=True)
    found = model.bind(params).memories(xs)
    expected = np.einsum("il,lbtd->ibtd", weights, np.stack(xs))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = pair("spire_plain")
    assert "memory_mix" not in plain.draft_params
    own = plain.strategy.model.bind(plain.draft_params).memories(xs)
    np.testing.assert_array_equal(own, xs[:2])


@pytest.mark.parametrize("weight", [0.95, 0.5])
def test_initial_memory_weights(weight):
    """The layer's own input has the configured softmax weight, the rest share what is left."""
    config = dataclasses.replace(TINY, n_layers=3, d_model=8, d_ff=8, n_kv_heads=1)
    model = Model(SpireDraft, config, Compute(), (("memory_init", weight),))
    key = jax.random.key(0, impl="unsafe_rbg")
    logits = jax.jit(lambda k: model.init(k)["memory_mix"])(key)
    expected = np.full((3, 4), (1 - weight) / 3)
    expected[np.arange(3), np.arange(3)] = weight
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, rtol=1e-5)


# --- a query that sees nothing -----------------------------------------------------------------


def test_strict_position_0_attends_to_nothing():
    """attend_self=False: the first token's attention is zero, in training and in decoding."""
    p = pair("spire_strict")
    tokens, activations, expected = reference("spire_strict")
    module = p.strategy.model.bind(p.draft_params)
    x = module.embed(tokens[:, :1])
    nothing = jnp.zeros((2, 1, TINY.n_kv_heads, TINY.q_per_kv, TINY.d_head))
    for block in module.blocks:
        x = block.finish(x, nothing)
    by_hand = module.unembed(x)[:, 0]
    close(expected[:, 0, 0], by_hand)
    empty = p.strategy.empty(p.draft_params, 2, K, T)
    step, _ = step_of("spire_strict")(p.draft_params, empty, tokens[:, 0], jnp.zeros(2, jnp.int32))
    close(step, by_hand)

    def loss(params):
        rollout = p.strategy.model.bind(params).rollout(tokens, activations, np.array([0]), 2)
        return (rollout[..., VALID] ** 2).mean()

    gradient = jax.jit(jax.grad(loss))(p.draft_params)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))

"""EAGLE-3: its layer and chain by definition, what it learns, how it begins, what it costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import SINK, TINY, WINDOW, Pair, init, pair, target, texts

from spire_jax.config import files
from spire_jax.config.checks import ConfigError
from spire_jax.config.drafts import Pass
from spire_jax.config.schema import EvalConfig, ExperimentConfig, ModelConfig, TrainConfig
from spire_jax.decoding import generate
from spire_jax.drafting.eagle3 import Eagle3Options, fused_layers
from spire_jax.drafting.learning import Lesson, TrainBatch
from spire_jax.models.attention import Compute, attention
from spire_jax.models.sharding import make_mesh
from spire_jax.models.transformer import Model
from spire_jax.training.loop import init_state, make_optimizer, train_step
from spire_jax.training.tasks import draft_task, initial_draft, teach, teacher

T, K = 16, 3
STARTS = np.arange(T)
VALID = slice(0, TINY.n_tokens)


def close(found, expected, tolerance=1e-4):
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)


@functools.cache
def given():
    """Texts, and the target's activations that are fused."""
    model, params = target()
    tokens, layers = jnp.asarray(texts(2, T)), pair("eagle3").strategy.collect
    return tokens, jax.jit(lambda w, x: model.bind(w).prefill(x, layers)[0])(params, tokens)


def rollout() -> np.ndarray:
    """Logits of K steps from every token, [B, T, K, V]; beyond the text meaningless."""
    p = pair("eagle3")

    def run(own, *at):
        module = p.strategy.model.bind(own)
        steps = module.rollout(*at, STARTS, K)
        return module.unembed(jnp.stack([*steps], axis=2))

    return np.asarray(jax.jit(run)(p.draft_params, *given()))[..., VALID]


# --- by definition: one token after the other, in NumPy ------------------------------------------


def normed(x, scale):
    return x / np.sqrt(np.mean(x * x) + TINY.norm_eps) * scale


def rotated(x, at):
    half = TINY.d_head // 2
    angle = at * TINY.rope_base ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )


def layer(block, e, h, at, earlier):
    """The layer's output, and what a pair (embedding, feature) of index `at` leaves behind."""
    scales = block["norm_attention"]["scale"]
    x = np.concatenate([normed(e, scales[0]), normed(h, scales[1])])
    q, k, v = (np.einsum("d,d...->...", x, block[name]) for name in ("query", "key", "value"))
    left = at, rotated(k, at), v
    seen = [y for y in [*earlier, left] if y[0] < SINK or at - y[0] < WINDOW]
    logits = np.einsum("kgh,nkh->kgn", rotated(q, at), np.stack([y[1] for y in seen]))
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    attended = np.einsum("kgn,nkh->kgh", weights, np.stack([y[2] for y in seen]))
    h = h + np.einsum("kgh,kghd->d", attended, block["out"])
    m = normed(h, block["norm_mlp"]["scale"])
    gate = m @ block["gate"]
    return h + (gate / (1 + np.exp(-gate)) * (m @ block["up"])) @ block["down"], left


def chain(own, tokens, h, start):
    """Logits of K steps from a token of a text with features h."""
    block, table = own["blocks"][0], own["embedding"]
    # Index t: the embedding of token t + 1 beside the feature of token t.
    earlier = [layer(block, table[tokens[t + 1]], h[t], t, [])[1] for t in range(start - 1)]
    x, logits = h[start - 1], []
    for j in range(K):
        x, left = layer(block, table[tokens[start + j]], x, start - 1 + j, earlier)
        earlier.append(left)
        logits.append(normed(x, own["norm_final"]["scale"]) @ own["unembedding"])
    return np.stack(logits)[:, VALID]


def test_the_rollout_is_the_chain_by_definition():
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), pair("eagle3").draft_params)
    tokens, activations = (jax.tree.map(np.asarray, x) for x in given())
    found, h = rollout(), np.concatenate(activations, axis=-1) @ own["fc"]
    for start in (1, 2, 5, 9, T - K):  # before the window is full, and after
        for row in range(2):
            close(found[row, start], chain(own, tokens[row], h[row], start))


def test_step_0_is_a_plain_teacher_forced_pass():
    """Over all pairs at once, causally; the first token, in no pair, says nothing."""
    p, (tokens, activations) = pair("eagle3"), given()

    @jax.jit
    def plain(own):
        module, at = p.strategy.model.bind(own), np.arange(T - 1)
        block, h = module.blocks[0], module.fuse(activations)[:, :-1]
        x = module.pairs(tokens[:, 1:], h)
        out, _ = attention(block.queries(x, at), *block.keys_values(x, at), at, at, module.views[0])
        return module.unembed(block.finish(h, out))

    found = rollout()[:, :, 0]
    close(found[:, 1:], plain(p.draft_params)[..., VALID])
    close(found[:, 0], 0.0)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["distillation", pytest.param("mixed", marks=pytest.mark.slow)])
def test_the_loss_is_every_steps_of_every_token(loss):
    p, (tokens, activations) = pair("eagle3"), given()
    rng = np.random.default_rng(0)
    wanted = np.zeros((2, T, TINY.vocab_size))
    wanted[..., VALID] = rng.dirichlet(np.ones(TINY.n_tokens), (2, T))
    lesson = Lesson(
        jnp.asarray(wanted, jnp.float32),
        dict(zip(p.strategy.collect, activations, strict=True)),
        {},
    )
    batch = TrainBatch(tokens, jnp.roll(tokens, -1, axis=1), jnp.ones((2, T), bool))
    of = Eagle3Options(loss=loss).learns(p.strategy, K)
    values, alphas = jax.jit(lambda *at: of(*at))(p.draft_params, lesson, batch)
    log_q, expected = jax.nn.log_softmax(rollout()), np.zeros((2, T))
    for i in range(T):
        for j in range(min(K, i + 1)):
            q = np.exp(log_q[:, i - j, j])
            alpha = np.minimum(wanted[:, i, VALID], q).sum(axis=-1)
            entropy = -(wanted[:, i, VALID] * log_q[:, i - j, j]).sum(axis=-1)
            value = entropy if loss == "distillation" else 0.5 * entropy - 0.5 * alpha
            expected[:, i] += 0.8**j * value
            if i % K == j:
                close(alphas[:, i], alpha)
    close(values, expected)


V = 16
CYCLIC = ModelConfig(
    n_layers=2, d_model=16, n_kv_heads=2, q_per_kv=1, d_head=8, d_ff=16, vocab_size=V, n_tokens=V
)


def after(tokens):
    return (5 * tokens + 3) % V


@functools.cache
def cyclic() -> tuple:
    """A target that writes `after` its last token, whatever came before: blocks that add nothing,
    and a token's embedding alone in an axis of its own."""
    model = Model(CYCLIC.module(), CYCLIC, Compute())
    params = init(model, 0)
    for block in params["blocks"].values():
        block["out"], block["down"] = (jnp.zeros_like(block[name]) for name in ("out", "down"))
    params["embedding"] = 4.0 * jnp.eye(V)
    params["unembedding"] = 2.0 * jnp.zeros((V, V)).at[np.arange(V), after(np.arange(V))].set(1.0)
    return model, params


@pytest.mark.slow
@pytest.mark.parametrize("start", ["random", "pruned"])
def test_a_predictable_text_is_drafted_to_the_end(start):
    """By the product's own step; greedy tau goes to k + 1, in the decoder."""
    model, params = cyclic()
    config = ExperimentConfig(
        target=CYCLIC,
        drafts=(("it", Eagle3Options(window=WINDOW, sink=SINK, init=start, steps=80)),),
        train=TrainConfig(steps=80, batch_size=8, seq_len=16, k=K, peak_lr=1e-2),
    )
    mesh, taus, losses = make_mesh(config.mesh), [], []
    with jax.set_mesh(mesh):
        task = draft_task(config, "it")
        begun = initial_draft(config, "it", task, params, mesh)
        optimizer, rng = make_optimizer(config.train, task), np.random.default_rng(0)
        state = init_state(task, optimizer, jax.tree.map(jnp.copy, begun), mesh)
        shared = {name: params[name] for name in task.shared}
        for _ in range(task.steps):
            text = [rng.integers(0, V, 8)]
            for _ in range(16):
                text.append(after(text[-1]))
            text = jnp.asarray(np.stack(text, axis=1), jnp.int32)
            batch = TrainBatch(text[:, :-1], text[:, 1:], jnp.ones((8, 16), bool))
            lesson = teach(teacher(config, [task]), params, batch)
            state, metrics = train_step(task, config.train, optimizer, state, lesson, batch, shared)
            losses.append(float(metrics["loss"]))
        for own in (begun, state["params"]):
            p = Pair(model, params, task.loss.strategy, {**own, **shared})
            done = generate(p.decoder(K, 0.0), p.weights, [np.array([3, 2])] * 2, [40] * 2, [0, 1])
            counts = np.asarray(done.counts)
            taus.append((counts @ np.arange(1, K + 2)).sum() / counts.sum())
    # At best the target's own entropy, in all steps.
    p = jax.nn.softmax(jnp.asarray([2.0 * 4.0] + [0.0] * (V - 1)))
    floor = float(-(p * jnp.log(p)).sum()) * sum(0.8**j for j in range(K))
    assert taus[0] < 2 and taus[1] == K + 1
    assert losses[-1] - floor < 0.1 * (losses[0] - floor)
    alpha = np.asarray(metrics["alpha_by_depth"])  # the first token, in no pair, says nothing
    assert alpha.shape == (K,) and alpha[1:].min() > 0.85 and alpha[0] > 0.75


def test_depths_need_not_divide_a_text():
    """The paper's 7 steps of texts of 1024; the loss is of every token, alpha of whole blocks."""
    seven, one = (
        files.load("configs/quickstart.py", ["drafts.it.kind=eagle3", f"drafts.it.k={k}"])
        for k in (7, 1)
    )
    assert seven.train.seq_len % 7 and draft_task(seven, "it").k == 7
    flops = [draft_task(of, "it").flops_per_token for of in (seven, one)]
    # Of every token 7 times as much, but for its feature, which is made once.
    d = seven.target.d_model
    assert flops[0] == 7 * flops[1] - 6 * 3 * 2 * (3 * d * d)


# --- how it begins -------------------------------------------------------------------------------


def test_the_pruned_start_is_what_the_targets_last_layer_has():
    """The feature is y^3; of one alone, without a token, it makes what the target's last does."""
    p, (_, activations) = pair("eagle3"), given()
    model, own = p.target.bind(p.target_params), p.draft_params
    module = p.strategy.model.bind(own)
    close(module.fuse(activations), activations[-1], 1e-6)
    block, last, at = module.blocks[0], model.blocks[-1], np.arange(T)
    y = activations[1]
    x = jnp.concatenate([jnp.zeros_like(y), y], axis=-1)
    close(block.queries(x, at), last.queries(y, at))
    for one, other in zip(block.keys_values(x, at), last.keys_values(y, at), strict=True):
        close(one, other)
    attended = last.queries(y, at)
    close(block.finish(y, attended), last.finish(y, attended))
    close(module.unembed(y)[..., VALID], model.unembed(y)[..., VALID])


def test_before_training_a_tied_targets_head_is_copied():
    tied = dataclasses.replace(TINY, tied=True)
    _, of_target = target(tied)
    for head in (0, 12):
        draft = Eagle3Options(head_tokens=head)
        fresh = init(draft.strategy(tied, Compute()).model, 1)
        begun = draft.initial(of_target, fresh)
        assert jax.tree.structure(begun) == jax.tree.structure(fresh)
        close(begun["unembedding"], of_target["embedding"].T[:, : head or None], 0)


def test_the_activations_that_are_fused():
    assert fused_layers(32) == (2, 16, 29) and fused_layers(8) == (2, 4, 5)
    assert fused_layers(7) == (2, 3, 4) and fused_layers(6) == (1, 3, 5)
    assert [fused_layers(n) for n in (1, 2, 3, 4)] == [(0, 1), (1,), (1, 2), (1, 2, 3)]
    strategy = Eagle3Options(layers=(3, 1)).strategy(TINY, Compute())
    assert strategy.collect == (3, 1)


# --- cost ----------------------------------------------------------------------------------------


def test_a_rounds_cost_counts_what_the_layer_has_beside_a_transformers():
    """q, k and v are twice as wide; the features of k + 1 tokens are fused, once a round."""
    d, heads = 32, 2 * 2 * 8 + 2 * 2 * 8
    wide, fc = d * heads + d, 3 * 32 * d
    cost = Eagle3Options(layers=(0, 1, 2), window=0).cost(TINY, 100.0, 3)
    again = Pass(weights=wide, products=wide)
    first = Pass(projections=8, weights=wide + fc, products=wide + 4 * fc)
    assert cost.passes == (first, again, again) and cost.rows == 100
    assert cost.more == wide + fc


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": (1, 4)}, r"it.layers: \[4\] are no activations of the target, which has 0"),
        ({"layers": (-1,)}, r"it.layers: \[-1\] are no activations"),
        ({"layers": (1, 1)}, r"it.layers=\(1, 1\) names one twice"),
        ({"n_layers": 2}, "it.n_layers=2: it is one layer; use 1"),
        ({"decay": 0.0}, "it.decay=0.0 must lie in"),
        ({"draws": "best"}, "it.draws='best'; choose from"),
        ({"k": -1}, "it.k=-1 is negative"),
        ({"d_model": 16}, "it.share_embedding: the draft's d_model=16 is not the target's 32"),
        ({"d_model": 16, "share_embedding": False}, "it.d_model=16 differs from target.d_model=32"),
        ({"k": 1024}, "it.k=1024 must be below train.seq_len=1024"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    draft = Eagle3Options(**options)
    config = ExperimentConfig(target=TINY, eval=EvalConfig(), drafts=(("it", draft),))
    with pytest.raises(ConfigError, match=message):
        draft.check("it", config)
        draft.check_run("it", config)

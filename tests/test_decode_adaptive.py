"""The depth of a round: what the controller and each row choose, and that no choice changes the
output."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from test_verification import (
    EMITTED,
    SIGNIFICANCE,
    chains,
    check_joint_of_three,
    chi_square,
    tables,
    transformed,
)

from spire_jax.costs.throughput import depth_prices, round_cost
from spire_jax.decoding import DecodeError, Decoder, generate, start
from spire_jax.decoding.depth import chosen
from spire_jax.decoding.rounds import round_and_depths, speculation_round
from spire_jax.decoding.verification import VERIFICATIONS
from spire_jax.drafting.vanilla import Vanilla
from spire_jax.models.sampling import Sampling, sample, stream
from spire_jax.serving.adaptive import MEMORY, DepthController

DEPTHS = (1, 2, 4, 8)


def simulate(alpha, seconds, rounds: int, rows: int = 4, controller=None, noise=0.0, seed=0):
    """Rounds of independent acceptance `alpha`, `seconds(k)` long; the depths chosen."""
    controller, rng = controller or DepthController(DEPTHS), np.random.default_rng(seed)
    chosen = []
    for _ in range(rounds):
        k = controller.choose()
        chosen.append(k)
        accepted = np.cumprod(rng.random((rows, k)) < alpha, axis=1).sum(axis=1)
        controller.accepted(k, accepted)
        slow = 1 + noise * rng.exponential() * (rng.random() < 0.2)
        controller.took(k, seconds(k) * slow)
    return chosen


def speed(k: int, alpha: float, seconds) -> float:
    """Expected tokens per second at a depth."""
    return (1 - alpha ** (k + 1)) / (1 - alpha) / seconds(k)


PROFILES = {
    "drafts are free": (0.8, lambda k: 1.0, 8),
    "drafts are dear": (0.8, lambda k: 0.2 + 1.0 * k, 1),
    "drafts are bad": (0.1, lambda k: 1.0 + 0.1 * k, 1),
    "in between": (0.75, lambda k: 1.0 + 0.12 * k, 4),
}


@pytest.mark.parametrize("noise", [0.0, 5.0])
@pytest.mark.parametrize("name", PROFILES)
def test_the_fastest_depth_is_found(name, noise):
    """Also where every fifth round is disturbed, by several times its length."""
    alpha, seconds, wanted = PROFILES[name]
    speeds = {k: speed(k, alpha, seconds) for k in DEPTHS}
    assert max(speeds, key=speeds.__getitem__) == wanted
    chosen = simulate(alpha, seconds, 1000, noise=noise)[100:]
    # Looking elsewhere is bounded, and so is what an estimate that is a little off costs.
    assert np.mean([speeds[k] for k in chosen]) > 0.95 * speeds[wanted]
    assert max(set(chosen), key=chosen.count) == wanted
    assert min(speeds.values()) < 0.8 * speeds[wanted]


def test_it_follows_what_changes():
    """Acceptance falls, then rises; the machine's times change."""
    cheap, controller = lambda k: 1.0 + 0.05 * k, DepthController(DEPTHS)
    assert simulate(0.9, cheap, 200, controller=controller)[-1] == 8
    assert simulate(0.05, cheap, 5 * MEMORY, controller=controller)[-1] == 1
    assert simulate(0.9, cheap, 5 * MEMORY, controller=controller)[-1] == 8
    dear = lambda k: 0.2 + 1.0 * k  # noqa: E731
    assert simulate(0.9, dear, 3 * MEMORY, controller=controller)[-1] == 1


def test_acceptance_is_by_depth():
    """Accepted at the first depth always, at the second half the time, at the third never."""
    controller = DepthController((1, 3))
    for count in (1, 2) * 150:
        controller.accepted(3, np.array([count] * 4))
    first, second, third = controller.acceptance()
    assert first > 0.98 and abs(second - 0.5) < 0.02 and third < 0.02


def test_what_was_never_seen_follows_the_depth_before_it():
    controller = DepthController((1, 4))
    for _ in range(100):
        controller.accepted(1, np.array([0, 0, 0, 1]))
    np.testing.assert_allclose(controller.acceptance(), 0.25, atol=0.02)


def test_before_anything_is_known_the_deepest_then_the_shallowest_is_tried():
    controller = DepthController((4, 1, 2))
    chosen = simulate(0.8, lambda k: 1.0, 6, controller=controller)
    assert chosen == [4, 4, 4, 1, 1, 1]


def test_one_depth_is_no_choice():
    assert DepthController((3,)).choose() == 3


def test_output_follows_the_target_while_depths_change():
    """Each row's depth, 1 or 3, from its own last round: the joint of three tokens of a chain."""
    trials = 40_000
    model, weights, state = chains(trials, 3)

    @jax.jit
    def one_round(state, deep):
        after = [
            speculation_round(Decoder(model, Vanilla(model), k), weights, state) for k in (1, 3)
        ]

        def choose(shallow, deeper):
            if jax.dtypes.issubdtype(shallow.dtype, jax.dtypes.prng_key):
                return shallow
            return jnp.where(deep.reshape(-1, *(1,) * (shallow.ndim - 1)), deeper, shallow)

        new = dataclasses.replace(after[0], **{
            name: choose(getattr(after[0], name), getattr(after[1], name))
            for name in ("tokens", "kinds", "lengths", "done", "rounds", "counts")
        })  # fmt: skip
        return new, jnp.argmax(new.counts - state.counts, axis=1)

    deep = np.arange(trials) % 2 == 0
    mixed = 0
    while not np.asarray(state.done).all():
        state, accepted = one_round(state, deep)
        deep = np.asarray(accepted) == 0  # as it should not be chosen: the more it is a test
        mixed += deep.any() and not deep.all()
    assert mixed >= 2
    tokens = np.asarray(state.tokens)[:, 1 : 1 + EMITTED]
    check_joint_of_three(tokens, transformed(tables()[0], Sampling()))


# --- each row, of its own drafts ----------------------------------------------------------------


def test_a_row_stops_where_tokens_per_cost_fall_first():
    survival = jnp.asarray([[0.9, 0.8, 0.7], [0.5, 0.1, 0.05], [0.1, 0.09, 0.08]])
    prices = (1.0, 1.2, 1.4, 1.6)
    # 1, 1.58, 1.93, 2.13; 1, 1.25, 1.14, 1.03; 1, 0.92
    assert chosen(survival, prices).tolist() == [3, 1, 0]
    assert chosen(survival, prices, least=2).tolist() == [3, 2, 2]
    assert chosen(survival, (1.0, 2.0, 2.0, 2.0)).tolist() == [0, 0, 0]  # whatever comes then
    assert chosen(survival, (1.0,) * 4).tolist() == [3, 3, 3]


def test_that_is_the_best_depth_where_prices_are_convex():
    """... as a roofline's are; and no later estimate changes that a token is verified."""
    rng = np.random.default_rng(0)
    survival = np.cumprod(rng.uniform(0.2, 1, (500, 6)), axis=1)
    prices = np.maximum(1.0, 0.4 + 0.2 * np.arange(7)) + 0.3
    emitted = np.concatenate([np.ones((500, 1)), 1 + np.cumsum(survival, axis=1)], axis=1)
    best = (emitted / prices).argmax(axis=1)
    found = chosen(jnp.asarray(survival, jnp.float32), tuple(prices))
    np.testing.assert_array_equal(found, best)
    assert len(set(best.tolist())) > 2
    for j in range(6):
        other = survival.copy()
        other[:, j:] = 0.5 * survival[:, j:]
        moved = chosen(jnp.asarray(other, jnp.float32), tuple(prices))
        np.testing.assert_array_equal(np.minimum(moved, j), np.minimum(found, j))


def test_prices_are_the_cost_models(pair):
    """Of the draft's whole round, then token by token of verification."""
    found = depth_prices(pair, "spire", 4)
    whole = round_cost(pair, "spire", batch=64, context=512, k=4)
    assert len(found) == 5 and found[4] == pytest.approx(whole.delta_t)
    drafting = (whole.total - whole.verification) / whole.target_step
    assert found[0] == pytest.approx(1 + drafting)
    assert (np.diff(found) >= 0).all() and (np.diff(np.diff(found)) > -1e-9).all()  # convex


CHAIN_V, CHAIN_K = 3, 3


def by_alpha(p, q, drafts):
    """What is known before a token is drawn: its chance, after the token before it."""
    return jnp.sum(jnp.minimum(p, q), axis=-1)


def by_the_token(p, q, drafts):
    """The naive rule: the chance of the token that was drawn."""
    of = drafts[..., None]
    ratio = jnp.take_along_axis(p / q, of, axis=-1)
    return jnp.minimum(ratio[..., 0], 1.0)


def best_of_all(survival, prices, least=0):
    """Another: the best depth of all, by what later tokens' estimates say."""
    emitted = jnp.pad(1 + jnp.cumsum(survival, axis=1), ((0, 0), (1, 0)), constant_values=1.0)
    return jnp.argmax(emitted / np.asarray(prices), axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def of_chains(verification, estimate, rule, rows, p, q):
    """Three tokens after token 0 of a round on Markov chains, and the depths that were chosen."""
    keys = jax.random.split(jax.random.key(3), rows)
    token, drafts = jnp.zeros(rows, jnp.int32), []
    at_p, at_q = [p[token]], []
    for j in range(CHAIN_K):
        at_q.append(q[token])
        token = sample(jax.vmap(jax.random.fold_in, (0, None))(keys, j), jnp.log(at_q[-1]))
        drafts.append(token)
        at_p.append(p[token])
    drafts, at_p, at_q = (jnp.stack(x, axis=1) for x in (drafts, at_p, at_q))
    survival = jnp.cumprod(estimate(at_p[:, :CHAIN_K], at_q, drafts), axis=1)
    depth = rule(survival, (1.0, 1.5, 2.05, 2.2))
    accepted, following = VERIFICATIONS[verification](
        keys, drafts, jnp.log(at_q), jnp.log(at_p), depth
    )
    text = jnp.concatenate([drafts, following[:, None]], axis=1)
    text = jnp.where(jnp.arange(CHAIN_K + 1) == accepted[:, None], following[:, None], text)
    for j in range(1, 3):  # the target itself goes on
        more = sample(jax.vmap(jax.random.fold_in, (0, None))(keys, 100 + j),
                      jnp.log(p[text[:, j - 1]]))  # fmt: skip
        text = text.at[:, j].set(jnp.where(j <= accepted, text[:, j], more))
    return text[:, :3], depth


def joint_of_chains(verification, estimate, rule) -> tuple[float, list[int]]:
    """The p-value of what is emitted against the target, and which depths were chosen."""
    p, q = np.random.default_rng(3).dirichlet(np.ones(CHAIN_V), (2, CHAIN_V))
    texts, depth = of_chains(verification, estimate, rule, 100_000,
                             jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))  # fmt: skip
    counts = np.zeros((CHAIN_V,) * 3)
    np.add.at(counts, tuple(np.asarray(texts).T), 1)
    joint = p[0][:, None, None] * p[:, :, None] * p[None]
    return chi_square(counts, joint), np.unique(np.asarray(depth)).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("verification", ["token", "block"])
def test_depths_of_what_was_known_before_keep_the_targets_distribution(verification):
    """By enumeration; the same estimates, with depths that look ahead, do not."""
    value, depths = joint_of_chains(verification, by_alpha, chosen)
    assert len(depths) > 1
    assert value > SIGNIFICANCE
    for estimate, rule in ((by_the_token, chosen), (by_alpha, best_of_all)):
        value, depths = joint_of_chains(verification, estimate, rule)
        assert len(depths) > 1 and value < SIGNIFICANCE, rule.__name__


@pytest.mark.slow
@pytest.mark.parametrize("verification", ["token", "block"])
def test_the_naive_rule_emits_another_distribution(verification):
    """q = (0.5, 0.5), p = (0.7, 0.3): the token that is surely kept is verified, the other is not:
    (0.85, 0.15)."""
    rows, q, p = 100_000, jnp.asarray([0.5, 0.5]), jnp.asarray([0.7, 0.3])
    keys = jax.random.split(jax.random.key(0), rows)
    q, p = (jnp.broadcast_to(jnp.log(x), (rows, n, 2)) for x, n in ((q, 1), (p, 2)))
    drafts = sample(stream(keys, "draft"), q[:, 0])[:, None]

    @jax.jit
    def share_of_0(survival):
        depth = chosen(survival, (1.0, 1.7))
        accepted, following = VERIFICATIONS[verification](keys, drafts, q, p, depth)
        return jnp.mean(jnp.where(accepted > 0, drafts[:, 0], following) == 0)

    naive, known = (share_of_0(estimate(jnp.exp(p[:, :1]), jnp.exp(q), drafts))
                    for estimate in (by_the_token, by_alpha))  # fmt: skip
    assert naive == pytest.approx(0.85, abs=0.005) and known == pytest.approx(0.7, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block", "stride_confident"])
def test_greedy_rows_of_their_own_depths_are_the_targets(kind):
    """... whatever the width of the target's pass, which does change from round to round."""
    of, prompts = models.pair(kind), models.ragged((1, 4, 9, 20))
    decoder = dataclasses.replace(
        of.decoder(4, 0.0), prices=(1.0, 1.2, 1.45, 1.7, 2.0), widths=(1, 2, 4)
    )
    plain = of.autoregressive(0.0)
    found, wanted = (generate(d, of.weights, prompts, [40] * 4, range(4), width=70)
                     for d in (decoder, plain))  # fmt: skip
    np.testing.assert_array_equal(found.tokens[:, :60], wanted.tokens[:, :60])
    state = start(decoder, of.weights, prompts, [40] * 4, range(4), width=70)
    one, seen = jax.jit(lambda state: round_and_depths(decoder, of.weights, state)), set()
    while not np.asarray(state.done).all():
        live = ~np.asarray(state.done)
        state, depths = one(state)
        seen.add(int(np.asarray(depths)[live].max()))
    assert len(seen) > 1 and min(seen) >= 1


def test_prices_need_a_draft_that_estimates():
    of = models.pair("spire")
    with pytest.raises(DecodeError, match="give those of 0 to k=2 tokens"):
        dataclasses.replace(of.decoder(2), prices=(1.0, 2.0))
    with pytest.raises(DecodeError, match=r"widths=\(3,\)"):
        dataclasses.replace(of.decoder(2), prices=(1.0, 2.0, 3.0), widths=(3,))
    decoder = dataclasses.replace(of.decoder(2), prices=(1.0, 2.0, 3.0))
    with pytest.raises(DecodeError, match=r"drafts\.NAME\.confidence"):
        generate(decoder, of.weights, [np.array([1, 2, 3], np.int32)], [2], [0])

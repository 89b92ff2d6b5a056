"""The depth of a round: what the controller chooses, and that no choice changes the output."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_verification import EMITTED, chains, check_joint_of_three, tables, transformed

from spire_jax.decoding import Decoder
from spire_jax.decoding.rounds import speculation_round
from spire_jax.drafting.vanilla import Vanilla
from spire_jax.models.sampling import Sampling
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

"""Verification, by token and by block, against enumeration: rounds by chi-square, cases by hand.

The target is a Markov chain over 16 tokens, whose joint distribution of the first tokens is
known exactly; the draft is another chain that disagrees with it strongly. Both go through the
decoder's own rounds, so that the joint of three tokens crosses from one round to the next.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import nnx

from spire_jax.config.schema import ModelConfig
from spire_jax.decoding import Decoder, DecodeState, Weights, finish
from spire_jax.decoding.verification import (
    block_acceptance,
    residual_distribution,
    verify_blocks,
    verify_tokens,
)
from spire_jax.drafting.vanilla import Vanilla
from spire_jax.models.attention import Compute
from spire_jax.models.caches import empty_full
from spire_jax.models.sampling import NO_TOKEN, Sampling, sample
from spire_jax.models.transformer import Model, Transformer

V, TRIALS, EMITTED = 16, 100_000, 3
SIGNIFICANCE = 1e-4
CONFIG = ModelConfig(n_layers=1, d_model=2, n_kv_heads=1, d_head=2, d_ff=2,
                     vocab_size=V, n_tokens=V)  # fmt: skip


class Markov(Transformer):
    """Logits that depend on the last token alone; keeps nothing in its cache."""

    def __init__(self, config: ModelConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.table = nnx.Param(jnp.zeros((V, V)))

    def extend(self, cache, tokens, positions, collect=(), *, logits_from=0):
        return self.table[...][tokens[:, logits_from:]], (), cache


def tables() -> tuple[np.ndarray, np.ndarray]:
    """Logits of target and draft, nearly unrelated: about half of all drafts are rejected."""
    target, noise = np.random.default_rng(0).normal(0, 1.2, (2, V, V))
    return target, 0.4 * target + 0.9 * noise


def transformed(table, sampling: Sampling) -> np.ndarray:
    """Temperature, top-k, top-p in float64, token by token from the definition."""
    p = np.exp(np.asarray(table, np.float64) / sampling.temperature)
    for row in p:
        order = np.argsort(-row)
        row[order[sampling.top_k or V :]] = 0
        row /= row.sum()
        before = 0.0
        for token in order:
            share = row[token]
            row[token] = share if before < sampling.top_p else 0.0
            before += share
        row /= row.sum()
    return p


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """p-value of counts against probabilities; cells expected under 5 times are merged."""
    counts, expected = counts.ravel(), p.ravel() * counts.sum()
    assert not counts[expected == 0].any(), "a token came out that the target never emits"
    small = expected < 5
    groups = [(counts[~small], expected[~small])]
    if expected[small].sum() > 0:
        groups.append((np.array([counts[small].sum()]), np.array([expected[small].sum()])))
    observed, wanted = (np.concatenate([group[i] for group in groups]) for i in range(2))
    return scipy.stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


def chains(trials: int, k: int) -> tuple[Model, Weights, DecodeState]:
    """Target and draft, which share a model, and rows that all start at token 0."""
    model = Model(Markov, CONFIG, Compute())
    weights = Weights(*({"table": jnp.asarray(t, jnp.float32)} for t in tables()))
    width = 1 + EMITTED + k

    def zeros(*shape, dtype=jnp.int32):
        return jnp.zeros((trials, *shape), dtype)

    return model, weights, DecodeState(
        tokens=zeros(width), kinds=zeros(width, dtype=jnp.int8), lengths=zeros() + 1,
        ends=zeros() + 1 + EMITTED, done=zeros(dtype=bool), rounds=zeros(), counts=zeros(k + 1),
        seeds=jax.vmap(jax.random.key)(jnp.arange(trials, dtype=jnp.uint32)),
        target_cache=empty_full(CONFIG, trials, 1, Compute()),
        draft_state=empty_full(CONFIG, trials, 1, Compute()),
    )  # fmt: skip


def check_joint_of_three(tokens: np.ndarray, p: np.ndarray) -> None:
    """Every position's token, and the joint of the first three, against enumeration."""
    found = np.zeros((V, V, V), int)
    np.add.at(found, tuple(tokens[:, :3].T), 1)
    assert chi_square(found, p[0][:, None, None] * p[:, :, None] * p[None]) > SIGNIFICANCE
    marginal = p[0]
    for position in range(EMITTED):
        found = np.bincount(tokens[:, position], minlength=V)
        assert chi_square(found, marginal) > SIGNIFICANCE, f"position {position}"
        marginal = marginal @ p


@functools.cache
def decoded(
    k: int, sampling: Sampling, verification: str = "token"
) -> tuple[np.ndarray, np.ndarray]:
    """The first EMITTED tokens of TRIALS rows, and counts by depth."""
    model, weights, state = chains(TRIALS, k)
    decoder = Decoder(model, Vanilla(model), k, sampling, verification=verification)
    state = finish(decoder, weights, state)
    return np.asarray(state.tokens)[:, 1 : 1 + EMITTED], np.asarray(state.counts).sum(axis=0)


SAMPLINGS = {
    "temperature 1": Sampling(),
    "temperature 0.6": Sampling(0.6),
    "top-k": Sampling(1.0, 5),
    "top-p": Sampling(1.0, 0, 0.8),
    "all": Sampling(0.6, 7, 0.9),
}


CASES: list = [("temperature 1", k, verification)
               for k in (1, 2) for verification in ("token", "block")]  # fmt: skip
CASES += [("temperature 0.6", 3, "token"), ("top-k", 1, "token")]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [("temperature 1", 3, "token"), ("temperature 0.6", 1, "token"),
                 ("temperature 0.6", 2, "token"), ("temperature 0.6", 3, "block"),
                 ("all", 1, "token"), ("top-p", 2, "token"), ("top-p", 2, "block")]
]  # fmt: skip


@pytest.mark.parametrize("name, k, verification", CASES)
def test_output_follows_the_target_exactly(name, k, verification):
    """With k = 2 the third token comes from the first block or from the round after it."""
    sampling = SAMPLINGS[name]
    tokens, counts = decoded(k, sampling, verification)
    check_joint_of_three(tokens, transformed(tables()[0], sampling))
    # The draft does disagree, and rounds end at every depth.
    assert (counts > 0.02 * counts.sum()).all() and counts[0] > 0.2 * counts.sum()


@pytest.mark.parametrize("k", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_blocks_keep_more_and_single_tokens_the_same(k):
    """Of the first rounds; with one token both are the same decision."""
    means = {}
    for verification in ("token", "block"):
        counts = decoded(k, Sampling(), verification)[1]
        means[verification] = counts @ np.arange(k + 1) / counts.sum()
    assert means["block"] > means["token"] + 0.01
    for a, b in zip(decoded(1, Sampling()), decoded(1, Sampling(), "block"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_test_can_tell():
    """The draft's own distribution, or a one percent mixture of it, is told from the target's."""
    p, q = (transformed(t, Sampling())[0] for t in tables())
    rng = np.random.default_rng(0)
    for share in (1.0, 0.02):
        drawn = rng.multinomial(TRIALS, (1 - share) * p + share * q)
        assert chi_square(drawn, p) < SIGNIFICANCE
    assert chi_square(rng.multinomial(TRIALS, p), p) > SIGNIFICANCE


# --- one round ---------------------------------------------------------------------------------


def distributions(rows: int, k: int, seed: int = 0):
    """Logits q (rows, k, V) and p (rows, k + 1, V), the same in every row."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(0, 1.2, (2 * k + 1, V)), jnp.float32)
    both = jnp.broadcast_to(logits, (rows, 2 * k + 1, V))
    return both[:, :k], both[:, k:]


VERIFICATIONS = [jax.jit(verify_tokens), jax.jit(verify_blocks)]


def keys_of(rows: int):
    return jax.random.split(jax.random.key(5), rows)


def test_accepted_counts_and_next_tokens_of_given_drafts():
    """Fixed drafts: P(accept) = min(1, p_d / q_d), depth by depth, and the residual after that."""
    rows, k = 100_000, 2
    q, p = distributions(rows, k)
    drafts = jnp.broadcast_to(jnp.asarray([3, 7]), (rows, k))
    accepted, following = VERIFICATIONS[0](keys_of(rows), drafts, q, p)
    q, p = (scipy.special.softmax(np.asarray(x[0], np.float64), axis=-1) for x in (q, p))
    passes = [min(1.0, p[0, 3] / q[0, 3]), min(1.0, p[1, 7] / q[1, 7])]
    assert 0.05 < passes[0] < 0.95 and 0.05 < passes[1] < 0.95
    residuals = [np.maximum(p[i] - q[i], 0) for i in range(k)]
    joint = np.stack([
        (1 - passes[0]) * residuals[0] / residuals[0].sum(),
        passes[0] * (1 - passes[1]) * residuals[1] / residuals[1].sum(),
        passes[0] * passes[1] * p[2],
    ])  # fmt: skip
    found = np.zeros((k + 1, V), int)
    np.add.at(found, (np.asarray(accepted), np.asarray(following)), 1)
    assert chi_square(found, joint) > SIGNIFICANCE


@pytest.mark.parametrize("verify", VERIFICATIONS)
def test_equal_distributions_accept_everything(verify):
    rows, k = 20_000, 3
    _, p = distributions(rows, k)
    q = p[:, :k]
    for token in range(V):
        drafts = jnp.full((rows, k), token)
        accepted, _ = verify(keys_of(rows), drafts, q, p)
        assert (accepted == k).all()


@pytest.mark.parametrize("verify", VERIFICATIONS)
def test_a_token_that_the_target_never_emits_is_never_accepted(verify):
    q, p = distributions(5000, 1)
    p = p.at[:, 0, 2].set(-jnp.inf)
    accepted, following = verify(keys_of(5000), jnp.full((5000, 1), 2), q, p)
    assert not accepted.any() and not (following == 2).any()


@pytest.mark.parametrize("verify", VERIFICATIONS)
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_draft_without_a_distribution_drafts_nothing(verify, broken):
    """At the second of three depths: the output is the target's, as of a block of one token."""
    rows = 40_000
    q, p = distributions(rows, 3)
    q = q.at[:, 1].set(jnp.nan) if np.isnan(broken) else q.at[:, 1, 5].set(broken)
    keys = jax.random.split(jax.random.key(6), (3, rows))
    drafts = jnp.stack([sample(keys[i], q[:, i]) for i in range(3)], axis=1)
    assert (drafts[:, 1] == NO_TOKEN).all()
    accepted, following = (np.asarray(x) for x in verify(keys_of(rows), drafts, q, p))
    assert set(accepted) == {0, 1}
    first = np.where(accepted > 0, drafts[:, 0], following)
    second = following[accepted == 1]
    p = scipy.special.softmax(np.asarray(p[0], np.float64), axis=-1)
    for depth, tokens in enumerate((first, second)):
        assert chi_square(np.bincount(tokens, minlength=V), p[depth]) > SIGNIFICANCE


@pytest.mark.parametrize("verify", VERIFICATIONS)
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_target_without_a_distribution_gives_no_token(verify, broken):
    """Beyond what was accepted nothing is asked of it."""
    rows, k = 2000, 3
    q, p = distributions(rows, k)
    drafts = jnp.full((rows, k), 3)
    for depth in range(k + 1):
        at = p.at[:, depth, 5].set(broken)
        equal = at[:, :k].at[:, depth:].set(q[:, depth:])  # kept up to there
        accepted, following = verify(keys_of(rows), drafts, equal, at)
        assert (accepted == depth).all() and (following == NO_TOKEN).all()
        accepted, following = verify(keys_of(rows), drafts, q, at)
        assert (accepted <= depth).all()
        np.testing.assert_array_equal(following == NO_TOKEN, accepted == depth)


def test_probabilities_that_underflow():
    """q = 0, p = 0, both, or equal up to rounding: counts and tokens that p can give."""
    low = jnp.full(V, -200.0).at[2].set(0.0)  # exp(-200) is 0
    high = jnp.full(V, -200.0).at[7].set(0.0)
    p = jnp.stack([low, low])[None].repeat(100, axis=0)
    for drafted, q, kept in ((2, low, True), (7, high, False), (4, low, False), (2, high, True)):
        q = jnp.broadcast_to(q, (100, 1, V))
        for verify in VERIFICATIONS:
            accepted, following = verify(keys_of(100), jnp.full((100, 1), drafted), q, p)
            assert (accepted == kept).all() and (following == 2).all()


def test_block_acceptance_by_hand():
    q = jnp.asarray([[[0.5, 0.5], [0.8, 0.2]]])
    p = jnp.asarray([[[0.25, 0.75], [0.4, 0.6], [0.5, 0.5]]])
    b, h = block_acceptance(jnp.asarray([[0, 1]]), jnp.log(q), jnp.log(p))
    # b_1 = 0.25 / 0.5; r_1 = max(0.5 * 0.4 - 0.8, 0) + max(0.5 * 0.6 - 0.2, 0) = 0.1;
    # h_1 = 0.1 / (0.1 + 0.5); b_2 = h_2 = min(1, 0.5 * 0.6 / 0.2).
    np.testing.assert_allclose(b, [[1, 0.5, 1]], rtol=1e-6)
    np.testing.assert_allclose(h, [[1 / 6, 1]], rtol=1e-6)
    equal, h = block_acceptance(jnp.asarray([[0, 1]]), jnp.log(p[:, :2]), jnp.log(p))
    np.testing.assert_array_equal(equal, [[1, 1, 1]])
    assert h[0, 0] == 0 and h[0, 1] == 1  # 0 / 0 = 0: nothing is left to draw after one token


@pytest.mark.parametrize("verify", VERIFICATIONS)
def test_greedy_distributions_accept_exactly_the_argmax(verify):
    drafts = jnp.asarray([[1, 2, 3], [1, 2, 9], [1, 9, 3], [9, 2, 3], [1, 2, 3]])
    one_hot = [jnp.log(jax.nn.one_hot(x, V)) for x in (drafts, jnp.asarray([[1, 2, 3, 4]] * 5))]
    accepted, following = verify(keys_of(5), drafts, *one_hot)
    np.testing.assert_array_equal(accepted, [3, 2, 1, 0, 3])
    np.testing.assert_array_equal(following, [4, 3, 2, 1, 4])


@pytest.mark.parametrize("verify", VERIFICATIONS)
def test_without_drafts_the_token_is_the_targets(verify):
    """k = 0: autoregressive decoding."""
    _, p = distributions(50_000, 0)
    accepted, following = verify(
        keys_of(50_000), jnp.zeros((50_000, 0), jnp.int32), jnp.zeros((50_000, 0, V)), p
    )
    assert not accepted.any()
    counts = np.bincount(following, minlength=V)
    p = scipy.special.softmax(np.asarray(p[0, 0], np.float64))
    assert chi_square(counts, p) > SIGNIFICANCE


def test_residual_by_hand():
    p = jnp.asarray([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]])
    q = jnp.asarray([[0.2, 0.6, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    residual = residual_distribution(p, q)
    np.testing.assert_allclose(residual[0], [0.75, 0, 0.25, 0], atol=1e-6)
    np.testing.assert_array_equal(residual[1], p[1])  # nothing left: p itself


@pytest.mark.parametrize("verify", VERIFICATIONS)
def test_a_row_depends_on_its_own_key_alone(verify):
    q, p = distributions(6, 2)
    keys, drafts = keys_of(6), jnp.asarray([[3, 7]] * 6)
    whole = verify(keys, drafts, q, p)
    for row in range(6):
        mine = slice(row, row + 1)
        alone = verify(keys[mine], drafts[mine], q[mine], p[mine])
        np.testing.assert_array_equal([x[row] for x in whole], [x[0] for x in alone])

"""Transforms of distributions on examples worked out by hand, and the random streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from spire_jax.models.sampling import (
    NO_TOKEN,
    Sampling,
    probabilities,
    probability_of,
    round_keys,
    sample,
    seed_keys,
    seed_words,
    stream,
    transformed_logits,
)

HALVES = np.log([0.1, 0.4, 0.2, 0.3])  # logits of a distribution to work with by hand


def transformed(logits, **options) -> np.ndarray:
    return np.asarray(probabilities(jnp.asarray(logits, jnp.float32), Sampling(**options)))


@pytest.mark.parametrize(
    "options, p",
    [
        (dict(), [0.1, 0.4, 0.2, 0.3]),
        # p^2 = 1, 16, 4, 9 in thirtieths
        (dict(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (dict(top_k=1), [0, 1, 0, 0]),
        (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_k=4), [0.1, 0.4, 0.2, 0.3]),
        (dict(top_k=99), [0.1, 0.4, 0.2, 0.3]),
        # The smallest set that reaches top_p: 0.4, then 0.7, then 0.9.
        (dict(top_p=0.01), [0, 1, 0, 0]),
        (dict(top_p=0.39), [0, 1, 0, 0]),
        (dict(top_p=0.41), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_p=0.69), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (dict(top_p=0.95), [0.1, 0.4, 0.2, 0.3]),
        # Temperature comes before top-p: at 0.5 the first two hold 25/30 (at 1: only 0.7).
        (dict(temperature=0.5, top_p=0.8), [0, 16 / 25, 0, 9 / 25]),
        # ... and top-k comes before top-p: of the two kept, the first holds 4/7 (of all: 0.4).
        (dict(top_k=2, top_p=0.5), [0, 1, 0, 0]),
        (dict(temperature=0.5, top_k=3, top_p=0.9), [0, 16 / 29, 4 / 29, 9 / 29]),
        (dict(temperature=0.5, top_k=2, top_p=0.6), [0, 1, 0, 0]),
        (dict(temperature=0.0), [0, 1, 0, 0]),
    ],
)  # fmt: skip
def test_transforms_by_hand(options, p):
    result = transformed(HALVES, **options)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, p, atol=1e-6)
    np.testing.assert_array_equal(result == 0, np.array(p) == 0)


@pytest.mark.parametrize(
    "options, p",
    [
        # Subnormal in float32, which CPUs and TPUs take for 0; smaller than any float32; tiny.
        *((dict(temperature=t), [0, 1, 0, 0, 0]) for t in (1e-40, 1e-50, 5e-324, 1e-9, 1e-5)),
        # The reciprocal is subnormal; beyond float32. The padding stays impossible.
        *((dict(temperature=t), [0.25] * 4 + [0]) for t in (1e29, 1e38, 3e38, 1e39, 1e300)),
        *((dict(top_p=p), [0, 1, 0, 0, 0]) for p in (1e-40, 1e-50, 5e-324)),
        (dict(temperature=1e-40, top_k=3, top_p=1e-50), [0, 1, 0, 0, 0]),
        (dict(top_p=1 - 1e-12), [0.1, 0.4, 0.2, 0.3, 0]),  # 1 in float32
        (dict(top_k=2**40), [0.1, 0.4, 0.2, 0.3, 0]),
    ],
)
def test_options_beyond_float32(options, p):
    np.testing.assert_allclose(transformed([*HALVES, -np.inf], **options), p, atol=1e-6)


SAMPLINGS = [Sampling(), Sampling(0.0), Sampling(1e-5), Sampling(0.5), Sampling(1e38),
             Sampling(top_k=2), Sampling(top_p=0.5), Sampling(0.7, 3, 1e-50)]  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("high", [1e30, 3.4e38])
def test_logits_at_the_ends_of_float32(sampling, high):
    """The first by far has all of the probability, at any temperature far below the logits."""
    rows = jnp.asarray([[high, -high, 0.0, -np.inf], [0.0, -high, -high, -np.inf]], jnp.float32)
    p = np.asarray(probabilities(rows, sampling))
    assert np.isfinite(p).all() and not p[:, 3].any()
    if sampling.temperature < high / 10:
        np.testing.assert_array_equal(p, [[1, 0, 0, 0]] * 2)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_without_a_distribution_there_is_no_token(sampling):
    """Not the first one, or any that happens to come out; and the neighbours have theirs.

    Of many rows: XLA's CPU loses a nan in a maximum where it computes them side by side.
    """
    some = np.random.default_rng(0).normal(size=33)
    rows = [np.where(np.arange(33) == at, value, some)
            for at in (0, 16, 32) for value in (np.nan, np.inf)]  # fmt: skip
    rows += [np.full(33, -np.inf), np.full(33, np.nan), some, np.where(some < 0, -np.inf, some)]
    rows = jnp.asarray(rows * 50, jnp.float32)

    @jax.jit
    def drawn(keys, rows):
        logits = transformed_logits(rows, sampling)
        # A draft's tokens; a target's, by way of its probabilities.
        return sample(keys, logits), sample(keys, jnp.log(jax.nn.softmax(logits)))

    for tokens in drawn(jax.random.split(jax.random.key(1), len(rows)), rows):
        tokens = np.asarray(tokens).reshape(50, 10)
        assert (tokens[:, :8] == NO_TOKEN).all() and (tokens[:, 8:] >= 0).all()


def test_ties_go_to_the_lower_token():
    ties = [1.0, 3.0, 3.0, 3.0, 0.0]
    np.testing.assert_allclose(transformed(ties, top_k=2), [0, 0.5, 0.5, 0, 0])
    np.testing.assert_allclose(transformed(ties, temperature=0.0), [0, 1, 0, 0, 0])
    np.testing.assert_allclose(transformed([0.0] * 4, top_p=0.7), [1 / 3] * 3 + [0], atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(temperature=0.0), dict(temperature=2.0), dict(top_k=3), dict(top_p=0.999)],
)
def test_padding_has_no_probability_and_is_never_drawn(options):
    logits = np.array([0.5, -2.0, 0.1, -np.inf, -np.inf])
    p = transformed(logits, **options)
    assert np.isfinite(p).all() and not p[3:].any()
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), 5000)
    drawn = sample(keys, jnp.broadcast_to(jnp.log(p), (5000, 5)))
    assert set(np.unique(drawn)) == set(np.flatnonzero(p))


def test_rows_are_transformed_independently():
    """Shapes (2, 3, V): the last axis is the vocabulary, and ranks go back where they came from."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    sampling = Sampling(0.7, 5, 0.8)
    whole = probabilities(logits, sampling)
    rows = [[probabilities(row, sampling) for row in block] for block in logits]
    np.testing.assert_allclose(whole, rows, atol=1e-7)
    np.testing.assert_array_equal(whole.argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.7), Sampling(0.0), Sampling(top_k=3), Sampling(top_p=0.6)]
)
def test_probability_of_a_token_is_its_share_of_the_distribution(sampling):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 30, 8)), jnp.float32).at[..., 7].set(-jnp.inf)
    tokens = jnp.asarray(rng.integers(0, 8, (2, 30)))
    found = probability_of(logits, tokens, sampling)
    expected = jnp.take_along_axis(probabilities(logits, sampling), tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.asarray(found)[np.asarray(tokens) == 7].any() and np.asarray(found).any()


def test_bfloat16_logits_are_transformed_in_float32():
    logits = jnp.asarray([0.1, 0.2, 0.3], jnp.bfloat16)
    p = probabilities(logits, Sampling(0.7))
    assert p.dtype == jnp.float32
    exact = np.exp(np.asarray(logits, np.float64) / 0.7)
    np.testing.assert_allclose(p, exact / exact.sum(), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4, 17, 300])
def test_sample_follows_the_distribution(size):
    """Whatever the vocabulary is cut into; impossible tokens among the others."""
    logits = np.random.default_rng(size).normal(0, 1.5, size)
    logits[3::5] = -np.inf
    p = scipy.special.softmax(logits)
    keys = jax.random.split(jax.random.key(1), 200_000)
    drawn = jax.jit(sample)(
        keys, jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (200_000, size))
    )
    counts = np.bincount(drawn, minlength=size)
    assert len(counts) == size and not counts[p == 0].any()
    some = p > 0
    if some.sum() > 1:
        assert scipy.stats.chisquare(counts[some], p[some] * counts.sum()).pvalue > 1e-4


def test_sampled_tokens_are_independent_of_the_run_they_are_in():
    """Two draws of one key would tie a token's place in its run to the run."""
    keys = jax.random.split(jax.random.key(2), 100_000)
    drawn = np.asarray(jax.jit(sample)(keys, jnp.zeros((100_000, 9))))
    table = np.bincount(drawn, minlength=9).reshape(3, 3)
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


def bits(keys) -> np.ndarray:
    return np.asarray(jax.random.key_data(keys))


def test_streams_are_named():
    keys = jax.random.split(jax.random.key(2), 3)
    same, again = stream(keys, "accept"), stream(keys, "accept")
    np.testing.assert_array_equal(bits(same), bits(again))
    names = ["draft", "accept", "next", "order", "init target"]
    distinct = {tuple(row) for name in names for row in bits(stream(keys, name))}
    distinct |= {tuple(row) for row in bits(keys)}
    assert len(distinct) == 3 * (len(names) + 1)


def test_seeds_have_64_bits():
    """Other seeds, other streams, whichever word they differ in; small ones are JAX's own."""
    seeds = [0, 1, 5, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 5 * 2**32, 2**63 - 1, -(2**63), -1, -5]
    keys = seed_keys(np.stack([seed_words(seed) for seed in seeds]))
    assert len({tuple(row) for row in bits(stream(keys, "draft"))}) == len(seeds)
    for seed, key in zip(seeds[:5], keys, strict=False):
        np.testing.assert_array_equal(bits(key), bits(jax.random.key(seed)))
    np.testing.assert_array_equal(seed_words(np.int64(-1)), [2**32 - 1] * 2)


def test_round_keys_belong_to_a_request_and_its_own_round():
    seeds = jax.random.split(jax.random.key(3), 2)
    at = {
        (r0, r1): bits(round_keys(seeds, jnp.asarray([r0, r1]))) for r0 in (0, 5) for r1 in (0, 5)
    }
    np.testing.assert_array_equal(at[0, 5][0], at[0, 0][0])  # another row's round changes nothing
    np.testing.assert_array_equal(at[0, 5][1], at[5, 5][1])
    assert len({tuple(row) for keys in at.values() for row in keys}) == 4

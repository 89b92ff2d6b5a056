"""The oracle against enumeration, and the decoder's rounds against the oracle."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from models import TINY, pair, texts

from spire_jax.decoding import generate
from spire_jax.decoding.oracle import kept_at_least, ratios_along, round_statistics, target_along
from spire_jax.decoding.verification import block_acceptance
from spire_jax.models.caches import full_cache
from spire_jax.models.sampling import Sampling, probabilities

# --- the dynamic program -----------------------------------------------------------------------


def enumerated(a: np.ndarray):
    """Every way in which rounds may go over one text: (weight, lengths, reached, accepted)."""
    starts, k = a.shape
    totals = np.zeros(2), np.zeros(k), np.zeros(k)

    def walk(start, weight, generations):
        if start >= starts:
            accepted = np.array(generations) - 1
            totals[0][:] += weight * np.array([sum(generations), len(generations)])
            for depth in range(k):
                totals[1][depth] += weight * (accepted >= depth).sum()
                totals[2][depth] += weight * (accepted > depth).sum()
            return
        for accepted in range(k + 1):
            passed = np.prod(a[start, :accepted])
            failed = 1 - a[start, accepted] if accepted < k else 1.0
            walk(start + accepted + 1, weight * passed * failed, (*generations, accepted + 1))

    walk(0, 1.0, ())
    return totals


@pytest.mark.parametrize("starts, k", [(1, 1), (1, 3), (4, 1), (5, 2), (6, 3)])
def test_rounds_are_those_of_enumeration(starts, k):
    a = np.random.default_rng(starts * 10 + k).uniform(size=(3, starts, k))
    found = round_statistics(a)
    for row in range(3):
        (length, rounds), reached, accepted = enumerated(a[row])
        np.testing.assert_allclose(found.lengths_by_k[row, -1], length)
        np.testing.assert_allclose(found.rounds_by_k[row, -1], rounds)
        np.testing.assert_allclose(found.reached[row], reached)
        np.testing.assert_allclose(found.accepted[row], accepted)
        for shallower in range(1, k):  # tau(k) from the same acceptances, cut at each depth
            (length, rounds), *_ = enumerated(a[row, :, :shallower])
            np.testing.assert_allclose(found.lengths_by_k[row, shallower - 1], length)
            np.testing.assert_allclose(found.rounds_by_k[row, shallower - 1], rounds)


def test_rounds_by_hand():
    """Certain acceptances: rounds of k + 1 tokens, the last one counted whole; and none at all."""
    all_pass = round_statistics(np.ones((1, 7, 2)))
    np.testing.assert_allclose(all_pass.lengths_by_k, [[8, 9]])  # 2+2+2+2, 3+3+3
    np.testing.assert_allclose(all_pass.rounds_by_k, [[4, 3]])
    none_pass = round_statistics(np.zeros((1, 7, 2)))
    np.testing.assert_allclose(none_pass.lengths_by_k, [[7, 7]])
    np.testing.assert_allclose(none_pass.rounds_by_k, [[7, 7]])
    np.testing.assert_allclose(none_pass.reached, [[7, 0]])
    # Independent acceptances of 0.5: long texts go to tau = 1 + 1/2 + 1/4.
    half = round_statistics(np.full((1, 4000, 2), 0.5))
    np.testing.assert_allclose(half.lengths_by_k[0, 1] / half.rounds_by_k[0, 1], 1.75, rtol=1e-3)


def test_tau_grows_with_k():
    """Per text, up to what the budget cuts off, which counts whole and favours deep rounds."""
    a = np.random.default_rng(0).uniform(size=(20, 60, 4))
    found = round_statistics(a)
    tau = found.lengths_by_k / found.rounds_by_k
    assert (np.diff(tau, axis=1) > 0).all() and (tau[:, 0] > 1).all() and (tau[:, -1] < 5).all()


@pytest.mark.parametrize("v, k", [(2, 3), (3, 2), (2, 1)])
def test_block_verification_along_a_text_is_that_of_enumeration(v, k):
    """P(at least i kept | text) from b and h of every draft, by Bayes, against the minimum."""
    rng = np.random.default_rng(v)
    # Distributions after every prefix: of the target, and of a draft that starts at the root.
    prefixes = [w for n in range(k + 1) for w in itertools.product(range(v), repeat=n)]
    p, q = ({w: rng.dirichlet(np.ones(v)) for w in prefixes} for _ in range(2))
    words = np.array(list(itertools.product(range(v), repeat=k)))
    drafts = jnp.asarray(words)
    q_of = jnp.asarray([[q[tuple(w[:i])] for i in range(k)] for w in words], jnp.float32)
    p_of = jnp.asarray([[p[tuple(w[:i])] for i in range(k + 1)] for w in words], jnp.float32)
    b, h = (
        np.asarray(x, np.float64) for x in block_acceptance(drafts, jnp.log(q_of), jnp.log(p_of))
    )
    h = np.concatenate([np.ones((len(words), 1)), h], axis=1)
    kept = np.zeros((v,) * k + (k + 1,))  # P(exactly i kept, the text begins with these k tokens)
    for row, word in enumerate(words):
        drafted = np.prod([q[tuple(word[:i])][word[i]] for i in range(k)])
        for i in range(k + 1):
            weight = drafted * h[row, i] * np.prod(1 - h[row, i + 1 :])
            rest = np.ones((v,) * (k - i))  # the next token by the residual, more by the target
            for tail in itertools.product(range(v), repeat=k - i):
                for j, token in enumerate(tail):
                    prefix = (*word[:i], *tail[:j])
                    law = p[prefix]
                    if j == 0:
                        law = np.maximum(b[row, i] * p[prefix] - q[prefix], 0)
                        law = law / law.sum() if law.sum() > 0 else p[prefix]
                    rest[tail] *= law[token]
            kept[tuple(word[:i])][..., i] += weight * rest
    for word in words:
        written = np.prod([p[tuple(word[:i])][word[i]] for i in range(k)])
        np.testing.assert_allclose(kept[tuple(word)].sum(), written, rtol=1e-4)  # lossless
        at_least = kept[tuple(word)][::-1].cumsum()[::-1][1:] / written
        ratios = [q[tuple(word[:i])][word[i]] / p[tuple(word[:i])][word[i]] for i in range(k)]
        found = kept_at_least(np.array(ratios)[None, None], "block")[0, 0]
        np.testing.assert_allclose(found, at_least, rtol=1e-3)
        assert (found >= kept_at_least(np.array(ratios)[None, None])[0, 0] - 1e-12).all()


# --- acceptance along a text -------------------------------------------------------------------


def along(kind: str, tokens, context: int, output: int, k: int, sampling: Sampling, config=TINY):
    """q / p of a draft along texts, after the one pass of the target over them."""
    p = pair(kind, config)
    target = target_pass(p.target, p.target_params, jnp.asarray(tokens), context, sampling, config)
    return np.asarray(
        ratios_along(
            p.strategy, p.draft_params, jnp.asarray(tokens), target, context, output, k, sampling
        )
    )


def target_pass(model, params, tokens, context, sampling, config):
    """One pass for all drafts at once, on the cache of a prefill of the context alone."""
    _, keys_values = model.bind(params).prefill(tokens[:, : context - 1])
    cache = tuple(full_cache(*kv, tokens.shape[1], model.compute) for kv in keys_values)
    served = tuple(pair(kind, config).strategy for kind in ("vanilla", "spire", "snapkv", "eagle3"))
    return target_along(model, params, cache, tokens, context, served, sampling)


def test_a_draft_of_no_numbers_has_a_token_a_round():
    """As the decoder, which keeps none of its tokens."""
    context, output, k = 4, 5, 3
    p, tokens = pair("vanilla"), jnp.asarray(texts(6, context + output + k - 1))
    target = target_pass(p.target, p.target_params, tokens, context, Sampling(), TINY)
    broken = jax.tree.map(lambda x: x * jnp.nan, p.draft_params)
    ratios = ratios_along(p.strategy, broken, tokens, target, context, output, k, Sampling())
    for verification in ("token", "block"):
        found = round_statistics(np.asarray(ratios), verification)
        np.testing.assert_array_equal(found.lengths_by_k, np.full((6, k), output))
        np.testing.assert_array_equal(found.rounds_by_k, found.lengths_by_k)


@pytest.mark.parametrize("kind", ["vanilla", "spire"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, 15, 0.95)], ids=["plain", "cut"])
def test_acceptance_is_q_over_p_of_each_token_from_each_start(kind, sampling):
    context, output, k = 4, 5, 3
    tokens = texts(6, context + output + k - 1)
    p, length = pair(kind), tokens.shape[1]
    forward = jax.jit(lambda w, x: p.target.bind(w).forward(x, p.strategy.collect))
    logits, activations = forward(p.target_params, jnp.asarray(tokens))
    of_target = np.asarray(probabilities(logits, sampling))
    module = p.strategy.model.bind(p.draft_params)
    if kind == "spire":
        starts = np.arange(length - k + 1)
        rollout = jax.jit(lambda x, ys: module.rollout(x, ys, starts, k))
        logits = rollout(jnp.asarray(tokens), activations)
    else:
        logits, _ = module.forward(jnp.asarray(tokens))
    of_draft = np.asarray(probabilities(logits, sampling))
    found = along(kind, tokens, context, output, k, sampling)
    assert found.shape == (6, output, k)
    compared = 0
    for b, r, j in np.ndindex(found.shape):
        start = context - 1 + r  # start 0 is the context's last token
        x = tokens[b, start + j + 1]
        q = of_draft[b, start, j, x] if kind == "spire" else of_draft[b, start + j, x]
        if of_target[b, start + j, x] > 0:  # a text of the target has no others
            expected = q / of_target[b, start + j, x]
            np.testing.assert_allclose(found[b, r, j], expected, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared > found.size / 3 and 0.1 < np.minimum(found, 1).mean() < 0.9


def test_texts_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match="needs texts of 17 tokens, not 16"):
        along("vanilla", texts(1, 16), 10, 5, 3, Sampling())


# --- the decoder agrees ------------------------------------------------------------------------

CONTEXT, OUTPUT, K, ROWS = 10, 24, 3, 512
WINDOWED = dataclasses.replace(TINY, window=7, sink=2)  # a target with a mask of its own
CASES: list[tuple] = [
    (kind, TINY, 1.0)
    for kind in (
        "spire",
        "spire_strict",
        "spire_plain",
        "vanilla",
        "ring",
        "self",
        "spire_trimmed",
        "magicdec",
        "snapkv",
        "stride",
        "stride_argmax",
        "spire_fused",
        "block",
        "block_causal",
        "longspec",
        "anchor",
        "eagle3",
        "eagle3_argmax",
    )
]
CASES += [("spire", TINY, 0.7), ("spire", WINDOWED, 1.0), ("longspec", WINDOWED, 1.0)]
BLOCKS = [(kind, TINY, temperature, "block") for kind, temperature in (
    ("spire", 1.0), ("vanilla", 0.7), ("ring", 1.0), ("stride", 1.0),
    ("stride_argmax", 0.7), ("block", 1.0), ("block_causal", 0.7), ("longspec", 1.0),
    ("anchor", 0.7), ("eagle3", 1.0))]  # fmt: skip


@functools.cache
def autoregressive_texts(config, temperature: float) -> np.ndarray:
    """One set of samples of the target for every draft, long enough for the last round."""
    p = pair("vanilla", config)
    budget = OUTPUT + K - 1
    decoder = p.autoregressive(temperature)
    state = generate(decoder, p.weights, list(texts(ROWS, CONTEXT)), [budget] * ROWS, range(ROWS))
    return np.asarray(state.tokens)[:, : CONTEXT + budget]


def ratio(over: np.ndarray, under: np.ndarray) -> tuple[float, float]:
    """sum(over) / sum(under), and its standard error over rows by the delta method."""
    value = float(over.sum()) / float(under.sum())
    spread = np.std(over - value * under) * np.sqrt(len(over)) / under.sum()
    return value, float(spread)


@functools.cache
def both(kind: str, config, temperature: float, verification: str = "token"):
    """The oracle's statistics, and the decoder's counts of accepted tokens by round and row."""
    p = pair(kind, config)
    decoder = dataclasses.replace(p.decoder(K, temperature), verification=verification)
    samples = autoregressive_texts(config, temperature)
    ratios = along(kind, samples, CONTEXT, OUTPUT, K, decoder.sampling, config)
    seeds = range(10_000, 10_000 + ROWS)
    state = generate(decoder, p.weights, list(texts(ROWS, CONTEXT)), [OUTPUT] * ROWS, seeds)
    return round_statistics(ratios, verification), np.asarray(state.counts)


# In the full tier: other drafts stand for them.
LATER = [case for case in CASES if case[0] not in ("spire", "vanilla", "magicdec", "snapkv")]
LATER += [("spire", TINY, 0.7), ("spire", WINDOWED, 1.0), *BLOCKS[1:]]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            c, id=f"{c[0]}-{c[2]}-{c[-1]}"[:24], marks=pytest.mark.slow if c in LATER else ()
        )
        for c in CASES + BLOCKS
    ],
)
def test_decoder_agrees_with_the_oracle(case):
    """tau within intervals that hold for all cases together in 95% of all choices of seeds,
    acceptance within three standard errors at each depth."""
    oracle, counts = both(*case)
    lengths, rounds = counts @ np.arange(1, K + 2), counts.sum(axis=1)
    expected, its_error = ratio(oracle.lengths_by_k[:, -1], oracle.rounds_by_k[:, -1])
    tau, error = ratio(lengths, rounds)
    together = scipy.stats.norm.isf(0.025 / len(CASES + BLOCKS))
    assert abs(tau - expected) < together * np.hypot(error, its_error) + 1e-3
    for depth in range(K):
        passed, tried = counts[:, depth + 1 :].sum(axis=1), counts[:, depth:].sum(axis=1)
        expected, its_error = ratio(oracle.accepted[:, depth], oracle.reached[:, depth])
        found, error = ratio(passed, tried)
        assert abs(found - expected) < 3 * np.hypot(error, its_error) + 1e-3, f"depth {depth + 1}"
    if case[0] == "self":
        rejected = counts[:, :K].sum()  # of as many tests as there are tokens
        assert rejected < 1e-4 * lengths.sum()


def test_the_intervals_are_narrow_and_the_drafts_differ():
    """tau is known to about two percent, so that agreement says something."""
    taus = {}
    for kind in ("spire", "vanilla", "ring"):
        oracle, counts = both(kind, TINY, 1.0)
        taus[kind], error = ratio(oracle.lengths_by_k[:, -1], oracle.rounds_by_k[:, -1])
        _, decoder_error = ratio(counts @ np.arange(1, K + 2), counts.sum(axis=1))
        assert error < decoder_error < 0.02 * taus[kind]
        assert 1.05 < taus[kind] < K
    for one, other in itertools.combinations(taus, 2):
        assert abs(taus[one] - taus[other]) > 0.02

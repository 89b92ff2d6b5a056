"""What must hold of every draft kind that is registered, a stranger's too, and of its options: the
bytes that are modeled are its arrays', and the oracle's faster views are its replay."""

import dataclasses

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from spire_jax.config.drafts import DraftOptions, TrainedOptions
from spire_jax.config.registry import DRAFT_KINDS
from spire_jax.config.schema import (
    ConfigError,
    DecodeConfig,
    EvalConfig,
    ExperimentConfig,
    ModelConfig,
    ThroughputConfig,
)
from spire_jax.costs.throughput import memory_bytes
from spire_jax.drafting.strategy import Processed, Strategy
from spire_jax.models.attention import Compute
from spire_jax.models.caches import SelectedCache, empty_full, full_cache
from spire_jax.models.sampling import Sampling
from spire_jax.models.transformer import Model, Params

K = 3
WINDOW, SINK = models.WINDOW, models.SINK
WINDOWED = dataclasses.replace(models.TINY, window=9, sink=2, tied=True, qkv_bias=True)
# Options of the built-in kinds; of others the defaults.
OPTIONS: dict[str, list[dict]] = {
    "spire": [
        {"window": WINDOW, "sink": SINK},
        {"window": WINDOW, "sink": 0, "n_layers": 3, "attend_self": False},
        {"window": WINDOW, "feedback": False, "share_embedding": True},
        {"window": 0, "memory": "final"},
        {"window": WINDOW, "memory": "embedding", "head_tokens": 12},
    ],
    "vanilla": [
        {"window": WINDOW, "sink": SINK},
        {"window": 0, "d_model": 16, "n_kv_heads": 1, "d_ff": 24, "init": "random"},
        {"window": WINDOW, "sink": 3, "n_layers": 3, "head_tokens": 12},
    ],
    "magicdec": [{"window": WINDOW, "sink": SINK}, {"window": WINDOW, "sink": 0}],
    "snapkv": [{"budget": 7, "observed": 3}],
    "anchor": [
        {"anchors": (2, 9, 14, 17), "full_every": 2, "line": 4, "budget": 2},
        {"anchors": (2, 9, 14), "line": 5, "budget": 3, "n_layers": 3, "head_tokens": 12},
        {"anchors": (5,), "full_every": 1, "window": WINDOW, "sink": SINK},
    ],
    "longspec": [{"window": WINDOW}, {"window": 0, "d_ff": 24}],
    "stride": [
        {"window": WINDOW, "sink": SINK, "stride": 2},
        {"window": WINDOW, "stride": 3, "head": "markov", "head_rank": 4},
        {"window": 0, "stride": 2, "head": "recurrent", "head_rank": 4, "head_tokens": 12},
        {"window": WINDOW, "stride": 2, "draws": "argmax", "feedback": False},
    ],
}  # fmt: skip
CASES = [(kind, options) for kind in DRAFT_KINDS.names() for options in OPTIONS.get(kind, [{}])]


def named(case: tuple[str, dict]) -> str:
    return "-".join([case[0], *map(str, case[1].values())])


every_kind = pytest.mark.parametrize("kind,options", CASES, ids=map(named, CASES))


def draft_of(kind: str, options: dict) -> DraftOptions:
    return DRAFT_KINDS.get(kind)(**options)


def params_of(options: DraftOptions, strategy: Strategy, target: Params) -> Params:
    return models.init(strategy.model, 1) if isinstance(options, TrainedOptions) else target


def pair_of(kind: str, options: dict, target: ModelConfig = models.TINY) -> models.Pair:
    draft, (model, params) = draft_of(kind, options), models.target(target)
    strategy = draft.strategy(target, Compute())
    return models.Pair(model, params, strategy, params_of(draft, strategy, params))


# --- bytes ---------------------------------------------------------------------------------------


def state_over(options: DraftOptions, target: ModelConfig, context: int, k: int, rows: int = 2):
    """The abstract state over a text of `context` tokens in all, the k drafted ones included."""
    strategy, prompt = options.strategy(target, Compute()), max(context - k, 0)

    def begin(params, tokens, activations, cache):
        positions = jnp.tile(jnp.arange(prompt), (rows, 1))
        processed = Processed(tokens, positions, activations, cache)
        return strategy.begin(params, processed, jnp.full(rows, prompt), k, context)

    activation = jax.ShapeDtypeStruct((rows, prompt, target.d_model), jnp.float32)
    return jax.eval_shape(
        begin,
        strategy.model.shapes(),
        jax.ShapeDtypeStruct((rows, prompt), jnp.int32),
        (activation,) * len(strategy.collect),
        jax.eval_shape(lambda: empty_full(target, rows, context, Compute())),
    )


def floats(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))


def check_slots(options: DraftOptions, target: ModelConfig, k: int = K) -> None:
    """Of texts shorter and longer than a window."""
    for context in (k + 1, 8, 32):
        state = state_over(options, target, context, k)
        cost = options.cost(target, context, k)
        assert floats(state) / 2 == cost.slots * options.model(target).cache_row(), context
        assert cost.rows <= cost.slots + SINK


def check_memory(config: ExperimentConfig, name: str, context: int = 32) -> None:
    """Weights and caches of a target and its draft, with numbers of 4 bytes.

    Neither final norms are counted nor SPIRe's mix (method.md section 1), nor a head's ids.
    """
    wide = ThroughputConfig(weight_bytes=4.0, cache_bytes=4.0)
    config = dataclasses.replace(config, throughput=wide)
    target, options, k = config.target, config.draft(name), config.decode.k
    left_out = {"norm_final", "memory_mix", "head_ids"}
    params = Model(target.module(), target, Compute()).shapes()
    arrays = [{key: x for key, x in params.items() if key not in left_out}]
    if isinstance(options, TrainedOptions):
        left_out |= {*options.shared}
        params = options.strategy(target, Compute()).model.shapes()
        arrays.append({key: x for key, x in params.items() if key not in left_out})
    arrays.append(jax.eval_shape(lambda: empty_full(target, 2, context, Compute())))
    arrays.append(state_over(options, target, context, k))
    assert memory_bytes(config, name, batch=2, context=context) == 4 * floats(arrays)


@every_kind
@pytest.mark.parametrize("target", [models.TINY, WINDOWED], ids=["dense", "windowed"])
def test_modeled_bytes_are_the_arrays(kind, options, target):
    draft = draft_of(kind, options)
    check_slots(draft, target)
    of = ExperimentConfig(target=target, drafts=(("it", draft),), decode=DecodeConfig(k=K))
    check_memory(of, "it")


def check_rows(draft: DraftOptions, target: ModelConfig, context: int) -> None:
    """A text ends with the query; what that sees of it counts, itself included.

    The exception is the paper's: a context shorter than the window is charged beside the sinks.
    """
    strategy, query = draft.strategy(target, Compute()), context - 1
    model, params = models.target(target)
    tokens, lengths = jnp.asarray(models.texts(2, query)), jnp.full(2, query)

    @jax.jit
    def begin(params, own, tokens):
        activations, keys_values = model.bind(params).prefill(tokens, strategy.collect)
        cache = tuple(full_cache(k, v, context + K, Compute()) for k, v in keys_values)
        prompt = Processed(tokens, jnp.tile(jnp.arange(query), (2, 1)), activations, cache)
        return strategy.begin(own, prompt, lengths, K, context + K)

    state, charged = begin(params, params_of(draft, strategy, params), tokens), []
    for of, view in zip(state, strategy.views, strict=True):
        held = np.asarray(of.held(lengths)).reshape(-1, of.size)[0]  # of a row, and of a head
        seen = view.sees(query, held).sum()
        if isinstance(of, SelectedCache):  # its budget is charged, which has the query in it
            seen = min(seen, draft.kept()[0])
        beside = min(view.sink, view.sink + view.window - context) if view.window else 0
        charged.append(seen + max(beside, 0))
    assert draft.cost(target, context, K).rows == sum(charged) / len(charged)


# What an anchor's queries see depends on the tokens: test_anchor.py.
BY_POSITION = [case for case in CASES if case[0] != "anchor"]


@pytest.mark.parametrize("kind,options", BY_POSITION, ids=map(named, BY_POSITION))
@pytest.mark.parametrize("target", [models.TINY, WINDOWED], ids=["dense", "windowed"])
@pytest.mark.parametrize("context", [4, 20])
def test_modeled_rows_are_what_the_first_step_sees(kind, options, target, context):
    draft = draft_of(kind, options)
    if not draft.views(target):
        pytest.skip("it keeps no keys and values")
    try:
        evaluated = EvalConfig(context_lengths=(20,))
        draft.check("it", ExperimentConfig(target=target, eval=evaluated))
    except ConfigError as refused:
        pytest.skip(str(refused))
    check_rows(draft, target, context)


# --- the oracle ----------------------------------------------------------------------------------

FASTER = [case for case in CASES if type(draft_of(*case).strategy(models.TINY, Compute())).along
          is not Strategy.along]  # fmt: skip


# In the full tier: test_anchor.py has a cache's steps, and LongSpec's first options stand for it.
LATER = [case for case in FASTER if case[0] == "anchor"]
LATER += [case for case in FASTER if case[0] == "longspec"][1:]


@pytest.mark.parametrize(
    "kind,options",
    [pytest.param(*case, id=named(case), marks=pytest.mark.slow if case in LATER else ())
     for case in FASTER],
)  # fmt: skip
@pytest.mark.parametrize(
    "target,first",
    [(models.TINY, 11)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in ((models.TINY, 0), (WINDOWED, 11))],
    ids=["from 11", "from 0", "windowed"],
)
def test_the_oracles_view_is_what_replaying_finds(kind, options, target, first):
    """From starts before the window is full and after, and from the first token on."""
    draft, (model, params), sampling = draft_of(kind, options), models.target(target), Sampling(0.8)
    strategy, tokens = draft.strategy(target, Compute()), jnp.asarray(models.texts(2, 24))
    own, starts = params_of(draft, strategy, params), np.arange(first, 24 - K)
    sinks, begin = strategy.reads(first)
    read = np.r_[: min(sinks, begin), begin:23]

    @jax.jit
    def views(params, own, tokens):
        activations, keys_values = model.bind(params).prefill(tokens, strategy.collect)
        cache = tuple(full_cache(k, v, 24, Compute()) for k, v in keys_values)
        ys = tuple(y[:, read] for y in activations)
        at = own, tokens, ys, cache, read, starts, K, sampling
        return strategy.along(*at), strategy.replay(*at)

    along, replay = views(params, own, tokens)
    assert along.shape == (2, len(starts), K) and float(jnp.std(along)) > 0.01
    np.testing.assert_allclose(along, replay, rtol=2e-4, atol=1e-6)

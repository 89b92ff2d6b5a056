"""A trained draft kind that nobody planned for, in one file: its parameters, options and loss.

A small recurrent network drafts from what the target made of the token before the last one. It
foretells the target's next activation; a head of its own reads the token from that.
"""

import dataclasses

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import strangers
import test_strategies
from flax import nnx
from test_lossless import SMALL, check_joint

from spire_jax.config.checks import not_negative, positive
from spire_jax.config.drafts import DraftCost, Pass, TrainedOptions
from spire_jax.config.readers import DRAFT, read_by
from spire_jax.config.registry import DRAFT_KINDS, LOSSES
from spire_jax.config.schema import ModelConfig
from spire_jax.drafting.learning import DraftLoss
from spire_jax.drafting.strategy import Strategy
from spire_jax.models.attention import Compute
from spire_jax.models.layers import RMSNorm, parameter, truncated_normal
from spire_jax.models.transformer import Model


@dataclasses.dataclass(frozen=True)
class RecurrentSizes(ModelConfig):
    """No layers of a transformer: one cell of `hidden` units."""

    hidden: int = 0

    def body_parameters(self):
        return 3 * self.d_model * self.hidden + self.hidden

    def cache_row(self):
        return self.d_model  # an activation


@DRAFT_KINDS.register("recurrent")
@dataclasses.dataclass(frozen=True)
class RecurrentOptions(TrainedOptions):
    kind: str = "recurrent"
    hidden: int = 32
    k: int = read_by(0, DRAFT, as_train=True)  # rollout depth in training; 0 = train.k
    regression: float = 0.1  # weight of the activation's squared error

    shared = ("embedding",)

    def strategy(self, target, compute):
        return Recurrent(Model(Cell, self.model(target), compute), target.n_layers)

    def model(self, target):
        sizes = ("d_model", "vocab_size", "n_tokens", "norm_eps")
        return RecurrentSizes(n_layers=0, hidden=self.hidden,
                              **{name: getattr(target, name) for name in sizes})  # fmt: skip

    def initial(self, target, fresh):
        """Its head begins as the target's."""
        return fresh | {name: jax.tree.map(jnp.copy, target[name])
                        for name in fresh if name in target}  # fmt: skip

    def rollout(self, train):
        return self.k or train.k

    def learns(self, strategy, k):
        return WithRegression(super().learns(strategy, k), self.regression)

    def cost(self, target, context, k):
        return DraftCost(rows=1.0, slots=k + 2.0, passes=(Pass(),) * k)

    def check(self, at, config):
        super().check(at, config)
        positive(self, at, "hidden")
        not_negative(self, at, "k regression")


class Cell(nnx.Module):
    """y' = y + W silu(V [y, x] + b), and a normed head."""

    def __init__(self, config, compute, *, rngs):
        self.config, self.compute, d = config, compute, config.d_model
        table = (config.vocab_size, d)
        self.embedding = parameter(rngs, table, ("vocab", "embed"), nnx.initializers.normal(1.0))
        self.mix_in = parameter(rngs, (2 * d, config.hidden), ("embed", "mlp"),
                                truncated_normal(2 * d))  # fmt: skip
        self.mix_bias = parameter(rngs, (config.hidden,), ("mlp",), nnx.initializers.zeros)
        self.mix_out = parameter(rngs, (config.hidden, d), ("mlp", "embed"),
                                 truncated_normal(config.hidden))  # fmt: skip
        self.norm_final = RMSNorm(d, config.norm_eps, rngs=rngs)
        self.unembedding = parameter(rngs, table[::-1], ("embed", "vocab"), truncated_normal(d))

    def next(self, y, tokens):
        """The activation of `tokens`, foretold from that of the tokens before them."""
        x = jnp.concatenate([y, self.embedding[...][tokens].astype(y.dtype)], axis=-1)
        hidden = jax.nn.silu(x @ self.mix_in[...].astype(y.dtype) + self.mix_bias[...])
        return y + hidden.astype(y.dtype) @ self.mix_out[...].astype(y.dtype)

    def logits(self, y):
        logits = (self.norm_final(y) @ self.unembedding[...].astype(y.dtype)).astype(jnp.float32)
        return jnp.where(np.arange(self.config.vocab_size) < self.config.n_tokens, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Recurrent(Strategy):
    """Keeps the last activations, k + 2 of them: a round writes over none that the next one reads.

    Drafted tokens leave what was foretold of them there, until the target's own comes.
    """

    target_depth: int

    @property
    def collect(self):
        return (self.target_depth,)

    def empty(self, params, batch, k, capacity):
        return jnp.zeros((batch, k + 2, self.model.config.d_model), self.model.compute.dtype)

    def step(self, params, state, target, tokens, positions):
        module, at = self.model.bind(params), positions[:, 0]
        before = jnp.take_along_axis(state, ((at - 1) % state.shape[1])[:, None, None], axis=1)
        y = module.next(jnp.where(at[:, None] > 0, before[:, 0], 0.0), tokens[:, 0])
        return module.logits(y), put(state, positions, y[:, None])

    def commit(self, params, state, block):
        return put(state, block.positions, block.activations[0], block.rows)

    def foretold(self, params, tokens, activations, k):
        """Activations of rollouts from 0, k, 2k, ..., teacher-forced: [B, T, D]."""
        module, (y,) = self.model.bind(params), activations
        (batch, length), before = tokens.shape, jnp.pad(y, ((0, 0), (1, 0), (0, 0)))[:, :-1:k]

        def one(y, at):
            y = module.next(y, at)
            return y, y

        by_depth = jnp.moveaxis(tokens.reshape(batch, length // k, k), 2, 0)
        _, ys = jax.lax.scan(one, before.astype(self.model.compute.dtype), by_depth)
        return jnp.moveaxis(ys, 0, 2).reshape(batch, length, -1)

    def predict(self, params, tokens, activations, k):
        return self.model.bind(params).logits(self.foretold(params, tokens, activations, k))


def put(state, positions, y, rows=None):
    """The newest activations, each in its slot."""
    size = state.shape[1]
    kept = (positions >= 0) & (positions > positions.max(axis=1, keepdims=True) - size)
    rows = jnp.arange(len(state)) if rows is None else rows
    slots = jnp.where(kept, positions % size, size)
    return state.at[rows[:, None], slots].set(y.astype(state.dtype), mode="drop")


@LOSSES.register("overlap")
def _overlap(distillation, alpha, logits, targets, omega):
    """1 - alpha, and a little distillation where they do not overlap at all."""
    return 1 - alpha + 0.1 * distillation


@dataclasses.dataclass(frozen=True)
class WithRegression:
    of_tokens: DraftLoss
    weight: float

    def __call__(self, params, lesson, batch):
        values, alpha = self.of_tokens(params, lesson, batch)
        strategy, k = self.of_tokens.strategy, self.of_tokens.k
        ys = tuple(lesson.activations[layer] for layer in strategy.collect)
        found = strategy.foretold(params, batch.tokens, ys, k)
        return values + self.weight * jnp.mean((found - ys[0]) ** 2, axis=-1), alpha


# --- the proof -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    return strangers.finished(
        corpus, tmp_path_factory.mktemp("kind"), plugins=__name__, drafts__mine__kind="recurrent",
        drafts__mine__hidden=24, drafts__mine__loss="overlap", drafts__mine__regression=0.2,
    )  # fmt: skip


def test_it_is_set_on_the_command_line_and_learns(done):
    draft, losses = done.config.draft("mine"), done.losses("mine")
    assert draft == RecurrentOptions(hidden=24, loss="overlap", regression=0.2)
    assert np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3])
    assert "embedding" in done.at.draft("mine") and "mix_in" in done.at.draft("mine")


def test_it_is_lossless(done):
    strangers.check_greedy(done, "mine")
    strategy = RecurrentOptions(hidden=8).strategy(SMALL, Compute())
    target, params = models.target(SMALL)
    check_joint(models.Pair(target, params, strategy, models.init(strategy.model, 1)), 1.0)


def test_the_oracle_agrees_with_the_decoder_and_the_report_has_it(done):
    strangers.check_report(done, "mine")


def test_its_bytes_are_its_arrays(done):
    test_strategies.check_memory(done.config, "mine")


def test_it_is_exported_and_imported_or_refused(done, tmp_path, monkeypatch):
    folder = strangers.check_export(done, "mine", tmp_path / "draft")
    strangers.check_refused(done, folder, DRAFT_KINDS, "recurrent", monkeypatch)

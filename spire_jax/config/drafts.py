"""What a draft may be set to: options by kind, and what the rest of the library asks of them.

Each kind adds its own options in its file (drafting/), by inheritance.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from spire_jax.config.checks import check, choice, not_negative, positive, share
from spire_jax.config.readers import DRAFT, EVALUATE, STUDY, read_by
from spire_jax.config.registry import LOSSES, below

if TYPE_CHECKING:  # what a draft makes is below this folder
    from spire_jax.config.schema import ExperimentConfig, ModelConfig, TrainConfig
    from spire_jax.drafting.learning import Loss
    from spire_jax.drafting.strategy import Strategy
    from spire_jax.models.attention import Compute
    from spire_jax.models.masks import View
    from spire_jax.models.transformer import Params


class Pass(NamedTuple):
    """A forward pass of a draft, of one request's tokens."""

    tokens: int = 1  # that it processes
    drafted: int = 1  # of which it computes logits
    projections: int = 0  # of tokens to keys and values, besides the transformer's own
    head: int = 0  # weights that each drafted token reads anew, after those before it
    weights: int = 0  # beside its transformer's and its heads', that it reads
    products: int = 0  # multiplications with these


@dataclasses.dataclass(frozen=True)
class DraftCost:
    """What drafting costs one request in a round, whatever the chip (costs/roofline.py)."""

    rows: float  # cached tokens that a pass reads, mean over the draft's layers
    slots: float  # cached tokens that its state has room for, likewise
    passes: tuple[Pass, ...]
    more: int = 0  # weights beside its transformer's
    target_rows: float = 0.0  # cached tokens of one layer of the target that a pass reads in place


@dataclasses.dataclass(frozen=True)
class DraftOptions:
    """What every way of drafting has; each kind adds its own in its file (drafting/).

    A subclass is registered under its kind and answers here what the rest asks of a draft. As it
    stands nothing is trained, and the target's own weights draft.
    """

    kind: str = ""  # as it is registered
    of: str = read_by("")  # the draft that this one is an ablation of

    # Whether it needs a prompt as a whole, so that a server cannot read it in chunks.
    whole_prompt: ClassVar[bool] = False

    def strategy(self, target: "ModelConfig", compute: "Compute") -> "Strategy":
        """How it drafts for a target."""
        raise NotImplementedError(f"{type(self).__name__} of kind {self.kind!r} has no strategy")

    def check(self, at: str, config: "ExperimentConfig") -> None:
        """ConfigError for what cannot decode, with the key and the remedy.

        `at` is where the draft stands.
        """

    def check_run(self, at: str, config: "ExperimentConfig") -> None:
        """ConfigError for what cannot be trained or evaluated as the config says."""

    def model(self, target: "ModelConfig") -> "ModelConfig":
        """Its transformer: the target's conventions, and the draft's sizes."""
        return target

    def kept(self) -> tuple[int, int]:
        """(window, sink): the tokens whose keys and values a step reads, where it reads such.

        A window of 0: all, or by a rule of its own.
        """
        return 0, 0

    def rollout(self, train: "TrainConfig") -> int:
        """Depths that training rolls it out to; 0: it learns of no depth."""
        return 0

    def views(self, target: "ModelConfig") -> tuple["View", ...]:
        """What each layer of the draft sees: what the target's last layers do, of what it keeps.

        A draft deeper than the target has the views of its own depth.
        """
        return _kept_views(self, target)

    def cost(self, target: "ModelConfig", context: float, k: int) -> "DraftCost":
        """What a round of k drafted tokens costs one request of `context` tokens.

        As it stands: k passes over one token, each layer reading what its view leaves of the text
        from a cache that has room for that: all of a text of `context` tokens, or the window and
        what is drafted.
        """
        # A context shorter than the window is charged in full *beside* the sinks: so counts the
        # table of method.md (L = 32).
        views = self.views(target)
        return DraftCost(
            rows=over_layers(views, lambda v: v.sink + min(context, v.window), float(context)),
            slots=over_layers(views, lambda v: v.sink + v.window + k, float(context)),
            passes=(Pass(),) * k,
        )

    def filled(self, train: "TrainConfig") -> "DraftOptions":
        """With the values of `train` where 0 stands for them."""
        values = {
            f.name: getattr(self, f.name) or getattr(train, f.name)
            for f in dataclasses.fields(self)
            if f.metadata.get("as_train")
        }
        return dataclasses.replace(self, **values)


@dataclasses.dataclass(frozen=True)
class TrainedOptions(DraftOptions):
    """A draft that is trained on the frozen target, whatever it is made of."""

    # "hard", "distillation", "mixed", "dspark", or one of a module in `plugins`
    loss: str = "mixed"
    # Weight of distillation in the mixed loss.
    omega: float = read_by(0.5, DRAFT, when=lambda of: of.loss == "mixed")
    # Another draft, whose trained parameters this one uses: it differs in how it decodes.
    weights_of: str = read_by("", EVALUATE, STUDY, when=lambda of: of.weights_of)
    seed: int = 0  # another order of the batches, and another random initialization
    steps: int = read_by(0, DRAFT, as_train=True)  # 0 = train.steps
    peak_lr: float = read_by(0.0, DRAFT, as_train=True)  # 0 = train.peak_lr

    # Whether training rolls out from every token, not from every k-th: it computes k times as much.
    every_start: ClassVar[bool] = False

    @property
    def shared(self) -> tuple[str, ...]:
        """Tables that are the frozen target's own, by name: neither trained nor stored."""
        return ()

    def products(self, target: "ModelConfig", k: int) -> int:
        """Multiplications of a training pass, per token, with weights beside its transformer's."""
        return 0

    def initial(self, target: "Params", fresh: "Params") -> "Params":
        """Its parameters before training, from random ones and the target's."""
        return fresh

    def learns(self, strategy: "Strategy", k: int) -> "Loss":
        """What is minimized, of rollouts k deep: `loss`, of the strategy's predictions."""
        return below("drafting.learning").DraftLoss(strategy, self.loss, self.omega, k)

    def check(self, at: str, config: "ExperimentConfig") -> None:
        choice(f"{at}.loss", self.loss, LOSSES.names())
        not_negative(self, at, "seed steps peak_lr")
        share(self, at, "omega", whole=True)

        if self.weights_of:
            self._check_weights(at, dict(config.drafts + config.variants).get(self.weights_of))

    def _check_weights(self, at: str, base: DraftOptions | None) -> None:
        """ConfigError unless they are those that training makes of this draft, too."""
        of = self.weights_of
        check(
            isinstance(base, type(self)) and not base.weights_of,
            f"{at}.weights_of={of!r} is no draft of kind {self.kind!r} that is trained",
        )
        for field in dataclasses.fields(self):
            mine, its = getattr(self, field.name), getattr(base, field.name)
            read = DRAFT in field.metadata.get("read_by", (DRAFT,))
            check(mine == its or not read,
                  f"{at}.{field.name}={mine!r}, but {of}, whose weights it uses, has {its!r}; "
                  f"leave it out")  # fmt: skip

    def check_run(self, at: str, config: "ExperimentConfig") -> None:
        train = config.train
        check_warm_up(f"{at}.steps", self.steps or train.steps, train)
        if (k := self.rollout(train)) and not self.every_start:
            own = f"{at}.k" if getattr(self, "k", 0) else "train.k"
            check(train.seq_len % k == 0, f"{own}={k} does not divide train.seq_len="
                                          f"{train.seq_len}")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TransformerOptions(TrainedOptions):
    """A draft with a transformer of its own. Sizes of 0: as the target."""

    n_layers: int = 2
    d_model: int = 0
    n_kv_heads: int = 0
    q_per_kv: int = 0
    d_head: int = 0
    d_ff: int = 0
    window: int = 64  # 0 = dense cache
    sink: int = 1
    init: str = "pruned"  # "pruned": the target's last n_layers blocks; "random"
    share_embedding: bool = False  # the frozen target's own: neither trained nor stored
    head_tokens: int = 0  # unembed these many most frequent tokens alone; 0 = all

    @property
    def shared(self) -> tuple[str, ...]:
        return ("embedding",) if self.share_embedding else ()

    def initial(self, target: "Params", fresh: "Params") -> "Params":
        return fresh if self.init == "random" else below("drafting.pruning").prune(target, fresh)

    def model(self, target: "ModelConfig") -> "ModelConfig":
        """A trimmed head is a matrix of its own, whether or not the target's is tied."""
        sizes = ("d_model", "n_kv_heads", "q_per_kv", "d_head", "d_ff")
        return dataclasses.replace(
            target,
            n_layers=self.n_layers,
            tied=target.tied and not self.head_tokens,
            head_tokens=self.head_tokens,
            **{s: getattr(self, s) or getattr(target, s) for s in sizes},
        )

    def kept(self) -> tuple[int, int]:
        return self.window, self.sink if self.window else 0

    def check(self, at: str, config: "ExperimentConfig") -> None:
        super().check(at, config)
        target, model = config.target, self.model(config.target)
        choice(f"{at}.init", self.init, "pruned random")
        positive(self, at, "n_layers")
        not_negative(self, at, "d_model n_kv_heads q_per_kv d_head d_ff sink")
        below("config.schema").ModelConfig.check(model, at, config)  # a family's own is a target's
        check(self.window >= 0, f"{at}.window={self.window} is under 1; the window counts the "
                                f"query itself (0 = dense)")  # fmt: skip
        check(0 <= self.head_tokens < target.n_tokens,
              f"{at}.head_tokens={self.head_tokens} must lie between 1 and the target's "
              f"{target.n_tokens} tokens, or be 0 (all of them)")  # fmt: skip
        check(not self.head_tokens or self.loss not in ("hard", "dspark"),
              f"{at}: a head of {self.head_tokens} tokens cannot learn the hard target, which may "
              f"be any token; use loss='mixed' or 'distillation'")  # fmt: skip
        check(not self.share_embedding or model.d_model == target.d_model,
              f"{at}.share_embedding: the draft's d_model={model.d_model} is not the target's "
              f"{target.d_model}")  # fmt: skip
        if self.init == "pruned":
            sizes = "d_model n_kv_heads q_per_kv d_head d_ff"
            self.check_against(target, at, sizes, "is pruned from it")

    def check_run(self, at: str, config: "ExperimentConfig") -> None:
        super().check_run(at, config)
        shortest = min(config.eval.context_lengths)
        check(not self.window or self.sink <= shortest,
              f"{at}.sink={self.sink} is longer than the shortest context "
              f"(eval.context_lengths: {shortest})")  # fmt: skip

    def check_against(self, target: "ModelConfig", at: str, sizes: str, why: str) -> None:
        """ConfigError where it is deeper than the target, or has other `sizes` (words)."""
        check(self.n_layers <= target.n_layers,
              f"{at}.n_layers={self.n_layers} is deeper than the target "
              f"({target.n_layers}), but the draft {why}")  # fmt: skip
        model = self.model(target)
        for size in sizes.split():
            mine, its = getattr(model, size), getattr(target, size)
            check(mine == its,
                  f"{at}.{size}={mine} differs from target.{size}={its}, but the draft {why}; "
                  f"use 0 (as the target)")  # fmt: skip


@functools.lru_cache(64)
def _kept_views(draft: DraftOptions, target: "ModelConfig") -> tuple["View", ...]:
    sizes = draft.model(target)
    deep = dataclasses.replace(sizes, n_layers=max(target.n_layers, sizes.n_layers))
    views = deep.views()[deep.n_layers - sizes.n_layers :]
    return tuple(view.keeping(*draft.kept()) for view in views)


def check_warm_up(key: str, steps: int, train: "TrainConfig") -> None:
    """ConfigError where the warm-up takes all of the steps."""
    check(round(train.warmup_fraction * steps) < steps,
          f"{key}={steps} are all taken by the warm-up (train.warmup_fraction="
          f"{train.warmup_fraction}); lower that, or train longer")  # fmt: skip


def over_layers(
    views: Sequence["View"], windowed: Callable[["View"], float], dense: float
) -> float:
    """The mean over layers of what a layer with a window counts for, and one without."""
    counts = collections.Counter(views)
    return sum(n * (windowed(v) if v.window else dense) for v, n in counts.items()) / len(views)

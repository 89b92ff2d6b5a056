"""How deep to draft: from past rounds' acceptance and seconds, the depth that emits fastest.

A round's depth may depend on all that was emitted before it, and on the clock: given that, its
output follows the target whatever the depth is, so that any policy is lossless (a policy that
looked at the round's own drafts would not be). The price is reproducibility: clocks differ from
run to run, and with them the depths and the draws.
"""

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

MEMORY = 200  # rounds after which what was seen has lost most of its weight
OPTIMISM = 0.9  # acceptance at the first depth before any round
WEIGHT = 4.0  # observations that an estimate's starting point is worth
SAMPLES = 9  # recent times per depth: the least counts, since what disturbs a round lengthens it
SETTLED = 3  # times before a depth counts as timed


class DepthController:
    """Chooses among `depths`; one depth is always chosen.

    Acceptance at depth j, given that j - 1 tokens were accepted, is estimated over all rows, with
    weights that fade over `MEMORY` rounds; what is rarely seen is drawn towards the depth before
    it, so that depths beyond those in use follow what is seen. Seconds per round are the least of
    recent measurements; a depth that was not timed enough for `MEMORY` rounds gets a time from a
    line through the others'. With one other it gets the best that can be: no more time for a deeper
    round, time in proportion to its tokens for a shallower one. So the deepest is tried first,
    then the shallowest, and what is left behind comes up again about once in `MEMORY` rounds.
    """

    def __init__(self, depths: Sequence[int]):
        self.depths = tuple(sorted(set(depths)))
        deepest = self.depths[-1]
        self.tried, self.passed = np.zeros(deepest), np.zeros(deepest)
        self.rounds = 0
        self._times: dict[int, collections.deque[float]] = {}
        self._timed: dict[int, int] = {}  # depth -> round in which it was last timed

    def accepted(self, k: int, counts: Int[np.ndarray, " _"]) -> None:
        """Take in one round of depth k: the accepted drafts of each row in it."""
        fade = 1 - 1 / MEMORY
        self.rounds += 1
        self.tried *= fade
        self.passed *= fade
        for j in range(k):
            self.tried[j] += np.count_nonzero(counts >= j)
            self.passed[j] += np.count_nonzero(counts > j)

    def took(self, k: int, seconds: float) -> None:
        """Take in the time of a round of depth k."""
        if self._stale(k):
            self._times[k] = collections.deque(maxlen=SAMPLES)
        self._times[k].append(seconds)
        self._timed[k] = self.rounds

    def choose(self) -> int:
        """The depth of the next round: most expected tokens per second."""
        if len(self.depths) == 1:
            return self.depths[0]
        emitted = np.concatenate([[1.0], 1 + np.cumsum(np.cumprod(self.acceptance()))])
        return max(self.depths, key=lambda k: emitted[k] / self.seconds(k))

    def acceptance(self) -> Float[np.ndarray, " k"]:
        """The estimate at each depth, given that those before it were accepted."""
        estimate, found = OPTIMISM, np.empty_like(self.tried)
        for j, (tried, passed) in enumerate(zip(self.tried, self.passed, strict=True)):
            estimate = found[j] = (WEIGHT * estimate + passed) / (WEIGHT + tried)
        return found

    def seconds(self, k: int) -> float:
        """Estimated seconds of a round of depth k; 1 for all before any was timed."""
        known = {
            depth: min(times)
            for depth, times in self._times.items()
            if len(times) >= SETTLED and not self._stale(depth)
        }
        if k in known or not known:
            return known.get(k, 1.0)
        if len(known) == 1:
            [(depth, seconds)] = known.items()
            return seconds * min((k + 1) / (depth + 1), 1.0)
        slope, at_0 = np.polyfit([*known], [*known.values()], 1)
        # Noise may tilt the line: a guess stays in the range of what was seen.
        return max(at_0 + max(slope, 0.0) * k, min(known.values()) / 2)

    def _stale(self, k: int) -> bool:
        return k not in self._timed or self.rounds - self._timed[k] > MEMORY

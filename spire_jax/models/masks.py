"""Who may attend to whom: the library's one definition of visibility, from positions."""

import dataclasses

import numpy as np

# Position of a cache slot that holds nothing: after every query, so never visible.
EMPTY = np.int32(2**30)


def may_attend(q_pos, k_pos, window: int = 0, sink: int = 0):
    """Whether a query at `q_pos` may attend to a key at `k_pos` (method.md 3.1).

    True where ``k_pos <= q_pos`` and, given a window, ``k_pos < sink`` or
    ``q_pos - k_pos < window``: the window counts the query itself; ``window=0`` means none.

    Args:
        q_pos, k_pos: integer arrays (NumPy or JAX) that broadcast against each other.
    """
    visible = k_pos <= q_pos
    if window:
        visible &= (k_pos < sink) | (q_pos - k_pos < window)
    return visible


@dataclasses.dataclass(frozen=True)
class View:
    """What a layer's queries see, and how their logits are formed.

    One that sees by another rule is a subclass with its own `sees`, which XLA computes.
    """

    window: int = 0  # visible keys, the query included; 0 = all earlier ones
    sink: int = 0  # first positions that stay visible beyond the window
    scale: float = 1.0  # multiplies the logits
    softcap: float = 0.0  # then they become softcap * tanh(logits / softcap); 0 = as they are

    def sees(self, q_pos, k_pos):
        """`may_attend` under this view's window and sinks."""
        return may_attend(q_pos, k_pos, self.window, self.sink)

    @property
    def windowed(self) -> bool:
        """Whether it sees by `may_attend`, not by a subclass's rule."""
        return type(self).sees is View.sees

    def keeping(self, window: int, sink: int) -> "View":
        """The view over a cache that keeps `sink` first positions and a window (0 = everything).

        What this view never sees it does not see there either.
        """
        if not window:
            return self
        if self.window and self.window < window:
            window = self.window
        # Beyond its own window a model sees its own sinks alone.
        sink = min(sink, self.sink) if self.window else sink
        return dataclasses.replace(self, window=window, sink=sink)

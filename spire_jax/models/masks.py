"""Who may attend to whom: the library's one definition of visibility, from positions."""

import numpy as np

# Stored position of a cache slot that holds nothing: after every query, so never visible.
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

"""How many of its drafted tokens a row has verified, from what the draft says they will survive.

A round's depth may depend on what its own drafts are, as long as it is settled step by step: that
token j is verified must follow from what was known before j was drawn. Then what is verified is a
draft as any other, only of a length that its own beginning decides, and the output follows the
target (token by token by the usual argument at each step; for a block, since what is kept of it is
decided from its end backwards, whatever that end is). A rule that looks at token j itself, or at
what was drawn or estimated after it, throws away tokens that it would rather not see judged: with
q = (0.5, 0.5) and p = (0.7, 0.3), one that verifies token 0 alone emits (0.85, 0.15).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def chosen(
    survival: Float[Array, "B k"], prices: tuple[float, ...], least: int = 0
) -> Int[Array, " B"]:
    """Each row's depth: where expected tokens per cost fall for the first time, at least `least`.

    A round that verifies j tokens emits 1 + S_1 + .. + S_j in expectation and costs price_j. Where
    prices are convex in j, as those of a roofline are, the quotient rises and then falls (the sum
    is concave), so that its first fall is after its highest value: not to look further costs
    nothing. The step from j - 1 to j looks at S_1 to S_j alone.

    Args:
        survival: estimates that tokens 1 .. j are all kept, by j (`Proposal.survival`).
        prices: of a round that verifies 0 .. k tokens, in any unit.
    """
    emitted = jnp.pad(1 + jnp.cumsum(survival, axis=1), ((0, 0), (1, 0)), constant_values=1.0)
    worth = emitted / np.asarray(prices, np.float32)
    on = (worth[:, 1:] >= worth[:, :-1]) | (jnp.arange(survival.shape[1]) < least)
    return jnp.sum(jnp.cumprod(on.astype(jnp.int32), axis=1), axis=1)

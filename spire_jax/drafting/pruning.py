"""Pruned initialization: a draft that starts as the last blocks of its target (method.md 3.2)."""

import jax
import jax.numpy as jnp

from spire_jax.models.transformer import Params


def prune(target: Params, draft: Params) -> Params:
    """`draft` with the target's embedding, last n blocks, final norm and unembedding copied in.

    What the target does not have (memory weights) stays as it is in `draft`, and what `draft`
    does not have (a shared embedding) is left out. A trimmed head takes the columns of its
    `head_ids`. Copies, in the draft's own types (a frozen target may be held in narrower ones), so
    that the draft's arrays can be donated while the target lives on.
    """
    n_target, n_draft = len(target["blocks"]), len(draft["blocks"])
    if n_draft > n_target:
        raise ValueError(f"a draft of {n_draft} blocks cannot be pruned from {n_target}")
    pruned = {name: _copy(target[name]) if name in target else value
              for name, value in draft.items() if name != "blocks"}  # fmt: skip
    if "head_ids" in draft:
        whole = target["unembedding"] if "unembedding" in target else target["embedding"].T
        pruned["unembedding"] = whole[:, draft["head_ids"]]
    pruned["blocks"] = {i: _copy(target["blocks"][n_target - n_draft + i]) for i in range(n_draft)}
    return jax.tree.map(lambda new, old: new.astype(old.dtype), pruned, draft)


def _copy(tree):
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, dict) else jnp.copy(tree)

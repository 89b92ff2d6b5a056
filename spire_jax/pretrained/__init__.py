"""Pretrained checkpoints of other projects: their tensors, tokenizers and chat templates."""


class PretrainedError(ValueError):
    """A pretrained file that cannot be used; the message names the file and the remedy."""

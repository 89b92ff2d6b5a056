"""SmolLM2-135M-Instruct from its GGUF file: logits, tokens and text as transformers has them."""

import inspect
import pydoc_data.topics
import textwrap

import numpy as np
import pytest
import torch
import transformers

from spire_jax.pretrained.checkpoint import open_checkpoint
from spire_jax.pretrained.tokenizer import load_tokenizer
from tests.parity.compare import (
    TOLERANCE,
    greedy_agreement,
    loaded,
    our_logits,
    relative_error,
    their_logits,
)


@pytest.fixture(scope="module")
def theirs(smollm2):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="module")
def ours(smollm2):
    checkpoint = open_checkpoint(smollm2)
    return *loaded(checkpoint), load_tokenizer(smollm2, checkpoint.model.n_tokens)


def test_logits_over_english_and_code(theirs, ours, figure):
    model, params, tokenizer = ours
    english = tokenizer.encode(textwrap.dedent(pydoc_data.topics.topics["objects"]))[:256]
    code = tokenizer.encode(inspect.getsource(textwrap))[:256]
    tokens = np.concatenate([english, code])
    assert len(tokens) == 512
    expected = their_logits(theirs, tokens)
    logits = our_logits(model, params, tokens)
    error = relative_error(logits, expected)
    shifted = logits[:-1] - logits[:-1].max(-1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(511), tokens[1:]]
    figure("SmolLM2: logits, 256 tokens of English and 256 of code", f"{error:.1e} relative")
    figure("SmolLM2: loss per token on these", f"{loss.mean():.2f} nats")
    assert error <= TOLERANCE
    assert loss.mean() < 4, "it does not predict the text"


@pytest.mark.parametrize("question", ["What is the capital of Peru?", "Write a haiku about rain."])
def test_greedy_answers(theirs, ours, figure, question):
    model, params, tokenizer = ours
    prompt = tokenizer.chat([{"role": "user", "content": question}])
    agreement = greedy_agreement(model, params, theirs, prompt, 64)
    figure(f"SmolLM2: greedy, {question!r}", agreement)

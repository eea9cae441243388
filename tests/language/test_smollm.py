"""SmolLM2-135M-Instruct from a GGUF file, where CL_ZOO_SMOLLM names it: real weights make sense of real text."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo.language import generate, left_padded, load_pretrained
from cl_zoo.losses import next_token_loss

TEXT = (
    "The sun rises in the east and sets in the west. Every morning people get up, wash, eat breakfast and go to work."
    " Children go to school, where they learn to read, to write and to count. In the evening the family sits together"
    " at the table, and they tell each other about the day. Then they go to bed and sleep until the next morning."
)


@pytest.fixture(scope="module")
def loaded() -> Any:
    path = os.environ.get("CL_ZOO_SMOLLM")
    if not path:
        pytest.skip("CL_ZOO_SMOLLM is not set: it names the .gguf file of SmolLM2-135M-Instruct")
    found = load_pretrained(path)
    return found._replace(params=jax.tree.map(jnp.asarray, found.params))


def perplexity(loaded: Any, tokens: np.ndarray) -> float:
    logits, _, _ = jax.jit(lambda p, x: loaded.decoder.model.apply(p, {}, x))(loaded.params, tokens[None, :-1])
    return float(jnp.exp(next_token_loss(logits, jnp.asarray(tokens[None, 1:]))[0]))


def test_it_tells_english_from_shuffled_words(loaded: Any) -> None:
    words = TEXT.split(" ")
    np.random.default_rng(0).shuffle(words)
    plain, shuffled = (perplexity(loaded, np.array(loaded.tokenizer.encode(text))) for text in (TEXT, " ".join(words)))
    assert plain < 15
    assert shuffled > 30 * plain


def test_what_it_says(loaded: Any) -> None:
    chat = loaded.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    rows = [loaded.tokenizer.encode(text) for text in ("The capital of France is", chat)]
    tokens, padding = left_padded(rows)
    options = {"length": 12, "padding": padding, "temperature": 0, "stop": loaded.tokenizer.stop}
    found = generate(loaded.decoder, loaded.params, tokens, jax.random.key(0), **options)
    said = [loaded.tokenizer.decode(row[mask > 0]) for row, mask in zip(np.asarray(found.tokens), found.mask)]
    assert said[0].startswith(" Paris")
    assert said[1] == "The capital of France is Paris."

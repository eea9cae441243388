"""Decoders that answer questions, with or without a demonstration in context."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from cl_zoo.checks import checked
from cl_zoo.language._decoder import Decoder, check_decoder
from cl_zoo.types import Array, Key, Model, PyTree

__all__ = ["Demonstrated", "answer_logits", "answering"]


class Demonstrated(NamedTuple):
    """`Batch.x` where each example is a question and, for a teacher, the same question after a demonstration.
    `Batch.y` then holds the answer's tokens `i32[B, N]`, -1 after its end.

    Attributes:
      prompt: `i32[B, P]`, the question; shorter ones have zeros on the left.
      padding: `i32[B]`, how many zeros; None where all have P tokens.
      shown, shown_padding: the demonstration and the question, `i32[B, Q]`, and its zeros.
      answer: `i32[B, N]`, the answer, 0 after its end.
    """

    prompt: Array
    padding: Array | None
    shown: Array
    shown_padding: Array | None
    answer: Array


def check_demonstrated(owner: str, x: PyTree, shown: bool) -> None:
    """Refuses what is not `Demonstrated`, or, where it will be shown, has no demonstration."""
    if not isinstance(x, Demonstrated):
        raise ValueError(f"{owner}: x is {type(x).__name__}, but it must be Demonstrated, as in `skills`")
    if shown and x.shown is None:
        raise ValueError(f"{owner}: x.shown is None, but it must be tokens [B, Q]")


def answer_logits(decoder: Decoder, params: PyTree, prompt: Array, padding: Array | None, answer: Array) -> Array:
    """Logits of every token of an answer, from the prompt and the tokens before it.

    Sequences are rolled to the left by their padding, so that it comes after all that matters.

    Args:
      decoder, params: the network.
      prompt: `i32[B, P]`.
      padding: `i32[B]` or None.
      answer: `i32[B, N]`.

    Returns:
      `[B, N, V]`; entry t is that for `answer[:, t]`.
    """
    time, n = prompt.shape[1], answer.shape[1]
    rows = jnp.concatenate([prompt, answer[:, :-1]], axis=1)
    places = time - 1 + jnp.arange(n)
    if padding is None:
        return decoder.logits(params, decoder.hidden(params, rows)[:, places])
    turned = (jnp.arange(rows.shape[1]) + padding[:, None]) % rows.shape[1]
    h = decoder.hidden(params, jnp.take_along_axis(rows, turned, axis=1))
    h = jnp.take_along_axis(h, (places - padding[:, None])[..., None], axis=1)
    return decoder.logits(params, h)


@checked
def answering(decoder: Decoder, *, shown: bool = False) -> Model:
    """A decoder as a network from questions to answers.

        outputs_t = logits(y_t | prompt, y_<t)

    Args:
      decoder: the network.
      shown: whether the demonstration is read before the question: learning in context, without any update.

    Returns:
      A `Model` from `Demonstrated` to `[B, N, V]`, with the decoder's parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo.language import Demonstrated, answering, decoder
      >>> from cl_zoo.layers import softmax_attention
      >>> model = answering(decoder(32, [(softmax_attention(16, 2), 32, 1)]))
      >>> ones = jnp.ones((2, 5), jnp.int32)
      >>> x = Demonstrated(ones, jnp.array([0, 3]), ones, None, ones[:, :3])
      >>> params, model_state = model.init(jax.random.key(0), x)
      >>> model.apply(params, model_state, x)[0].shape
      (2, 3, 32)
    """
    check_decoder("answering", decoder)

    def init(key: Key, x: PyTree, weights: PyTree = None) -> tuple[PyTree, PyTree]:
        check_demonstrated("answering", x, shown)
        return decoder.model.bind(weights).init(key, x.prompt)

    def apply(
        params: PyTree, model_state: PyTree, x: PyTree, **options: Any
    ) -> tuple[PyTree, PyTree, dict[str, tuple[Array, Array]]]:
        check_demonstrated("answering", x, shown)
        prompt = (x.shown, x.shown_padding) if shown else (x.prompt, x.padding)
        return answer_logits(decoder, params, *prompt, x.answer), model_state, {}

    return Model(init, apply, decoder=decoder, takes_weights=True)

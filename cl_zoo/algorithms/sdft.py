"""Self-distillation: the network teaches itself what it can do with a demonstration before its eyes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import check_choice, check_range, check_whole
from cl_zoo.estimators.averaging import interpolate
from cl_zoo.language._decoder import Decoder, check_decoder
from cl_zoo.language._generate import check_stop, generate
from cl_zoo.language.answers import Demonstrated, answer_logits, check_demonstrated
from cl_zoo.losses import divergence, token_losses, weighted_mean
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, Record, TrainState

__all__ = ["SdftState", "context_distillation", "offline_distillation", "sdft"]


class SdftState(NamedTuple):
    """Attributes:
    teacher: its trained parameters (of adapters: the adapters alone); {} where the student itself teaches.
    """

    teacher: PyTree


def sdft(
    decoder: Decoder,
    *,
    length: int,
    direction: str = "forward",
    teacher: str = "ema",
    rate: Array | float = 0.01,
    skip: int = 3,
    temperature: float = 1.0,
    stop: Sequence[int] = (),
    name: str = "sdft",
) -> Component:
    """On-policy self-distillation fine-tuning: the student answers, the teacher, who has seen a demonstration, grades.

        y ~ p(. | prompt; theta)
        L = mean over b of mean over t >= skip of D( p(. | prompt, y_<t; theta),  p(. | shown, y_<t; phi) )
        phi <- phi + rate (theta - phi)     after every update;   phi_0 = theta_0

    with D over the whole vocabulary at every token of the student's own answer. No gradient goes through the draws of y
    nor through the teacher. Both read the same tokens of y, after different prompts.

    Args:
      decoder: the net that the model is made of: `answering(decoder)`, or adapters around it.
      length: tokens of an answer at most.
      direction: "forward", KL(teacher || student), with which the paper's results were made; "reverse", which its text
        says; or "jsd"; see `divergence`.
      teacher: "ema"; "frozen", phi_0 for ever; or "live", theta itself.
      rate: in [0, 1], of the moving average; 0 is "frozen", 1 is "live".
      skip: tokens at the beginning of an answer that are not learned from: they often speak of the demonstration.
      temperature: of the draws; 0 is greedy.
      stop: tokens that end an answer.
      name: key in state and metrics.

    Returns:
      A component with an `SdftState`, which learns from rows `Demonstrated` and no labels; metric `sdft/tokens`, the
      mean length of answers.

    Raises:
      ValueError: a number outside its range, an unknown word, no decoder; at the first trace, rows that
        are not `Demonstrated`.

    Source: Shenfeld et al. 2026, arXiv 2601.19897.

    Differences from the paper or its code: the gradient is that of the divergence itself, where the equation printed in
    the first version leaves out a factor, as their code does too. No importance weights, which they need because
    another program draws their answers. A row whose answer ends within `skip` tokens teaches nothing. The moving
    average goes on over the borders of tasks; the paper does not say what becomes of its teacher there.

    Example:
      >>> import optax
      >>> from cl_zoo.language import answering, decoder
      >>> from cl_zoo import compose, sdft
      >>> from cl_zoo.layers import softmax_attention
      >>> net = decoder(32, [softmax_attention(16, 2)], layers=1, hidden=32)
      >>> learner = compose(answering(net), optax.adam(1e-3), sdft(net, length=4, skip=0))
    """
    learn = _by_divergence(name, direction)
    return _distillation(decoder, "student", learn, length, teacher, rate, skip, temperature, stop, name)


def context_distillation(
    decoder: Decoder,
    *,
    length: int,
    direction: str = "forward",
    temperature: float = 1.0,
    stop: Sequence[int] = (),
    name: str = "context_distillation",
) -> Component:
    """What the network says after a demonstration, it learns to say without: off-policy distillation of the context.

        y ~ p(. | shown; theta_0);   L = mean over b, t of D( p(. | prompt, y_<t; theta),  p(. | shown, y_<t; theta_0) )

    Args:
      decoder, length, direction, temperature, stop, name: see `sdft`.

    Returns:
      A component with an `SdftState`; metric `context_distillation/tokens`.

    Raises:
      ValueError: as `sdft`.

    Source: Snell et al. 2022, arXiv 2209.15189; Askell et al. 2021, arXiv 2112.00861.

    Differences from the paper or its code: answers are drawn anew for every batch, not once into a data set; the
    divergence is over the whole vocabulary, where Askell et al. keep the 50 likeliest tokens.

    Example:
      >>> import optax
      >>> from cl_zoo.language import answering, decoder
      >>> from cl_zoo import compose, context_distillation
      >>> from cl_zoo.layers import softmax_attention
      >>> net = decoder(32, [softmax_attention(16, 2)], layers=1, hidden=32)
      >>> learner = compose(answering(net), optax.adam(1e-3), context_distillation(net, length=4))
    """
    learn = _by_divergence(name, direction)
    return _distillation(decoder, "teacher", learn, length, "frozen", 0.0, 0, temperature, stop, name)


def offline_distillation(
    decoder: Decoder,
    *,
    length: int,
    temperature: float = 1.0,
    stop: Sequence[int] = (),
    name: str = "offline_distillation",
) -> Component:
    """Fine-tuning on answers that the network gave itself with a demonstration before its eyes.

        y ~ p(. | shown; theta_0);   L = mean over b, t of - log p(y_t | prompt, y_<t; theta)

    Args:
      decoder, length, temperature, stop, name: see `sdft`.

    Returns:
      A component with an `SdftState`; metric `offline_distillation/tokens`.

    Raises:
      ValueError: as `sdft`.

    Source: Kim and Rush 2016 (sequence-level distillation), arXiv 1606.07947; as a baseline of self-distillation:
    Shenfeld et al. 2026, arXiv 2601.19897; Yang et al. 2024, arXiv 2402.13669.

    Differences from the paper or its code: answers are drawn anew for every batch, not once into a data set.

    Example:
      >>> import optax
      >>> from cl_zoo.language import answering, decoder
      >>> from cl_zoo import compose, offline_distillation
      >>> from cl_zoo.layers import softmax_attention
      >>> net = decoder(32, [softmax_attention(16, 2)], layers=1, hidden=32)
      >>> learner = compose(answering(net), optax.adam(1e-3), offline_distillation(net, length=4))
    """

    def learn(student: Array, teacher: Array, y: Array) -> Array:
        return token_losses(student, y)

    return _distillation(decoder, "teacher", learn, length, "frozen", 0.0, 0, temperature, stop, name)


def _by_divergence(name: str, direction: str) -> Callable[[Array, Array, Array], Array]:
    check_choice(name, "direction", direction, ("forward", "reverse", "jsd"))
    return lambda student, teacher, y: divergence(student, teacher, direction)


def _distillation(
    decoder: Decoder,
    answers: str,
    learn: Callable[[Array, Array, Array], Array],
    length: int,
    teacher: str,
    rate: Array | float,
    skip: int,
    temperature: float,
    stop: Sequence[int],
    name: str,
) -> Component:
    """Distillation on drawn answers: `learn(student, teacher [B, N, V], y [B, N]) -> [B, N]` is each token's loss, and
    `answers` says who draws them."""
    check_decoder(name, decoder)
    check_stop(name, stop)
    check_whole(name, "length", length, 1)
    check_choice(name, "teacher", teacher, ("ema", "frozen", "live"))
    check_range(name, "rate", rate, 0, 1)
    check_whole(name, "skip", skip, 0, length - 1)
    check_range(name, "temperature", temperature, 0)

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> SdftState:
        check_demonstrated(name, batch.x, shown=True)
        return SdftState({} if teacher == "live" else state.params)

    def loss(
        context: Context,
        state: TrainState,
        part: SdftState,
        params: PyTree,
        forward: Callable[[], PyTree],
        batch: Batch,
        key: Key,
    ) -> tuple[Array, dict[str, PyTree]]:
        def whole(params: PyTree) -> PyTree:
            """The decoder's own parameters."""
            make = context.model.parameters
            return params if make is None else make(params, state.model_state)

        x: Demonstrated = batch.x
        theta, phi = whole(state.params), whole(state.params if teacher == "live" else part.teacher)
        asked, shown = (x.prompt, x.padding), (x.shown, x.shown_padding)
        who, (prompt, padding) = (theta, asked) if answers == "student" else (phi, shown)
        said = generate(decoder, who, prompt, key, length=length, padding=padding, temperature=temperature, stop=stop)
        students = answer_logits(decoder, whole(params), *asked, said.tokens)
        teachers = jax.lax.stop_gradient(answer_logits(decoder, phi, *shown, said.tokens))
        counts = said.mask * (jnp.arange(length) >= skip)
        each = learn(students, teachers, said.tokens)
        rows = jnp.sum(each * counts, axis=1) / jnp.maximum(jnp.sum(counts, axis=1), 1)
        tokens = weighted_mean(jnp.sum(said.mask, axis=1), batch.weight)
        return weighted_mean(rows, batch.weight), {"tokens": tokens}

    def observe(
        context: Context, state: TrainState, part: SdftState, record: Record, key: Key
    ) -> tuple[TrainState, SdftState]:
        if teacher != "ema":
            return state, part
        learnt = jnp.any(record.batch.weight > 0)
        moved = interpolate(state.params, part.teacher, 1 - rate)
        return state, SdftState(jax.tree.map(lambda a, b: jnp.where(learnt, a, b), moved, part.teacher))

    return Component(name, init=init, loss=loss, observe=observe)

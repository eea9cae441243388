"""Self-distillation: the network's teacher is the same model conditioned on a demonstration in context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, Fraction, Range, Whole, check_whole, checked
from cl_zoo.entries import Entry
from cl_zoo.estimators.averaging import as_in, wide
from cl_zoo.estimators.teacher import moved_teacher
from cl_zoo.language._generate import check_stop, generate
from cl_zoo.language.answers import Demonstrated, answer_logits, check_demonstrated
from cl_zoo.losses import divergence, token_losses, weighted_mean
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, Record, TrainState

__all__ = ["ENTRY", "SdftState", "context_distillation", "offline_distillation", "sdft"]


class SdftState(NamedTuple):
    """Attributes:
    teacher: its trained parameters (of adapters: the adapters alone); {} where the student itself teaches.
    """

    teacher: PyTree


@checked
def sdft(
    *,
    length: Count,
    direction: Literal["forward", "reverse", "jsd"] = "forward",
    teacher: Literal["ema", "frozen", "live"] = "ema",
    decay: Fraction = 0.99,
    skip: Whole = 3,
    temperature: Annotated[float, Range(0)] = 1.0,
    stop: Sequence[int] = (),
    name: str = "sdft",
) -> Component:
    """On-policy self-distillation fine-tuning: the student answers; its teacher has a demonstration in context.

        y ~ p(. | prompt; theta)
        L = mean over b of mean over t >= skip of D( p(. | prompt, y_<t; theta),  p(. | shown, y_<t; phi) )
        phi <- decay phi + (1 - decay) theta     after every update;   phi_0 = theta_0

    with D over the whole vocabulary at every token of the student's own answer. No gradient goes through the draws of y
    nor through the teacher. Both read the same tokens of y, after different prompts.

    Args:
      length: tokens of an answer at most.
      direction: "forward", KL(teacher || student), with which the paper's results were made; "reverse", which its text
        states; or "jsd"; see `divergence`.
      teacher: "ema"; "frozen", phi_0 throughout; or "live", theta itself.
      decay: in [0, 1], of the moving average; 1 is "frozen", 0 is "live".
      skip: tokens at the beginning of an answer that are not learned from: they often refer to the demonstration.
      temperature: of the draws; 0 is greedy.
      stop: tokens that end an answer.
      name: key in state and metrics.

    Returns:
      A component with an `SdftState`, which learns from `Demonstrated` examples without labels; metric `sdft/tokens`,
      the mean length of answers.

    Raises:
      ValueError: a number outside its range, an unknown choice; at `init`, a model that is not made of a decoder by
        `answering`, or examples that are not `Demonstrated`.

    Source: Shenfeld et al. 2026, arXiv 2601.19897.

    Differences from the paper or its code: the gradient is that of the divergence itself, where the equation printed in
    the first version leaves out a factor, as their code does too. No importance weights, which they need because
    another program draws their answers. An example whose answer ends within `skip` tokens contributes nothing. The
    moving average goes on across task boundaries; the paper does not state what becomes of its teacher there. TRL and
    the fork of the authors divide both logits by the temperature in the loss; here it is of the draws alone.

    Example:
      >>> import optax
      >>> from cl_zoo.language import answering, decoder
      >>> from cl_zoo import compose, sdft
      >>> from cl_zoo.layers import softmax_attention
      >>> net = decoder(32, [(softmax_attention(16, 2), 32, 1)])
      >>> learner = compose(answering(net), optax.adam(1e-3), sdft(length=4, skip=0))
    """
    learn = _by_divergence(direction)
    return _distillation("student", learn, length, teacher, decay, skip, temperature, stop, name)


@checked
def context_distillation(
    *,
    length: Count,
    direction: Literal["forward", "reverse", "jsd"] = "forward",
    temperature: Annotated[float, Range(0)] = 1.0,
    stop: Sequence[int] = (),
    name: str = "context_distillation",
) -> Component:
    """Off-policy distillation of the context: the network learns to answer as it does after a demonstration.

        y ~ p(. | shown; theta_0);   L = mean over b, t of D( p(. | prompt, y_<t; theta),  p(. | shown, y_<t; theta_0) )

    Args:
      length, direction, temperature, stop, name: see `sdft`.

    Returns:
      A component with an `SdftState`; metric `context_distillation/tokens`.

    Raises:
      ValueError: as `sdft`.

    Source: Snell et al. 2022, arXiv 2209.15189; Askell et al. 2021, arXiv 2112.00861.

    Differences from the paper or its code: answers are drawn again for every batch, not once into a data set; the
    divergence is over the whole vocabulary, where Askell et al. keep the 50 most likely tokens.

    Example:
      >>> import optax
      >>> from cl_zoo.language import answering, decoder
      >>> from cl_zoo import compose, context_distillation
      >>> from cl_zoo.layers import softmax_attention
      >>> net = decoder(32, [(softmax_attention(16, 2), 32, 1)])
      >>> learner = compose(answering(net), optax.adam(1e-3), context_distillation(length=4))
    """
    learn = _by_divergence(direction)
    return _distillation("teacher", learn, length, "frozen", 1.0, 0, temperature, stop, name)


@checked
def offline_distillation(
    *,
    length: Count,
    temperature: Annotated[float, Range(0)] = 1.0,
    stop: Sequence[int] = (),
    name: str = "offline_distillation",
) -> Component:
    """Fine-tuning on the network's own answers to questions with a demonstration in context.

        y ~ p(. | shown; theta_0);   L = mean over b, t of - log p(y_t | prompt, y_<t; theta)

    Args:
      length, temperature, stop, name: see `sdft`.

    Returns:
      A component with an `SdftState`; metric `offline_distillation/tokens`.

    Raises:
      ValueError: as `sdft`.

    Source: Kim and Rush 2016 (sequence-level distillation), arXiv 1606.07947; as a baseline of self-distillation:
    Shenfeld et al. 2026, arXiv 2601.19897; Yang et al. 2024, arXiv 2402.13669.

    Differences from the paper or its code: answers are drawn again for every batch, not once into a data set.

    Example:
      >>> import optax
      >>> from cl_zoo.language import answering, decoder
      >>> from cl_zoo import compose, offline_distillation
      >>> from cl_zoo.layers import softmax_attention
      >>> net = decoder(32, [(softmax_attention(16, 2), 32, 1)])
      >>> learner = compose(answering(net), optax.adam(1e-3), offline_distillation(length=4))
    """

    def learn(student: Array, teacher: Array, y: Array) -> Array:
        return token_losses(student, y)

    return _distillation("teacher", learn, length, "frozen", 1.0, 0, temperature, stop, name)


def _by_divergence(direction: Literal["forward", "reverse", "jsd"]) -> Callable[[Array, Array, Array], Array]:
    return lambda student, teacher, y: divergence(student, teacher, direction)


def _distillation(
    answers: str,
    learn: Callable[[Array, Array, Array], Array],
    length: int,
    teacher: Literal["ema", "frozen", "live"],
    decay: Array | float,
    skip: int,
    temperature: float,
    stop: Sequence[int],
    name: str,
) -> Component:
    """Distillation on drawn answers: `learn(student, teacher [B, N, V], y [B, N]) -> [B, N]` is each token's loss, and
    `answers` chooses who draws them."""
    check_stop(name, stop)
    check_whole(name, "skip", skip, 0, length - 1)

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> SdftState:
        if context.model.decoder is None:
            raise ValueError(f"{name}: the model is not made of a decoder, as answering(decoder(...)) is")
        check_demonstrated(name, batch.x, shown=True)
        return SdftState({} if teacher == "live" else wide(state.params) if teacher == "ema" else state.params)

    def loss(
        context: Context,
        state: TrainState,
        part: SdftState,
        params: PyTree,
        forward: Callable[[], PyTree],
        batch: Batch,
        key: Key,
    ) -> tuple[Array, dict[str, PyTree]]:
        x: Demonstrated = batch.x
        decoder, whole = context.model.decoder, context.model.inner_params
        shows = state.params if teacher == "live" else as_in(part.teacher, state.params)
        theta, phi = whole(state.params), whole(shows)
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
        return state, SdftState(moved_teacher(part.teacher, state.params, decay, record.batch))

    return Component(name, init=init, loss=loss, observe=observe)


ENTRY = (
    Entry(
        name="sdft",
        family="self-distillation",
        summary="what was known, by learning from its own answers with a teacher: the same model conditioned on a "
        "demonstration in context",
        factory=sdft,
        arguments={"length": 3, "stop": (3,), "skip": 0, "decay": 0.75},
        numbers=("decay",),
        scenarios=("skills",),
        papers=("shenfeld2026self",),
        results="sdft forward",
        own_loss=True,
    ),
    Entry(
        name="context_distillation",
        family="self-distillation",
        summary="little; the network learns the distribution of its own answers to a demonstration in context",
        factory=context_distillation,
        arguments={"length": 3, "stop": (3,)},
        scenarios=("skills",),
        papers=("snell2022learning",),
        results="context distillation",
        own_loss=True,
    ),
    Entry(
        name="offline_distillation",
        family="self-distillation",
        summary="little; the network is fine-tuned on its own answers to a demonstration in context",
        factory=offline_distillation,
        arguments={"length": 3, "stop": (3,)},
        scenarios=("skills",),
        papers=("kim2016sequence",),
        results="offline distillation",
        own_loss=True,
    ),
)

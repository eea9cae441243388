"""Experience replay with an asymmetric cross-entropy: incoming examples do not lower the logits of old classes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp

from cl_zoo.algorithms.replay import ReplayState, replay
from cl_zoo.checks import check_classes, checked
from cl_zoo.entries import Entry
from cl_zoo.losses import cross_entropy, mask_outputs, weighted_mean
from cl_zoo.types import Array, Aux, Batch, Component, Context, Forward, Key, PyTree, Record, TrainState

__all__ = ["ENTRY", "ErAceState", "er_ace"]


class ErAceState(NamedTuple):
    """Attributes:
    memory: of `replay`.
    seen: `bool[C]`, classes of all incoming examples so far.
    """

    memory: ReplayState
    seen: Array


@checked
def er_ace(
    capacity: int,
    *,
    batch_size: int = 10,
    incoming: Literal["present", "unseen"] = "present",
    replayed: Literal["seen", "all"] = "seen",
    memory: Literal["reservoir", "ring", "class_balanced"] = "reservoir",
    n_classes: int | None = None,
    name: str = "er_ace",
) -> Component:
    """Incoming examples compete among the classes of their own batch, replayed ones among all classes seen.

        L = mean over incoming b of CE(outputs_b restricted to P, y_b) + mean over replayed m of CE(outputs_m restricted
        to S, y_m),     P = {y_b of the incoming batch},  S = all classes seen, P among them

    Outputs outside of the set take no part in the softmax and get no gradient. So the logits of old classes, which the
    incoming batch does not contain, are not lowered by it.

    Args:
      capacity: examples in memory, at least 1.
      batch_size: examples replayed with each batch, at least 0; those that the memory cannot supply yet have weight 0.
      incoming: what P is: "present", as above; "unseen", also every class from the largest seen one up.
      replayed: what S is: "seen", as above; "all", every active output.
      memory, n_classes: see `replay`.
      name: key in state and metrics.

    Returns:
      A component with an `ErAceState`, in place of `supervised`; metrics `er_ace/incoming` and `er_ace/replayed`,
      the two terms.

    Raises:
      ValueError: as `replay`; an unknown choice.

    Source: Caccia et al. 2022, "New insights on reducing abrupt representation change in online continual learning",
    arXiv 2104.05025.

    Differences from the paper or its code: "present" and "seen" are the text's, "unseen" and "all" those of its code,
    which also leaves the first task's batches unmasked where tasks are given. The paper's logits are scaled cosines of
    features and class weights; here they are those of any network. Memories are drawn from without replacement. Where
    examples carry their task, classes of other tasks are masked as well.

    Example:
      >>> import optax
      >>> from cl_zoo import compose
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), er_ace(200))
    """
    rehearsal = replay(capacity, batch_size=batch_size, memory=memory, n_classes=n_classes, name=name)
    assert rehearsal.init and rehearsal.prepare and rehearsal.observe
    fill, draw, keep = rehearsal.init, rehearsal.prepare, rehearsal.observe

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> ErAceState:
        check_classes(name, batch.y, "it masks classes")
        return ErAceState(fill(context, state, batch, key), jnp.zeros(context.n_outputs(state, batch), bool))

    def prepare(
        context: Context, state: TrainState, part: ErAceState, batch: Batch, key: Key
    ) -> tuple[Batch, ErAceState]:
        return draw(context, state, part.memory, batch, key)[0], part

    def present(y: Array, weight: Array, n: int) -> Array:
        """`bool[C]`, the classes of examples that count."""
        return jnp.zeros(n, bool).at[y].max(weight > 0)

    def loss(
        context: Context, state: TrainState, part: ErAceState, params: PyTree, forward: Forward, batch: Batch, key: Key
    ) -> tuple[Array, Aux]:
        outputs = forward()
        old = jnp.zeros(batch.weight.shape, bool) if batch.replayed is None else batch.replayed
        weights = {"incoming": jnp.where(old, 0, batch.weight), "replayed": jnp.where(old, batch.weight, 0)}
        now = present(batch.y, weights["incoming"], part.seen.size)
        seen, classes = part.seen | now, jnp.arange(part.seen.size)
        largest = jnp.max(jnp.where(seen, classes, -1))
        sets = {
            "incoming": now | (classes >= largest) if incoming == "unseen" else now,
            "replayed": seen if replayed == "seen" else jnp.ones_like(seen),
        }
        open_now = context.active(state.task, batch.task)
        terms = {
            term: weighted_mean(
                cross_entropy(
                    mask_outputs(outputs, classes_of if open_now is None else classes_of & open_now), batch.y
                ),
                weights[term],
            )
            for term, classes_of in sets.items()
        }
        return sum(terms.values(), jnp.zeros(())), terms

    def observe(
        context: Context, state: TrainState, part: ErAceState, record: Record, key: Key
    ) -> tuple[TrainState, ErAceState]:
        state, kept = keep(context, state, part.memory, record, key)
        seen = part.seen | present(record.batch.y, record.batch.weight, part.seen.size)
        return state, ErAceState(kept, seen)

    return Component(name, rehearsal.needs, init=init, prepare=prepare, loss=loss, observe=observe)


ENTRY = Entry(
    name="er_ace",
    family="replay",
    summary="a replay memory; incoming examples compete among the classes of their own batch alone",
    factory=er_ace,
    arguments={"capacity": 20, "batch_size": 8},
    papers=("caccia2022new",),
    own_loss=True,
)

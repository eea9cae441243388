"""Online-aware meta-learning: a representation on which learning example by example does not interfere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import optax

from cl_zoo.algorithms.maml import maml
from cl_zoo.checks import checked
from cl_zoo.entries import Entry, Null
from cl_zoo.losses import cross_entropy
from cl_zoo.types import Array, Component, PyTree

__all__ = ["ENTRY", "oml"]


@checked
def oml(
    inner_rate: Array | float,
    loss: Callable[[PyTree, PyTree], Array] = cross_entropy,
    *,
    prediction: Sequence[str] = ("output",),
    order: Literal[1, 2] = 2,
    name: str = "oml",
) -> Component:
    """The prediction part W learns example by example along a trajectory; the representation it reads is meta-learned.

        W_0 = W;   W_{j+1} = W_j - inner_rate * grad_W loss(f(x_j; theta, W_j), y_j),   j = 0 ... K - 1
        L(theta, W) = mean over the query of loss(f(x; theta, W_K), y)

    The support of an episode is the trajectory, K correlated examples in the order of learning; the query contains them
    and random examples of all tasks, so that L measures forgetting. `trajectories` makes such episodes.

    Args:
      inner_rate: at least 0.
      loss: `(outputs [N, C], y) -> f32[N]`.
      prediction: names of the parameters that learn along the trajectory; all others are the representation.
      order: 2, the gradient of L with its dependence on W_0 and theta through every step, or 1.
      name: key in metrics.

    Returns:
      `maml` with one example per step and those parameters only. After meta-learning, `learner.adapt` on examples one
      by one, or an episode of any length, learns W alone.

    Raises:
      ValueError: as `maml`.

    Source: Javed and White 2019, "Meta-learning representations for continual learning", arXiv 1905.12588.

    Differences from the paper or its code: this is the gradient of the equation. The authors' code of 2019, and so the
    paper's figures, used a wrong one; they corrected it in 2020. They also clip inner gradients to 10, take 10 examples
    a step, and draw the output weights of the sampled classes again.

    Example:
      >>> import optax
      >>> from cl_zoo import compose
      >>> from cl_zoo.wrappers import episodic
      >>> from cl_zoo.models import mlp
      >>> learner = compose(episodic(mlp((28, 28), 10)), optax.adam(1e-4), oml(0.03))
    """
    return maml(
        loss, inner=optax.sgd(inner_rate), inner_steps=None, inner_batch_size=1, order=order, only=prediction, name=name
    )


ENTRY = Entry(
    name="oml",
    family="meta-learning",
    summary="a representation on which learning example by example does not interfere",
    factory=oml,
    arguments={"inner_rate": 0.5},
    numbers=("inner_rate",),
    scenarios=("episodes",),
    papers=("javed2019meta",),
    null=Null({"inner_rate": 0.0}, "inner rate 0: joint training"),
    own_loss=True,
)

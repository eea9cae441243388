"""Dynamic fine-tuning: each token's loss is weighted by the probability that the network gives it."""

from __future__ import annotations

from cl_zoo.algorithms.supervised import supervised
from cl_zoo.checks import checked
from cl_zoo.entries import Entry
from cl_zoo.losses import dynamic_fine_tuning_loss
from cl_zoo.types import Component

__all__ = ["ENTRY", "dft"]


@checked
def dft(*, name: str = "dft") -> Component:
    """L = mean over b, t of - stop(p_bt) log p_bt,   p_bt the probability of answer b's token t.

    Args:
      name: key in metrics.

    Returns:
      A component without state, in place of `supervised`.

    Raises:
      ValueError: at the first trace, if the stream has no labels.

    Source: Wu et al. 2025, arXiv 2508.05629.

    Differences from the paper or its code: the authors and TRL divide by all tokens of a batch; here each example's
    mean comes first, so that short answers weigh more by token.

    Example:
      >>> import optax
      >>> from cl_zoo.language import answering, decoder
      >>> from cl_zoo import compose, dft
      >>> from cl_zoo.layers import softmax_attention
      >>> net = decoder(32, [(softmax_attention(16, 2), 32, 1)])
      >>> learner = compose(answering(net), optax.adam(1e-3), dft())
    """
    return supervised(dynamic_fine_tuning_loss, name=name)


ENTRY = Entry(
    name="dft",
    family="self-distillation",
    summary="what was known, by weighting each token's loss with its own probability",
    factory=dft,
    scenarios=("skills",),
    papers=("wu2025generalization",),
    results="dft",
    found="it learns less than plain fine-tuning, and forgets more for it",
    own_loss=True,
)

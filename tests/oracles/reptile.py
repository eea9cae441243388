"""Reptile: step towards the parameters that a few steps of training on an episode lead to.

episode = list of minibatches (x, y), one for each inner step, in order.  loss: as in maml.py.
"""

from functools import partial

from .maml import pair_of_losses
from .mlp import OPTIMIZERS, adam_step, init_state, sgd_step, tree_add, tree_copy, tree_zeros


def adapted(params, episode, lr, loss="mse", inner="sgd", b1=0.9, state=None):
    """phi, and the state of the inner optimiser, after one inner step on each minibatch.

    state: of the inner optimiser at the start (default: a fresh one).  b1: Adam's first decay.
    """
    loss_of, _ = pair_of_losses(loss)
    step = {"sgd": sgd_step, "adam": partial(adam_step, b1=b1)}[inner]
    phi, state = tree_copy(params), init_state(params) if state is None else state
    for x, y in episode:
        _, grads = loss_of(phi, x, y)
        phi, state = step(phi, grads, state, lr)
    return phi, state


def direction(params, episodes, lr, loss="mse", inner="sgd", b1=0.9, state=None, carry=False):
    """Mean over the episodes of (phi - theta), and the last state of the inner optimiser.

    carry: an episode starts from the state that the one before it left, else from a fresh one.
    """
    total = tree_zeros(params)
    for episode in episodes:
        phi, state = adapted(params, episode, lr, loss, inner, b1, state if carry else None)
        total = tree_add(total, tree_add(phi, params, -1.0), 1.0 / len(episodes))
    return total, state


def run(params, batches, eps, lr, outer="sgd", carry=False, **options):
    """theta <- theta + eps * direction, for each batch (a list of episodes).

    eps: a number, or one for each batch.  outer 'adam': Adam with rate eps, its gradient -direction.
    Returns params.
    """
    params, inner_state = tree_copy(params), None
    state = init_state(params)
    for n, episodes in enumerate(batches):
        towards, inner_state = direction(params, episodes, lr, state=inner_state, carry=carry, **options)
        rate = eps[n] if isinstance(eps, (list, tuple)) else eps
        params, state = OPTIMIZERS[outer](params, tree_add(tree_zeros(params), towards, -1.0), state, rate)
    return params

"""L2 towards the initial parameters."""

from .mlp import OPTIMIZERS, cross_entropy, init_state, tree_add, tree_copy, tree_map, tree_sum


def penalty(params, initial, strength):
    """strength * sum (p - p_0)^2, and its gradient 2 strength (p - p_0)."""
    value = strength * tree_sum(tree_map(lambda p, q: (p - q) ** 2, params, initial))
    return value, tree_map(lambda p, q: 2.0 * strength * (p - q), params, initial)


def run(params, tasks, strength, lr, optimizer="sgd", reset_optimizer=False):
    """Train on the tasks in turn; each step descends cross-entropy + penalty, the anchor never moves.

    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    Returns ([(task loss, penalty) before each step], params).
    """
    initial = tree_copy(params)
    params, state = tree_copy(params), init_state(params)
    history = []
    for task in tasks:
        if reset_optimizer:
            state = init_state(params)
        for x, y, w in task["batches"]:
            loss, grads = cross_entropy(params, x, y, w, task["active"])
            extra, extra_grads = penalty(params, initial, strength)
            history.append((loss, extra))
            params, state = OPTIMIZERS[optimizer](params, tree_add(grads, extra_grads), state, lr)
    return history, params

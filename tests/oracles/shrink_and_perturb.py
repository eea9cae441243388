"""Shrink and perturb: the parameters are drawn towards 0 and shaken."""

from .mlp import OPTIMIZERS, cross_entropy, init_state, tree_copy, tree_map


def shrink_and_perturb(params, shrink, scale, noise):
    """p <- shrink * p + scale * noise."""
    return tree_map(lambda p, n: shrink * p + scale * n, params, noise)


def run(params, tasks, shrink, scale, noises, lr, when="task", optimizer="sgd", reset_optimizer=False):
    """Train on the tasks in turn; when='task': shrink and perturb as each task but the first begins;

    when='step': after every step of the optimizer.
    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    noises: nested like params, one for each time it is done, in order.
    Returns ([(task loss, 0.0) before each step], params).
    """
    if when not in ("task", "step"):
        raise ValueError("when must be 'task' or 'step'")
    params, state = tree_copy(params), init_state(params)
    noises = iter(noises)
    history = []
    for t, task in enumerate(tasks):
        if when == "task" and t > 0:
            params = shrink_and_perturb(params, shrink, scale, next(noises))
        if reset_optimizer:
            state = init_state(params)
        for x, y, w in task["batches"]:
            loss, grads = cross_entropy(params, x, y, w, task["active"])
            history.append((loss, 0.0))
            params, state = OPTIMIZERS[optimizer](params, grads, state, lr)
            if when == "step":
                params = shrink_and_perturb(params, shrink, scale, next(noises))
    return history, params

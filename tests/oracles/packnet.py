"""PackNet: every task owns the weights that survive its pruning; later tasks may not touch them."""

import numpy as np

from .mlp import OPTIMIZERS, cross_entropy, forward, init_state, layer_names, tree_copy

FREE = -1


def prune(kernel, owner, share, task):
    """Returns kernel and owner after the pruning at the end of a task.

    Of the n free weights the floor(share * n) smallest by magnitude (ties: the first in the order
    of rows) become 0 and stay free; the task owns the others.  Owned weights are left alone.
    """
    kernel, owner = np.array(kernel, dtype=np.float64), np.array(owner)
    free = [place for place in np.ndindex(kernel.shape) if owner[place] == FREE]
    n_pruned = int(np.floor(share * len(free)))
    by_magnitude = sorted(free, key=lambda place: (abs(kernel[place]), place))
    for rank, place in enumerate(by_magnitude):
        if rank < n_pruned:
            kernel[place] = 0.0
        else:
            owner[place] = task
    return kernel, owner


def init_owners(params, kernels=None):
    """{layer: owner of each weight}, all free; kernels: the layers that are packed (default: all)."""
    names = layer_names(params) if kernels is None else kernels
    return {name: np.full(params[name]["kernel"].shape, FREE) for name in names}


def movable(params, owners, task, phase, first):
    """Nested like params: True where a step may move the parameter.

    phase 'train': free weights; 'retrain': the weights that the task owns.  Biases move in the
    first task alone (both phases).  A kernel without owners always moves.
    """
    may = {}
    for name in params:
        kernel = np.ones(params[name]["kernel"].shape, dtype=bool)
        if name in owners:
            kernel = owners[name] == (FREE if phase == "train" else task)
        may[name] = {"kernel": kernel, "bias": np.full(params[name]["bias"].shape, first)}
    return may


def restore(new, old, may):
    """new where it may move, else old."""
    return {
        name: {part: np.where(may[name][part], new[name][part], old[name][part]) for part in new[name]} for name in new
    }


def masked(params, owners, task):
    """The network of a task: weights of later tasks and free ones are 0."""
    params = tree_copy(params)
    for name, owner in owners.items():
        params[name]["kernel"][(owner == FREE) | (owner > task)] = 0.0
    return params


def predict(params, owners, task, x):
    return forward(masked(params, owners, task), x)[0]


def run(
    params,
    tasks,
    share,
    lr,
    retraining=None,
    kernels=None,
    mask_gradients=False,
    optimizer="sgd",
    reset_optimizer=False,
    reset_for_retraining=False,
):
    """For each task: train with the owned weights of earlier tasks frozen, prune, retrain what it owns.

    After every step of the optimizer what may not move is put back; with mask_gradients its
    gradient is 0 too (it matters to Adam's moments alone).
    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    retraining: for each task the list of batches (x, y, w) after its pruning (default: none).
    reset_optimizer: before every task;  reset_for_retraining: after every pruning.
    Returns ([(task loss, 0.0) before each step, retraining too], params, owners).
    """
    params, state = tree_copy(params), init_state(params)
    owners = init_owners(params, kernels)
    history = []
    for t, task in enumerate(tasks):
        if reset_optimizer:
            state = init_state(params)
        again = [] if retraining is None else retraining[t]
        for phase, batches in (("train", task["batches"]), ("retrain", again)):
            if phase == "retrain":
                for name in owners:
                    params[name]["kernel"], owners[name] = prune(params[name]["kernel"], owners[name], share, t)
                if reset_for_retraining:
                    state = init_state(params)
            may = movable(params, owners, t, phase, first=t == 0)
            for x, y, w in batches:
                loss, grads = cross_entropy(params, x, y, w, task["active"])
                history.append((loss, 0.0))
                if mask_gradients:
                    grads = {n: {part: np.where(may[n][part], g, 0.0) for part, g in grads[n].items()} for n in grads}
                new, state = OPTIMIZERS[optimizer](params, grads, state, lr)
                params = restore(new, params, may)
    return history, params, owners

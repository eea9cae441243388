"""PackNet: every task owns the weights that survive its pruning; later tasks may not touch them."""

import numpy as np

from .mlp import OPTIMIZERS, cross_entropy, forward, init_state, layer_names, tree_copy

FREE = -1


ROUNDING = {"floor": np.floor, "nearest": round}


def prune(kernel, owner, share, task, rounding="floor"):
    """Returns kernel and owner after the pruning at the end of a task.

    Of the n free weights the floor(share * n) (or, rounding='nearest', the nearest whole number,
    of two the even one) smallest by magnitude (ties: the first in the order
    of rows) become 0 and stay free; the task owns the others.  Owned weights are left alone.
    """
    kernel, owner = np.array(kernel, dtype=np.float64), np.array(owner)
    free = [place for place in np.ndindex(kernel.shape) if owner[place] == FREE]
    n_pruned = int(ROUNDING[rounding](share * len(free)))
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


def movable(params, owners, task, phase, first, own_outputs=None):
    """Nested like params: True where a step may move the parameter.

    phase 'train': free weights; 'retrain': the weights that the task owns.  Biases move in the
    first task alone (both phases).  A kernel without owners always moves.
    own_outputs: bool [C], the outputs whose weights and biases alone may move in the last layer.
    """
    may = {}
    for name in params:
        kernel = np.ones(params[name]["kernel"].shape, dtype=bool)
        if name in owners:
            kernel = owners[name] == (FREE if phase == "train" else task)
        may[name] = {"kernel": kernel, "bias": np.full(params[name]["bias"].shape, first)}
    if own_outputs is not None:
        shape = params["output"]["kernel"].shape
        may["output"] = {"kernel": np.broadcast_to(own_outputs, shape), "bias": np.array(own_outputs)}
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
    rounding="floor",
    own_outputs=False,
):
    """For each task: train with the owned weights of earlier tasks frozen, prune, retrain what it owns.

    After every step of the optimizer what may not move is put back; with mask_gradients its
    gradient is 0 too (it matters to Adam's moments alone).
    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    retraining: for each task the list of batches (x, y, w) after its pruning (default: none).
    reset_optimizer: before every task;  reset_for_retraining: after every pruning; 'apart': so too,
    but the next task goes on with the state from before the pruning.
    rounding: see prune.  own_outputs: the last layer is not packed; each task moves its active outputs.
    Returns ([(task loss, 0.0) before each step, retraining too], params, owners).
    """
    params, state = tree_copy(params), init_state(params)
    owners = init_owners(params, layer_names(params)[:-1] if own_outputs else kernels)
    history = []
    for t, task in enumerate(tasks):
        if reset_optimizer:
            state = init_state(params)
        again = [] if retraining is None else retraining[t]
        for phase, batches in (("train", task["batches"]), ("retrain", again)):
            if phase == "retrain":
                for name in owners:
                    params[name]["kernel"], owners[name] = prune(
                        params[name]["kernel"], owners[name], share, t, rounding
                    )
                if reset_for_retraining:
                    own_state, state = state, init_state(params)
            may = movable(params, owners, t, phase, t == 0, task["active"] if own_outputs else None)
            for x, y, w in batches:
                loss, grads = cross_entropy(params, x, y, w, task["active"])
                history.append((loss, 0.0))
                if mask_gradients:
                    grads = {n: {part: np.where(may[n][part], g, 0.0) for part, g in grads[n].items()} for n in grads}
                new, state = OPTIMIZERS[optimizer](params, grads, state, lr)
                params = restore(new, params, may)
        if reset_for_retraining == "apart":
            state = own_state
    return history, params, owners

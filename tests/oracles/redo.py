"""ReDo: units that hardly fire compared with their layer begin anew."""

import numpy as np

from .continual_backprop import hidden_means, replace_unit
from .mlp import OPTIMIZERS, cross_entropy, init_state, tree_copy


def scores(params, x, w=None):
    """s_i = mean_b |h_i| / ( mean over the layer's units k of mean_b |h_k| ), for each hidden layer.

    Rows of weight 0 are absent.  In a layer where nothing fires every score is 0.
    """
    _, sizes = hidden_means(params, x, np.ones(len(x)) if w is None else w)
    return [size / size.mean() if size.mean() > 0 else np.zeros(len(size)) for size in sizes]


def dormant(layer_scores, threshold):
    """For each layer the mask of the units with s_i <= threshold."""
    return [np.array([s <= threshold for s in layer]) for layer in layer_scores]


def recycle(params, state, masks, fresh, between="fresh"):
    """Replace the units of the masks; a weight between two of them is the fresh incoming one

    (between='fresh': layers from the input up) or 0 ('zero': from the output down).
    """
    if between not in ("fresh", "zero"):
        raise ValueError("between is 'fresh' or 'zero'")
    for layer in range(len(masks)) if between == "fresh" else reversed(range(len(masks))):
        for unit in np.flatnonzero(masks[layer]):
            params, state = replace_unit(params, state, layer, int(unit), fresh)
    return params, state


def run(
    params,
    tasks,
    lr,
    replacements,
    threshold=0.1,
    period=2,
    activations="before",
    optimizer="sgd",
    reset_optimizer=False,
    between="fresh",
):
    """Train on the tasks in turn; after the steps number period, 2 period, ... (counted from 1

    over all the tasks) the units that are dormant on the step's batch are recycled.
    activations: of the network 'before' or 'after' the step.
    replacements: for each step fresh weights nested like params.  between: see recycle.
    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    Returns ([(task loss, units recycled) of each step], params, [masks or None of each step]).
    """
    params, state = tree_copy(params), init_state(params)
    history, recycled = [], []
    for task in tasks:
        if reset_optimizer:
            state = init_state(params)
        for x, y, w in task["batches"]:
            step = len(history)
            loss, grads = cross_entropy(params, x, y, w, task["active"])
            before = params
            params, state = OPTIMIZERS[optimizer](params, grads, state, lr)
            masks = None
            if (step + 1) % period == 0:
                masks = dormant(scores(before if activations == "before" else params, x, w), threshold)
                params, state = recycle(params, state, masks, replacements[step], between)
            history.append((loss, 0 if masks is None else int(sum(mask.sum() for mask in masks))))
            recycled.append(masks)
    return history, params, recycled

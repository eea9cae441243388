"""Continual backprop: at every step a small share of the old units of least use begins anew."""

import numpy as np

from .mlp import OPTIMIZERS, cross_entropy, forward, init_state, layer_names, tree_copy


def hidden_means(params, x, w, shift=None):
    """For each hidden layer: mean_b h_i, and mean_b |h_i - shift_i| (no shift: 0), over the rows of w > 0.

    The means are weighted by w.
    """
    _, activations = forward(params, x)
    w = np.asarray(w, dtype=np.float64)
    means, sizes = [], []
    for layer, h in enumerate(activations[1:]):
        total, size = np.zeros(h.shape[1]), np.zeros(h.shape[1])
        centre = 0.0 if shift is None else shift[layer]
        for b in range(len(h)):
            if w[b] == 0:
                continue
            total += w[b] / w.sum() * h[b]
            size += w[b] / w.sum() * np.abs(h[b] - centre)
        means.append(total)
        sizes.append(size)
    return means, sizes


def contribution(params, layer, size, utility="paper"):
    """How much use the units of a hidden layer are now; size_i is mean_b |h_i|, centred for 'released'.

    'paper':     size_i * sum_k |w_out_ik|
    'released':  size_i * mean_k |w_out_ik| / mean_j |w_in_ji|
    """
    names = layer_names(params)
    w_in, w_out = params[names[layer]]["kernel"], params[names[layer + 1]]["kernel"]
    if utility == "paper":
        return size * np.abs(w_out).sum(axis=1)
    return size * np.abs(w_out).mean(axis=1) / np.abs(w_in).mean(axis=0)


def replace_unit(params, state, layer, unit, fresh):
    """One hidden unit begins anew; returns new params and optimizer state.

    Incoming weights are the unit's column in fresh (nested like params), its bias that of fresh
    (0 if fresh has none), outgoing weights 0, Adam's two moments of all of these 0.
    """
    names = layer_names(params)
    here, above = names[layer], names[layer + 1]
    params = tree_copy(params)
    params[here]["kernel"][:, unit] = np.asarray(fresh[here]["kernel"])[:, unit]
    params[here]["bias"][unit] = fresh[here]["bias"][unit] if "bias" in fresh[here] else 0.0
    params[above]["kernel"][unit, :] = 0.0
    state = {**state, "m": tree_copy(state["m"]), "v": tree_copy(state["v"])}
    for moments in (state["m"], state["v"]):
        moments[here]["kernel"][:, unit] = 0.0
        moments[here]["bias"][unit] = 0.0
        moments[above]["kernel"][unit, :] = 0.0
    return params, state


def choose(utility, age, accumulator, rate, maturity, decay):
    """The units of one layer to replace, the one of least use first, and the new accumulator.

    accumulator <- accumulator + rate * (units with age > maturity);  while it is >= 1: one more
    unit among those, of the lowest utility / (1 - decay^age) (ties: the lowest index); it falls by 1.
    """
    eligible = [i for i in range(len(age)) if age[i] > maturity]
    accumulator += rate * len(eligible)
    chosen = []
    while accumulator >= 1 and len(chosen) < len(eligible):
        best = -1
        for i in eligible:
            if i in chosen:
                continue
            value = utility[i] / (1 - decay ** age[i])
            if best < 0 or value < utility[best] / (1 - decay ** age[best]):
                best = i
        chosen.append(best)
        accumulator -= 1
    return chosen, accumulator


def run(
    params,
    tasks,
    lr,
    replacements,
    rate=0.1,
    maturity=2,
    decay=0.99,
    utility="paper",
    weights="after",
    optimizer="sgd",
    reset_optimizer=False,
    between="fresh",
):
    """Train on the tasks in turn; after each step, for every hidden layer,

    age += 1;  u <- decay u + (1 - decay) contribution;  then units are chosen and replaced, and
    begin with u = 0 and age = 0.
    h is that of the forward pass before the step; the weights of the contribution are those
    after the step (weights='after') or before it ('before').
    utility 'released': hbar <- decay hbar + (1 - decay) mean_b h first, and the contribution
    has |h_i - hbar_i / (1 - decay^age_i)|; hbar of a new unit is 0.
    All layers' utilities come before any replacement.  A weight between two units replaced in the
    same step is the fresh incoming one (between='fresh': layers are replaced from the input up)
    or 0 ('zero': from the output down).
    replacements: for each step (counted over all the tasks) fresh weights nested like params.
    A batch whose rows all weigh 0 changes nothing.
    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    Returns ([(task loss, units replaced) of each step], params, {'utility', 'mean', 'age',
    'accumulator': one entry for each hidden layer; 'replaced': list of (step, layer, unit);
    'state': the optimizer's}).
    """
    if utility not in ("paper", "released") or weights not in ("after", "before"):
        raise ValueError("utility is 'paper' or 'released', weights 'after' or 'before'")
    if between not in ("fresh", "zero"):
        raise ValueError("between is 'fresh' or 'zero'")
    params, state = tree_copy(params), init_state(params)
    sizes = [len(params[name]["bias"]) for name in layer_names(params)[:-1]]
    use, mean = [np.zeros(n) for n in sizes], [np.zeros(n) for n in sizes]
    age, accumulator = [np.zeros(n) for n in sizes], [0.0 for _ in sizes]
    history, replaced = [], []
    for task in tasks:
        if reset_optimizer:
            state = init_state(params)
        for x, y, w in task["batches"]:
            step = len(history)
            if not np.any(np.asarray(w) > 0):
                history.append((0.0, 0))
                continue
            loss, grads = cross_entropy(params, x, y, w, task["active"])
            before = params
            params, state = OPTIMIZERS[optimizer](params, grads, state, lr)
            now, size = hidden_means(before, x, w)
            for layer in range(len(sizes)):
                age[layer] = age[layer] + 1
                mean[layer] = decay * mean[layer] + (1 - decay) * now[layer]
            if utility == "released":
                _, size = hidden_means(before, x, w, [m / (1 - decay**a) for m, a in zip(mean, age)])
            for layer in range(len(sizes)):
                new = contribution(params if weights == "after" else before, layer, size[layer], utility)
                use[layer] = decay * use[layer] + (1 - decay) * new
            count = 0
            for layer in range(len(sizes)) if between == "fresh" else reversed(range(len(sizes))):
                chosen, accumulator[layer] = choose(use[layer], age[layer], accumulator[layer], rate, maturity, decay)
                for unit in chosen:
                    params, state = replace_unit(params, state, layer, unit, replacements[step])
                    use[layer][unit] = mean[layer][unit] = age[layer][unit] = 0.0
                    replaced.append((step, layer, unit))
                count += len(chosen)
            history.append((loss, count))
    memory = {"utility": use, "mean": mean, "age": age, "accumulator": accumulator}
    return history, params, {**memory, "replaced": replaced, "state": state}

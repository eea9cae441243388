"""Learning without forgetting: distillation from the network of the end of the last task."""

import numpy as np

from .mlp import (
    OPTIMIZERS,
    cross_entropy,
    forward,
    gradient,
    init_state,
    masked_log_softmax,
    masked_softmax,
    tree_add,
    tree_copy,
)


def soft_cross_entropy(teacher_row, student_row, teacher_active, student_active, temperature):
    """d = -sum_c q_c log s_c for one row, and its gradient at the student's logits.

    q = softmax(teacher / T) over the teacher's active outputs (0 elsewhere),
    s = softmax(student / T) over the student's active outputs;  dd/dz = (s - q) / T.
    """
    if np.any(teacher_active & ~student_active):
        raise ValueError("an output that the teacher uses is not active for the student")
    q = masked_softmax(teacher_row / temperature, teacher_active)
    s = masked_softmax(student_row / temperature, student_active)
    log_s = masked_log_softmax(student_row / temperature, student_active)
    value = 0.0
    for c in range(len(q)):
        if teacher_active[c]:
            value -= q[c] * log_s[c]
    return value, (s - q) / temperature


def distillation(
    params, teacher, x, w, teacher_active, active, temperature=2.0, heads=None, scale_by_temperature=False
):
    """D = sum_b w_b d_b / max(sum_b w_b, 1e-12), and dD/dparams.

    heads None:  d_b is the soft cross-entropy with q over teacher_active and s over active.
    heads = list of the old tasks' masks:  d_b is the mean over the old tasks k of the soft
    cross-entropy with both softmaxes over head k (teacher_active and active are not used).
    scale_by_temperature: times T^2.
    """
    logits, _ = forward(params, x)
    targets, _ = forward(teacher, x)
    if heads is None:
        pairs = [(np.asarray(teacher_active, dtype=bool), np.asarray(active, dtype=bool))]
    else:
        pairs = [(np.asarray(head, dtype=bool), np.asarray(head, dtype=bool)) for head in heads]
    total = max(float(np.sum(w)), 1e-12)
    value, dlogits = 0.0, np.zeros_like(logits)
    for b in range(len(logits)):
        if w[b] == 0:
            continue
        for old, now in pairs:
            d, dz = soft_cross_entropy(targets[b], logits[b], old, now, temperature)
            value += w[b] / total * d / len(pairs)
            dlogits[b] += w[b] / total * dz / len(pairs)
    if scale_by_temperature:
        value, dlogits = value * temperature**2, dlogits * temperature**2
    return value, gradient(params, x, dlogits)


def run(
    params,
    tasks,
    strength,
    lr,
    temperature=2.0,
    form="outputs",
    weighting="none",
    scale_by_temperature=False,
    optimizer="sgd",
    reset_optimizer=False,
):
    """Train on the tasks in turn; from the second on, a step descends

    cross-entropy + strength * D        (times the number of previous tasks: weighting='tasks').

    form 'outputs': q over the previous task's active outputs, s over this task's.
    form 'heads': one soft cross-entropy for each previous task's active mask.
    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    Returns ([(task loss, strength * D * weighting) before each step], params).
    """
    params, state = tree_copy(params), init_state(params)
    teacher, history = None, []
    for t, task in enumerate(tasks):
        if reset_optimizer:
            state = init_state(params)
        for x, y, w in task["batches"]:
            loss, grads = cross_entropy(params, x, y, w, task["active"])
            extra = 0.0
            if t > 0:
                heads = [old["active"] for old in tasks[:t]] if form == "heads" else None
                d, d_grads = distillation(
                    params,
                    teacher,
                    x,
                    w,
                    tasks[t - 1]["active"],
                    task["active"],
                    temperature,
                    heads,
                    scale_by_temperature,
                )
                factor = strength * (t if weighting == "tasks" else 1)
                extra = factor * d
                grads = tree_add(grads, d_grads, factor)
            history.append((loss, extra))
            params, state = OPTIMIZERS[optimizer](params, grads, state, lr)
        teacher = tree_copy(params)
    return history, params

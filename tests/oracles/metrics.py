"""Measures of continual learning, from R [T + 1, T].

R[0, i] is the accuracy on task i before any training, R[t + 1, i] the one after task t
(tasks are counted from 0).  A mean over no task is nan.
"""


def _mean(values) -> float:
    total, count = 0.0, 0
    for value in values:
        total, count = total + float(value), count + 1
    return total / count if count else float("nan")


def average_accuracy(R) -> float:
    """Mean over all tasks i of R[T, i]."""
    T = len(R) - 1
    return _mean(R[T][i] for i in range(T))


def average_incremental_accuracy(R) -> float:
    """Mean over t of ( the mean over i <= t of R[t + 1, i] )."""
    T = len(R) - 1
    after_each = []
    for t in range(T):
        after_each.append(_mean(R[t + 1][i] for i in range(t + 1)))
    return _mean(after_each)


def backward_transfer(R) -> float:
    """Mean over i < T - 1 of R[T, i] - R[i + 1, i]: final minus just after learning task i."""
    T = len(R) - 1
    changes = []
    for i in range(T - 1):
        changes.append(R[T][i] - R[i + 1][i])
    return _mean(changes)


def forgetting(R) -> float:
    """Mean over i < T - 1 of ( max over rows r = i + 1, ..., T - 1 of R[r, i] ) - R[T, i]."""
    T = len(R) - 1
    losses = []
    for i in range(T - 1):
        best = R[i + 1][i]
        for r in range(i + 1, T):
            if R[r][i] > best:
                best = R[r][i]
        losses.append(best - R[T][i])
    return _mean(losses)


def forward_transfer(R) -> float:
    """Mean over i > 0 of R[i, i] - R[0, i]: just before learning task i minus before training."""
    T = len(R) - 1
    gains = []
    for i in range(1, T):
        gains.append(R[i][i] - R[0][i])
    return _mean(gains)


def learning_accuracy(R) -> float:
    """Mean over i of R[i + 1, i]: just after learning task i."""
    T = len(R) - 1
    return _mean(R[i + 1][i] for i in range(T))

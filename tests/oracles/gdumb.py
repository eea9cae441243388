"""GDumb: a greedy, class-balanced memory; a network is trained on nothing but the memory."""

import numpy as np

from .mlp import OPTIMIZERS, cross_entropy, init_state, tree_copy


def largest(counts: dict[int, int]) -> int:
    """The class with the most rows (ties: the lowest class)."""
    return min(counts, key=lambda c: (-counts[c], c))


def class_counts(capacity: int, labels, valid=None) -> list[dict[int, int]]:
    """Rows of each class in the memory after each row of the stream; no draw decides them.

    A row of class c is taken if c was not seen yet or holds fewer than capacity / (classes seen
    before this row); if the memory is full, one row of the largest class makes room.
    Rows that are not valid change nothing.
    """
    counts: dict[int, int] = {}
    after = []
    for position in range(len(labels)):
        c = int(labels[position])
        there = valid is None or valid[position]
        if there and (c not in counts or counts[c] < capacity / len(counts)):
            if sum(counts.values()) >= capacity:
                counts[largest(counts)] -= 1
            counts[c] = counts.get(c, 0) + 1
        after.append(dict(counts))
    return after


def greedy_balance(capacity: int, labels, draws, valid=None) -> list[int]:
    """The places in the stream of the rows in the memory's slots, in the order of the slots.

    The same process; a taken row goes into the next empty slot, or, in a full memory, into the
    slot of the row that makes room.
    draws: for each row of the stream a number in [0, 1); with n rows in the largest class the
    one that makes room is number floor(draw * n) of them, in the order of the slots.
    """
    slots: list[int] = []
    seen: set[int] = set()
    for position in range(len(labels)):
        if valid is not None and not valid[position]:
            continue
        c = int(labels[position])
        counts = {k: sum(int(labels[row]) == k for row in slots) for k in seen}
        taken = c not in seen or counts[c] < capacity / len(seen)
        seen.add(c)
        if not taken:
            continue
        if len(slots) < capacity:
            slots.append(position)
            continue
        big = largest(counts)
        of_class = [slot for slot in range(len(slots)) if int(labels[slots[slot]]) == big]
        if not 0 <= draws[position] < 1:
            raise ValueError("a draw must lie in [0, 1)")
        slots[of_class[int(draws[position] * len(of_class))]] = position
    return slots


def balance_by_largest(capacity: int, labels, priorities, valid=None) -> list[int]:
    """As greedy_balance, for another process: a row enters any memory with room; a full one, if its

    class holds fewer than the largest class does.  Then one row of the largest classes makes room,
    whichever of them.
    priorities: for each row of the stream a number for each slot; of the slots with rows of the
    largest classes the one with the highest number is taken.
    """
    slots: list[int] = []
    for position in range(len(labels)):
        if valid is not None and not valid[position]:
            continue
        if len(slots) < capacity:
            slots.append(position)
            continue
        held = [int(labels[row]) for row in slots]
        most = max(held.count(c) for c in held)
        if held.count(int(labels[position])) == most:
            continue
        candidates = [slot for slot in range(capacity) if held.count(held[slot]) == most]
        slots[max(candidates, key=lambda slot: priorities[position][slot])] = position
    return slots


def fit(params, x, y, active, batches, lr, optimizer="sgd"):
    """Descend the cross-entropy on the memory (x, y); batches is the list of the rows of each step.

    lr is a number, or one for each step.  active is bool [C] or [rows, C].
    Returns ([loss before each step], params).
    """
    params, state = tree_copy(params), init_state(params)
    rates = np.broadcast_to(np.asarray(lr, dtype=np.float64), len(batches))
    active = np.broadcast_to(np.asarray(active, dtype=bool), (len(x), np.shape(active)[-1]))
    history = []
    for rows, rate in zip(batches, rates):
        rows = np.asarray(rows)
        loss, grads = cross_entropy(params, x[rows], y[rows], np.ones(len(rows)), active[rows])
        history.append(loss)
        params, state = OPTIMIZERS[optimizer](params, grads, state, rate)
    return history, params


def run(params, tasks, capacity, draws, batches, lr, optimizer="sgd"):
    """Sample greedily from the rows of all the tasks, then train the given network on the memory.

    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}; a row competes among the
    outputs that are active in any task.  draws: see greedy_balance, one for each row of the
    stream, absent ones too.  batches: the slots of each step.
    Returns ([(loss, 0.0) before each step], params, places in the stream of the slots' rows).
    """
    rows = [batch for task in tasks for batch in task["batches"]]
    x, y, w = (np.concatenate([row[part] for row in rows]) for part in range(3))
    slots = greedy_balance(capacity, y, draws, w > 0)
    active = np.any([task["active"] for task in tasks], axis=0)
    history, params = fit(params, x[slots], y[slots], active, batches, lr, optimizer)
    return [(loss, 0.0) for loss in history], params, slots

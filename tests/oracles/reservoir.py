"""Reservoir sampling, Algorithm R, with the random draws given."""


def reservoir(capacity: int, draws, valid=None, row_ids=None) -> list[int]:
    """The rows pass one after another; i counts the valid rows from 0, invalid rows do not count.

    i < capacity:                 row i goes into slot i (its draw is not used);
    otherwise, j_i in [0, i]:     if j_i < capacity, row i replaces what is in slot j_i,
                                  else row i is dropped.

    draws:   j_i, one for each VALID row.
    valid:   bool, one for each row of the stream (default: every row is valid).
    row_ids: what is stored for each row of the stream (default: i, its count among the valid).
    Returns the content of the slots, in the order of the slots.
    """
    if valid is None:
        valid = [True] * len(draws)
    if sum(bool(v) for v in valid) != len(draws):
        raise ValueError("one draw is needed for each valid row")
    slots: list[int] = []
    i = 0
    for position in range(len(valid)):
        if not valid[position]:
            continue
        j = int(draws[i])
        if not 0 <= j <= i:
            raise ValueError("the draw of row i must lie in [0, i]")
        row = i if row_ids is None else int(row_ids[position])
        if i < capacity:
            slots.append(row)
        elif j < capacity:
            slots[j] = row
        i += 1
    return slots

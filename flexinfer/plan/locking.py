"""Balanced memory locking (paper, section 3.2): the same share of every weight stays in memory.

Memory beyond the window keeps weights resident. Locking whole leading layers leaves layers without
reads followed by layers with all of them: computing and reading wait for one another in turn (the
paper's figure 3a). Spreading the same bytes evenly keeps the reads of every layer equal, so that
the overlap holds (figure 3b). The paper balances whole tensors over layers; here it is pieces over
weights, which leaves less than one piece of the budget unused.
"""

from collections.abc import Sequence

from flexinfer.plan.weights import Weight


def balanced(weights: Sequence[Weight], lock_bytes: int) -> dict[str, int]:
    """The same share of every weight; rounding errors are carried along the pass, so that they
    cannot pile up.
    """
    share = lock_bytes / sum(weight.lock_cost_bytes for weight in weights)
    locked: dict[str, int] = {}
    wanted = used = 0.0
    for weight in weights:
        wanted += share * weight.lock_cost_bytes
        count = 0
        while count < len(weight.pieces) and used + weight.pieces[count].lock_cost_bytes <= wanted:
            used += weight.pieces[count].lock_cost_bytes
            count += 1
        locked[weight.name] = count
    return _fill(weights, locked, lock_bytes - int(used))


def _fill(weights: Sequence[Weight], locked: dict[str, int], left_bytes: int) -> dict[str, int]:
    """Lock further pieces, a weight at a time from all over the pass, until none fits."""
    by_spread = [weights[i] for i in spread(len(weights))]
    grown = True
    while grown:
        grown = False
        for weight in by_spread:
            count = locked.get(weight.name, 0)
            if count < len(weight.pieces) and weight.pieces[count].lock_cost_bytes <= left_bytes:
                left_bytes -= weight.pieces[count].lock_cost_bytes
                locked[weight.name] = count + 1
                grown = True
    return locked


def spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose every beginning is spread evenly (bit-reversal, the van der
    Corput sequence).
    """
    bits = max(count - 1, 1).bit_length()
    reversed_ = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [i for i in reversed_ if i < count]


def none(weights: Sequence[Weight], lock_bytes: int) -> dict[str, int]:
    """Lock nothing: prefetching alone."""
    return {}

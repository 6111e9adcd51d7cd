"""What several sequences at a time give: tokens per second by the size of the batch, and where the
best is. Pure functions.

A pass over the weights serves all sequences, so while reading takes longer than computing each
further one is almost free. What it costs: its part of the KV cache and of the activations, which is
taken from locked weights; and computing, as kernels take longer for n rows than for one. Attention
over the cache is not in the cost, as it is not in that of one sequence.

    tokens/s = n / max(c(n), bytes read(n) / bandwidth)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flexinfer.plan.plan import Overheads, Plan
from flexinfer.plan.planner import Planner
from flexinfer.sizes import BudgetError


@dataclass(frozen=True, slots=True)
class Batch:
    """So many sequences at a time, in one budget."""

    sequences: int
    # With KV cache and activations for all of them.
    overheads: Overheads
    # Of a pass over the weights; None where the budget is too small.
    plan: Plan | None

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together; 0 where they do not fit."""
        return self.sequences * self.plan.predicted_tokens_per_s if self.plan is not None else 0.0


def counts_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and `most`. Raises ValueError below 1."""
    if most < 1:
        raise ValueError(f"batch={most} must be at least 1 sequence")
    return sorted({1 << i for i in range(most.bit_length())} | {most})


def plan_batches(
    counts: Sequence[int],
    planner: Planner,
    budget_bytes: int,
    overheads_of: Callable[[int], Overheads],
    rows_s: Sequence[tuple[int, float]],
) -> list[Batch]:
    """A plan for each of `counts`.

    Args:
        planner: of one sequence.
        overheads_of: what the process holds besides weights, by number of sequences.
        rows_s: (rows, seconds of computing a pass of so many rows), by rows.
    """
    found = []
    for count in counts:
        overheads = overheads_of(count)
        costs = replace(planner.costs, compute_s=at_rows(rows_s, count))
        try:
            plan = replace(planner, overheads=overheads, costs=costs).plan(budget_bytes)
        except BudgetError:
            plan = None
        found.append(Batch(count, overheads, plan))
    return found


def best_batch(batches: Sequence[Batch]) -> Batch | None:
    """The one of most tokens per second, the smallest of them; None where none fits."""
    return max((one for one in batches if one.plan), key=lambda one: one.tokens_per_s, default=None)


def at_rows(rows_s: Sequence[tuple[int, float]], rows: int) -> float:
    """Seconds of a pass of so many rows, between those that were measured: (rows, seconds), by
    rows.
    """
    before = rows_s[0]
    for after in rows_s:
        if after[0] >= rows:
            if after[0] == before[0]:
                return after[1]
            share = (rows - before[0]) / (after[0] - before[0])
            return before[1] + share * (after[1] - before[1])
        before = after
    return before[1] * rows / before[0]

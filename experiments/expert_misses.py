"""Misses of a cache of experts on recorded routings, by policy and at best. Pure.

`fewest_misses` is Belady's rule, the best in hindsight: the expert that will be used last goes.
(Belady 1966, A study of replacement algorithms for a virtual-storage computer.)
"""

from collections.abc import Sequence

from flexinfer.streaming.expert_policies import Policy

HINDSIGHT = "hindsight"  # the name of `fewest_misses` beside the policies


def misses(
    policy: Policy, routing: Sequence[Sequence[int]], capacity: int, warm_up: int = 0
) -> int:
    """Experts that have to be read when `routing` (what each layer of each token uses, in order)
    meets an empty cache of `capacity`.

    The first `warm_up` entries are not counted. Those that a layer uses together do not take one
    another's place, as long as there is any other.
    """
    there: set[int] = set()
    missed = 0
    for step, wanted in enumerate(routing):
        for expert in wanted:
            policy.touch(expert)
        for expert in wanted:
            if expert in there:
                continue
            missed += step >= warm_up
            if len(there) == capacity:
                worst = policy.worst(lambda one, wanted=wanted: one not in wanted)  # type: ignore[misc]
                if worst is None:
                    continue  # it passes through
                there.discard(worst)
                policy.discard(worst)
            there.add(expert)
            policy.add(expert)
    return missed


def fewest_misses(routing: Sequence[Sequence[int]], capacity: int, warm_up: int = 0) -> int:
    """The same for the best choice in hindsight."""
    never = sum(len(wanted) for wanted in routing) + 1
    # Of each expert of a step: the step of its next use.
    next_use: list[dict[int, int]] = [{} for _ in routing]
    later: dict[int, int] = {}
    for step in reversed(range(len(routing))):
        for expert in routing[step]:
            next_use[step][expert] = later.get(expert, never)
        for expert in routing[step]:
            later[expert] = step
    due: dict[int, int] = {}  # expert in the cache -> its next use
    missed = 0
    for step, wanted in enumerate(routing):
        for expert in wanted:
            if expert in due:
                due[expert] = next_use[step][expert]
        for expert in wanted:
            if expert in due:
                continue
            missed += step >= warm_up
            if len(due) == capacity:
                last = max(
                    (one for one in due if one not in wanted), key=due.__getitem__, default=None
                )
                if last is None or due[last] <= next_use[step][expert]:
                    continue  # it passes through
                del due[last]
            due[expert] = next_use[step][expert]
    return missed

"""Which experts stay in a cache, by name; and how they do on recorded routings, beside the best
that is possible. Pure.

    recency     the expert that was used longest ago goes (LRU)
    frequency   the expert that was used least goes; a use counts half after HALF_LIFE_TOKENS tokens
    fixed       the experts that filled the cache stay; the one that came last goes

`fewest_misses` is Belady's rule, the best in hindsight: the expert that will be used last goes.
(Belady 1966, A study of replacement algorithms for a virtual-storage computer.)
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

HALF_LIFE_TOKENS = (
    # Longer is better where some experts are popular, shorter where tokens repeat experts
    # (docs/log.md)
    8
)

OVERFLOWS_AFTER = 500  # half-lives


class Policy(Protocol):
    """The experts in a cache, and which of them is worth least."""

    def touch(self, expert: int) -> None:
        """It is used, in the cache or not."""
        ...

    def add(self, expert: int) -> None:
        """It is in the cache from now on."""
        ...

    def discard(self, expert: int) -> None:
        """It is not in the cache any more."""
        ...

    def worst(self, can_go: Callable[[int], bool]) -> int | None:
        """The expert in the cache that is worth least of those that can go; None if none can."""
        ...


class Recency:
    """What was used longest ago goes."""

    def __init__(self) -> None:
        self._used: OrderedDict[int, None] = OrderedDict()

    def touch(self, expert: int) -> None:
        if expert in self._used:
            self._used.move_to_end(expert)

    def add(self, expert: int) -> None:
        self._used[expert] = None

    def discard(self, expert: int) -> None:
        self._used.pop(expert, None)

    def worst(self, can_go: Callable[[int], bool]) -> int | None:
        return next((expert for expert in self._used if can_go(expert)), None)


class Fixed(Recency):
    """What came last goes."""

    def touch(self, expert: int) -> None:
        pass

    def worst(self, can_go: Callable[[int], bool]) -> int | None:
        return next((expert for expert in reversed(self._used) if can_go(expert)), None)


class Frequency:
    """What was used least goes, recent uses counting more.

    Instead of letting all counts decay, each use counts for more than the one before it: the order
    is the same.
    """

    def __init__(self, half_life: int) -> None:
        self._half_life = half_life  # in uses of any expert
        self._uses = 0
        self._score: dict[int, float] = {}
        self._heap: list[
            tuple[float, int]
        ] = []  # of experts in the cache, with a score they have or once had
        self._there: set[int] = set()

    def touch(self, expert: int) -> None:
        self._uses += 1
        self._score[expert] = self._score.get(expert, 0.0) + 2.0 ** (self._uses / self._half_life)
        if self._uses == OVERFLOWS_AFTER * self._half_life:  # before the numbers are too large
            self._score = {
                expert: score * 2.0**-OVERFLOWS_AFTER for expert, score in self._score.items()
            }
            self._heap = [(self._score.get(expert, 0.0), expert) for expert in self._there]
            heapq.heapify(self._heap)
            self._uses = 0

    def add(self, expert: int) -> None:
        self._there.add(expert)
        heapq.heappush(self._heap, (self._score.get(expert, 0.0), expert))

    def discard(self, expert: int) -> None:
        self._there.discard(expert)

    def worst(self, can_go: Callable[[int], bool]) -> int | None:
        kept, found = [], None
        while self._heap and found is None:
            score, expert = heapq.heappop(self._heap)
            if expert not in self._there:
                continue
            now = self._score.get(expert, 0.0)
            if score < now:  # used since
                heapq.heappush(self._heap, (now, expert))
                continue
            kept.append((score, expert))
            if can_go(expert):
                found = expert
        for entry in kept:
            heapq.heappush(self._heap, entry)
        return found


HINDSIGHT = "hindsight"  # what `fewest_misses` is called beside the policies
DEFAULT = "frequency"

POLICIES: dict[
    str, Callable[[int], Policy]
] = {  # made for the number of experts that a token uses, over all layers
    "recency": lambda _: Recency(),
    "frequency": lambda token_experts: Frequency(HALF_LIFE_TOKENS * token_experts),
    "fixed": lambda _: Fixed(),
}


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

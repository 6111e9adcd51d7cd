"""Which experts stay in a cache, by name. Pure.

    recency     the expert that was used longest ago goes (LRU)
    frequency   the expert that was used least goes; a use counts half after HALF_LIFE_TOKENS tokens
    fixed       the experts that filled the cache stay; the one that came last goes

experiments/expert_misses.py compares them on recorded routings with the best that is possible.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

# Longer is better where some experts are popular, shorter where tokens repeat experts
# (docs/log.md)
HALF_LIFE_TOKENS = 8

# Half-lives until scores overflow.
OVERFLOWS_AFTER = 500


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
        # Half-life, in uses of any expert.
        self._half_life = half_life
        self._uses = 0
        self._score: dict[int, float] = {}
        # Experts in the cache, with a score that they have or once had.
        self._heap: list[tuple[float, int]] = []
        self._there: set[int] = set()

    def touch(self, expert: int) -> None:
        self._uses += 1
        self._score[expert] = self._score.get(expert, 0.0) + 2.0 ** (self._uses / self._half_life)
        # Rescale before the numbers overflow.
        if self._uses == OVERFLOWS_AFTER * self._half_life:
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
            # It was used since.
            if score < now:
                heapq.heappush(self._heap, (now, expert))
                continue
            kept.append((score, expert))
            if can_go(expert):
                found = expert
        for entry in kept:
            heapq.heappush(self._heap, entry)
        return found


DEFAULT = "frequency"

# Made for the number of experts that a token uses, over all layers.
POLICIES: dict[str, Callable[[int], Policy]] = {
    "recency": lambda _: Recency(),
    "frequency": lambda token_experts: Frequency(HALF_LIFE_TOKENS * token_experts),
    "fixed": lambda _: Fixed(),
}

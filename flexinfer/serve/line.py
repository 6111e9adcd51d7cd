"""A line of bounded length in front of one thing that is used by one at a time."""

import asyncio
import math
from collections import deque
from time import perf_counter

from flexinfer.serve.fields import Refusal

# Weight of the last turn in the mean length; our choice.
SHARE_OF_LAST = 0.3


class Line:
    """First come, first served; beyond `places` that wait, and once it is closed, nobody is let in.

    Of one event loop.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.busy = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed: Refusal | None = None
        # Mean length of the last turns.
        self._turn_s = 1.0
        self._begin_s = 0.0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def check(self) -> None:
        """Raise Refusal (503) where nobody is let in now."""
        if self._closed is not None:
            raise self._closed
        if self.busy and len(self._waiting) >= self.places:
            raise Refusal(
                503,
                f"{self.places} requests wait already; try again later, or start the server with a "
                "larger --queue",
                "queue_full",
                retry_after_s=max(1, math.ceil(self._turn_s)),
            )

    async def enter(self) -> None:
        """Return when it is the caller's turn, which `leave` ends.

        Raises Refusal as `check`, also while it waits.
        """
        self.check()
        if self.busy:
            place = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            try:
                await place
            except asyncio.CancelledError:
                # It was its turn.
                if place.done() and not place.cancelled() and place.exception() is None:
                    self.leave()
                raise
            finally:
                if place in self._waiting:
                    self._waiting.remove(place)
        self.busy = True
        self._begin_s = perf_counter()

    def leave(self) -> None:
        """The turn is over: the next one's begins."""
        took_s = perf_counter() - self._begin_s
        self._turn_s += SHARE_OF_LAST * (took_s - self._turn_s)
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.busy = False

    def close(self, refusal: Refusal) -> None:
        """Refuse all who wait, and all who come from now on. The turn in hand goes on."""
        self._closed = refusal
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_exception(refusal)

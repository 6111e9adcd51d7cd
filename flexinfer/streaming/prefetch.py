"""Asynchronous prefetching (paper, section 3.1): reader threads run ahead of the compute thread,
one piece at a time.

The dense weights of a pass are needed in an order that is known and never changes, so the readers
walk it in a circle: past the last piece of one token they go on with the first of the next. A read
goes straight from the disk into a slot of the window, past the page cache (O_DIRECT wants aligned
offsets, so it takes the aligned bytes around the piece), and the kernel computes on a view into the
slot. The slot is free again as soon as its piece has been used.

A pass that is cut short, or modules that run in another order, skip pieces of the circle: their
slots are free again at once, and what was read beyond them stays.

Cost: a pass takes max(compute, bytes / bandwidth) when the window is deep enough, and their sum
with no threads (`io_threads=0`, the paper's synchronous baseline) or where nothing is read ahead
(`ahead=False`: as many readers, which start a read only while the compute thread waits). Not done
here: deciding what is streamed (flexinfer.plan), computing with it (flexinfer.modules.linear), and
the threads (flexinfer.streaming.queue).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flexinfer.memory.buffer import Buffer
from flexinfer.plan.weights import Piece
from flexinfer.streaming.queue import Read, ReadQueue


class Prefetcher:
    """The window: slots that the readers of `queue` fill in the order of use and the compute thread
    empties.

    `schedule` is one pass in order of use. At most `slots` pieces are in memory; with
    `window_layers` the readers also stay within that many layers, counted from the one that is
    being used. Without `ahead` they begin a read only while a piece is waited for.
    """

    def __init__(
        self,
        schedule: Sequence[Piece],
        queue: ReadQueue,
        *,
        slots: int,
        slot_bytes: int,
        window_layers: int | None,
        ahead: bool = True,
    ) -> None:
        self._ahead = ahead and not queue.synchronous
        # Sequence number of what the compute thread waits for.
        self._awaited: int | None = None
        self._schedule = schedule
        self._queue = queue
        self._window_layers = window_layers
        self._layers = len({piece.layer for piece in schedule})
        ranks = {
            layer: rank
            for rank, layer in enumerate(dict.fromkeys(piece.layer for piece in schedule))
        }
        self._layer_rank = [ranks[piece.layer] for piece in schedule]
        self._slot_bytes = slot_bytes
        self._buffer = Buffer(slots * slot_bytes, lock=True)
        self._free = list(range(slots))
        # A sequence number counts pieces over all passes: sequence % len(schedule) is the place in
        # the schedule. Each from _next_use to _next_read is being read or in one of the three
        # collections.
        self._next_read = 0
        self._next_use = 0
        # Sequence -> slot, and position of the first byte in it.
        self._ready: dict[int, tuple[int, int]] = {}
        # Nothing more is read before the caller has seen the error.
        self._failed: dict[int, BaseException] = {}
        # To be read once more, before anything else.
        self._again: list[int] = []

    @contextmanager
    def next(self, place: int) -> Iterator[tuple[Buffer, int]]:
        """The piece at `place` of the schedule: its buffer, and the position of its first byte. Its
        slot is free after the block.

        Waits until the piece has been read. Raises ReadError if it could not be read, now and not
        when it was read ahead.
        """
        slot, position = self._acquire(place)
        try:
            yield self._buffer, slot * self._slot_bytes + position
        finally:
            with self._queue.changed:
                self._free.append(slot)
                self._queue.changed.notify_all()

    def _acquire(self, place: int) -> tuple[int, int]:
        queue = self._queue
        with queue.changed:
            if self._next_use % len(self._schedule) != place:
                self._skip_to(place)
            sequence = self._awaited = self._next_use
            if not self._ahead and not queue.synchronous:
                queue.changed.notify_all()
            try:
                queue.wait_for(self, sequence, self._schedule[place], self.take)
            finally:
                self._awaited = None
            self._next_use += 1
            queue.changed.notify_all()
            return self._ready.pop(sequence)

    def _skip_to(self, place: int) -> None:
        """Go on at `place`: a pass was cut short, or modules ran in another order than planned."""
        if self._next_use or place:
            self._queue.trace.resyncs += 1
        self._next_use += (place - self._next_use) % len(self._schedule)
        self._next_read = max(self._next_read, self._next_use)
        for sequence in [one for one in self._ready if one < self._next_use]:
            self._drop(self._ready.pop(sequence)[0], sequence)
        self._failed = {one: error for one, error in self._failed.items() if one >= self._next_use}
        self._again = [one for one in self._again if one >= self._next_use]
        self._queue.changed.notify_all()

    def _drop(self, slot: int, sequence: int) -> None:
        """Free a slot whose piece was read and not used."""
        piece = self._schedule[sequence % len(self._schedule)]
        self._queue.trace.wasted_bytes += piece.memory_bytes
        self._free.append(slot)

    def _rank(self, sequence: int) -> int:
        """The layer of a sequence number, counted over all passes."""
        passes, place = divmod(sequence, len(self._schedule))
        return passes * self._layers + self._layer_rank[place]

    @property
    def _is_awaited(self) -> bool:
        """Whether the compute thread waits for a piece that is not there yet."""
        return self._awaited is not None and self._awaited not in self._ready

    # ---- what the queue calls, holding the lock

    def take(self) -> Read | None:
        """The next piece in order of use, or one that is to be read again."""
        if not self._free or not (self._ahead or self._is_awaited):
            return None
        if self._again:
            sequence = self._again.pop(0)
        else:
            sequence, window = self._next_read, self._window_layers
            if self._failed or (
                window is not None and self._rank(sequence) >= self._rank(self._next_use) + window
            ):
                return None
            self._next_read += 1
        slot = self._free.pop()
        into = self._buffer.memory(slot * self._slot_bytes, self._slot_bytes)
        return Read(self, sequence, self._schedule[sequence % len(self._schedule)], slot, into)

    def is_ready(self, key: int) -> bool:
        """Whether the piece of this sequence number is in its slot."""
        return key in self._ready

    def failure(self, key: int) -> BaseException | None:
        """Why it could not be read."""
        return self._failed.pop(key, None)

    def request(self, key: int) -> None:
        """Have it read again."""
        self._again.append(key)

    def finish(self, read: Read, outcome: int | BaseException) -> None:
        """Hand the piece to the compute thread, or its error."""
        sequence = read.key
        if isinstance(outcome, BaseException):
            self._free.append(read.slot)
            if sequence >= self._next_use:
                self._failed[sequence] = outcome
        elif sequence < self._next_use:
            self._drop(read.slot, sequence)
        else:
            self._ready[sequence] = (read.slot, outcome)

    def on_timeout(self, read: Read) -> None:
        """Have the piece read again, into another slot."""
        if read.key >= self._next_use:
            self._again.append(read.key)

    def on_late_read(self, read: Read) -> None:
        """Free the slot of a read that had timed out."""
        self._free.append(read.slot)

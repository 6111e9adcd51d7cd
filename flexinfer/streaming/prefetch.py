"""Asynchronous prefetching (paper, section 3.1): reader threads run ahead of the compute thread, one piece at a time.

The dense weights of a pass are needed in an order that is known and never changes, so the readers walk it in a circle: past
the last piece of one token they go on with the first of the next. A read goes straight from the disk into a slot of the
window, past the page cache (O_DIRECT wants aligned offsets, so it takes the aligned bytes around the piece), and the
kernel computes on a view into the slot. The slot is free again the moment its piece has been used.

A pass that is cut short, or modules that run in another order, skip pieces of the circle: their slots are free again at once,
what was read beyond them stays.

Cost: a pass takes max(compute, bytes / bandwidth) when the window is deep enough, and their sum with no threads
(`io_threads=0`, reads in the caller, the paper's synchronous baseline) or where nothing is read ahead (`ahead=False`: as many readers,
which work only while the compute thread waits; what they have in hand then they finish). Not done here: deciding what is streamed
(flexinfer.plan), what is done with it (flexinfer.streaming.linear), and the threads (flexinfer.streaming.read_queue).
"""

from collections.abc import Callable, Sequence
from time import perf_counter

from flexinfer.memory.buffer import Buffer
from flexinfer.plan.weights import Piece
from flexinfer.streaming.queue import Read, ReadQueue
from flexinfer.streaming.reader import padded_bytes


class Prefetcher:
    """The window: slots that the readers of `queue`, once it serves `take`, fill in the order of use and the compute thread empties.

    `schedule` is one pass in order of use. At most `slots` pieces are in memory; with `window_layers` the readers also
    stay within that many layers, counted from the one that is being used. Without `ahead` they begin a read only while a
    piece is waited for.
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
        self._ahead = ahead
        self._awaited: int | None = None  # sequence number of what the compute thread waits for
        self._schedule = schedule
        self._queue = queue
        self._window_layers = window_layers
        self._layers = len({piece.layer for piece in schedule})
        ranks = {layer: rank for rank, layer in enumerate(dict.fromkeys(piece.layer for piece in schedule))}
        self._layer_rank = [ranks[piece.layer] for piece in schedule]
        self._slot_bytes = slot_bytes
        self._buffer = Buffer(slots * slot_bytes, lock=True)
        self._free = list(range(slots))
        # A sequence number counts pieces over all passes: sequence % len(schedule) is the place in the schedule.
        # Each from _next_use to _next_read is under way or in one of the three collections.
        self._next_read = 0
        self._next_use = 0
        self._ready: dict[int, tuple[int, int]] = {}  # sequence -> (slot, position of the first byte in it)
        self._failed: dict[int, BaseException] = {}  # nothing more is read before the caller has heard of it
        self._again: list[int] = []  # to be read once more, before anything else

    def acquire(self, place: int) -> tuple[Buffer, int, Callable[[], None]]:
        """The piece at `place` of the schedule: its buffer, the position of its first byte, and the call that frees it.

        Waits until the piece has been read. Raises ReadError if it could not be read, now and not when it was read ahead.
        """
        piece, queue = self._schedule[place], self._queue
        start_s = perf_counter()
        if queue.synchronous:
            position = queue.read(piece, self._buffer.memory(0, self._slot_bytes))
            queue.trace.add("wait", piece.name, piece.layer, start_s, piece.nbytes)
            return self._buffer, position, _nothing
        with queue.changed:
            if self._next_use % len(self._schedule) != place:
                self._skip_to(place)
            sequence = self._next_use
            tried_again = False
            while sequence not in self._ready:
                error = self._failed.pop(sequence, None)
                if error is None:
                    self._wait(piece, start_s)
                    continue
                self._again.append(sequence)
                queue.changed.notify_all()
                if tried_again:
                    raise error
                tried_again = True  # it may have been read long ago: what was wrong then may be mended
            slot, position = self._ready.pop(sequence)
            self._next_use += 1
            queue.changed.notify_all()
        queue.trace.add("wait", piece.name, piece.layer, start_s, piece.nbytes)
        return self._buffer, slot * self._slot_bytes + position, lambda: self._release(slot)

    def _wait(self, piece: Piece, start_s: float) -> None:
        """Until something has changed, for the caller who holds the lock."""
        self._awaited = self._next_use
        if not self._ahead:
            self._queue.changed.notify_all()
        try:
            self._queue.wait(piece, start_s)
        finally:
            self._awaited = None

    def _release(self, slot: int) -> None:
        with self._queue.changed:
            self._free.append(slot)
            self._queue.changed.notify_all()

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
        """Free a slot whose piece was read in vain."""
        piece = self._schedule[sequence % len(self._schedule)]
        self._queue.trace.wasted_bytes += padded_bytes(piece.offset_bytes, piece.nbytes)
        self._free.append(slot)

    def _rank(self, sequence: int) -> int:
        """The layer of a sequence number, counted over all passes."""
        passes, place = divmod(sequence, len(self._schedule))
        return passes * self._layers + self._layer_rank[place]

    @property
    def _is_awaited(self) -> bool:
        """Whether the compute thread waits for a piece that is not there yet."""
        return self._awaited is not None and self._awaited not in self._ready

    # ---- what the readers call, holding the lock

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

    def give_up(self, read: Read) -> None:
        """Have the piece read again, into another slot."""
        if read.key >= self._next_use:
            self._again.append(read.key)

    def come_back(self, read: Read) -> None:
        """Free the slot of a read that was given up."""
        self._free.append(read.slot)


def _nothing() -> None:
    """Free a synchronous read: its slot is used again by the next one."""

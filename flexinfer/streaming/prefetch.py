"""Asynchronous prefetching (paper, section 3.1): reader threads run ahead of the compute thread, one piece at a time.

The weights of a pass are needed in an order that is known and never changes, so the readers walk it in a circle: past the
last piece of one token they go on with the first of the next. A read goes straight from the disk into a slot of the
window, past the page cache (O_DIRECT wants aligned offsets, so it takes the aligned bytes around the piece), and the
kernel computes on a view into the slot. The slot is free again the moment its piece has been used.

Cost: a pass takes max(compute, bytes / bandwidth) when the window is deep enough, and their sum with no threads
(`io_threads=0`, reads in the caller, the paper's synchronous baseline). Not done here: deciding what is streamed
(flexinfer.plan) and what is done with it (flexinfer.streaming.linear).
"""

import logging
import math
import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from types import TracebackType

from flexinfer.plan import Piece
from flexinfer.streaming.memory import Buffer
from flexinfer.streaming.reader import FileReader, padded_bytes
from flexinfer.trace import Trace

SAY_AFTER_S = 10.0  # a wait for one read that is worth a line in the log, and again each time as long

logger = logging.getLogger("flexinfer")


class Prefetcher:
    """The window: slots that reader threads fill in the order of use and the compute thread empties.

    `schedule` is one pass in order of use. At most `slots` pieces are in memory; with `window_layers` the readers also
    stay within that many layers, counted from the one that is being used. `io_threads=0` reads in `acquire`.
    """

    def __init__(
        self,
        schedule: Sequence[Piece],
        reader: FileReader,
        trace: Trace,
        *,
        slots: int,
        slot_bytes: int,
        window_layers: int | None,
        io_threads: int,
    ) -> None:
        self._schedule = schedule
        self._reader = reader
        self._trace = trace
        self._window_layers = window_layers
        self._layers = len({piece.layer for piece in schedule})
        ranks = {layer: rank for rank, layer in enumerate(dict.fromkeys(piece.layer for piece in schedule))}
        self._layer_rank = [ranks[piece.layer] for piece in schedule]
        self._slot_bytes = slot_bytes
        self._buffer = Buffer(slots * slot_bytes, lock=True)
        self._free = list(range(slots))
        # A sequence number counts pieces over all passes: sequence % len(schedule) is the place in the schedule.
        self._next_read = 0
        self._next_use = 0
        self._ready: dict[int, tuple[int, int]] = {}  # sequence -> (slot, position of the first byte in it)
        self._generation = (
            0  # grows when the readers are sent elsewhere; a read of an older one is thrown away
        )
        self._failed: tuple[int, BaseException] | None = None  # the read that readers stopped at
        self._stop = False
        self._changed = threading.Condition(threading.Lock())  # held by one only: see closes_here
        self._threads: list[threading.Thread] = []
        self._reading_since_s: dict[threading.Thread, float] = {}
        for i in range(io_threads):
            self._start_reader(i)

    def _start_reader(self, number: int) -> None:
        thread = threading.Thread(target=self._run, name=f"flexinfer-io-{number}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def acquire(self, place: int) -> tuple[Buffer, int, Callable[[], None]]:
        """The piece at `place` of the schedule: its buffer, the position of its first byte, and the call that frees it.

        Waits until the piece has been read. Raises ReadError if it could not be read, now and not when it was read ahead.
        """
        piece = self._schedule[place]
        start_s = perf_counter()
        if not self._threads:
            slot = 0
            position = self._read(piece, slot)
            self._trace.add("wait", piece.name, piece.layer, start_s, piece.nbytes)
            return self._buffer, slot * self._slot_bytes + position, _nothing
        with self._changed:
            if self._next_use % len(self._schedule) != place:
                self._send_readers_to(place)
            sequence = self._next_use
            tried_again = False
            while sequence not in self._ready:
                if self._failed is not None and self._failed[0] == sequence:
                    error = self._failed[1]
                    self._send_readers_to(place)
                    sequence = self._next_use
                    if tried_again:
                        raise error
                    tried_again = True  # it may have been read long ago: what was wrong then may be mended
                    continue
                if self._stop:
                    raise RuntimeError("this model is closed; load it again with flexinfer.from_pretrained()")
                self._wait(piece, place, start_s)
            slot, position = self._ready.pop(sequence)
            self._next_use += 1
            self._changed.notify_all()
        self._trace.add("wait", piece.name, piece.layer, start_s, piece.nbytes)
        return self._buffer, slot * self._slot_bytes + position, lambda: self._release(slot)

    def _wait(self, piece: Piece, place: int, start_s: float) -> None:
        """Wait for a reader. Every while say so; past the time that a read may take, give the readers that are stuck up for lost."""
        waited_s = perf_counter() - start_s
        limit_s = self._reader.timeout_s
        left_s = math.inf if limit_s is None else limit_s - waited_s
        if left_s > 0:
            if not self._changed.wait(min(left_s, SAY_AFTER_S)) and left_s > SAY_AFTER_S:
                logger.warning(
                    "still waiting for %s at byte %d, %.0f s",
                    piece.file,
                    piece.offset_bytes,
                    perf_counter() - start_s,
                )
            return
        assert limit_s is not None
        now_s = perf_counter()
        for thread, since_s in self._reading_since_s.items():
            if now_s - since_s >= limit_s / 2 and thread in self._threads:
                self._threads.remove(thread)  # it ends when its read comes back, and gives its slot back then
                self._start_reader(len(self._threads))
        self._send_readers_to(place)
        raise self._reader.too_slow(piece.file, piece.offset_bytes, piece.nbytes)

    def _release(self, slot: int) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def _send_readers_to(self, place: int) -> None:
        """Start over at `place`: a pass was cut short, or modules ran in another order than planned."""
        if self._next_use or place:
            self._trace.resyncs += 1
        self._generation += 1
        self._free.extend(slot for slot, _ in self._ready.values())
        self._ready.clear()
        self._failed = None
        self._next_read = self._next_use = place
        self._changed.notify_all()

    def _may_read(self) -> bool:
        if self._failed is not None or not self._free:
            return False
        return (
            self._window_layers is None
            or self._rank(self._next_read) < self._rank(self._next_use) + self._window_layers
        )

    def _rank(self, sequence: int) -> int:
        """The layer of a sequence number, counted over all passes."""
        passes, place = divmod(sequence, len(self._schedule))
        return passes * self._layers + self._layer_rank[place]

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                while not self._stop and not self._may_read():
                    self._changed.wait()
                if self._stop or me not in self._threads:
                    return
                slot = self._free.pop()
                sequence, generation = self._next_read, self._generation
                self._next_read += 1
                piece = self._schedule[sequence % len(self._schedule)]
                self._reading_since_s[me] = perf_counter()
            error: BaseException | None = None
            position = 0
            try:
                position = self._read(piece, slot)
            except BaseException as caught:
                error = caught
            with self._changed:
                del self._reading_since_s[me]
                if generation != self._generation or error is not None:
                    self._free.append(slot)
                    first = self._failed is None or sequence < self._failed[0]
                    if generation == self._generation and error is not None and first:
                        self._failed = sequence, error
                else:
                    self._ready[sequence] = (slot, position)
                self._changed.notify_all()

    def _read(self, piece: Piece, slot: int) -> int:
        start_s = perf_counter()
        into = self._buffer.memory(slot * self._slot_bytes, self._slot_bytes)
        position = self._reader.read_now(piece.file, piece.offset_bytes, piece.nbytes, into)
        with self._changed:
            self._trace.reads += 1
            self._trace.bytes_read += padded_bytes(piece.offset_bytes, piece.nbytes)
        self._trace.add("read", piece.name, piece.layer, start_s, piece.nbytes)
        return position

    def closes_here(self) -> bool:
        """Whether this thread may call `close` now: no, where the garbage collector came by while it held the window's lock."""
        if threading.current_thread() in self._threads or not self._changed.acquire(blocking=False):
            return False
        self._changed.release()
        return True

    def close(self) -> None:
        """End the threads and free the window. Safe to call twice."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._ready.clear()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def _nothing() -> None:
    """Free a synchronous read: its slot is used again by the next one."""

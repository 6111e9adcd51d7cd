"""Reader threads, and what they read next: the first thing that any of their sources wants, asked in the order of priority.

A source decides what is read and where it goes: the window of dense weights (flexinfer.streaming.prefetch), the cache of
experts (flexinfer.streaming.expert_cache), memory that keeps weights (flexinfer.streaming.locked). What a pass waits for comes from the source that is asked first, what will surely be needed from the next, what may be
needed from the last. A reader that is free asks; nothing is planned ahead, so a source may change its mind until then. A read
that is under way is not broken off.

One lock, `changed`, guards the sources too: readers hold it while they ask and report, the compute thread while it
changes what is wanted. With no threads (`io_threads=0`) sources read in the caller, by `read`.
"""

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from flexinfer.observe.trace import Trace
from flexinfer.plan.weights import Piece
from flexinfer.streaming.reader import FileReader, padded_bytes

SAY_AFTER_S = 10.0  # a wait for one read that is worth a line in the log, and again each time as long

logger = logging.getLogger("flexinfer")


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A piece that is to be read into memory, for a source that calls it `key` and has set aside `slot` for it."""

    source: "Source"
    key: int
    piece: Piece
    slot: int
    into: memoryview
    job: Callable[[], object] | None = None  # what reads it, where that is not one read of `piece` as it is


class Source(Protocol):
    """What readers work for. All calls are made with the queue's lock held."""

    def finish(self, read: Read, outcome: int | BaseException) -> None:
        """It has been read, its first byte at position `outcome` of the slot, or failed."""
        ...

    def give_up(self, read: Read) -> None:
        """It has taken too long, and is wanted again; its slot may yet be written to."""
        ...

    def come_back(self, read: Read) -> None:
        """A read that was given up has ended: its slot can be used again."""
        ...


Take = Callable[
    [], Read | None
]  # the read that is wanted most, its slot set aside; None if there is none now


class ReadQueue:
    """Threads that read what they are asked for, until `close`."""

    def __init__(self, reader: FileReader, trace: Trace, *, io_threads: int) -> None:
        self.trace = trace
        self.changed = threading.Condition(threading.Lock())  # held by one only: see closes_here
        self.synchronous = io_threads == 0
        self._reader = reader
        self._takes: list[Take] = []
        self._stop = False
        self._threads: list[threading.Thread] = []
        self._under_way: dict[threading.Thread, tuple[Read, float]] = {}  # since when
        for i in range(io_threads):
            self._start_reader(i)

    def serve(self, take: Take) -> None:
        """Read what `take` asks for too, after what those before it ask for. It is called with the lock held."""
        with self.changed:
            self._takes.append(take)
            self.changed.notify_all()

    def read(self, piece: Piece, into: memoryview) -> int:
        """Read `piece` now, in this thread; the position of its first byte. Raises ReadError."""
        start_s = perf_counter()
        position = self._reader.read_now(piece.file, piece.offset_bytes, piece.nbytes, into)
        with self.changed:
            self.trace.reads += 1
            self.trace.bytes_read += padded_bytes(piece.offset_bytes, piece.nbytes)
        self.trace.add("read", piece.name, piece.layer, start_s, piece.nbytes)
        return position

    def wait(self, piece: Piece, start_s: float) -> None:
        """Wait until something has changed, for a caller that holds the lock and has wanted `piece` since `start_s`.

        Every while say so; past the time that a read may take, give up the readers that are stuck and raise ReadError.
        Raises RuntimeError once the queue is closed.
        """
        if self._stop:
            raise RuntimeError("this model is closed; load it again with flexinfer.from_pretrained()")
        limit_s = self._reader.timeout_s
        left_s = math.inf if limit_s is None else limit_s - (perf_counter() - start_s)
        if left_s > 0:
            if not self.changed.wait(min(left_s, SAY_AFTER_S)) and left_s > SAY_AFTER_S:
                logger.warning(
                    "still waiting for %s at byte %d, %.0f s",
                    piece.file,
                    piece.offset_bytes,
                    perf_counter() - start_s,
                )
            return
        assert limit_s is not None
        now_s = perf_counter()
        for thread, (read, since_s) in self._under_way.items():
            if now_s - since_s >= limit_s / 2 and thread in self._threads:
                self._threads.remove(thread)  # it ends when its read comes back, and gives its slot back then
                self._start_reader(len(self._threads))
                read.source.give_up(read)
        self.changed.notify_all()
        raise self._reader.too_slow(piece.file, piece.offset_bytes, piece.nbytes)

    def _start_reader(self, number: int) -> None:
        thread = threading.Thread(target=self._run, name=f"flexinfer-io-{number}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self.changed:
                while (read := self._next(me)) is None:
                    if self._stop or me not in self._threads:
                        return
                    self.changed.wait()
                self._under_way[me] = (read, perf_counter())
            try:
                outcome: int | BaseException = 0
                if read.job is not None:
                    read.job()
                else:
                    outcome = self.read(read.piece, read.into)
            except BaseException as error:
                outcome = error
            with self.changed:
                del self._under_way[me]
                if me in self._threads:
                    read.source.finish(read, outcome)
                else:
                    read.source.come_back(read)
                self.changed.notify_all()

    def _next(self, me: threading.Thread) -> Read | None:
        if self._stop or me not in self._threads:
            return None
        for take in self._takes:
            if (read := take()) is not None:
                return read
        return None

    def closes_here(self) -> bool:
        """Whether this thread may call `close` now: no, where the garbage collector came by while it held the lock."""
        if threading.current_thread() in self._threads or not self.changed.acquire(blocking=False):
            return False
        self.changed.release()
        return True

    def close(self) -> None:
        """End the threads. Safe to call twice."""
        with self.changed:
            self._stop = True
            self.changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._takes.clear()

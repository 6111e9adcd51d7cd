"""Reader threads, and what they read next: the first read that any source wants, sources asked in
order of priority.

A source decides what is read and where it goes: the window of dense weights
(flexinfer.streaming.prefetch), the cache of experts (flexinfer.streaming.expert_cache), memory that
keeps weights (flexinfer.streaming.locked). What a pass waits for comes from the source that is
asked first, what will surely be needed from the next, what may be needed from the last. A free
reader asks; nothing is queued in advance, so a source may change its mind until then. A read in
progress is not cancelled.

Waiting, trying again and giving up are here and nowhere else (`wait_for`). One lock, `changed`,
guards the sources too: readers hold it while they ask and report, the compute thread while it
changes what is wanted. With no threads (`io_threads=0`) the caller that waits does the reads
itself: the paper's synchronous baseline.
"""

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from flexinfer.memory.buffer import behind
from flexinfer.observe.trace import Trace
from flexinfer.plan.weights import Piece
from flexinfer.streaming.reader import FileReader

# A wait for one read that is worth a line in the log, and again each time as long.
LOG_AFTER_S = 10.0
CLOSED = "this model is closed; load it again with flexinfer.from_pretrained()"

logger = logging.getLogger("flexinfer")


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A piece to be read into memory: `source` calls it `key` and has reserved `slot` for it."""

    source: "Source"
    key: int
    piece: Piece
    slot: int
    into: memoryview
    # What reads it, where that is not one read of `piece` as it is.
    job: Callable[[], object] | None = None


class Source(Protocol):
    """What readers work for. All calls are made with the queue's lock held."""

    def finish(self, read: Read, outcome: int | BaseException) -> None:
        """It has been read, its first byte at position `outcome` of the slot, or failed."""
        ...

    def on_timeout(self, read: Read) -> None:
        """It has taken too long, and is wanted again; its slot may yet be written to."""
        ...

    def on_late_read(self, read: Read) -> None:
        """A read that had timed out has ended: its slot can be used again."""
        ...

    def is_ready(self, key: int) -> bool:
        """Whether what it calls `key` is in memory."""
        ...

    def failure(self, key: int) -> BaseException | None:
        """Why the last read of `key` failed, once; then it can be asked for again."""
        ...

    def request(self, key: int) -> None:
        """Have `key` read next, unless it is being read."""
        ...


# The read that is wanted most, its slot reserved; None if there is none now.
Take = Callable[[], Read | None]


class ReadQueue:
    """Threads that read what sources want, until `close`."""

    def __init__(self, reader: FileReader, trace: Trace, *, io_threads: int) -> None:
        self.trace = trace
        # Held by one thread only, and not reentrant: see closes_here.
        self.changed = threading.Condition(threading.Lock())
        self.synchronous = io_threads == 0
        self._reader = reader
        self._takes: list[Take] = []
        self._stop = False
        self._threads: list[threading.Thread] = []
        # By thread: what it reads, and since when.
        self._in_progress: dict[threading.Thread, tuple[Read, float]] = {}
        for i in range(io_threads):
            self._start_reader(i)

    def serve(self, take: Take) -> None:
        """Read what `take` returns too, after what those served before it return.

        It is called with the lock held.
        """
        with self.changed:
            self._takes.append(take)
            self.changed.notify_all()

    def wait_for(self, source: Source, key: int, piece: Piece, take: Take) -> None:
        """Return when what `source` calls `key` is in memory: `piece`, or all that it stands for.

        The caller holds the lock. A failed read is tried once more, for it may have been read long
        ago, and what was wrong then may be repaired; its second error is raised here, in the thread
        that needs it. `take` does the reads where there are no threads.

        Raises:
            ReadError: it could not be read, or took longer than the reader's `timeout_s`.
            RuntimeError: the queue has been closed.
        """
        start_s, tried_again = perf_counter(), False
        while not source.is_ready(key):
            error = source.failure(key)
            if error is not None:
                source.request(key)
                self.changed.notify_all()
                if tried_again:
                    raise error
                tried_again = True
            elif self.synchronous:
                self._read_here(take)
            else:
                self._wait(piece, start_s)
        self.trace.add("wait", piece.name, piece.layer, start_s, piece.nbytes)

    def read(self, piece: Piece, into: memoryview) -> int:
        """Read `piece` now, in this thread; the position of its first byte. Raises ReadError."""
        start_s = perf_counter()
        position = self._reader.read_now(piece.file, piece.offset_bytes, piece.nbytes, into)
        places = behind(position + piece.nbytes, (one.nbytes for one in piece.beside))
        for one, place in zip(piece.beside, places, strict=True):
            rest = into[place:]
            begin = self._reader.read_now(one.file, one.offset_bytes, one.nbytes, rest)
            rest[: one.nbytes] = rest[begin : begin + one.nbytes]
        with self.changed:
            self.trace.reads += 1 + len(piece.beside)
            self.trace.bytes_read += piece.memory_bytes
        self.trace.add("read", piece.name, piece.layer, start_s, piece.nbytes)
        return position

    def closes_here(self) -> bool:
        """Whether this thread may call `close` now: no, where the garbage collector runs while the
        thread holds the lock.
        """
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

    # ---- waiting

    def _read_here(self, take: Take) -> None:
        """One read of `take` in this thread, which holds the lock."""
        if self._stop:
            raise RuntimeError(CLOSED)
        read = take()
        assert read is not None, "a source that is waited for has a read"
        self.changed.release()
        try:
            outcome = self._outcome(read)
        finally:
            self.changed.acquire()
        read.source.finish(read, outcome)
        # Ctrl-C is not a fault of the disk.
        if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
            raise outcome

    def _wait(self, piece: Piece, start_s: float) -> None:
        """Wait until something has changed, for a caller that holds the lock and has wanted `piece`
        since `start_s`.
        """
        if self._stop:
            raise RuntimeError(CLOSED)
        limit_s = self._reader.timeout_s
        left_s = math.inf if limit_s is None else limit_s - (perf_counter() - start_s)
        if left_s > 0:
            if not self.changed.wait(min(left_s, LOG_AFTER_S)) and left_s > LOG_AFTER_S:
                waited_s = perf_counter() - start_s
                logger.warning(
                    "still waiting for %s at byte %d, %.0f s",
                    piece.file,
                    piece.offset_bytes,
                    waited_s,
                )
            return
        assert limit_s is not None
        self._replace_stuck_readers(limit_s / 2)
        raise self._reader.too_slow(piece.file, piece.offset_bytes, piece.nbytes)

    def _replace_stuck_readers(self, limit_s: float) -> None:
        """Start a new thread for each that has been reading for `limit_s`.

        The old one ends when its read does.
        """
        now_s = perf_counter()
        for thread, (read, since_s) in self._in_progress.items():
            if now_s - since_s >= limit_s and thread in self._threads:
                self._threads.remove(thread)
                self._start_reader(len(self._threads))
                read.source.on_timeout(read)
        self.changed.notify_all()

    # ---- the readers

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
                self._in_progress[me] = (read, perf_counter())
            outcome = self._outcome(read)
            with self.changed:
                del self._in_progress[me]
                if me in self._threads:
                    read.source.finish(read, outcome)
                else:
                    read.source.on_late_read(read)
                self.changed.notify_all()

    def _outcome(self, read: Read) -> int | BaseException:
        """The position of the first byte, or what went wrong."""
        try:
            if read.job is None:
                return self.read(read.piece, read.into)
            read.job()
        except BaseException as error:
            return error
        return 0

    def _next(self, me: threading.Thread) -> Read | None:
        if self._stop or me not in self._threads:
            return None
        for take in self._takes:
            if (read := take()) is not None:
                return read
        return None

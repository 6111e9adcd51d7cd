"""Memory that keeps weights, filled by the first pass that uses it: each byte is read once,
straight to its place.

The readers that fill the window (flexinfer.streaming.prefetch) fill this memory too, in the order
of use, whenever the window is full; the compute thread waits for a block when it comes to it. So
the first pass reads what is streamed and what stays, computing meanwhile, and loading reads none of
it. A block is what is new of one weight, read in one call: pieces share the pages at their ends.
Memory is taken when a block is about to be read.

After an error, or a pass that was cut short, blocks that are filled stay so, and the next pass
waits for the others.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flexinfer.kernels import Kernel
from flexinfer.memory.buffer import PAGE_BYTES, Buffer, behind, round_up
from flexinfer.plan.weights import Extent, Piece
from flexinfer.streaming.queue import Read, ReadQueue
from flexinfer.streaming.reader import padded_bytes


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive output rows of a weight in memory, ready to be multiplied by `kernel`."""

    row_start: int
    count: int
    # Rows that are multiplied at a time where all at once would take too much memory.
    step: int
    # In the file.
    nbytes: int
    view: Any
    kernel: Kernel

    @property
    def row_stop(self) -> int:
        """The row after the last."""
        return self.row_start + self.count

    def parts(self, step: int) -> "Iterator[Rows]":
        """These rows, at most `step` at a time."""
        if step >= self.count:
            yield self
            return
        for first in range(0, self.count, step):
            count = min(step, self.count - first)
            nbytes, view = self.nbytes * count // self.count, self.view[first : first + count]
            yield Rows(self.row_start + first, count, self.step, nbytes, view, self.kernel)


@dataclass(slots=True, eq=False)
class LockedBlock:
    """Pieces of a weight that follow one another and stay in memory, in one buffer, from when they
    are read on.

    In another dtype than the file's they are converted when they are read, a piece at a time.
    """

    pieces: tuple[Piece, ...]
    kernel: Kernel
    filled: bool = False
    _buffer: Buffer | None = None
    _rows: Rows | None = None

    @property
    def nbytes(self) -> int:
        """In the file."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def as_in_file(self) -> bool:
        """Whether it is read as it is."""
        return self.kernel.locked is self.kernel

    @property
    def _begin(self) -> int:
        """Where the first byte lies in the buffer: as in its page of the file, unless it is
        converted.
        """
        return self.pieces[0].offset_bytes % PAGE_BYTES if self.as_in_file else 0

    def _position(self, piece: Piece) -> int:
        return self._begin + self.kernel.locked_bytes(
            piece.offset_bytes - self.pieces[0].offset_bytes
        )

    @property
    def _end(self) -> int:
        """Where the last row ends in the buffer."""
        return self._begin + self.kernel.locked_bytes(self.nbytes)

    def _places_beside(self) -> list[int]:
        """Where what lies beside the rows begins in the buffer."""
        return list(behind(self._end, (one.nbytes for one in self._beside)))

    @property
    def missing_bytes(self) -> int:
        """Memory that it has yet to take."""
        return 0 if self._buffer is not None else round_up(self._memory_bytes)

    @property
    def _memory_bytes(self) -> int:
        if not self.as_in_file:
            return self.kernel.locked_bytes(self.nbytes)
        beside_bytes = sum(padded_bytes(one.offset_bytes, one.nbytes) for one in self._beside)
        return padded_bytes(self.pieces[0].offset_bytes, self.nbytes) + beside_bytes

    @property
    def _beside(self) -> tuple[Extent, ...]:
        """What lies beside all pieces."""
        first, last = self.pieces[0].beside, self.pieces[-1].beside
        return tuple(
            replace(a, nbytes=b.offset_bytes + b.nbytes - a.offset_bytes)
            for a, b in zip(first, last, strict=True)
        )

    def allocate(self) -> Buffer:
        """Its memory, taken now if it is not yet."""
        if self._buffer is None:
            self._buffer = Buffer(self._memory_bytes, lock=True)
        return self._buffer

    def release(self) -> None:
        """Leave its memory to a read that may yet write to it."""
        self._buffer = None

    def read(self, read: Callable[[Piece, memoryview], int]) -> None:
        """Read the pieces into its memory, converted to the dtype of `kernel.locked`.

        Raises ReadError.
        """
        buffer, locked = self.allocate(), self.kernel.locked
        scratch = Buffer(max(piece.memory_bytes for piece in self.pieces), lock=False)
        for piece in self.pieces:
            count = piece.row_stop - piece.row_start
            at = read(piece, scratch.memory(0, scratch.nbytes))
            view = locked.view(buffer, self._position(piece), count)
            view.copy_(self.kernel.view(scratch, at, count))

    def as_one(self) -> Piece:
        """All pieces."""
        first, last = self.pieces[0], self.pieces[-1]
        return replace(
            first,
            row_stop=last.row_stop,
            nbytes=self.nbytes,
            memory_bytes=self._memory_bytes,
            beside=self._beside,
        )

    def keep(self, count: int) -> None:
        """Keep the first `count` pieces; the memory of the others goes back to the system."""
        before = self._places_beside()
        self.pieces, self._rows = self.pieces[:count], None
        if not self.filled:
            self._buffer = None
        elif self._buffer is not None:
            end, memory = self._end, self._buffer.memory(0, self._buffer.nbytes)
            moves = zip(self._beside, before, self._places_beside(), strict=True)
            for one, old, new in moves:
                end = new + one.nbytes
                memory[new:end] = memory[old : old + one.nbytes]
            self._buffer.release_from(end)

    def rows(self) -> Rows:
        """What there is to multiply, all of it as one. Only when it is filled."""
        if self._rows is None:
            assert self.filled
            assert self._buffer is not None
            counts = [piece.row_stop - piece.row_start for piece in self.pieces]
            view = self.kernel.locked.view(self._buffer, self._begin, sum(counts))
            first = self.pieces[0].row_start
            self._rows = Rows(first, sum(counts), max(counts), self.nbytes, view, self.kernel)
        return self._rows


class Filler:
    """Has the readers of `queue` fill `blocks`, which are in the order of use."""

    def __init__(self, blocks: Sequence[LockedBlock], queue: ReadQueue) -> None:
        self._blocks, self._queue = blocks, queue
        self._number = {id(block): number for number, block in enumerate(blocks)}
        # To be read, the one that is wanted next first.
        self._next = deque(range(len(blocks)))
        self._failed: dict[int, BaseException] = {}

    def wait_for(self, block: LockedBlock) -> None:
        """Return when `block` is filled.

        Raises ReadError if it could not be read, now and not when it was read ahead.
        """
        number = self._number[id(block)]
        with self._queue.changed:
            # A pass that begins elsewhere, or goes on after memory was changed.
            if number in self._next:
                self._next.rotate(-self._next.index(number))
            self._queue.wait_for(self, number, block.as_one(), self.take)

    # ---- what the queue calls, holding the lock

    def take(self) -> Read | None:
        """The next block in order of use."""
        if not self._next:
            return None
        number = self._next.popleft()
        block = self._blocks[number]
        try:
            buffer = block.allocate()
        except Exception as error:
            # No memory left: raised where the block is waited for.
            self._failed[number] = error
            self._queue.changed.notify_all()
            return None
        job = None if block.as_in_file else partial(block.read, self._queue.read)
        return Read(self, number, block.as_one(), 0, buffer.memory(0, buffer.nbytes), job)

    def is_ready(self, key: int) -> bool:
        """Whether the block is filled."""
        return self._blocks[key].filled

    def failure(self, key: int) -> BaseException | None:
        """Why it could not be read."""
        return self._failed.pop(key, None)

    def request(self, key: int) -> None:
        """Have it read next."""
        self._next.appendleft(key)

    def finish(self, read: Read, outcome: int | BaseException) -> None:
        """The block is filled, or failed."""
        if isinstance(outcome, BaseException):
            self._failed[read.key] = outcome
        else:
            self._blocks[read.key].filled = True

    def on_timeout(self, read: Read) -> None:
        """Have the block read again, into other memory."""
        self._blocks[read.key].release()
        self._next.appendleft(read.key)

    def on_late_read(self, read: Read) -> None:
        """The memory of the read goes with it."""

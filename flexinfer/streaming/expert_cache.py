"""The cache of experts: slots for pieces of any expert of any layer, filled when an expert is
wanted and kept while there is room.

A layer says which experts it wants, in the order in which it will use them. Those that are there
are safe from then until they are used; the others are read at once, before anything else, into free
slots or those of the experts that are worth least (flexinfer.streaming.expert_policies). When the
disk is idle, what a layer before hinted is read, and takes the place of others likewise. An expert
is read at most once while its layer runs, unless the cache is smaller than what the layer uses at a
time.

Looking ahead stops where it does not pay: when more than half of what was read because it was
hinted has gone again before anybody wanted it, as in a cache of a few slots. Now and then it is
tried again.

All pieces have slots of one size. Where even the safe pieces fill the cache, the compute thread's
next piece takes the place of the one that it will use last; so two slots are enough for any layer.
"""

from collections import deque
from collections.abc import Sequence

from flexinfer.memory.buffer import Buffer
from flexinfer.observe.trace import Trace
from flexinfer.plan.weights import Piece
from flexinfer.streaming.expert_policies import POLICIES
from flexinfer.streaming.queue import Read, ReadQueue

# Pieces read ahead by which it is judged whether that pays.
RECENT = 64
# Layers without looking ahead before it is tried again.
TRY_AGAIN = 64


class ExpertCache:
    """Pieces of `experts` (each: its pieces in order of use), in slots of `slot_bytes`. Without
    memory until `resize`.

    token_experts: that a token uses, over all layers.

    Experts are numbered over all layers, pieces over all experts. One thread wants and acquires;
    the readers of a queue fill.
    """

    def __init__(
        self,
        experts: Sequence[Sequence[Piece]],
        slot_bytes: int,
        policy: str,
        trace: Trace,
        *,
        token_experts: int,
    ) -> None:
        self._experts: list[range] = []
        self._pieces: list[Piece] = []
        self._expert_of: list[int] = []
        for number, pieces in enumerate(experts):
            self._experts.append(range(len(self._pieces), len(self._pieces) + len(pieces)))
            self._pieces.extend(pieces)
            self._expert_of.extend([number] * len(pieces))
        self._slot_bytes = slot_bytes
        self._policy = POLICIES[policy](token_experts)
        self._trace = trace
        self._queue: ReadQueue | None = None
        # (first slot, memory) of each chunk.
        self._chunks: list[tuple[int, Buffer]] = []
        # Buffer and position of each slot.
        self._slots: list[tuple[Buffer, int]] = []
        self._free: list[int] = []
        # Slot of each piece in memory.
        self._slot_of: dict[int, int] = {}
        # Position of their first byte in the buffer.
        self._position_of: dict[int, int] = {}
        # Expert -> number of its pieces in memory.
        self._there: dict[int, int] = {}
        self._reading: set[int] = set()
        # By the layer that runs, and not used yet, in order of use.
        self._wanted: dict[int, None] = {}
        # Pieces that have to be read.
        self._needed: deque[int] = deque()
        # Pieces that the next layer may want.
        self._hinted: deque[int] = deque()
        # Experts among the hinted, until their layer comes.
        self._guessed: set[int] = set()
        # Pieces that were read because they were hinted, and not wanted yet.
        self._unused: set[int] = set()
        # The share of pieces read ahead that was wanted in the end, a moving average.
        self._worth = 1.0
        # Layers since one looked ahead.
        self._not_ahead = 0
        self._failed: dict[int, BaseException] = {}
        # Piece that the compute thread waits for.
        self._blocked: int | None = None

    @property
    def slots(self) -> int:
        """Pieces that it has room for."""
        return len(self._slots)

    def holds(self, expert: int) -> bool:
        """Whether all of `expert` is in memory."""
        return self._there.get(expert, 0) == len(self._experts[expert])

    def attach(self, queue: ReadQueue) -> None:
        """Have the readers of `queue` fill the cache.

        The owner has it serve `take` and `take_hinted`.
        """
        self._queue = queue

    def detach(self) -> None:
        """Ask for nothing any more. The queue has been closed; what is in memory stays."""
        self._queue = None
        self._reading.clear()
        self._forget()

    def resize(self, slots: int) -> None:
        """Make room for `slots` pieces; those whose slots go are lost. Only while detached."""
        assert self._queue is None
        if slots < len(self._slots):
            gone = {number: slot for number, slot in self._slot_of.items() if slot >= slots}
            for number in gone:
                self._drop(number)
            del self._slots[slots:]
            self._free = [slot for slot in self._free if slot < slots]
            while self._chunks and self._chunks[-1][0] >= slots:
                self._chunks.pop()
            if self._chunks:
                first, buffer = self._chunks[-1]
                buffer.release_from((slots - first) * self._slot_bytes)
        elif slots > len(self._slots):
            first, count = len(self._slots), slots - len(self._slots)
            buffer = Buffer(count * self._slot_bytes, lock=True)
            self._chunks.append((first, buffer))
            self._slots.extend((buffer, i * self._slot_bytes) for i in range(count))
            self._free.extend(range(slots - 1, first - 1, -1))

    def want(self, experts: Sequence[int], *, those_here_first: bool) -> list[int]:
        """Have `experts` read that are not in memory. Returns them in the order in which they are
        to be used: as given, or with those that are in memory first.
        """
        assert self._queue is not None
        with self._queue.changed:
            self._forget()
            here = {expert: self.holds(expert) for expert in experts}
            hits = sum(here.values())
            self._trace.expert_hits += hits
            self._trace.expert_misses += len(experts) - hits
            if those_here_first:
                experts = sorted(experts, key=lambda e: not here[e])
            for expert in experts:
                self._policy.touch(expert)
                for number in self._experts[expert]:
                    self._wanted[number] = None
                    if number in self._unused and number in self._slot_of:
                        self._unused.discard(number)
                        self._judge_piece(wanted=True)
                    self._unused.discard(number)
                    if number not in self._slot_of and number not in self._reading:
                        self._needed.append(number)
            if hits < len(experts):
                self._queue.changed.notify_all()
        return list(experts)

    def uses_hints(self) -> bool:
        """Whether it is worth hinting what the next layer wants. Called once a layer."""
        all_here = len(self._slot_of) == len(self._pieces)
        if self._queue is None or self._queue.synchronous or all_here:
            return False
        if self._worth >= 0.5:
            return True
        self._not_ahead = (self._not_ahead + 1) % TRY_AGAIN
        return self._not_ahead == 0

    def _judge_piece(self, *, wanted: bool) -> None:
        """A piece that was read ahead has been wanted, or has gone before it was."""
        self._worth += (wanted - self._worth) / RECENT

    def hint(self, experts: Sequence[int]) -> None:
        """`experts` may be what the next layer wants: read them when the disk is idle."""
        assert self._queue is not None
        with self._queue.changed:
            self._guessed = set(experts)
            self._trace.experts_foretold += len(experts)
            self._hinted.clear()
            for expert in experts:
                self._hinted.extend(n for n in self._experts[expert] if n not in self._slot_of)
            if self._hinted:
                self._queue.changed.notify_all()

    def score_hints(self, experts: Sequence[int]) -> None:
        """What the layer that was hinted turned out to want."""
        self._trace.experts_foretold_right += len(self._guessed.intersection(experts))
        self._guessed = set()

    def acquire(self, expert: int, i: int) -> tuple[Buffer, int]:
        """Piece `i` of `expert`, which is wanted: its buffer and the position of its first byte. It
        stays until `release`.

        Waits until it has been read. Raises ReadError if it could not be read.
        """
        number = self._experts[expert][i]
        # No lock: what is wanted goes only while this thread waits.
        slot = self._slot_of.get(number)
        if slot is None:
            slot = self._wait_for(number)
        return self._slots[slot][0], self._position_of[number]

    def release(self, expert: int, i: int) -> None:
        """The piece has been used; its slot may be taken for another."""
        self._wanted.pop(self._experts[expert][i], None)
        queue = self._queue
        # A reader may have been waiting for a slot.
        if self._needed and queue is not None:
            with queue.changed:
                queue.changed.notify_all()

    def _wait_for(self, number: int) -> int:
        queue, piece = self._queue, self._pieces[number]
        assert queue is not None
        with queue.changed:
            self._blocked = number
            # A backward pass acquires pieces that no layer has wanted: they stay until they are
            # released, too.
            self._wanted.setdefault(number)
            if (
                number not in self._reading
                and number not in self._needed
                and number not in self._failed
            ):
                self._needed.appendleft(number)
            # There may be a slot for it that there was not for what is used later.
            queue.changed.notify_all()
            try:
                queue.wait_for(
                    self, number, piece, self._take_blocked if queue.synchronous else self.take
                )
            finally:
                self._blocked = None
            return self._slot_of[number]

    def _take_blocked(self) -> Read | None:
        """What the compute thread waits for, where it reads itself."""
        assert self._blocked is not None
        return self._take(deque([self._blocked]))

    def _forget(self) -> None:
        """Forget what was wanted: it has been used, or a pass was cut short."""
        self._wanted.clear()
        self._needed.clear()
        self._hinted.clear()
        self._failed.clear()

    # ---- slots

    def _slot_for(self, number: int) -> int | None:
        """A slot for a piece: a free one, or one of the expert that is worth least.

        None if all are wanted still.
        """
        if not self._free:
            worst = self._policy.worst(self._can_go)
            if worst is None and number == self._blocked and self._guessed:
                self._guessed = set()
                worst = self._policy.worst(self._can_go)
            if worst is not None:
                for other in self._experts[worst]:
                    if other in self._slot_of and other not in self._wanted:
                        self._drop(other)
            elif number == self._blocked:
                last = next((n for n in reversed(self._wanted) if n in self._slot_of), None)
                if last is not None:
                    self._drop(last)
        return self._free.pop() if self._free else None

    def _can_go(self, expert: int) -> bool:
        return expert not in self._guessed and any(
            n in self._slot_of and n not in self._wanted for n in self._experts[expert]
        )

    def _keep(self, number: int, slot: int, position: int) -> None:
        self._slot_of[number] = slot
        self._position_of[number] = self._slots[slot][1] + position
        expert = self._expert_of[number]
        self._there[expert] = there = self._there.get(expert, 0) + 1
        if there == 1:
            self._policy.add(expert)

    def _drop(self, number: int) -> None:
        self._free.append(self._slot_of.pop(number))
        del self._position_of[number]
        if number in self._unused:
            self._unused.discard(number)
            self._judge_piece(wanted=False)
            self._trace.wasted_bytes += self._pieces[number].memory_bytes
        expert = self._expert_of[number]
        self._there[expert] -= 1
        if not self._there[expert]:
            del self._there[expert]
            self._policy.discard(expert)

    # ---- what the readers call, holding the lock

    def take(self) -> Read | None:
        """What the layer that runs has to wait for, in the order of use."""
        return self._take(self._needed)

    def take_hinted(self) -> Read | None:
        """What the next layer may want."""
        read = self._take(self._hinted)
        if read is not None:
            self._unused.add(read.key)
        return read

    def _take(self, numbers: deque[int]) -> Read | None:
        while numbers and (numbers[0] in self._slot_of or numbers[0] in self._reading):
            numbers.popleft()
        slot = self._slot_for(numbers[0]) if numbers else None
        if slot is None:
            return None
        number = numbers.popleft()
        self._reading.add(number)
        buffer, start = self._slots[slot]
        return Read(
            self, number, self._pieces[number], slot, buffer.memory(start, self._slot_bytes)
        )

    def finish(self, read: Read, outcome: int | BaseException) -> None:
        """Keep the piece; of those that nobody wants any more too."""
        self._reading.discard(read.key)
        if isinstance(outcome, BaseException):
            self._free.append(read.slot)
            self._unused.discard(read.key)
            if read.key in self._wanted:
                self._failed[read.key] = outcome
        else:
            self._keep(read.key, read.slot, outcome)

    def on_timeout(self, read: Read) -> None:
        """Have the piece read again, into another slot, if it is wanted."""
        self._reading.discard(read.key)
        if read.key in self._wanted:
            self._needed.appendleft(read.key)

    def on_late_read(self, read: Read) -> None:
        """Free the slot of a read that had timed out, unless its queue has been closed since."""
        if self._queue is not None:
            self._free.append(read.slot)

    def is_ready(self, key: int) -> bool:
        """Whether the piece is in memory."""
        return key in self._slot_of

    def failure(self, key: int) -> BaseException | None:
        """Why it could not be read."""
        return self._failed.pop(key, None)

    def request(self, key: int) -> None:
        """Have it read next."""
        self._needed.appendleft(key)

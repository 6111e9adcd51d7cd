"""What a run did: counters that are always on, and a timeline that is kept on request.

The timeline is the raw material of the paper's figure 3 and of `trace=`
(flexinfer.observe.perfetto): when each tensor was read, how long the compute thread waited for it,
how long its kernel ran, and what memory held meanwhile. An event is a record of fixed size in a
ring that is set aside, and touched, when the engine is made: a plan that measures the process
counts it, and it never grows. The oldest events go first.

Cost: about two microseconds an event. A sample of the memory in use is taken with an event, at most
20 a second.
"""

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, Literal

from flexinfer.memory.process import resident_bytes

Kind = Literal["read", "wait", "compute", "pass", "budget", "locked", "window", "resident"]

# (stage, bytes done, bytes in all).
Progress = Callable[[str, int, int], None]

SPANS: tuple[Kind, ...] = ("read", "wait", "compute")
COUNTERS: tuple[Kind, ...] = ("budget", "locked", "window", "resident")
KINDS: tuple[Kind, ...] = (*SPANS, "pass", *COUNTERS)
KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
MAX_EVENTS = 200_000
# Time between two samples of the memory in use.
SAMPLE_S = 0.05
# Kind, thread, tensor, layer, start, stop, bytes.
RECORD = struct.Struct("=BHIHddQ")


@dataclass(frozen=True, slots=True)
class Event:
    """One span of time, or a counter's value at `stop_s`.

    Times are seconds on the clock of `time.perf_counter`.
    """

    kind: Kind
    # Empty for a pass and for a counter.
    tensor: str
    # The decoder layer; the number of layers for what follows them (lm_head).
    layer: int
    start_s: float
    stop_s: float
    # Size of the tensor, value of the counter, or tokens of the pass.
    bytes: int
    # Name of the thread it ran on.
    thread: str


class Ring:
    """The last `capacity` events, 33 bytes each. Any thread may add."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # Repeating the byte touches every page.
        self._records = bytearray(b"\0") * (capacity * RECORD.size)
        self._added = 0
        self._names: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(
        self, kind: Kind, tensor: str, layer: int, start_s: float, stop_s: float, nbytes: int
    ) -> None:
        """Keep an event of this thread, in the place of the oldest where the ring is full."""
        names, thread = self._names, threading.current_thread().name
        with self._lock:
            RECORD.pack_into(
                self._records,
                self._added % self._capacity * RECORD.size,
                KIND_NUMBERS[kind],
                names.setdefault(thread, len(names)),
                names.setdefault(tensor, len(names)),
                layer,
                start_s,
                stop_s,
                nbytes,
            )
            self._added += 1

    def __iter__(self) -> Iterator[Event]:
        """The kept events, oldest first."""
        with self._lock:
            names, records, added = list(self._names), bytes(self._records), self._added
        for number in range(max(0, added - self._capacity), added):
            kind, thread, tensor, layer, start_s, stop_s, nbytes = RECORD.unpack_from(
                records, number % self._capacity * RECORD.size
            )
            yield Event(KINDS[kind], names[tensor], layer, start_s, stop_s, nbytes, names[thread])


@dataclass(slots=True)
class Trace:
    """Counters of one engine, and its events when `max_events` is not 0.

    Written by reader and compute threads.
    """

    max_events: int = 0
    # Hears how far a pass has come, as ("pass", bytes multiplied, bytes of a pass).
    progress: Progress | None = None
    passes: int = 0
    # Batch times new positions, over all passes.
    tokens: int = 0
    bytes_read: int = 0
    reads: int = 0
    pass_s: float = 0.0
    wait_s: float = 0.0
    draft_passes: int = 0
    draft_s: float = 0.0
    # Candidates that passes verified.
    drafted: int = 0
    # Tokens and passes of generate() with a draft.
    texts_tokens: int = 0
    texts_passes: int = 0
    resyncs: int = 0
    # Bytes read and never used.
    wasted_bytes: int = 0
    # Experts that were in memory when a layer wanted them.
    expert_hits: int = 0
    expert_misses: int = 0
    # Of those that were to be read ahead, because the layer before thought so.
    experts_foretold: int = 0
    # Those that were wanted.
    experts_foretold_right: int = 0
    # From loading on to the end of the first whole pass; 0 before.
    first_token_s: float = 0.0
    _began_s: float = field(default_factory=perf_counter)
    # Budget, locked, window.
    _memory_bytes: tuple[int, int, int] = (0, 0, 0)
    _total_bytes: int = 0
    _pass_bytes: int = 0
    _sampled_s: float = float("-inf")
    _ring: Ring | None = field(init=False)

    def __post_init__(self) -> None:
        self._ring = Ring(self.max_events) if self.max_events else None

    def add(self, kind: Kind, tensor: str, layer: int, start_s: float, nbytes: int) -> None:
        """Record a span that began at `start_s` and ends now."""
        stop_s = perf_counter()
        if kind == "wait":
            self.wait_s += stop_s - start_s
        elif kind == "compute" and self.progress is not None:
            # A prompt uses more experts.
            self._pass_bytes = min(self._pass_bytes + nbytes, self._total_bytes)
            self.progress("pass", self._pass_bytes, self._total_bytes)
        if self._ring is not None:
            self._ring.add(kind, tensor, layer, start_s, stop_s, nbytes)
            if stop_s - self._sampled_s > SAMPLE_S:
                self._sample(self._ring, stop_s)

    @contextmanager
    def one_pass(self, rows: int) -> Iterator[None]:
        """A pass over the weights runs in this block, with `rows` tokens."""
        start_s, self._pass_bytes = perf_counter(), 0
        try:
            yield
            self.first_token_s = self.first_token_s or perf_counter() - self._began_s
        finally:
            stop_s = perf_counter()
            self.passes += 1
            self.tokens += rows
            self.pass_s += stop_s - start_s
            if self._ring is not None:
                self._ring.add("pass", "", 0, start_s, stop_s, rows)

    def set_memory(
        self, budget_bytes: int, locked_bytes: int, window_bytes: int, total_bytes: int
    ) -> None:
        """What a plan made of the budget, from now on; `total_bytes` are the weights of a pass."""
        # A sample on both sides makes the counters show a step, not a slope.
        if self._ring is not None:
            self._sample(self._ring, perf_counter())
        self._memory_bytes, self._total_bytes = (
            (budget_bytes, locked_bytes, window_bytes),
            total_bytes,
        )
        if self._ring is not None:
            self._sample(self._ring, perf_counter())

    def _sample(self, ring: Ring, now_s: float) -> None:
        self._sampled_s = now_s
        if self._memory_bytes[0]:
            for kind, value in zip(COUNTERS, (*self._memory_bytes, resident_bytes()), strict=True):
                ring.add(kind, "", 0, now_s, now_s, value)

    def timeline(self) -> Iterator[Event]:
        """All kept events in the order in which they ended, oldest first."""
        return iter(self._ring or ())

    def events(self) -> list[dict[str, Any]]:
        """The kept reads, waits and kernels as plain dictionaries, in the order in which they
        ended.
        """
        return [asdict(event) for event in self.timeline() if event.kind in SPANS]

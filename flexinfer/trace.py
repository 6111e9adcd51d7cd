"""What a run did: counters that are always on, and a timeline that is kept on request.

The timeline is the raw material of the paper's figure 3: when each tensor was read, how long the compute thread waited
for it, and how long its kernel ran. An event costs about a microsecond and 200 bytes; the oldest go first when
`max_events` is reached.
"""

from collections import deque
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, Literal

Kind = Literal["read", "wait", "compute"]


@dataclass(frozen=True, slots=True)
class Event:
    """One span of time. Times are seconds on the clock of `time.perf_counter`."""

    kind: Kind
    tensor: str
    layer: int  # the decoder layer; the number of layers for what follows them (lm_head)
    start_s: float
    stop_s: float
    bytes: int


@dataclass(slots=True)
class Trace:
    """Counters of one engine, and its events when `max_events` is not 0. Written by reader and compute threads."""

    max_events: int = 0
    passes: int = 0
    tokens: int = 0  # rows that went through the model: batch x new positions
    bytes_read: int = 0
    reads: int = 0
    pass_s: float = 0.0
    wait_s: float = 0.0
    resyncs: int = 0
    _events: deque[Event] = field(init=False)

    def __post_init__(self) -> None:
        self._events = deque(maxlen=self.max_events)

    def add(self, kind: Kind, tensor: str, layer: int, start_s: float, nbytes: int) -> None:
        """Record a span that began at `start_s` and ends now."""
        stop_s = perf_counter()
        if kind == "wait":
            self.wait_s += stop_s - start_s
        if self.max_events:
            self._events.append(Event(kind, tensor, layer, start_s, stop_s, nbytes))

    def events(self) -> list[dict[str, Any]]:
        """The kept events as plain dictionaries, oldest first."""
        return [asdict(event) for event in list(self._events)]

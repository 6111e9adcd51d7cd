"""A budget that follows the machine: memory is given back while others need it, and taken again
when they are done.

A thread looks four times a second at what the machine and the process's control groups have to
spare (flexinfer.memory.process), and at once when the kernel reports that tasks wait for memory
(pressure stall information, where there is any). Shrinking is immediate: others are waiting.
Growing waits until the room has been there for a while and is worth the reading, so that a program
which comes and goes does not make the model read its weights again and again. Between the two lies
a share of the budget in which nothing is done.
"""

import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path

POLL_S = 0.25
# Polls in a row that must find room before it is taken.
CALM_POLLS = 20
# Smaller changes, as a share of the budget, are ignored.
HYSTERESIS = 0.05
PRESSURE_FILE = Path("/proc/pressure/memory")
# Some task waited so many microseconds, in a window of so many.
PRESSURE_TRIGGER = b"some 100000 2000000"

logger = logging.getLogger("flexinfer")


def next_budget(
    budget_bytes: int, spare_bytes: int, smallest_bytes: int, largest_bytes: int, calm_polls: int
) -> int:
    """The budget that follows `budget_bytes` when `spare_bytes` could be had. Pure.

    `calm_polls` says how many looks in a row, this one included, have found room to grow.
    """
    wanted_bytes = max(smallest_bytes, min(spare_bytes, largest_bytes))
    if wanted_bytes < budget_bytes * (1 - HYSTERESIS):
        return wanted_bytes
    if wanted_bytes > budget_bytes * (1 + HYSTERESIS) and calm_polls >= CALM_POLLS:
        return wanted_bytes
    return budget_bytes


class Follower:
    """Calls `resize` when the memory to spare has changed; until `close`."""

    def __init__(
        self,
        resize: Callable[[int], object],
        budget: Callable[[], int],
        smallest: Callable[[], int],
        spare: Callable[[], int],
        largest_bytes: int,
    ) -> None:
        self._resize, self._budget, self._smallest, self._spare = resize, budget, smallest, spare
        self._largest_bytes = largest_bytes
        self._calm_polls = 0
        self._wake_read, self._wake_write = os.pipe()
        self._pressure = _pressure_fd()
        self._thread = threading.Thread(target=self._run, name="flexinfer-memory", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Compare once, and resize if it is time."""
        before, spare_bytes = self._budget(), self._spare()
        roomy = min(spare_bytes, self._largest_bytes) > before * (1 + HYSTERESIS)
        self._calm_polls = self._calm_polls + 1 if roomy else 0
        after = next_budget(
            before, spare_bytes, self._smallest(), self._largest_bytes, self._calm_polls
        )
        if after != before:
            self._calm_polls = 0
            logger.info(
                "memory to spare: %d MiB; budget %d -> %d MiB",
                spare_bytes >> 20,
                before >> 20,
                after >> 20,
            )
            self._resize(after)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        if self._pressure is not None:
            poll.register(self._pressure, select.POLLPRI)
        while not any(fd == self._wake_read for fd, _ in poll.poll(POLL_S * 1000)):
            try:
                self.look()
            except Exception:
                # It may work next time; the model runs on as it is.
                logger.warning("the budget could not follow the memory to spare", exc_info=True)

    def close(self) -> None:
        """End the thread. Safe to call twice."""
        if self._wake_write < 0:
            return
        # Makes the other end readable.
        os.close(self._wake_write)
        self._wake_write = -1
        if self._thread is not threading.current_thread():
            self._thread.join()
        os.close(self._wake_read)
        if self._pressure is not None:
            os.close(self._pressure)


def _pressure_fd() -> int | None:
    """A file that wakes a poll when tasks wait for memory; None where there is none."""
    with contextlib.suppress(OSError):
        fd = os.open(PRESSURE_FILE, os.O_RDWR | os.O_NONBLOCK)
        try:
            os.write(fd, PRESSURE_TRIGGER)
            return fd
        except OSError:
            os.close(fd)
    return None

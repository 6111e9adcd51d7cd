"""What a system that is measured offers, and what the measured process sees of itself."""

import mmap
from pathlib import Path
from typing import Any, Protocol


class UnsupportedError(RuntimeError):
    """A system that cannot run this model here, for a reason that installing nothing mends."""


class System(Protocol):
    """One system. Construction imports its libraries, `load` makes it ready to decode."""

    def load(self) -> None:
        """Open the model."""

    def start(self, prompt: list[int]) -> None:
        """Begin a new text with the prompt, or a batch of texts.

        The first `step` may do the work.
        """

    def step(self) -> list[int]:
        """Decode one token of each sequence greedily. Their ids."""

    def take(self, token: int) -> None:
        """Go on with `token` instead of the one that was decoded."""

    def counters(self) -> dict[str, int]:
        """What the system counts, so far."""

    def engine(self) -> dict[str, Any]:
        """What the system says of itself."""

    def close(self) -> None:
        """Let go of the model."""


def resident_bytes() -> int:
    """Memory this process holds now, mapped libraries included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def bytes_read() -> int:
    """Bytes this process has had read from storage so far."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


def prompt_ids(tokens: int, vocab: int) -> list[int]:
    """The fixed prompt: ids spread over the vocabulary above its control tokens."""
    first = min(300, vocab // 2)
    return [first + number * 7919 % (vocab - first) for number in range(tokens)]

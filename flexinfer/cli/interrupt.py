"""Ctrl-C and SIGTERM while text is made: the token in hand is finished, so that a KV cache stays
whole.

Elsewhere Ctrl-C raises KeyboardInterrupt, as always in Python, and SIGTERM raises `Terminated`
inside `terminable`: both pass through every `with` block and `finally`, so threads end, files close
and a terminal gets its state back.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Exit codes, as shells have them: 128 and the signal's number.
INTERRUPTED, TERMINATED = 130, 143


class Terminated(SystemExit):
    """SIGTERM came."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


def exit_code(stop: BaseException) -> int:
    """The exit code of a command that `stop` has ended."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM raises Terminated.

    Does nothing outside the main thread, where no handler can be set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within it SIGINT and SIGTERM wait until its end: C code of libraries that are being imported
    swallows what a handler raises.

    A mask would not do: another thread takes the signal, and Python runs the handler in the main
    thread all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        if came:
            signal.raise_signal(came[-1])


class Interrupt:
    """While text is made: the first SIGINT or SIGTERM ends it after the token in hand, the second
    at once.

    A stopping criterion of transformers; a pass cut short would leave a KV cache whose layers do
    not agree. `heard` is called at the first.
    """

    def __init__(self, heard: Callable[[], None] | None = None) -> None:
        self._heard = heard
        # The exit code of the command; 0 while no signal has come.
        self.code = 0

    @property
    def pressed(self) -> bool:
        return self.code != 0

    def __enter__(self) -> "Interrupt":
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, input_ids: "torch.Tensor", scores: Any, **kwargs: Any) -> "torch.Tensor":
        import torch

        return torch.full((input_ids.shape[0],), self.pressed, dtype=torch.bool)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = not self.pressed
        self.code = TERMINATED if number == signal.SIGTERM else self.code or INTERRUPTED
        if first and self._heard is not None:
            self._heard()
        if not first:
            raise Terminated if self.code == TERMINATED else KeyboardInterrupt

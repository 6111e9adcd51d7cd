"""What takes its time, shown on a terminal: a spinner, or a bar where it is known how much there is
to do.

It goes to stderr and is gone when it is done; where stderr is no terminal nothing is shown. A bar
appears only when the rest will take a while, so that nothing flickers.
"""

import sys
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

from flexinfer.observe.report import TITLES

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.status import Status

    from flexinfer.observe import trace

# Work that is over before this gets no bar.
PATIENCE_S = 0.5


class Bars:
    """One line at the bottom of the terminal, about one thing at a time. A `with` block ends it."""

    def __init__(self) -> None:
        self._visible = sys.stderr.isatty()
        self._spinner: Status | None = None
        self._bar: Progress | None = None
        self._wanted: tuple[str, ...] = ()
        self._stage = ""
        self._began_s = 0.0

    @property
    def progress(self) -> "trace.Progress | None":
        """For `flexinfer.from_pretrained(progress=...)`; None where nothing would be shown."""
        return self._report if self._visible else None

    def spin(self, text: str) -> None:
        """Say what is going on, until a bar or something else takes its place."""
        self._clear()
        if self._visible:
            import rich.progress  # noqa: F401  (before a budget is measured, not in the middle of a pass)
            from rich.console import Console
            from rich.markup import escape

            self._spinner = Console(stderr=True).status(escape(text))
            self._spinner.start()

    def expect(self, *stages: str) -> None:
        """From now on `stages` may have a bar, and no others."""
        self._wanted, self._stage, self._began_s = stages, "", perf_counter()

    def stop(self) -> None:
        """Show nothing more."""
        self.expect()
        self._clear()

    def stopping(self) -> None:
        """Say on the bar, if there is one, that a wish to stop was heard; for `Interrupt`."""
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], description="one token more (Ctrl-C again: none)"
            )

    def _report(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        if stage not in self._wanted:
            return
        now_s = perf_counter()
        if stage != self._stage:
            if self._stage:
                self._began_s = now_s
            self._stage = stage
            self._end_bar()
        if self._bar is None and done_bytes:
            if (now_s - self._began_s) * (total_bytes - done_bytes) / done_bytes < PATIENCE_S:
                return
            self._clear()
            self._bar = _make_bar(stage, total_bytes)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done_bytes)
        if done_bytes == total_bytes:
            self._end_bar()

    def _clear(self) -> None:
        self._end_bar()
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> "Bars":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.stop()


def _make_bar(stage: str, total_bytes: int) -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    reads = (DownloadColumn(binary_units=True), TransferSpeedColumn())
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        # A prompt is mostly computing.
        *([TaskProgressColumn()] if stage == "pass" else reads),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
    )
    bar.add_task(TITLES[stage], total=total_bytes)
    return bar

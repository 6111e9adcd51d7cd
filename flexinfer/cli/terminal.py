"""What the commands say: text to stdout, everything about it to stderr; colours and lines where a
terminal sees them, else plain.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Width of a table in a pipe or a file, so that no cell is wrapped.
PLAIN_WIDTH = 240


def note(text: str) -> None:
    """One line about what is going on."""
    print(text, file=sys.stderr, flush=True)


def error(text: str) -> None:
    """What went wrong, in one line; red on a terminal, unless NO_COLOR is set
    (https://no-color.org).
    """
    import typer

    line = "error: " + " ".join(text.split())
    typer.secho(line, fg="red", err=True, color=False if os.environ.get("NO_COLOR") else None)


def note_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """For `warnings.showwarning`: what concerns a user is a note, the rest is left out."""
    if issubclass(category, RuntimeWarning | UserWarning):
        note(f"note: {message}")


def console() -> "Console":
    """Where tables go: stdout."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def table(*columns: str, left: int = 1) -> "Table":
    """An empty table; its first `left` columns are aligned left, the others, numbers, right."""
    from rich import box
    from rich.table import Table

    made = Table(
        box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, header_style="bold", pad_edge=False
    )
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place < left else "right", overflow="fold")
    return made


class _Notes(logging.Handler):
    """Writes messages as notes: to the stderr of the moment, which puts them above a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextlib.contextmanager
def logged(verbose: bool) -> Iterator[None]:
    """With `verbose`, what the engine logs goes to stderr as it is."""
    if not verbose:
        yield
        return
    logger, handler = logging.getLogger("flexinfer"), _Notes()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)

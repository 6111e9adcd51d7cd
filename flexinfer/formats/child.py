"""Processes that do what would leave memory behind: taking a vocabulary apart, for one.

The parent calls `make_apart`; the module that runs in the child ends with `guarded`.
"""

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from flexinfer.cache_dir import cache_dir
from flexinfer.formats.tensors import CheckpointError
from flexinfer.memory.process import anonymous_bytes, available_bytes
from flexinfer.messages import one_line
from flexinfer.sizes import format_size

# Exit code of a process that found no room on the disk (EX_IOERR).
FULL = 74
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
KILLED = -9


def make_apart(source: Path, needed_bytes: int, module: str, *arguments: str) -> str | None:
    """Have a module of ours make the tokenizer of `source`. Returns why none can be made.

    What the module prints is a warning. Raises CheckpointError where there is less memory than
    `needed_bytes`, or too little all the same.
    """
    spare_bytes = available_bytes() - anonymous_bytes()
    too_little = CheckpointError(
        f"{source}: to make its tokenizer takes {format_size(needed_bytes)} of memory, once, and "
        f"{format_size(spare_bytes)} are to spare; run `flexinfer plan` on the model where there "
        f"is more: it is kept in {cache_dir()}"
    )
    if spare_bytes < needed_bytes:
        raise too_little
    done = run_apart(module, *arguments)
    if done.returncode == KILLED:
        raise too_little
    if done.stdout:
        warnings.warn(f"{source}: {one_line(done.stdout)}", RuntimeWarning, stacklevel=2)
    if done.returncode:
        return one_line((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return None


def run_apart(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module of ours in a process of its own.

    Raises OSError where it found no room on the disk.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments],
        # The modules of this process, and large blocks given back when they are freed, as this
        # process does.
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "MALLOC_MMAP_THRESHOLD_": str(128 << 10),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == FULL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return done


def guarded(task: Callable[[], None]) -> int:
    """Run `task` in the child: the first to go where memory runs out. Returns its exit code."""
    _first_to_go()
    try:
        task()
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return FULL
    return 0


def _first_to_go() -> None:
    """Have the system end this process, not its parent, where memory runs out."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        # Another system.
        return

"""Processes that do what would leave memory behind: taking a vocabulary apart, for one."""

import errno
import os
import subprocess
import sys
from pathlib import Path

# Exit code of a process that found no room on the disk (EX_IOERR).
FULL = 74
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
KILLED = -9


def run_apart(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module of ours in a process of its own. Raises OSError where it found no room on the disk."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments],
        # The modules of this process, and large blocks given back when they are freed, as this process does.
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MALLOC_MMAP_THRESHOLD_": str(128 << 10)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == FULL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return done


def first_to_go() -> None:
    """Have the system end this process, and not the one that waits for it, where memory runs out."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        # Another system.
        return

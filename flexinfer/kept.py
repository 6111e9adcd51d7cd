"""What is made once and kept in the cache directory, and the processes that make it.

A directory is written under another name and renamed when it is complete, so that nobody sees half of one, whoever else makes the same
one meanwhile. Where the cache directory cannot be written to, or is full, it is made in a temporary place for this process alone.
"""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from flexinfer.cache_dir import in_cache, temporary_cache

FULL = 74  # exit code of a process that found no room on the disk (EX_IOERR)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
KILLED = -9


def make_once(name: str, complete: Callable[[Path], bool], make: Callable[[Path], None]) -> Path:
    """The directory `name` of the cache directory, filled by `make` now unless it is `complete`."""
    kept = in_cache(name)
    if complete(kept):
        return kept
    try:
        return _make(kept, complete, make)
    except OSError as error:
        if error.errno is None:
            raise
        place = temporary_cache(error.strerror or str(error)) / name
        return place if complete(place) else _make(place, complete, make)


def _make(kept: Path, complete: Callable[[Path], bool], make: Callable[[Path], None]) -> Path:
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{kept.name}.", dir=kept.parent))
    try:
        make(unfinished)
        unfinished.chmod(0o755)
        if kept.exists() and not complete(kept):  # damaged since
            shutil.rmtree(kept)
        try:
            unfinished.rename(kept)
        except OSError:
            if not complete(kept):  # nobody else has made it meanwhile
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return kept


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
    except OSError:  # another system
        return

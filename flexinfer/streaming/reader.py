"""Reading byte ranges of checkpoint files: the only place that touches their bytes, and where faults are met (and injected).

Direct reads go past the page cache; they want aligned offsets, so they take the aligned pages around what is asked for.
"""

import errno
import mmap
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from flexinfer.streaming.memory import PAGE_BYTES, round_up

CACHE_BLOCK_BYTES = 2 << 20  # the largest block the page cache keeps as one


class ReadError(OSError):
    """Weights could not be read: names the file, the offset and what the system said."""


class FileReader:
    """Reads byte ranges of checkpoint files into memory, by direct or buffered reads.

    With `direct`, the first block of each file is read both ways; where direct I/O is refused or disagrees, the reader
    says so once and reads through the page cache instead, dropping its pages behind it.
    """

    def __init__(self, files: Sequence[Path], *, direct: bool) -> None:
        self._fds: dict[Path, int] = {}
        self.direct = direct and hasattr(os, "O_DIRECT")
        try:
            for file in files:
                self._fds[file] = os.open(file, os.O_RDONLY)
            reason = self._why_not_direct() if direct else None
            if reason:
                warnings.warn(
                    f"direct I/O does not work here ({reason}); reading through the page cache",
                    RuntimeWarning,
                    stacklevel=3,
                )
                self.direct = False
            if self.direct:
                for file, fd in list(self._fds.items()):
                    self._fds[file] = os.open(file, os.O_RDONLY | os.O_DIRECT)
                    os.close(fd)
        except BaseException:
            self.close()
            raise

    def _why_not_direct(self) -> str | None:
        if not hasattr(os, "O_DIRECT"):
            return "no O_DIRECT on this system"
        block = mmap.mmap(-1, PAGE_BYTES)
        for file, fd in self._fds.items():
            try:
                direct_fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
                try:
                    count = os.preadv(direct_fd, [block], 0)
                finally:
                    os.close(direct_fd)
            except OSError as error:
                return f"{file}: {error.strerror}"
            if block[:count] != os.pread(fd, PAGE_BYTES, 0):
                return f"{file}: direct and buffered reads disagree"
        return None

    def read(self, file: Path, offset_bytes: int, nbytes: int, into: memoryview) -> int:
        """Read the whole pages around `nbytes` at `offset_bytes` into `into`; the first wanted byte is at the returned
        position. `into` holds at least `padded_bytes(offset_bytes, nbytes)`. Raises ReadError."""
        start = offset_bytes - offset_bytes % PAGE_BYTES
        skip = offset_bytes - start
        span = round_up(skip + nbytes)
        fd = self._fds[file]
        done = 0
        while done < skip + nbytes:
            try:
                count = os.preadv(fd, [into[done:span]], start + done)
            except OSError as error:
                raise ReadError(
                    error.errno, f"{file}: reading {nbytes} bytes at {offset_bytes}: {error.strerror}"
                ) from error
            done += count
            if count == 0 or (
                count % PAGE_BYTES and done < skip + nbytes
            ):  # a file's end is the only odd place to stop
                raise ReadError(
                    errno.EIO, f"{file}: ends before byte {offset_bytes + nbytes}: truncated while in use?"
                )
        if not self.direct:
            # From further back, so that a large block of the cache which the read before this one cut in two goes too.
            begin, end = max(0, start - CACHE_BLOCK_BYTES), start + span
            to_the_end = end >= os.fstat(fd).st_size  # said as 0: the file's last block may reach beyond it
            os.posix_fadvise(fd, begin, 0 if to_the_end else end - begin, os.POSIX_FADV_DONTNEED)
        return skip

    def close(self) -> None:
        """Close the files. Safe to call twice."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def padded_bytes(offset_bytes: int, nbytes: int) -> int:
    """Memory that a direct read of `nbytes` at `offset_bytes` needs: the whole pages around it."""
    return round_up(offset_bytes % PAGE_BYTES + nbytes)

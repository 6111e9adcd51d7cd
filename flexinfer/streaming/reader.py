"""Reading byte ranges of checkpoint files: the only place that touches their bytes, and where
faults are met (and injected).

Direct reads go past the page cache; they want aligned offsets, so they take the aligned pages
around what is asked for.
"""

import errno
import mmap
import os
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from flexinfer.memory.buffer import PAGE_BYTES, round_up
from flexinfer.streaming.checksums import Checksums

# The largest block the page cache keeps as one.
CACHE_BLOCK_BYTES = 2 << 20
# Most reads in a row that return nothing or EAGAIN.
TRIES = 5
# Pause before a read is tried again.
PAUSE_S = 0.02


class ReadError(OSError):
    """Weights could not be read: names the file, the offset and what the system said."""


class FileReader:
    """Reads byte ranges of checkpoint files into memory, by direct or buffered reads.

    With `direct`, the first block of each file is read both ways; where direct I/O is refused or
    disagrees, the reader says so once and reads through the page cache instead, dropping its pages
    behind it. `read` waits `timeout_s` at most. What is read of a file that has `checksums` is held
    against them.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        direct: bool,
        timeout_s: float | None = None,
        checksums: Mapping[Path, Checksums] | None = None,
    ) -> None:
        self.timeout_s = timeout_s
        self._checksums = checksums or {}
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
        """`read_now`, waited for no longer than `timeout_s`: after that ReadError, and `into` may
        yet be written to.
        """
        if self.timeout_s is None:
            return self.read_now(file, offset_bytes, nbytes, into)
        outcome: list[int | BaseException] = []

        def run() -> None:
            try:
                outcome.append(self.read_now(file, offset_bytes, nbytes, into))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=run, name="flexinfer-io-timed", daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if not outcome:
            raise self.too_slow(file, offset_bytes, nbytes)
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def too_slow(self, file: Path, offset_bytes: int, nbytes: int) -> ReadError:
        """What is raised for a read that took longer than `timeout_s`."""
        return ReadError(
            errno.ETIMEDOUT,
            f"{file}: reading {nbytes} bytes at {offset_bytes} took more than "
            f"read_timeout_s={self.timeout_s:g}; the next pass tries again",
        )

    def read_now(self, file: Path, offset_bytes: int, nbytes: int, into: memoryview) -> int:
        """Read the whole pages around `nbytes` at `offset_bytes` into `into`; the first wanted byte
        is at the returned position. `into` holds at least `padded_bytes(offset_bytes, nbytes)`.
        Raises ReadError.
        """
        checksums, start = self._checksums.get(file), offset_bytes - offset_bytes % PAGE_BYTES
        position, done = self._read_pages(
            file, offset_bytes, nbytes, into, whole=checksums is not None
        )
        if checksums is not None and checksums.wrong_byte(start, into[:done]) is not None:
            position, done = self._read_pages(file, offset_bytes, nbytes, into, whole=True)
            wrong = checksums.wrong_byte(start, into[:done])
            if wrong is not None:
                raise ReadError(
                    errno.EIO,
                    f"{file}: the {PAGE_BYTES} bytes at {wrong} are not what they were when its "
                    "checksums were made, read twice; the disk or the file is damaged: fetch the "
                    "file again",
                )
        return position

    def _read_pages(
        self, file: Path, offset_bytes: int, nbytes: int, into: memoryview, *, whole: bool
    ) -> tuple[int, int]:
        """As `read_now`, and the number of bytes read; `whole`: the last page to its end, or the
        file's.
        """
        start = offset_bytes - offset_bytes % PAGE_BYTES
        skip = offset_bytes - start
        span = round_up(skip + nbytes)
        done = tries = 0
        fd: int | None = None
        needed = skip + nbytes
        while done < needed:
            # Anew each time: a read that comes back late finds the files closed.
            fd = self._fds.get(file)
            if fd is None:
                raise ReadError(errno.EBADF, f"{file}: closed while it was being read")
            try:
                reached = done + os.preadv(fd, [into[done:span]], start + done)
            except BlockingIOError as error:
                reached, tries = done, tries + 1
                if tries == TRIES:
                    raise ReadError(
                        errno.EAGAIN,
                        f"{file}: reading {nbytes} bytes at {offset_bytes}: {error.strerror}",
                    ) from error
                time.sleep(PAUSE_S)
                continue
            except OSError as error:
                raise ReadError(
                    error.errno,
                    f"{file}: reading {nbytes} bytes at {offset_bytes}: {error.strerror}",
                ) from error
            if whole and done == 0:
                needed = max(needed, min(span, os.fstat(fd).st_size - start))
            # A short read: on from the last whole page, as direct reads want it.
            if reached < needed:
                reached -= reached % PAGE_BYTES
                tries = tries + 1 if reached == done else 0
                if tries == TRIES:
                    raise ReadError(
                        errno.EIO,
                        f"{file}: ends before byte {offset_bytes + nbytes}: truncated while in "
                        "use?",
                    )
            done = reached
        if not self.direct:
            # From further back, so that a large block of the cache which the read before this one
            # cut in two goes too.
            begin, end = max(0, start - CACHE_BLOCK_BYTES), start + span
            assert fd is not None
            # Said as 0: the file's last block may reach beyond it.
            to_the_end = end >= os.fstat(fd).st_size
            os.posix_fadvise(fd, begin, 0 if to_the_end else end - begin, os.POSIX_FADV_DONTNEED)
        return skip, done

    def close(self) -> None:
        """Close the files. Safe to call twice."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def padded_bytes(offset_bytes: int, nbytes: int) -> int:
    """Memory that a direct read of `nbytes` at `offset_bytes` needs: the whole pages around it."""
    return round_up(offset_bytes % PAGE_BYTES + nbytes)

"""Page-aligned memory: buffers that hold locked weights, and the slots of the window.

Each buffer is a private anonymous mapping, in huge pages where the kernel has them (fewer pages to
pin for a direct read, fewer TLB misses for a kernel that streams through it: docs/log.md), and
begins at the boundary of one; locked with mlock so that the kernel cannot take back what the plan
counted on. A buffer lives as long as something refers to it or to a tensor made from it; there is
nothing to free by hand, and the end of one can be released while the rest is in use.
"""

import contextlib
import ctypes
import mmap
import os
import warnings
from collections.abc import Iterable, Iterator

import torch

from flexinfer.memory.heap import LIBC

PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 2 << 20
MADV_POPULATE_WRITE = 23


def round_up(nbytes: int, multiple: int = PAGE_BYTES) -> int:
    """The smallest multiple of `multiple` that is at least `nbytes`."""
    return -(-nbytes // multiple) * multiple


def behind(end_byte: int, sizes: Iterable[int]) -> Iterator[int]:
    """Where arrays of `sizes` in bytes begin that lie behind `end_byte`, each from the next page
    on.
    """
    for nbytes in sizes:
        begin = round_up(end_byte)
        yield begin
        end_byte = begin + nbytes


class Buffer:
    """`nbytes` of page-aligned memory, rounded up to whole pages.

    With `lock`, all of it is in memory, and stays there where that is allowed.
    """

    __slots__ = ("_begin", "_mapping", "_memory", "address", "bytes", "locked", "nbytes")

    def __init__(self, nbytes: int, *, lock: bool) -> None:
        self.nbytes = round_up(max(nbytes, 1))
        # Ordinary pages behind: no more than asked for.
        huge_bytes = self.nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        # Room to begin at a boundary; never touched.
        slack_bytes = HUGE_PAGE_BYTES if huge_bytes else 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mapping = mmap.mmap(-1, self.nbytes + slack_bytes, flags=flags)
        begin = (
            -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % HUGE_PAGE_BYTES
            if huge_bytes
            else 0
        )
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A kernel without huge pages uses ordinary ones.
            with contextlib.suppress(OSError):
                mapping.madvise(mmap.MADV_NOHUGEPAGE)
                if huge_bytes:
                    mapping.madvise(mmap.MADV_HUGEPAGE, begin, huge_bytes)
        self._mapping, self._begin = mapping, begin
        self._memory = memoryview(mapping)[begin : begin + self.nbytes]
        # [nbytes] uint8.
        self.bytes: torch.Tensor = torch.frombuffer(self._memory, dtype=torch.uint8)
        # Address of the first byte.
        self.address: int = self.bytes.data_ptr()
        self.locked = lock and self._mlock()
        # Fault all pages in now, so that the memory in use shows.
        if lock and not self.locked:
            self._call("madvise", 0, self.nbytes, MADV_POPULATE_WRITE)

    def _call(self, function: str, start: int, nbytes: int, *arguments: int) -> bool:
        """mlock, munlock or madvise on bytes of the buffer; whether it worked."""
        address = ctypes.c_void_p(self.address + start)
        return getattr(LIBC, function)(address, ctypes.c_size_t(nbytes), *arguments) == 0

    def _mlock(self) -> bool:
        if self._call("mlock", 0, self.nbytes):
            return True
        reason = os.strerror(ctypes.get_errno())
        warnings.warn(
            f"weights could not be locked in memory (mlock: {reason}); the system may page them "
            "out. Raise the limit with `ulimit -l unlimited` or in /etc/security/limits.conf",
            RuntimeWarning,
            stacklevel=2,
        )
        return False

    def release_from(self, start_byte: int) -> None:
        """Give whole pages from `start_byte` on back to the system; what lies before them stays as
        it is.
        """
        start = round_up(start_byte)
        if start >= self.nbytes:
            return
        self._call("munlock", start, self.nbytes - start)
        self._mapping.madvise(mmap.MADV_DONTNEED, self._begin + start, self.nbytes - start)
        self.nbytes = start

    def memory(self, start_byte: int, nbytes: int) -> memoryview:
        """A writable view of `nbytes` from `start_byte`, for a read to fill."""
        return self._memory[start_byte : start_byte + nbytes]

    def tensor(self, start_byte: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor over the bytes from `start_byte`, at any alignment; no copy is made."""
        count = 1
        for size in shape:
            count *= size
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start_byte).view(
            shape
        )

"""Page-aligned memory for weights: buffers that hold locked tensors for good, and the slots of the window.

Each buffer is a private anonymous mapping, in huge pages where the kernel has them (fewer pages to pin for a direct
read, fewer TLB misses for a kernel that streams through it: docs/log.md), and begins at the boundary of one; locked with mlock so that the kernel cannot take back
what the plan counted on. This is the only caller of mlock, madvise and mallopt. A buffer lives as long as something refers
to it or to a tensor made from it; there is nothing to free by hand.
"""

import contextlib
import ctypes
import mmap
import os
import warnings

import torch

PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 2 << 20
M_MMAP_THRESHOLD = -3  # malloc.h
MMAP_THRESHOLD_BYTES = 128 << 10  # glibc's own first value; naming it keeps it there
_LIBC = ctypes.CDLL(None, use_errno=True)


def return_freed_memory() -> None:
    """Have glibc give large blocks back to the system when they are freed, instead of keeping them in its heap.

    By default it learns to keep them, and the activations of a long prompt leave a heap several times their size behind
    (measured: 100 MB for 1,000 tokens of a 135M model, 10 MB so). Without glibc this does nothing.
    """
    mallopt = getattr(_LIBC, "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)


def round_up(nbytes: int, multiple: int = PAGE_BYTES) -> int:
    """The smallest multiple of `multiple` that is at least `nbytes`."""
    return -(-nbytes // multiple) * multiple


class Buffer:
    """`nbytes` of page-aligned memory, rounded up to whole pages."""

    __slots__ = ("_memory", "bytes", "locked", "nbytes")

    def __init__(self, nbytes: int, *, lock: bool) -> None:
        self.nbytes = round_up(max(nbytes, 1))
        huge_bytes = (
            self.nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        )  # ordinary pages behind: no more than asked for
        slack_bytes = HUGE_PAGE_BYTES if huge_bytes else 0  # to begin at a boundary; never touched
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mapping = mmap.mmap(-1, self.nbytes + slack_bytes, flags=flags)
        begin = (
            -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % HUGE_PAGE_BYTES if huge_bytes else 0
        )
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary ones do
                mapping.madvise(mmap.MADV_NOHUGEPAGE)
                if huge_bytes:
                    mapping.madvise(mmap.MADV_HUGEPAGE, begin, huge_bytes)
        self._memory = memoryview(mapping)[begin : begin + self.nbytes]
        self.bytes: torch.Tensor = torch.frombuffer(self._memory, dtype=torch.uint8)  # [nbytes] uint8
        self.locked = lock and self._mlock()

    def _mlock(self) -> bool:
        if _LIBC.mlock(ctypes.c_void_p(self.bytes.data_ptr()), ctypes.c_size_t(self.nbytes)) == 0:
            return True
        reason = os.strerror(ctypes.get_errno())
        warnings.warn(
            f"weights could not be locked in memory (mlock: {reason}); the system may page them out. "
            "Raise the limit with `ulimit -l unlimited` or in /etc/security/limits.conf",
            RuntimeWarning,
            stacklevel=2,
        )
        return False

    def memory(self, start_byte: int, nbytes: int) -> memoryview:
        """A writable view of `nbytes` from `start_byte`, for a read to fill."""
        return self._memory[start_byte : start_byte + nbytes]

    def tensor(self, start_byte: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor over the bytes from `start_byte`, at any alignment; no copy is made."""
        count = 1
        for size in shape:
            count *= size
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start_byte).view(shape)

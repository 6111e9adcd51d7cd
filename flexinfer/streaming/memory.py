"""Page-aligned memory for weights: buffers that hold locked tensors for good, and the slots of the window.

Each buffer is a private anonymous mapping, in huge pages where the kernel has them (fewer pages to pin for a direct
read, fewer TLB misses for a kernel that streams through it: docs/log.md), and begins at the boundary of one; locked with mlock so that
the kernel cannot take back what the plan counted on. This is the only caller of mlock, madvise and mallopt. A buffer lives as long as something refers
to it or to a tensor made from it; there is nothing to free by hand, and the end of one can be let go of while the rest is in use.
"""

import contextlib
import ctypes
import mmap
import os
import warnings
from pathlib import Path

import torch

PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 2 << 20
M_MMAP_THRESHOLD = -3  # malloc.h
MMAP_THRESHOLD_BYTES = 128 << 10  # glibc's own first value; naming it keeps it there
MADV_PAGEOUT = 21  # asm-generic/mman-common.h; Python names it from 3.13 on
MADV_POPULATE_WRITE = 23
_LIBC = ctypes.CDLL(None, use_errno=True)


def return_freed_memory() -> None:
    """Have glibc give large blocks back to the system when they are freed, instead of keeping them in its heap.

    By default it learns to keep them, and the activations of a long prompt leave a heap several times their size behind
    (measured: 100 MB for 1,000 tokens of a 135M model, 10 MB so). Without glibc this does nothing.
    """
    mallopt = getattr(_LIBC, "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)


def trim_heap() -> None:
    """Give back what glibc's heap holds and nobody uses, and keep large blocks out of it. Without glibc this does nothing."""
    malloc_trim = getattr(_LIBC, "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
        _plug_heap()


def _plug_heap() -> None:
    """Take the holes of glibc's heap that a large tensor would fit into, for good and without touching their pages.

    Blocks from MMAP_THRESHOLD_BYTES on are mapped one by one and go back when they are freed, but only where the heap has no hole for
    them. In the holes that a tokenizer leaves behind, the activations of a long prompt lie scattered and stay when they are freed
    (measured: 59 MB instead of the 40 that they take).
    """
    heap = next(
        (line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")), None
    )
    if heap is None:
        return
    start, stop = (int(address, 16) for address in heap.split(maxsplit=1)[0].split("-"))
    _LIBC.malloc.restype, _LIBC.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    _LIBC.free.restype, _LIBC.free.argtypes = None, [ctypes.c_void_p]
    nbytes = 1 << (stop - start).bit_length()
    while nbytes >= MMAP_THRESHOLD_BYTES // 2:
        block = _LIBC.malloc(nbytes)
        if block is None or not start <= block < stop:  # no hole of this size is left
            _LIBC.free(block)
            nbytes //= 2


def page_out_libraries() -> None:
    """Let go of the pages of mapped files that are as they are on disk: code and tables of libraries, for the most part.

    Importing touches four times as many of them as a pass does. Those that are needed come back when they are touched; the others
    would count as memory in use until the system has to look for some. Where the kernel does not offer it (before Linux 5.4),
    or does not allow it for a file, nothing happens.
    """
    _LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/") and "w" not in fields[1]:
            start, stop = (int(address, 16) for address in fields[0].split("-"))
            _LIBC.madvise(start, stop - start, MADV_PAGEOUT)


def round_up(nbytes: int, multiple: int = PAGE_BYTES) -> int:
    """The smallest multiple of `multiple` that is at least `nbytes`."""
    return -(-nbytes // multiple) * multiple


class Buffer:
    """`nbytes` of page-aligned memory, rounded up to whole pages. With `lock`, all of it is in memory, and stays there where that is allowed."""

    __slots__ = ("_begin", "_mapping", "_memory", "bytes", "locked", "nbytes")

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
        self._mapping, self._begin = mapping, begin
        self._memory = memoryview(mapping)[begin : begin + self.nbytes]
        self.bytes: torch.Tensor = torch.frombuffer(self._memory, dtype=torch.uint8)  # [nbytes] uint8
        self.locked = lock and self._mlock()
        if lock and not self.locked:  # in memory from the first, so that what is in use shows
            self._call("madvise", 0, self.nbytes, MADV_POPULATE_WRITE)

    def _call(self, function: str, start: int, nbytes: int, *arguments: int) -> bool:
        """mlock, munlock or madvise on bytes of the buffer; whether it worked."""
        address = ctypes.c_void_p(self.bytes.data_ptr() + start)
        return getattr(_LIBC, function)(address, ctypes.c_size_t(nbytes), *arguments) == 0

    def _mlock(self) -> bool:
        if self._call("mlock", 0, self.nbytes):
            return True
        reason = os.strerror(ctypes.get_errno())
        warnings.warn(
            f"weights could not be locked in memory (mlock: {reason}); the system may page them out. "
            "Raise the limit with `ulimit -l unlimited` or in /etc/security/limits.conf",
            RuntimeWarning,
            stacklevel=2,
        )
        return False

    def release_from(self, start_byte: int) -> None:
        """Give whole pages from `start_byte` on back to the system; what lies before them stays as it is."""
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
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start_byte).view(shape)

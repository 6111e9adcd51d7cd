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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    are no longer memory of this process. Where the kernel cannot page them out (before 5.4, or files of somebody else's that others use
    too) they are at least no longer mapped here.
    """
    for library in _libraries():
        _advise(library, MADV_PAGEOUT)
        if not library.changed:
            _advise(library, mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class _Library:
    """A file, or a part of one, that is mapped and not written to. Addresses."""

    start: int
    stop: int
    changed: bool  # in some page, as by the linker before it was made read-only: that page is nowhere else


def _libraries() -> Iterator[_Library]:
    start = stop = 0  # of none
    with Path("/proc/self/smaps").open() as lines:  # line by line: of a large process they are megabytes
        for line in lines:
            fields = line.split(maxsplit=5)
            if not fields[0].endswith(":"):  # the line that begins a mapping
                of_file = len(fields) == 6 and fields[5].startswith("/") and "w" not in fields[1]
                start, stop = (int(address, 16) for address in fields[0].split("-")) if of_file else (0, 0)
            elif fields[0] == "Anonymous:" and stop:
                yield _Library(start, stop, changed=fields[1] != "0")


def _advise(library: _Library, advice: int) -> None:
    """Where it is not known or not allowed nothing happens."""
    _LIBC.madvise(ctypes.c_void_p(library.start), ctypes.c_size_t(library.stop - library.start), advice)


@dataclass(frozen=True, slots=True)
class LibraryPages:
    """Pages of libraries, by address. Locked they stay in memory, in a control group that is full too.

    There the system takes such pages first, for it can have them again, and with each it reads as many around it as the disk reads ahead
    (8 MiB on some machines, and for code whatever madvise says), which push out the next ones: up to 67 GiB were read for a token.
    """

    ranges: tuple[tuple[int, int], ...] = ()  # start and stop

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def lock(self) -> None:
        """Where it is not allowed nothing happens; a `Buffer` says so."""
        _lockers.append(self)
        self._call("mlock")

    def unlock(self) -> None:
        """Those that another model has locked too stay locked."""
        if self in _lockers:
            _lockers.remove(self)
            self._call("munlock")
            for pages in list(_lockers):
                pages._call("mlock")

    def _call(self, function: str) -> None:
        for start, stop in self.ranges:
            getattr(_LIBC, function)(ctypes.c_void_p(start), ctypes.c_size_t(stop - start))


_lockers: list[LibraryPages] = []  # of this process, as its pages are: the system counts no locks


def library_pages() -> LibraryPages:
    """Those that are mapped now; none where the system does not tell."""
    ranges: list[tuple[int, int]] = []
    with contextlib.suppress(OSError), Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for library in _libraries():
            pagemap.seek(library.start // PAGE_BYTES * 8)
            entries = np.frombuffer(pagemap.read((library.stop - library.start) // PAGE_BYTES * 8), np.uint64)
            there = np.flatnonzero(np.diff(entries >> np.uint64(63) == 1, prepend=False, append=False))
            ranges += [
                (library.start + i * PAGE_BYTES, library.start + j * PAGE_BYTES)
                for i, j in there.reshape(-1, 2).tolist()
            ]
    return LibraryPages(tuple(ranges))


def round_up(nbytes: int, multiple: int = PAGE_BYTES) -> int:
    """The smallest multiple of `multiple` that is at least `nbytes`."""
    return -(-nbytes // multiple) * multiple


class Buffer:
    """`nbytes` of page-aligned memory, rounded up to whole pages. With `lock`, all of it is in memory, and stays there where that is allowed."""

    __slots__ = ("_begin", "_mapping", "_memory", "address", "bytes", "locked", "nbytes")

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
        self.address: int = self.bytes.data_ptr()  # of the first byte
        self.locked = lock and self._mlock()
        if lock and not self.locked:  # in memory from the first, so that what is in use shows
            self._call("madvise", 0, self.nbytes, MADV_POPULATE_WRITE)

    def _call(self, function: str, start: int, nbytes: int, *arguments: int) -> bool:
        """mlock, munlock or madvise on bytes of the buffer; whether it worked."""
        address = ctypes.c_void_p(self.address + start)
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

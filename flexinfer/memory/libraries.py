"""Pages of mapped files, code and tables of libraries for the most part: let go after importing,
locked while a model runs.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexinfer.memory.buffer import LIBC, PAGE_BYTES

# From asm-generic/mman-common.h; Python has it from 3.13 on.
MADV_PAGEOUT = 21


def page_out_libraries() -> None:
    """Let go of the pages of mapped files that are as they are on disk: code and tables of
    libraries, for the most part.

    Importing touches four times as many of them as a pass does. Those that are needed come back
    when they are touched; the others are no longer memory of this process. Where the kernel cannot
    page them out (before 5.4, or files of somebody else's that others use too) they are at least no
    longer mapped here.
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
    # In some page, as by the linker before it was made read-only: that page is nowhere else.
    changed: bool


def _libraries() -> Iterator[_Library]:
    # Not inside a library yet.
    start = stop = 0
    # Line by line: of a large process they are megabytes.
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            fields = line.split(maxsplit=5)
            # The first line of a mapping.
            if not fields[0].endswith(":"):
                of_file = len(fields) == 6 and fields[5].startswith("/") and "w" not in fields[1]
                start, stop = (
                    (int(address, 16) for address in fields[0].split("-")) if of_file else (0, 0)
                )
            elif fields[0] == "Anonymous:" and stop:
                yield _Library(start, stop, changed=fields[1] != "0")


def _advise(library: _Library, advice: int) -> None:
    """Where it is not known or not allowed nothing happens."""
    LIBC.madvise(
        ctypes.c_void_p(library.start), ctypes.c_size_t(library.stop - library.start), advice
    )


@dataclass(frozen=True, slots=True)
class LibraryPages:
    """Pages of libraries, by address. Locked they stay in memory, in a control group that is full
    too.

    There the system takes such pages first, for it can have them again, and with each it reads as
    many around it as the disk reads ahead (8 MiB on some machines, and for code whatever madvise
    says), which push out the next ones: up to 67 GiB were read for a token.
    """

    # (start, stop) of each mapping.
    ranges: tuple[tuple[int, int], ...] = ()

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
            getattr(LIBC, function)(ctypes.c_void_p(start), ctypes.c_size_t(stop - start))


# Shared by the process, as its pages are: the system does not count locks.
_lockers: list[LibraryPages] = []


def library_pages() -> LibraryPages:
    """Those that are mapped now; none where the system does not tell."""
    ranges: list[tuple[int, int]] = []
    with (
        contextlib.suppress(OSError),
        Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap,
    ):
        for library in _libraries():
            pagemap.seek(library.start // PAGE_BYTES * 8)
            entries = np.frombuffer(
                pagemap.read((library.stop - library.start) // PAGE_BYTES * 8), np.uint64
            )
            there = np.flatnonzero(
                np.diff(entries >> np.uint64(63) == 1, prepend=False, append=False)
            )
            ranges += [
                (library.start + i * PAGE_BYTES, library.start + j * PAGE_BYTES)
                for i, j in there.reshape(-1, 2).tolist()
            ]
    return LibraryPages(tuple(ranges))

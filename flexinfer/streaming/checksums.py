"""What the pages of a file were when they were first seen, so that a later read can be told from a
damaged one (`verify=True`).

XXH3 (https://xxhash.com), of which 32 bits are kept for each page of 4 KiB: a thousandth of the
file, in memory and in the cache. Made by reading the file once; kept under its path, size and time
of change, so a file that is written anew has new ones. It tells damage (disk, cable, memory on the
way) from what was there at first, not whether that was what its author published.
"""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from xxhash import xxh3_64_intdigest

from flexinfer.cache_dir import in_cache, make_folder
from flexinfer.memory.buffer import PAGE_BYTES, Buffer

# Bytes read at a time.
MAKING_BYTES = 4 << 20
BITS = 0xFFFF_FFFF


class Checksums:
    """The checksum of each page of one file."""

    def __init__(self, pages: "array[int]", file_bytes: int) -> None:
        self._pages, self._file_bytes = pages, file_bytes

    def wrong_byte(self, offset_bytes: int, memory: memoryview) -> int | None:
        """Where the first page begins that is not what it was:

        `memory` holds the file from `offset_bytes` (a page's start) on.
        """
        whole = memory[: max(0, self._file_bytes - offset_bytes)]
        first = offset_bytes // PAGE_BYTES
        expected = self._pages[first : first + -(-len(whole) // PAGE_BYTES)]
        if array("I", _of_pages(whole)) == expected:
            return None
        wrong = next(
            i for i, (a, b) in enumerate(zip(_of_pages(whole), expected, strict=True)) if a != b
        )
        return offset_bytes + wrong * PAGE_BYTES


def checksums_of(
    files: Sequence[Path],
    folder: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[Path, Checksums]:
    """The checksums of `files`: from `folder` (None: the cache directory), or made now and kept
    there.

    Raises OSError where they cannot be read or kept.
    """
    all_bytes, done_bytes = sum(file.stat().st_size for file in files), 0
    found = {}
    for file in files:
        facts = file.stat()
        name = hashlib.sha256(
            f"{file.resolve()}:{facts.st_size}:{facts.st_mtime_ns}".encode()
        ).hexdigest()
        name = f"{name[:32]}.xxh3"
        kept = in_cache("checksums", name) if folder is None else folder / name
        count = -(-facts.st_size // PAGE_BYTES)
        if not kept.is_file() or kept.stat().st_size != 4 * count:
            make_folder(kept.parent, "verify")
            unfinished = kept.with_suffix(f".{os.getpid()}")
            try:
                with unfinished.open("wb") as stream:
                    for part in _read_through(file):
                        array("I", _of_pages(part)).tofile(stream)
                        done_bytes += len(part)
                        if progress is not None:
                            progress("verify", done_bytes, all_bytes)
                unfinished.rename(kept)
            finally:
                unfinished.unlink(missing_ok=True)
        pages = array("I")
        with kept.open("rb") as stream:
            pages.fromfile(stream, count)
        found[file] = Checksums(pages, facts.st_size)
    return found


def _of_pages(memory: memoryview) -> list[int]:
    return [
        xxh3_64_intdigest(memory[i : i + PAGE_BYTES]) & BITS
        for i in range(0, len(memory), PAGE_BYTES)
    ]


def _read_through(file: Path) -> Iterator[memoryview]:
    """The file's bytes, a few megabytes at a time, leaving nothing of them in the page cache."""
    buffer = Buffer(MAKING_BYTES, lock=False)
    memory = buffer.memory(0, MAKING_BYTES)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(memory):
            yield memory[:count]
            os.posix_fadvise(stream.fileno(), 0, stream.tell(), os.POSIX_FADV_DONTNEED)

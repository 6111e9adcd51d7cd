"""Bandwidth of direct reads, by several numbers of readers and sizes of requests."""

import contextlib
import mmap
import os
import threading
import time

REQUEST_BYTES = 4 << 20
WAYS_TO_READ = (  # readers, and bytes that each asks for at a time
    (1, REQUEST_BYTES),
    (2, REQUEST_BYTES),
    (4, REQUEST_BYTES),
    (4, 1 << 20),
)


def measure_bandwidth(
    files: list[str], seconds: float, threads: int = 2, request_bytes: int = REQUEST_BYTES
) -> float:
    """Bytes per second of direct reads of `request_bytes` by some threads, over `files` in turn.

    The first 0.3 s do not count.
    """
    blocks = [
        (file, at)
        for file in files
        for at in range(0, os.path.getsize(file) - request_bytes + 1, request_bytes)
    ]
    if not blocks:
        raise ValueError(
            f"files: {files} hold less than {request_bytes} bytes each: too small to measure a "
            "bandwidth"
        )
    lock, start_s = threading.Lock(), time.perf_counter()
    finished: list[tuple[float, int]] = []
    todo = iter(blocks * max(1, 1 + (64 << 30) // (len(blocks) * request_bytes)))

    def read() -> None:
        buffer = mmap.mmap(-1, request_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Without huge pages ordinary ones do, at a third less.
        with contextlib.suppress(AttributeError, OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        opened: dict[str, int] = {}
        try:
            while time.perf_counter() - start_s < seconds:
                with lock:
                    file, at = next(todo)
                if file not in opened:
                    opened[file] = _open_direct(file)
                got = os.preadv(opened[file], [buffer], at)
                with lock:
                    finished.append((time.perf_counter() - start_s, got))
        finally:
            for descriptor in opened.values():
                os.close(descriptor)

    workers = [threading.Thread(target=read) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    finished.sort()
    later = [(at_s, got) for at_s, got in finished if at_s >= 0.3]
    if len(later) < 2:
        later = finished
    first_s = (
        max([at_s for at_s, _ in finished if at_s < 0.3] or [0.0]) if later is not finished else 0.0
    )
    return sum(got for _, got in later) / (later[-1][0] - first_s)


def _open_direct(file: str) -> int:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        os.preadv(descriptor, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
        return descriptor
    except OSError:  # tmpfs and some overlays
        return os.open(file, os.O_RDONLY)

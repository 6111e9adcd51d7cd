"""What this machine has and can do: memory to spare, peak memory, and the two costs a plan is made with.

Costs are measured at load time, in well under a second: the bandwidth of reading the checkpoint's own files, and the
time the kernels take for one piece of each kind of weight.
"""

import contextlib
import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from time import perf_counter

import psutil
import torch

from flexinfer.kernels import Kernel
from flexinfer.plan import Costs, Piece, Weight
from flexinfer.streaming.memory import PAGE_BYTES, Buffer, round_up
from flexinfer.streaming.reader import FileReader

CACHE_BYTES = 32 << 20  # kernels are timed on as much, so that their bytes come from memory
SAMPLE_BYTES = 192 << 20  # long enough that a bandwidth limit has no burst left


def available_bytes() -> int:
    """Memory this process may have: what is free on the machine or in its cgroup, and what it has already, less 10 %."""
    own_bytes = psutil.Process().memory_info().rss
    limit_bytes = psutil.virtual_memory().available + own_bytes
    for limit_file in _cgroup_limit_files():
        with contextlib.suppress(OSError, ValueError):
            limit_bytes = min(limit_bytes, int(limit_file.read_text()))
    return int(limit_bytes * 0.9)


def _cgroup_limit_files() -> Iterator[Path]:
    """The memory limits this process is under, its own cgroup's and those above (v1 and v2)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            root, name = (Path("/sys/fs/cgroup"), "memory.max")
            if controllers:
                if "memory" not in controllers.split(","):
                    continue
                root, name = root / "memory", "memory.limit_in_bytes"
            here = root / group.lstrip("/")
            yield from (folder / name for folder in (here, *here.parents) if folder.is_relative_to(root))


def measure_costs(
    weights: Sequence[Weight],
    kernels: dict[str, Kernel],
    reader: FileReader,
    dtype: torch.dtype,
    io_threads: int,
    memory_bytes: int = CACHE_BYTES,
) -> Costs:
    """Bandwidth of reading the first SAMPLE_BYTES of weights, and the compute time of a pass from one piece of each role.

    Takes at most `memory_bytes`, or two pieces if that is more: the peak of a process must not be its measuring.
    """
    pieces = [piece for weight in weights for piece in weight.pieces]
    if not pieces:
        return Costs(bandwidth_bytes_per_s=math.inf, compute_s=0.0)
    sample = pieces[: bisect(list(accumulate(piece.nbytes for piece in pieces)), SAMPLE_BYTES) + 1]
    slot_bytes = round_up(max(piece.memory_bytes for piece in sample))
    io_threads = min(io_threads, max(1, memory_bytes // slot_bytes))
    start_s = perf_counter()
    with ThreadPoolExecutor(io_threads) as pool:
        buffer = Buffer(io_threads * slot_bytes, lock=False)  # one, as the window is: in huge pages

        def read_every(worker: int) -> None:
            for piece in sample[worker::io_threads]:
                reader.read(
                    piece.file,
                    piece.offset_bytes,
                    piece.nbytes,
                    buffer.memory(worker * slot_bytes, slot_bytes),
                )

        list(pool.map(read_every, range(io_threads)))
    bandwidth = sum(piece.nbytes for piece in sample) / (perf_counter() - start_s)
    del buffer
    buffer = Buffer(max(min(CACHE_BYTES, memory_bytes), 2 * max(p.nbytes for p in pieces)), lock=True)
    seconds_per_byte: dict[str, float] = {}
    for weight in weights:
        if weight.role not in seconds_per_byte:
            piece = weight.pieces[0]
            seconds_per_byte[weight.role] = (
                _compute_s(kernels[weight.name], piece, dtype, buffer) / piece.nbytes
            )
    return Costs(bandwidth, sum(w.nbytes * seconds_per_byte[w.role] for w in weights))


def peak_bytes() -> int:
    """The most memory this process ever had resident (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


def _compute_s(kernel: Kernel, piece: Piece, dtype: torch.dtype, buffer: Buffer, repeats: int = 9) -> float:
    """Median seconds of `kernel` for `piece` at one row, its bytes (zeros) from memory rather than from the CPU's cache."""
    rows = piece.row_stop - piece.row_start
    x = torch.ones(1, kernel.in_features, dtype=dtype)
    bias = torch.zeros(rows, dtype=dtype)
    samples = []
    for i in range(repeats):
        position = round_up(i * piece.nbytes) % (buffer.nbytes - piece.nbytes)
        start_s = perf_counter()
        kernel.multiply(x, kernel.view(buffer, position - position % PAGE_BYTES, rows), rows, bias)
        samples.append(perf_counter() - start_s)
    return sorted(samples)[repeats // 2]

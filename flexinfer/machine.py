"""What this machine has and can do: memory to spare, peak memory, and the two costs a plan is made with.

Costs are measured at load time, in well under a second: the bandwidth of reading the checkpoint's own files, and the
time the kernels take for one piece of each kind of weight.
"""

import contextlib
import math
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from time import perf_counter

import psutil
import torch

from flexinfer.draft import DraftCosts
from flexinfer.kernels import Kernel
from flexinfer.plan import Costs, Weight
from flexinfer.streaming.memory import PAGE_BYTES, Buffer, round_up
from flexinfer.streaming.reader import FileReader

DRAFT_ROWS = (1, 2, 5, 9, 17)  # of passes that are timed: candidates and one
CACHE_BYTES = 32 << 20  # kernels are timed on as much, so that their bytes come from memory
SAMPLE_BYTES = 192 << 20  # long enough that a bandwidth limit has no burst left
CGROUPS_FILE = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Memory this process may have: what is free on the machine and in its cgroups, and what it has already, less 10 %."""
    rooms = [psutil.virtual_memory().available, *_cgroup_rooms()]
    return int((anonymous_bytes() + min(rooms)) * 0.9)


def _cgroup_rooms() -> Iterator[int]:
    """Bytes that are free in this process's memory cgroup and in those above it (v1 and v2).

    Pages of files do not count as in use: the kernel takes them back when there is need.
    """
    for folder, limit_file, usage_file, reclaimable in _cgroup_folders():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            limit_bytes = int((folder / limit_file).read_text())
            used_bytes = int((folder / usage_file).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used_bytes -= sum(int(stat.get(field, 0)) for field in reclaimable)
            yield max(0, limit_bytes - max(0, used_bytes))


def _cgroup_folders() -> Iterator[tuple[Path, str, str, tuple[str, str]]]:
    """Each memory cgroup this process is in, its own first: folder, files of limit and usage, fields of reclaimable pages."""
    with contextlib.suppress(OSError):
        for line in CGROUPS_FILE.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                root, names = CGROUP_ROOT, ("memory.max", "memory.current")
                fields = ("inactive_file", "active_file")
            elif "memory" in controllers.split(","):
                root, names = CGROUP_ROOT / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
                fields = ("total_inactive_file", "total_active_file")
            else:
                continue
            here = root / group.lstrip("/")
            for folder in (here, *here.parents):
                if folder.is_relative_to(root):
                    yield folder, *names, fields


def measure_costs(
    used: Sequence[tuple[Weight, Kernel]],
    reader: FileReader,
    dtype: torch.dtype,
    io_threads: int,
    memory_bytes: int = CACHE_BYTES,
) -> Costs:
    """Bandwidth of reading the first SAMPLE_BYTES of the weights that are `used` in a pass, and its compute time from one piece of
    each role.

    Takes at most `memory_bytes`, or two pieces if that is more: the peak of a process must not be its measuring.
    """
    pieces = [piece for weight, _ in used for piece in weight.pieces]
    if not pieces:
        return Costs(bandwidth_bytes_per_s=math.inf, compute_s=0.0)
    sample = pieces[: bisect(list(accumulate(piece.nbytes for piece in pieces)), SAMPLE_BYTES) + 1]
    slot_bytes = round_up(max(piece.memory_bytes for piece in sample))
    threads = min(io_threads, max(1, memory_bytes // slot_bytes))
    spans = [(piece.file, piece.offset_bytes, piece.nbytes) for piece in sample]
    bandwidth = read_speed(reader, spans, threads, slot_bytes)
    buffer = _zeros(used, memory_bytes)
    seconds_per_byte: dict[str, float] = {}
    for weight, kernel in used:
        if weight.role not in seconds_per_byte:
            piece = weight.pieces[0]
            rows = piece.row_stop - piece.row_start
            seconds_per_byte[weight.role] = kernel_s(kernel, rows, piece.nbytes, dtype, buffer) / piece.nbytes
    return Costs(bandwidth, sum(weight.nbytes * seconds_per_byte[weight.role] for weight, _ in used))


def measure_draft_costs(
    used: Sequence[tuple[Weight, Kernel]],
    substitutes: Mapping[str, Kernel],
    model_share: float,
    dtype: torch.dtype,
    memory_bytes: int = CACHE_BYTES,
) -> DraftCosts:
    """What passes of several rows take, and a draft pass: by `substitutes` of the weights, or a model with `model_share` of them.

    As `measure_costs`: from one piece of each role, in at most `memory_bytes` or two pieces.
    """
    rows_s = measure_rows(used, DRAFT_ROWS, dtype, memory_bytes)
    draft_s, seconds = 0.0, dict[str, float]()  # of a byte, by role
    if substitutes:
        buffer = _zeros(used, memory_bytes)
        for weight, _ in used:
            piece, rows = weight.pieces[0], weight.pieces[0].row_stop - weight.pieces[0].row_start
            if weight.role not in seconds:
                substitute = substitutes[weight.name]
                nbytes = substitute.view(buffer, 0, rows).nbytes
                seconds[weight.role] = kernel_s(substitute, rows, nbytes, dtype, buffer) / piece.nbytes
            draft_s += weight.nbytes * seconds[weight.role]
    alone_s = rows_s[0][1]
    return DraftCosts(rows_s, draft_s or model_share * alone_s, alone_s)


def measure_rows(
    used: Sequence[tuple[Weight, Kernel]],
    counts: Sequence[int],
    dtype: torch.dtype,
    memory_bytes: int = CACHE_BYTES,
) -> tuple[tuple[int, float], ...]:
    """(rows, seconds of computing a pass of so many rows) for each of `counts`: from one piece of each role, in at most
    `memory_bytes` or two pieces."""
    if not used:
        return tuple((count, 0.0) for count in counts)
    buffer = _zeros(used, memory_bytes)
    seconds: dict[tuple[str, int], float] = {}  # of a byte, by role and rows
    rows_s = dict.fromkeys(counts, 0.0)
    for weight, kernel in used:
        piece, rows = weight.pieces[0], weight.pieces[0].row_stop - weight.pieces[0].row_start
        for count in counts:
            if (weight.role, count) not in seconds:
                taken_s = kernel_s(kernel, rows, piece.nbytes, dtype, buffer, count, repeats=5)
                seconds[weight.role, count] = taken_s / piece.nbytes
            rows_s[count] += weight.nbytes * seconds[weight.role, count]
    return tuple(rows_s.items())


def _zeros(used: Sequence[tuple[Weight, Kernel]], memory_bytes: int) -> Buffer:
    """Pages of their own to time kernels on: unwritten ones are one page of zeros, which the CPU's cache holds."""
    largest_bytes = max(piece.nbytes for weight, _ in used for piece in weight.pieces)
    buffer = Buffer(max(min(CACHE_BYTES, memory_bytes), 2 * largest_bytes), lock=True)
    buffer.bytes.fill_(0)
    return buffer


def read_speed(
    reader: FileReader, spans: Sequence[tuple[Path, int, int]], threads: int, slot_bytes: int
) -> float:
    """Bytes per second of reading `spans` (file, offset in bytes, bytes) once, by some threads with memory of `slot_bytes` each."""
    start_s = perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        buffer = Buffer(threads * slot_bytes, lock=False)  # one, as the window is: in huge pages

        def read_every(worker: int) -> None:
            memory = buffer.memory(worker * slot_bytes, slot_bytes)
            for file, offset_bytes, nbytes in spans[worker::threads]:
                reader.read(file, offset_bytes, nbytes, memory)

        list(pool.map(read_every, range(threads)))
    return sum(nbytes for _, _, nbytes in spans) / (perf_counter() - start_s)


def kernel_s(
    kernel: Kernel,
    rows: int,
    nbytes: int,
    dtype: torch.dtype,
    buffer: Buffer,
    activation_rows: int = 1,
    repeats: int = 9,
) -> float:
    """Median seconds of `kernel` for `rows` of a weight, `nbytes` in all, which come from memory rather than from the CPU's cache:
    from one place of `buffer` after the other, which holds zeros and more than `nbytes`.
    """
    x = torch.ones(activation_rows, kernel.in_features, dtype=dtype)
    bias = torch.zeros(rows, dtype=dtype)
    samples = []
    for i in range(repeats):
        position = round_up(i * nbytes) % (buffer.nbytes - nbytes)
        start_s = perf_counter()
        kernel.multiply(x, kernel.view(buffer, position - position % PAGE_BYTES, rows), rows, bias)
        samples.append(perf_counter() - start_s)
    return sorted(samples)[repeats // 2]


def anonymous_bytes() -> int:
    """Memory of this process that is no page of a file: what the system cannot take back."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * PAGE_BYTES


def file_bytes() -> int:
    """Pages of mapped files that this process has in memory: libraries, for the most part."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * PAGE_BYTES


def peak_bytes() -> int:
    """The most memory this process had resident since `reset_peak` (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Count the peak from now on. Where the kernel does not allow it, the peak of the process's whole life counts."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")

"""The two costs that a plan is made with.

They are measured at load time, in well under a second: the bandwidth of reading the checkpoint's
own files, and the time the kernels take for one piece of each kind of weight.
"""

import math
from bisect import bisect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from time import perf_counter

import torch

from flexinfer.kernels import Kernel
from flexinfer.memory.buffer import PAGE_BYTES, Buffer, round_up
from flexinfer.plan.plan import Costs
from flexinfer.plan.weights import Weight
from flexinfer.streaming.reader import FileReader

# Kernels are timed on this much, so that their bytes come from memory.
CACHE_BYTES = 32 << 20
# Long enough that a bandwidth limit has no burst left.
SAMPLE_BYTES = 192 << 20


def measure_costs(
    used: Sequence[tuple[Weight, Kernel]],
    reader: FileReader,
    io_threads: int,
    memory_bytes: int = CACHE_BYTES,
) -> Costs:
    """Bandwidth of reading the first SAMPLE_BYTES of the weights that are `used` in a pass, and its
    compute time from one piece of each role.

    Takes at most `memory_bytes`, or two pieces if that is more: the peak of a process must not be
    its measuring.
    """
    pieces = [piece for weight, _ in used for piece in weight.pieces]
    if not pieces:
        return Costs(bandwidth_bytes_per_s=math.inf, compute_s=0.0)
    sample = pieces[: bisect(list(accumulate(piece.nbytes for piece in pieces)), SAMPLE_BYTES) + 1]
    slot_bytes = round_up(max(piece.memory_bytes for piece in sample))
    threads = min(io_threads, max(1, memory_bytes // slot_bytes))
    spans = [(piece.file, piece.offset_bytes, piece.nbytes) for piece in sample]
    bandwidth = read_speed(reader, spans, threads, slot_bytes)
    buffer = zeros(used, memory_bytes)
    seconds_per_byte: dict[str, float] = {}
    for weight, kernel in used:
        if weight.role not in seconds_per_byte:
            piece = weight.pieces[0]
            rows = piece.row_stop - piece.row_start
            seconds_per_byte[weight.role] = (
                kernel_s(kernel, rows, piece.memory_bytes, buffer) / piece.nbytes
            )
    return Costs(
        bandwidth, sum(weight.nbytes * seconds_per_byte[weight.role] for weight, _ in used)
    )


def measure_rows(
    used: Sequence[tuple[Weight, Kernel]], counts: Sequence[int], memory_bytes: int = CACHE_BYTES
) -> tuple[tuple[int, float], ...]:
    """(rows, seconds of computing a pass of so many rows) for each of `counts`: from one piece of
    each role, in at most `memory_bytes` or two pieces.
    """
    if not used:
        return tuple((count, 0.0) for count in counts)
    buffer = zeros(used, memory_bytes)
    # Seconds of a byte, by role and rows.
    seconds: dict[tuple[str, int], float] = {}
    rows_s = dict.fromkeys(counts, 0.0)
    for weight, kernel in used:
        piece, rows = weight.pieces[0], weight.pieces[0].row_stop - weight.pieces[0].row_start
        for count in counts:
            if (weight.role, count) not in seconds:
                taken_s = kernel_s(kernel, rows, piece.memory_bytes, buffer, count, repeats=5)
                seconds[weight.role, count] = taken_s / piece.nbytes
            rows_s[count] += weight.nbytes * seconds[weight.role, count]
    return tuple(rows_s.items())


def zeros(used: Sequence[tuple[Weight, Kernel]], memory_bytes: int) -> Buffer:
    """Pages of their own to time kernels on: unwritten ones are one page of zeros, which the CPU's
    cache holds.
    """
    largest_bytes = max(piece.memory_bytes for weight, _ in used for piece in weight.pieces)
    buffer = Buffer(max(min(CACHE_BYTES, memory_bytes), 2 * largest_bytes), lock=True)
    buffer.bytes.fill_(0)
    return buffer


def read_speed(
    reader: FileReader, spans: Sequence[tuple[Path, int, int]], threads: int, slot_bytes: int
) -> float:
    """Bytes per second of reading `spans` (file, offset in bytes, bytes) once, by some threads with
    memory of `slot_bytes` each.
    """
    start_s = perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        # One buffer in huge pages, as the window is.
        buffer = Buffer(threads * slot_bytes, lock=False)

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
    buffer: Buffer,
    activation_rows: int = 1,
    repeats: int = 9,
) -> float:
    """Median seconds of `kernel` for `rows` of a weight, `nbytes` in all, which come from memory
    rather than from the CPU's cache: from one place of `buffer` after the other, which holds zeros
    and more than `nbytes`.
    """
    x = torch.ones(activation_rows, kernel.in_features, dtype=kernel.dtype)
    bias = torch.zeros(rows, dtype=kernel.dtype)
    samples = []
    for i in range(repeats):
        position = round_up(i * nbytes) % (buffer.nbytes - nbytes)
        start_s = perf_counter()
        kernel.multiply(x, kernel.view(buffer, position - position % PAGE_BYTES, rows), rows, bias)
        samples.append(perf_counter() - start_s)
    return sorted(samples)[repeats // 2]

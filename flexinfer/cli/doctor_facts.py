"""What this machine will do: its disk, its kernels and its rights, measured in some seconds.

Mechanism: a scratch file of random bytes is written on the disk in question and read the ways the
engine can read it (direct and through the page cache, with one reader thread and more); the kernels
of the engine run on one weight of a 7B model, at one activation row and at many, its bytes coming
from memory rather than from the CPU's cache. `advice` turns the numbers into sentences; it is pure,
so that it can be tested without this machine. It measures peaks of a quiet machine: what else runs
at the time takes its share.
"""

import contextlib
import os
import platform
import resource
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import psutil
import torch

from flexinfer.formats.ggml_types import GgmlError
from flexinfer.kernels import Kernel
from flexinfer.kernels.dense import DenseKernel
from flexinfer.kernels.ggml import TYPES, GgmlKernel, library
from flexinfer.memory.buffer import Buffer
from flexinfer.memory.process import CGROUP_ROOT, available_bytes
from flexinfer.sizes import format_size
from flexinfer.streaming.costs import kernel_s, read_speed
from flexinfer.streaming.reader import FileReader

REQUEST_BYTES = 4 << 20
# Prefix of scratch directories.
SCRATCH = ".flexinfer-doctor-"
THREADS = (1, 2, 4)
# (out_features, in_features): an attention weight of a 7B model.
KERNEL_SHAPE = (4096, 4096)
# How often a kernel is timed, by activation rows.
REPEATS = {1: 7, 64: 3}
LOCK_TEST_BYTES = 64 << 20
# Weights of a 7B model in 4 bit.
EXAMPLE_BYTES = 3.8e9


@dataclass(frozen=True, slots=True)
class Facts:
    """What was measured. Speeds in bytes per second, sizes in bytes."""

    cpu: str
    cores: int
    # Processes that wanted a core in the last minute.
    load: float
    torch_threads: int
    # As torch names it.
    vector_width: str
    # Its version and its kernels for this CPU, or why there is none.
    ggml: str
    # What one process may take: what is free, or its cgroup's limit.
    memory_bytes: int
    path: str
    file_system: str
    free_disk_bytes: int
    direct_works: bool
    direct_note: str
    write_bytes_per_s: float
    # By the number of reader threads; empty if direct reads do not work.
    direct_bytes_per_s: dict[int, float]
    buffered_bytes_per_s: dict[int, float]
    # Bytes of weights a second at one row, by the kind of weight.
    kernel_bytes_per_s: dict[str, float]
    # Seconds of a kernel, by kind and activation rows.
    kernel_s: dict[str, dict[int, float]]
    # None if there is no limit.
    lock_limit_bytes: int | None
    # Whether LOCK_TEST_BYTES could be locked.
    lock_works: bool
    # Whether experiments can limit memory and read bandwidth.
    cgroups_writable: bool


def measure_machine(path: Path, size_bytes: int) -> Facts:
    """Measure the machine, its disk in directory `path` with a scratch file of at most
    `size_bytes`.

    Raises ValueError when `path` is no directory or its disk is too full for the file.
    """
    size_bytes, free_bytes = _checked_size(path, size_bytes)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=path, prefix=SCRATCH) as scratch:
        file = Path(scratch) / "blob"
        write_speed = _write(file, size_bytes)
        direct, note = {}, ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            works = _read_works(file)
            note = str(caught[0].message) if caught else ""
        if works:
            direct = {
                threads: _read_speed(file, size_bytes, threads, direct=True) for threads in THREADS
            }
        buffered = {
            threads: _read_speed(file, size_bytes, threads, direct=False) for threads in THREADS
        }
    kernels = _kernels()
    soft_limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lock_works = Buffer(LOCK_TEST_BYTES, lock=True).locked
    return Facts(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        load=load,
        torch_threads=torch.get_num_threads(),
        vector_width=torch.backends.cpu.get_cpu_capability(),
        ggml=_ggml(),
        memory_bytes=available_bytes(),
        path=str(path.resolve()),
        file_system=_file_system(path),
        free_disk_bytes=free_bytes,
        direct_works=works,
        direct_note=note,
        write_bytes_per_s=write_speed,
        direct_bytes_per_s=direct,
        buffered_bytes_per_s=buffered,
        kernel_bytes_per_s={
            name: nbytes / by_rows[1] for name, (nbytes, by_rows) in kernels.items()
        },
        kernel_s={name: by_rows for name, (_, by_rows) in kernels.items()},
        lock_limit_bytes=None if soft_limit == resource.RLIM_INFINITY else soft_limit,
        lock_works=lock_works,
        cgroups_writable=_cgroups_writable(),
    )


def _checked_size(path: Path, size_bytes: int) -> tuple[int, int]:
    """Bytes of the scratch file in directory `path`, and those that are free there."""
    if not path.is_dir():
        raise ValueError(
            f"path={str(path)!r} is no directory; name one on the disk the models lie on"
        )
    size_bytes = max(size_bytes // REQUEST_BYTES, 2 * max(THREADS)) * REQUEST_BYTES
    free_bytes = psutil.disk_usage(str(path)).free
    if free_bytes < size_bytes + (64 << 20):
        raise ValueError(
            f"size={format_size(size_bytes)} does not fit: {format_size(free_bytes)} are free at "
            f"{path}; give a smaller --size"
        )
    return size_bytes, free_bytes


def advice(facts: Facts) -> list[str]:
    """What the numbers mean for someone who wants to run a model here."""
    lines = []
    if facts.load > 0.5 * facts.cores:
        lines.append(
            f"The machine is busy (load {facts.load:.1f} on {facts.cores} cores): what it does "
            "alone is more than this; measure again when it is quiet."
        )
    best = max((*facts.direct_bytes_per_s.values(), *facts.buffered_bytes_per_s.values()))
    lines.append(f"Every GB of weights that is not in memory costs {1e9 / best:.2f} s a token.")
    if "Q4_K" in facts.kernel_bytes_per_s:
        half_s = max(EXAMPLE_BYTES / 2 / best, EXAMPLE_BYTES / facts.kernel_bytes_per_s["Q4_K"])
        lines.append(
            f"A 7B model in 4 bit (3.8 GB), half of it in memory: at most {1 / half_s:.2g} "
            "tokens/s; in memory as a whole "
            f"{facts.kernel_bytes_per_s['Q4_K'] / EXAMPLE_BYTES:.2g}."
        )
    if not facts.direct_works:
        lines.append(
            f"Direct reads do not work at {facts.path} ({facts.direct_note}); the engine reads "
            "through the page cache there. A directory on an ordinary disk (ext4, xfs, btrfs) is "
            "faster."
        )
    else:
        direct, buffered = (
            max(facts.direct_bytes_per_s.values()),
            max(facts.buffered_bytes_per_s.values()),
        )
        if buffered > 1.15 * direct:
            lines.append(
                f"Buffered reads are faster here ({shown_speed(buffered)} against "
                f"{shown_speed(direct)}): try --buffered."
            )
        threads = better_threads(facts.direct_bytes_per_s)
        if threads is not None:
            lines.append(
                f"This disk reads faster with {threads} reader threads than with 2: try "
                f"--io-threads {threads}."
            )
    slowest = min(facts.kernel_bytes_per_s, key=lambda name: facts.kernel_bytes_per_s[name])
    if facts.kernel_bytes_per_s[slowest] < best:
        lines.append(
            f"The {slowest} kernel takes {shown_speed(facts.kernel_bytes_per_s[slowest])} of "
            "weights, less than the disk gives: for such weights the CPU is the limit, and a "
            "larger budget will not help."
        )
    return [*lines, *_advice_on_limits(facts)]


def _advice_on_limits(facts: Facts) -> list[str]:
    """What this machine has too little of, and what to do."""
    lines = []
    if facts.memory_bytes < 2 << 30:
        lines.append(
            f"Only {format_size(facts.memory_bytes)} of memory are to be had; the process itself "
            "takes about 220 MiB of them."
        )
    if not facts.lock_works:
        limit = "unknown" if facts.lock_limit_bytes is None else format_size(facts.lock_limit_bytes)
        lines.append(
            f"Memory cannot be locked (limit {limit}), so the system may page weights out: `ulimit "
            "-l unlimited`, or raise memlock in /etc/security/limits.conf."
        )
    if not facts.cgroups_writable:
        lines.append(
            "Experiments cannot limit memory and read bandwidth here; run them as root, or where "
            "systemd-run --user works, or read their records as unlimited."
        )
    if facts.free_disk_bytes < 10e9:
        lines.append(
            f"{format_size(facts.free_disk_bytes)} of disk are free: a model of 7B in bf16 needs "
            "13 GB, in 4 bit 4 GB."
        )
    return lines


def better_threads(speeds: dict[int, float]) -> int | None:
    """The number of reader threads to take instead of the default of 2, or None if that is good
    enough.
    """
    best = max(speeds, key=lambda threads: speeds[threads])
    return best if best != 2 and speeds[best] > 1.2 * speeds[2] else None


def shown_speed(bytes_per_s: float) -> str:
    """For people."""
    return f"{bytes_per_s / 1e6:.0f} MB/s"


def _write(file: Path, size_bytes: int) -> float:
    """Write the scratch file, wait until it is on disk; bytes per second."""
    block = os.urandom(REQUEST_BYTES)
    start_s = perf_counter()
    with file.open("wb", buffering=0) as stream:
        for _ in range(size_bytes // REQUEST_BYTES):
            stream.write(block)
        os.fsync(stream.fileno())
    return size_bytes / (perf_counter() - start_s)


def _read_works(file: Path) -> bool:
    reader = FileReader([file], direct=True)
    reader.close()
    return reader.direct


def _read_speed(file: Path, size_bytes: int, threads: int, *, direct: bool) -> float:
    """Bytes per second of reading the whole file once, none of it in the page cache."""
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reader = FileReader([file], direct=direct)
    spans = [(file, offset, REQUEST_BYTES) for offset in range(0, size_bytes, REQUEST_BYTES)]
    try:
        return read_speed(reader, spans, threads, REQUEST_BYTES)
    finally:
        reader.close()


def kernel_times(name: str) -> tuple[int, dict[int, float]]:
    """Of a weight of KERNEL_SHAPE, stored as `name` ("bfloat16", "Q4_K"): its bytes, and the
    kernel's seconds by activation rows.
    """
    out_features, in_features = KERNEL_SHAPE
    if name in TYPES:
        dtype = torch.float32
        kernel: Kernel = GgmlKernel(in_features, TYPES[name], dtype)
        nbytes = out_features * TYPES[name].row_bytes(in_features)
    else:
        dtype = getattr(torch, name)
        kernel = DenseKernel(in_features, dtype, dtype)
        nbytes = out_features * in_features * dtype.itemsize
    # Several weights, so that none stays in the CPU's cache.
    buffer = Buffer(4 * nbytes, lock=False)
    buffer.bytes.zero_()
    return nbytes, {
        rows: kernel_s(kernel, out_features, nbytes, buffer, rows, repeats)
        for rows, repeats in REPEATS.items()
    }


def _kernels() -> dict[str, tuple[int, dict[int, float]]]:
    names: tuple[str, ...] = ("bfloat16", "float32")
    with contextlib.suppress(GgmlError):
        library()
        names += ("Q4_0", "Q4_K", "Q8_0")
    return {name: kernel_times(name) for name in names}


def _ggml() -> str:
    try:
        return f"{library().version}, {library().kernels}"
    except GgmlError as error:
        return str(error)


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _file_system(path: Path) -> str:
    """The type of the file system that `path` is on."""
    where = path.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if where.is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else "unknown"


def _cgroups_writable() -> bool:
    """Whether this process may make control groups for memory and reads (cgroup v1, v2)."""
    v1 = all(os.access(CGROUP_ROOT / name, os.W_OK) for name in ("memory", "blkio"))
    return v1 or os.access(CGROUP_ROOT / "cgroup.subtree_control", os.W_OK)

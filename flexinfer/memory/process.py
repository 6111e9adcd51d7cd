"""How much memory this process has, and may have."""

import contextlib
from collections.abc import Iterator
from mmap import PAGESIZE
from pathlib import Path

import psutil

CGROUPS_FILE = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Memory this process may have: what is free on the machine and in its cgroups, and what it has
    already, less 10 %.
    """
    rooms = [psutil.virtual_memory().available, *_cgroup_rooms()]
    return int((anonymous_bytes() + min(rooms)) * 0.9)


def _cgroup_rooms() -> Iterator[int]:
    """Bytes that are free in this process's memory cgroup and in those above it (v1 and v2).

    Pages of files do not count as in use: the kernel takes them back when there is need.
    """
    for folder, limit_file, usage_file, reclaimable in _cgroup_folders():
        # "max" is not a number and means no limit.
        with contextlib.suppress(OSError, ValueError):
            limit_bytes = int((folder / limit_file).read_text())
            used_bytes = int((folder / usage_file).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used_bytes -= sum(int(stat.get(field, 0)) for field in reclaimable)
            yield max(0, limit_bytes - max(0, used_bytes))


def _cgroup_folders() -> Iterator[tuple[Path, str, str, tuple[str, str]]]:
    """Each memory cgroup this process is in, its own first: folder, files of limit and usage,
    fields of reclaimable pages.
    """
    with contextlib.suppress(OSError):
        for line in CGROUPS_FILE.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                root, names = CGROUP_ROOT, ("memory.max", "memory.current")
                fields = ("inactive_file", "active_file")
            elif "memory" in controllers.split(","):
                root, names = (
                    CGROUP_ROOT / "memory",
                    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
                )
                fields = ("total_inactive_file", "total_active_file")
            else:
                continue
            here = root / group.lstrip("/")
            for folder in (here, *here.parents):
                if folder.is_relative_to(root):
                    yield folder, *names, fields


def anonymous_bytes() -> int:
    """Memory of this process that is no page of a file: what the system cannot take back."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * PAGESIZE


def file_bytes() -> int:
    """Pages of mapped files that this process has in memory: libraries, for the most part."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * PAGESIZE


def peak_bytes() -> int:
    """The most memory this process had resident since `reset_peak` (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Count the peak from now on.

    Where the kernel does not allow it, the peak of the process's whole life counts.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """Memory of this process that is resident now (RSS)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE

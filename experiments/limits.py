"""Memory, read-bandwidth and core limits of one measured run (DESIGN: Measuring).

Mechanism: a run gets control groups of its own, and its command enters them before it becomes the
measured program: a two-line shell writes its own pid into `cgroup.procs` and execs. cgroup v1 uses
the `memory` and `blkio` controllers, v2 `memory` and `io`; where this process may not make groups,
`systemd-run --scope` (root, else --user) is tried, and where that fails too the run is unlimited
and says why. Limits are read back from the kernel after they are set, so a record states what
bound, not what was asked for.

Clean-up is one path for every ending. A reaper (a shell asleep on a pipe that only this process
holds open) ends what is left inside the groups and removes them, when the pipe closes: on a normal
exit, an exception, Ctrl-C, or the death of this process by any signal.

Cost model: a read-bandwidth limit of b bytes/s makes n bytes read from the device take n / b, for
direct reads and for page faults of mapped files alike (tests/experiments/test_limits.py checks
both); reads served by the page cache are free, which is why a cell drops it first.

What it does not do: limit writes, the page cache that other groups already hold (shared libraries
mapped by another process are charged to that one), or the bandwidth of file systems without a block
device of their own (overlay, tmpfs, network): then `applied.note` says so. The systemd path needs
cgroup v2 and OOM policies (systemd 253).
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import TracebackType

from experiments.cgroups import (
    LimitError,
    Place,
    block_device,
    device_name,
    find_place,
    read_field,
    read_rbps,
    remove_stale_groups,
)

ENTER = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 125; shift; done; shift; exec "$@"'
REAP = """trap '' INT TERM HUP; read _; [ -z "$1" ] || echo "$2" > "$1"; shift 2
for group; do tries=0
while [ -d "$group" ] && ! rmdir "$group" 2>/dev/null && [ $tries -lt 200 ]; do
for pid in $(cat "$group/cgroup.procs"); do kill -KILL "$pid"; done
tries=$((tries+1)); sleep 0.05; done; done"""
SCOPE_REPORT = """report=$1; shift; group=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
cat "$group/memory.max" > "$report.memory"; cat "$group/io.max" > "$report.io"
"$@"; code=$?; cat "$group/memory.peak" > "$report.peak"
cat "$group/memory.events" > "$report.events"; exit $code"""


@dataclass(frozen=True, slots=True)
class Applied:
    """The limits in force, as the kernel reports them."""

    method: str  # v1 | v2 (control groups) | systemd | unlimited
    memory_bytes: int | None = None
    read_bytes_per_s: int | None = None
    # That the kernel reads ahead of a mapped file's faults, where it was set.
    read_ahead_kb: int | None = None
    device: str | None = None  # "major:minor name" of the disk that is limited
    note: str = ""  # what could not be limited, and why


@dataclass(frozen=True, slots=True)
class Usage:
    """What the groups counted: None where nothing counts."""

    peak_memory_bytes: int | None = None
    oom_kills: int | None = None


def core_set(cores: int | None) -> set[int]:
    """The first `cores` of the cores this process may use (all if None)."""
    usable = sorted(os.sched_getaffinity(0))
    if cores is not None and not 1 <= cores <= len(usable):
        raise LimitError(
            f"cores: {cores} asked for, {len(usable)} usable here; use 1 to {len(usable)}"
        )
    return set(usable[:cores])


def drop_page_cache(files: Iterable[Path], everything: bool = True) -> list[str]:
    """Forget cached pages of `files`, and of the whole machine where allowed.

    Returns what was done.
    """
    done = []
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)  # dirty pages cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    done.append("fadvise")
    with contextlib.suppress(OSError):
        if everything:
            Path("/proc/sys/vm/drop_caches").write_text("1")
            done.append("drop_caches")
    return done


class Limits:
    """Context manager: groups for one run, made on entry and gone after exit.

    Args:
        memory_bytes: cap on everything charged to the run, page cache included, without swap; None
            for no cap.
        read_bytes_per_s: cap on reads from the disk that holds `path`; None for no cap.
        read_ahead_kb: what the kernel reads ahead of buffered reads of that disk, for all who read
            it until exit; None leaves it.
        path: a file or directory on the disk to limit.
        root: the cgroup file system (tests pass an imitation).

    `applied` states the limits in force; `command(argv)` wraps a command so that it runs inside;
    `usage()` reads the counters and is valid until exit.
    """

    _numbers = count()

    def __init__(
        self,
        memory_bytes: int | None = None,
        read_bytes_per_s: int | None = None,
        path: Path = Path("."),
        root: Path = Path("/sys/fs/cgroup"),
        read_ahead_kb: int | None = None,
    ) -> None:
        for name, value in (("memory_bytes", memory_bytes), ("read_bytes_per_s", read_bytes_per_s)):
            if value is not None and value < 1 << 20:
                raise LimitError(
                    f"{name}: {value} is less than 1 MiB; give bytes, or None for no limit"
                )
        self.memory_bytes, self.read_bytes_per_s = memory_bytes, read_bytes_per_s
        self.path, self.root, self.read_ahead_kb = path, root, read_ahead_kb
        self.applied = Applied("unlimited")
        self.groups: list[Path] = []
        self._reaper: subprocess.Popen[bytes] | None = None
        self._scope: list[str] = []
        self._report: Path | None = None

    def __enter__(self) -> "Limits":
        if self.memory_bytes is None and self.read_bytes_per_s is None:
            return self
        place = find_place(self.root)
        try:
            if place.memory or place.io:
                self._make_groups(place)
            else:
                self._try_systemd(place.why_not)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._report is not None:
            shutil.rmtree(self._report.parent, ignore_errors=True)
        if self._reaper is None:
            return
        if self._reaper.stdin is not None:
            self._reaper.stdin.close()
        self._reaper.wait()
        self._reaper = None
        left = [group for group in self.groups if group.exists()]
        self.groups = []
        if left and kind is None:
            raise LimitError(
                f"groups: {left} could not be removed: a process inside cannot be ended"
            )

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` so wrapped that it runs inside the limits from its first instruction."""
        if self.groups:
            entries = [str(group / "cgroup.procs") for group in self.groups]
            return ["/bin/sh", "-c", ENTER, "enter", *entries, "--", *argv]
        if self._scope:
            return [*self._scope, "/bin/sh", "-c", SCOPE_REPORT, "scope", str(self._report), *argv]
        return list(argv)

    def usage(self) -> Usage:
        """Peak memory and out-of-memory kills so far (systemd: after the command has ended)."""
        if self._report is not None:
            return _usage(Path(f"{self._report}.peak"), Path(f"{self._report}.events"))
        for group in self.groups:
            for peak, events in (
                ("memory.max_usage_in_bytes", "memory.oom_control"),
                ("memory.peak", "memory.events"),
            ):
                if (group / events).exists():
                    return _usage(group / peak, group / events)
        return Usage()

    def _make_groups(self, place: Place) -> None:
        name = f"flexinfer-{os.getpid()}-{next(self._numbers)}"
        wanted = [place.memory] if self.memory_bytes is not None else []
        wanted += [place.io] if self.read_bytes_per_s is not None else []
        self.groups = sorted({parent / name for parent in wanted if parent is not None})
        self._reaper = subprocess.Popen(
            ["/bin/sh", "-c", REAP, "reaper", *self._read_ahead_before(), *map(str, self.groups)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for group in self.groups:
            remove_stale_groups(group.parent)
            group.mkdir()
        notes = [place.why_not] if place.why_not else []
        self.applied = Applied(place.method)
        if self.memory_bytes is not None and place.memory is not None:
            self.applied = replace(
                self.applied, memory_bytes=self._limit_memory(place.memory / name, place.method)
            )
        if self.read_bytes_per_s is not None and place.io is not None:
            try:
                device = block_device(self.path)
                rate = self._limit_reads(place.io / name, place.method, device)
                self.applied = replace(
                    self.applied, read_bytes_per_s=rate, device=f"{device} {device_name(device)}"
                )
            except LimitError as error:
                notes.append(str(error))
            except OSError as error:  # a device that the kernel does not throttle
                notes.append(
                    f"read_bytes_per_s: reads of {self.path} cannot be limited here ({error})"
                )
        if self.applied.memory_bytes is None and self.applied.read_bytes_per_s is None:
            self.applied = Applied("unlimited")
        if self.read_ahead_kb is not None:
            file = self._read_ahead_file()
            try:
                file.write_text(str(self.read_ahead_kb))
                self.applied = replace(self.applied, read_ahead_kb=int(file.read_text()))
            except OSError as error:
                notes.append(f"read_ahead_kb: cannot be set here ({error})")
        self.applied = replace(self.applied, note="; ".join(notes))

    def _read_ahead_file(self) -> Path:
        """Where the kernel has it, for the disk that holds `path`.

        Raises LimitError where there is no disk.
        """
        return Path(f"/sys/dev/block/{block_device(self.path)}/queue/read_ahead_kb")

    def _read_ahead_before(self) -> list[str]:
        """For the reaper: the file and what is to stand in it again, or two empty words."""
        if self.read_ahead_kb is None:
            return ["", ""]
        file = self._read_ahead_file()
        return [str(file), file.read_text().strip()]

    def _limit_memory(self, group: Path, method: str) -> int:
        size = str(self.memory_bytes)
        if method == "v2":
            (group / "memory.max").write_text(size)
            if (group / "memory.swap.max").exists():
                (group / "memory.swap.max").write_text("0")
            return int((group / "memory.max").read_text())
        (group / "memory.limit_in_bytes").write_text(size)
        if (group / "memory.memsw.limit_in_bytes").exists():
            (group / "memory.memsw.limit_in_bytes").write_text(size)
        else:
            (group / "memory.swappiness").write_text("0")
        applied_bytes = int((group / "memory.limit_in_bytes").read_text())
        around_bytes = read_field(group / "memory.stat", "hierarchical_memory_limit")
        if around_bytes is not None and around_bytes < applied_bytes:
            raise LimitError(
                f"memory_bytes: {size} asked for, but a group around this process allows "
                f"{around_bytes}; ask for less"
            )
        return applied_bytes

    def _limit_reads(self, group: Path, method: str, device: str) -> int:
        if method == "v2":
            (group / "io.max").write_text(f"{device} rbps={self.read_bytes_per_s}")
            return read_rbps((group / "io.max").read_text(), device)
        file = group / "blkio.throttle.read_bps_device"
        file.write_text(f"{device} {self.read_bytes_per_s}")
        return int(dict(line.split() for line in file.read_text().splitlines())[device])

    def _try_systemd(self, why_not: str) -> None:
        """A transient scope.

        A first scope that runs `true` shows which limits systemd really hands on.
        """
        program = shutil.which("systemd-run")
        if program is None:
            self.applied = Applied("unlimited", note=f"{why_not}; systemd-run is not installed")
            return
        properties, note = ["OOMPolicy=continue"], why_not
        if self.memory_bytes is not None:
            properties += [f"MemoryMax={self.memory_bytes}", "MemorySwapMax=0"]
        device = None
        if self.read_bytes_per_s is not None:
            try:
                device = block_device(self.path)
                properties.append(
                    f"IOReadBandwidthMax=/dev/{device_name(device)} {self.read_bytes_per_s}"
                )
            except LimitError as error:
                note += f"; {error}"
        scope = [
            program,
            "--scope",
            "--quiet",
            "--collect",
            *([] if os.geteuid() == 0 else ["--user"]),
        ]
        self._scope = scope + [part for each in properties for part in ("-p", each)]
        self._report = Path(tempfile.mkdtemp(prefix="flexinfer-scope-")) / "report"
        probe = subprocess.run(self.command(["true"]), capture_output=True, text=True, check=False)
        memory_bytes, rate = None, None
        with contextlib.suppress(OSError, ValueError):
            memory_bytes = int(Path(f"{self._report}.memory").read_text())
        with contextlib.suppress(OSError, LimitError):
            rate = read_rbps(Path(f"{self._report}.io").read_text(), device or "")
        if probe.returncode != 0 or (memory_bytes is None and rate is None):
            self._scope = []
            said = probe.stderr.strip().splitlines()[-1:] or ["its scopes carry no limits"]
            self.applied = Applied(
                "unlimited", note=f"{note}; systemd-run does not serve: {said[0]}"
            )
            return
        named = None if device is None or rate is None else f"{device} {device_name(device)}"
        self.applied = Applied("systemd", memory_bytes, rate, device=named, note=note)


def _usage(peak: Path, events: Path) -> Usage:
    try:
        return Usage(int(peak.read_text()), read_field(events, "oom_kill"))
    except (OSError, ValueError):  # memory.peak came with Linux 5.19
        return Usage(None, read_field(events, "oom_kill"))

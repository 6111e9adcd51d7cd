"""Limits bind, are counted, are stated, and leave nothing behind, however the run ends."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.cgroups import LimitError, block_device, find_place
from experiments.limits import Limits, core_set, drop_page_cache

PLACE = find_place()
needs_memory = pytest.mark.skipif(
    PLACE.memory is None, reason=f"no memory groups here: {PLACE.why_not}"
)
needs_io = pytest.mark.skipif(PLACE.io is None, reason=f"no read limits here: {PLACE.why_not}")
MIB = 1 << 20
READ = """
import mmap, os, sys, time
file, how = sys.argv[1:]
size = os.path.getsize(file)
descriptor = os.open(file, os.O_RDONLY | (os.O_DIRECT if how == "direct" else 0))
start_s = time.perf_counter()
if how == "direct":
    buffer, at = mmap.mmap(-1, 1 << 20), 0
    while at < size:
        at += os.preadv(descriptor, [buffer], at)
else:
    mapped = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    sum(mapped[at] for at in range(0, size, mmap.PAGESIZE))
print(size / (time.perf_counter() - start_s))
"""
OWNER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
from experiments.limits import Limits
with Limits(memory_bytes=64 << 20) as limits:
    child = subprocess.Popen(limits.command(["sleep", "600"]))
    while not any((group / "cgroup.procs").read_text().strip() for group in limits.groups):
        time.sleep(0.01)
    print(child.pid, *limits.groups, flush=True)
    time.sleep(600)
"""


def gone(paths: list[Path], within_s: float = 20.0) -> bool:
    """Whether all of `paths` vanish; the time is only how long a failure takes."""
    stop_s = time.monotonic() + within_s
    while any(path.exists() for path in paths) and time.monotonic() < stop_s:
        time.sleep(0.05)
    return not any(path.exists() for path in paths)


@pytest.fixture(scope="module")
def file_on_disk() -> Path:
    path = Path(__file__).parent / f".limits-{os.getpid()}.bin"  # /tmp may be in memory
    path.write_bytes(os.urandom(MIB) * 48)
    yield path
    path.unlink()


@needs_memory
def test_a_process_over_the_memory_limit_is_killed_and_counted() -> None:
    with Limits(memory_bytes=48 * MIB) as limits:
        groups = list(limits.groups)
        assert limits.applied.memory_bytes == 48 * MIB
        fits = subprocess.run(limits.command([sys.executable, "-c", "bytes(8 << 20)"]), check=False)
        assert (fits.returncode, limits.usage().oom_kills) == (0, 0)
        killed = subprocess.run(
            limits.command([sys.executable, "-c", "bytearray(96 << 20)[::4096]"]), check=False
        )
        usage = limits.usage()
    assert killed.returncode == -signal.SIGKILL
    assert usage.oom_kills == 1
    assert usage.peak_memory_bytes is not None
    assert 8 * MIB < usage.peak_memory_bytes <= 48 * MIB
    assert groups
    assert gone(groups, 0)


@needs_io
@pytest.mark.parametrize("how", ["direct", "mapped"])
def test_reads_are_no_faster_than_the_limit(file_on_disk: Path, how: str) -> None:
    limit = 40 * MIB
    drop_page_cache([file_on_disk], everything=False)
    with Limits(read_bytes_per_s=limit, path=file_on_disk) as limits:
        if limits.applied.read_bytes_per_s is None:
            pytest.skip(limits.applied.note)
        command = limits.command([sys.executable, "-c", READ, str(file_on_disk), how])
        rate = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert rate < 1.3 * limit


@needs_memory
def test_what_the_kernel_reads_ahead_is_set_and_set_back(file_on_disk: Path) -> None:
    file = Path(f"/sys/dev/block/{block_device(file_on_disk)}/queue/read_ahead_kb")
    if not os.access(file, os.W_OK):
        pytest.skip(f"{file} is not ours to write")
    before = file.read_text()
    with Limits(memory_bytes=64 * MIB, path=file_on_disk, read_ahead_kb=64) as limits:
        assert (limits.applied.read_ahead_kb, file.read_text()) == (64, "64\n")
    assert file.read_text() == before


@needs_memory
def test_what_is_left_inside_is_ended_when_the_body_fails() -> None:
    children: list[subprocess.Popen[bytes]] = []
    limits = Limits(memory_bytes=64 * MIB)
    groups: list[Path] = []

    def interrupted_run() -> None:
        with limits:
            groups.extend(limits.groups)
            children.append(subprocess.Popen(limits.command(["sleep", "600"])))
            while str(children[0].pid) not in (groups[0] / "cgroup.procs").read_text().split():
                time.sleep(0.01)  # else it finds the group gone, and ends by itself
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert children[0].wait(timeout=20) == -signal.SIGKILL
    assert groups
    assert gone(groups, 0)


@needs_memory
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_owner_is_killed(number: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert owner.stdout is not None
    pid, *groups = owner.stdout.readline().split()
    assert all(Path(group).exists() for group in groups)
    owner.send_signal(number)
    owner.wait(timeout=20)
    owner.stdout.close()
    assert gone([Path(group) for group in groups])
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def test_v1_groups_are_made_below_the_own_group(tmp_path: Path) -> None:
    (tmp_path / "memory" / "mine").mkdir(parents=True)
    (tmp_path / "memory" / "memory.limit_in_bytes").touch()
    (tmp_path / "blkio").mkdir()
    place = find_place(tmp_path, "4:memory:/mine\n7:blkio:/hidden/by/a/container\n")
    assert (place.method, place.memory, place.io) == (
        "v1",
        tmp_path / "memory" / "mine",
        tmp_path / "blkio",
    )


def test_v2_uses_the_nearest_group_that_hands_controllers_down(tmp_path: Path) -> None:
    inner = tmp_path / "user" / "session"
    inner.mkdir(parents=True)
    (tmp_path / "cgroup.controllers").write_text("memory io")
    for group in (tmp_path, tmp_path / "user"):
        (group / "cgroup.procs").touch()
        (group / "cgroup.subtree_control").write_text("memory io")
    place = find_place(tmp_path, "0::/user/session\n")
    assert (place.method, place.memory) == ("v2", tmp_path / "user")


def test_without_groups_a_run_is_unlimited_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with Limits(memory_bytes=64 * MIB, root=tmp_path) as limits:
        assert limits.command(["true"]) == ["true"]
        assert limits.applied.method == "unlimited"
        assert "no cgroup file system" in limits.applied.note
        assert "systemd-run is not installed" in limits.applied.note


def test_a_scope_that_limits_nothing_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "systemd-run"
    program.write_text('#!/bin/sh\nwhile [ "$1" != /bin/sh ]; do shift; done\nexec "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with Limits(memory_bytes=64 * MIB, root=tmp_path) as limits:
        assert limits.applied.method == "unlimited"
        assert "systemd-run does not serve" in limits.applied.note


def test_a_disk_is_named_for_files_that_are_yet_to_be_made() -> None:
    if file_system_in_memory(Path(__file__)):
        pytest.skip("this file system has no disk behind it")
    device = block_device(Path(__file__))
    assert block_device(Path(__file__).parent / "not" / "yet") == device
    assert not (Path("/sys/dev/block") / device / "partition").exists()


def test_a_partition_is_limited_through_its_disk(tmp_path: Path) -> None:
    if file_system_in_memory(Path(__file__)):
        pytest.skip("this file system has no disk behind it")
    number = Path(__file__).stat().st_dev
    disk = tmp_path / "disk"
    (disk / "part").mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    (disk / "part" / "partition").write_text("1\n")
    (tmp_path / f"{os.major(number)}:{os.minor(number)}").symlink_to(disk / "part")
    assert block_device(Path(__file__), sys_block=tmp_path) == "8:0"


def test_bad_limits_are_refused_by_name() -> None:
    with pytest.raises(LimitError, match="memory_bytes: 4096"):
        Limits(memory_bytes=4096)
    with pytest.raises(LimitError, match="cores: 4096 asked for"):
        core_set(4096)
    assert len(core_set(1)) == 1


def test_dropping_a_file_makes_the_next_read_go_to_the_disk(file_on_disk: Path) -> None:
    program = """
import json, sys
def read_bytes():
    lines = open("/proc/self/io").read().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])
before = read_bytes()
open(sys.argv[1], "rb").read()
print(json.dumps(read_bytes() - before))
"""
    command = [sys.executable, "-c", program, str(file_on_disk)]
    if file_system_in_memory(file_on_disk):
        pytest.skip("this file system has no disk behind it")
    drop_page_cache([file_on_disk], everything=False)
    first, second = (
        json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        for _ in range(2)
    )
    assert first >= 48 * MIB
    assert second < first / 2


def file_system_in_memory(path: Path) -> bool:
    return os.major(path.stat().st_dev) == 0


@needs_io
@needs_memory
def test_a_device_that_cannot_be_throttled_is_noted_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def refuse(*_: object) -> int:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(Limits, "_limit_reads", refuse)
    with Limits(memory_bytes=1 << 30, read_bytes_per_s=1 << 20, path=tmp_path) as limits:
        assert limits.applied.read_bytes_per_s is None
        assert limits.applied.memory_bytes == 1 << 30
        assert "cannot be limited here" in limits.applied.note
        done = subprocess.run(
            limits.command([sys.executable, "-c", "print(1)"]), capture_output=True, check=True
        )
    assert done.stdout == b"1\n"

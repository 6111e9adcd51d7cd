"""Where control groups can be made, and which disk a file lies on: what the kernel's file systems
say.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


class LimitError(ValueError):
    """A limit that was asked for cannot be made here."""


@dataclass(frozen=True, slots=True)
class Place:
    """Directories in which a group can be made, per controller, or why there is none."""

    method: str
    memory: Path | None
    io: Path | None
    why_not: str = ""


def block_device(path: Path, sys_block: Path = Path("/sys/dev/block")) -> str:
    """`major:minor` of the whole disk that holds `path` (or its nearest existing parent).

    Raises LimitError where the file system has no single block device (overlay, tmpfs, network).
    """
    path = path.absolute()
    while not path.exists():
        path = path.parent
    number = os.stat(path).st_dev
    # Btrfs and friends: an anonymous number, the mount's source names the device.
    if os.major(number) == 0:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        sources = [
            m[m.index("-") + 2] for m in mounts if m[2] == f"{os.major(number)}:{os.minor(number)}"
        ]
        if not sources or not sources[0].startswith("/dev/") or not Path(sources[0]).exists():
            kind = sources[0] if sources else "unknown"
            raise LimitError(
                f"path: {path} lies on no block device (mount source {kind}); reads cannot be "
                "limited"
            )
        number = os.stat(sources[0]).st_rdev
    name = f"{os.major(number)}:{os.minor(number)}"
    node = (sys_block / name).resolve()
    return (node.parent / "dev").read_text().strip() if (node / "partition").exists() else name


def device_name(device: str) -> str:
    """Kernel name of `major:minor`, for instance vda."""
    return Path(f"/sys/dev/block/{device}").resolve().name


def find_place(root: Path = Path("/sys/fs/cgroup"), own: str | None = None) -> Place:
    """Where this process may make groups. `own` is the text of /proc/self/cgroup."""
    lines = (own if own is not None else Path("/proc/self/cgroup").read_text()).split()
    paths = {
        name: part.split(":", 2)[2] for part in lines for name in part.split(":", 2)[1].split(",")
    }
    if (root / "memory" / "memory.limit_in_bytes").exists():
        found: dict[str, Path | None] = {}
        for controller in ("memory", "blkio"):
            base = root / controller
            nested = base / paths.get(controller, "/").lstrip("/")
            # A container may see its own group as the root.
            home = nested if nested.exists() else base
            found[controller] = home if os.access(home, os.W_OK) else None
        missing = [name for name, home in found.items() if home is None]
        why = f"no right to make groups under {root} for {', '.join(missing)}" if missing else ""
        return Place("v1", found["memory"], found["blkio"], why)
    if (root / "cgroup.controllers").exists():
        home = root / paths.get("", "/").lstrip("/")
        for parent in [home, *home.parents]:
            if not parent.is_relative_to(root):
                break
            given = parent / "cgroup.subtree_control"
            if not (
                given.exists()
                and os.access(parent, os.W_OK)
                and os.access(parent / "cgroup.procs", os.W_OK)
            ):
                continue
            for controller in {"memory", "io"} - set(given.read_text().split()):
                # Busy where processes live in it: then an ancestor serves.
                with contextlib.suppress(OSError):
                    given.write_text(f"+{controller}")
            passed = given.read_text().split()
            if "memory" in passed:
                return Place("v2", parent, parent if "io" in passed else None)
        return Place(
            "unlimited",
            None,
            None,
            f"no group under {root} that hands memory and io down and is ours to write",
        )
    return Place("unlimited", None, None, f"no cgroup file system at {root}")


def read_field(file: Path, name: str) -> int | None:
    try:
        rows = (line.split() for line in file.read_text().splitlines())
        return next((int(row[1]) for row in rows if row[0] == name), None)
    except OSError:
        return None


def read_rbps(text: str, device: str) -> int:
    for line in text.splitlines():
        if line.split()[0] == device:
            value = dict(part.split("=") for part in line.split()[1:]).get("rbps", "max")
            if value != "max":
                return int(value)
    raise LimitError(f"read_bytes_per_s: the kernel shows no read limit for {device}")


def abandoned(parent: Path, prefix: str) -> list[Path]:
    """What lies in `parent` under a name of `prefix`, a process id, '-' and more, whose process is
    gone.
    """
    found = []
    for path in parent.glob(f"{prefix}*-*"):
        owner = path.name.removeprefix(prefix).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            found.append(path)
    return found


def remove_stale_groups(parent: Path) -> None:
    """Remove empty groups whose maker is gone (a reaper killed with its maker leaves them)."""
    for group in abandoned(parent, "flexinfer-"):
        with contextlib.suppress(OSError):
            group.rmdir()

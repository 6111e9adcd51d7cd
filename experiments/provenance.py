"""Where a record was measured: machine, versions of the packages that matter, commit.

It reads /proc and /sys and asks git; it measures nothing. The machine is named by CPU, cores and
memory, so that records of one machine (or of machines of one kind) can stand in one figure, and
those of another cannot. A virtual machine's CPU says little by its name ("Intel Xeon Processor"),
so its widest vectors, which decide the kernels, belong to it.
"""

import contextlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from experiments.cgroups import LimitError, block_device
from experiments.records import Provenance

PACKAGES = (
    "flexinfer",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "transcribe_cpp_native",  # its ggml multiplies the blocks of GGUF files
    "llama_cpp_python",
    "gguf",
    "airllm",
    "ollm",
)
# A change elsewhere does not change what is measured.
CODE = ("flexinfer", "experiments", "conf", "scripts", "pyproject.toml")

WIDE_VECTORS = {"avx512f": "AVX-512", "amx_tile": "AMX"}  # flag of /proc/cpuinfo -> name


def provenance(checkpoint: Path, root: Path = Path(__file__).parents[1]) -> Provenance:
    """Of a measurement that starts now, here, on `checkpoint` (or its nearest existing parent)."""
    status = _git(root, "status", "--porcelain", "--", *CODE)
    return Provenance(
        versions=_versions(),
        git_commit=_git(root, "rev-parse", "HEAD") or "unknown",
        git_dirty=bool(status),
        cpu=cpu_name(Path("/proc/cpuinfo")),
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        kernel=platform.release(),
        file_system=_file_system(checkpoint),
        about=_about(checkpoint),
        started=datetime.now(UTC).replace(microsecond=0),
    )


def engine_commit(root: Path = Path(__file__).parents[1]) -> str:
    """The last commit that changed the engine or the harness; empty outside a checkout."""
    return _git(root, "log", "-1", "--format=%H", "--", "flexinfer", "experiments")


def cpu_name(cpuinfo: Path) -> str:
    """Name of the CPU, and AVX-512 and AMX where it has them."""
    name = _field(cpuinfo, "model name").replace("(R)", "").replace("(TM)", "")
    flags = _field(cpuinfo, "flags").split()
    wide = [label for flag, label in WIDE_VECTORS.items() if flag in flags]
    return ", ".join([name or platform.processor() or platform.machine(), *wide])


def _about(checkpoint: Path) -> dict[str, str]:
    """What else of the machine matters: CPU family, hypervisor, disk, what the kernel reads ahead,
    huge pages. What cannot be read is left out.
    """
    cpuinfo = Path("/proc/cpuinfo")
    family = [_field(cpuinfo, name) for name in ("cpu family", "model", "stepping")]
    found = {
        "cpu": "family {}, model {}, stepping {}".format(*family) if all(family) else "",
        "hypervisor": "yes" if "hypervisor" in _field(cpuinfo, "flags").split() else "",
        "huge_pages": _chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
    }
    with contextlib.suppress(LimitError, OSError):
        disk = Path("/sys/dev/block") / block_device(checkpoint.expanduser())
        driver = (disk / "device" / "driver").resolve().name
        found["disk"] = f"{disk.resolve().name}, {driver}"
        found["read_ahead_kb"] = (disk / "queue" / "read_ahead_kb").read_text().strip()
    return {name: value for name, value in found.items() if value}


def _chosen(file: Path) -> str:
    """The word in brackets, in a file of the kernel's that lists what can be chosen."""
    words = file.read_text().split() if file.exists() else []
    return next((word.strip("[]") for word in words if word.startswith("[")), "")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _field(file: Path, name: str) -> str:
    """The value of the first 'name : value' line of a /proc file, or ''."""
    if not file.exists():
        return ""
    lines = (line.partition(":") for line in file.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def _file_system(path: Path) -> str:
    """Type of the file system that holds `path`."""
    path = path.expanduser().absolute()
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "unknown"
    held = [(Path(line.split()[1]), line.split()[2]) for line in mounts.read_text().splitlines()]
    return max(
        ((mount, kind) for mount, kind in held if path.is_relative_to(mount)),
        key=lambda one: len(one[0].parts),
    )[1]

"""What a machine has to spare: its own free memory, and the least that its control groups leave."""

from pathlib import Path

import pytest

from flexinfer.memory import process as machine
from flexinfer.memory.process import available_bytes

GIB = 1 << 30


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize("version", [1, 2])
def test_what_others_in_the_group_use_is_not_to_spare_and_pages_of_files_are(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cgroup"
    if version == 1:
        line, parent = "4:memory:/box/inner\n", root / "memory/box"
        limit, usage, field = (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        )
    else:
        line, parent = "0::/box/inner\n", root / "box"
        limit, usage, field = "memory.max", "memory.current", "inactive_file"
    group(parent, {limit: f"{4 * GIB}\n", usage: f"{3 * GIB}\n", "memory.stat": f"{field} {GIB}\n"})
    group(parent / "inner", {limit: "max\n", usage: f"{GIB}\n", "memory.stat": f"{field} 0\n"})
    (tmp_path / "self").write_text(line)
    monkeypatch.setattr(machine, "CGROUP_ROOT", root)
    monkeypatch.setattr(machine, "CGROUPS_FILE", tmp_path / "self")
    monkeypatch.setattr(machine, "anonymous_bytes", lambda: GIB)
    monkeypatch.setattr(
        machine.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB})
    )
    assert available_bytes() == pytest.approx(0.9 * (GIB + 2 * GIB), abs=1)
    (parent / usage).write_text(f"{5 * GIB}\n")
    assert available_bytes() == pytest.approx(0.9 * GIB, abs=1)

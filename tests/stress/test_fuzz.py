"""The fuzz targets read their seeds and a few hundred changes of them as documented, and the judge
sees what it is there for.
"""

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flexinfer.formats.tensors import CheckpointError
from tests.stress import fuzz_judge
from tests.stress.fuzz_judge import judge
from tests.stress.fuzz_targets import KEPT, TARGETS, Target

CHANGES = {"header": 300, "index": 300, "config": 60, "gguf": 200, "records": 150}


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_right_and_changes_of_them_are_read_as_documented(
    name: str, tmp_path: Path
) -> None:
    target = TARGETS[name]
    seeds = target.seeds(tmp_path)
    for seed in seeds:
        target.read(target.place(seed, tmp_path))
        assert judge(target, seed, tmp_path) is None
    keys = target.keys()
    for i in range(CHANGES[name]):
        changed = target.change(seeds[i % len(seeds)], i, keys)
        assert changed is not None
        assert judge(target, changed, tmp_path) is None, (i, changed)


@pytest.mark.parametrize("name", ["header", "index", "gguf"])
def test_a_change_follows_from_its_seed_and_leaves_the_keys_as_they_are(
    name: str, tmp_path: Path
) -> None:
    target = TARGETS[name]
    seed = target.seeds(tmp_path)[-1]
    keys = target.keys()
    first = [target.change(seed, i, keys) for i in range(200)]
    assert first == [target.change(seed, i, keys) for i in range(200)]
    assert keys == target.keys()
    assert len(set(first)) > 100
    assert target.change(b"neither JSON nor GGUF", 0, keys) is None


def target_that(reads: Callable[[Path], object]) -> Target:
    return replace(TARGETS["index"], place=_place, read=reads, errors=lambda: (CheckpointError,))


def _place(data: bytes, folder: Path) -> Path:
    (folder / "file").write_bytes(data)
    return folder / "file"


def _raise(error: Exception, cause: Exception | None = None) -> None:
    raise error from cause


def _caught(file: str) -> None:
    with contextlib.suppress(OSError):
        Path(file).read_text()


def _keep(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


LEFT: list[object] = []
READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "fine": (lambda file: file.read_bytes(), ""),
    "documented": (lambda file: _raise(CheckpointError(f"{file}: damaged")), ""),
    "another error": (lambda file: dict[str, int]()["x"], "KeyError in test_fuzz.py:<lambda>"),
    "no file named": (lambda file: _raise(CheckpointError("damaged")), "the file is not named"),
    "escapes": (
        lambda file: _raise(CheckpointError(f"{file}: \x1b[2J")),
        "a message with control characters",
    ),
    "endless": (
        lambda file: _raise(CheckpointError(f"{file}: {'x' * 9999}")),
        "a message without end",
    ),
    "out of memory": (
        lambda file: _raise(CheckpointError(f"{file}: no"), MemoryError()),
        "memory is asked for before sizes are checked",
    ),
    "memory": (lambda file: bytearray(os.urandom(1) * (200 << 20)), "memory"),
    "another file": (lambda file: Path("/etc/hostname").read_text(), "reached outside"),
    "above": (lambda file: (file.parent / ".." / "x").write_text(""), "reached outside"),
    "another file, its error caught": (lambda file: _caught("/etc/hostname"), "reached outside"),
    "keeping": (lambda file: _keep(file.parent / KEPT), ""),
    "writing": (lambda file: file.write_text(""), "reached outside"),
    "network": (lambda file: socket.getaddrinfo("localhost", 80), "reached outside"),
    "process": (lambda file: os.system("true"), "reached outside"),
    "question": (lambda file: input(), "reached outside"),
    "descriptor": (lambda file: LEFT.append(file.open()), "descriptors are left open"),
}


def test_an_input_that_takes_for_ever_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(file: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz_judge, "HANG_CPU_S", 0.1)
    found = judge(target_that(endless), b"{}", tmp_path)
    assert found is not None
    assert found.kind == "Hang in test_fuzz.py:endless"


@pytest.mark.parametrize("case", READERS)
def test_the_judge_sees(case: str, tmp_path: Path) -> None:
    reads, kind = READERS[case]
    found = judge(target_that(reads), b"{}", tmp_path)
    assert (found.kind if found else "") == kind
    for file in LEFT:
        file.close()  # type: ignore[attr-defined]
    LEFT.clear()
    Path("/etc/hostname").read_text()  # the watch is over

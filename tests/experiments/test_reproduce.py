"""`make reproduce`: every step is an experiment that composes, finished cells are not left, a step
that fails ends it.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.experiments.samples import ROOT, make_record, script

STEPS = "- {run: [+exp=smoke], minutes: 30}\n- {run: [+exp=fig5, rounds=2], minutes: 60}\n"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return script("reproduce")


def reproduce(tmp_path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "scripts/reproduce.py", "--results-dir", str(tmp_path), *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
    )


def test_all_of_its_steps_are_experiments(tmp_path: Path) -> None:
    done = reproduce(tmp_path, "--list")
    assert done.returncode == 0, done.stderr
    assert "hours left on" in done.stdout
    assert not list(tmp_path.iterdir()), "it measures nothing"
    for name in ("fig4", "fig5", "fig3", "ours/moe", "ours/resident", "sizes"):
        assert f"+exp={name}" in done.stdout


def test_minutes_left_are_those_of_the_cells_that_are_left(
    module: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "steps.yaml"
    file.write_text(STEPS)
    smoke, fig5 = module.steps_of(file, [])
    assert fig5.command == "python scripts/run.py +exp=fig5 rounds=2"
    half = set(sorted(fig5.keys)[: len(fig5.keys) // 2])
    assert fig5.minutes_left(half) == 30
    assert smoke.minutes_left(half) == 30
    assert smoke.minutes_left(set(smoke.keys)) == 0


def test_an_experiment_that_sweeps_counts_the_cells_of_all_its_jobs(
    module: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "steps.yaml"
    file.write_text("- {run: [+exp=ours/batches], minutes: 15}\n")
    (batches,) = module.steps_of(file, [])
    assert len(batches.keys) == 6  # conf/exp/ours/batches.yaml: 1, 2, 4, 8, 16 and 32 sequences


@pytest.mark.parametrize(("code", "calls"), [(0, 2), (3, 1)])
def test_a_step_that_fails_ends_it(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, calls: int
) -> None:
    file = tmp_path / "steps.yaml"
    file.write_text(STEPS)
    called: list[list[str]] = []

    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        called.append(command)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module, "provenance", lambda _: make_record().provenance)
    monkeypatch.setattr(
        sys, "argv", ["x", "--steps", str(file), "--results-dir", str(tmp_path / "results")]
    )
    assert module.main() == code
    assert len(called) == calls
    assert called[0][1:3] == ["scripts/run.py", "+exp=smoke"]

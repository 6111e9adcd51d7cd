"""The demo's picture and its refusals, from records made here; the demo itself is run by hand (make
demo).
"""

import subprocess
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest
from rich.console import Console

from experiments.config import SystemConfig
from experiments.records import Record
from experiments.runner import save
from tests.experiments.samples import ROOT, make_cell, make_record, script

matplotlib.use("Agg")


@pytest.fixture
def demo() -> ModuleType:
    return script("demo")


def measured_records(demo: ModuleType) -> list[Record]:
    return [
        make_record(
            make_cell(
                system=SystemConfig(name, label, format="bf16"),
                budget_bytes=demo.LARGE_LIMIT_BYTES,
                experiment="demo",
            ),
            token_s=[seconds] * 3,
            token_bytes=[nbytes] * 3,
            peak_memory_bytes=1400 << 20,
        )
        for name, label, seconds, nbytes in (
            ("transformers", "transformers", 8.0, 2_600_000_000),
            ("flexinfer", "FlexInfer", 4.0, 1_900_000_000),
        )
    ]


def test_the_large_half_ends_with_a_table_and_the_picture_it_names(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        for record in measured_records(demo):
            save(tmp_path / "results", record)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(demo, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(subprocess, "run", run)
    console = Console(record=True, width=300)
    assert demo.large_model(console)
    said = console.export_text()
    assert "0.25" in said
    assert Path(said.split("picture: ")[1].split()[0]).stat().st_size > 10_000


def test_the_picture_shows_speed_bytes_memory_and_the_share_of_the_bound(demo: ModuleType) -> None:
    records = measured_records(demo)
    panels = demo.draw(records).axes
    shown = [[text.get_text() for text in axes.texts] for axes in panels]
    heights = [[bar.get_height() for bar in axes.patches] for axes in panels]
    assert heights[0] == [pytest.approx(1 / 8), pytest.approx(1 / 4)]
    assert heights[1] == [pytest.approx(2.6), pytest.approx(1.9)]
    assert "limit" in shown[2]
    assert "bound" in shown[3]
    assert all(axes.get_ylim()[0] == 0 for axes in panels)


def test_a_disk_that_is_too_full_is_refused_first(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(demo, "NEEDED_BYTES", {"nothing-*": 1 << 60})
    monkeypatch.chdir(tmp_path)
    assert demo.main() == 2
    assert "FLEXINFER_CACHE" in capsys.readouterr().out


def test_the_limit_in_the_picture_is_that_of_the_experiment(demo: ModuleType) -> None:
    text = (ROOT / "conf" / "exp" / "ours" / "demo.yaml").read_text()
    assert f"grid: [{demo.LARGE_LIMIT_BYTES >> 20}MiB]" in text

"""The runner: turns, resuming, interruption.

Cells are measured by an imitation that is handed in.
"""

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from experiments import figures
from experiments.config import (
    BudgetConfig,
    CellConfig,
    DeviceConfig,
    RunConfig,
    SystemConfig,
    WorkloadConfig,
)
from experiments.model_config import ConfigError, ModelConfig, ShapeConfig, weight_bytes
from experiments.record_files import load_records
from experiments.records import Record
from experiments.runner import (
    Summary,
    cells_of,
    checkpoints,
    delete_checkpoints,
    results_tables,
    run,
)
from tests.experiments.samples import make_cell, make_record

HERE = make_record().provenance


def config(tmp_path: Path, **changes: object) -> RunConfig:
    told: dict[str, object] = {
        "model": ModelConfig("tiny", shape=ShapeConfig(64, 128, 2, 4, 2, 256)),
        "systems": {name: SystemConfig(name, name.upper()) for name in ("sync", "flexinfer")},
        "device": DeviceConfig("fixed", "ours", 500_000_000),
        "budget": BudgetConfig(["1GiB", "2GiB"]),
        "workload": WorkloadConfig(),
        "experiment": "test",
        "rounds": 2,
        "results_dir": str(tmp_path / "results"),
        "cache_dir": str(tmp_path / "cache"),
    }
    return RunConfig(**told | changes)  # type: ignore[arg-type]


class Imitation:
    """Stands for run_cell: makes a valid record, and does what `at` says at the n-th call."""

    def __init__(self, at: dict[int, Callable[[CellConfig], Record]] | None = None) -> None:
        self.at, self.cells = at or {}, list[CellConfig]()

    def __call__(self, cell: CellConfig) -> Record:
        self.cells.append(cell)
        return self.at.get(len(self.cells), make_record)(cell)


def interrupt(_cell: CellConfig) -> Record:
    raise KeyboardInterrupt


def failed(status: str) -> Callable[[CellConfig], Record]:
    empty = {"tokens": 0, "passes": 0, "token_s": [], "token_bytes": []}
    return lambda cell: make_record(cell, status=status, message="because", **empty)


def go(imitation: Imitation, *configs: RunConfig) -> tuple[Summary, str]:
    console = Console(file=StringIO(), width=200)
    summary = run(configs, imitation, HERE, console)
    assert isinstance(console.file, StringIO)
    return summary, console.file.getvalue()


def test_every_cell_is_measured_once_in_turns_and_recorded(tmp_path: Path) -> None:
    imitation = Imitation()
    summary, shown = go(imitation, config(tmp_path))
    assert summary == Summary(planned=8, skipped=0, measured=8)
    assert [cell.system.name for cell in imitation.cells] == ["sync", "flexinfer"] * 4
    assert len(load_records(tmp_path / "results")) == 8
    assert "[8/8, about 0 min left]" in shown
    assert "of its bound" in shown


def test_an_interrupted_run_goes_on_to_the_same_number_of_records(tmp_path: Path) -> None:
    summary, _ = go(Imitation({4: interrupt}), config(tmp_path))
    assert summary.interrupted
    assert summary.measured == len(load_records(tmp_path / "results")) == 3
    imitation = Imitation()
    summary, shown = go(imitation, config(tmp_path))
    assert (summary.skipped, summary.measured) == (3, 5)
    assert "3 of 8 cells are finished" in shown
    records = load_records(tmp_path / "results")
    assert len(records) == len({record.cell_key for record in records}) == 8


def test_a_record_cut_off_by_a_kill_is_measured_again(tmp_path: Path) -> None:
    go(Imitation(), config(tmp_path))
    [file] = (tmp_path / "results").rglob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-50])
    summary, _ = go(Imitation(), config(tmp_path))
    assert summary.measured == 1
    assert len(load_records(tmp_path / "results")) == 8


def test_resume_false_measures_again_and_keeps_both(tmp_path: Path) -> None:
    go(Imitation(), config(tmp_path))
    summary, _ = go(Imitation(), config(tmp_path, resume=False))
    assert summary.measured == 8
    assert len(load_records(tmp_path / "results")) == 16


@pytest.mark.parametrize(
    ("status", "again"),
    [("killed", 0), ("timeout", 0), ("unsupported", 0), ("error", 1), ("missing", 1)],
)
def test_a_failure_is_a_record_and_only_errors_and_missing_packages_are_tried_again(
    status: str, again: int, tmp_path: Path
) -> None:
    _, shown = go(Imitation({2: failed(status)}), config(tmp_path))
    assert f"{status}: because" in shown
    assert len(load_records(tmp_path / "results")) == 8
    summary, _ = go(Imitation(), config(tmp_path))
    assert summary.measured == again


@pytest.mark.parametrize(
    "other",
    [{"cpu": "Another CPU"}, {"versions": HERE.versions | {"flexinfer": "0.0.1"}}],
    ids=["machine", "engine"],
)
def test_records_of_another_machine_or_engine_do_not_count_as_finished(
    other: dict[str, object], tmp_path: Path
) -> None:
    go(Imitation(), config(tmp_path))
    assert go(Imitation(), config(tmp_path))[0].measured == 0
    there, console = HERE.model_copy(update=other), Console(file=StringIO())
    assert run([config(tmp_path)], Imitation(), there, console).measured == 8


def test_experiments_share_their_cells(tmp_path: Path) -> None:
    imitation = Imitation()
    both = [config(tmp_path), config(tmp_path, experiment="other", rounds=3)]
    summary, _ = go(imitation, *both)
    assert summary.planned == summary.measured == 12
    assert len(load_records(tmp_path / "results" / "test")) == 8
    assert len(load_records(tmp_path / "results" / "other")) == 4
    assert go(Imitation(), *both)[0].measured == 0


def test_systems_of_several_experiments_take_turns_in_whole_rounds(tmp_path: Path) -> None:
    imitation = Imitation()
    other = config(
        tmp_path, experiment="other", systems={"prefetch": SystemConfig("prefetch", "P")}
    )
    go(imitation, config(tmp_path), other)
    turns = [(cell.round, cell.budget_bytes // 2**30, cell.system.name) for cell in imitation.cells]
    assert turns == [
        (r, b, s) for r in (0, 1) for b in (1, 2) for s in ("sync", "flexinfer", "prefetch")
    ]


def test_events_of_a_traced_cell_go_beside_the_records(tmp_path: Path) -> None:
    spans = [("read", 0), ("compute", 0), ("compute", 1)] * 2  # two passes, a second for each span
    events = [
        {
            "kind": kind,
            "tensor": "t",
            "layer": layer,
            "start_s": 7.0 + i,
            "stop_s": 8.0 + i,
            "bytes": 5,
        }
        for i, (kind, layer) in enumerate(spans)
    ]
    go(
        Imitation({1: lambda cell: make_record(cell, events=events)}),
        config(tmp_path, rounds=1, trace=True),
    )
    [file] = (tmp_path / "results").rglob("*.jsonl")
    [traced] = [record for record in load_records(file) if record.events_file]
    last = [one | {"start_s": float(i), "stop_s": i + 1.0} for i, one in enumerate(events[3:])]
    assert figures.load_events(tmp_path / "results", traced) == last
    assert not traced.events


def test_records_do_not_carry_the_cache_directory(tmp_path: Path) -> None:
    go(Imitation(), config(tmp_path))
    assert str(tmp_path) not in "".join(
        file.read_text() for file in (tmp_path / "results").rglob("*.jsonl")
    )


def test_checkpoints_of_the_model_alone_are_deleted_when_its_cells_are_done(tmp_path: Path) -> None:
    kept, gone = (
        tmp_path / "cache" / "synthetic" / name for name in ("tiny2-q4_0-abc", "tiny-q4_0-abc")
    )
    for path in (kept, gone):
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(bytes(1000))
    go(Imitation(), config(tmp_path, delete_checkpoints=True))
    assert checkpoints(tmp_path / "cache") == [kept]
    assert delete_checkpoints(tmp_path / "cache") == 1000


def test_all_systems_use_one_checkpoint_which_is_deleted_at_the_end(tmp_path: Path) -> None:
    on_disk = []

    class Making(Imitation):
        def __call__(self, cell: CellConfig) -> Record:
            path = tmp_path / "cache" / "synthetic" / f"tiny-{cell.system.format}-abc"
            path.mkdir(parents=True, exist_ok=True)
            on_disk.append([path.name for path in checkpoints(tmp_path / "cache")])
            return super().__call__(cell)

    systems = {
        "a": SystemConfig("a", "A"),
        "b": SystemConfig("b", "B", kind="llama_cpp"),
        "c": SystemConfig("c", "C"),
    }
    summary, _ = go(Making(), config(tmp_path, systems=systems, delete_checkpoints=True))
    assert summary.measured == 12
    assert sorted(map(tuple, on_disk)) == [("tiny-q4_0-abc",)] * 12
    assert checkpoints(tmp_path / "cache") == []


def test_every_line_says_how_long_it_will_be(tmp_path: Path) -> None:
    _, said = go(Imitation(), config(tmp_path))
    lines = [line for line in said.splitlines() if line.startswith("[")]
    assert len(lines) == 8
    assert all(" min left]" in line for line in lines)


def test_fractions_refer_to_the_same_bytes_for_every_system(tmp_path: Path) -> None:
    systems = {"a": SystemConfig("a", "A"), "b": SystemConfig("b", "B", kind="llama_cpp")}
    shape = ShapeConfig(1024, 4096, 16, 8, 8, 256)
    cells = cells_of(
        config(
            tmp_path,
            systems=systems,
            budget=BudgetConfig([0.5]),
            model=ModelConfig("m", shape=shape),
        )
    )
    assert {cell.budget_bytes for cell in cells} == {weight_bytes(shape, "q4_0") // 2}


def test_a_model_by_path_is_as_big_as_its_files(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(bytes(3 * 2**20))
    (tmp_path / "model-2.safetensors").write_bytes(bytes(1 * 2**20))
    model = ModelConfig("path", kind="path", formats=["bf16"], path=str(tmp_path))
    assert model.name == tmp_path.name
    cells = cells_of(config(tmp_path, model=model, budget=BudgetConfig([0.5])))
    assert {cell.budget_bytes for cell in cells} == {2 * 2**20}


def test_a_path_without_weights_is_refused(tmp_path: Path) -> None:
    model = ModelConfig("path", kind="path", formats=["bf16"], path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"model\.path"):
        cells_of(config(tmp_path, model=model))


def test_the_tables_show_medians_and_failures() -> None:
    cell, other = make_cell(), make_cell(system=SystemConfig("x", "OTHER", format="q4_0"))
    elsewhere = make_cell(device=DeviceConfig("native", "ours"))
    console = Console(file=StringIO(), width=80)
    timed = make_record(cell, prefill_s={16: [2.0, 1.5, 7.0]})
    tables = results_tables(
        [make_record(cell), timed, failed("timeout")(other), make_record(elsewhere)]
    )
    assert [str(table.title) for table in tables] == ["tiny, q4_0, fixed", "tiny, q4_0, native"]
    for table in tables:
        console.print(table)
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    assert "0.333" in shown
    assert "timeout" in shown
    assert "prefill of 16, s" in shown
    assert " 2 " in shown

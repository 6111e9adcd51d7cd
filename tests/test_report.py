"""The log says what a load came to and why a run was as slow as it was, once for each text."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from flexinfer.observe.report import bottleneck, memory_stall_s, plan_line
from flexinfer.plan.plan import Costs, Overheads, Plan
from tests.conftest import Load, MakeCheckpoint, prompt

GIB = 1 << 30
PLAN = Plan(
    budget_bytes=4 * GIB,
    overheads=Overheads(0, 0, 0, 0, 0),
    policy="balanced",
    window_layers=None,
    slots=5,
    slot_bytes=4 << 20,
    locked_pieces={},
    locked_bytes=3 * GIB,
    locked_memory_bytes=3 * GIB,
    streamed_bytes=1_000_000_000,
    total_bytes=3 * GIB + 1_000_000_000,
    unused_bytes=0,
    costs=Costs(bandwidth_bytes_per_s=1e9, compute_s=0.1),
    bound_tokens_per_s=1.234,
    predicted_tokens_per_s=0.987,
)
START: dict[str, Any] = {
    "passes": 3,
    "tokens": 30,
    "bytes_read": 7,
    "reads": 5,
    "pass_s": 4.0,
    "compute_s": 1.0,
    "wait_s": 3.0,
    "peak_bytes": 1,
    "resyncs": 1,
    "wasted_bytes": 5,
    "major_faults": 100,
    "memory_stall_s": 9.0,
}


def after(**spent: float) -> dict[str, Any]:
    """The statistics when so much has been added to START."""
    return {name: value + spent.get(name, 0) for name, value in START.items()}


RUN: dict[str, float] = {"passes": 10, "pass_s": 10.0, "bytes_read": 9_500_000_000}


@pytest.mark.parametrize(
    ("spent", "expected"),
    [
        (
            RUN | {"wait_s": 8.3, "compute_s": 1.7},
            r"^disk: waiting 83% .* 0\.95 GB/s of 1\.00 GB/s measured$",
        ),
        (
            RUN | {"wait_s": 8.0, "compute_s": 2.0, "bytes_read": 5e9},
            r"^disk: waiting 80% .* 0\.50 GB/s of .* more io_threads or a larger window may help$",
        ),
        (
            RUN | {"wait_s": 0.9, "compute_s": 9.1, "bytes_read": 3e9},
            r"^kernels: computing 91% of the time, reads at 0\.30",
        ),
        (
            RUN | {"wait_s": 9.0, "compute_s": 1.0, "major_faults": 2500},
            r"^memory: 2500 major page faults in 10",
        ),
        (
            RUN | {"wait_s": 9.0, "compute_s": 1.0, "major_faults": 12, "memory_stall_s": 4.0},
            r"^memory: 40% of the time stalled for memory, 12 major",
        ),
        (RUN | {"wait_s": 9.0, "compute_s": 1.0, "major_faults": 100}, r"^disk: "),
        (
            RUN | {"wait_s": 9.0, "compute_s": 1.0, "resyncs": 200, "wasted_bytes": 2 << 30},
            r"^order: the readers were sent elsewhere 200 times in 10 passes and read 2.00 GiB",
        ),
        (
            RUN | {"wait_s": 9.0, "compute_s": 1.0, "resyncs": 2, "wasted_bytes": 1 << 20},
            r"^disk: ",
        ),
        ({}, r"^nothing: no pass"),
    ],
)
def test_the_bottleneck_is_named_with_its_figure(spent: dict[str, float], expected: str) -> None:
    assert re.search(expected, bottleneck(START, after(**spent), PLAN))


def test_the_plan_is_one_line() -> None:
    line = plan_line(PLAN)
    for part in (
        "4.00 GiB",
        "3.00 GiB of weights locked",
        "954 MiB streamed",
        "20 MiB",
        "0.987",
        "1.23",
    ):
        assert part in line
    assert "\n" not in line


def test_pressure_is_that_of_the_own_group(tmp_path: Path) -> None:
    assert memory_stall_s(tmp_path) == 0.0
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("12:cpu:/other\n0::/user.slice/run.scope\n")
    assert memory_stall_s(tmp_path) == 0.0
    group = tmp_path / "sys/fs/cgroup/user.slice/run.scope"
    group.mkdir(parents=True)
    (group / "memory.pressure").write_text(
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=2500000\nfull avg10=0.00 avg60=0.00 "
        "avg300=0.00 total=9\n"
    )
    assert memory_stall_s(tmp_path) == 2.5


def test_one_line_after_the_load_and_one_for_each_text(
    checkpoint: MakeCheckpoint, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="flexinfer")
    model = load(checkpoint("llama"), policy="none")
    assert caplog.messages == [plan_line(model.flexinfer.plan)]
    caplog.clear()
    model(prompt(), use_cache=False)
    for texts in range(3):
        model.generate(prompt(), max_new_tokens=6, eos_token_id=None)
        assert len(caplog.messages) == texts
    for _ in range(3):
        model(prompt(), use_cache=False)
    model.flexinfer.close()
    assert len(caplog.messages) == 3
    assert all(re.match("disk|kernels|memory", line) for line in caplog.messages)
    model.flexinfer.close()
    assert len(caplog.messages) == 3


def test_a_text_that_was_explained_is_not_explained_again(
    checkpoint: MakeCheckpoint, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(checkpoint("llama"), policy="none")
    model.generate(prompt(), max_new_tokens=4, eos_token_id=None)
    caplog.set_level(logging.INFO, logger="flexinfer")
    said = model.flexinfer.explain()
    assert caplog.messages == [said]
    model.flexinfer.close()
    assert caplog.messages == [said]

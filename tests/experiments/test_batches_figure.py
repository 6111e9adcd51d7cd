"""The table and the figure of several sequences at a time."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from experiments import batches, figures
from experiments.config import WorkloadConfig
from experiments.record_files import append_record
from experiments.records import Record
from tests.experiments.samples import make_cell, make_record


def record(count: int, pass_s: float) -> Record:
    cell = make_cell(experiment="batches", workload=replace(WorkloadConfig(), batch=count))
    said = [{"sequences": one, "tokens_per_s": 0.2 * one} for one in (1, count)]
    engine = {"batches": said, "plan": {"streamed_bytes": 2_000_000_000}}
    return make_record(
        cell, tokens=2 * count, passes=2, token_s=[pass_s] * 2, token_bytes=[10, 10], engine=engine
    )


def test_each_number_of_sequences_stands_beside_its_plan_and_the_bound_of_one(
    tmp_path: Path,
) -> None:
    records = [record(1, 5.0), record(4, 6.0), record(4, 8.0)]
    one, four = batches.table(records).to_dict("records")
    assert (one["sequences"], four["sequences"]) == (1, 4)
    assert (one["tokens_per_s"], four["tokens_per_s"]) == (0.2, pytest.approx((4 / 6 + 4 / 8) / 2))
    assert four["planned"] == pytest.approx(0.8)
    assert one["bound"] == four["bound"] == records[0].bound_tokens_per_s
    assert four["times_bound"] == pytest.approx(four["tokens_per_s"] / one["bound"])
    figure = batches.figure(records, "Several sequences")
    assert figure is not None
    assert [line.get_label() for line in figure.axes[0].lines] == [
        "planned",
        "FlexInfer",
        "bound of one sequence",
    ]
    plt.close(figure)
    for each in records:
        append_record(tmp_path / "batches" / "a.jsonl", each)
    assert figures.find_records(tmp_path, "") == {}
    assert len(next(iter(figures.find_records(tmp_path, "", "batches").values()))) == 3


def test_nothing_is_drawn_of_other_records() -> None:
    assert batches.figure([make_record()], "Several sequences") is None

"""Cells that decode with a draft: tokens of a pass are counted, a replayed pattern is what it says,
the table knows near ties.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from experiments import drafts, figures
from experiments.cell import run_cell
from experiments.config import SystemConfig, WorkloadConfig
from experiments.model_config import ConfigError, ModelConfig, ShapeConfig
from experiments.record_files import append_record, load_records
from experiments.records import Record
from experiments.texts import PERIOD, Replay
from tests.experiments.samples import make_cell, make_record

SHAPE = ShapeConfig(hidden=256, intermediate=512, layers=4, heads=4, kv_heads=2, vocab=8192)
REPLAYED = WorkloadConfig(
    "test", 6, 0, 3, 0.0, 300.0, max_tokens=25, context=64, timeout_s=300.0, replayed=[3]
)


def replayed_cell(tmp_path: Path, **options: Any) -> Record:
    name = "draft" if options else drafts.PLAIN
    return run_cell(
        make_cell(
            experiment="past",
            model=ModelConfig("tiny", formats=["bf16"], shape=SHAPE),
            system=SystemConfig(name, name, "flexinfer", "bf16", {"policy": "none"} | options),
            budget_bytes=1 << 30,
            workload=REPLAYED,
            cache_dir=str(tmp_path),
        )
    )


def test_a_replayed_pattern_sets_the_tokens_of_a_pass_and_no_token(tmp_path: Path) -> None:
    plain = replayed_cell(tmp_path)
    drafted = replayed_cell(tmp_path, draft="substitute", experiment={"draft_tokens": 8})
    assert (plain.message, drafted.message) == ("", "")
    assert plain.output_tokens == drafted.output_tokens
    assert (plain.tokens, plain.passes) == (24, 24)
    (text,) = drafted.engine["texts"]["replayed"]
    assert text["tokens_of_passes"] == [3, *[4] * 5, 1]
    assert drafted.tokens == sum(text["tokens_of_passes"])
    assert drafts.runs_of(drafted, "replayed")[1:6] == [3] * 5
    append_record(tmp_path / "past.jsonl", drafted)
    assert load_records(tmp_path / "past.jsonl") == [drafted]
    assert drafted.cell.workload.replayed == [3]
    (_, row) = drafts.table([plain, drafted]).to_dict("records")
    assert row["tokens_per_pass"] == pytest.approx(24 / 7)
    assert row["times_bound"] == pytest.approx(row["tokens_per_s"] / plain.bound_tokens_per_s)
    assert row["differ"] == 0


def test_a_replay_disagrees_after_each_run() -> None:
    replay = Replay([2, 0, 1], lambda: False)
    assert [i for i in range(12) if replay.disagree(i)] == [2, 3, 5, 8, 9, 11]


def test_a_replayed_text_comes_again_so_that_it_can_be_looked_up() -> None:
    replay, scores = Replay([100], lambda: False), torch.zeros(1, 4096)
    said = [
        int(replay(torch.zeros(1, position), scores).argmax()) for position in range(2 * PERIOD)
    ]
    assert said[:PERIOD] == said[PERIOD:]
    assert len(set(said)) == PERIOD


def test_near_ties_are_found_and_figures_of_one_token_a_pass_leave_drafts_out(
    tmp_path: Path,
) -> None:
    def record(system: str, answer: list[int], seconds: float) -> Record:
        cell = make_cell(experiment="past", workload=replace(WorkloadConfig(), texts=["chat"]))
        cell.system = replace(cell.system, name=system, label=system)
        text = {
            "answer": answer,
            "margins": [2.0, 0.01, 3.0],
            "tokens": 3,
            "passes": 2,
            "seconds": seconds,
        }
        text |= {"accepted": 1, "drafted": 2, "predicted_tokens_per_s": 3 / seconds}
        return make_record(cell, engine={"texts": {"chat": [text]}})

    records = [record(drafts.PLAIN, [1, 2, 3], 3.0), record("draft-q4_0", [1, 9, 9], 1.0)]
    rows = drafts.table(records).to_dict("records")
    assert [(row["differ"], row["margin"]) for row in rows][1] == (1, 0.01)
    assert rows[1]["tokens_per_s"] == pytest.approx(3.0)
    assert rows[1]["predicted"] == pytest.approx(1.0)
    figure = drafts.figure(records, "Past the bound")
    assert figure is not None
    assert "tokens/s" in figure.axes[0].get_ylabel()
    plt.close(figure)
    for one in records:
        append_record(tmp_path / "past" / "a.jsonl", one)
    assert figures.find_records(tmp_path, "") == {}
    assert len(next(iter(figures.find_records(tmp_path, "", "drafts").values()))) == 2


def test_texts_that_there_are_not_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"workload\.texts='poem'"):
        WorkloadConfig(texts=["poem"])
    with pytest.raises(ConfigError, match=r"leave workload\.texts empty"):
        WorkloadConfig(texts=["chat"], replayed=[1])


def test_replays_of_other_patterns_are_apart() -> None:
    def record(system: str, runs: list[int], seconds: float) -> Record:
        cell = make_cell(workload=replace(REPLAYED, replayed=runs))
        cell = replace(cell, system=replace(cell.system, name=system, label=system))
        text = {"answer": [], "margins": [], "tokens": 8, "passes": 2, "seconds": seconds}
        return make_record(
            cell, engine={"texts": {"replayed": [text | {"predicted_tokens_per_s": None}]}}
        )

    records = [
        record("flexinfer", [3], 8.0),
        record("draft-q4_0", [3], 4.0),
        record("draft-q4_0", [9], 2.0),
    ]
    told = drafts.table(records).set_index(["system", "text"])["tokens_per_s"]
    assert told["draft-q4_0", "replayed, 75% right"] == 2
    assert told["draft-q4_0", "replayed, 90% right"] == 4

"""A cell is one fresh process, and whatever happens to it is a record."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import resident
from experiments.cell import OthersCpu, run_cell
from experiments.cgroups import find_place
from experiments.checkpoints import describe_checkpoint
from experiments.child import Child, remove_stale_scratch, run_child
from experiments.config import CellConfig, DeviceConfig, SystemConfig, WorkloadConfig
from experiments.model_config import ModelConfig, ShapeConfig
from experiments.record_files import append_record, load_records
from experiments.runner import outcome
from experiments.systems import measured
from experiments.systems.bandwidth import REQUEST_BYTES
from tests.experiments.samples import make_cell, make_record

PLACE = find_place()
SHAPE = ShapeConfig(hidden=256, intermediate=512, layers=4, heads=4, kv_heads=2, vocab=8192)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory that keeps what several tests need: checkpoints and resident passes."""
    return tmp_path_factory.mktemp("cells")


def tiny_cell(
    cache_dir: Path, kind: str, format: str, budget_bytes: int, **options: Any
) -> CellConfig:
    return make_cell(
        model=ModelConfig("tiny", formats=["q4_0", "bf16"], shape=SHAPE),
        system=SystemConfig(kind, kind, kind, format, options),
        device=DeviceConfig("native", "this machine", cores=1),
        budget_bytes=budget_bytes,
        workload=WorkloadConfig("test", 6, 1, 3, 0.0, 300.0, 4, 64, 300.0),
        cache_dir=str(cache_dir),
    )


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    data = tmp_path / "data"
    data.write_bytes(bytes(REQUEST_BYTES))
    told = {"kind": "bandwidth", "files": [str(data)], "seconds": 0.4}
    return told | {"scratch": str(tmp_path), "cores": 1, "core_set": [0], "options": {}}


def test_a_cell_of_a_batch_counts_all_its_tokens_and_carries_the_prediction(
    made: Path, tmp_path: Path
) -> None:
    cell = tiny_cell(made, "flexinfer", "bf16", 1 << 30)
    record = run_cell(replace(cell, workload=replace(cell.workload, batch=2)))
    assert (record.status, record.message) == ("ok", "")
    assert (record.tokens, record.passes, len(record.output_tokens)) == (6, 3, 10)
    assert record.kv_bytes == 2 * 4 * 4 * 2 * 64 * 64
    assert [one["sequences"] for one in record.engine["batches"]] == [1, 2]
    assert record.engine["plan"]["kv_bytes"] == record.engine["batches"][1]["kv_bytes"]
    append_record(tmp_path / "records.jsonl", record)
    assert load_records(tmp_path / "records.jsonl") == [record]


def test_a_cell_of_ours_is_a_valid_record_with_its_bound(made: Path, tmp_path: Path) -> None:
    record = run_cell(tiny_cell(made, "flexinfer", "bf16", 1 << 30))
    append_record(tmp_path / "records.jsonl", record)
    assert record.message == ""
    assert load_records(tmp_path / "records.jsonl") == [record]
    assert (record.status, record.passes, len(record.output_tokens)) == ("ok", 3, 5)
    layer = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512 + 2 * 256
    assert record.total_weight_bytes == 2 * (4 * layer + 8192 * 256 + 256)
    assert record.kv_bytes == 4 * 4 * 2 * 64 * 64
    assert record.tokens_per_s is not None
    assert record.bound_tokens_per_s is not None
    assert record.compute_s_per_pass is not None
    assert record.bandwidth_bytes_per_s is not None
    resident_bytes = (1 << 30) - record.process_bytes - record.kv_bytes
    missing_bytes = max(0, record.total_weight_bytes - resident_bytes)
    seconds = max(record.compute_s_per_pass, missing_bytes / record.bandwidth_bytes_per_s)
    assert record.bound_tokens_per_s == pytest.approx(1 / seconds)
    assert record.ratio == pytest.approx(record.tokens_per_s * seconds)
    assert record.engine["stats"]["passes"] >= 5
    assert record.others_cpu_share is not None
    assert record.limits.method == ("unlimited" if PLACE.memory is None else PLACE.method)
    assert record.limits.memory_bytes == (None if PLACE.memory is None else 1 << 30)


@pytest.mark.skipif(PLACE.memory is None, reason=f"no memory groups here: {PLACE.why_not}")
def test_a_cell_over_its_budget_is_a_record_of_a_kill(made: Path) -> None:
    record = run_cell(tiny_cell(made, "transformers", "bf16", 40 << 20))
    assert record.status == "killed"
    assert "memory limit of 41943040 bytes" in record.message
    assert record.peak_memory_bytes is not None
    assert record.peak_memory_bytes <= 40 << 20
    assert PLACE.memory is not None
    assert list(PLACE.memory.glob(f"flexinfer-{os.getpid()}-*")) == []


def test_a_cell_on_a_gguf_file_leaves_its_config_to_the_helper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config and tokenizer are made before the group is entered, so that no cell pays for them."""
    monkeypatch.setenv("FLEXINFER_CACHE", str(tmp_path / "of-the-user"))
    one = tiny_cell(tmp_path, "flexinfer", "q4_0", 1 << 30)
    facts = describe_checkpoint(one)
    assert facts.path.endswith("model.gguf")
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "gguf").rglob("*.json")}
    assert kept
    record = run_cell(one)
    assert (record.status, record.message, record.bits) == ("ok", "", 4.5)
    assert (
        kept.items()
        <= {file: file.stat().st_mtime_ns for file in (tmp_path / "gguf").rglob("*.json")}.items()
    )
    assert not (tmp_path / "of-the-user").exists()


def test_a_budget_the_engine_refuses_is_its_own_words(made: Path) -> None:
    record = run_cell(tiny_cell(made, "flexinfer", "bf16", 1 << 30, memory="1MiB"))
    assert record.status == "error"
    assert "BudgetError" in record.message


def test_a_checkpoint_that_is_not_there_is_a_record(tmp_path: Path) -> None:
    one = tiny_cell(tmp_path, "flexinfer", "bf16", 1 << 30)
    one.model = ModelConfig("gone", "path", ["bf16"], None, str(tmp_path / "gone"))
    record = run_cell(one)
    assert record.status == "error"
    assert "gone" in record.message


def test_a_busy_neighbour_is_seen_and_said(tmp_path: Path) -> None:
    spin = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        others = OthersCpu()
        # Not others': our child.
        subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
        share = others.share()
    finally:
        for one in neighbours:
            one.kill()
            one.wait()
    assert 0.1 < share <= 1
    record = make_record(others_cpu_share=0.34)
    assert "DISTURBED: 34% of the CPU time was others'" in outcome(record)
    assert "DISTURBED" not in outcome(make_record(others_cpu_share=0.02))


def test_a_hang_ends_at_the_timeout_with_nothing_left(job: dict[str, Any]) -> None:
    child = run_child(job | {"seconds": 600.0}, timeout_s=1.0)
    assert child.status == "timeout"
    assert "no end after 1 s" in child.message
    running = subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout
    assert str(measured.__file__) not in running or job["scratch"] not in running


def test_a_missing_package_names_the_command_that_brings_it(
    job: dict[str, Any], tmp_path: Path
) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    child = run_child(job | {"kind": "llama_cpp", "python": str(bare)}, timeout_s=60.0)
    assert child.status == "missing"
    assert child.message == "llama_cpp is not installed; make baselines installs it"


def test_a_crash_keeps_the_events_before_it(job: dict[str, Any], tmp_path: Path) -> None:
    crashing = tmp_path / "python"
    crashing.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "told = json.load(sys.stdin)\n"
        "print('on its way', flush=True)\n"
        "with open(told['events'], 'w') as file:\n"
        "    told = {'event': 'token', 'counted': True, 's': 1.0, 'bytes': 2, 'id': 3}\n"
        "    file.write(json.dumps(told))\n"
        '    file.write(\'\\n{"event": "tok\')\n'
        "os.abort()\n"
    )
    crashing.chmod(0o755)
    child = run_child(job | {"python": str(crashing)}, timeout_s=60.0)
    assert (child.status, child.message) == ("error", "SIGABRT: on its way")
    assert [token["id"] for token in child.counted] == [3]


def test_the_measuring_process_maps_no_torch() -> None:
    program = "import sys, experiments.cell; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_the_resident_pass_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tiny_cell(tmp_path, "transformers", "bf16", 1 << 30)
    facts = describe_checkpoint(one)
    seconds, source = resident.resident_pass(one, facts, tmp_path)
    assert seconds is not None
    assert seconds > 0
    assert "extrapolated from 1 and 3 layers" in source
    assert not list(tmp_path.glob("flexinfer-cell-*")), "the models of 1 and 3 layers are gone"
    monkeypatch.setattr(resident, "run_child", lambda *_: pytest.fail("measured again"))
    offloaded = tiny_cell(tmp_path, "accelerate", "bf16", 1 << 29)
    assert resident.resident_pass(offloaded, facts, tmp_path) == (seconds, source)
    assert [
        json.loads(file.read_text())["seconds"] for file in (tmp_path / "resident").iterdir()
    ] == [seconds]


def test_the_engines_resident_pass_is_measured_anew_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tiny_cell(tmp_path, "flexinfer", "bf16", 1 << 30)
    facts = describe_checkpoint(one)
    measured_pass = Child("ok", "", [{"event": "token", "counted": True, "s": 0.5}])
    monkeypatch.setattr(resident, "run_child", lambda *_: measured_pass)
    for commit, kept in (("first", 1), ("first", 1), ("second", 2)):
        monkeypatch.setattr(resident, "engine_commit", lambda commit=commit: commit)
        seconds, _ = resident.resident_pass(one, facts, tmp_path)
        assert seconds == 0.5
        assert len(list((tmp_path / "resident").iterdir())) == kept


def test_scratch_of_a_killed_run_is_removed_by_the_next_and_that_of_a_live_one_kept(
    tmp_path: Path,
) -> None:
    dead, live = (tmp_path / f"flexinfer-cell-{pid}-abc" for pid in (2**22 + 1, os.getpid()))
    for path in (dead, live):
        path.mkdir()
        (path / "events.jsonl").write_text("{}")
    remove_stale_scratch(tmp_path)
    assert list(tmp_path.iterdir()) == [live]

"""Cells and records for the tests of the harness: valid against the schema, measured by nobody,
kept in tmp_path.
"""

import importlib.util
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.config import CellConfig, DeviceConfig, SystemConfig, WorkloadConfig
from experiments.model_config import ModelConfig, ShapeConfig
from experiments.records import Limits, Provenance, Record

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "Test CPU", "cores": 2, "memory_bytes": 16 * 2**30}


def script(name: str) -> ModuleType:
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def make_cell(**changes: Any) -> CellConfig:
    """A valid cell; `changes` replace its fields."""
    shape = ShapeConfig(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocab=256)
    told: dict[str, Any] = {
        "experiment": "test",
        "model": ModelConfig("tiny", shape=shape),
        "system": SystemConfig("flexinfer", "FlexInfer", format="q4_0"),
        "device": DeviceConfig("fixed", "ours", 500_000_000),
        "budget_bytes": 2**30,
        "workload": WorkloadConfig(),
        "round": 0,
        "cache_dir": "",
    }
    return CellConfig(**told | changes)


def make_record(cell: CellConfig | None = None, **changes: Any) -> Record:
    """A valid record of `cell`, with a run id of its own; `changes` replace its fields."""
    cell = cell or make_cell()
    told: dict[str, Any] = {
        "run_id": uuid.uuid4().hex,
        "status": "ok",
        "cell": cell,
        "bits": 4.5,
        "limits": Limits(
            method="v1",
            memory_bytes=cell.budget_bytes,
            read_bytes_per_s=cell.device.read_bytes_per_s,
        ),
        "provenance": Provenance(
            versions={"python": "3.11.7"},
            git_commit="0" * 40,
            git_dirty=False,
            kernel="6.1",
            file_system="ext4",
            started=datetime(2026, 1, 1, tzinfo=UTC),
            **MACHINE,
        ),
        "tokens": 3,
        "passes": 3,
        "token_s": [4.0, 2.0, 3.0],
        "token_bytes": [10, 10, 10],
        "total_weight_bytes": 3_000_000_000,
        "process_bytes": 400_000_000,
        "kv_bytes": 0,
        "compute_s_per_pass": 0.2,
        "bandwidth_bytes_per_s": 500_000_000.0,
    }
    return Record(**told | changes)

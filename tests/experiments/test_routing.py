"""Synthetic mixtures: one file for both systems, routers that choose as they are told, and routings
on which policies are compared.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import routing
from experiments.checkpoints import _describe
from experiments.child import run_child
from experiments.expert_misses import HINDSIGHT
from experiments.gguf import deviations, file_bytes, make_gguf
from experiments.model_config import (
    ConfigError,
    ExpertsConfig,
    ModelConfig,
    ShapeConfig,
    weight_bytes,
)
from experiments.record_files import load_records
from flexinfer.streaming.expert_policies import POLICIES
from tests.experiments.samples import ROOT


def shape(
    architecture: str = "qwen3moe", popularity: float = 1.0, count: int = 16, used: int = 4
) -> ShapeConfig:
    experts = ExpertsConfig(count, used, architecture, popularity)
    return ShapeConfig(256, 256, 3, 4, 2, 1024, head_dim=64, experts=experts)


@pytest.mark.parametrize("architecture", ["qwen3moe", "llama"])
def test_both_systems_decode_the_same_mixture(architecture: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: make baselines")
    model = make_gguf(ModelConfig("tiny", shape=shape(architecture)), "q4_k", tmp_path)
    told: list[list[int]] = []
    for kind in ("llama_cpp", "flexinfer"):
        job = {
            "kind": kind,
            "options": {"use_extra_bufts": False} if kind == "llama_cpp" else {},
            "model": str(model),
            "scratch": str(tmp_path),
            "cache_dir": str(tmp_path),
            "core_set": sorted(os.sched_getaffinity(0)),
            "cores": 2,
            "budget_bytes": 2 << 30,
            "context": 64,
            "vocab": 1024,
            "prompt_tokens": 8,
            "warmup_tokens": 1,
            "tokens": 12,
            "min_tokens": 4,
            "min_seconds": 0.0,
            "max_seconds": 30.0,
            "prefill_tokens": [],
            "texts": [],
            "replayed": [],
            "batch": 1,
            "predict": False,
            "drawn": True,
            "trace": False,
        }
        child = run_child(job, timeout_s=120.0)
        assert (child.status, child.message) == ("ok", "")
        told.append([event["id"] for event in child.all("token")])
        counted = child.last("counted")["told"]
        if kind == "flexinfer":
            assert counted["expert_hits"] + counted["expert_misses"] == 4 * 3 * 4
    agreed = sum(ours == theirs for ours, theirs in zip(*told, strict=True))
    assert agreed >= len(told[0]) - 2, (
        "near a tie between two experts, rounding chooses the other one"
    )
    assert len(set(told[0])) > 2, "drawn tokens, so it does not repeat itself"


def test_shapes_that_differ_in_the_router_share_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXINFER_CACHE", str(tmp_path))
    skewed = make_gguf(ModelConfig("tiny-skewed", shape=shape(popularity=0.9)), "q4_k", tmp_path)
    even = make_gguf(ModelConfig("tiny", shape=shape()), "q4_k", tmp_path)
    second = "model-00002-of-00002.gguf"
    assert even.with_name(second).samefile(skewed.with_name(second))
    assert even.read_bytes() != skewed.read_bytes()
    facts = _describe(ModelConfig("tiny", "path", ["gguf"], path=str(even)), "gguf", str(tmp_path))
    experts = 3 * 16 * 3 * 256 * 256 // 256 * 144
    assert facts.untouched_bytes == experts * 12 // 16
    assert facts.touched_bytes + facts.untouched_bytes + 1024 * 144 == file_bytes(shape(), "q4_k")
    assert 0 < file_bytes(shape(), "q4_k") - 1024 * 144 - weight_bytes(shape(), "q4_k") < 100_000


def test_a_router_chooses_evenly_or_as_it_was_told(tmp_path: Path) -> None:
    shares = {}
    for popularity in (1.0, 0.9):
        model = ModelConfig(f"tiny{popularity}", shape=shape(popularity=popularity, count=32))
        found = routing.record(make_gguf(model, "q4_k", tmp_path), "tiny", 200, "4GiB")
        assert len(found.steps) == 200 * 3
        assert {len(step) for step in found.steps} == {4}
        # The experts of the last layer: hidden states become more alike from layer to layer.
        last = range(64, 96)
        counts = sorted(
            (sum(expert in step for step in found.steps) for expert in last), reverse=True
        )
        shares[popularity] = sum(counts[:8]) / sum(counts)
    assert 0.25 < shares[1.0] < 0.5, "the first 8 of 32, of 200 tokens"
    assert shares[0.9] > shares[1.0] + 0.1


def test_popularities_that_scaled_rows_cannot_give() -> None:
    assert len(set(deviations(shape(popularity=1.0)))) == 1
    assert deviations(shape(popularity=0.95))[0] > deviations(shape(popularity=0.95))[-1]
    with pytest.raises(ConfigError, match=r"popularity=0\.3: would give an expert to"):
        deviations(shape(popularity=0.3))
    with pytest.raises(ConfigError, match="used=17"):
        shape(used=17)
    with pytest.raises(ConfigError, match="architecture='gpt'"):
        shape("gpt")


def test_hindsight_is_best_on_a_drawn_routing_and_repeats_are_hits() -> None:
    rates = {
        repeats: routing.hit_rates(routing.simulate(3, 16, 2, 60, repeats), (0.2, 0.5))
        for repeats in (0.0, 0.8)
    }
    for found in rates.values():
        assert set(found) == {*POLICIES, HINDSIGHT}
        for share in ("0.2", "0.5"):
            assert all(found[name][share] <= found[HINDSIGHT][share] for name in POLICIES)
    assert rates[0.8]["recency"]["0.5"] > rates[0.0]["recency"]["0.5"] + 0.2


def test_the_command_appends_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "routing.jsonl"
    monkeypatch.setattr(
        sys, "argv", ["routing", "--simulate", "0.5", "--tokens", "20", "--record", str(file)]
    )
    routing.main()
    (line,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert (line["kind"], line["tokens"]) == ("simulated", 20)
    monkeypatch.setattr(sys, "argv", ["routing"])
    with pytest.raises(SystemExit):
        routing.main()


def test_the_experiment_on_a_tiny_mixture(tmp_path: Path) -> None:
    """Records carry hits and the bytes that were missed, and the bound is made of them."""
    shape = (
        "hidden=256",
        "intermediate=256",
        "layers=2",
        "heads=4",
        "kv_heads=2",
        "head_dim=64",
        "vocab=1024",
    )
    overrides = [f"model.shape.{one}" for one in shape]
    overrides += [
        "model=moe-small-skewed",
        "workload=tiny",
        "workload.drawn=true",
        "budget.grid=[800MiB]",
    ]
    overrides += [
        "system=[flexinfer]",
        f"results_dir={tmp_path}",
        f"cache_dir={tmp_path / 'cache'}",
    ]
    command = [sys.executable, "scripts/run.py", "+exp=ours/moe", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = load_records(tmp_path)
    assert (record.status, record.message) == ("ok", "")
    assert record.hit_rate is not None
    assert record.counted["expert_hits"] + record.counted["expert_misses"] == record.passes * 2 * 8
    experts_bytes = 2 * 128 * 3 * 256 * 256 // 256 * 144
    assert record.untouched_bytes == experts_bytes * 15 // 16
    assert record.missed_bytes is not None
    assert record.missed_bytes <= sum(record.token_bytes) // record.passes
    assert record.compute_s_per_pass and record.bandwidth_bytes_per_s  # noqa: PT018
    expected = 1 / max(
        record.compute_s_per_pass, record.missed_bytes / record.bandwidth_bytes_per_s
    )
    assert record.bound_tokens_per_s == pytest.approx(expected)

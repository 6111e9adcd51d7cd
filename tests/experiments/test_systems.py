"""The systems decode what their checkpoints say, through one interface."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from experiments.checkpoints import _describe
from experiments.child import run_child
from experiments.gguf import file_bytes, make_gguf, write_synthetic
from experiments.model_config import (
    BITS_PER_WEIGHT,
    ConfigError,
    ModelConfig,
    ShapeConfig,
    weight_bytes,
)
from experiments.systems import on_torch
from experiments.systems.bandwidth import REQUEST_BYTES, measure_bandwidth
from experiments.systems.interface import prompt_ids
from experiments.systems.measured import PREFILL_REPEATS, measure
from flexinfer.cli import main as cli

SHAPE = ShapeConfig(hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, vocab=512)


def make_job(kind: str, model: Path, scratch: Path, **changes: Any) -> dict[str, Any]:
    told = {
        "kind": kind,
        "model": str(model),
        "copy": str(scratch / "copy"),
        "options": {},
        "scratch": str(scratch),
    }
    told |= {
        "cores": 1,
        "core_set": [0],
        "context": 64,
        "vocab": SHAPE.vocab,
        "prompt_tokens": 6,
        "warmup_tokens": 1,
    }
    told |= {"tokens": 6, "min_tokens": 4, "min_seconds": 0.0, "max_seconds": 600.0, "trace": False}
    told |= {"prefill_tokens": [], "texts": [], "replayed": [], "drawn": False}
    told |= {"batch": 1, "predict": False}
    told |= {"budget_bytes": 4 << 30, "kv_bytes": 1 << 20}
    return told | changes


def measured(job: dict[str, Any]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    measure(job, lambda event, **fields: events.append({"event": event, **fields}))
    json.dumps(events)
    return events


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from experiments.synth import make_checkpoint

    return make_checkpoint(
        ModelConfig("tiny", shape=SHAPE), "bf16", tmp_path_factory.mktemp("cache"), progress=False
    )


@pytest.mark.parametrize("kind", ["flexinfer", "accelerate", "airllm"])
def test_every_system_on_the_same_weights_decodes_the_same_tokens(
    kind: str, bf16: Path, tmp_path: Path
) -> None:
    if kind == "airllm" and importlib.util.find_spec("airllm") is None:
        pytest.skip("airllm is not installed: make baselines")
    job = make_job(kind, bf16, tmp_path)
    if kind == "airllm":
        on_torch.AirLLM(job).split()
    if kind == "accelerate":
        job["options"] = {"cpu_bytes": touched_by_half(bf16)}
    ours, stock = measured(job), measured(make_job("transformers", bf16, tmp_path))
    told = [
        [event["id"] for event in events if event["event"] == "token"] for events in (ours, stock)
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 6
    if kind == "accelerate":
        assert (
            next(event for event in ours if event["event"] == "engine")["told"]["modules_on_disk"]
            > 0
        )


def touched_by_half(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) // 2


def test_warm_up_is_not_counted_and_the_minimum_is_kept(bf16: Path, tmp_path: Path) -> None:
    events = measured(make_job("transformers", bf16, tmp_path, tokens=30))
    counted = [event["counted"] for event in events if event["event"] == "token"]
    assert counted == [False, False, True, True, True, True]
    assert [event["event"] for event in events][:2] == ["ready", "loaded"]
    assert events[-1]["event"] == "done"


def test_a_slow_system_stops_with_the_tokens_it_has(bf16: Path, tmp_path: Path) -> None:
    events = measured(make_job("transformers", bf16, tmp_path, tokens=30, max_seconds=0.0))
    assert sum(event.get("counted", False) for event in events) == 1


@pytest.mark.parametrize("format", ["q4_0", "q4_k"])
def test_llama_cpp_and_flexinfer_decode_the_same_file(format: str, tmp_path: Path) -> None:
    """Random weights have no near ties, so kernels that round in another order find the same
    tokens.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: make baselines")
    shape = ShapeConfig(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2, vocab=512)
    model = write_synthetic(tmp_path / "model.gguf", shape, "tiny", format)
    told: list[list[int]] = []
    for kind, options in (
        ("llama_cpp", {"use_extra_bufts": False}),
        ("llama_cpp", {}),
        ("flexinfer", {}),
    ):
        job = make_job(kind, model, tmp_path, options=options, prefill_tokens=[7, 40])
        child = run_child(job | {"cache_dir": str(tmp_path)}, timeout_s=120.0)
        assert (child.status, child.message) == ("ok", "")
        assert len(child.counted) == 4
        assert {tokens: len(seconds) for tokens, seconds in child.prefill_s.items()} == {
            tokens: PREFILL_REPEATS for tokens in (7, 40)
        }
        told.append([event["id"] for event in child.all("token")])
    assert told[0] == told[1] == told[2]


def test_a_batch_is_decoded_as_by_transformers_and_carries_what_the_plan_said(
    bf16: Path, tmp_path: Path
) -> None:
    job = make_job("flexinfer", bf16, tmp_path, batch=3, predict=True)
    events, stock = measured(job), measured(make_job("transformers", bf16, tmp_path, batch=3))
    ids = [event["ids"] for event in events if event["event"] == "token"]
    assert ids == [event["ids"] for event in stock if event["event"] == "token"]
    assert {len(one) for one in ids} == {3}
    told = next(event["told"] for event in events if event["event"] == "engine")
    assert [one["sequences"] for one in told["batches"]] == [1, 2, 3]
    assert told["batches"][-1]["locked_bytes"] == told["plan"]["locked_bytes"]
    assert (
        told["batches"][-1]["kv_bytes"]
        == told["plan"]["kv_bytes"]
        == 3 * told["batches"][0]["kv_bytes"]
    )


def test_prefills_are_timed_from_an_empty_cache(bf16: Path, tmp_path: Path) -> None:
    events = measured(make_job("transformers", bf16, tmp_path, prefill_tokens=[5, 60]))
    found = [event["tokens"] for event in events if event["event"] == "prefill"]
    assert found == [5] * PREFILL_REPEATS + [60] * PREFILL_REPEATS
    assert sum(event["event"] == "token" for event in events) == 6


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("format", ["q4_0", "q4_k"])
def test_gguf_holds_the_shape_at_its_bits_and_finite_weights(
    format: str, tie: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXINFER_CACHE", str(tmp_path))
    shape = ShapeConfig(
        hidden=256, intermediate=288, layers=2, heads=4, kv_heads=2, vocab=512, tie=tie
    )
    sizes: list[int] = []
    path = write_synthetic(tmp_path / "model.gguf", shape, "tiny", format, progress=sizes.append)
    reader = gguf.GGUFReader(path)
    assert (
        sum(sizes) == file_bytes(shape, format) == sum(int(each.n_bytes) for each in reader.tensors)
    )
    types = {each.name: each.tensor_type.name.lower() for each in reader.tensors}
    assert types["token_embd.weight"] == types["blk.0.attn_k.weight"] == format
    assert types["blk.0.ffn_down.weight"] == "q4_0"  # its rows are no multiple of 256
    facts = _describe(ModelConfig("tiny", "path", [format], path=str(path)), format, str(tmp_path))
    norms = (2 * shape.layers + 1) * shape.hidden * 4
    assert facts.touched_bytes == weight_bytes(shape, format) + norms
    assert facts.bits == BITS_PER_WEIGHT[format]
    weights = {each.name: gguf.dequantize(each.data, each.tensor_type) for each in reader.tensors}
    assert weights["blk.1.ffn_down.weight"].shape == (256, 288)
    assert weights["blk.0.attn_k.weight"].shape == (128, 256)
    assert ("output.weight" in weights) is not tie
    for name in ("blk.0.ffn_up.weight", "blk.1.ffn_down.weight"):
        assert 0.8 < float(np.std(weights[name])) * shape.hidden**0.5 < 1.2
        # -8 to 7: a little below 0.
        assert abs(float(np.mean(weights[name]))) < 0.15 * shape.hidden**-0.5
    assert not np.array_equal(weights["blk.0.attn_q.weight"], weights["blk.1.attn_q.weight"])


def test_a_gguf_is_made_once(tmp_path: Path) -> None:
    model = ModelConfig("tiny", shape=SHAPE)
    first = make_gguf(model, "q4_0", tmp_path)
    made = first.stat().st_mtime_ns
    assert make_gguf(model, "q4_0", tmp_path) == first
    assert first.stat().st_mtime_ns == made
    assert make_gguf(model, "q4_k", tmp_path) != first


def test_an_interrupted_gguf_leaves_nothing_that_loads(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "model.gguf", SHAPE, "tiny", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_gguf_refuses_shapes_it_cannot_hold_and_disks_too_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = ShapeConfig(hidden=48, intermediate=128, layers=1, heads=4, kv_heads=4, vocab=512)
    with pytest.raises(ConfigError, match=r"model\.shape\.hidden=48"):
        write_synthetic(tmp_path / "model.gguf", odd, "odd")
    with pytest.raises(ConfigError, match="format='bf16'"):
        write_synthetic(tmp_path / "model.gguf", SHAPE, "tiny", "bf16")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(OSError, match=r"needs 0\.0 GiB and 1 GiB to spare"):
        write_synthetic(tmp_path / "model.gguf", SHAPE, "tiny")
    assert list(tmp_path.iterdir()) == []


def test_bandwidth_is_measured_over_every_file(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(bytes(2 * REQUEST_BYTES))
    assert measure_bandwidth([str(file) for file in files], seconds=0.5) > 0
    (tmp_path / "c").write_bytes(b"1")
    with pytest.raises(ValueError, match="too small to measure"):
        measure_bandwidth([str(tmp_path / "c")], seconds=0.5)


def test_the_prompt_is_fixed_and_inside_the_vocabulary() -> None:
    assert prompt_ids(64, 512) == prompt_ids(64, 512)
    assert all(256 <= token < 512 for token in prompt_ids(64, 512))
    assert len(set(prompt_ids(64, 32000))) == 64


def test_threads_of_a_flexinfer_cell_wait_as_those_of_the_commands(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    on_torch.FlexInfer(make_job("flexinfer", bf16, tmp_path))
    assert os.environ["GOMP_SPINCOUNT"] == on_torch.SPIN_COUNT == cli.SPIN_COUNT
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    on_torch.FlexInfer(make_job("flexinfer", bf16, tmp_path))
    assert os.environ["GOMP_SPINCOUNT"] == "7"

"""Agreement of two systems: the numbers are those of known distributions, and the systems are run
for real.
"""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments import agreement
from experiments.gguf import write_synthetic
from experiments.model_config import ShapeConfig


def test_numbers_of_known_distributions() -> None:
    ids = np.array([0, 1, 1, 0])
    sure = np.log(np.array([[0.25, 0.75], [0.25, 0.75], [0.5, 0.5], [0.9, 0.1]], np.float32))
    assert agreement.perplexity(sure, ids) == pytest.approx((1 / (0.75 * 0.75 * 0.5)) ** (1 / 3))
    found = agreement.compare(np.log(np.array([[0.5, 0.5], [0.5, 0.5]], np.float32)) + 7, sure[:2])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert found == pytest.approx(
        {"top1_equal": 0.0, "mean_kl": expected, "max_kl": expected}, abs=1e-6
    )


def test_rows_beyond_one_chunk_count_too() -> None:
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((agreement.CHUNK_ROWS * 2 + 3, 5)).astype(np.float32)
    ids = generator.integers(0, 5, len(logits))
    rows = agreement.log_softmax(logits)
    expected = math.exp(-np.mean([rows[i, ids[i + 1]] for i in range(len(ids) - 1)]))
    assert agreement.perplexity(logits, ids) == pytest.approx(expected)
    other = logits.copy()
    other[-1] = np.roll(other[-1], 1)
    assert agreement.compare(logits, logits)["top1_equal"] == 1
    assert agreement.compare(logits, logits)["max_kl"] == 0
    found = agreement.compare(logits, other)
    assert found["top1_equal"] == pytest.approx(1 - 1 / len(logits))
    assert found["max_kl"] == pytest.approx(found["mean_kl"] * len(logits))
    assert found["max_kl"] > 0


def test_the_systems_agree_on_a_file_that_both_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: make baselines")
    monkeypatch.setenv("FLEXINFER_CACHE", str(tmp_path / "cache"))
    shape = ShapeConfig(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2, vocab=512)
    model = write_synthetic(tmp_path / "model.gguf", shape, "tiny", "q4_k")
    record = tmp_path / "quality" / "agreement.jsonl"
    told = ["agreement", str(model), "--positions", "30", "--record", str(record)]
    monkeypatch.setattr("sys.argv", told)
    agreement.main()
    (line,) = agreement.load(tmp_path)
    assert json.loads(capsys.readouterr().out) == line
    assert set(line["perplexity"]) == set(agreement.SYSTEMS)
    assert len(line["pairs"]) == 3
    for pair in line["pairs"]:
        assert pair["top1_equal"] > 0.9
        assert 0 < pair["mean_kl"] < 0.01
    assert line["provenance"]["versions"]["transcribe_cpp_native"]


def test_a_file_that_is_no_model_is_refused_in_the_words_of_the_engine(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"no model")
    with pytest.raises(RuntimeError, match=r"ids: .*model\.gguf: no GGUF file"):
        agreement.measure(model, 30, tmp_path)

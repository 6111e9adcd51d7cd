"""The survey of architectures: what it says of some that run, and of one that does not."""

import json
from pathlib import Path

import pytest

from experiments.architectures import BEGIN, END, answer, names, page
from flexinfer.model import pieces


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 8192)
    monkeypatch.setattr(pieces, "ROW_MULTIPLE", 16)


@pytest.mark.parametrize("name", ["falcon_h1", "glm4_moe", "gptj", "hunyuan_v1_moe", "qwen3_next"])
def test_what_runs(name: str) -> None:
    assert answer(name)["safetensors"] == "yes"


def test_what_does_not_says_why() -> None:
    assert "uses cache of its own" in answer("minimax")["safetensors"]
    assert answer("kimi_linear")["safetensors"].startswith("not tried: ValueError")


def test_every_decoder_is_asked_for() -> None:
    assert {"llama", "mamba2", "qwen3_vl", "smolvlm"} <= set(names())


def test_the_page_has_the_last_answer_of_each(tmp_path: Path) -> None:
    record = tmp_path / "architectures.jsonl"
    said = [
        ("llama", "other text"),
        ("llama", "yes"),
        ("mpt", "Error: a | b"),
        ("bert", "not tried: x"),
    ]
    record.write_text("".join(json.dumps({"name": n, "safetensors": s}) + "\n" for n, s in said))
    text = page(record)
    assert "1 of 2 architectures" in text
    assert "| mpt | Error: a / b |" in text
    docs = (Path(__file__).parents[2] / "docs/models.md").read_text()
    assert docs.index(BEGIN) < docs.index(END)

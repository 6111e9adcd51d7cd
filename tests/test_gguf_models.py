"""GGUF files: what is computed from them, in every family and budget."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_models import (
    FAMILIES,
    WriteGGUF,
    byte_level,
    made_once,
    relative_error,
    whole_model,
    write_model,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import flexinfer.kernels.ggml
from flexinfer import CheckpointError
from flexinfer.cli.main import main
from flexinfer.formats.ggml_types import TYPES, GgmlError
from tests.conftest import Load, logits, prompt, resize_to_share, stock

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> WriteGGUF:
    """gguf_model(family, kinds=MIX, **config); made once a session, do not change it."""
    return made_once(tmp_path_factory)


@pytest.fixture
def load(load: Load) -> Load:
    """With the KV cache of a stock model, float32: what is compared to one here is the weights."""
    return lambda *given, **options: load(
        *given, **{"kv_dtype": options.get("dtype", "float32")} | options
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_floats_give_what_the_stock_model_gives(
    gguf_model: WriteGGUF, load: Load, family: str
) -> None:
    """Config, names, order of rows and norms are right: nothing is rounded here."""
    written = gguf_model(family, ("F32",))
    model, reference = load(written.file), stock(written.stock)
    resize_to_share(model, 0.4)
    ids = prompt(2, tokens=19)
    assert relative_error(logits(model, ids), logits(reference, ids)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_give_about_what_their_numbers_give(
    gguf_model: WriteGGUF, load: Load, family: str
) -> None:
    """ggml rounds activations to 8 bit as well."""
    written = gguf_model(family)
    model, reference = load(written.file), stock(written.stock)
    ids = prompt(2)
    assert relative_error(logits(model, ids, 0), logits(reference, ids, 0)) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_every_budget_gives_the_bits_of_whole_weights(
    gguf_model: WriteGGUF, load: Load, family: str
) -> None:
    written = gguf_model(family)
    model, reference = load(written.file), whole_model(written)
    assert model.flexinfer.plan.streamed_bytes == 0
    expected = {batch: logits(reference, prompt(batch)) for batch in (1, 3)}
    assert torch.equal(logits(model, prompt(3)), expected[3])
    for share in (0.0, 0.35, 0.8):
        resize_to_share(model, share)
        assert model.flexinfer.plan.streamed_bytes > 0
        for batch, theirs in expected.items():
            assert torch.equal(logits(model, prompt(batch)), theirs), share


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_biases_of_rows_in_another_order(gguf_model: WriteGGUF, load: Load, kind: str) -> None:
    written = gguf_model("llama", (kind,), attention_bias=True, mlp_bias=True)
    model = load(written.file)
    reference = stock(written.stock) if kind == "F32" else whole_model(written)
    resize_to_share(model, 0.4)
    ours, theirs = logits(model, prompt(2)), logits(reference, prompt(2))
    assert relative_error(ours, theirs) < 1e-5
    assert kind == "F32" or torch.equal(ours, theirs)


def divisors(config: transformers.PretrainedConfig, name: str) -> torch.Tensor:
    """What the rotary frequencies of `name` are divided by, as llama.cpp's converter writes it for
    Llama 3.
    """
    scaled, _ = ROPE_INIT_FUNCTIONS[name](config, device=None)
    width = config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    unscaled = theta ** -(torch.arange(0, width, 2).float() / width)
    return unscaled / scaled


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "long_factor": [1.0 + 0.25 * i for i in range(32)],
    "short_factor": [1.0 + 0.01 * i for i in range(32)],
    "original_max_position_embeddings": 16,
    "attention_factor": 1.25,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def scaled_rope(writer: gguf.GGUFWriter, rope: dict[str, Any], name: str) -> None:
    """What llama.cpp's converter adds to the file for `rope`."""
    if rope is LLAMA3:
        config = FAMILIES["llama"].config(rope_parameters=LLAMA3)
        writer.add_tensor("rope_freqs.weight", divisors(config, "llama3").numpy())
    elif rope is LONG:
        for length in ("long", "short"):
            factors = np.array(LONG[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
        writer.add_uint32(f"{name}.rope.scaling.original_context_length", 16)
        writer.add_float32(f"{name}.rope.scaling.attn_factor", 1.25)
    else:
        writer.add_string(f"{name}.rope.scaling.type", rope["rope_type"])
        writer.add_float32(f"{name}.rope.scaling.factor", rope["factor"])
        writer.add_uint32(f"{name}.rope.scaling.original_context_length", 32)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", LLAMA3),
        ("phi3", LONG),
        ("qwen2", YARN),
        ("llama", {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}),
    ],
    ids=["llama3", "longrope", "yarn", "linear"],
)
@pytest.mark.parametrize("tokens", [7, 40])
def test_scaled_rotations(
    tmp_path: Path, load: Load, family: str, rope: dict[str, Any], tokens: int
) -> None:
    more = {"original_max_position_embeddings": 16} if rope is LONG else {}
    written = write_model(
        tmp_path,
        family,
        ("F32",),
        change=lambda writer: scaled_rope(writer, rope, family),
        rope_parameters=rope,
        **more,
    )
    model, reference = load(written.file), stock(written.stock)
    ids = prompt(1, tokens)
    assert relative_error(logits(model, ids), logits(reference, ids)) < 1e-5


def test_a_rotation_that_is_not_known_is_refused(tmp_path: Path, load: Load) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 7, 32, dtype=np.float32))

    with pytest.raises(CheckpointError, match=r"rope_freqs.weight scales the rotation"):
        load(write_model(tmp_path, "llama", change=add).file)


@pytest.mark.parametrize("kind", [encoding.name for encoding in TYPES.values()])
def test_every_type_of_blocks(tmp_path: Path, load: Load, kind: str) -> None:
    written = write_model(tmp_path, "llama", (kind,), num_hidden_layers=1)
    model, reference = load(written.file), whole_model(written)
    expected = logits(reference, prompt(2))
    assert torch.equal(logits(model, prompt(2)), expected)
    assert bool(expected.isfinite().all())
    resize_to_share(model, 0.3)
    assert torch.equal(logits(model, prompt(2)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_computing_in_half_precision(gguf_model: WriteGGUF, load: Load, dtype: torch.dtype) -> None:
    written = gguf_model("llama", ("Q4_K", "Q8_0"))
    model, reference = load(written.file, dtype=dtype), whole_model(written, dtype)
    assert model.dtype == dtype
    expected = logits(reference, prompt(2))
    assert torch.equal(logits(model, prompt(2)), expected)
    resize_to_share(model, 0.3)
    assert torch.equal(logits(model, prompt(2)), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("io_threads", [0, 3])
@pytest.mark.parametrize("policy", ["none", "algorithm1", "unbalanced"])
def test_policies_threads_and_tied_heads(
    gguf_model: WriteGGUF, load: Load, tied: bool, io_threads: int, policy: str
) -> None:
    written = gguf_model("llama", tie_word_embeddings=tied)
    model = load(written.file, policy=policy, io_threads=io_threads, window="2 layers")
    if policy != "none":
        resize_to_share(model, 0.5)
    assert model.flexinfer.plan.streamed_bytes > 0
    assert torch.equal(logits(model, prompt()), logits(whole_model(written), prompt()))


def test_generating_is_the_same_in_every_budget(gguf_model: WriteGGUF, load: Load) -> None:
    model = load(gguf_model("qwen3").file)
    ids = prompt(2)
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **call)
    for share in (0.0, 0.6):
        resize_to_share(model, share)
        assert torch.equal(model.generate(ids, **call), expected)


def test_the_kv_cache_is_kept_in_half_the_bytes(gguf_model: WriteGGUF, load: Load) -> None:
    written = gguf_model("llama", ("Q8_0",))
    exact, model = load(written.file), load(written.file, kv_dtype="auto")
    assert 2 * model.flexinfer.plan.kv_bytes == exact.flexinfer.plan.kv_bytes
    expected = logits(model, prompt(2))
    assert 0 < relative_error(expected, logits(exact, prompt(2))) < 0.05
    for share in (0.0, 0.6):
        resize_to_share(model, share)
        assert torch.equal(logits(model, prompt(2)), expected)
    beams = {"num_beams": 3, "max_new_tokens": 9, "do_sample": False}
    mask = torch.ones_like(prompt())
    first = model.generate(prompt(), attention_mask=mask, **beams)
    assert torch.equal(model.generate(prompt(), attention_mask=mask, **beams), first)
    with pytest.raises(ValueError, match="kv_dtype='bananas'"):
        load(written.file, kv_dtype="bananas")


def test_ggml_is_not_there(
    gguf_model: WriteGGUF, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise GgmlError("ggml is not installed; run `pip install`")

    monkeypatch.setattr(flexinfer.kernels.ggml, "library", missing)
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="pip install"):
        load(gguf_model("llama").file)
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_hub_id_with_a_file_is_taken_from_the_cache(
    gguf_model: WriteGGUF, tmp_path: Path
) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    for name in ("small.gguf", "other.gguf"):
        shutil.copy(gguf_model("llama").file, snapshot / name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    program = (
        "import flexinfer\n"
        "model = flexinfer.from_pretrained('someone/tiny', '2GiB', gguf_file='small.gguf', "
        "context=32)\n"
        "print(type(model).__name__)\n"
        "model.flexinfer.close()\n"
    )
    environment = os.environ | {
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "FLEXINFER_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr


def test_every_command_takes_a_file(
    tmp_path: Path,
    small_pieces: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = write_model(
        tmp_path,
        "llama",
        change=byte_level,
        vocab_size=300,
        max_position_embeddings=512,
        num_hidden_layers=1,
    )
    engine = ["--memory", "2GiB", "--context", "96"]
    by_file = [str(written.file), *engine]
    by_name = [str(tmp_path), "--gguf-file", written.file.name, *engine]
    outputs = []
    for model in (by_file, by_name):
        assert main(["generate", *model, "--max-new-tokens", "8", "--json", "abab"]) == 0
        outputs.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert outputs[0] == outputs[1]
    assert main(["plan", *by_file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(written.file)
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n"))
    assert main(["chat", *by_file, "--max-new-tokens", "4"]) == 0
    assert main(["quantize", str(written.file), str(tmp_path / "copy")]) == 2
    assert "start from the original checkpoint" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "none.gguf"), "ab"]) == 2
    assert "no such" in capsys.readouterr().err


def test_weights_of_the_same_input_are_multiplied_in_one_call(
    gguf_model: WriteGGUF, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values, then gate and up, for locked weights and few rows."""
    calls: list[int] = []
    multiply = flexinfer.kernels.ggml.Library.multiply

    def counted(self: Any, x: Any, weights: Any) -> None:
        calls.append(len(weights))
        multiply(self, x, weights)

    monkeypatch.setattr(flexinfer.kernels.ggml.Library, "multiply", counted)
    model = load(gguf_model("llama", ("Q4_0",)).file)
    layers = model.config.num_hidden_layers
    model(prompt(1, tokens=8))  # fills memory, a weight at a time
    for _ in range(2):
        calls.clear()
        model(prompt(1, tokens=8))
        assert calls == [3, 1, 2, 1] * layers + [1]
    calls.clear()
    model(prompt(1, tokens=9))
    assert calls == [1] * (7 * layers + 1)
    resize_to_share(model, 0.0)
    calls.clear()
    model(prompt(1, tokens=8))
    assert set(calls) == {1}


def test_an_output_made_ahead_is_of_that_very_input(gguf_model: WriteGGUF, load: Load) -> None:
    model = load(gguf_model("llama", ("Q4_0",)).file)
    model(prompt())
    attention = model.model.layers[0].self_attn
    queries, keys = attention.q_proj, attention.k_proj
    with torch.no_grad():
        x, other = torch.randn(2, 1, 1, model.config.hidden_size)
        alone = [keys(one.clone()) for one in (x, other)]
        queries(x)
        assert torch.equal(keys(x), alone[0])
        queries(x)
        assert torch.equal(keys(other), alone[1])
        assert torch.equal(keys(x), alone[0])
        queries(x)
        x.copy_(other)
        assert torch.equal(keys(x), alone[1])
    with torch.inference_mode():
        inferred = other.clone()
        queries(inferred)
        assert torch.equal(keys(inferred), alone[1])

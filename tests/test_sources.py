"""Where a model may come from: a directory, the Hugging Face cache without a network, and kinds
that cannot be streamed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import flexinfer
import flexinfer.formats.hub
from flexinfer import BudgetError, CheckpointError
from tests.conftest import SHAPE, TOKENS, MakeCheckpoint

REVISION = "0123456789abcdef0123456789abcdef01234567"


def test_a_hub_id_is_taken_from_the_cache_without_a_network(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(checkpoint("llama"), repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    program = (
        "import flexinfer\n"
        "model = flexinfer.from_pretrained('someone/tiny', memory='2GiB', context=32)\n"
        "print(type(model).__name__)\n"
        "model.flexinfer.close()\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/place", "one-word", "a/b/c"])
def test_what_is_neither_a_directory_nor_a_hub_id_is_said(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such directory, and not a Hub id"):
        flexinfer.from_pretrained(name, memory="2GiB")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture of experts, some of whose tensors transformers converts in a way that is not
    known here.
    """
    path = tmp_path_factory.mktemp("converted")
    torch.manual_seed(0)
    shape = {**SHAPE, "num_key_value_heads": 4, "num_hidden_layers": 2}
    latent = {
        "q_lora_rank": 24,
        "qk_rope_head_dim": 16,
        "head_dim": 32,
        "o_lora_rank": 16,
        "o_groups": 2,
    }
    config = transformers.AutoConfig.for_model(
        "deepseek_v4", **shape, **TOKENS, **latent, n_routed_experts=4, moe_intermediate_size=32
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_experts_that_do_not_fit_are_refused_by_name(converted: Path) -> None:
    with pytest.raises(
        BudgetError, match=r"experts\.0\.w1\.weight' .*cannot be streamed yet; .*needs at least"
    ):
        flexinfer.from_pretrained(converted, memory="64MiB")


def test_experts_that_fit_stay_in_memory_and_this_is_said(converted: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(converted)
    with pytest.warns(RuntimeWarning, match="kept in memory whole"):
        model = flexinfer.from_pretrained(converted, memory="8GiB")
    with model.flexinfer:
        ids = torch.arange(3, 12)[None]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, stock(ids).logits)
        assert model.flexinfer.plan.streamed_bytes == 0
        assert model.flexinfer.stats()["passes"] == 1


def test_another_quantiser_is_refused(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    config.quantization_config = {"quant_method": "bitsandbytes"}
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="quantised by 'bitsandbytes'"):
        flexinfer.from_pretrained(tmp_path / "model", memory="8GiB")


def test_a_part_of_a_snapshot_is_completed(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after AutoTokenizer.from_pretrained alone."""
    whole, part, asked = checkpoint("llama"), tmp_path / "part", []
    part.mkdir()
    shutil.copy(whole / "config.json", part)

    def download(name: str, local_files_only: bool = False, **_: object) -> str:
        asked.append(local_files_only)
        return str(part if local_files_only else whole)

    monkeypatch.setattr(flexinfer.formats.hub, "snapshot_download", download)
    with flexinfer.from_pretrained("someone/tiny", memory="2GiB", context=32).flexinfer as engine:
        assert engine.plan.total_bytes > 0
    assert asked == [True, False]

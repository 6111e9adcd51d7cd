"""Mixtures of experts: streamed logits equal, bit for bit, those of stock transformers with its "eager" experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, SHAPE, TOKENS, Load, MakeCheckpoint, logits, prompt, resize_to_share
from transformers import AutoModelForCausalLM, PreTrainedModel

EXPERTS = {"moe_intermediate_size": 48, "num_experts_per_tok": 3}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
MIXTURES = {
    "mixtral": lambda **over: transformers.MixtralConfig(
        **{**SHAPE, **TOKENS, "num_local_experts": 8, **over}
    ),
    "qwen2_moe": lambda **over: transformers.Qwen2MoeConfig(
        **{**SHAPE, **TOKENS, **EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 80, **over}
    ),
    "qwen3_moe": lambda **over: transformers.Qwen3MoeConfig(
        **{**SHAPE, **TOKENS, **EXPERTS, "num_experts": 12, "head_dim": 16, "norm_topk_prob": True, **over}
    ),
    "olmoe": lambda **over: transformers.OlmoeConfig(
        **{**SHAPE, **TOKENS, "intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3, **over}
    ),
    "granitemoe": lambda **over: transformers.GraniteMoeConfig(
        **{
            **SHAPE,
            **TOKENS,
            "intermediate_size": 48,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            **over,
        }
    ),
    "deepseek_v2": lambda **over: transformers.DeepseekV2Config(
        **{**SHAPE, **TOKENS, **EXPERTS, **LATENT, "n_routed_experts": 8, **over}
    ),
    "deepseek_v3": lambda **over: transformers.DeepseekV3Config(
        **{**SHAPE, **TOKENS, **EXPERTS, **LATENT, "n_routed_experts": 8, **over}
    ),
    "gpt_oss": lambda **over: transformers.GptOssConfig(
        **{
            **SHAPE,
            **TOKENS,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "sliding_window": 8,
            **over,
        }
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _families() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, config in MIXTURES.items():
            patch.setitem(FAMILIES, name, config)
        yield


def eager(path: Path, **options: Any) -> PreTrainedModel:
    """The same checkpoint by transformers alone, resident, with its own plain implementation of experts."""
    return AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager", **options).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_every_family_in_every_budget(
    checkpoint: MakeCheckpoint, load: Load, family: str, dtype: torch.dtype
) -> None:
    path = checkpoint(family, dtype)
    model, reference = load(path), eager(path)
    expected = {batch: logits(reference, prompt(batch, 9), steps=3) for batch in (1, 3)}
    for share in (None, 0.0, 0.4, 1.2):
        if share is not None:
            resize_to_share(model, share)
        for batch in (1, 3):
            assert torch.equal(logits(model, prompt(batch, 9), steps=3), expected[batch]), (share, batch)

"""Models that keep more between tokens than keys and values: the states of linear attention and of
convolutions, keys of an indexer.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import flexinfer
from flexinfer.draft.substitute import DraftError
from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.model.cache_form import shape_of, tensors_of
from flexinfer.model.skeleton import build_skeleton
from flexinfer.plan.plan import PassShape
from tests.conftest import (
    FAMILIES,
    SHAPE,
    TOKENS,
    Load,
    MakeCheckpoint,
    logits,
    prompt,
    resize_to_share,
)

GATED_DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
TURNS = ["mamba", "attention"] * 2
# By the name of the class of their configuration.
HYBRIDS: dict[str, dict[str, Any]] = {
    "Qwen3NextConfig": GATED_DELTA | EXPERTS,
    "Qwen3_5TextConfig": GATED_DELTA,
    "Qwen3_5MoeTextConfig": GATED_DELTA | EXPERTS,
    "OlmoHybridConfig": GATED_DELTA,
    "Lfm2Config": {"layer_types": ["conv", "full_attention"] * 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2, "num_experts": 4}
    | {"num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "NemotronHConfig": {"layer_types": ["mamba", "moe", "attention", "mamba"], "head_dim": 16}
    | {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1}
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"moe_shared_expert_intermediate_size": 32, "chunk_size": 8},
    "GraniteMoeHybridConfig": MAMBA_2
    | {"layer_types": TURNS, "intermediate_size": 32, "shared_intermediate_size": 48}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "mamba_chunk_size": 8},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
    | {"expert_layer_offset": 0, "mamba_dt_rank": 4, "mamba_d_state": 8}
    | {"num_experts": 4, "num_experts_per_tok": 2},
    "BambaConfig": MAMBA_2 | {"attn_layer_indices": [1, 3], "mamba_chunk_size": 8},
    "FalconH1Config": MAMBA_2 | {"mamba_d_ssm": 128, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    "Mamba2Config": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 8},
    "Zamba2Config": {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]}
    | {"mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_expand": 2}
    | {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4}
    | {"num_mem_blocks": 1, "adapter_rank": 8, "mamba_d_state": 8},
    "RecurrentGemmaConfig": {"lru_width": 64, "attention_window_size": 8, "head_dim": 16},
    "DeepseekV32Config": LATENT
    | {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 16, "n_routed_experts": 4}
    | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32},
}


@pytest.fixture(scope="module", autouse=True)
def _families() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, sizes in HYBRIDS.items():
            kind = getattr(transformers, name)

            def config(kind: Any = kind, sizes: dict[str, Any] = sizes, **over: Any) -> Any:
                return kind(**{**SHAPE, **TOKENS, **sizes, **over})

            patch.setitem(FAMILIES, name, config)
        yield


def resident(path: Path) -> PreTrainedModel:
    """The same checkpoint by transformers alone.

    torch multiplies a parameter and a batch in another order where the parameter may get a
    gradient, which a streamed model's may not.
    """
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.bfloat16) for family in HYBRIDS),
        *((family, torch.float32) for family in ("JambaConfig", "OlmoHybridConfig")),
    ],
    ids=str,
)
def test_every_family_in_every_budget(
    checkpoint: MakeCheckpoint, load: Load, family: str, dtype: torch.dtype
) -> None:
    path = checkpoint(family, dtype)
    model, reference = load(path, logits_to_keep=27), resident(path)
    expected = {batch: logits(reference, prompt(batch, 9), steps=3) for batch in (1, 3)}
    for share in (0.0, 0.4, 1.2):
        resize_to_share(model, share)
        for batch in (1, 3):
            assert torch.equal(logits(model, prompt(batch, 9), steps=3), expected[batch]), share


@pytest.mark.parametrize("family", HYBRIDS)
def test_padding_beams_and_a_second_turn(
    checkpoint: MakeCheckpoint, load: Load, family: str
) -> None:
    path = checkpoint(family, torch.bfloat16)
    model, reference = load(path, context=128), resident(path)
    ids, mask = prompt(2, tokens=9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    ids[mask == 0] = TOKENS["pad_token_id"]
    call = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": TOKENS["pad_token_id"]}
    for more in ({}, {"num_beams": 2}):
        call |= more
        ours = model.generate(ids, attention_mask=mask, **call)
        assert torch.equal(ours, reference.generate(ids, attention_mask=mask, **call)), more
    texts = []
    for one in (model, reference):
        cache = DynamicCache(config=one.config.get_text_config(decoder=True))
        text = prompt()
        for _ in range(2):
            text = one.generate(text, max_new_tokens=4, do_sample=False, cache=cache)
            text = torch.cat((text, prompt(seed=1)), dim=-1)
        texts.append(text)
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("family", "tokens"),
    [*((family, 21) for family in HYBRIDS), ("Qwen3NextConfig", 1), ("DeepseekV32Config", 1)],
)
def test_the_plan_knows_what_is_kept(
    checkpoint: MakeCheckpoint, load: Load, family: str, tokens: int
) -> None:
    """Of what transformers keeps itself, exactly so many bytes."""
    path = checkpoint(family)
    model = load(path)
    cache = DynamicCache(config=model.config)
    model(prompt(2, tokens), cache=cache, use_cache=True)
    empty = build_skeleton(open_checkpoint(path))
    form = empty.cache
    with torch.device("meta"):
        filled, _ = form.filled(empty.model, PassShape(2, 1, tokens), model.dtype)

    def nbytes(layers: DynamicCache) -> list[int]:
        pairs = zip(form.first.layers, layers.layers, strict=True)
        return [
            sum(tensor.nbytes for tensor in tensors_of(layer))
            for first, layer in pairs
            if shape_of(first) is None
        ]

    assert nbytes(filled) == nbytes(cache)


def test_a_draft_is_refused_with_the_reason(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("Qwen3NextConfig")
    for draft in ("lookup", "substitute"):
        with pytest.raises(DraftError, match="cannot be taken out"):
            flexinfer.from_pretrained(path, "4GiB", context=64, draft=draft)


def test_auto_goes_without_a_draft(checkpoint: MakeCheckpoint, load: Load) -> None:
    path = checkpoint("Lfm2Config")
    model, call = load(path, draft="auto"), {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(prompt(), **call), resident(path).generate(prompt(), **call))
    assert model.flexinfer.plan.draft is None

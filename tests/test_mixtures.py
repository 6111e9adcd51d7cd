"""Mixtures of experts: streamed logits equal, bit for bit, those of stock transformers with its
"eager" experts.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import flexinfer
from flexinfer.convert.quantize import quantize
from flexinfer.streaming.expert_policies import POLICIES
from flexinfer.streaming.reader import ReadError
from tests.conftest import (
    FAMILIES,
    SHAPE,
    TOKENS,
    Load,
    MakeCheckpoint,
    logits,
    prompt,
    resize_to_share,
    smallest_budget,
)

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
MIXTURES: dict[str, Callable[..., PretrainedConfig]] = {
    "mixtral": lambda **over: transformers.MixtralConfig(
        **{**SHAPE, **TOKENS, "num_local_experts": 8, **over}
    ),
    "qwen2_moe": lambda **over: transformers.Qwen2MoeConfig(
        **{
            **SHAPE,
            **TOKENS,
            **EXPERTS,
            "num_experts": 8,
            "shared_expert_intermediate_size": 80,
            **over,
        }
    ),
    "qwen3_moe": lambda **over: transformers.Qwen3MoeConfig(
        **{
            **SHAPE,
            **TOKENS,
            **EXPERTS,
            "num_experts": 12,
            "head_dim": 16,
            "norm_topk_prob": True,
            **over,
        }
    ),
    "olmoe": lambda **over: transformers.OlmoeConfig(
        **{
            **SHAPE,
            **TOKENS,
            "intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            **over,
        }
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
def _families() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, config in MIXTURES.items():
            patch.setitem(FAMILIES, name, config)
        yield


def eager(path: Path, **options: Any) -> PreTrainedModel:
    """The same checkpoint by transformers alone, resident, with its own plain implementation of
    experts.
    """
    return AutoModelForCausalLM.from_pretrained(
        path, experts_implementation="eager", **options
    ).eval()


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
            assert torch.equal(logits(model, prompt(batch, 9), steps=3), expected[batch]), (
                share,
                batch,
            )


def test_experts_are_found_and_budgeted(checkpoint: MakeCheckpoint, load: Load) -> None:
    model = load(checkpoint("qwen3_moe"))
    engine, experts = model.flexinfer, model.flexinfer.plan.experts
    of_one = 3 * 64 * 48 * 4
    assert experts.total_bytes == 4 * 12 * of_one
    assert experts.token_bytes == 4 * 3 * of_one
    assert experts.hit_rate == 1.0
    assert engine.plan.bound_tokens_per_s >= engine.plan.predicted_tokens_per_s
    smallest = smallest_budget(model)
    dense = sum(weight.lock_cost_bytes for weight in engine.runner.planner.weights)
    engine.resize(smallest + dense + experts.cache_bytes // 2)
    plan = engine.plan
    assert plan.locked_bytes == sum(weight.nbytes for weight in engine.runner.planner.weights), (
        "what every token needs comes first"
    )
    assert 0.4 < plan.experts.hit_rate == plan.experts.slots / experts.slots < 0.7
    assert plan.streamed_bytes == int(plan.experts.token_bytes * (1 - plan.experts.hit_rate))
    engine.resize(smallest + dense // 2)
    assert engine.plan.locked_bytes < plan.locked_bytes
    assert engine.plan.experts.cache_bytes <= 3 * 16_384 + 2 * experts.slot_bytes, (
        "a cache like a window"
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("look_ahead", [True, False])
@pytest.mark.parametrize("io_threads", [0, 1, 3])
def test_every_policy_with_and_without_looking_ahead(
    checkpoint: MakeCheckpoint, load: Load, policy: str, look_ahead: bool, io_threads: int
) -> None:
    path = checkpoint("qwen3_moe")
    model = load(path, expert_policy=policy, look_ahead=look_ahead, io_threads=io_threads)
    resize_to_share(model, 1.2)
    assert torch.equal(logits(model, prompt(), steps=8), logits(eager(path), prompt(), steps=8))
    stats = model.flexinfer.stats()
    assert stats["expert_misses"] > 0
    assert (stats["experts_foretold"] > 0) == (look_ahead and io_threads > 0)
    assert stats["experts_foretold_right"] <= stats["experts_foretold"]


def test_little_is_read_in_vain_in_a_small_cache(checkpoint: MakeCheckpoint, load: Load) -> None:
    """In a cache of a few experts what was foretold is gone before it is wanted: then looking ahead
    stops.
    """
    model = load(checkpoint("qwen3_moe"))
    logits(model, prompt(), steps=0)
    smallest, slot_bytes = smallest_budget(model), model.flexinfer.plan.experts.slot_bytes
    model.flexinfer.resize(smallest + 6 * slot_bytes)
    logits(model, prompt(), steps=40)
    before = model.flexinfer.stats()
    logits(model, prompt(1, 3, seed=1), steps=60)
    spent = {name: value - before[name] for name, value in model.flexinfer.stats().items()}
    assert spent["expert_misses"] > 0
    assert spent["wasted_bytes"] < 0.15 * spent["bytes_read"]


def test_an_unknown_policy_is_refused(checkpoint: MakeCheckpoint, load: Load) -> None:
    with pytest.raises(
        ValueError,
        match="expert_policy='bananas' does not exist; there are fixed, frequency, recency",
    ):
        load(checkpoint("qwen3_moe"), expert_policy="bananas")


def test_what_fits_is_read_once_and_what_does_not_at_most_once_a_pass(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint("olmoe"), look_ahead=False)
    ids = prompt(2, 20)
    for _ in range(3):
        logits(model, ids, steps=0)
    stats = model.flexinfer.stats()
    used = stats["expert_misses"]
    assert stats["expert_hits"] == 2 * used
    model.flexinfer.resize(smallest_budget(model))
    experts = model.flexinfer.plan.experts
    assert experts.slots == 2
    before = model.flexinfer.stats()["bytes_read"]
    logits(model, ids, steps=0)
    read = model.flexinfer.stats()["bytes_read"] - before
    pieces = sum(len(one) for one in model.flexinfer.mixture.pieces())
    dense = sum(
        p.memory_bytes + 4096 for w in model.flexinfer.runner.planner.weights for p in w.pieces
    )
    assert read <= pieces * experts.slot_bytes + 2 * dense + ids.numel() * 8192


def test_resizing_while_it_generates(checkpoint: MakeCheckpoint, load: Load) -> None:
    path = checkpoint("mixtral")
    model, reference = load(path), eager(path)
    smallest, total = smallest_budget(model), model.flexinfer.plan.experts.total_bytes
    expected = reference.generate(prompt(), max_new_tokens=30, do_sample=False)
    budgets = iter([0.1, 0.9, 0.0, 2.0, 0.3] * 8)

    def resize(*_: object) -> None:
        model.flexinfer.resize(smallest + int(next(budgets) * total))

    hook = model.model.layers[1].self_attn.register_forward_hook(resize)
    assert torch.equal(model.generate(prompt(), max_new_tokens=30, do_sample=False), expected)
    hook.remove()


def test_router_logits_are_those_of_the_pass(checkpoint: MakeCheckpoint, load: Load) -> None:
    """Looking ahead calls routers once more; what the program asks to be recorded is not touched by
    it.
    """
    path = checkpoint("qwen3_moe")
    model, reference = load(path), eager(path)
    with torch.no_grad():
        ours, theirs = (one(prompt(1, 3), output_router_logits=True) for one in (model, reference))
    assert model.flexinfer.stats()["experts_foretold"] > 0
    assert len(ours.router_logits) == len(theirs.router_logits) == 4
    assert all(
        torch.equal(a, b) for a, b in zip(ours.router_logits, theirs.router_logits, strict=True)
    )


def test_parameters_of_experts_say_that_they_are_streamed(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint("mixtral"))
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    assert weight.shape == (8, 352, 64)
    with pytest.raises(
        RuntimeError, match=r"layers\.0\.mlp\.experts\.gate_up_proj is streamed from disk"
    ):
        weight.sum()
    model.flexinfer.close()
    with pytest.raises(RuntimeError, match="this model is closed"):
        model(prompt())


def test_a_read_that_fails_is_raised_and_the_next_pass_is_right(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    path = checkpoint("mixtral")
    model, expected = load(path), logits(eager(path), prompt())
    resize_to_share(model, 0.3)
    reader = model.flexinfer.store.reader
    experts = {
        piece.offset_bytes for pieces in model.flexinfer.mixture.pieces() for piece in pieces
    }
    real = reader.read_now

    def fail(file: Path, offset_bytes: int, nbytes: int, into: memoryview) -> int:
        if offset_bytes in experts:
            raise ReadError(5, f"{file}: injected")
        return real(file, offset_bytes, nbytes, into)

    reader.read_now = fail
    with pytest.raises(OSError, match="injected"):
        model(prompt())
    reader.read_now = real
    assert torch.equal(logits(model, prompt()), expected)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_quantised_where_llama_cpp_has_no_words_for_the_family_here(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path, family: str
) -> None:
    """Rows of 64 become blocks, those of 48 stay as they are."""
    path = checkpoint(family)
    report = quantize(path, tmp_path / "copy", "q8_0", progress=False)
    assert report.architecture is None
    assert {tensor.kind for tensor in report.packed} == {"Q8_0"}
    assert any("experts.down_proj" in name for name in report.kept)
    ours, source = load(tmp_path / "copy"), load(path)
    expected, found = logits(source, prompt(2)), logits(ours, prompt(2))
    assert (found - expected).norm() < 0.2 * expected.norm(), (
        "here and there another expert is chosen"
    )
    resize_to_share(ours, 0.4)
    assert torch.equal(logits(ours, prompt(2)), found)


def test_experts_that_are_not_all_there(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(checkpoint("mixtral"), path)
    tensors = load_file(path / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("experts.3.w3.weight"))
    kept = tensors.pop(gone)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        flexinfer.CheckpointError, match=r"experts of .*gate_up_proj' are not all there"
    ):
        flexinfer.from_pretrained(path, "8GiB")
    save_file(tensors | {gone: kept[1:].clone()}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        flexinfer.CheckpointError, match=r"gate_up_proj make .*config\.json says \[8, 352, 64\]"
    ):
        flexinfer.from_pretrained(path, "8GiB")

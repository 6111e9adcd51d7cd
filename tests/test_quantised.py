"""Checkpoints in safetensors that somebody quantised: streamed logits equal, bit for bit, those of
stock transformers, which makes floats of the weights when it loads them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import flexinfer
from flexinfer.convert.quantize import quantize
from flexinfer.draft.substitute import DraftError
from flexinfer.kernels import packed
from tests.conftest import TOKENS, Load, MakeCheckpoint, logits, prompt, resize_to_share, stock

SHAPE: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 128,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 128,
    "num_experts_per_tok": 2,
    "num_experts": 6,
    "n_routed_experts": 6,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=64),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=64),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 4},
        **EXPERTS,
        kv_lora_rank=64,
        q_lora_rank=128,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SHAPE | {"intermediate_size": 128, "hidden_size": 128},
        num_local_experts=6,
        num_experts_per_tok=2,
        head_dim=32,
        sliding_window=8,
    ),
}


@pytest.fixture(autouse=True)
def _short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several strips to a piece, the last of them shorter and none at a boundary of blocks."""
    monkeypatch.setattr(packed, "STRIP_NUMBERS", 6_000)


Pack = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def packed_checkpoint(
    family: str, folder: Path, quantization: dict[str, Any], pack: Pack, **options: Any
) -> Path:
    """A checkpoint of random weights, its tensors as `pack` makes them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(pack(load_file(file)), file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config | options))
    return folder


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    """Linears of layers; no routers."""
    return tensor.dim() == 2 and not any(one in name for one in ("lm_head", "embed", "mlp.gate."))


def float8(block: tuple[int, int] | None) -> Pack:
    """Linears in float8 with a scale for each block, or for each tensor where that is None."""

    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        packed = {}
        for name, tensor in tensors.items():
            if not is_quantised(name, tensor):
                packed[name] = tensor
                continue
            rows, width = block or tensor.shape
            blocks = tensor.float().view(tensor.shape[0] // rows, rows, -1, width)
            scale = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            packed[name] = codes.view(tensor.shape)
            packed[f"{name}_scale_inv"] = scale if block else scale.view(())
        return packed

    return pack


def mxfp4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """gpt-oss: experts [experts, in, out] as random codes of the transposed shape."""
    packed = {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = tensor
            continue
        count, width, rows = tensor.shape
        shape = count, rows, width // 32, 16
        packed[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8)
        packed[f"{name}_scales"] = torch.randint(118, 124, shape[:-1], dtype=torch.uint8)
    return packed


def compressed(bits: int, group: int | None, *, packed: bool = False, zeros: bool = False) -> Pack:
    """Linears in signed integers, or float8 for 0 bits, with a scale, and a zero where there are
    `zeros`, for each group of a row; `packed` into int32 or a number each.
    """

    def words(codes: torch.Tensor) -> torch.Tensor:
        parts = codes.view(len(codes), -1, 32 // bits) << bits * torch.arange(32 // bits)
        return parts.sum(-1).to(torch.int32)

    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, tensor in tensors.items():
            if not is_quantised(name, tensor):
                found[name] = tensor
                continue
            rows, width = tensor.shape
            scale = 0.01 + 0.01 * torch.rand(rows, width // (group or width))
            found[f"{name}_scale"] = scale.bfloat16()
            if not bits:
                found[name] = (50 * torch.randn(rows, width)).to(torch.float8_e4m3fn)
                continue
            codes = torch.randint(0, 1 << bits, (rows, width), dtype=torch.int64)
            zero = torch.randint(0, 1 << bits, (rows, width // (group or width)))
            if not packed:
                found[name] = (codes - (1 << bits - 1)).to(torch.int8)
                if zeros:
                    found[f"{name}_zero_point"] = (zero - (1 << bits - 1)).to(torch.int8)
                continue
            found[f"{name}_packed"] = words(codes)
            if zeros:
                found[f"{name}_zero_point"] = words(zero.T.contiguous()).T.contiguous()
            found[f"{name}_shape"] = torch.tensor([rows, width])
        return found

    return pack


def compressed_config(
    bits: int, group: int | None, format: str, *, zeros: bool = False
) -> dict[str, Any]:
    weights = {
        "num_bits": bits or 8,
        "type": "int" if bits else "float",
        "symmetric": not zeros,
        "strategy": "group" if group else "channel",
        "group_size": group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": format}},
    }


def by_inputs(method: str, bits: int = 4, *, ordered: bool = False) -> Pack:
    """Linears of AWQ or GPTQ: 64 inputs share a scale and a zero."""
    each = 32 // bits

    def words(codes: torch.Tensor) -> torch.Tensor:
        """[n, codes] -> [n, int32s]."""
        parts = codes.unflatten(1, (-1, each))
        if method == "awq":
            parts = parts[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return (parts << bits * torch.arange(each)).sum(-1).to(torch.int32)

    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, tensor in tensors.items():
            if not is_quantised(name, tensor):
                found[name] = tensor
                continue
            rows, width = tensor.shape
            stem, groups = name.removesuffix(".weight"), width // 64
            codes = torch.randint(0, 1 << bits, (width, rows))
            packed = words(codes) if method == "awq" else words(codes.T).T
            found[f"{stem}.qweight"] = packed.contiguous()
            found[f"{stem}.qzeros"] = words(torch.randint(0, 1 << bits, (groups, rows)))
            found[f"{stem}.scales"] = (0.01 + 0.01 * torch.rand(groups, rows)).half()
            if method != "awq":
                order = torch.arange(width) // 64
                order = order[torch.randperm(width)] if ordered else order
                found[f"{stem}.g_idx"] = order.to(torch.int32)
        return found

    return pack


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
KINDS: dict[str, tuple[str, dict[str, Any], Pack]] = {
    "fp8": ("llama", FP8 | {"modules_to_not_convert": ["lm_head"]}, float8((128, 128))),
    "fp8 in small blocks": (
        "qwen3",
        FP8 | {"weight_block_size": [64, 32], "modules_to_not_convert": ["lm_head"]},
        float8((64, 32)),
    ),
    "fp8 by tensor": (
        "qwen3",
        FP8 | {"weight_block_size": None, "modules_to_not_convert": ["lm_head"]},
        float8(None),
    ),
    "fp8 mixture": ("qwen3_moe", FP8 | {"modules_to_not_convert": ["lm_head"]}, float8((128, 128))),
    "fp8 latent": ("deepseek_v3", FP8 | {"modules_to_not_convert": ["lm_head"]}, float8((64, 64))),
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4"}, mxfp4),
    "int4 in groups": (
        "llama",
        compressed_config(4, 32, "pack-quantized"),
        compressed(4, 32, packed=True),
    ),
    "int4 mixture": (
        "qwen3_moe",
        compressed_config(4, 64, "pack-quantized"),
        compressed(4, 64, packed=True),
    ),
    "int8 packed": (
        "llama",
        compressed_config(8, 128, "pack-quantized"),
        compressed(8, 128, packed=True),
    ),
    "int8 by row": ("qwen3", compressed_config(8, None, "int-quantized"), compressed(8, None)),
    "int4 with zeros": (
        "llama",
        compressed_config(4, 64, "pack-quantized", zeros=True),
        compressed(4, 64, packed=True, zeros=True),
    ),
    "int8 with zeros": (
        "llama",
        compressed_config(8, None, "int-quantized", zeros=True),
        compressed(8, None, zeros=True),
    ),
    "awq": ("llama", {"quant_method": "awq", "bits": 4, "version": "gemm"}, by_inputs("awq")),
    "awq mixture": ("qwen3_moe", {"quant_method": "awq", "bits": 4}, by_inputs("awq")),
    "gptq": ("llama", {"quant_method": "gptq", "bits": 4}, by_inputs("gptq")),
    "gptq in order of activations": (
        "qwen3",
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "desc_act": True},
        by_inputs("gptq_v2", ordered=True),
    ),
    "gptq in 8 bits": ("qwen3", {"quant_method": "gptq", "bits": 8}, by_inputs("gptq", 8)),
    "float8 by row": ("qwen3", compressed_config(0, None, "float-quantized"), compressed(0, None)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of one of KINDS, made once."""
    paths: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in paths:
            family, quantization, pack = KINDS[kind]
            paths[kind] = packed_checkpoint(
                family, tmp_path_factory.mktemp(family), quantization, pack
            )
        return paths[kind]

    return make


def unpacked(words: torch.Tensor, bits: int, awq: bool) -> torch.Tensor:
    """[n, int32s] -> float [n, codes]."""
    shifts = bits * torch.arange(32 // bits)
    found = (words[..., None] >> shifts) & ((1 << bits) - 1)
    if awq:
        found = found[..., [0, 4, 1, 5, 2, 6, 3, 7]]
    return found.flatten(1).float()


def by_definition(path: Path, floats: Path) -> PreTrainedModel:
    """What codes mean that transformers does not load here: int4 with packed zeros, and AWQ and
    GPTQ, for which it wants a package that does not run on this CPU.
    """
    config = AutoConfig.from_pretrained(path)
    quantization = config.quantization_config
    del config.quantization_config
    config.save_pretrained(floats)
    tensors = load_file(path / "model.safetensors")
    method, bits = quantization["quant_method"], quantization.get("bits", 4)
    for stem in [one.removesuffix(".qweight") for one in tensors if one.endswith(".qweight")]:
        words = tensors.pop(f"{stem}.qweight")
        zero = unpacked(tensors.pop(f"{stem}.qzeros"), bits, method == "awq")
        scale = tensors.pop(f"{stem}.scales")
        number = (
            unpacked(words, bits, True) if method == "awq" else unpacked(words.T, bits, False).T
        )
        if method == "gptq" and quantization.get("checkpoint_format") != "gptq_v2":
            zero += 1
        group = tensors.pop(f"{stem}.g_idx", torch.arange(len(number)) // 64).long()
        weight = (number - zero[group]) * scale[group].float()
        tensors[f"{stem}.weight"] = weight.half().T.bfloat16().contiguous()

    def codes(words: torch.Tensor) -> torch.Tensor:
        return ((words[..., None] >> 4 * torch.arange(8)) & 15).flatten(-2).float()

    for name in [one.removesuffix("_packed") for one in tensors if one.endswith("_packed")]:
        zeros = codes(tensors.pop(f"{name}_zero_point").T).T
        scale = tensors.pop(f"{name}_scale").float()
        number = codes(tensors.pop(f"{name}_packed"))
        group = number.shape[1] // scale.shape[1]
        number -= zeros.repeat_interleave(group, 1)
        tensors[name] = (number * scale.repeat_interleave(group, 1)).bfloat16()
        del tensors[f"{name}_shape"]
    save_file(tensors, floats / "model.safetensors", metadata={"format": "pt"})
    return stock(floats, experts_implementation="eager")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_budget(
    made: Callable[[str], Path], load: Load, tmp_path: Path, kind: str
) -> None:
    path = made(kind)
    model = load(path)
    own = kind == "int4 with zeros" or kind.startswith(("awq", "gptq"))
    reference = (
        by_definition(path, tmp_path) if own else stock(path, experts_implementation="eager")
    )
    expected = {batch: logits(reference, prompt(batch), steps=3) for batch in (1, 3)}
    # Given back and taken again: what lies beside rows moves with them.
    for share in (None, 0.6, 0.2, 0.0, 0.4):
        if share is not None:
            resize_to_share(model, share)
        for batch, theirs in expected.items():
            assert torch.equal(logits(model, prompt(batch), steps=3), theirs), (share, batch)
    assert model.flexinfer.plan.streamed_bytes > 0


def test_weights_stay_packed_in_memory(made: Callable[[str], Path], load: Load) -> None:
    path = made("int4 in groups")
    model = load(path)
    logits(model, prompt())
    weights = [one for one in model.flexinfer.runner.planner.weights if "lm_head" not in one.name]
    locked = sum(one.lock_cost_bytes for one in weights)
    numbers = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    # A page at each end of a piece is most of the rest.
    pages = sum(len(one.pieces) for one in weights) * 4 * 4096
    assert numbers / 2 < locked < numbers / 2 * (1 + 2 * 2 / 32) + pages


def test_gradients(made: Callable[[str], Path], load: Load) -> None:
    path = made("fp8")
    model, reference = load(path), stock(path)
    resize_to_share(model, 0.3)
    found = []
    for one in (model, reference):
        embedded = one.get_input_embeddings()(prompt()).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.float().sum().backward()
        found.append(embedded.grad.float())
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


def changed(
    path: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]
) -> Path:
    """A copy of a checkpoint whose tensors and quantization_config went through `change`."""
    shutil.copytree(path, target)
    tensors = load_file(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("fp8", lambda t, q: q.update(quant_method="bitsandbytes"), "which is not supported"),
        ("fp8", lambda t, q: q.update(quant_method="gptq", bits=4), "no tensor is quantised so"),
        ("awq", lambda t, q: q.update(version="gemv"), "with 4 bits is"),
        ("gptq", lambda t, q: q.update(bits=3), "with 3 bits is not"),
        ("gptq", lambda t, q: t.pop(f"{PROJ[:-6]}scales"), "no scales and zeros beside it"),
        (
            "gptq",
            lambda t, q: t.update({f"{PROJ[:-6]}qzeros": torch.zeros(3, 5, dtype=torch.int32)}),
            "does not go with",
        ),
        ("fp8", lambda t, q: t.pop(f"{PROJ}_scale_inv"), "no scale is beside it"),
        ("fp8", lambda t, q: t.update({f"{PROJ}_scale_inv": torch.ones(3, 5)}), "does not go with"),
        ("mxfp4", lambda t, q: t.pop(next(n for n in t if "_scales" in n)), "no scales that fit"),
        (
            "int4 in groups",
            lambda t, q: q.update(format="nvfp4-pack-quantized"),
            "is not supported",
        ),
        (
            "int4 in groups",
            lambda t, q: q["config_groups"]["group_0"]["weights"].update(num_bits=3),
            "of \\[3\\] bits",
        ),
        ("int4 in groups", lambda t, q: t.pop(f"{PROJ}_scale"), "no scales beside it"),
        (
            "int4 in groups",
            lambda t, q: t.update({f"{PROJ}_g_idx": torch.zeros(256, dtype=torch.int32)}),
            "in another order",
        ),
        (
            "int4 with zeros",
            lambda t, q: t.update({f"{PROJ}_zero_point": torch.zeros(7, 4, dtype=torch.int32)}),
            "does not go with",
        ),
        ("int4 in groups", lambda t, q: q.update(config_groups=[1]), "bits"),
    ],
)
def test_what_does_not_fit_is_refused(
    made: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
    change: Callable[[dict[str, Any], dict[str, Any]], object],
    says: str,
) -> None:
    path = changed(made(kind), tmp_path / "copy", change)
    with pytest.raises(flexinfer.CheckpointError, match=says) as refused:
        flexinfer.from_pretrained(path, "4GiB", context=64)
    assert str(path) in str(refused.value)


def test_an_empty_quantization_config_means_none(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint(), tmp_path / "copy")
    config = json.loads((tmp_path / "copy/config.json").read_text())
    (tmp_path / "copy/config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    model, reference = load(tmp_path / "copy"), stock(checkpoint())
    assert torch.equal(logits(model, prompt()), logits(reference, prompt()))


def test_no_substitute_and_no_copy_of_them(made: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DraftError, match="no substitute is made"):
        flexinfer.from_pretrained(made("fp8"), "4GiB", context=64, draft="substitute")
    with pytest.raises(flexinfer.CheckpointError, match="quantised already"):
        quantize(made("fp8"), tmp_path / "copy", "q4_0", progress=False)

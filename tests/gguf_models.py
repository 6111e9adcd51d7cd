"""Small random models as GGUF files, and what they must compute: the tests of everything that reads
GGUF use them.

A model of transformers with random weights is written as llama.cpp's converter would write it
(names, order of rows, norms plus one), each matrix in the next of the given types. Beside it is
kept the same model in stock form, its weights being what the blocks stand for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flexinfer.kernels.ggml import TYPES, GgmlKernel, dequantize_rows, quantize_rows
from tests.conftest import TOKENS, VOCAB

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
MIX = ("Q4_K", "Q6_K", "Q5_0", "Q8_0", "Q4_0", "F16")
ROUTERS = ("gate.weight", "router.weight")
CALIBRATED = {"IQ1_S", "IQ2_XS", "IQ2_XXS"}  # cannot be made of weights alone
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    **TOKENS,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
RMS = {"rms_norm_eps": 1e-4}
WINDOW = {"head_dim": 128, "sliding_window": 8, "query_pre_attn_scalar": 128}
CAPS = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
EXPERTS: dict[str, Any] = {"num_hidden_layers": 3, "num_experts_per_tok": 3}
OSS_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1}
GRANITE |= {"logits_scaling": 5.0}
GPT2 = {
    "n_embd": 256,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "n_inner": 512,
    "vocab_size": VOCAB,
}


@dataclass(frozen=True)
class Family:
    """A model of transformers, and what its GGUF header says that is not the same in all."""

    config: Callable[..., PretrainedConfig]
    values: dict[str, Any] = field(default_factory=dict)
    architecture: str = ""  # llama.cpp's name, where it is another
    permuted: bool = False  # rows of Q and K
    norms_plus_one: bool = False


FAMILIES = {
    "llama": Family(
        lambda **over: transformers.LlamaConfig(**SHAPE | ROPE | RMS | over),
        {"rope.dimension_count": 64},
        permuted=True,
    ),
    "mistral": Family(
        lambda **over: transformers.MistralConfig(
            **SHAPE | ROPE | RMS | {"head_dim": 64, "sliding_window": None} | over
        ),
        {"rope.dimension_count": 64},
        architecture="llama",
        permuted=True,
    ),
    "arcee": Family(
        lambda **over: transformers.ArceeConfig(**SHAPE | ROPE | RMS | {"head_dim": 64} | over),
        {"rope.dimension_count": 64, "attention.key_length": 64},
        permuted=True,
    ),
    "granite": Family(
        lambda **over: transformers.GraniteConfig(**SHAPE | ROPE | RMS | GRANITE | over),
        {"rope.dimension_count": 64, "embedding_scale": 3.0, "residual_scale": 0.4}
        | {"attention.scale": 0.1, "logit_scale": 5.0},
        permuted=True,
    ),
    # The fourth layer rotates nothing.
    "smollm3": Family(
        lambda **over: transformers.SmolLM3Config(
            **SHAPE | ROPE | RMS | {"num_hidden_layers": 4} | over
        ),
        {"rope.dimension_count": 64},
        permuted=True,
    ),
    "seed_oss": Family(
        lambda **over: transformers.SeedOssConfig(
            **SHAPE | ROPE | RMS | {"head_dim": 64, "attention_bias": True} | over
        ),
        {"attention.key_length": 64},
    ),
    "olmo2": Family(lambda **over: transformers.Olmo2Config(**SHAPE | ROPE | RMS | over)),
    "glm4": Family(
        lambda **over: transformers.Glm4Config(
            **SHAPE | RMS | {"head_dim": 64, "partial_rotary_factor": 0.5} | over,
            rope_parameters=ROPE["rope_parameters"] | {"partial_rotary_factor": 0.5},
        ),
        {"attention.key_length": 64, "rope.dimension_count": 32},
    ),
    "cohere": Family(
        lambda **over: transformers.CohereConfig(
            **SHAPE | ROPE | {"layer_norm_eps": 1e-4, "logit_scale": 0.25} | over
        ),
        {"logit_scale": 0.25},
        architecture="command-r",
    ),
    "phi": Family(
        lambda **over: transformers.PhiConfig(
            **SHAPE | {"layer_norm_eps": 1e-4, "partial_rotary_factor": 0.5} | over,
            rope_parameters=ROPE["rope_parameters"] | {"partial_rotary_factor": 0.5},
        ),
        {"rope.dimension_count": 32},
        architecture="phi2",
    ),
    "gemma": Family(
        lambda **over: transformers.GemmaConfig(**SHAPE | ROPE | RMS | {"head_dim": 64} | over),
        {"attention.key_length": 64},
        norms_plus_one=True,
    ),
    "qwen2": Family(lambda **over: transformers.Qwen2Config(**SHAPE | ROPE | RMS | over)),
    "qwen3": Family(
        lambda **over: transformers.Qwen3Config(**SHAPE | ROPE | RMS | {"head_dim": 128} | over),
        {"attention.key_length": 128, "attention.value_length": 128},
    ),
    "gemma2": Family(
        lambda **over: transformers.Gemma2Config(**SHAPE | ROPE | RMS | WINDOW | CAPS | over),
        {"attention.key_length": 128, "attention.sliding_window": 8} | CAPS,
        norms_plus_one=True,
    ),
    "gemma3": Family(
        lambda **over: transformers.Gemma3TextConfig(
            **SHAPE | RMS | WINDOW | {"rope_parameters": TWO_ROPES, "num_hidden_layers": 6} | over
        ),
        {"attention.key_length": 128, "attention.sliding_window": 8}
        | {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        norms_plus_one=True,
    ),
    "lfm2": Family(
        lambda **over: transformers.Lfm2Config(
            **SHAPE
            | {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
            | {"norm_eps": 1e-4, "block_auto_adjust_ff_dim": False}
            | over,
            **ROPE,
        ),
        {"attention.head_count_kv": [0, 2, 0, 2], "attention.layer_norm_rms_epsilon": 1e-4}
        | {"attention.layer_norm_epsilon": None, "shortconv.l_cache": 3},
    ),
    "phi3": Family(
        lambda **over: transformers.Phi3Config(**SHAPE | ROPE | RMS | over),
        {"rope.dimension_count": 64},
    ),
    "starcoder2": Family(
        lambda **over: transformers.Starcoder2Config(**SHAPE | ROPE | {"norm_epsilon": 1e-4} | over)
    ),
    "stablelm": Family(
        lambda **over: transformers.StableLmConfig(
            **SHAPE
            | {"layer_norm_eps": 1e-4, "use_qkv_bias": True, "partial_rotary_factor": 0.25}
            | over,
            rope_parameters=ROPE["rope_parameters"] | {"partial_rotary_factor": 0.25},
        ),
        {"rope.dimension_count": 16},
    ),
    "nemotron": Family(
        lambda **over: transformers.NemotronConfig(
            **SHAPE | {"norm_eps": 1e-4, "head_dim": 64, "partial_rotary_factor": 0.5} | over,
            rope_parameters=ROPE["rope_parameters"] | {"partial_rotary_factor": 0.5},
        ),
        {"rope.dimension_count": 32},
        norms_plus_one=True,
    ),
    "falcon": Family(
        lambda **over: transformers.FalconConfig(
            **SHAPE
            | ROPE
            | {"layer_norm_epsilon": 1e-4, "ffn_hidden_size": 512, "num_kv_heads": 1}
            | over
        ),
        {"attention.head_count_kv": 1, "feed_forward_length": 512},
    ),
    "gpt2": Family(
        lambda **over: transformers.GPT2Config(
            **GPT2 | TOKENS | {"layer_norm_epsilon": 1e-4} | over
        )
    ),
}


MIXTURES = {
    "mixtral": Family(
        lambda **over: transformers.MixtralConfig(
            **SHAPE | ROPE | RMS | {"num_hidden_layers": 3, "num_local_experts": 6} | over
        ),
        {"rope.dimension_count": 64},
        architecture="llama",
        permuted=True,
    ),
    "qwen2_moe": Family(
        lambda **over: transformers.Qwen2MoeConfig(
            **SHAPE
            | ROPE
            | RMS
            | EXPERTS
            | {"num_experts": 8, "moe_intermediate_size": 256}
            | {"shared_expert_intermediate_size": 512}
            | over
        ),
        {"expert_feed_forward_length": 256, "expert_shared_feed_forward_length": 512},
        architecture="qwen2moe",
    ),
    "qwen3_moe": Family(
        lambda **over: transformers.Qwen3MoeConfig(
            **SHAPE
            | ROPE
            | RMS
            | EXPERTS
            | {"num_experts": 12, "moe_intermediate_size": 256}
            | {"head_dim": 128, "norm_topk_prob": True}
            | over
        ),
        {
            "attention.key_length": 128,
            "attention.value_length": 128,
            "expert_feed_forward_length": 256,
        },
        architecture="qwen3moe",
    ),
    "olmoe": Family(
        lambda **over: transformers.OlmoeConfig(
            **SHAPE
            | ROPE
            | RMS
            | EXPERTS
            | {"num_experts": 8, "intermediate_size": 256, "num_key_value_heads": 4}
            | over
        )
    ),
    "granitemoe": Family(
        lambda **over: transformers.GraniteMoeConfig(
            **SHAPE
            | ROPE
            | RMS
            | EXPERTS
            | GRANITE
            | {"num_local_experts": 8, "intermediate_size": 256}
            | over
        ),
        {"rope.dimension_count": 64, "embedding_scale": 3.0, "residual_scale": 0.4}
        | {"attention.scale": 0.1, "logit_scale": 5.0},
        permuted=True,
    ),
    "gpt_oss": Family(
        lambda **over: transformers.GptOssConfig(
            **SHAPE
            | RMS
            | EXPERTS
            | {"num_local_experts": 8, "head_dim": 64, "sliding_window": 8}
            | {"rope_parameters": OSS_ROPE, "intermediate_size": 256}
            | over
        ),
        {"attention.key_length": 64, "attention.value_length": 64, "attention.sliding_window": 8}
        | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "expert_feed_forward_length": 256,
        }
        | {"rope.scaling.original_context_length": 32},
        architecture="gpt-oss",
    ),
}


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in the file."""

    kind: str
    data: np.ndarray  # uint8 [rows, row_bytes] for blocks; [experts, rows, row_bytes] of experts
    order: torch.Tensor | None  # row i of the parameter is row order[i] here


@dataclass(frozen=True)
class Written:
    """A model as a GGUF file, the same as a stock checkpoint, and the matrices in the file by
    parameter.
    """

    file: Path
    stock: Path
    stored: dict[str, Stored]


WriteGGUF = Callable[..., Written]


def made_once(tmp_path_factory: pytest.TempPathFactory) -> WriteGGUF:
    """write(family="llama", kinds=MIX, **config) that writes each model the first time it is asked
    for; do not change them.
    """
    made: dict[str, Written] = {}

    def write(family: str = "llama", kinds: tuple[str, ...] = MIX, **config: Any) -> Written:
        key = repr((family, kinds, sorted(config.items())))
        if key not in made:
            made[key] = write_model(
                tmp_path_factory.mktemp(f"gguf-{family}"), family, kinds, **config
            )
        return made[key]

    return write


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def write_model(
    path: Path,
    family: str,
    kinds: Sequence[str] = MIX,
    *,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    split_tensors: int = 0,
    **config: Any,
) -> Written:
    """Write a random model of `family` into directory `path`. `change` may add to the header."""
    facts = (FAMILIES | MIXTURES)[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(facts.config(**config), dtype=torch.float32).eval()
    settings = model.config
    architecture = facts.architecture or family
    writer = gguf.GGUFWriter(
        None if split_tensors else path / "model.gguf",
        architecture,
        split_max_tensors=split_tensors,
    )
    for key, value in _values(settings, facts).items():
        name = key if "." in key and key.startswith("tokenizer") else f"{architecture}.{key}"
        {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)](name, value)
    if change is not None:
        change(writer)
    stored: dict[str, Stored] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, parameter, kind in _parameters(model, kinds):
            stored[name] = _store(name, parameter, kind, facts, settings, model)
            writer.add_tensor(
                _name(architecture, settings.num_hidden_layers, name),
                stored[name].data,
                raw_dtype=gguf.GGMLQuantizationType[kind],
            )
    model.tie_weights()
    model.save_pretrained(path / "stock")
    if split_tensors:
        writer.write_header_to_file(path / "model.gguf")
    else:
        writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = sorted(path.glob("model*.gguf"))[0]
    return Written(first, path / "stock", stored)


def _values(config: PretrainedConfig, facts: Family) -> dict[str, Any]:
    def of(*names: str) -> Any:
        return next(
            (getattr(config, name) for name in names if getattr(config, name, None) is not None),
            None,
        )

    rms, plain = (
        of("rms_norm_eps"),
        of("norm_epsilon", "layer_norm_eps", "norm_eps", "layer_norm_epsilon"),
    )
    values = {
        "context_length": 128,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": of("intermediate_size", "n_inner"),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": of("num_key_value_heads"),
        "expert_count": of("num_experts", "num_local_experts"),
        "expert_used_count": of("num_experts_per_tok"),
        "attention.layer_norm_rms_epsilon": rms,
        "attention.layer_norm_epsilon": None if rms else plain,
        "rope.freq_base": 5000.0 if of("rope_parameters") else None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }
    return {key: value for key, value in (values | facts.values).items() if value is not None}


def _parameters(
    model: PreTrainedModel, kinds: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor, str]]:
    """Name, parameter and type; each matrix in the next of `kinds`.

    Of experts gate and up apart, as views with rows of outputs.
    """
    kind_of = cycle(kinds)
    for name, parameter in model.named_parameters():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        if "is_transposed" in vars(module):  # of experts
            rows = (
                parameter.transpose(1, 2)
                if module.is_transposed and parameter.dim() == 3
                else parameter
            )
            parts = {name: rows}
            if "gate_up" in name:
                width = rows.shape[1] // 2
                cuts = (
                    [slice(0, width), slice(width, None)]
                    if module.is_concatenated
                    else [slice(0, None, 2), slice(1, None, 2)]
                )
                parts = {
                    name.replace("gate_up", way): rows[:, cut]
                    for way, cut in zip(("gate", "up"), cuts, strict=True)
                }
            for part, view in parts.items():
                yield part, view, "F32" if view.dim() == 2 else next(kind_of)
            continue
        matrix = parameter.dim() == 2 and ".wpe." not in name and not name.endswith(ROUTERS)
        yield name, parameter, next(kind_of) if matrix else "F32"


def _name(architecture: str, layers: int, parameter: str) -> str:
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    module, _, leaf = parameter.rpartition(".")
    names = gguf.get_tensor_name_map(number, layers)
    if ".experts." in parameter:
        leaf, way = "bias" if leaf.endswith("_bias") else "weight", leaf.partition("_")[0]
        return f"blk.{parameter.split('.')[2]}.ffn_{way}_exps.{leaf}"
    if leaf == "sinks":
        return f"{names.get_name(parameter)}.weight"
    if module.endswith("block_sparse_moe.router"):
        module += ".layer"
    return f"{names.get_name(module)}.{leaf}"


def _store(
    name: str,
    parameter: torch.Tensor,
    kind: str,
    facts: Family,
    config: PretrainedConfig,
    model: PreTrainedModel,
) -> Stored:
    """The parameter as the file has it; it is changed into what that stands for."""
    if name.endswith("conv.conv.weight"):
        return Stored(kind, parameter.squeeze(1).numpy().astype(np.float32), None)
    if parameter.dim() == 3:  # of experts
        each = [_store(name, one, kind, facts, config, model).data for one in parameter]
        return Stored(kind, np.stack(each), None)
    transposed = (
        isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) and parameter.dim() == 2
    )
    rows = (parameter.data.T if transposed else parameter.data).contiguous()
    order = None
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": getattr(config, "num_key_value_heads", 0),
    }
    for projection, count in heads.items():
        if facts.permuted and f".{projection}." in name:
            # File row -> row.
            there = torch.arange(len(rows)).view(count, 2, -1).transpose(1, 2).flatten()
            order, rows = there.argsort(), rows[there]
    if facts.norms_plus_one and name.endswith("norm.weight"):
        rows = rows + 1
    if kind in TYPES:
        blocks = (
            _random_blocks(kind, rows) if kind in CALIBRATED else quantize_rows(TYPES[kind], rows)
        )
        data, numbers = blocks.numpy(), dequantize_rows(TYPES[kind], blocks, rows.shape[1])
    else:
        data = rows.numpy().astype({"F16": np.float16, "F32": np.float32}[kind])
        numbers = torch.from_numpy(data.astype(np.float32))
    if facts.norms_plus_one and name.endswith("norm.weight"):
        numbers = numbers - 1
    in_order = numbers if order is None else numbers[order]
    parameter.copy_(in_order.T if transposed else in_order)
    return Stored(kind, data[0] if name.endswith("shared_expert_gate.weight") else data, order)


def _random_blocks(kind: str, rows: torch.Tensor) -> torch.Tensor:
    """Blocks [rows, row_bytes] of no numbers in particular, their scales small."""
    count = rows.shape[1] // TYPES[kind].block_elements
    blocks = torch.randint(0, 256, (len(rows), count, TYPES[kind].block_bytes), dtype=torch.uint8)
    blocks[..., :2] = torch.tensor([0.001], dtype=torch.float16).view(torch.uint8)
    return blocks.flatten(1)


class WholeLinear(nn.Module):
    """A linear whose weight is whole in memory, as blocks, and multiplied in one call of the
    kernel.
    """

    def __init__(
        self, stored: Stored, bias: torch.Tensor | None, in_features: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._kernel = GgmlKernel(in_features, TYPES[stored.kind], dtype)
        self._blocks, self._order = torch.from_numpy(stored.data), stored.order
        self._bias = bias if bias is None or stored.order is None else bias[stored.order.argsort()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._kernel.multiply(x, self._blocks, len(self._blocks), self._bias)
        return y if self._order is None else y[..., self._order]


class WholeExperts(nn.Module):
    """Experts whose weights are whole in memory, as blocks: each multiplies its tokens, in the
    order of their numbers.
    """

    def __init__(self, stock: Any, ways: Sequence[Stored], dtype: torch.dtype) -> None:
        super().__init__()
        self._stock, self._up, self._down = [stock], ways[:-1], ways[-1]
        self._dtype = dtype

    def forward(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        stock, output = self._stock[0], torch.zeros_like(hidden)
        for expert in sorted(set(index.flatten().tolist())):
            place, token = torch.where(index.t() == expert)
            parts = [self._multiply(hidden[token], stored, expert) for stored in self._up]
            y = (
                torch.cat(parts, -1)
                if stock.is_concatenated
                else torch.stack(parts, -1).flatten(-2)
            )
            if stock.has_bias:
                y = y + stock.gate_up_proj_bias[expert]
            y = self._multiply(stock._apply_gate(y), self._down, expert)
            if stock.has_bias:
                y = y + stock.down_proj_bias[expert]
            output.index_add_(0, token, (y * weights[token, place, None]).to(output.dtype))
        return output

    def _multiply(self, x: torch.Tensor, stored: Stored, expert: int) -> torch.Tensor:
        blocks = torch.from_numpy(stored.data[expert])
        if stored.kind not in TYPES:
            return nn.functional.linear(x, blocks.to(self._dtype))
        kernel = GgmlKernel(x.shape[-1], TYPES[stored.kind], self._dtype)
        return kernel.multiply(x, blocks, len(blocks), None)


def whole_model(written: Written, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The stock model, each of its linears in blocks replaced by a `WholeLinear`."""
    model = AutoModelForCausalLM.from_pretrained(written.stock, dtype=dtype).eval()
    names = dict(written.stored)
    if model.config.tie_word_embeddings:
        table = model.get_input_embeddings()
        tied = next(name for name, module in model.named_modules() if module is table)
        names["lm_head.weight"] = names[f"{tied}.weight"]
    for name, stored in names.items():
        if ".experts." in name:
            if name.endswith(".down_proj"):
                path = name.rpartition(".")[0]
                ways = [names[f"{path}.{way}_proj"] for way in ("gate", "up", "down")]
                model.set_submodule(path, WholeExperts(model.get_submodule(path), ways, dtype))
            continue
        path = name.removesuffix(".weight")
        module: Any = model.get_submodule(path) if name.endswith(".weight") else None
        if stored.kind in TYPES and isinstance(module, nn.Linear | Conv1D):
            in_features = module.nx if isinstance(module, Conv1D) else module.in_features
            model.set_submodule(path, WholeLinear(stored, module.bias, in_features, dtype))
        # In a GGUF file its rows are outputs, as those of all linears.
        elif isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf, dtype=dtype)
            linear.weight.data, linear.bias.data = (
                module.weight.data.T.contiguous(),
                module.bias.data,
            )
            model.set_submodule(path, linear)
        # Float32 made of float16 is a copy, and so aligned; a mapped one is as it lies.
        elif isinstance(module, nn.Linear) or (stored.kind == "F32" and name.endswith(ROUTERS)):
            module.weight.data = module.weight.data.clone()
    return model


def byte_level(writer: gguf.GGUFWriter, pre: str = "gpt-2") -> None:
    """Add a tokenizer of bytes and a few words, and a chat template."""
    tokens = [
        "<pad>",
        "<s>",
        "</s>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "ab",
        "abab",
        "12",
        "<|im_end|>",
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "ab ab", "1 2"])
    writer.add_token_types([3, 3, 3, *(1 for _ in tokens[3:-1]), 3])
    writer.add_chat_template(TEMPLATE)

"""Inputs that are right, from which fuzzing starts: checkpoints, GGUF files and a record of a few
kilobytes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOWED = {"head_dim": 16, "sliding_window": 8}
SMALL_MODELS: dict[str, dict[str, Any]] = {  # model_type -> what differs from SMALL_SHAPE
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma2": WINDOWED,
    "gemma3_text": WINDOWED,
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 8},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}
# llama.cpp's architecture -> what differs from SMALL_SHAPE.
SMALL_GGUFS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "intermediate_size": 32},
    "phi3": {"model_type": "phi3", "intermediate_size": 32},
    "gemma3": {"model_type": "gemma3_text", "intermediate_size": 32} | WINDOWED,
    "gpt2": {"model_type": "gpt2", "n_inner": 32, "max_position_embeddings": 16},
    "qwen3moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    | {"moe_intermediate_size": 32},
}
GGUF_EXPERTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
GGUF_VALUES: dict[str, dict[str, Any]] = {  # of all of them, and of one architecture
    "all": {
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "block_count": 2,
        "attention.head_count": 2,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["<pad>", "<s>", "</s>", "a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    },
    "llama": {
        "attention.head_count_kv": [1, 1],
        "rope.dimension_count": 16,
        "rope.freq_base": 5000.0,
    },
    "phi3": {
        "attention.head_count_kv": 1,
        "rope.dimension_count": 16,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.attn_factor": 1.5,
    },
    "gemma3": {
        "attention.head_count_kv": 1,
        "attention.key_length": 16,
        "attention.sliding_window": 8,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    },
    "gpt2": {"context_length": 16},
    "qwen3moe": {
        "attention.head_count_kv": 1,
        "attention.key_length": 16,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 32,
    },
}
GGUF_ROPES: dict[str, dict[str, list[float]]] = {  # tensors that say how positions are rotated
    "llama": {"rope_freqs.weight": [1.0] * 4 + [1.977967] + [8.0] * 3},
    "phi3": {"rope_factors_long.weight": [2.0] * 8, "rope_factors_short.weight": [1.0] * 8},
}
SMALL_RECORD: dict[str, Any] = {
    "run_id": "0123456789",
    "status": "ok",
    "cell": {
        "experiment": "fuzz",
        "model": {
            "name": "tiny",
            "shape": {
                "hidden": 64,
                "intermediate": 128,
                "layers": 2,
                "heads": 4,
                "kv_heads": 2,
                "vocab": 256,
            },
        },
        "system": {"name": "flexinfer", "label": "FlexInfer", "format": "int4"},
        "device": {"name": "fixed", "source": "ours", "read_bytes_per_s": 500_000_000},
        "budget_bytes": 2**30,
        "workload": {},
        "round": 0,
        "cache_dir": "",
    },
    "bits": 4.5,
    "limits": {"method": "v1", "memory_bytes": 2**30},
    "provenance": {
        "versions": {"python": "3.11"},
        "git_commit": "0",
        "git_dirty": False,
        "cpu": "one",
        "cores": 2,
        "memory_bytes": 2**34,
        "kernel": "6.1",
        "file_system": "ext4",
        "started": "2026-01-01T00:00:00Z",
    },
    "tokens": 2,
    "passes": 2,
    "token_s": [2.0, 3.0],
    "token_bytes": [10, 10],
    "total_weight_bytes": 3_000_000_000,
    "process_bytes": 400_000_000,
    "kv_bytes": 0,
    "compute_s_per_pass": 0.2,
    "bandwidth_bytes_per_s": 5e8,
}


def small_checkpoint(family: str, path: Path, max_shard_size: str = "5GB") -> Path:
    """A checkpoint of a few kilobytes at `path`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SMALL_SHAPE | SMALL_MODELS[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def small_gguf(architecture: str, file: Path, parts: int = 1) -> list[bytes]:
    """A GGUF file of a few kilobytes, or its parts, as the `gguf` package writes it.

    Weights are zeros.
    """
    import gguf
    import numpy as np
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    settings = SMALL_SHAPE | SMALL_GGUFS[architecture]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    layers = settings["num_hidden_layers"]
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, layers)
    parameters = dict(model.named_parameters())
    split_tensors = -(-len(parameters) // parts) if parts > 1 else 0
    writer = gguf.GGUFWriter(
        None if split_tensors else file, architecture, split_max_tensors=split_tensors
    )
    adds: dict[type, Callable[[str, Any], None]] = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in (GGUF_VALUES["all"] | GGUF_VALUES[architecture]).items():
        name = key if key.startswith("tokenizer") else f"{architecture}.{key}"
        adds.get(type(value), writer.add_array)(name, value)
    for name, parameter in parameters.items():
        module, _, leaf = name.rpartition(".")
        shape = tuple(parameter.shape)
        if leaf in GGUF_EXPERTS:
            for way in GGUF_EXPERTS[leaf]:
                experts = np.zeros((shape[0], 32, 18), np.uint8)
                tensor = f"blk.{name.split('.')[2]}.ffn_{way}_exps.weight"
                writer.add_tensor(tensor, experts, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
            continue
        if isinstance(model.get_submodule(module), Conv1D):  # a file has the rows of a linear
            shape = shape[::-1]
        blocks = len(shape) == 2 and "wpe" not in name and not name.endswith("mlp.gate.weight")
        data = (
            np.zeros((shape[0], shape[1] // 32 * 18), np.uint8)
            if blocks
            else np.zeros(shape, np.float32)
        )
        kind = gguf.GGMLQuantizationType.Q4_0 if blocks else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get_name(module)}.{leaf}", data, raw_dtype=kind)
    for name, numbers in GGUF_ROPES.get(architecture, {}).items():
        writer.add_tensor(name, np.array(numbers, np.float32))
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [one.read_bytes() for one in sorted(file.parent.glob(f"{file.stem}*.gguf"))]

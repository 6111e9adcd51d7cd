"""Coverage-guided fuzzing of what a stranger may have written: headers, indices, configurations, GGUF files and records.

A target is one reader and the errors it documents. Inputs are the files themselves; they are changed by their format (flexinfer.bench.changes,
flexinfer.bench.gguf_changes) or as bytes, and atheris keeps those that reach new code. Each input is judged: anything but the documented
error that names the file is a finding, and so are files opened outside the checkpoint, sockets, processes, prompts, memory or seconds out of
proportion to the input, descriptors and threads left. A finding is saved beside the corpus and counted once for each
kind and place; fuzzing goes on. One JSON line a run goes to the record.

    pip install -e '.[bench,fuzz]'
    python -m flexinfer.bench.fuzz header --seconds 3600 --corpus outputs/fuzz --record results/reliability/fuzz.jsonl

Targets, seeds and judge need no atheris: the tests run them on the seeds.
"""

import argparse
import gc
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from flexinfer.bench.changes import MAX_INPUT_BYTES, Keys, change_framed, change_lines, framed
from flexinfer.bench.gguf_changes import ARCHITECTURE, change_gguf

MAX_MEMORY_BYTES = 64 << 20  # that reading one input may take beside what was there
MAX_ADDRESS_BYTES = 4 << 30  # the same for memory that is asked for and not touched
MAX_CPU_S = 5.0  # of one input; a second look at it has to agree
HANG_CPU_S = 20.0  # then it is stopped
HANG_S = 900  # then libFuzzer ends the process: a busy machine is no finding
ROOT = Path(__file__).parents[2]
MAX_MESSAGE_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class Target:
    """A reader of files from strangers."""

    seeds: Callable[
        [Path], list[bytes]
    ]  # makes what lies beside the input in this folder; returns inputs that are right
    place: Callable[[bytes, Path], Path]  # writes an input where the reader looks; returns the file or folder
    read: Callable[[Path], object]
    errors: Callable[[], tuple[type[Exception], ...]]  # that `read` documents
    modules: tuple[str, ...]  # whose coverage guides
    keys: Callable[[], Keys]
    change: Callable[[bytes, int, Keys], bytes | None] = (
        change_lines  # by a seed; None where it is not parsed
    )


# ---- the targets. Modules are imported inside, so that atheris can instrument them


def _checkpoint_errors() -> tuple[type[Exception], ...]:
    from flexinfer.formats.tensors import CheckpointError

    return (CheckpointError,)


def _header_seeds(folder: Path) -> list[bytes]:
    seeds = []
    for family in ("llama", "gpt2"):
        content = (small_checkpoint(family, folder / family) / "model.safetensors").read_bytes()
        (header_bytes,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + header_bytes])
        few = dict(sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])[0])[:5])
        stop = max(entry["data_offsets"][1] for entry in few.values() if "data_offsets" in entry)
        seeds.append(framed(json.dumps(few).encode(), bytes(stop)))
    tiny = {
        "none": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [0, 0]},
        "some": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "more": {"dtype": "U8", "shape": [], "data_offsets": [16, 17]},
        "__metadata__": {"format": "pt"},
    }
    return [*seeds, framed(json.dumps(tiny).encode(), bytes(17))]


def _place_header(data: bytes, folder: Path) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(data)
    return file


def _read_header(file: Path) -> None:
    from flexinfer.formats.safetensors import read_header

    end_bytes = 0
    for spec in read_header(file):
        assert end_bytes <= spec.offset_bytes or not spec.nbytes, f"{spec} overlaps"
        end_bytes = max(end_bytes, spec.offset_bytes + spec.nbytes)
    assert end_bytes <= file.stat().st_size, f"{end_bytes} is behind the end of the file"


def _index_seeds(folder: Path) -> list[bytes]:
    small_checkpoint("llama", folder / "sharded", max_shard_size="4KB")
    index = folder / "sharded" / "model.safetensors.index.json"
    return [json.dumps(json.loads(index.read_text())).encode()]


def _place_index(data: bytes, folder: Path) -> Path:
    (folder / "sharded" / "model.safetensors.index.json").write_bytes(data)
    return folder / "sharded"


def _open_index(folder: Path) -> None:
    from flexinfer.formats.checkpoint import Checkpoint

    for file in Checkpoint.open(folder).files:
        assert file.parent == folder, f"{file} is outside"


def _config_seeds(folder: Path) -> list[bytes]:
    seeds = []
    for family in SMALL_MODELS:
        path = small_checkpoint(family, folder / family)
        files = [path / "config.json", path / "generation_config.json"]
        seeds.append(b"\n".join(json.dumps(json.loads(file.read_text())).encode() for file in files))
    return seeds


def _place_config(data: bytes, folder: Path) -> Path:
    """Line 1 is config.json, the rest generation_config.json; the weights are those of the family that it names."""
    config, _, generation = data.partition(b"\n")
    try:
        values = json.loads(config)
        family = values["model_type"]
        path = folder / (family if family in SMALL_MODELS else "llama")
    except (ValueError, TypeError, KeyError, RecursionError):
        path = folder / "llama"
    (path / "config.json").write_bytes(config)
    (path / "generation_config.json").unlink(missing_ok=True)
    if generation:
        (path / "generation_config.json").write_bytes(generation)
    return path


def _build(path: Path) -> None:
    """What `from_pretrained` does with a configuration."""
    from flexinfer.formats.checkpoint import Checkpoint
    from flexinfer.model.match import NotStreamableError
    from flexinfer.model.resident import resident_bytes
    from flexinfer.model.skeleton import build_skeleton

    checkpoint = Checkpoint.open(path)
    try:
        skeleton = build_skeleton(checkpoint)
    except NotStreamableError:
        resident_bytes(checkpoint, "auto", 32)
    else:
        assert skeleton.meter.planned_bytes(32, 1) > 0


def _gguf_seeds(folder: Path) -> list[bytes]:
    seeds = [small_gguf(architecture, folder / f"{architecture}.gguf")[0] for architecture in SMALL_GGUFS]
    parts = small_gguf("llama", folder / "parts.gguf", parts=2)
    for i in range(2):  # an input that says it is part i of a model has the other one beside it
        (folder / f"split-{i}").mkdir()
        (folder / f"split-{i}" / PARTS[1 - i]).write_bytes(parts[1 - i])
    (folder / KEPT).mkdir()
    return [*seeds, *parts]


def _place_gguf(data: bytes, folder: Path) -> Path:
    """The folder that holds the input and another part, where it has the number of a part; otherwise the file."""
    at = data.find(b"split.no")
    if at < 0:
        path = file = folder / "model.gguf"
    else:
        number = int.from_bytes(data[at + 12 : at + 13], "little") % 2  # behind the key and its type
        path = folder / f"split-{number}"
        file = path / PARTS[number]
    file.write_bytes(data)
    return path


def _build_gguf(path: Path) -> None:
    """What `from_pretrained` does with a GGUF file, but for the tokenizer, which another process makes."""
    from flexinfer.formats.checkpoint import Checkpoint
    from flexinfer.formats.gguf import read_gguf
    from flexinfer.formats.gguf_model import config_of, gguf_in, write_config
    from flexinfer.formats.gguf_tokenizer import ARRAYS
    from flexinfer.model.skeleton import build_skeleton

    file = gguf_in(path)
    assert file is not None
    gguf = read_gguf(file)
    for part in gguf.files:
        end_bytes = 0
        for spec in gguf.tensors.values():
            if spec.file == part:
                assert end_bytes <= spec.offset_bytes, f"{spec} overlaps"
                end_bytes = spec.offset_bytes + spec.nbytes
        assert end_bytes <= part.stat().st_size, f"{end_bytes} is behind the end of the file"
    assert read_gguf(file, [f"tokenizer.ggml.{name}" for name in ARRAYS]).tensors == gguf.tensors
    kept = path.parent / KEPT
    write_config(config_of(gguf), kept)
    skeleton = build_skeleton(Checkpoint(file, gguf.tensors, kept, gguf.architecture))
    assert skeleton.meter.planned_bytes(32, 1) > 0


def _gguf_keys() -> Keys:
    from flexinfer.formats.gguf_model import LAYERS_OF_27B, MODEL_TYPES

    numbers = ["context_length", "embedding_length", "feed_forward_length", "rope.dimension_count"]
    numbers += ["attention.head_count", "attention.head_count_kv", "attention.key_length"]
    numbers += ["attention.sliding_window", "rope.scaling.original_context_length"]
    numbers += ["expert_count", "expert_used_count", "expert_feed_forward_length"]
    ratios = ["rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor", "rope.scaling.attn_factor"]
    ratios += ["attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"]
    ratios += ["attn_logit_softcapping", "final_logit_softcapping"]
    kinds: Keys = {
        "block_count": [1, 2, 3, 10**9, *LAYERS_OF_27B.values()],
        "rope.scaling.type": ["none", "linear", "yarn", "longrope", "bananas"],
        **{name: [0, 1, 8, 16, 32, 64, 10**9, [16, 16], [8, 16]] for name in numbers},
        **{name: [0.0, 1e-5, 0.5, 1.0, 2.0, 10_000.0, [1.0, 1.0]] for name in ratios},
    }
    return {
        "general.architecture": [*MODEL_TYPES, "bananas", "llama4"],
        "general.alignment": [1, 8, 64, 2**40, 2**63],
        "general.name": ["owner/name"],
        "split.no": [0, 1, 2],
        "split.count": [0, 1, 2, 3],
        "split.tensors.count": [0, 1, 10**6],
        "tokenizer.ggml.tokens": [["a", "b"], [], [1, 2]],
        "tokenizer.ggml.eos_token_id": [0, 47, 48, 10**9],
        "tokenizer.ggml.padding_token_id": [0, 47, 48, 10**9],
        **{f"{ARCHITECTURE}.{name}": values for name, values in kinds.items()},
    }


def _record_seeds(folder: Path) -> list[bytes]:
    """A line of each experiment that has been recorded here, and a small one."""
    from flexinfer.bench.records import QUALITY, RELIABILITY, Record

    files = [
        file
        for file in sorted((ROOT / "results").rglob("*.jsonl"))
        if file.parent.name not in (QUALITY, RELIABILITY)
    ]
    lines = [line for file in files for line in file.read_bytes().splitlines()[:1] if len(line) < 8_192]
    record = Record.model_validate(SMALL_RECORD).model_dump_json().encode()
    return [record + b"\n", *(line + b"\n" for line in lines if b'"run_id"' in line)]


def _place_records(data: bytes, folder: Path) -> Path:
    file = folder / "records.jsonl"
    file.write_bytes(data)
    return file


def _read_records(file: Path) -> None:
    from flexinfer.bench.records import Record, load_records, with_common_costs

    records = load_records(file)
    for record in [*records, *with_common_costs(records)]:
        assert record.cell_key
    for record in records:
        assert Record.model_validate_json(record.model_dump_json()) == record, "is not read back as it was"


def _record_errors() -> tuple[type[Exception], ...]:
    from flexinfer.bench.records import RecordError

    return (RecordError,)


def _config_keys() -> Keys:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    layers = ["full_attention", "sliding_attention", "linear_attention"]
    ropes = ["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
    return {
        "model_type": list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        "auto_map": [{"AutoConfig": "code.Config", "AutoModelForCausalLM": "owner/name--code.Model"}],
        "trust_remote_code": [True],
        "_name_or_path": ["owner/name", "/etc", "../.."],
        "configuration_files": [["config.4.0.0.json"], ["config.4.0/../../../x.json"]],
        "attn_implementation": ["owner/name", "kernels-community/flash-attn2", "flash_attention_2", "eager"],
        "_attn_implementation": ["owner/name:code", "paged|eager"],
        "experts_implementation": ["owner/name", "eager"],
        "quantization_config": [
            {"quant_method": method} for method in ("flexinfer", "gptq", "bitsandbytes", "fp8")
        ],
        "layer_types": [layers, layers[:2]],
        "rope_scaling": [{"rope_type": kind, "factor": 2.0} for kind in ropes],
        "rope_parameters": [{"rope_type": kind, "rope_theta": 1e4, "factor": 0} for kind in ropes],
        "num_labels": [10**9],
        "num_hidden_layers": [10**9],
        "num_experts": [10**9],
        "dtype": ["bfloat16", "int8", "float64", "nn"],
        "text_config": [{}],
        "hidden_act": ["silu", "relu", "nothing"],
        "cache_implementation": ["static", "offloaded"],
    }


TARGETS: dict[str, Target] = {
    "header": Target(
        seeds=_header_seeds,
        place=_place_header,
        read=_read_header,
        errors=_checkpoint_errors,
        modules=("flexinfer.formats",),
        keys=lambda: {
            "dtype": ["F64", "BF16", "BOOL", "F8_E4M3"],
            "shape": [[], [0], [2**40, 2**40]],
            "data_offsets": [[0, 0], [0, 2**63], [1]],
            "__metadata__": [{"format": "pt"}],
        },
        change=change_framed,
    ),
    "index": Target(
        seeds=_index_seeds,
        place=_place_index,
        read=_open_index,
        errors=_checkpoint_errors,
        modules=("flexinfer.formats",),
        keys=lambda: {
            "weight_map": [{}, {"a": "model.safetensors"}],
            "metadata": [{"total_size": -1}],
            "lm_head.weight": ["../model.safetensors", "config.json", "/proc/self/mem", "."],
        },
    ),
    "config": Target(
        seeds=_config_seeds,
        place=_place_config,
        read=_build,
        errors=_checkpoint_errors,
        modules=(
            "flexinfer.activations",
            "flexinfer.formats",
            "flexinfer.streaming.cache",
            "huggingface_hub.dataclasses",
            "transformers.cache_utils",
            "transformers.configuration_utils",
            "transformers.generation.configuration_utils",
            "transformers.masking_utils",
            "transformers.modeling_rope_utils",
            "transformers.models",
        ),
        keys=_config_keys,
    ),
    "gguf": Target(
        seeds=_gguf_seeds,
        place=_place_gguf,
        read=_build_gguf,
        errors=_checkpoint_errors,
        modules=(
            "flexinfer.activations",
            "flexinfer.formats",
            "transformers.configuration_utils",
            "transformers.modeling_gguf_pytorch_utils",
            "transformers.modeling_rope_utils",
        ),
        keys=_gguf_keys,
        change=change_gguf,
    ),
    "records": Target(
        seeds=_record_seeds,
        place=_place_records,
        read=_read_records,
        errors=_record_errors,
        modules=("flexinfer.bench.config", "flexinfer.bench.records"),
        keys=lambda: {"cell": [{}], "limits": [{"method": "v1"}], "engine": [{"a": 1}], "ratio": [None]},
    ),
}
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
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
SMALL_GGUFS: dict[str, dict[str, Any]] = {  # llama.cpp's architecture -> what differs from SMALL_SHAPE
    "llama": {"model_type": "llama", "intermediate_size": 32},
    "phi3": {"model_type": "phi3", "intermediate_size": 32},
    "gemma3": {"model_type": "gemma3_text", "intermediate_size": 32} | WINDOWED,
    "gpt2": {"model_type": "gpt2", "n_inner": 32, "max_position_embeddings": 16},
    "qwen3moe": {"model_type": "qwen3_moe", "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
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
    "llama": {"attention.head_count_kv": [1, 1], "rope.dimension_count": 16, "rope.freq_base": 5000.0},
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
PARTS = ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf")
KEPT = "kept"  # the folder in which a reader may write
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
    """A GGUF file of a few kilobytes, or its parts, as the `gguf` package writes it. Weights are zeros."""
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
    writer = gguf.GGUFWriter(None if split_tensors else file, architecture, split_max_tensors=split_tensors)
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
        data = np.zeros((shape[0], shape[1] // 32 * 18), np.uint8) if blocks else np.zeros(shape, np.float32)
        kind = gguf.GGMLQuantizationType.Q4_0 if blocks else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get_name(module)}.{leaf}", data, raw_dtype=kind)
    for name, numbers in GGUF_ROPES.get(architecture, {}).items():
        writer.add_tensor(name, np.array(numbers, np.float32))
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [one.read_bytes() for one in sorted(file.parent.glob(f"{file.stem}*.gguf"))]


# ---- judging


class Watch:
    """Sees what the process does while a reader runs. One for a process: audit hooks stay."""

    FORBIDDEN = (
        "socket.",
        "subprocess.",
        "os.system",
        "os.exec",
        "os.fork",
        "os.posix_spawn",
        "builtins.input",
    )

    ALLOWED = ("ninja", "--version")  # transformers asks for a compiler for a kernel of its own (RWKV)

    def __init__(self) -> None:
        paths = sysconfig.get_paths()
        folders = [os.path.realpath(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
        folders = [f"{one}/" for one in (*folders, ROOT / "flexinfer", "/proc")]
        self._libraries = (*folders, "/dev/null", "/dev/urandom")
        self._folder = ""
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def start(self, folder: Path) -> None:
        self.seen = []
        self._folder = os.path.realpath(folder)

    def stop(self) -> None:
        self._folder = ""

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._folder or (event != "open" and not event.startswith(self.FORBIDDEN)):
            return
        if event == "subprocess.Popen" and tuple(arguments[1]) == self.ALLOWED:
            return
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(path, str | bytes | os.PathLike):
                return
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            folder, self._folder = self._folder, ""
            try:
                real = os.path.realpath(os.fsdecode(path))
            except (ValueError, OSError):
                return
            finally:
                self._folder = folder
            inside = (real + "/").startswith(folder + "/")
            kept = real.startswith(f"{folder}/{KEPT}/")
            library = real.startswith(self._libraries) and (not writes or "__pycache__" in real)
            if (inside and not writes) or kept or library:
                return
            event = f"open {real} {mode}"
        self.seen.append(event if event.startswith("open ") else f"{event} {arguments!r:.200}")
        raise PermissionError(f"forbidden while fuzzing: {event}")


@cache
def watch() -> Watch:
    """The one Watch of this process."""
    return Watch()


@dataclass(slots=True)
class Finding:
    """What is wrong with how an input was read."""

    kind: str  # and place; findings of one kind count once
    message: str = ""
    trace: str = ""

    @property
    def key(self) -> str:
        """A file name for its kind."""
        return hashlib.sha256(self.kind.encode(errors="backslashreplace")).hexdigest()[:12]

    @property
    def text(self) -> str:
        """Kind and message in one line, then the trace."""
        return f"{self.kind}: {self.message[:300]!r}\n\n{self.trace[-20_000:]}"


class Hang(BaseException):
    """An input that takes more than HANG_CPU_S."""


def _stop(*_: object) -> None:
    raise Hang("stopped")


def judge(target: Target, data: bytes, folder: Path) -> Finding | None:
    """Read an input and say what is wrong with the way that went, if anything. Dear things get a second look."""
    found, dear = _judge_once(target, data, folder)
    if found is None and dear:  # the first use of a module imports it
        found, dear = _judge_once(target, data, folder)
    if found is None and dear:
        found = Finding(dear.partition(":")[0], dear)
    return found


def _judge_once(target: Target, data: bytes, folder: Path) -> tuple[Finding | None, str]:
    from flexinfer.memory.process import peak_bytes, reset_peak

    path = target.place(data, folder)
    errors = target.errors()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    reset_peak()
    before_bytes, start_s = peak_bytes(), process_time()
    raised: BaseException | None = None
    handler = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, HANG_CPU_S)
    watch().start(folder)
    try:
        target.read(path)
    except (Exception, Hang) as error:
        raised = error
    finally:
        watch().stop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
    cpu_s, more_bytes = process_time() - start_s, peak_bytes() - before_bytes
    found = None
    if isinstance(raised, errors):
        found = _of_refusal(raised, path)
    elif raised is not None:
        found = _of_error(raised)
    raised = None  # it holds the frames, and what is open in them
    if watch().seen:
        found = Finding("reached outside", watch().seen[0])
    if len(os.listdir("/proc/self/fd")) > descriptors or threading.active_count() > threads:
        gc.collect()
        if found is None and len(os.listdir("/proc/self/fd")) > descriptors:
            found = Finding("descriptors are left open")
        if found is None and threading.active_count() > threads:
            found = Finding("threads are left running")
    if cpu_s > MAX_CPU_S:
        return found, f"slow: {cpu_s:.0f} s"
    if more_bytes > MAX_MEMORY_BYTES:
        return found, f"memory: {more_bytes >> 20} MiB"
    return found, ""


def _of_error(error: BaseException) -> Finding:
    at = [one for one in traceback.extract_tb(error.__traceback__) if one.filename != __file__]
    where = f" in {Path(at[-1].filename).name}:{at[-1].name}" if at else ""
    return Finding(f"{type(error).__name__}{where}", str(error), "".join(traceback.format_exception(error)))


def _of_refusal(error: Exception, path: Path) -> Finding | None:
    """A refusal has to name the file and be fit for a terminal, and its cause not be a lack of memory."""
    message, kind = str(error), ""
    if str(path) not in message:
        kind = "the file is not named"
    elif not message.replace("\n", "").isprintable():
        kind = "a message with control characters"
    elif len(message) > MAX_MESSAGE_CHARACTERS:
        kind = "a message without end"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
            kind = "memory is asked for before sizes are checked"
        cause = cause.__cause__
    if not kind:
        return None
    return Finding(kind, message.replace(str(path), ""), "".join(traceback.format_exception(error)))


# ---- running


def fuzz_here(name: str, seconds: int, corpus: Path) -> None:
    """Fuzz in this process, with atheris, for `seconds` from now. Does not return: libFuzzer ends the process."""
    start_s = perf_counter()
    import atheris

    target = TARGETS[name]
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    findings = corpus / f"{name}-findings"
    findings.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=list(target.modules)):
        seeds = target.seeds(folder)
        for seed in seeds:
            target.read(target.place(seed, folder))
            found = judge(target, seed, folder)
            assert found is None, found
    keys = target.keys()
    if not any((corpus / name).iterdir()):
        for i, seed in enumerate(seeds):
            (corpus / name / f"seed-{i}").write_bytes(seed)

    def one_input(data: bytes) -> None:
        found = judge(target, data, folder)
        if found is not None and not (findings / f"{found.key}.txt").exists():
            (findings / f"{found.key}.input").write_bytes(data)
            (findings / f"{found.key}.txt").write_text(found.text, errors="backslashreplace")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        changed = target.change(data, seed, keys) if seed % 8 else None
        if changed is None or len(changed) > max_size:
            return bytes(atheris.Mutate(data, len(data)) if data else b"{}")
        return changed

    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used_bytes + MAX_ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    options = [
        f"-max_total_time={max(1, int(seconds - (perf_counter() - start_s)))}",
        f"-timeout={HANG_S}",
        f"-max_len={MAX_INPUT_BYTES}",
        "-rss_limit_mb=0",
        "-print_final_stats=1",
        f"-artifact_prefix={findings}/ended-",
    ]
    atheris.Setup(["fuzz", *options, str(corpus / name)], one_input, custom_mutator=mutate)
    atheris.Fuzz()


def _scratch() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def fuzz(name: str, seconds: int, corpus: Path, record_file: Path | None) -> dict[str, Any]:
    """Fuzz for `seconds`, in a process that is begun anew if an input ends it. Returns the record, and appends it to the file."""
    from flexinfer.bench.provenance import provenance

    (corpus / name).mkdir(parents=True, exist_ok=True)
    findings = corpus / f"{name}-findings"
    shutil.rmtree(findings, ignore_errors=True)
    facts = provenance(corpus).model_dump(mode="json")
    start_s, cpu_start_s = perf_counter(), _cpu_of_children_s()
    executions, edges, ends = 0, 0, 0
    log_file = corpus / f"{name}.log"
    log_file.unlink(missing_ok=True)
    while (left_s := seconds - (perf_counter() - start_s)) > 1:
        arguments = ["--here", "--seconds", str(int(left_s)), "--corpus", str(corpus)]
        position = log_file.stat().st_size if log_file.exists() else 0
        with (
            log_file.open("ab") as log,
            tempfile.TemporaryDirectory(
                prefix="fuzz-", dir=_scratch()
            ) as scratch,  # libFuzzer ends without cleaning up
        ):
            done = subprocess.run(
                [sys.executable, "-m", "flexinfer.bench.fuzz", name, *arguments],
                env=os.environ | {"PYTHONHASHSEED": "0", "TMPDIR": scratch},
                stdout=log,
                stderr=log,
                check=False,
            )
        text = log_file.read_bytes()[position:].decode(errors="replace")
        counted = re.findall(r"stat::number_of_executed_units:\s*(\d+)", text)
        if not counted:
            raise RuntimeError(f"fuzzing {name} did not begin: {text[-2000:]}")
        executions += int(counted[-1])
        edges = max([edges, *map(int, re.findall(r"cov: (\d+)", text))])
        ends += done.returncode != 0
    kinds = [file.read_text().partition("\n")[0] for file in sorted(findings.glob("*.txt"))]
    record = {
        "target": name,
        "executions": executions,
        "wall_s": round(perf_counter() - start_s, 1),
        "cpu_s": round(_cpu_of_children_s() - cpu_start_s, 1),
        "edges": edges,
        "corpus": sum(1 for _ in (corpus / name).iterdir()),
        "findings": len(kinds) + ends,
        "ended_the_process": ends,
        "kinds": kinds,
        "provenance": facts,
    }
    if record_file is not None:
        record_file.parent.mkdir(parents=True, exist_ok=True)
        with record_file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
    return record


def _cpu_of_children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(argv: list[str] | None = None) -> int:
    """0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m flexinfer.bench.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path("outputs/fuzz"), help="kept and gone on with")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.here:
        fuzz_here(arguments.target, arguments.seconds, arguments.corpus)
    record = fuzz(arguments.target, arguments.seconds, arguments.corpus, arguments.record)
    print(json.dumps(record, indent=1))
    return int(record["findings"] > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Synthetic checkpoints in bf16: stock Hugging Face directories of a true shape, random weights,
written at the speed of the disk.

Throughput depends on shapes and bytes, not on what the weights say; quality is never quoted from
these. The same shapes as GGUF: experiments.gguf.

All bytes come from one pool of random numbers of 64 MiB, read from another offset for every tensor,
so memory stays small and the random generator is not the bottleneck. Linears have zero mean and a
standard deviation of 0.02, norms are ones: logits stay finite through any number of layers. A
checkpoint is written to a directory ending in .partial and renamed when complete; a run that was
killed starts it again.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from experiments.gguf import check_free_disk, shape_digest
from experiments.model_config import ModelConfig, ShapeConfig, require
from flexinfer.cache_dir import cache_dir as default_cache_dir
from flexinfer.formats.safetensors import INDEX_FILE

POOL_BYTES = 64 * 2**20
SHARD_BYTES = 2 * 10**9
PAGE_BYTES = 4096
WEIGHT_STD = 0.02

Tensors = dict[str, tuple[int, ...]]  # name -> shape, in order of use


def make_checkpoint(
    model: ModelConfig,
    format: str = "bf16",
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """The directory of `model`'s synthetic checkpoint in bf16, written now unless it is cached.

    Raises: ConfigError for a model without a shape or another format; OSError when the disk is too
    full.
    """
    require(format == "bf16", "format", format, "synthetic safetensors are made in bf16")
    require(model.shape is not None, "model.shape", None, "a synthetic checkpoint needs its shape")
    assert model.shape is not None
    cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    shape = model.shape
    path = cache_dir / "synthetic" / f"{model.name}-{format}-{shape_digest(shape)}"
    return make_once(path, lambda directory: _write(shape, directory, path.name, progress))


def make_once(path: Path, write: Callable[[Path], None]) -> Path:
    """`path`, which `write` fills unless it exists already: complete or not at all, whoever else
    asks for it now.

    write: called with a new, empty directory beside `path`, which is renamed to `path` when it
    returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_name(path.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            partial.rename(path)
    return path


def _write(shape: ShapeConfig, directory: Path, label: str, progress: bool) -> None:
    tensors = _tensors(shape)
    total_bytes = sum(map(_nbytes, tensors.values()))
    check_free_disk(directory, total_bytes)
    weights = _pool()

    def chunks(name: str, size: tuple[int, ...]) -> Iterator[memoryview]:
        if len(size) == 1:
            yield torch.ones(size, dtype=torch.bfloat16).view(torch.uint8).numpy().data
            return
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        for part in _cut(weights, start, _nbytes(size)):
            bar.advance(task, len(part))
            yield part

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    shards = _shards(tensors)
    files = [
        f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)
    ]
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        task = bar.add_task(f"writing {label}", total=total_bytes)
        for file, shard in zip(files, shards, strict=True):
            _write_shard(directory / file, shard, chunks)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=1) + "\n")


def _shards(tensors: Tensors) -> list[Tensors]:
    """`tensors` cut into files of about SHARD_BYTES.

    In each, what fills whole pages comes first and so begins at one.
    """
    shards: list[Tensors] = [{}]
    for name, size in tensors.items():
        if shards[-1] and sum(map(_nbytes, shards[-1].values())) + _nbytes(size) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = size
    return [
        dict(sorted(shard.items(), key=lambda one: _nbytes(one[1]) % PAGE_BYTES != 0))
        for shard in shards
    ]


def _write_shard(
    path: Path, tensors: Tensors, chunks: Callable[[str, tuple[int, ...]], Iterator[memoryview]]
) -> None:
    """One safetensors file whose data begins at a page, synced."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in tensors.items():
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [at, at + _nbytes(size)]}
        at += _nbytes(size)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, size in tensors.items():
            for chunk in chunks(name, size):
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _nbytes(size: tuple[int, ...]) -> int:
    return 2 * math.prod(size)


def _tensors(shape: ShapeConfig) -> Tensors:
    """Shapes of all tensors, in order of use."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    layer: Tensors = {
        "input_layernorm": (shape.hidden,),
        "post_attention_layernorm": (shape.hidden,),
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }
    tensors: Tensors = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for i in range(shape.layers):
        tensors |= {f"model.layers.{i}.{name}.weight": size for name, size in layer.items()}
    tensors["model.norm.weight"] = (shape.hidden,)
    return tensors if shape.tie else tensors | {"lm_head.weight": (shape.vocab, shape.hidden)}


def _config(shape: ShapeConfig) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": None,  # random text never ends by itself
        "tie_word_embeddings": shape.tie,
        "dtype": "bfloat16",
    }


def _pool() -> memoryview:
    """Random bf16 weights."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.empty(POOL_BYTES // 2, dtype=torch.bfloat16).normal_(
        0, WEIGHT_STD, generator=generator
    )
    return weights.view(torch.uint8).numpy().data


def _cut(pool: memoryview, start: int, nbytes: int) -> Iterator[memoryview]:
    """`nbytes` of the pool from page `start` on, going round."""
    offset = start * PAGE_BYTES % len(pool)
    while nbytes:
        part = pool[offset : offset + min(nbytes, 4 * 2**20)]
        yield part
        nbytes -= len(part)
        offset = (offset + len(part)) % len(pool)

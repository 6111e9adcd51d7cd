"""Synthetic checkpoints: true shapes, random weights, written at the speed of the disk.

Throughput depends on shapes and bytes, not on what the weights say; quality is never quoted from these. Two
formats of a Llama-like model: 'bf16', a stock Hugging Face checkpoint, and 'int4', what `flexinfer quantize`
would make of it (random nibbles, sane scales), without writing the bf16 first.

All bytes come from one pool of random numbers of 64 MiB, read from another offset for every tensor, so memory
stays small and the random generator is not the bottleneck. Linears have zero mean and a standard deviation of
0.02, norms are ones: logits stay finite through any number of layers. A checkpoint is written to a directory
ending in .partial and renamed when complete; a run that was killed starts it again.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
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

from flexinfer.bench.config import ModelConfig, ShapeConfig, require
from flexinfer.formats.quantize import (
    Entry,
    check_free_disk,
    packed_entry,
    plan_shards,
    shard_names,
    write_index,
    write_shard,
)
from flexinfer.kernels.packed import PackedFormat, blocks, can_pack, measure_dequantize_rows

POOL_BYTES = 64 * 2**20
SHARD_BYTES = 2 * 10**9
GROUP_SIZE = 64
WEIGHT_STD = 0.02
NIBBLE_STD = 4.61  # of uniform 0..15


def default_cache_dir() -> Path:
    """$FLEXINFER_CACHE, or ~/.cache/flexinfer."""
    return Path(os.environ.get("FLEXINFER_CACHE", "~/.cache/flexinfer")).expanduser()


def make_checkpoint(
    model: ModelConfig, format: str, cache_dir: str | Path | None = None, progress: bool = True
) -> Path:
    """The directory of `model`'s synthetic checkpoint in `format` ('int4' or 'bf16'), written now unless it is cached.

    Raises: ConfigError for a model without a shape or another format; QuantizeError when the disk is too full.
    """
    require(format in ("int4", "bf16"), "format", format, "synthetic checkpoints are made in int4 and bf16")
    require(model.shape is not None, "model.shape", None, "a synthetic checkpoint needs its shape")
    assert model.shape is not None
    cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    digest = hashlib.sha256(json.dumps(asdict(model.shape), sort_keys=True).encode()).hexdigest()[:8]
    path = cache_dir / "synthetic" / f"{model.name}-{format}-{digest}"
    shape = model.shape
    return make_once(path, lambda directory: _write(shape, format, directory, path.name, progress))


def make_once(path: Path, write: Callable[[Path], None]) -> Path:
    """`path`, which `write` fills unless it exists already: complete or not at all, whoever else asks for it now.

    write: called with a new, empty directory beside `path`, which is renamed to `path` when it returns.
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


def _write(shape: ShapeConfig, format: str, directory: Path, label: str, progress: bool) -> None:
    packed_format = (
        measure_dequantize_rows(PackedFormat.for_this_cpu(4, GROUP_SIZE)) if format == "int4" else None
    )
    linears = {f"{name}.weight": size for name, size in _linears(shape).items()}
    if packed_format:
        for name, (_, in_features) in linears.items():
            require(
                can_pack(packed_format, in_features), name, in_features, f"use a multiple of {GROUP_SIZE}"
            )
    entries = []
    tied = shape.tie and packed_format is None  # packed, lm_head is a tensor of its own
    for name, size in _tensors(shape).items():
        if tied and name == "lm_head.weight":
            continue
        if packed_format and name in linears:
            entries.append(packed_entry(packed_format, name, *linears[name]))
        else:
            entries.append(Entry(name, "BF16", size, 2 * torch.Size(size).numel()))
    shards = plan_shards(entries, SHARD_BYTES)
    total_bytes = sum(entry.nbytes for entry in entries)
    check_free_disk(directory, total_bytes)
    random_bytes, weights, scales = _pools()

    def chunks(entry: Entry) -> Iterator[memoryview]:
        start = int.from_bytes(hashlib.sha256(entry.name.encode()).digest()[:4], "little")
        if entry.dtype == "U8":
            assert packed_format is not None
            out_features, in_features = linears[entry.name]
            for block in blocks(packed_format, out_features, in_features):
                padded_rows = -(-(block.row_stop - block.row_start) // 16) * 16
                nibble_bytes = padded_rows * in_features // 2
                for part in (
                    *_cut(random_bytes, start + block.offset_bytes, nibble_bytes),
                    *_cut(scales, start + block.offset_bytes, block.nbytes - nibble_bytes),
                ):
                    bar.advance(task, len(part))
                    yield part
        elif len(entry.shape) == 1:
            yield torch.ones(entry.shape, dtype=torch.bfloat16).view(torch.uint8).numpy().data
        else:
            for part in _cut(weights, start, entry.nbytes):
                bar.advance(task, len(part))
                yield part

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        task = bar.add_task(f"writing {label}", total=total_bytes)
        for file_name, shard in zip(shard_names(len(shards)), shards, strict=True):
            write_shard(directory / file_name, shard, chunks)
    write_index(directory, shards)
    (directory / "config.json").write_text(json.dumps(_config(shape, tied, packed_format), indent=1) + "\n")


def _linears(shape: ShapeConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear, in order of use."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    layer = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }
    linears = {f"model.layers.{i}.{name}": size for i in range(shape.layers) for name, size in layer.items()}
    return linears | {"lm_head": (shape.vocab, shape.hidden)}


def _tensors(shape: ShapeConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, in order of use."""
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for name, size in _linears(shape).items():
        layer, _, part = name.rpartition(".layers.")[2].partition(".")
        if part == "self_attn.q_proj":
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{norm}.weight"] = (shape.hidden,)
        if name == "lm_head":
            tensors["model.norm.weight"] = (shape.hidden,)
        tensors[f"{name}.weight"] = size
    return tensors


def _config(shape: ShapeConfig, tied: bool, packed_format: PackedFormat | None) -> dict[str, object]:
    config: dict[str, object] = {
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
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }
    return config | ({"quantization_config": packed_format.to_config()} if packed_format else {})


def _pools() -> tuple[memoryview, memoryview, memoryview]:
    """Random bytes, random bf16 weights, and bf16 (scale, zero) pairs that give such weights from uniform nibbles."""
    generator = torch.Generator().manual_seed(0)
    random_bytes = torch.randint(2**63 - 1, (POOL_BYTES // 8,), generator=generator)
    weights = torch.empty(POOL_BYTES // 2, dtype=torch.bfloat16).normal_(0, WEIGHT_STD, generator=generator)
    scale = WEIGHT_STD / NIBBLE_STD * (0.5 + torch.rand(2**20, generator=generator))
    scales = torch.stack((scale, 0.5 * scale), -1).bfloat16()  # the mean nibble is 7.5: zero mean
    first, second, third = (
        part.view(torch.uint8).flatten().numpy().data for part in (random_bytes, weights, scales)
    )
    return first, second, third


def _cut(pool: memoryview, start: int, nbytes: int) -> Iterator[memoryview]:
    """`nbytes` of the pool from page `start` on, going round."""
    offset = start * 4096 % len(pool)
    while nbytes:
        part = pool[offset : offset + min(nbytes, 4 * 2**20)]
        yield part
        nbytes -= len(part)
        offset = (offset + len(part)) % len(pool)

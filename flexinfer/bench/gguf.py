"""Synthetic GGUF files of a true shape with random weights, which FlexInfer and llama.cpp both read (DESIGN: Measuring).

Mechanism: the header comes from the `gguf` package. Every matrix, embedding and output included, is of one of ggml's types, both of
4.5 bits a weight: Q4_0 (18 bytes for 32 weights), or Q4_K (144 bytes for 256) where rows are a multiple of 256, else Q4_0. The norms are
float32 ones, and the tokenizer is a dummy that llama.cpp accepts (three control tokens, the 256 bytes, then numbered words). Blocks
come from one pool of random ones whose weights have mean 0 and standard deviation 1/sqrt(hidden), so that activations stay finite.
Files are written to a `.part` file, synced and renamed: a killed run leaves nothing that loads.

Cost model: 4.5 / 8 bytes a weight, written at the disk's speed; memory of the pool.

What it does not do: quantise a real model; a text decoded from these weights means nothing.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import numpy.typing as npt

from flexinfer.bench.config import ConfigError, ModelConfig, ShapeConfig, require

Q4_0, Q4_K = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_K
TYPES = {"q4_0": Q4_0, "q4_k": Q4_K}
FILE_TYPES = {"q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q4_k": gguf.LlamaFileType.MOSTLY_Q4_K_S}
FIXED_TOKENS = 3 + 256  # <unk> <s> </s> and the bytes
POOL_BYTES = 36 << 20
NIBBLE_DEVIATION = float(np.sqrt((16**2 - 1) / 12))  # of uniform 0 to 15


def make_gguf(model: ModelConfig, format: str, cache_dir: Path) -> Path:
    """The file of `model`'s synthetic checkpoint in `format` ('q4_0' or 'q4_k'), written now unless it is cached.

    Raises: as `write_synthetic`, and ConfigError for a model without a shape.
    """
    require(model.shape is not None, "model.shape", None, "a synthetic checkpoint needs its shape")
    assert model.shape is not None
    name = f"{model.name}-{format}-{shape_digest(model.shape)}"
    return write_synthetic(cache_dir / "synthetic" / name / "model.gguf", model.shape, model.name, format)


def shape_digest(shape: ShapeConfig) -> str:
    """Tells two shapes of one model name apart, in the name of a directory."""
    return hashlib.sha256(json.dumps(asdict(shape), sort_keys=True).encode()).hexdigest()[:8]


def tensor_shapes(shape: ShapeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape [out, in] (norms: [hidden]) of every tensor, in llama.cpp's names."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    yield "token_embd.weight", (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (shape.hidden,)
        yield block + "attn_q.weight", (shape.hidden, shape.hidden)
        yield block + "attn_k.weight", (kv, shape.hidden)
        yield block + "attn_v.weight", (kv, shape.hidden)
        yield block + "attn_output.weight", (shape.hidden, shape.hidden)
        yield block + "ffn_norm.weight", (shape.hidden,)
        yield block + "ffn_gate.weight", (shape.intermediate, shape.hidden)
        yield block + "ffn_up.weight", (shape.intermediate, shape.hidden)
        yield block + "ffn_down.weight", (shape.hidden, shape.intermediate)
    yield "output_norm.weight", (shape.hidden,)
    if not shape.tie:
        yield "output.weight", (shape.vocab, shape.hidden)


def tensor_type(dims: tuple[int, ...], format: str) -> gguf.GGMLQuantizationType:
    """The type of a tensor in a file of `format`."""
    if len(dims) == 1:
        return gguf.GGMLQuantizationType.F32
    kind = TYPES[format]
    return kind if dims[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Q4_0


def tensor_bytes(dims: tuple[int, ...], format: str) -> int:
    """Bytes of one tensor in a file of `format`."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[tensor_type(dims, format)]
    return int(np.prod(dims)) // elements * nbytes


def file_bytes(shape: ShapeConfig, format: str) -> int:
    """Bytes of all tensors of the file (header apart)."""
    return sum(tensor_bytes(dims, format) for _, dims in tensor_shapes(shape))


def write_synthetic(
    path: Path,
    shape: ShapeConfig,
    name: str,
    format: str = "q4_0",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the checkpoint unless it is there already.

    Args:
        path: the .gguf file.
        shape: dimensions of the decoder; hidden and intermediate must be multiples of 32.
        name: the model's name in the header.
        format: 'q4_0' or 'q4_k'.
        seed: of the weights.
        progress: called with the bytes of every tensor once it is written.
    Returns: `path`.
    Raises ConfigError for another format and for a shape that it cannot hold, OSError when the disk has too little room.
    """
    require(format in TYPES, "format", format, f"synthetic GGUF files are made in {' and '.join(TYPES)}")
    needed_bytes = file_bytes(shape, format)
    if path.exists() and path.stat().st_size >= needed_bytes:
        return path
    for field in ("hidden", "intermediate"):
        if getattr(shape, field) % 32:
            raise ConfigError(f"model.shape.{field}={getattr(shape, field)}: Q4_0 needs a multiple of 32")
    if shape.vocab <= FIXED_TOKENS:
        raise ConfigError(
            f"model.shape.vocab={shape.vocab}: a llama tokenizer needs more than {FIXED_TOKENS}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    check_free_disk(path, needed_bytes)
    part = path.with_suffix(".part")
    pool_bytes = min(POOL_BYTES, max(tensor_bytes(dims, format) for _, dims in tensor_shapes(shape)))
    pools = {kind: _pool(kind, pool_bytes, shape.hidden**-0.5, seed) for kind in {Q4_0, TYPES[format]}}
    try:
        writer = gguf.GGUFWriter(part, "llama")
        _write_header(writer, shape, name, format)
        for tensor, dims in tensor_shapes(shape):
            kind, nbytes = tensor_type(dims, format), tensor_bytes(dims, format)
            if len(dims) == 1:
                writer.add_tensor_info(tensor, dims, np.dtype(np.float32), nbytes)
            else:
                writer.add_tensor_info(tensor, (dims[0], nbytes // dims[0]), np.dtype(np.uint8), nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with part.open("ab") as file:
            for number, (_, dims) in enumerate(tensor_shapes(shape)):
                file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
                if len(dims) == 1:
                    file.write(np.ones(dims, np.float32).data)
                else:
                    pool = pools[tensor_type(dims, format)]
                    blocks = tensor_bytes(dims, format) // pool.shape[1]
                    _write_blocks(file, pool, blocks, start=number * 7919 % len(pool))
                if progress is not None:
                    progress(tensor_bytes(dims, format))
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def check_free_disk(path: Path, needed_bytes: int) -> None:
    """Raises OSError when the disk of `path` would have less than 1 GiB left."""
    free_bytes = shutil.disk_usage(path.parent).free
    if free_bytes < needed_bytes + (1 << 30):
        raise OSError(
            f"{path}: needs {needed_bytes / 2**30:.1f} GiB and 1 GiB to spare, {free_bytes / 2**30:.1f} GiB are free; "
            "make room (scripts/clean.py) or choose another cache_dir"
        )


def _pool(kind: gguf.GGMLQuantizationType, nbytes: int, deviation: float, seed: int) -> npt.NDArray[np.uint8]:
    """Random blocks of `kind` whose weights have mean 0 and standard deviation `deviation`: [blocks, block_bytes]."""
    generator = np.random.default_rng(seed)
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = generator.integers(0, 256, (nbytes // block_bytes, block_bytes), dtype=np.uint8)
    scale = deviation / NIBBLE_DEVIATION
    if kind == Q4_0:  # a float16 scale, then 16 bytes of nibbles that stand for -8 to 7
        blocks[:, :2] = np.array([scale], np.float16).view(np.uint8)
        return blocks
    # Q4_K: two float16 (of the scales and of the minima), 12 bytes with 6 bits of scale and of minimum for each of 8 groups,
    # then nibbles. With minima as large as the scales, and 7.5 times their float16, a weight is scale * (nibble - 7.5).
    sixes = generator.integers(32, 64, (len(blocks), 8), dtype=np.uint8)
    scale /= float(np.sqrt(np.mean(np.arange(32, 64) ** 2.0)))
    blocks[:, :4] = np.array([scale, 7.5 * scale], np.float16).view(np.uint8)
    low, high = sixes[:, :4], sixes[:, 4:]
    blocks[:, 4:8] = blocks[:, 8:12] = low | (high >> 4 << 6)
    blocks[:, 12:16] = (high & 15) | (high << 4)
    return blocks


def _write_blocks(file: BinaryIO, pool: npt.NDArray[np.uint8], blocks: int, start: int) -> None:
    """`blocks` blocks of the pool taken as a ring from `start`, so that no two tensors begin alike."""
    while blocks:
        part = pool[start : start + blocks]
        file.write(part.data)
        blocks, start = blocks - len(part), 0


def _write_header(writer: gguf.GGUFWriter, shape: ShapeConfig, name: str, format: str) -> None:
    writer.add_name(name)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(FILE_TYPES[format])
    words = [f"▁{number}" for number in range(shape.vocab - FIXED_TOKENS)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    writer.add_token_scores([0.0] * FIXED_TOKENS + [-float(number) for number in range(len(words))])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256 + [kinds.NORMAL] * len(words)
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

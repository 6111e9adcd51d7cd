"""Synthetic llama.cpp checkpoints: GGUF files of a true shape with random Q4_0 weights (DESIGN: Measuring).

Mechanism: the header comes from the `gguf` package; every matrix, embedding and output included, is Q4_0 (18 bytes
for 32 weights, 4.5 bits a weight, as int4 with group 64), the norms are float32 ones, and the tokenizer is a dummy
that llama.cpp accepts (three control tokens, the 256 bytes, then numbered words). Blocks come from one pool of
random nibbles whose scales give weights of standard deviation 1/sqrt(hidden), so that activations stay finite.
Files are written to a `.part` file, synced and renamed: a killed run leaves nothing that loads.

Cost model: about 4.5 / 8 bytes a weight, written at the disk's speed; memory of one tensor and the pool.

What it does not do: quantise a real model; a text decoded from these weights means nothing.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import numpy.typing as npt

from flexinfer.bench.config import ConfigError, ShapeConfig

BLOCK_WEIGHTS, BLOCK_BYTES = 32, 18
FIXED_TOKENS = 3 + 256  # <unk> <s> </s> and the bytes
POOL_BLOCKS = 1 << 21  # 36 MiB


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


def tensor_bytes(dims: tuple[int, ...]) -> int:
    """Bytes of one tensor: Q4_0 for a matrix, float32 for a norm."""
    return dims[0] * 4 if len(dims) == 1 else dims[0] * dims[1] // BLOCK_WEIGHTS * BLOCK_BYTES


def file_bytes(shape: ShapeConfig) -> int:
    """Bytes of all tensors of the file (header apart)."""
    return sum(tensor_bytes(dims) for _, dims in tensor_shapes(shape))


def write_synthetic(
    path: Path, shape: ShapeConfig, name: str, seed: int = 0, progress: Callable[[int], None] | None = None
) -> Path:
    """Write the checkpoint unless it is there already.

    Args:
        path: the .gguf file.
        shape: dimensions of the decoder; hidden and intermediate must be multiples of 32.
        name: the model's name in the header.
        seed: of the weights.
        progress: called with the bytes of every tensor once it is written.
    Returns: `path`.
    Raises ConfigError for a shape that Q4_0 cannot hold, OSError when the disk has too little room.
    """
    needed_bytes = file_bytes(shape)
    if path.exists() and path.stat().st_size >= needed_bytes:
        return path
    for field in ("hidden", "intermediate"):
        if getattr(shape, field) % BLOCK_WEIGHTS:
            raise ConfigError(
                f"model.shape.{field}={getattr(shape, field)}: Q4_0 needs a multiple of {BLOCK_WEIGHTS}"
            )
    if shape.vocab <= FIXED_TOKENS:
        raise ConfigError(
            f"model.shape.vocab={shape.vocab}: a llama tokenizer needs more than {FIXED_TOKENS}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(path.parent).free
    if free_bytes < needed_bytes + (1 << 30):
        raise OSError(
            f"{path}: needs {needed_bytes / 2**30:.1f} GiB and 1 GiB to spare, {free_bytes / 2**30:.1f} GiB are free; "
            "make room (scripts/clean.py) or choose another cache_dir"
        )
    part = path.with_suffix(".part")
    pool = _pool(shape, seed)
    try:
        writer = gguf.GGUFWriter(part, "llama")
        _write_header(writer, shape, name)
        for tensor, dims in tensor_shapes(shape):
            if len(dims) == 1:
                writer.add_tensor_info(tensor, dims, np.dtype(np.float32), tensor_bytes(dims))
            else:
                row_bytes = dims[1] // BLOCK_WEIGHTS * BLOCK_BYTES
                kind = gguf.GGMLQuantizationType.Q4_0
                writer.add_tensor_info(
                    tensor, (dims[0], row_bytes), np.dtype(np.uint8), tensor_bytes(dims), kind
                )
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
                    _write_blocks(
                        file, pool, tensor_bytes(dims) // BLOCK_BYTES, start=number * 7919 % len(pool)
                    )
                if progress is not None:
                    progress(tensor_bytes(dims))
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def touched_bytes(path: Path) -> int:
    """Bytes of weights one token touches: every tensor but the embedding rows (all of it where it is tied)."""
    tensors = {str(each.name): int(each.n_bytes) for each in gguf.GGUFReader(path).tensors}
    untied = tensors["token_embd.weight"] if "output.weight" in tensors else 0
    return sum(tensors.values()) - untied


def _pool(shape: ShapeConfig, seed: int) -> npt.NDArray[np.uint8]:
    """Random Q4_0 blocks: a float16 scale, then 16 bytes of nibbles that stand for -8 to 7. [blocks, 18]"""
    largest = max(tensor_bytes(dims) for _, dims in tensor_shapes(shape)) // BLOCK_BYTES
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (min(POOL_BLOCKS, largest), BLOCK_BYTES), dtype=np.uint8)
    nibble_deviation = np.sqrt((16**2 - 1) / 12)
    scale = np.array([shape.hidden**-0.5 / nibble_deviation], dtype=np.float16)
    blocks[:, :2] = scale.view(np.uint8)
    return blocks


def _write_blocks(file: BinaryIO, pool: npt.NDArray[np.uint8], blocks: int, start: int) -> None:
    """`blocks` blocks of the pool taken as a ring from `start`, so that no two tensors begin alike."""
    while blocks:
        part = pool[start : start + blocks]
        file.write(part.data)
        blocks, start = blocks - len(part), 0


def _write_header(writer: gguf.GGUFWriter, shape: ShapeConfig, name: str) -> None:
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
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
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

"""Synthetic GGUF files of a true shape with random weights, which FlexInfer and llama.cpp both read
(DESIGN: Measuring).

Mechanism: the header comes from the `gguf` package. Every matrix, embedding and output included, is
of one of ggml's types, both of 4.5 bits a weight: Q4_0 (18 bytes for 32 weights), or Q4_K (144
bytes for 256) where rows are a multiple of 256, else Q4_0. The norms are float32 ones, and the
tokenizer is a dummy that llama.cpp accepts (three control tokens, the 256 bytes, then numbered
words). Blocks come from one pool of random ones whose weights have mean 0 and standard deviation
1/sqrt(hidden), so that activations stay finite.
Files are written to a `.part` file, synced and renamed: a killed run leaves nothing that loads.

Mixtures lie in two parts, as a split file does: routers and norms in the first, all else in the
second. So two shapes that differ in nothing but how the router chooses share the second by a hard
link, and 17 GB are on the disk once.

How a router chooses. Its rows are random, so on random hidden states each expert's score is a
normal number, and experts are chosen evenly.
Hidden states are random when the embedding, of deviation 1 here, is more of them than what
attention adds, a mean over tokens and so much the same for all: it would double in every layer, so
its output is scaled by ATTENTION_SCALE. For a router that prefers some, the rows are scaled: an
expert whose scores have deviation d passes the threshold t that the chosen ones pass with the
probability Q(t / d), below a half. Shares of the routing fall geometrically, each `popularity`
times the one before, and experts are shuffled in every layer. For Qwen3-30B-A3B 0.965: it was
measured that 65 of 128 experts have 90 % of the routing on mixed text (prose, code, mathematics),
the first 4.3 %, the entropy being 0.111 below even
(https://mcp-tool-shop-org.github.io/gpu-container/handbook/derisk/); this gives 90 %, 3.5 % and
0.106. Of Mixtral there is no such model: its routing is near even (Jiang et al. 2024, Mixtral of
Experts, section 5).

Cost model: 4.5 / 8 bytes a weight, written at the disk's speed; memory of the pool.

What it does not do: quantise a real model; a text decoded from these weights means nothing.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import BinaryIO

import gguf
import numpy as np
import numpy.typing as npt

from experiments.model_config import ConfigError, ModelConfig, ShapeConfig, require

Q4_0, Q4_K = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_K
TYPES = {"q4_0": Q4_0, "q4_k": Q4_K}
FILE_TYPES = {"q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q4_k": gguf.LlamaFileType.MOSTLY_Q4_K_S}
FIXED_TOKENS = 3 + 256  # <unk> <s> </s> and the bytes
POOL_BYTES = 36 << 20
ATTENTION_SCALE = 0.1  # of the output of attention in mixtures
EMBEDDING = "token_embd.weight"
ROUTER = "ffn_gate_inp.weight"
PARTS = ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf")
PREFERRING = "-skewed"  # the end of a model's name whose router prefers some experts
NIBBLE_DEVIATION = float(np.sqrt((16**2 - 1) / 12))  # of uniform 0 to 15


def make_gguf(model: ModelConfig, format: str, cache_dir: Path) -> Path:
    """The file of `model`'s synthetic checkpoint in `format` ('q4_0' or 'q4_k'), written now unless
    it is cached.

    Raises: as `write_synthetic`, and ConfigError for a model without a shape.
    """
    require(model.shape is not None, "model.shape", None, "a synthetic checkpoint needs its shape")
    assert model.shape is not None
    shape, names = model.shape, cache_dir / "synthetic"
    if shape.experts is None:
        path = names / f"{model.name}-{format}-{shape_digest(shape)}" / "model.gguf"
        return write_synthetic(path, shape, model.name, format)
    even = replace(shape, experts=replace(shape.experts, popularity=1.0))
    kept = names / f"{model.name.removesuffix(PREFERRING)}-{format}-{shape_digest(even)}"
    parts = write_mixture(kept, even, model.name, format)
    if shape == even:
        return parts[0]
    return write_mixture(
        names / f"{model.name}-{format}-{shape_digest(shape)}", shape, model.name, format, parts[1]
    )[0]


def shape_digest(shape: ShapeConfig) -> str:
    """Tells two shapes of one model name apart, in the name of a directory."""
    return hashlib.sha256(json.dumps(shape.facts(), sort_keys=True).encode()).hexdigest()[:8]


def tensor_shapes(shape: ShapeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape [out, in] (norms: [hidden]) of every tensor, in llama.cpp's names."""
    queries, kv = shape.head_width * shape.heads, shape.head_width * shape.kv_heads
    experts = shape.experts
    yield EMBEDDING, (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (shape.hidden,)
        yield block + "attn_q.weight", (queries, shape.hidden)
        yield block + "attn_k.weight", (kv, shape.hidden)
        yield block + "attn_v.weight", (kv, shape.hidden)
        yield block + "attn_output.weight", (shape.hidden, queries)
        yield block + "ffn_norm.weight", (shape.hidden,)
        if experts is not None:
            if experts.architecture == "qwen3moe":
                yield block + "attn_q_norm.weight", (shape.head_width,)
                yield block + "attn_k_norm.weight", (shape.head_width,)
            yield block + "ffn_gate_inp.weight", (experts.count, shape.hidden)
            yield block + "ffn_gate_exps.weight", (experts.count, shape.intermediate, shape.hidden)
            yield block + "ffn_up_exps.weight", (experts.count, shape.intermediate, shape.hidden)
            yield block + "ffn_down_exps.weight", (experts.count, shape.hidden, shape.intermediate)
            continue
        yield block + "ffn_gate.weight", (shape.intermediate, shape.hidden)
        yield block + "ffn_up.weight", (shape.intermediate, shape.hidden)
        yield block + "ffn_down.weight", (shape.hidden, shape.intermediate)
    yield "output_norm.weight", (shape.hidden,)
    if not shape.tie:
        yield "output.weight", (shape.vocab, shape.hidden)


def tensor_type(name: str, dims: tuple[int, ...], format: str) -> gguf.GGMLQuantizationType:
    """The type of a tensor in a file of `format`."""
    if len(dims) == 1 or name.endswith(ROUTER):
        return gguf.GGMLQuantizationType.F32
    kind = TYPES[format]
    return kind if dims[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Q4_0


def tensor_bytes(name: str, dims: tuple[int, ...], format: str) -> int:
    """Bytes of one tensor in a file of `format`."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[tensor_type(name, dims, format)]
    return math.prod(dims) // elements * nbytes


def file_bytes(shape: ShapeConfig, format: str) -> int:
    """Bytes of all tensors of the file (header apart)."""
    return sum(tensor_bytes(name, dims, format) for name, dims in tensor_shapes(shape))


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
    Raises ConfigError for another format and for a shape that it cannot hold, OSError when the disk
    has too little room.
    """
    _check(shape, format)
    tensors = list(tensor_shapes(shape))
    needed_bytes = file_bytes(shape, format)
    if path.exists() and path.stat().st_size >= needed_bytes:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    check_free_disk(path, needed_bytes)
    _write(
        path,
        lambda writer: _write_header(writer, shape, name, format),
        "llama",
        tensors,
        shape,
        format,
        seed,
        progress,
    )
    return path


def write_mixture(
    directory: Path,
    shape: ShapeConfig,
    name: str,
    format: str,
    second: Path | None = None,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write a mixture as two parts into `directory`, unless they are there already.

    The second as a hard link to `second` if given.

    Raises: as `write_synthetic`.
    """
    _check(shape, format)
    assert shape.experts is not None
    architecture, paths = shape.experts.architecture, (directory / PARTS[0], directory / PARTS[1])
    tensors = list(tensor_shapes(shape))
    small = [one for one in tensors if tensor_type(*one, format) == gguf.GGMLQuantizationType.F32]
    large = [one for one in tensors if one not in small]

    def part(number: int) -> Callable[[gguf.GGUFWriter], None]:
        def write(writer: gguf.GGUFWriter) -> None:
            if number == 0:
                _write_header(writer, shape, name, format)
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)
            writer.add_int32("split.tensors.count", len(tensors))

        return write

    directory.mkdir(parents=True, exist_ok=True)
    if not paths[1].exists():
        if second is not None:
            os.link(second, paths[1])
        else:
            check_free_disk(paths[1], file_bytes(shape, format))
            _write(paths[1], part(1), architecture, large, shape, format, seed)
    if not paths[0].exists():
        _write(paths[0], part(0), architecture, small, shape, format, seed)
    return paths


def _check(shape: ShapeConfig, format: str) -> None:
    require(
        format in TYPES, "format", format, f"synthetic GGUF files are made in {' and '.join(TYPES)}"
    )
    for field in ("hidden", "intermediate"):
        if getattr(shape, field) % 32:
            raise ConfigError(
                f"model.shape.{field}={getattr(shape, field)}: Q4_0 needs a multiple of 32"
            )
    if shape.vocab <= FIXED_TOKENS:
        raise ConfigError(
            f"model.shape.vocab={shape.vocab}: a llama tokenizer needs more than {FIXED_TOKENS}"
        )


def _write(
    path: Path,
    header: Callable[[gguf.GGUFWriter], None],
    architecture: str,
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    shape: ShapeConfig,
    format: str,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a file of `tensors`, whole or not at all."""
    tensors = list(tensors)
    part = path.with_suffix(".part")
    largest_bytes = max(tensor_bytes(*tensor, format) for tensor in tensors)
    pool_bytes = min(POOL_BYTES, largest_bytes)
    wanted = {(tensor_type(*tensor, format), _deviation(tensor[0], shape)) for tensor in tensors}
    pools = {
        one: _pool(one[0], pool_bytes, one[1], seed) for one in wanted if one[0] in (Q4_0, Q4_K)
    }
    try:
        writer = gguf.GGUFWriter(part, architecture)
        header(writer)
        for tensor, dims in tensors:
            kind, nbytes = tensor_type(tensor, dims, format), tensor_bytes(tensor, dims, format)
            if kind == gguf.GGMLQuantizationType.F32:
                writer.add_tensor_info(tensor, dims, np.dtype(np.float32), nbytes)
            else:
                bytes_dims = (*dims[:-1], nbytes // math.prod(dims[:-1]))
                writer.add_tensor_info(tensor, bytes_dims, np.dtype(np.uint8), nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with part.open("ab") as file:
            for number, (tensor, dims) in enumerate(tensors):
                file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
                kind, nbytes = tensor_type(tensor, dims, format), tensor_bytes(tensor, dims, format)
                if tensor.endswith(ROUTER):
                    file.write(_router(shape, seed + number).data)
                elif kind == gguf.GGMLQuantizationType.F32:
                    file.write(np.ones(dims, np.float32).data)
                else:
                    pool = pools[kind, _deviation(tensor, shape)]
                    _write_blocks(
                        file, pool, nbytes // pool.shape[1], start=number * 7919 % len(pool)
                    )
                if progress is not None:
                    progress(nbytes)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _deviation(tensor: str, shape: ShapeConfig) -> float:
    """Standard deviation of the weights of a tensor."""
    scale = shape.hidden**-0.5
    if shape.experts is None or (tensor != EMBEDDING and not tensor.endswith("attn_output.weight")):
        return scale
    return 1.0 if tensor == EMBEDDING else ATTENTION_SCALE * scale


def deviations(shape: ShapeConfig) -> npt.NDArray[np.float64]:
    """Of the scores of each expert, the most popular first, in thresholds: [experts].

    All 1 for a router that chooses evenly.
    """
    assert shape.experts is not None
    experts = shape.experts
    if experts.popularity == 1:
        return np.ones(experts.count)
    shares = experts.popularity ** np.arange(experts.count)
    chances = shares / shares.sum() * experts.used  # of a token
    require(
        chances[0] < 0.5,
        "model.shape.experts.popularity",
        experts.popularity,
        f"would give an expert to {chances[0]:.0%} of all tokens, a scaled router to less than "
        "half",
    )
    return np.array([1 / -NormalDist().inv_cdf(chance) for chance in chances])


def _router(shape: ShapeConfig, seed: int) -> npt.NDArray[np.float32]:
    """Random rows [experts, hidden], scaled by `deviations` in an order of their own."""
    assert shape.experts is not None
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((shape.experts.count, shape.hidden)) * shape.hidden**-0.5
    return (rows * generator.permutation(deviations(shape))[:, None]).astype(np.float32)


def check_free_disk(path: Path, needed_bytes: int) -> None:
    """Raises OSError when the disk of `path` would have less than 1 GiB left."""
    free_bytes = shutil.disk_usage(path.parent).free
    if free_bytes < needed_bytes + (1 << 30):
        raise OSError(
            f"{path}: needs {needed_bytes / 2**30:.1f} GiB and 1 GiB to spare, "
            f"{free_bytes / 2**30:.1f} GiB are free; make room (scripts/clean.py) or choose "
            "another cache_dir"
        )


def _pool(
    kind: gguf.GGMLQuantizationType, nbytes: int, deviation: float, seed: int
) -> npt.NDArray[np.uint8]:
    """Random blocks of `kind` whose weights have mean 0 and standard deviation `deviation`:
    [blocks, block_bytes].
    """
    generator = np.random.default_rng(seed)
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = generator.integers(0, 256, (nbytes // block_bytes, block_bytes), dtype=np.uint8)
    scale = deviation / NIBBLE_DEVIATION
    if kind == Q4_0:  # a float16 scale, then 16 bytes of nibbles that stand for -8 to 7
        blocks[:, :2] = np.array([scale], np.float16).view(np.uint8)
        return blocks
    # Q4_K: two float16 (of the scales and of the minima), 12 bytes with 6 bits of scale and of
    # minimum for each of 8 groups,
    # then nibbles. With minima as large as the scales, and 7.5 times their float16, a weight is
    # scale * (nibble - 7.5).
    sixes = generator.integers(32, 64, (len(blocks), 8), dtype=np.uint8)
    scale /= float(np.sqrt(np.mean(np.arange(32, 64) ** 2.0)))
    blocks[:, :4] = np.array([scale, 7.5 * scale], np.float16).view(np.uint8)
    low, high = sixes[:, :4], sixes[:, 4:]
    blocks[:, 4:8] = blocks[:, 8:12] = low | (high >> 4 << 6)
    blocks[:, 12:16] = (high & 15) | (high << 4)
    return blocks


def _write_blocks(file: BinaryIO, pool: npt.NDArray[np.uint8], blocks: int, start: int) -> None:
    """`blocks` blocks of the pool, a ring, from `start`, so that no two tensors begin alike."""
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
    writer.add_rope_dimension_count(shape.head_width)
    if shape.experts is not None:
        writer.add_expert_count(shape.experts.count)
        writer.add_expert_used_count(shape.experts.used)
        writer.add_expert_feed_forward_length(shape.intermediate)
        writer.add_key_length(shape.head_width)
        writer.add_value_length(shape.head_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(FILE_TYPES[format])
    words = [f"▁{number}" for number in range(shape.vocab - FIXED_TOKENS)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    )
    writer.add_token_scores([0.0] * FIXED_TOKENS + [-float(number) for number in range(len(words))])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
        + [kinds.BYTE] * 256
        + [kinds.NORMAL] * len(words)
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

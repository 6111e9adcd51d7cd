"""The output is unchanged: streamed logits equal, bit for bit, those of stock transformers on the
same checkpoint.
"""

import json
import struct
from pathlib import Path

import pytest
import torch

import flexinfer
from flexinfer.convert.quantize import quantize
from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.plan.preservation import POLICIES
from tests.conftest import (
    FAMILIES,
    VOCAB,
    Load,
    MakeCheckpoint,
    logits,
    prompt,
    resize_to_share,
    stock,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_family_under_every_policy(
    checkpoint: MakeCheckpoint, load: Load, family: str, policy: str
) -> None:
    path = checkpoint(family)
    model, reference = load(path, policy=policy), stock(path)
    for share in (0.0, 0.35, 0.8) if policy == "balanced" else (0.6,):
        resize_to_share(model, share)
        assert model.flexinfer.plan.streamed_bytes > 0
        assert (model.flexinfer.plan.locked_bytes > 0) == (share > 0 and policy != "none")
        for batch in (1, 3) if policy == "balanced" else (3,):
            assert torch.equal(logits(model, prompt(batch)), logits(reference, prompt(batch))), (
                share
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_family_in_half_precision(
    checkpoint: MakeCheckpoint, load: Load, family: str, dtype: torch.dtype
) -> None:
    path = checkpoint(family, dtype)
    model, reference = load(path), stock(path)
    assert model.dtype == reference.dtype == dtype
    assert model.flexinfer.plan.streamed_bytes == 0  # everything resident
    assert torch.equal(logits(model, prompt(3)), logits(reference, prompt(3)))
    resize_to_share(model, 0.3)
    assert torch.equal(logits(model, prompt(3)), logits(reference, prompt(3)))


@pytest.mark.parametrize("window", ["1 layers", "2 layers", "3 layers", "4 layers", 40_960])
@pytest.mark.parametrize("io_threads", [0, 1, 4])
def test_every_window_and_number_of_threads(
    checkpoint: MakeCheckpoint, load: Load, window: str | int, io_threads: int
) -> None:
    path = checkpoint()
    model = load(path, policy="none", window=window, io_threads=io_threads)
    assert torch.equal(logits(model, prompt(), steps=4), logits(stock(path), prompt(), steps=4))
    assert model.flexinfer.stats()["resyncs"] == 0


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_direct_and_buffered_sharded_and_single_tied_and_untied(
    checkpoint: MakeCheckpoint, load: Load, direct: bool, sharded: bool, tied: bool
) -> None:
    path = checkpoint(sharded=sharded, tie_word_embeddings=tied)
    assert (len(open_checkpoint(path).files) > 1) == sharded
    assert ("lm_head.weight" in open_checkpoint(path).tensors) != tied
    model = load(path, direct=direct)
    resize_to_share(model, 0.4)
    weights = {weight.name for weight in model.flexinfer.runner.planner.weights}
    assert "lm_head.weight" in weights
    assert torch.equal(logits(model, prompt()), logits(stock(path), prompt()))


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3"])
def test_computing_in_another_dtype_than_the_file(
    checkpoint: MakeCheckpoint, load: Load, family: str, stored: torch.dtype, dtype: torch.dtype
) -> None:
    path = checkpoint(family, stored)
    model = load(path, dtype=dtype)
    resize_to_share(model, 0.3)
    assert torch.equal(logits(model, prompt(2)), logits(stock(path, dtype=dtype), prompt(2)))


def test_dtype_by_name_and_no_dtype(checkpoint: MakeCheckpoint, load: Load) -> None:
    assert load(checkpoint(), dtype="bfloat16").dtype == torch.bfloat16
    for bad in ("bananas", "int8", torch.int8):
        with pytest.raises(ValueError, match="dtype"):
            load(checkpoint(), dtype=bad)


def with_header_of(path: Path, target: Path, header_bytes: int) -> Path:
    """A copy of the single-file checkpoint at `path` whose header is padded to `header_bytes`."""
    target.mkdir()
    (target / "config.json").write_bytes((path / "config.json").read_bytes())
    content = (path / "model.safetensors").read_bytes()
    (old_bytes,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + old_bytes].rstrip().ljust(header_bytes)
    assert json.loads(header)
    assert len(header) == header_bytes
    (target / "model.safetensors").write_bytes(
        struct.pack("<Q", header_bytes) + header + content[8 + old_bytes :]
    )
    return target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("odd", [0, 1, 2, 8, 4091])
def test_tensors_at_odd_offsets(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path, dtype: torch.dtype, odd: int
) -> None:
    path = with_header_of(checkpoint("llama", dtype), tmp_path / "odd", 12_000 + odd)
    assert any(spec.offset_bytes % 2 for spec in open_checkpoint(path).tensors.values()) == (
        odd % 2 == 1
    )
    model = load(path)
    reference = logits(stock(path), prompt())
    assert torch.equal(logits(model, prompt()), reference)
    resize_to_share(model, 0.3)
    assert torch.equal(logits(model, prompt()), reference)


@pytest.mark.parametrize("rows", [4, 9, 15])
def test_no_piece_of_a_few_rows(checkpoint: MakeCheckpoint, load: Load, rows: int) -> None:
    """MKL multiplies few rows of fp32 by a kernel that adds in another order."""
    path = checkpoint("llama", intermediate_size=176 + rows, vocab_size=VOCAB + rows)
    model, reference = load(path), stock(path)
    resize_to_share(model, 0.2)
    assert torch.equal(logits(model, prompt(3)), logits(reference, prompt(3)))


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt2"])
def test_left_padded_batches(checkpoint: MakeCheckpoint, load: Load, family: str) -> None:
    path = checkpoint(family)
    model, reference = load(path), stock(path)
    resize_to_share(model, 0.2)
    ids, mask = prompt(3, tokens=9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[2, :1] = 0
    ids[mask == 0] = model.config.pad_token_id
    ours, theirs = logits(model, ids, mask=mask), logits(reference, ids, mask=mask)
    real = torch.cat((mask, torch.ones(3, 2, dtype=torch.long)), dim=-1).bool()
    assert torch.equal(ours[real], theirs[real])
    padded = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**padded), reference.generate(**padded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_of_true_size(checkpoint: MakeCheckpoint, dtype: torch.dtype, threads: int) -> None:
    """The multiplication libraries choose kernels by shape; cutting weights at 4 MiB must not
    change what they compute.
    """
    path = checkpoint(
        "llama",
        dtype,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=1,
        vocab_size=512,
    )
    torch.set_num_threads(threads)
    try:
        model, reference = (
            flexinfer.from_pretrained(path, "8GiB", context=256, window="8MiB"),
            stock(path),
        )
        assert max(len(weight.pieces) for weight in model.flexinfer.runner.planner.weights) > 1
        resize_to_share(model, 0.5)
        for tokens in (1, 2, 5, 65):
            assert torch.equal(
                logits(model, prompt(1, tokens), 1), logits(reference, prompt(1, tokens), 1)
            )
        model.flexinfer.close()
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_quantised_streamed_equals_quantised_resident(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path, kind: str, family: str
) -> None:
    config = {"intermediate_size": 256} if family == "llama" else {}
    report = quantize(
        checkpoint(family, torch.bfloat16, **config), tmp_path / "copy", kind, progress=False
    )
    model = load(report.path, policy="none")
    resident = load(report.path)
    assert resident.flexinfer.plan.streamed_bytes == 0
    assert model.flexinfer.plan.streamed_bytes == model.flexinfer.plan.total_bytes
    for tokens in (1, 2, 7, 8, 9, 61):
        assert torch.equal(
            logits(model, prompt(1, tokens), 1), logits(resident, prompt(1, tokens), 1)
        ), tokens
    resize_to_share(resident, 0.4)
    assert torch.equal(logits(model, prompt(3)), logits(resident, prompt(3)))

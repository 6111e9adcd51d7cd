"""A packed copy says what it did, loads everywhere it should and nowhere else, and survives being killed."""

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Load, MakeCheckpoint, logits, prompt
from safetensors import safe_open

import flexinfer.formats.quantize
from flexinfer.formats.checkpoint import Checkpoint, CheckpointError
from flexinfer.formats.quantize import QuantizeError, Report, quantize
from flexinfer.kernels.packed import ALIGNMENT_BYTES, PackedError, PackedFormat, dequantize

BITS = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flexinfer.formats.quantize, "measure_dequantize_rows", lambda fmt: fmt)


def make(source: Path, target: Path, bits: int = 4, **options: Any) -> Report:
    return quantize(source, target, bits, progress=False, **options)


@BITS
def test_report_is_the_error_against_the_original(
    checkpoint: MakeCheckpoint, tmp_path: Path, bits: int
) -> None:
    source = checkpoint("llama", torch.bfloat16, intermediate_size=192)
    report = make(source, tmp_path / "packed", bits)
    originals, copies = Checkpoint.open(source).tensors, Checkpoint.open(tmp_path / "packed").tensors
    assert not report.kept
    assert {tensor.name for tensor in report.packed} == {
        name for name, spec in copies.items() if spec.dtype == "U8"
    }
    assert report.nbytes == sum(spec.nbytes for spec in copies.values())
    assert report.source_bytes == sum(spec.nbytes for spec in originals.values())
    for tensor in report.packed:
        weight = load_tensor(originals[tensor.name].file, tensor.name).float()
        block = load_tensor(copies[tensor.name].file, tensor.name)
        difference = dequantize(report.format, block, *tensor.shape) - weight
        assert tensor.relative_error == pytest.approx(float(difference.norm() / weight.norm()))
        assert tensor.max_error == pytest.approx(float(difference.abs().max()))
        assert 0 < tensor.relative_error < (0.15 if bits == 4 else 0.015)
    assert report.worst.relative_error == max(tensor.relative_error for tensor in report.packed)
    saved = json.loads((tmp_path / "packed" / "quantize_report.json").read_text())
    assert saved == json.loads(json.dumps(asdict(report) | {"path": str(report.path)}))


def load_tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


@BITS
def test_what_is_no_linear_is_copied_byte_for_byte(
    checkpoint: MakeCheckpoint, tmp_path: Path, bits: int
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("qwen2", torch.bfloat16, intermediate_size=192), source)
    (source / "tokenizer.json").write_text("{}")
    make(source, tmp_path / "packed", bits)
    originals = Checkpoint.open(source).tensors
    for name, spec in Checkpoint.open(tmp_path / "packed").tensors.items():
        if spec.dtype != "U8":
            assert torch.equal(load_tensor(spec.file, name), load_tensor(originals[name].file, name))
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "packed" / name).read_bytes() == (source / name).read_bytes()


def test_packed_tensors_start_at_pages_in_order_of_use(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    make(checkpoint("llama", torch.bfloat16), tmp_path / "packed")
    packed = [spec for spec in Checkpoint.open(tmp_path / "packed").tensors.values() if spec.dtype == "U8"]
    assert all(spec.offset_bytes % ALIGNMENT_BYTES == 0 for spec in packed)
    names = [spec.name for spec in sorted(packed, key=lambda spec: (spec.file, spec.offset_bytes))]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert names[-1] == "lm_head.weight"
    parts = [name.split(".")[-2] for name in names[:6]]
    assert parts == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]


def test_tied_embeddings_stay_and_the_head_becomes_a_tensor_of_its_own(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = checkpoint("llama", torch.bfloat16, tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint.open(source).tensors
    make(source, tmp_path / "packed")
    tensors = Checkpoint.open(tmp_path / "packed").tensors
    assert tensors["lm_head.weight"].dtype == "U8"
    assert tensors["model.embed_tokens.weight"].dtype == "BF16"


def test_linears_the_kernels_cannot_take_are_kept_and_named(
    checkpoint: MakeCheckpoint, tmp_path: Path, load: Load
) -> None:
    source = checkpoint("llama", torch.bfloat16)  # intermediate_size 176 is no multiple of 64
    report = make(source, tmp_path / "packed")
    assert list(report.kept) == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(4)]
    assert "176" in report.kept["model.layers.0.mlp.down_proj.weight"]
    assert logits(load(tmp_path / "packed"), prompt()).isfinite().all()


def test_transposed_linears_are_packed_too(checkpoint: MakeCheckpoint, tmp_path: Path, load: Load) -> None:
    source = checkpoint("gpt2", torch.bfloat16)
    report = make(source, tmp_path / "packed", 8)
    shapes = {tensor.name.partition(".h.0.")[2]: tensor.shape for tensor in report.packed}
    assert shapes["mlp.c_fc.weight"] == (256, 64)
    assert shapes["mlp.c_proj.weight"] == (64, 256)
    expected, found = logits(load(source), prompt()), logits(load(tmp_path / "packed"), prompt())
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_killed_run_leaves_nothing_that_loads_and_goes_on(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    source = checkpoint("llama", torch.bfloat16)
    monkeypatch.setattr(flexinfer.formats.quantize, "SHARD_BYTES", 50_000)
    whole = make(source, tmp_path / "whole")
    target, partial = tmp_path / "packed", tmp_path / "packed.partial"
    write_shard, written = flexinfer.formats.quantize.write_shard, []

    def write_and_die(path: Path, entries: Any, chunks: Any) -> None:
        if len(written) == stop_at:
            path.write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path.name)
        write_shard(path, entries, chunks)

    monkeypatch.setattr(flexinfer.formats.quantize, "write_shard", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        make(source, target)
    assert not target.exists()
    with pytest.raises(CheckpointError):
        Checkpoint.open(partial)
    finished = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert len(finished) == stop_at

    monkeypatch.setattr(flexinfer.formats.quantize, "write_shard", write_shard)
    report = make(source, target)
    assert not partial.exists()
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == finished
    assert report.packed == whole.packed
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert sorted(file.name for file in target.iterdir()) == names
    for name in names:
        if name != "quantize_report.json":
            assert (target / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_a_run_with_other_arguments_left_is_not_used(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama", torch.bfloat16)
    monkeypatch.setattr(flexinfer.formats.quantize, "SHARD_BYTES", 50_000)
    with monkeypatch.context() as patched:

        def die(*_: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(flexinfer.formats.quantize, "_finish", die)
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "packed", 8)
    report = make(source, tmp_path / "packed", 4)
    assert report.packed == make(source, tmp_path / "fresh", 4).packed


def test_the_source_is_read_a_block_at_a_time(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama", torch.bfloat16, vocab_size=4096)
    sizes: list[int] = []
    read = flexinfer.formats.quantize._read
    monkeypatch.setattr(flexinfer.formats.quantize, "COPY_BYTES", 16384)
    monkeypatch.setattr("flexinfer.kernels.packed.BLOCK_BYTES", 8192)

    def counted(spec: Any, start: int, nbytes: int) -> bytearray:
        sizes.append(nbytes)
        return read(spec, start, nbytes)

    monkeypatch.setattr(flexinfer.formats.quantize, "_read", counted)
    make(source, tmp_path / "packed")
    assert sum(sizes) == sum(spec.nbytes for spec in Checkpoint.open(source).tensors.values())
    assert max(sizes) <= 4 * 8192  # 4 bits in a block are 16 in the source


def test_bad_arguments(checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint("llama", torch.bfloat16)
    with pytest.raises(QuantizeError, match="group_size: got 64 with bits=8"):
        make(source, tmp_path / "packed", 8, group_size=64)
    with pytest.raises(PackedError, match="bits: got 3"):
        make(source, tmp_path / "packed", 3)
    with pytest.raises(PackedError, match="group_size: got 48"):
        make(source, tmp_path / "packed", 4, group_size=48)
    with pytest.raises(CheckpointError):
        make(tmp_path / "nothing", tmp_path / "packed")
    with pytest.raises(QuantizeError, match="exists already"):
        make(source, tmp_path)
    with pytest.raises(QuantizeError, match="none of its linears can be packed"):
        make(source, tmp_path / "packed", 4, group_size=256)
    assert not (tmp_path / "packed").exists()
    make(source, tmp_path / "packed")
    with pytest.raises(QuantizeError, match="is quantised already"):
        make(tmp_path / "packed", tmp_path / "twice")


def test_a_full_disk_is_refused_first(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = flexinfer.formats.quantize.os.statvfs(tmp_path)
    free_blocks = 2**20 // real.f_frsize

    class Full:
        f_bavail, f_frsize = free_blocks, real.f_frsize

    monkeypatch.setattr(flexinfer.formats.quantize.os, "statvfs", lambda _: Full)
    with pytest.raises(
        QuantizeError, match=r"needs \d+ KiB and 64 MiB to spare, 1 MiB are free: \d+ bytes \(63 MiB\)"
    ):
        make(checkpoint("llama", torch.bfloat16), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("after_bytes", [10, 60_000, 130_000])
def test_a_disk_that_becomes_full_is_one_clear_error_and_the_work_goes_on(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, after_bytes: int
) -> None:
    source = checkpoint("llama", torch.bfloat16)
    monkeypatch.setattr(flexinfer.formats.quantize, "SHARD_BYTES", 50_000)
    whole = make(source, tmp_path / "whole")
    target, partial = tmp_path / "packed", tmp_path / "packed.partial"
    left = [after_bytes]

    def write(descriptor: int, data: memoryview) -> int:
        """What a full disk does: a part is written, then nothing."""
        if not left[0]:
            raise OSError(error, os.strerror(error))
        count = min(left[0], len(data))
        left[0] -= count
        return os.pwrite(descriptor, data[:count], os.lseek(descriptor, 0, os.SEEK_END))

    with monkeypatch.context() as patched:
        patched.setattr(flexinfer.formats.quantize.os, "write", write)
        with pytest.raises(QuantizeError, match="make room there and give the same command again") as refused:
            make(source, target)
    assert os.strerror(error) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not target.exists()
    assert not list(partial.glob("*.unfinished"))
    with pytest.raises(CheckpointError):
        Checkpoint.open(partial)
    finished = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert len(finished) == {10: 0, 60_000: 1, 130_000: 2}[after_bytes]
    assert make(source, target).packed == whole.packed
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == finished
    assert sorted(file.name for file in target.iterdir()) == sorted(
        file.name for file in (tmp_path / "whole").iterdir()
    )


def test_a_disk_that_becomes_full_with_the_last_small_files_costs_no_shard(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama", torch.bfloat16)
    monkeypatch.setattr(flexinfer.formats.quantize, "SHARD_BYTES", 50_000)
    target, partial = tmp_path / "packed", tmp_path / "packed.partial"
    write_text = Path.write_text

    def write(path: Path, text: str, **options: Any) -> int:
        if path.name.startswith("config.json"):
            write_text(path, text[:20], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_text(path, text, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", write)
        with pytest.raises(QuantizeError, match="No space left on device"):
            make(source, target)
    with pytest.raises(CheckpointError):
        Checkpoint.open(partial)
    finished = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert len(finished) > 3
    make(source, target)
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == finished
    assert not list(target.glob("*.unfinished"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 100 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full_names_the_bytes_that_let_it_go_on(
    checkpoint: MakeCheckpoint, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama", torch.bfloat16)
    monkeypatch.setattr(flexinfer.formats.quantize, "SHARD_BYTES", 50_000)
    whole = make(source, tmp_path / "whole")
    target, filler = small_disk / "packed", small_disk / "of another program"
    write_shard, written = flexinfer.formats.quantize.write_shard, []

    def write(path: Path, entries: Any, chunks: Any) -> None:
        if len(written) == 2:  # another program takes all but a part of what this file needs
            with filler.open("wb") as file:
                os.posix_fallocate(
                    file.fileno(), 0, flexinfer.formats.quantize.free_disk_bytes(small_disk) - 20_480
                )
        written.append(path.name)
        write_shard(path, entries, chunks)

    monkeypatch.setattr(flexinfer.formats.quantize, "write_shard", write)
    with pytest.raises(
        QuantizeError, match=r"No space left on device: \d+ bytes \(64 MiB\) are missing"
    ) as refused:
        make(source, target)
    assert not target.exists()
    finished = list((small_disk / "packed.partial").glob("*.safetensors"))
    assert len(finished) == 2

    found = re.search(r"(\d+) bytes", str(refused.value))
    assert found is not None
    page_bytes, free_bytes = (
        os.sysconf("SC_PAGE_SIZE"),
        flexinfer.formats.quantize.free_disk_bytes(small_disk),
    )
    for enough, short_bytes in ((False, page_bytes), (True, 0)):
        wanted_bytes = free_bytes + int(found[1]) - short_bytes
        while flexinfer.formats.quantize.free_disk_bytes(small_disk) < wanted_bytes:
            os.truncate(filler, filler.stat().st_size - page_bytes)
        if enough:
            assert make(source, target).packed == whole.packed
        else:
            with pytest.raises(QuantizeError, match="are missing"):
                make(source, target)
    for file in target.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


def test_the_copy_of_another_cpu_is_refused(checkpoint: MakeCheckpoint, tmp_path: Path, load: Load) -> None:
    make(checkpoint("llama", torch.bfloat16), tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    mine = config["quantization_config"]["layout"]
    assert mine == PackedFormat.for_this_cpu(4).layout
    config["quantization_config"]["layout"] = "avx512" if mine != "avx512" else "avx2"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="flexinfer quantize SRC DST --bits 4"):
        load(tmp_path / "packed")

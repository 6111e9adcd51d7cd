"""A quantised copy says what it did and what its source says, loads when it is complete and not
before, and survives being killed.
"""

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

import gguf
import gguf_models
import pytest
import torch
import transformers
from safetensors import safe_open

import flexinfer.convert.gguf_entries
import flexinfer.convert.quantize
from flexinfer.convert.quantize import QuantizeError, Report, quantize
from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.formats.ggml_types import KINDS, kind_for
from flexinfer.formats.gguf import read_gguf
from flexinfer.formats.gguf_families import FAMILIES
from flexinfer.formats.tensors import CheckpointError
from flexinfer.kernels.ggml import TYPES, dequantize_rows
from tests.conftest import Load, MakeCheckpoint, logits, prompt

ALL_FAMILIES = gguf_models.FAMILIES | gguf_models.MIXTURES


def make(source: Path, target: Path, kind: str = "q4_0") -> Report:
    return quantize(source, target, kind, progress=False)


def load_tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def blocks_of(path: Path, name: str) -> torch.Tensor:
    """The numbers of a tensor of the copy: float32 [rows, in_features]."""
    spec = open_checkpoint(path).tensors[name]
    data = torch.frombuffer(bytearray(spec.file.read_bytes()), dtype=torch.uint8)
    packed = data[spec.offset_bytes : spec.offset_bytes + spec.nbytes].view(spec.shape[0], -1)
    return dequantize_rows(TYPES[spec.dtype], packed, spec.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_report_is_the_error_against_the_original(
    checkpoint: MakeCheckpoint, tmp_path: Path, kind: str
) -> None:
    source = checkpoint("qwen2", torch.bfloat16, hidden_size=256, intermediate_size=96)
    report = make(source, tmp_path / "copy", kind.lower())
    originals, copies = open_checkpoint(source).tensors, open_checkpoint(tmp_path / "copy").tensors
    assert not report.kept
    assert report.architecture == "qwen2"
    names = {"model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight"}
    names |= {"model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight"}
    assert report.nbytes == sum(spec.nbytes for spec in copies.values())
    assert report.source_bytes == sum(spec.nbytes for spec in originals.values())
    for tensor in report.packed:
        if tensor.name not in names:
            continue
        assert tensor.kind == copies[names[tensor.name]].dtype
        assert tensor.kind == (kind if "gate" in tensor.name else kind_for(kind, 96))
        weight = load_tensor(originals[tensor.name].file, tensor.name).float()
        difference = blocks_of(tmp_path / "copy", names[tensor.name]) - weight
        assert tensor.relative_error == pytest.approx(float(difference.norm() / weight.norm()))
        assert 0 < tensor.relative_error < 0.4
    assert report.worst.relative_error == max(tensor.relative_error for tensor in report.packed)
    saved = json.loads((tmp_path / "copy" / "quantize_report.json").read_text())
    assert saved == json.loads(json.dumps(asdict(report) | {"path": str(report.path)}))


def test_more_bits_err_less(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoint("llama", torch.bfloat16, hidden_size=256, intermediate_size=256)
    errors = {kind: make(source, tmp_path / kind, kind).worst.relative_error for kind in KINDS}
    for more, fewer in (
        ("Q8_0", "Q6_K"),
        ("Q6_K", "Q5_K"),
        ("Q5_K", "Q4_K"),
        ("Q4_K", "Q3_K"),
        ("Q3_K", "Q2_K"),
    ):
        assert errors[more] < errors[fewer]


def test_tensors_lie_in_order_of_use_and_tokenizer_files_are_copied(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama", torch.bfloat16, intermediate_size=192), source)
    (source / "tokenizer.json").write_text("{}")
    report = make(source, tmp_path / "copy")
    assert report.notes == ["the file alone has no tokenizer ('model')"]
    matrices = [
        spec for spec in open_checkpoint(tmp_path / "copy").tensors.values() if len(spec.shape) == 2
    ]
    names = [spec.name for spec in sorted(matrices, key=lambda spec: spec.offset_bytes)]
    parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    expected = [f"blk.{layer}.{part}.weight" for layer in range(4) for part in parts]
    assert names == ["token_embd.weight", *expected, "output.weight"]
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()


def test_a_tied_head_is_one_tensor(checkpoint: MakeCheckpoint, tmp_path: Path, load: Load) -> None:
    make(checkpoint("llama", torch.bfloat16, tie_word_embeddings=True), tmp_path / "copy")
    assert "output.weight" not in open_checkpoint(tmp_path / "copy").tensors
    assert logits(load(tmp_path / "copy"), prompt()).isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_has_at_least_six_bits(
    checkpoint: MakeCheckpoint, tmp_path: Path, tied: bool
) -> None:
    source = checkpoint("llama", torch.bfloat16, hidden_size=256, tie_word_embeddings=tied)
    for kind, head in (("q4_0", "Q6_K"), ("q4_k", "Q6_K"), ("q6_k", "Q6_K"), ("q8_0", "Q8_0")):
        make(source, tmp_path / kind, kind)
        tensors = open_checkpoint(tmp_path / kind).tensors
        assert tensors["token_embd.weight" if tied else "output.weight"].dtype == head
        assert tensors["token_embd.weight"].dtype == (head if tied else kind.upper())


def test_weights_that_cannot_be_cut_into_blocks_are_kept_and_named(
    checkpoint: MakeCheckpoint, tmp_path: Path, load: Load
) -> None:
    source = checkpoint("llama", torch.bfloat16)  # intermediate_size 176 is no multiple of 32
    report = make(source, tmp_path / "copy")
    assert list(report.kept) == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(4)]
    assert "176" in report.kept["model.layers.0.mlp.down_proj.weight"]
    assert open_checkpoint(tmp_path / "copy").tensors["blk.0.ffn_down.weight"].dtype == "BF16"
    assert logits(load(tmp_path / "copy"), prompt()).isfinite().all()


@pytest.mark.parametrize(
    ("family", "stop_at"), [("llama", 0), ("llama", 1), ("llama", 7), ("mixtral", 26)]
)
def test_a_killed_run_leaves_nothing_that_loads_and_goes_on(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    stop_at: int,
) -> None:
    mixture = (
        gguf_models.write_model(tmp_path, family, ["Q8_0"]).stock if family == "mixtral" else None
    )
    source = mixture or checkpoint(family, torch.bfloat16)
    whole = make(source, tmp_path / "whole")
    target, partial = tmp_path / "copy", tmp_path / "copy.partial"
    write: Any = flexinfer.convert.quantize._write
    written: list[int] = []

    def write_and_die(file: Any, entry: Any, offset_bytes: int, *rest: Any) -> Any:
        if len(written) == stop_at:
            os.pwrite(file.fileno(), b"half a tensor", offset_bytes)
            raise KeyboardInterrupt
        written.append(offset_bytes)
        return write(file, entry, offset_bytes, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(flexinfer.convert.quantize, "_write", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            make(source, target)
    assert not target.exists()
    with pytest.raises(CheckpointError):
        open_checkpoint(partial)

    again: list[int] = []

    def write_and_count(file: Any, entry: Any, offset_bytes: int, *rest: Any) -> Any:
        again.append(offset_bytes)
        return write(file, entry, offset_bytes, *rest)

    monkeypatch.setattr(flexinfer.convert.quantize, "_write", write_and_count)
    report = make(source, target)
    assert not set(written) & set(again)
    assert not partial.exists()
    assert report.packed == whole.packed
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert sorted(file.name for file in target.iterdir()) == names
    for name in names:
        if name != "quantize_report.json":
            assert (target / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_line_of_the_state_that_was_cut_off_costs_its_tensor_alone(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama", torch.bfloat16)
    whole = make(source, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(flexinfer.convert.quantize, "_finish", lambda *_: pytest.fail("enough"))
        with pytest.raises(pytest.fail.Exception):
            make(source, tmp_path / "copy")
    state = tmp_path / "copy.partial" / "quantize_state.json"
    os.truncate(state, state.stat().st_size - 5)
    write: Any = flexinfer.convert.quantize._write
    written: list[str] = []

    def write_and_count(file: Any, entry: Any, *rest: Any) -> Any:
        written.append(entry.parameter)
        return write(file, entry, *rest)

    monkeypatch.setattr(flexinfer.convert.quantize, "_write", write_and_count)
    assert make(source, tmp_path / "copy").packed == whole.packed
    assert written == ["lm_head.weight"]
    copies = [(tmp_path / name / "model.gguf").read_bytes() for name in ("copy", "whole")]
    assert copies[0] == copies[1]


def test_what_a_run_with_other_arguments_left_is_not_used(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama", torch.bfloat16)
    with monkeypatch.context() as patched:

        def die(*_: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(flexinfer.convert.quantize, "_finish", die)
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "copy", "q8_0")
    report = make(source, tmp_path / "copy", "q4_0")
    assert report.packed == make(source, tmp_path / "fresh", "q4_0").packed


def test_the_source_is_read_a_block_at_a_time(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("qwen2", torch.bfloat16, vocab_size=4096)
    sizes: list[int] = []
    read = flexinfer.convert.gguf_entries._read
    monkeypatch.setattr(flexinfer.convert.quantize, "BLOCK_WEIGHTS", 8192)

    def counted(spec: Any, start: int, stop: int) -> torch.Tensor:
        rows = read(spec, start, stop)
        sizes.append(rows.nbytes)
        return rows

    monkeypatch.setattr(flexinfer.convert.gguf_entries, "_read", counted)
    make(source, tmp_path / "copy")
    assert sum(sizes) == sum(spec.nbytes for spec in open_checkpoint(source).tensors.values())
    assert max(sizes) <= 2 * 8192


@pytest.mark.parametrize("family", [*ALL_FAMILIES])
def test_a_copy_says_what_the_source_says(family: str, tmp_path: Path, load: Load) -> None:
    """A source whose weights are numbers of blocks already: nothing is lost, and the file alone
    says the same as with its config.json.
    """
    written = gguf_models.write_model(tmp_path, family, ["Q8_0"])
    report = make(written.stock, tmp_path / "copy", "q8_0")
    assert report.architecture == (ALL_FAMILIES[family].architecture or family), report.notes
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "copy" / "model.gguf", alone)
    expected = logits(gguf_models.whole_model(written), prompt())
    assert torch.equal(logits(load(tmp_path / "copy", kv_dtype="float32"), prompt()), expected)
    assert torch.equal(logits(load(alone, kv_dtype="float32"), prompt()), expected)


def test_every_family_has_a_name_in_llama_cpp_and_a_config_in_transformers() -> None:
    assert {family.architecture for family in FAMILIES.values()} <= {
        *gguf.MODEL_ARCH_NAMES.values()
    }
    assert FAMILIES.keys() <= set(transformers.CONFIG_MAPPING.keys())
    for family in FAMILIES.values():
        config = transformers.AutoConfig.for_model(family.model_type)
        keys = [theirs for key, theirs in family.keys.items() if key not in family.only]
        of_config = [*keys, *family.fixed, *family.present, *family.absent, *family.widths]
        # A config may leave it out: attention reads it with a default.
        for key in {*of_config} - {"head_dim"}:
            assert hasattr(config, key), (family.model_type, key)


def test_a_width_that_follows_from_another_is_in_the_header(
    checkpoint: MakeCheckpoint, tmp_path: Path, load: Load
) -> None:
    """GPT-2's own config.json leaves n_inner out."""
    report = make(checkpoint("gpt2", torch.float32), tmp_path / "copy", "q8_0")
    assert report.architecture == "gpt2", report.notes
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "copy" / "model.gguf", alone)
    ids = prompt()
    assert torch.equal(logits(load(alone), ids), logits(load(tmp_path / "copy"), ids))


def test_special_tokens_are_in_the_header_or_missed_in_a_note(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama", torch.bfloat16), source)
    make(source, tmp_path / "copy")
    metadata = read_gguf(tmp_path / "copy" / "model.gguf").metadata
    ids = {name: metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    assert ids == {"bos": 1, "eos": 2, "padding": 0}
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"pad_token_id": -1}))
    report = make(source, tmp_path / "without")
    assert report.architecture == "llama"
    assert "no special tokens" in report.notes[-1]


@pytest.mark.parametrize("family", ["gpt_neox", "opt"])
def test_families_that_llama_cpp_has_no_words_for_here_are_for_flexinfer_alone(
    checkpoint: MakeCheckpoint, tmp_path: Path, load: Load, family: str
) -> None:
    source = checkpoint(family, torch.float32)
    report = make(source, tmp_path / "copy", "q8_0")
    assert report.architecture is None
    assert report.notes[0].startswith("only flexinfer reads it: llama.cpp's header")
    expected, found = logits(load(source), prompt()), logits(load(tmp_path / "copy"), prompt())
    assert (found - expected).norm() < 0.05 * expected.norm()
    (tmp_path / "copy" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json beside it"):
        open_checkpoint(tmp_path / "copy")


def test_what_the_header_cannot_say_makes_it_for_flexinfer_alone(
    checkpoint: MakeCheckpoint, tmp_path: Path, load: Load
) -> None:
    source = checkpoint("llama", torch.float32, hidden_act="gelu")
    report = make(source, tmp_path / "copy", "q8_0")
    assert report.architecture is None
    assert report.notes == [
        "only flexinfer reads it: hidden_act is 'gelu', and 'silu' by llama.cpp's header"
    ]
    expected, found = logits(load(source), prompt()), logits(load(tmp_path / "copy"), prompt())
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    "rope",
    [
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        | {"original_max_position_embeddings": 8192},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_a_scaled_rotation_is_in_the_header(
    checkpoint: MakeCheckpoint, tmp_path: Path, load: Load, rope: dict[str, Any]
) -> None:
    source = checkpoint("llama", torch.float32, rope_parameters=rope)
    report = make(source, tmp_path / "copy", "q8_0")
    assert report.architecture == "llama", report.notes
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "copy" / "model.gguf", alone)
    expected = logits(load(tmp_path / "copy"), prompt())
    assert torch.allclose(logits(load(alone), prompt()), expected, atol=1e-5)


def test_bad_arguments(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoint("llama", torch.bfloat16)
    with pytest.raises(QuantizeError, match="type 'Q9_9': there are q4_0, "):
        make(source, tmp_path / "copy", "q9_9")
    with pytest.raises(QuantizeError, match="type 'IQ2_XS'"):  # needs calibration
        make(source, tmp_path / "copy", "iq2_xs")
    with pytest.raises(CheckpointError):
        make(tmp_path / "nothing", tmp_path / "copy")
    with pytest.raises(QuantizeError, match="exists already"):
        make(source, tmp_path)
    with pytest.raises(QuantizeError, match="DST is a directory"):
        make(source, tmp_path / "copy.gguf")
    odd = checkpoint("llama", torch.bfloat16, hidden_size=48, num_attention_heads=4)
    with pytest.raises(QuantizeError, match="none of its weights can be packed"):
        make(odd, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    make(source, tmp_path / "copy")
    with pytest.raises(QuantizeError, match="a GGUF file runs as it is"):
        make(tmp_path / "copy", tmp_path / "twice")


def test_a_full_disk_is_refused_first(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = flexinfer.convert.quantize.os.statvfs(tmp_path)
    free_blocks = 2**20 // real.f_frsize

    class Full:
        f_bavail, f_frsize = free_blocks, real.f_frsize

    monkeypatch.setattr(flexinfer.convert.quantize.os, "statvfs", lambda _: Full)
    with pytest.raises(
        QuantizeError,
        match=r"needs \d+ KiB and 64 MiB to spare, 1 MiB are free: \d+ bytes \(63 MiB\)",
    ):
        make(checkpoint("llama", torch.bfloat16), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("after_bytes", [10, 30_000, 60_000])
def test_a_disk_that_becomes_full_is_one_clear_error_and_the_work_goes_on(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: int,
    after_bytes: int,
) -> None:
    source = checkpoint("llama", torch.bfloat16)
    whole = make(source, tmp_path / "whole")
    target, partial = tmp_path / "copy", tmp_path / "copy.partial"
    left, pwrite = [after_bytes], os.pwrite

    def write(descriptor: int, data: memoryview, offset_bytes: int) -> int:
        """What a full disk does: a part is written, then nothing."""
        if not left[0]:
            raise OSError(error, os.strerror(error))
        count = min(left[0], len(data))
        left[0] -= count
        return pwrite(descriptor, data[:count], offset_bytes)

    with monkeypatch.context() as patched:
        patched.setattr(flexinfer.convert.quantize.os, "pwrite", write)
        with pytest.raises(
            QuantizeError, match="make room there and give the same command again"
        ) as refused:
            make(source, target)
    assert os.strerror(error) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not target.exists()
    with pytest.raises(CheckpointError):
        open_checkpoint(partial)
    done = (partial / "quantize_state.json").read_text().splitlines()[1:]
    assert (len(done) > 0) == (after_bytes > 10)
    assert make(source, target).packed == whole.packed
    for file in target.iterdir():
        if file.name != "quantize_report.json":
            assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


def test_a_disk_that_becomes_full_with_the_last_small_files_costs_no_tensor(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama", torch.bfloat16)
    target, partial = tmp_path / "copy", tmp_path / "copy.partial"
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
        open_checkpoint(partial)
    monkeypatch.setattr(
        flexinfer.convert.quantize, "_write", lambda *_: pytest.fail("written again")
    )
    make(source, target)
    assert not [file.name for file in target.iterdir() if "unfinished" in file.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 100 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full_names_the_bytes_that_let_it_go_on(
    checkpoint: MakeCheckpoint, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama", torch.bfloat16)
    whole = make(source, tmp_path / "whole")
    target, filler = small_disk / "copy", small_disk / "of another program"
    write: Any = flexinfer.convert.quantize._write
    written: list[int] = []

    def write_on_a_full_disk(file: Any, entry: Any, offset_bytes: int, *rest: Any) -> Any:
        if len(written) == 2:  # another program takes all but a part of what is still needed
            with filler.open("wb") as other:
                os.posix_fallocate(
                    other.fileno(),
                    0,
                    flexinfer.convert.quantize.free_disk_bytes(small_disk) - 20_480,
                )
        written.append(offset_bytes)
        return write(file, entry, offset_bytes, *rest)

    monkeypatch.setattr(flexinfer.convert.quantize, "_write", write_on_a_full_disk)
    with pytest.raises(
        QuantizeError, match=r"No space left on device: \d+ bytes \(64 MiB\) are missing"
    ) as refused:
        make(source, target)
    assert not target.exists()

    found = re.search(r"(\d+) bytes", str(refused.value))
    assert found is not None
    page_bytes, free_bytes = (
        os.sysconf("SC_PAGE_SIZE"),
        flexinfer.convert.quantize.free_disk_bytes(small_disk),
    )
    wanted_bytes = free_bytes + int(found[1]) + 2 * page_bytes  # the header is written again
    while flexinfer.convert.quantize.free_disk_bytes(small_disk) < wanted_bytes:
        os.truncate(filler, filler.stat().st_size - page_bytes)
    assert make(source, target).packed == whole.packed
    assert (target / "model.gguf").read_bytes() == (tmp_path / "whole" / "model.gguf").read_bytes()


def test_the_copy_of_an_earlier_version_is_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path, load: Load
) -> None:
    path = tmp_path / "old"
    shutil.copytree(checkpoint("llama", torch.bfloat16), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "flexinfer"}})
    )
    with pytest.raises(
        ValueError, match=r"an earlier version of flexinfer.*flexinfer quantize SRC DST --type q4_k"
    ):
        load(path)
    with pytest.raises(CheckpointError, match="an earlier version of flexinfer"):
        make(path, tmp_path / "copy")

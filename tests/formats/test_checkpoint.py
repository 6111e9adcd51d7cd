"""A damaged or foreign checkpoint is refused with one clear error, before memory is planned and
with nothing left behind.
"""

import json
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.formats.safetensors import INDEX_FILE, read_header
from flexinfer.formats.tensors import CheckpointError
from tests.conftest import Load, MakeCheckpoint

Header = dict[str, Any]


def write_safetensors(file: Path, header: Header | bytes, data: bytes = b"") -> None:
    """A safetensors file with any header, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def copy(checkpoint: MakeCheckpoint, tmp_path: Path) -> Callable[..., Path]:
    """copy(sharded=False) -> a private copy of a small Llama checkpoint, to be damaged."""

    def make(sharded: bool = False) -> Path:
        target = tmp_path / "copy"
        target.mkdir()
        for file in checkpoint(sharded=sharded).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    return make


def change_index(path: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((path / INDEX_FILE).read_text())
    change(index["weight_map"])
    (path / INDEX_FILE).write_text(json.dumps(index))


def change_header(file: Path, change: Callable[[Header], Any]) -> None:
    content = file.read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_bytes])
    change(header)
    write_safetensors(file, header, content[8 + header_bytes :])


def change_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("sharded", [True, False])
def test_indexes_what_safetensors_reads(checkpoint: MakeCheckpoint, sharded: bool) -> None:
    path = checkpoint(sharded=sharded)
    tensors = open_checkpoint(path).tensors
    files = sorted(path.glob("*.safetensors"))
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert tensors.keys() == expected.keys()
    for name, spec in tensors.items():
        with spec.file.open("rb") as stream:
            stream.seek(spec.offset_bytes)
            raw = bytearray(stream.read(spec.nbytes))
        tensor = torch.frombuffer(raw, dtype=spec.torch_dtype).view(spec.shape)
        assert torch.equal(tensor, expected[name])


def test_opens_through_links_as_in_the_hugging_face_cache(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in checkpoint(sharded=True).iterdir():
        (snapshot / file.name).symlink_to(file)
    assert (
        open_checkpoint(snapshot).tensors.keys()
        == open_checkpoint(checkpoint(sharded=True)).tensors.keys()
    )


BAD_HEADERS: dict[str, tuple[Header | bytes, bytes, str]] = {
    "not JSON": (b"{bananas", b"", "not a JSON object"),
    "not UTF-8": (b'{"\xff\xfe": 1}', b"", "not a JSON object"),
    "nested without end": (b"[" * 100_000, b"", "not a JSON object"),
    "a list": (b"[]", b"", "not a JSON object"),
    "entry that is no object": ({"a": 3}, b"", "dtype, shape and data_offsets"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", "dtype, shape and data_offsets"),
    "offsets in words": (
        {"a": {**entry(0, 4, [1]), "data_offsets": ["0", "4"]}},
        b"1234",
        "data_offsets",
    ),
    "negative offset": ({"a": entry(-4, 0, [1])}, b"1234", "data_offsets"),
    "negative shape": ({"a": entry(0, 4, [-1, -1])}, b"1234", "data_offsets"),
    "offsets swapped": ({"a": entry(4, 0, [1])}, b"1234", "data_offsets"),
    "size too small": (
        {"a": entry(0, 4, [2])},
        b"12345678",
        "needs 8 bytes, the header gives it 4",
    ),
    "size too large": (
        {"a": entry(0, 8, [1])},
        b"12345678",
        "needs 4 bytes, the header gives it 8",
    ),
    "absurd shape": ({"a": entry(0, 4, [2**40, 2**40])}, b"1234", "the header gives it 4"),
    "beyond the file": ({"a": entry(0, 4, [1]), "b": entry(4, 8, [1])}, b"12345", "truncated.*'b'"),
    "far beyond the file": ({"a": entry(2**50, 2**50 + 4, [1])}, b"1234", "truncated.*'a'"),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"x" * 12, "'b' overlaps"),
    "same place twice": ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"1234", "overlaps"),
    "float6": ({"a": entry(0, 3, [4], "F6_E2M3")}, b"123", "dtype 'F6_E2M3'"),
    "dtype of no name": ({"a": {**entry(0, 4, [1]), "dtype": ["F32"]}}, b"1234", "dtype"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_header_that_does_not_hold(tmp_path: Path, case: str) -> None:
    header, data, message = BAD_HEADERS[case]
    write_safetensors(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(tmp_path / "model.safetensors")
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("claimed", [2**63, 2**40, 100_000_001, 17])
def test_header_length_that_is_absurd(tmp_path: Path, claimed: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", claimed) + b"{}" + b" " * 14)
    with pytest.raises(CheckpointError, match=f"claims {claimed} bytes"):
        read_header(tmp_path / "model.safetensors")


def test_empty_tensors_are_fine(tmp_path: Path) -> None:
    header = {"none": entry(0, 0, [0, 3]), "some": entry(0, 4, [1]), "more": entry(4, 4, [0])}
    write_safetensors(
        tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}, **header}, b"1234"
    )
    assert {spec.name: spec.nbytes for spec in read_header(tmp_path / "model.safetensors")} == {
        "none": 0,
        "some": 4,
        "more": 0,
    }


def first_shard(path: Path) -> Path:
    return min(path.glob("*.safetensors"))


DAMAGE: dict[str, tuple[bool, Callable[[Path], Any], str]] = {
    "shard missing": (True, lambda p: first_shard(p).unlink(), "00001-of-.*missing.*download"),
    "shard truncated": (
        True,
        lambda p: os.truncate(first_shard(p), first_shard(p).stat().st_size - 1),
        "00001-of-.*truncated.*download",
    ),
    "file truncated in its header": (
        False,
        lambda p: os.truncate(p / "model.safetensors", 100),
        "model.safetensors.*truncated.*download",
    ),
    "file empty": (
        False,
        lambda p: os.truncate(p / "model.safetensors", 0),
        "model.safetensors.*download",
    ),
    "index points above": (
        True,
        lambda p: change_index(p, lambda m: m.update({"lm_head.weight": "../model.safetensors"})),
        "index.json.*outside.*do not load",
    ),
    "index points to the root": (
        True,
        lambda p: change_index(p, lambda m: m.update({"lm_head.weight": "/etc/passwd"})),
        "index.json.*outside.*'/etc/passwd'",
    ),
    "index points to itself": (
        True,
        lambda p: change_index(p, lambda m: m.update({"lm_head.weight": ".."})),
        "index.json.*outside",
    ),
    "index names a tensor that is elsewhere": (
        True,
        lambda p: change_index(p, lambda m: m.update({"lm_head.weight": first_shard(p).name})),
        "00001-of-.*'lm_head.weight' is not in it.*download",
    ),
    "index names no file": (
        True,
        lambda p: change_index(p, lambda m: m.update({"lm_head.weight": 3})),
        "weight_map",
    ),
    "index is no JSON": (
        True,
        lambda p: (p / INDEX_FILE).write_text("{"),
        "index.json.*JSON.*download",
    ),
    "index is a list": (
        True,
        lambda p: (p / INDEX_FILE).write_text("[1]"),
        "index.json.*object, found list",
    ),
    "index is binary": (
        True,
        lambda p: (p / INDEX_FILE).write_bytes(b"\xff\xfe\x00"),
        "index.json.*JSON",
    ),
    "tensor missing": (
        False,
        lambda p: change_header(
            p / "model.safetensors", lambda h: h.pop("model.layers.2.mlp.up_proj.weight")
        ),
        "1 tensors.*'model.layers.2.mlp.up_proj.weight'",
    ),
    "config of another shape": (
        False,
        lambda p: change_config(p, intermediate_size=192),
        r"model.safetensors.*shape \[64, 176\], config.json says \[64, 192\]",
    ),
    "more layers in the config": (
        False,
        lambda p: change_config(p, num_hidden_layers=5),
        "9 tensors.*'model.layers.4",
    ),
    "weight in integers": (
        False,
        lambda p: change_header(
            p / "model.safetensors",
            lambda h: h["model.layers.1.mlp.up_proj.weight"].update(dtype="I32"),
        ),
        "model.layers.1.mlp.up_proj.weight.*dtype I32",
    ),
    "config is no JSON": (
        False,
        lambda p: (p / "config.json").write_text("bananas"),
        "config.json",
    ),
    "config is a list": (False, lambda p: (p / "config.json").write_text("[1]"), "config.json"),
    "config of no known model": (
        False,
        lambda p: change_config(p, model_type="bananas"),
        "config.json",
    ),
    "config of no causal LM": (False, lambda p: change_config(p, model_type="vit"), "config.json"),
    "config missing": (
        False,
        lambda p: (p / "config.json").unlink(),
        "config.json is missing.*save_pretrained",
    ),
    "quantised by others": (
        False,
        lambda p: change_config(p, quantization_config={"quant_method": "bitsandbytes"}),
        "gptq.*flexinfer quantize",
    ),
    "pickle only": (
        False,
        lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
        "found pytorch_model.bin.*save_pretrained",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoint_is_refused_and_leaves_nothing(
    copy: Callable[..., Path], load: Load, case: str
) -> None:
    sharded, damage, message = DAMAGE[case]
    path = copy(sharded)
    damage(path)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=message):
        load(path)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


def test_what_is_no_checkpoint_at_all(load: Load, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor .*index"):
        load(tmp_path)
    for name in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "bananas"):
        with pytest.raises(CheckpointError, match="no such directory"):
            load(name)

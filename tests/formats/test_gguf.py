"""Reading GGUF headers: what is found, and that whatever is wrong is one clear error which leaves
nothing open.
"""

import os
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_models import Written, write_model
from hypothesis import given
from hypothesis import strategies as st

from flexinfer import CheckpointError
from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.formats.gguf import ENCODING_OF, LongArray, read_gguf
from flexinfer.kernels.ggml import TYPES


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def value(key: str, kind: int, packed: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + packed


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return (
        string(name)
        + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        + struct.pack("<IQ", kind, offset)
    )


ARCHITECTURE = value("general.architecture", 8, string("llama"))


def file_of(
    values: list[bytes],
    tensors: list[bytes],
    data: bytes = bytes(4096),
    *,
    magic: bytes = b"GGUF",
    version: bytes = struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensor_count, value_count = counts or (len(tensors), len(values))
    header = (
        magic + version + struct.pack("<QQ", tensor_count, value_count) + b"".join(values + tensors)
    )
    return header + bytes(-len(header) % 32) + data


@pytest.fixture
def made(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        file = tmp_path / "model.gguf"
        file.write_bytes(content)
        return file

    return write


def test_metadata_and_tensors_are_found(made: Callable[[bytes], Path]) -> None:
    words = struct.pack("<IQ", 8, 3) + string("a") + string("bc") + string("")
    numbers = struct.pack("<IQ3I", 4, 3, 7, 8, 9)
    long = struct.pack("<IQ", 4, 5000) + bytes(4 * 5000)
    file = made(
        file_of(
            [
                ARCHITECTURE,
                value("some.words", 9, words),
                value("some.numbers", 9, numbers),
                value("some.long", 9, long),
                value("llama.context_length", 4, struct.pack("<I", 128)),
                value("llama.ratio", 6, struct.pack("<f", 0.5)),
                value("general.alignment", 4, struct.pack("<I", 64)),
            ],
            [tensor("b", (3, 64), 2, 128), tensor("a", (5,), 0, 0)],
        )
    )
    found = read_gguf(file)
    assert found.architecture == "llama"
    assert found.of_architecture("context_length") == 128
    assert found.of_architecture("ratio") == 0.5
    assert found.metadata["some.words"] == LongArray(3)
    assert found.metadata["some.long"] == LongArray(5000)
    assert found.metadata["some.numbers"] == [7, 8, 9]
    assert read_gguf(file, ["some.words"]).metadata["some.words"] == ["a", "bc", ""]
    assert list(found.tensors) == ["a", "b"]
    spec = found.tensors["b"]
    assert (spec.shape, spec.dtype, spec.nbytes, spec.row_bytes) == ((3, 64), "Q4_0", 3 * 36, 36)
    assert spec.offset_bytes % 64 == 0
    assert spec.offset_bytes == found.tensors["a"].offset_bytes + 128


def test_it_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    written = write_model(tmp_path, "llama")
    theirs = {one.name: one for one in gguf.GGUFReader(written.file).tensors}
    ours = read_gguf(written.file).tensors
    assert ours.keys() == theirs.keys()
    for name, spec in ours.items():
        assert spec.offset_bytes == theirs[name].data_offset
        assert spec.nbytes == theirs[name].n_bytes
        assert list(spec.shape) == [int(n) for n in reversed(theirs[name].shape)]
        assert spec.dtype == theirs[name].tensor_type.name


def test_types_are_what_ggml_says() -> None:
    sizes = gguf.constants.GGML_QUANT_SIZES
    for number, encoding in ENCODING_OF.items():
        assert (encoding.block_elements, encoding.block_bytes) == sizes[
            gguf.GGMLQuantizationType(number)
        ]
        assert encoding.name == gguf.GGMLQuantizationType(number).name
        if encoding.torch_name is None:
            kernel = TYPES[encoding.name]
            assert (kernel.block_elements, kernel.block_bytes) == (
                encoding.block_elements,
                encoding.block_bytes,
            )


ONE = [tensor("a", (2, 32), 2, 0)]
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF file"),
    "text": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "no GGUF file"),
    "big-endian": (
        file_of([ARCHITECTURE], ONE, version=struct.pack(">I", 3)),
        "big-endian.*little-endian",
    ),
    "version 1": (
        file_of([ARCHITECTURE], ONE, version=struct.pack("<I", 1)),
        "version 1.*newer file",
    ),
    "version 4": (file_of([ARCHITECTURE], ONE, version=struct.pack("<I", 4)), "version 4"),
    "too many values": (file_of([ARCHITECTURE], ONE, counts=(1, 1 << 60)), "truncated or damaged"),
    "too many tensors": (file_of([ARCHITECTURE], ONE, counts=(1 << 60, 1)), "truncated or damaged"),
    "more tensors than there are": (file_of([ARCHITECTURE], ONE, counts=(40, 1)), "model.gguf: "),
    "long name": (file_of([struct.pack("<Q", 1 << 50)], ONE), "would take 1125899906842624 bytes"),
    "long array": (
        file_of([value("x", 9, struct.pack("<IQ", 4, 1 << 60))], ONE),
        "the array 'x' would take",
    ),
    "many strings": (
        file_of([value("x", 9, struct.pack("<IQ", 8, 1 << 60))], ONE),
        "the array 'x' would take",
    ),
    "long string in an array": (
        file_of([value("x", 9, struct.pack("<IQQ", 8, 1, 1 << 62))], ONE),
        "truncated or damaged",
    ),
    "array of arrays": (file_of([value("x", 9, struct.pack("<IQ", 9, 1))], ONE), "array of type 9"),
    "type of value": (file_of([value("x", 77, b"1234")], ONE), "type 77, which there is not"),
    "value twice": (
        file_of([ARCHITECTURE, ARCHITECTURE], ONE),
        "'general.architecture' is there twice",
    ),
    "no architecture": (file_of([value("x", 4, b"1234")], ONE), "no general.architecture"),
    "alignment": (
        file_of([ARCHITECTURE, value("general.alignment", 4, struct.pack("<I", 48))], ONE),
        "general.alignment is 48",
    ),
    "no alignment": (
        file_of([ARCHITECTURE, value("general.alignment", 4, struct.pack("<I", 0))], ONE),
        "general.alignment is 0",
    ),
    "dimensions": (file_of([ARCHITECTURE], [tensor("a", (1,) * 5, 0, 0)]), "'a' has 5 dimensions"),
    "no dimensions": (file_of([ARCHITECTURE], [tensor("a", (), 0, 0)]), "'a' has 0 dimensions"),
    "empty dimension": (
        file_of([ARCHITECTURE], [tensor("a", (0, 32), 0, 0)]),
        "no whole number of F32",
    ),
    "type of tensor": (
        file_of([ARCHITECTURE], [tensor("a", (32,), 99, 0)]),
        "ggml's type 99, supported are Q4_0",
    ),
    "half a block": (
        file_of([ARCHITECTURE], [tensor("a", (2, 48), 2, 0)]),
        "no whole number of Q4_0 blocks",
    ),
    "unaligned": (
        file_of([ARCHITECTURE], [tensor("a", (2, 32), 2, 8)]),
        "byte 8 .*no multiple of 32",
    ),
    "overlapping": (
        file_of([ARCHITECTURE], [tensor("a", (2, 32), 2, 0), tensor("b", (2, 32), 2, 32)]),
        "'b' overlaps",
    ),
    "beyond the end": (
        file_of([ARCHITECTURE], [tensor("a", (2, 32), 2, 8192)]),
        "truncated: tensor 'a'",
    ),
    "huge": (
        file_of([ARCHITECTURE], [tensor("a", (1 << 40, 1 << 40), 0, 0)]),
        "truncated: tensor 'a'",
    ),
    "tensor twice": (
        file_of([ARCHITECTURE], [tensor("a", (2, 32), 2, 0), tensor("a", (2, 32), 2, 64)]),
        "two tensors of one name",
    ),
    "unknown architecture": (
        file_of([value("general.architecture", 8, string("bananas"))], ONE),
        "architecture 'bananas' cannot be run; these can: .*llama.*qwen3",
    ),
    "experts of an architecture that has none here": (
        file_of(
            [value("general.architecture", 8, string("gemma2"))],
            [tensor("blk.0.ffn_up_exps.weight", (2, 32), 2, 0)],
        ),
        "gemma2 with experts",
    ),
    "no embedding": (file_of([ARCHITECTURE], ONE), "token_embd.weight"),
    "no layers": (
        file_of([ARCHITECTURE], [tensor("token_embd.weight", (2, 32), 2, 0)]),
        "embedding_length is None",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_refused_and_leaves_nothing(
    made: Callable[[bytes], Path], case: str
) -> None:
    content, message = BAD[case]
    file = made(content)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=message) as refused:
        open_checkpoint(file)
    assert "model.gguf" in str(refused.value)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


@given(st.data())
def test_no_cut_or_changed_byte_does_worse_than_be_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = file_of(
        [ARCHITECTURE, value("x", 9, struct.pack("<IQ", 8, 2) + string("ab") + string("c"))],
        [tensor("a", (2, 32), 2, 0), tensor("b", (64,), 0, 64)],
        bytes(512),
    )
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "changed.gguf"
    file.write_bytes(content)
    try:
        found = read_gguf(file)
    except CheckpointError:
        return
    assert all(spec.offset_bytes + spec.nbytes <= len(content) for spec in found.tensors.values())


# ---- where files lie


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_model(tmp_path_factory.mktemp("split"), "llama", split_tensors=8)


def test_a_split_model_is_one(split: Written, tmp_path: Path) -> None:
    whole = write_model(tmp_path, "llama")
    parts = sorted(split.file.parent.glob("*.gguf"))
    assert len(parts) > 2
    for path in (split.file, parts[1], split.file.parent):
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == parts[0]
        assert checkpoint.files == parts
        assert checkpoint.tensors.keys() == open_checkpoint(whole.file).tensors.keys()


def test_parts_that_are_missing_or_of_another_order_are_refused(
    split: Written, tmp_path: Path
) -> None:
    parts = sorted(split.file.parent.glob("*.gguf"))
    for part in parts:
        shutil.copy(part, tmp_path)
    (tmp_path / parts[1].name).unlink()
    with pytest.raises(CheckpointError, match=rf"parts are not beside it, such as {parts[1].name}"):
        open_checkpoint(tmp_path / parts[0].name)
    shutil.copy(parts[0], tmp_path / parts[1].name)
    with pytest.raises(CheckpointError, match=r"part 1 of \d and is named as part 2"):
        open_checkpoint(tmp_path)
    shutil.copy(parts[0], tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match=r"part 1 of \d and is named as part 1 of 1"):
        open_checkpoint(tmp_path / "alone.gguf")


def test_a_directory_with_several_models_names_them(tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"several models: one.gguf, two.gguf; .*gguf_file="):
        open_checkpoint(tmp_path)


def test_safetensors_come_first_in_a_directory_that_has_both(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "both")
    written = write_model(tmp_path, "llama")
    shutil.copy(written.file, tmp_path / "both")
    assert open_checkpoint(tmp_path / "both").architecture is None
    assert open_checkpoint(tmp_path / "both" / "model.gguf").architecture == "llama"


# ---- what does not fit transformers


def test_a_tensor_without_a_place_is_named(tmp_path: Path, load: Callable[..., Any]) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_sub_norm.weight", np.ones(256, np.float32))

    with pytest.raises(
        CheckpointError, match=r"1 tensors have no place in LlamaForCausalLM.*attn_sub_norm"
    ):
        load(write_model(tmp_path, "llama", change=add).file)


def test_layers_that_differ_are_refused(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop("llama.attention.head_count_kv")
        writer.add_array("llama.attention.head_count_kv", [2, 1])

    with pytest.raises(CheckpointError, match=r"head_count_kv differs from layer to layer"):
        open_checkpoint(write_model(tmp_path, "llama", change=add).file)

"""`verify=True`: damage on the way from the disk is found before it is computed with."""

import errno
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch

import flexinfer.formats.checkpoint
import flexinfer.streaming.reader
from flexinfer.streaming.checksums import checksums_of
from flexinfer.streaming.reader import FileReader, ReadError
from tests.conftest import Load, MakeCheckpoint, logits, prompt, stock


@pytest.fixture
def copy(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint(sharded=True), tmp_path / "copy"))


def damage(file: Path, offset: int) -> None:
    """Turn one bit over as a disk would: the file says that nothing was written."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 4]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("policy", ["none", "balanced"])
@pytest.mark.parametrize("io_threads", [0, 2])
def test_sound_files_pass(
    copy: Path, load: Load, tmp_path: Path, policy: str, io_threads: int
) -> None:
    for _ in range(2):  # the second time with the checksums of the first
        model = load(copy, policy=policy, io_threads=io_threads, verify=tmp_path / "sums")
        for _ in range(2):
            assert torch.equal(logits(model, prompt()), logits(stock(copy), prompt()))


@pytest.mark.parametrize("part", ["linear", "norm", "embedding"])
@pytest.mark.parametrize("direct", [True, False])
def test_one_bit_is_found_wherever_it_is(
    copy: Path, load: Load, tmp_path: Path, part: str, direct: bool
) -> None:
    name = {
        "linear": "model.layers.2.mlp.up_proj.weight",
        "norm": "model.layers.1.input_layernorm.weight",
        "embedding": "model.embed_tokens.weight",
    }[part]
    load(copy, verify=tmp_path / "sums").flexinfer.close()
    spec = flexinfer.formats.checkpoint.open_checkpoint(copy).tensors[name]
    damage(spec.file, spec.offset_bytes + spec.nbytes - 1)
    page = (spec.offset_bytes + spec.nbytes - 1) // 4096 * 4096

    def look_up_everything() -> None:
        model = load(copy, policy="none", direct=direct, verify=tmp_path / "sums")
        for start in (0, 64, 128):
            model(torch.arange(160)[None, start : start + 64])

    with pytest.raises(
        ReadError, match=f"{spec.file}: the 4096 bytes at {page} are not what they were"
    ) as raised:
        look_up_everything()
    assert raised.value.errno == errno.EIO


def test_damage_in_passing_is_read_again(
    copy: Path, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(copy, verify=tmp_path / "sums").flexinfer.close()
    chance, damaged = random.Random(0), 0
    # Threads whose last read was damaged: their next one, of the same bytes, is not.
    wrong: set[int] = set()

    class FlippingOs:
        def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
            count = os.preadv(fd, buffers, offset)
            nonlocal damaged
            thread = threading.get_ident()
            if thread in wrong:
                wrong.remove(thread)
            elif chance.random() < 0.1:
                buffers[0][chance.randrange(count)] ^= 16
                wrong.add(thread)
                damaged += 1
            return count

        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

    expected = logits(stock(copy), prompt())
    monkeypatch.setattr(flexinfer.streaming.reader, "os", FlippingOs())
    model = load(copy, policy="none", direct=False, verify=tmp_path / "sums")
    for _ in range(3):
        assert torch.equal(logits(model, prompt()), expected)
    assert damaged > 3


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 50_000, (4 << 20) + 5])
def test_every_part_of_a_file_can_be_read_and_checked(tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    content = os.urandom(size)
    file.write_bytes(content)
    into = memoryview(bytearray(size + 8192))
    sums = checksums_of([file], tmp_path / "sums")
    reader = FileReader([file], direct=False, checksums=sums)
    for _ in range(50):
        start, stop = sorted(random.choices(range(size + 1), k=2))
        if start < stop:
            position = reader.read(file, start, stop - start, into)
            assert into[position : position + stop - start] == content[start:stop]
    reader.close()


def test_a_file_that_was_written_anew_has_new_checksums_and_none_are_made_twice(
    copy: Path, load: Load, tmp_path: Path
) -> None:
    made = tmp_path / "sums"
    load(copy, verify=made).flexinfer.close()
    first = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
    assert len(first) == len(list(copy.glob("*.safetensors")))
    load(copy, verify=made).flexinfer.close()
    assert {file.name: file.stat().st_mtime_ns for file in made.iterdir()} == first
    changed = next(copy.glob("*.safetensors"))
    damage(changed, changed.stat().st_size - 1)
    os.utime(changed)
    model = load(copy, verify=made)
    logits(model, prompt())
    assert len(list(made.iterdir())) == len(first) + 1
    assert not [file for file in made.iterdir() if file.suffix != ".xxh3"], (
        "nothing half made is left"
    )

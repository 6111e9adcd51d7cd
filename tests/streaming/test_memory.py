"""Buffers of weights: page-aligned, seen at any offset without a copy, locked where the system lets
us.
"""

import ctypes
import gc
import mmap
import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexinfer.memory.buffer
from flexinfer.memory.buffer import HUGE_PAGE_BYTES, PAGE_BYTES, Buffer, round_up
from flexinfer.memory.heap import return_freed_memory, trim_heap
from flexinfer.memory.libraries import LibraryPages, library_pages, page_out_libraries
from flexinfer.memory.process import anonymous_bytes
from tests.conftest import needs_mlock


def locked_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmLck:")[1].split()[0]) << 10


@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_rounding_up(nbytes: int, multiple: int) -> None:
    rounded = round_up(nbytes, multiple)
    assert rounded % multiple == 0
    assert nbytes <= rounded < nbytes + multiple


@pytest.mark.parametrize("nbytes", [0, 1, PAGE_BYTES, PAGE_BYTES + 1, 3 << 20])
def test_buffers_are_whole_pages(nbytes: int) -> None:
    buffer = Buffer(nbytes, lock=False)
    assert nbytes <= buffer.nbytes < nbytes + PAGE_BYTES + (nbytes == 0)
    assert buffer.nbytes % PAGE_BYTES == buffer.bytes.data_ptr() % PAGE_BYTES == 0
    assert len(buffer.memory(0, buffer.nbytes)) == len(buffer.bytes) == buffer.nbytes


@pytest.mark.parametrize(
    "nbytes", [HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES, 5 * HUGE_PAGE_BYTES + 12_345]
)
def test_large_buffers_begin_with_a_huge_page_and_take_no_more_than_asked(nbytes: int) -> None:
    before = psutil.Process().memory_info().rss
    buffer = Buffer(nbytes, lock=False)
    buffer.bytes.fill_(1)
    if nbytes >= HUGE_PAGE_BYTES:
        assert buffer.bytes.data_ptr() % HUGE_PAGE_BYTES == 0
    assert psutil.Process().memory_info().rss - before <= buffer.nbytes + 256 * PAGE_BYTES


@given(
    st.integers(0, 4000),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.uint8]),
)
def test_tensors_at_any_offset_share_the_bytes(start: int, dtype: torch.dtype) -> None:
    buffer = Buffer(PAGE_BYTES, lock=False)
    tensor = buffer.tensor(start, dtype, (2, 3))
    expected = torch.arange(6).view(2, 3).to(dtype)
    nbytes = 6 * dtype.itemsize
    buffer.memory(start, nbytes)[:] = expected.view(torch.uint8).numpy().tobytes()
    assert torch.equal(tensor, expected)
    assert tensor.data_ptr() == buffer.bytes.data_ptr() + start


def test_views_end_with_their_buffer() -> None:
    buffer = Buffer(PAGE_BYTES, lock=False)
    with pytest.raises(ValueError, match="buffer"):
        buffer.tensor(PAGE_BYTES - 8, torch.float32, (3,))
    large = Buffer(HUGE_PAGE_BYTES, lock=False)
    with pytest.raises(ValueError, match="buffer"):
        large.tensor(HUGE_PAGE_BYTES - 8, torch.float32, (3,))


def test_memory_lives_as_long_as_a_tensor_of_it_and_no_longer() -> None:
    gc.collect()
    before = locked_bytes()
    tensor = Buffer(1 << 20, lock=True).tensor(0, torch.uint8, (8,))
    if locked_bytes() == before:
        pytest.skip("mlock is limited here (ulimit -l)")
    assert locked_bytes() - before == 1 << 20
    tensor.fill_(7)
    gc.collect()
    assert tensor.tolist() == [7] * 8
    del tensor
    gc.collect()
    assert locked_bytes() == before


def test_where_locking_is_refused_it_says_so_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refusing:
        def mlock(self, address: object, nbytes: object) -> int:
            return -1

        def madvise(self, address: object, nbytes: object, advice: int) -> int:
            return 0

    monkeypatch.setattr(flexinfer.memory.buffer, "LIBC", Refusing())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        buffers = [Buffer(PAGE_BYTES, lock=True) for _ in range(3)]
    assert not any(buffer.locked for buffer in buffers)
    assert ["could not be locked" in str(warning.message) for warning in said] == [True]
    assert "ulimit -l" in str(said[0].message)
    assert buffers[0].tensor(0, torch.uint8, (4,)).tolist() == [0] * 4
    assert not Buffer(1, lock=False).locked


def test_the_end_of_a_buffer_goes_back_to_the_system_and_its_beginning_stays() -> None:
    buffer = Buffer(64 * PAGE_BYTES, lock=False)
    buffer.bytes.fill_(7)
    before = anonymous_bytes()
    buffer.release_from(16 * PAGE_BYTES + 1)
    assert buffer.nbytes == 17 * PAGE_BYTES
    assert before - anonymous_bytes() >= 40 * PAGE_BYTES
    assert buffer.bytes[: 17 * PAGE_BYTES].eq(7).all()


def test_library_pages_that_are_let_go_of_come_back_when_they_are_needed() -> None:
    torch.ones(64, 64) @ torch.ones(64, 64)
    before = anonymous_bytes()
    page_out_libraries()
    assert torch.equal(torch.ones(64, 64) @ torch.ones(64, 64), torch.full((64, 64), 64.0))
    assert abs(anonymous_bytes() - before) < 4 << 20


def test_library_pages_are_those_touched_since_the_others_were_let_go_of(tmp_path: Path) -> None:
    """Beside another process too that uses the same library: the system does not page out what both
    use.
    """
    (tmp_path / "library").write_bytes(bytes(range(256)) * (32 << 10))  # 8 MiB
    with (tmp_path / "library").open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    library.madvise(mmap.MADV_NOHUGEPAGE)
    pages = np.frombuffer(library, np.uint8)[::PAGE_BYTES]
    start = int(pages.ctypes.data)

    def touched_bytes() -> int:
        return sum(
            b - a for a, b in library_pages().ranges if start <= a < b <= start + len(library)
        )

    pages.sum()
    child = os.fork()
    if child == 0:
        pages.sum()
        time.sleep(60)
        os._exit(0)
    try:
        assert touched_bytes() == len(library)
        page_out_libraries()
        assert touched_bytes() == 0
        assert pages[1024] == 0
        # The system maps what lies around a page too.
        assert 0 < touched_bytes() <= len(library) // 2
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@needs_mlock
def test_locked_library_pages_stay_until_the_last_model_that_needs_them_is_closed() -> None:
    before = locked_bytes()
    torch.ones(64, 64) @ torch.ones(64, 64)
    pages = library_pages()
    half = LibraryPages(pages.ranges[::2])
    pages.lock()
    half.lock()
    assert locked_bytes() - before == pages.nbytes
    page_out_libraries()
    assert library_pages().nbytes >= pages.nbytes
    pages.unlock()
    assert locked_bytes() - before == half.nbytes
    page_out_libraries()
    assert half.nbytes <= library_pages().nbytes < pages.nbytes
    half.unlock()
    half.unlock()  # as a model may be closed twice
    assert locked_bytes() == before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the heap is glibc's")
def test_a_large_tensor_does_not_lie_in_a_hole_of_the_heap() -> None:
    """Where it would stay when it is freed."""
    return_freed_memory()
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(100 << 10) for _ in range(200)]
    for block in blocks[:-1]:  # the last one keeps the heap from becoming shorter
        libc.free(block)
    inside = torch.empty(4 << 20, dtype=torch.uint8)
    assert min(blocks) <= inside.data_ptr() < max(blocks), "without it, it does"
    del inside
    trim_heap()
    outside = torch.empty(4 << 20, dtype=torch.uint8)
    assert not min(blocks) <= outside.data_ptr() < max(blocks)
    libc.free(blocks[-1])

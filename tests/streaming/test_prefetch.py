"""The window delivers the right bytes in the order of use, stays within its slots, and survives
errors, jumps and closing.
"""

import ctypes
import errno
import faulthandler
import mmap
import os
import random
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flexinfer.streaming.prefetch
from flexinfer.memory.buffer import PAGE_BYTES
from flexinfer.observe.trace import Trace
from flexinfer.plan.weights import Piece
from flexinfer.streaming.prefetch import Prefetcher
from flexinfer.streaming.queue import Read, ReadQueue
from flexinfer.streaming.reader import FileReader, ReadError, padded_bytes

FILE = Path("weights")
CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture(autouse=True)
def _no_deadlock() -> Iterator[None]:
    """A test that hangs ends the run with the stacks of all threads."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class MemoryReader(FileReader):
    """Reads CONTENT as a FileReader reads a file; fails, or waits, when told to.

    Counts what is in flight.
    """

    def __init__(self) -> None:
        self.direct = True
        self.fail_at: set[int] = set()  # offsets in bytes
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[int] = []
        self.lock = threading.Lock()

    timeout_s = None

    def read_now(self, file: Path, offset_bytes: int, nbytes: int, into: memoryview) -> int:
        with self.lock:
            self.asked.append(offset_bytes)
        self.gate.wait()
        if offset_bytes in self.fail_at:
            raise ReadError(
                errno.EIO, f"{file}: reading {nbytes} bytes at {offset_bytes}: injected"
            )
        skip = offset_bytes % PAGE_BYTES
        part = CONTENT[offset_bytes - skip : offset_bytes + nbytes]
        into[: len(part)] = part
        return skip


def schedule_of(sizes: list[int], pieces_per_layer: int = 2) -> list[Piece]:
    """Pieces of these sizes one after another."""
    pieces, offset = [], 3
    for i, size in enumerate(sizes):
        layer = i // pieces_per_layer
        pieces.append(
            Piece(f"w{i}", layer, 0, 1, FILE, offset, size, padded_bytes(offset, size), size)
        )
        offset += size
    return pieces


@contextmanager
def prefetcher_of(
    schedule: list[Piece],
    reader: FileReader,
    *,
    slots: int = 3,
    io_threads: int = 2,
    window_layers: int | None = None,
    ahead: bool = True,
    trace: Trace | None = None,
) -> Iterator[Prefetcher]:
    queue = ReadQueue(reader, trace or Trace(), io_threads=io_threads)
    slot_bytes = max(piece.memory_bytes for piece in schedule)
    prefetcher = Prefetcher(
        schedule,
        queue,
        slots=slots,
        slot_bytes=slot_bytes,
        window_layers=window_layers,
        ahead=ahead,
    )
    queue.serve(prefetcher.take)
    yield prefetcher
    queue.close()


def use(prefetcher: Prefetcher, schedule: list[Piece], place: int) -> None:
    """Wait for the piece at `place`, check its bytes, free its slot."""
    piece = schedule[place]
    with prefetcher.next(place) as (buffer, position):
        assert (
            bytes(buffer.memory(position, piece.nbytes))
            == CONTENT[piece.offset_bytes :][: piece.nbytes]
        )


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=12),
    pieces_per_layer=st.integers(1, 4),
    slots=st.integers(2, 6),
    io_threads=st.integers(0, 4),
    window_layers=st.sampled_from([None, 1, 2, 3]),
    ahead=st.booleans(),
    stops=st.lists(st.integers(0, 12), max_size=4),
)
def test_any_schedule_is_delivered_in_order_through_passes_cut_short(
    sizes: list[int],
    pieces_per_layer: int,
    slots: int,
    io_threads: int,
    window_layers: int | None,
    ahead: bool,
    stops: list[int],
) -> None:
    schedule = schedule_of(sizes, pieces_per_layer)
    with prefetcher_of(
        schedule,
        MemoryReader(),
        slots=slots,
        io_threads=io_threads,
        window_layers=window_layers,
        ahead=ahead,
    ) as prefetcher:
        for stop in (*stops, len(schedule), len(schedule)):  # some passes end early, two go through
            for place in range(len(schedule))[:stop]:
                use(prefetcher, schedule, place)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=30),
    st.integers(1, 3),
    st.sampled_from([None, 1, 2]),
)
def test_any_order_of_use_is_served(
    places: list[int], io_threads: int, window_layers: int | None
) -> None:
    schedule = schedule_of([500, 4096, 1, 9000, 70, 70, 4097, 8192])
    with prefetcher_of(
        schedule, MemoryReader(), io_threads=io_threads, window_layers=window_layers
    ) as prefetcher:
        for place in places:
            use(prefetcher, schedule, place)


@settings(max_examples=40)
@given(st.sets(st.integers(0, 7), min_size=1), st.integers(0, 3), st.integers(2, 5))
def test_a_failed_read_is_raised_in_the_caller_and_the_next_call_works(
    failing: set[int], io_threads: int, slots: int
) -> None:
    schedule, reader = schedule_of([500, 4096, 1, 9000, 70, 70, 4097, 8192]), MemoryReader()
    with prefetcher_of(schedule, reader, io_threads=io_threads, slots=slots) as prefetcher:
        for _ in range(2):
            reader.fail_at = {schedule[place].offset_bytes for place in failing}
            with pytest.raises(ReadError, match=r"weights: reading .* injected"):
                # The first may have been read before the fault.
                use_all(prefetcher, schedule, passes=2)
            reader.fail_at = set()
            for place in 2 * list(range(len(schedule))):
                use_after_stale_error(prefetcher, schedule, place)


def use_all(prefetcher: Prefetcher, schedule: list[Piece], passes: int) -> None:
    for place in passes * list(range(len(schedule))):
        use(prefetcher, schedule, place)


def use_after_stale_error(prefetcher: Prefetcher, schedule: list[Piece], place: int) -> None:
    """A reader that was ahead may have met the fault as well: its error is told once, then the
    piece comes.
    """
    try:
        use(prefetcher, schedule, place)
    except ReadError:
        use(prefetcher, schedule, place)


def test_errors_of_any_kind_reach_the_caller() -> None:
    class Broken(MemoryReader):
        def read_now(self, file: Path, offset_bytes: int, nbytes: int, into: memoryview) -> int:
            raise ZeroDivisionError("broken reader")

    schedule = schedule_of([100] * 4)
    for io_threads in (0, 2):
        with prefetcher_of(schedule, Broken(), io_threads=io_threads) as prefetcher:
            for _ in range(3):
                with pytest.raises(ZeroDivisionError, match="broken reader"), prefetcher.next(0):
                    pass


def wait_until_quiet(reader: MemoryReader) -> None:
    """Until the readers have asked for nothing new for a while."""
    before = -1
    while before != len(reader.asked):
        before = len(reader.asked)
        threading.Event().wait(0.1)


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_readers_run_ahead_by_the_slots_and_no_further(slots: int) -> None:
    schedule, reader = schedule_of([100] * 20, pieces_per_layer=20), MemoryReader()
    with prefetcher_of(schedule, reader, slots=slots, io_threads=4) as prefetcher:
        wait_until_quiet(reader)
        assert sorted(reader.asked) == [piece.offset_bytes for piece in schedule[:slots]]
        with prefetcher.next(0):
            wait_until_quiet(reader)
            assert len(reader.asked) == slots, "a slot in use is not free"
        wait_until_quiet(reader)
        assert sorted(reader.asked) == [piece.offset_bytes for piece in schedule[: slots + 1]]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_readers_stay_within_the_window_of_layers(layers: int) -> None:
    schedule, reader = schedule_of([100] * 12, pieces_per_layer=3), MemoryReader()
    with prefetcher_of(schedule, reader, slots=20, window_layers=layers) as prefetcher:
        wait_until_quiet(reader)
        assert len(reader.asked) == 3 * layers
        for place in range(3):
            use(prefetcher, schedule, place)
        wait_until_quiet(reader)
        assert len(reader.asked) == 3 * (layers + 1)
        for place in range(3, 12):
            use(prefetcher, schedule, place)
        wait_until_quiet(reader)  # past the end they go on with the next pass
        assert len(reader.asked) == 3 * (4 + layers)


def test_synchronous_reads_happen_when_they_are_needed() -> None:
    schedule, reader = schedule_of([100] * 5), MemoryReader()
    threads = threading.active_count()
    with prefetcher_of(schedule, reader, io_threads=0) as prefetcher:
        assert threading.active_count() == threads
        assert reader.asked == []
        use(prefetcher, schedule, 0)
        use(prefetcher, schedule, 1)
        assert reader.asked == [piece.offset_bytes for piece in schedule[:2]]


@pytest.mark.parametrize("io_threads", [1, 2, 3])
def test_readers_that_do_not_read_ahead_begin_nothing_while_it_computes(io_threads: int) -> None:
    schedule, reader = schedule_of([100] * 9), MemoryReader()
    with prefetcher_of(schedule, reader, slots=9, io_threads=io_threads, ahead=False) as prefetcher:
        wait_until_quiet(reader)
        assert reader.asked == []
        for place in range(4):
            with prefetcher.next(place):
                wait_until_quiet(reader)
                asked = len(reader.asked)
                assert asked > place, "what other readers had begun is finished, and kept"
                if io_threads == 1:
                    assert asked == place + 1
            wait_until_quiet(reader)
            assert len(reader.asked) == asked


def test_resyncs_are_counted_and_whole_passes_have_none() -> None:
    schedule, trace = schedule_of([100] * 6), Trace()
    with prefetcher_of(schedule, MemoryReader(), trace=trace) as prefetcher:
        use_all(prefetcher, schedule, passes=3)
        assert trace.resyncs == 0
        use(prefetcher, schedule, 0)
        use(prefetcher, schedule, 0)
        assert trace.resyncs == 1


def test_closing_wakes_a_caller_that_waits() -> None:
    schedule, reader = schedule_of([100] * 4), MemoryReader()
    reader.gate.clear()
    queue = ReadQueue(reader, Trace(), io_threads=2)
    slot_bytes = max(piece.memory_bytes for piece in schedule)
    prefetcher = Prefetcher(schedule, queue, slots=3, slot_bytes=slot_bytes, window_layers=None)
    queue.serve(prefetcher.take)
    raised: list[BaseException] = []

    def wait_for_a_piece() -> None:
        try:
            with prefetcher.next(0):
                pass
        except BaseException as error:
            raised.append(error)

    caller = threading.Thread(target=wait_for_a_piece)
    caller.start()
    wait_until_quiet(reader)
    closing = threading.Thread(target=queue.close)
    closing.start()
    caller.join()
    assert "closed" in str(raised[0])
    reader.gate.set()  # a read that is under way is let finish
    closing.join()
    queue.close()
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("flexinfer-io")
    ]


def test_what_was_read_ahead_of_a_skipped_piece_is_not_read_again() -> None:
    """A piece out of order costs what was skipped, no more."""
    schedule, reader, trace = schedule_of([100] * 10, pieces_per_layer=10), MemoryReader(), Trace()
    with prefetcher_of(schedule, reader, slots=6, trace=trace) as prefetcher:
        wait_until_quiet(reader)
        for place in (0, 3, 4, 5, 6, 7, 8, 9, 0, 1):
            use(prefetcher, schedule, place)
        wait_until_quiet(reader)
        assert trace.resyncs == 1
        assert trace.wasted_bytes == sum(piece.memory_bytes for piece in schedule[1:3])
        assert len(reader.asked) == 12 + 6  # two of them in vain, and those that lie ready


class Wish:
    """A source of one read at a time, for the test of priorities."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.wanted, self.done = list(pieces), list[int | BaseException]()

    def take(self) -> Read | None:
        if not self.wanted:
            return None
        piece = self.wanted.pop(0)
        return Read(self, 0, piece, 0, memoryview(bytearray(piece.memory_bytes)))

    def finish(self, read: Read, outcome: int | BaseException) -> None:
        self.done.append(outcome)

    def on_timeout(self, read: Read) -> None:
        raise AssertionError

    def on_late_read(self, read: Read) -> None:
        raise AssertionError


def test_sources_are_served_in_their_order() -> None:
    """What is needed now goes before what was asked for earlier and is needed later."""
    pieces, reader = schedule_of([100] * 9), MemoryReader()
    now, later = Wish([]), Wish(pieces[:6])
    reader.gate.clear()
    queue = ReadQueue(reader, Trace(), io_threads=1)
    queue.serve(now.take)
    queue.serve(later.take)
    wait_until_quiet(reader)  # the first of `later` is under way
    with queue.changed:
        now.wanted = pieces[6:]
    reader.gate.set()
    wait_until_quiet(reader)
    queue.close()
    expected = [pieces[i] for i in (0, 6, 7, 8, 1, 2, 3, 4, 5)]
    assert reader.asked == [piece.offset_bytes for piece in expected]
    assert len(now.done) == 3


# ---- FileReader: real files


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(CONTENT)
    return tmp_path / "weights"


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 8200, len(CONTENT) - 5000])
@pytest.mark.parametrize("nbytes", [1, 4096, 5000])
def test_reads_any_range_with_its_page(file: Path, direct: bool, offset: int, nbytes: int) -> None:
    reader = FileReader([file], direct=direct)
    into = memoryview(
        flexinfer.streaming.prefetch.Buffer(padded_bytes(offset, nbytes), lock=False).memory(
            0, padded_bytes(offset, nbytes)
        )
    )
    position = reader.read(file, offset, nbytes, into)
    assert position == offset % PAGE_BYTES
    assert bytes(into[position : position + nbytes]) == CONTENT[offset : offset + nbytes]
    reader.close()
    reader.close()


def test_a_file_cut_short_is_a_read_error_that_names_it(file: Path, direct: bool) -> None:
    reader = FileReader([file], direct=direct)
    into = flexinfer.streaming.prefetch.Buffer(20_000, lock=False).memory(0, 20_480)
    for size in (100_000 + 9_000, 100_000 + 8_192 - 100_000 % 4096, 100_000, 0):
        os.truncate(file, size)
        with pytest.raises(
            ReadError, match=r"weights: ends before byte 110000: truncated while in use\?"
        ):
            reader.read(file, 100_000, 10_000, into)
    reader.close()


def test_what_the_system_says_is_in_the_error(file: Path) -> None:
    reader = FileReader([file], direct=False)
    os.close(reader._fds[file])
    with pytest.raises(
        ReadError, match="weights: reading 10 bytes at 5: Bad file descriptor"
    ) as error:
        reader.read(
            file, 5, 10, flexinfer.streaming.prefetch.Buffer(10, lock=False).memory(0, 4096)
        )
    assert error.value.errno == errno.EBADF
    reader._fds.clear()


def test_where_direct_reads_are_refused_it_says_so_once_and_reads_on(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def refuse(path: Path, flags: int, *args: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *args)

    monkeypatch.setattr(flexinfer.streaming.reader.os, "open", refuse)
    files = len(os.listdir("/proc/self/fd"))
    with pytest.warns(
        RuntimeWarning, match=r"direct I/O does not work here \(.*weights: Invalid arg"
    ) as said:
        reader = FileReader([file], direct=True)
    assert len(said) == 1
    assert not reader.direct
    into = flexinfer.streaming.prefetch.Buffer(4096, lock=False).memory(0, 4096)
    assert bytes(into[reader.read(file, 7, 90, into) :][:90]) == CONTENT[7:97]
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == files


def test_where_direct_reads_disagree_they_are_not_trusted(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_preadv = os.preadv

    def lie(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = real_preadv(fd, buffers, offset)
        buffers[0][5] ^= 1
        return count

    monkeypatch.setattr(flexinfer.streaming.reader.os, "preadv", lie)
    with pytest.warns(RuntimeWarning, match="direct and buffered reads disagree"):
        reader = FileReader([file], direct=True)
    assert not reader.direct
    reader.close()


def test_on_tmpfs_it_works(tmp_path: Path) -> None:
    """Some kernels refuse direct reads there, newer ones allow them: the bytes are right either
    way.
    """
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    file = Path("/dev/shm") / f"flexinfer-test-{os.getpid()}"
    file.write_bytes(CONTENT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            reader = FileReader([file], direct=True)
        into = flexinfer.streaming.prefetch.Buffer(4096, lock=False).memory(0, 4096)
        assert bytes(into[reader.read(file, 7, 90, into) :][:90]) == CONTENT[7:97]
        reader.close()
    finally:
        file.unlink()


def test_a_file_that_is_not_there_leaves_no_other_open(file: Path, direct: bool) -> None:
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        FileReader([file, file.with_name("nowhere")], direct=direct)
    assert len(os.listdir("/proc/self/fd")) == files


def test_buffered_reads_leave_no_pages_in_the_cache(file: Path) -> None:
    """Else the budget would be spent behind our back."""
    reader = FileReader([file], direct=False)
    buffer = flexinfer.streaming.prefetch.Buffer(len(CONTENT), lock=False)
    into = buffer.memory(0, buffer.nbytes)

    def is_cached() -> bool:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapping,
        ):
            start = ctypes.c_char.from_buffer(mapping)
            pages = (ctypes.c_ubyte * -(-len(CONTENT) // mmap.PAGESIZE))()
            failed = ctypes.CDLL(None).mincore(
                ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(CONTENT)), pages
            )
            del start
            assert not failed
            return any(page & 1 for page in pages)

    assert is_cached()  # it was just written
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reader.read(file, 0, len(CONTENT), into)
    assert not is_cached()
    reader.close()

"""The cache of experts delivers the right bytes whatever is wanted, in any number of slots, and
survives errors and resizing.
"""

import faulthandler
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prefetch import CONTENT, FILE, MemoryReader, wait_until_quiet

from flexinfer.observe.trace import Trace
from flexinfer.plan.weights import Piece
from flexinfer.streaming.expert_cache import TRY_AGAIN, ExpertCache
from flexinfer.streaming.expert_policies import POLICIES
from flexinfer.streaming.queue import ReadQueue
from flexinfer.streaming.reader import FileReader, ReadError, padded_bytes

PIECES, EXPERTS = 3, 12
wants = st.lists(
    st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=5, unique=True),
    min_size=1,
    max_size=25,
)


@pytest.fixture(autouse=True)
def _no_deadlock() -> Iterator[None]:
    """A test that hangs ends the run with the stacks of all threads."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def experts_of_file() -> list[list[Piece]]:
    """EXPERTS of PIECES each, of uneven sizes, one after another."""
    experts, offset = [], 5
    for expert in range(EXPERTS):
        pieces = []
        for i in range(PIECES):
            size = 700 + 913 * ((expert + i) % 4)
            pieces.append(
                Piece(
                    f"e{expert}.{i}", 0, 0, 1, FILE, offset, size, padded_bytes(offset, size), size
                )
            )
            offset += size
        experts.append(pieces)
    return experts


class Reading:
    """A cache whose readers read `reader`."""

    def __init__(
        self, reader: FileReader, slots: int, io_threads: int = 2, policy: str = "recency"
    ) -> None:
        self.experts, self.trace, self.reader = experts_of_file(), Trace(), reader
        slot_bytes = max(piece.memory_bytes for pieces in self.experts for piece in pieces)
        self.cache = ExpertCache(self.experts, slot_bytes, policy, self.trace, token_experts=8)
        self.io_threads = io_threads
        self.cache.resize(slots)
        self.attach()

    def attach(self) -> None:
        self.queue = ReadQueue(self.reader, self.trace, io_threads=self.io_threads)
        self.queue.serve(self.cache.take)
        self.queue.serve(self.cache.take_hinted)
        self.cache.attach(self.queue)

    def detach(self) -> None:
        self.queue.close()
        self.cache.detach()

    def use(self, experts: list[int], those_here_first: bool = False) -> list[int]:
        """Want `experts`, and check the bytes of each."""
        order = self.cache.want(experts, those_here_first=those_here_first)
        for expert in order:
            for i, piece in enumerate(self.experts[expert]):
                buffer, position = self.cache.acquire(expert, i)
                expected = CONTENT[piece.offset_bytes :][: piece.nbytes]
                assert bytes(buffer.memory(position, piece.nbytes)) == expected
                self.cache.release(expert, i)
        return order


@contextmanager
def reading(
    slots: int, io_threads: int = 2, policy: str = "recency", reader: FileReader | None = None
) -> Iterator[Reading]:
    one = Reading(reader or MemoryReader(), slots, io_threads, policy)
    yield one
    one.detach()


@settings(max_examples=80)
@given(
    wants=wants,
    guesses=wants,
    slots=st.integers(2, PIECES * EXPERTS),
    io_threads=st.integers(0, 3),
    policy=st.sampled_from(sorted(POLICIES)),
    first=st.booleans(),
)
def test_whatever_is_wanted_is_delivered(
    wants: list[list[int]],
    guesses: list[list[int]],
    slots: int,
    io_threads: int,
    policy: str,
    first: bool,
) -> None:
    with reading(slots, io_threads, policy) as one:
        for wanted, guessed in zip(wants, guesses, strict=False):
            one.cache.hint(guessed)
            one.cache.score_hints(wanted)
            assert sorted(one.use(wanted, first)) == sorted(wanted)


@settings(max_examples=40)
@given(
    wants=wants,
    sizes=st.lists(st.integers(2, PIECES * EXPERTS), min_size=1, max_size=5),
    policy=st.sampled_from(sorted(POLICIES)),
)
def test_any_resizing_in_between(wants: list[list[int]], sizes: list[int], policy: str) -> None:
    with reading(5, policy=policy) as one:
        for size in sizes:
            for wanted in wants:
                one.use(wanted)
            one.detach()
            one.cache.resize(size)
            assert one.cache.slots == size
            one.attach()
        one.use(list(range(EXPERTS)))


@settings(max_examples=40)
@given(
    failing=st.sets(st.integers(0, PIECES * EXPERTS - 1), min_size=1),
    io_threads=st.integers(0, 3),
    slots=st.integers(2, 20),
)
def test_a_failed_read_is_raised_in_the_caller_and_the_next_call_works(
    failing: set[int], io_threads: int, slots: int
) -> None:
    reader = MemoryReader()
    with reading(slots, io_threads, reader=reader) as one:
        pieces = [piece for pieces in one.experts for piece in pieces]
        reader.fail_at = {pieces[i].offset_bytes for i in failing}
        with pytest.raises(ReadError, match=r"weights: reading .* injected"):
            one.use(list(range(EXPERTS)))
        reader.fail_at = set()
        for _ in range(2):
            one.use(list(range(EXPERTS)))


@pytest.mark.parametrize("io_threads", [0, 2])
def test_what_fits_is_read_once(io_threads: int) -> None:
    with reading(PIECES * EXPERTS, io_threads) as one:
        for _ in range(3):
            one.use(list(range(EXPERTS)))
        assert one.trace.reads == PIECES * EXPERTS
        assert (one.trace.expert_hits, one.trace.expert_misses) == (2 * EXPERTS, EXPERTS)


@pytest.mark.parametrize("slots", [2, 3, 7])
def test_each_expert_is_read_once_in_a_layer(slots: int) -> None:
    """A prompt wants all of them, and the cache holds few."""
    with reading(slots) as one:
        one.use(list(range(EXPERTS)))
        assert one.trace.reads == PIECES * EXPERTS


def test_recency_keeps_what_was_used_last() -> None:
    with reading(PIECES * 3) as one:
        for wanted in ([0], [1], [2], [0], [3]):  # 1 goes
            one.use(wanted)
        before = one.trace.expert_hits
        one.use([0])
        one.use([2])
        one.use([3])
        assert one.trace.expert_hits == before + 3
        one.use([1])
        assert one.trace.expert_hits == before + 3


def test_those_here_come_first() -> None:
    with reading(PIECES * 4) as one:
        one.use([5, 7])
        assert one.use([4, 5, 6, 7], those_here_first=True) == [5, 7, 4, 6]
        assert one.use([3, 7], those_here_first=False) == [3, 7]


def test_what_was_foretold_is_read_before_it_is_wanted() -> None:
    reader = MemoryReader()
    with reading(PIECES * 6, reader=reader) as one:
        one.use([0])
        one.cache.hint([4, 5])
        wait_until_quiet(reader)
        one.cache.score_hints([5, 6])
        one.use([5, 6])
        assert one.trace.experts_foretold == 2
        assert one.trace.experts_foretold_right == 1
        assert (one.trace.expert_hits, one.trace.expert_misses) == (1, 2)
        assert one.trace.wasted_bytes == 0  # 4 may yet be wanted
        one.use([7, 8, 9, 10, 11])
        one.use([0, 1, 2, 3])
        assert one.trace.wasted_bytes == sum(piece.memory_bytes for piece in one.experts[4])


def test_looking_ahead_stops_while_it_does_not_pay() -> None:
    """Foretold experts are gone before they are wanted: few more are read.

    When the guesses come true it goes on.
    """
    reader = MemoryReader()
    with reading(3 * PIECES, reader=reader) as one:

        def layer(step: int, wanted: list[int], guessed: list[int]) -> bool:
            ahead = one.cache.uses_hints()
            if ahead:
                one.cache.hint(guessed)
                # Until it has been read.
                while one.cache.slots and any(not one.cache.holds(expert) for expert in guessed):
                    threading.Event().wait(0.001)
            one.cache.score_hints(wanted)
            one.use(wanted)
            return ahead

        looked = [layer(step, [step % 2, 2 + step % 2], [4 + step % 8]) for step in range(600)]
        wasted_bytes = one.trace.wasted_bytes
        assert sum(looked[:100]) > 10
        assert sum(looked[300:]) <= 300 // TRY_AGAIN + 1
        assert (
            0
            < wasted_bytes
            <= sum(looked) * max(sum(p.memory_bytes for p in e) for e in one.experts)
        )
        wants = [[4 + step % 8] for step in range(3000)]
        looked = [layer(step, wants[step], wants[step]) for step in range(3000)]
        assert all(looked[-100:]), "it pays again"


def test_what_is_needed_goes_before_what_was_foretold() -> None:
    reader = MemoryReader()
    reader.gate.clear()
    with reading(PIECES * 6, io_threads=1, reader=reader) as one:
        one.cache.hint([4, 5])
        wait_until_quiet(reader)  # the first piece of 4 is under way
        one.cache.want([0], those_here_first=False)
        reader.gate.set()
        wait_until_quiet(reader)
        offsets = [piece.offset_bytes for expert in (4, 0) for piece in one.experts[expert]]
        assert reader.asked == [offsets[0], *offsets[PIECES:]], (
            "the layer has come: what was foretold is forgotten"
        )


def test_closing_wakes_a_caller_that_waits() -> None:
    reader = MemoryReader()
    reader.gate.clear()
    one = Reading(reader, slots=6)
    raised: list[BaseException] = []

    def wait_for_an_expert() -> None:
        try:
            one.use([3])
        except BaseException as error:
            raised.append(error)

    caller = threading.Thread(target=wait_for_an_expert)
    caller.start()
    wait_until_quiet(reader)
    closing = threading.Thread(target=one.queue.close)
    closing.start()
    caller.join()
    assert "closed" in str(raised[0])
    reader.gate.set()
    closing.join()


def test_a_read_that_takes_too_long_is_given_up_and_its_expert_comes_later() -> None:
    class Stuck(MemoryReader):
        timeout_s = 0.2  # type: ignore[assignment]
        once = True

        def read_now(self, file: Path, offset_bytes: int, nbytes: int, into: memoryview) -> int:
            if self.once:
                self.once = False
                self.gate.clear()
                self.gate.wait()
            return super().read_now(file, offset_bytes, nbytes, into)

    reader = Stuck()
    with reading(6, io_threads=1, reader=reader) as one:
        with pytest.raises(ReadError, match=r"read_timeout_s=0\.2"):
            one.use([3])
        reader.gate.set()
        one.use([3])
        one.use(list(range(EXPERTS)))

"""Faults of reading, met at the reader: the run goes on where it can, else there is one clear
error; never a hang or a wrong token.
"""

import errno
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import flexinfer.streaming.prefetch
import flexinfer.streaming.reader
from flexinfer.streaming.reader import FileReader, ReadError
from tests.conftest import Load, MakeCheckpoint, logits, prompt, resize_to_share, stock


def with_faults(
    model: PreTrainedModel, before: Callable[[int], None], *, in_thread: str = ""
) -> None:
    """Call `before` with its number in front of every read, of threads of this name; it may raise
    or wait.
    """
    reader = model.flexinfer.store.reader
    read_now, numbers = reader.read_now, itertools.count(1)

    def read(file: Path, offset_bytes: int, nbytes: int, into: memoryview) -> int:
        if in_thread in threading.current_thread().name:
            before(next(numbers))
        return read_now(file, offset_bytes, nbytes, into)

    reader.read_now = read


@pytest.mark.parametrize("io_threads", [0, 1, 2])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_an_error_that_stays_is_raised_with_its_place_and_one_that_passes_is_forgotten(
    checkpoint: MakeCheckpoint, load: Load, io_threads: int, code: int
) -> None:
    broken = threading.Event()

    def fail(_: int) -> None:
        if broken.is_set():
            raise ReadError(code, f"file: reading at 4096: {os.strerror(code)}")

    model = load(checkpoint(), policy="none", io_threads=io_threads)
    expected = logits(stock(checkpoint()), prompt())
    with_faults(model, fail)
    assert torch.equal(logits(model, prompt()), expected)
    for _ in range(2):
        broken.set()
        with pytest.raises(ReadError, match="at 4096"):
            logits(model, prompt())
        broken.clear()
        assert torch.equal(logits(model, prompt()), expected)


def test_a_fault_while_reading_ahead_that_has_passed_when_the_piece_is_needed_is_not_noticed(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint(), policy="none")
    expected = logits(stock(checkpoint()), prompt())
    once = iter([True])

    def fail(number: int) -> None:
        if number > 10 and next(once, False):
            raise ReadError(errno.EIO, "passing")

    with_faults(model, fail)
    for _ in range(3):
        assert torch.equal(logits(model, prompt()), expected)


def test_a_slow_read_is_waited_for(
    checkpoint: MakeCheckpoint,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(flexinfer.streaming.queue, "LOG_AFTER_S", 0.05)
    model = load(checkpoint(), policy="none")
    with_faults(
        model, lambda number: time.sleep(0.5 if number == 3 else 0), in_thread="flexinfer-io"
    )
    with caplog.at_level(logging.WARNING, "flexinfer"):
        assert torch.equal(logits(model, prompt()), logits(stock(checkpoint()), prompt()))
    assert "still waiting for" in caplog.text


@pytest.mark.parametrize(
    "in_thread", ["flexinfer-io-0", "flexinfer-io-timed"], ids=["of the window", "of the embedding"]
)
def test_a_read_that_never_returns_is_given_up_and_the_model_works_on(
    checkpoint: MakeCheckpoint, load: Load, in_thread: str
) -> None:
    stuck, come_back = threading.Event(), threading.Event()
    before = threading.active_count()

    def hang(number: int) -> None:
        if number == 2:
            stuck.set()
            come_back.wait()

    model = load(checkpoint(), policy="none", read_timeout_s=2.0, window=5 * 16_384)
    expected = logits(stock(checkpoint()), prompt())
    with_faults(model, hang, in_thread=in_thread)
    with pytest.raises(
        ReadError, match=r"safetensors: reading \d+ bytes at \d+ took more than read_timeout_s=2"
    ):
        logits(model, prompt())
    assert stuck.is_set()
    for _ in range(2):
        assert torch.equal(logits(model, prompt()), expected), "with the read still stuck"
    come_back.set()
    assert torch.equal(logits(model, prompt()), expected)
    model.flexinfer.close()
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before, "the stuck thread ends when its read comes back"


def test_closing_with_a_read_that_never_returns_does_not_hang(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    come_back = threading.Event()
    model = load(checkpoint(), policy="none", read_timeout_s=2.0)
    with_faults(model, lambda number: come_back.wait() if number == 6 else None)
    with pytest.raises(ReadError, match="read_timeout_s"):
        logits(model, prompt())
    model.flexinfer.close()
    come_back.set()


def test_a_timeout_needs_a_reader_thread(checkpoint: MakeCheckpoint, load: Load) -> None:
    for bad in ({"read_timeout_s": 1.0, "io_threads": 0}, {"read_timeout_s": 0.0}):
        with pytest.raises(ValueError, match="read_timeout_s"):
            load(checkpoint(), **bad)


class FakeOs:
    """The os module with another preadv."""

    def __init__(self, preadv: Callable[..., int]) -> None:
        self.preadv = preadv

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)


@pytest.mark.parametrize("direct", [True, False])
def test_short_reads_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    file = tmp_path / "file"
    content = os.urandom(300_000)
    file.write_bytes(content)
    reader = FileReader([file], direct=direct)
    lengths = iter([5000, 4096, 1, 12_000, 100, 8192, 4097] * 20)

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        assert offset % 4096 == 0, "direct reads want whole pages"
        return os.preadv(
            fd, [buffers[0][: next(lengths)]] if not direct else [buffers[0][:4096]], offset
        )

    monkeypatch.setattr(flexinfer.streaming.reader, "os", FakeOs(short))
    into = memoryview(torch.empty(1 << 20, dtype=torch.uint8).numpy()).cast("B")
    aligned = -into.obj.ctypes.data % 4096  # type: ignore[attr-defined]
    position = reader.read(file, 1234, 200_000, into[aligned:])
    assert bytes(into[aligned + position : aligned + position + 200_000]) == content[1234:201_234]
    reader.close()


@pytest.mark.parametrize("times", [3, 100])
def test_a_read_that_is_told_to_come_again_does_so_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10_000)
    reader, left = FileReader([file], direct=False), [times]

    def again(fd: int, buffers: list[memoryview], offset: int) -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise BlockingIOError(errno.EAGAIN, "come again")
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(flexinfer.streaming.reader, "os", FakeOs(again))
    into = memoryview(bytearray(20_480))
    if times > 10:
        with pytest.raises(ReadError, match=r"file: reading 9000 bytes at 10: come again"):
            reader.read(file, 10, 9000, into)
        assert left[0] == times - flexinfer.streaming.reader.TRIES
    else:
        assert reader.read(file, 10, 9000, into) == 10
    reader.close()


def test_signals_during_reads_do_not_disturb_them(checkpoint: MakeCheckpoint, load: Load) -> None:
    """EINTR: Python goes on with the call."""
    model = load(checkpoint(), policy="none", io_threads=0)
    expected, rung = logits(stock(checkpoint()), prompt()), []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        outputs = [logits(model, prompt()) for _ in range(3)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung
    assert all(torch.equal(output, expected) for output in outputs)


def test_a_file_that_is_replaced_goes_on_being_read_as_it_was(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path
) -> None:
    for file in checkpoint().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = load(tmp_path, policy="none")
    expected = logits(model, prompt())
    (tmp_path / "new").write_bytes(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    (tmp_path / "new").rename(tmp_path / "model.safetensors")
    assert torch.equal(logits(model, prompt()), expected)


def test_a_forked_process_is_told_to_load_the_model_itself(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint(), policy="none")
    expected = logits(model, prompt())
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            model(prompt())
            os.write(send, b"ran")
        except RuntimeError as error:
            os.write(send, str(error).encode())
        finally:
            os._exit(0)
    os.close(send)
    assert b"loaded in another process" in os.read(receive, 1000)
    os.close(receive)
    os.waitpid(child, 0)
    assert torch.equal(logits(model, prompt()), expected)


def test_two_models_in_one_process(checkpoint: MakeCheckpoint, load: Load) -> None:
    paths = checkpoint("llama"), checkpoint("qwen2")
    models = [load(path, policy="none") for path in paths]
    expected = [logits(stock(path), prompt()) for path in paths]
    for _ in range(2):
        for model, wanted in zip(models, expected, strict=True):
            assert torch.equal(logits(model, prompt()), wanted)
    models[0].flexinfer.close()
    assert torch.equal(logits(models[1], prompt()), expected[1])


def test_closing_while_another_thread_generates(checkpoint: MakeCheckpoint, load: Load) -> None:
    before = threading.active_count()
    model = load(checkpoint(), policy="none")
    started, errors = threading.Event(), []

    class Telling:
        def put(self, value: torch.Tensor) -> None:
            started.set()

        def end(self) -> None: ...

    def generate() -> None:
        try:
            model.generate(
                prompt(), max_new_tokens=50, eos_token_id=None, pad_token_id=0, streamer=Telling()
            )
        except Exception as error:
            errors.append(str(error))

    thread = threading.Thread(target=generate)
    thread.start()
    assert started.wait(60)
    model.flexinfer.close()
    thread.join(60)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert "closed" in errors[0]
    assert threading.active_count() == before


def test_a_resize_whose_reads_fail_leaves_a_model_that_works(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint())
    expected = logits(model, prompt())
    resize_to_share(model, 0.1)
    broken = threading.Event()

    def fail(_: int) -> None:
        if broken.is_set():
            raise ReadError(errno.EIO, "a disk that has a moment")

    with_faults(model, fail)
    broken.set()
    resize_to_share(model, 0.9)
    with pytest.raises(ReadError, match="has a moment"):
        logits(model, prompt())
    broken.clear()
    assert torch.equal(logits(model, prompt()), expected)
    resize_to_share(model, 0.9)
    assert torch.equal(logits(model, prompt()), expected)

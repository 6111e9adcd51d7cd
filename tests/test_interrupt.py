"""Ctrl-C and SIGTERM, sent to real processes: the token in hand is finished, everything is closed,
the exit code says why.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import CONFIG, add_tokenizer

from flexinfer.cli.interrupt import Interrupt, Terminated, held_back, terminable
from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.formats.tensors import CheckpointError

TIMEOUT_S = 300  # a busy machine is no failure
MANY = "3900"  # tokens: far more than come before the signal
SAMPLING = (
    "--temperature",
    "3",
    "--seed",
    "1",
    "--max-new-tokens",
    MANY,
    "--memory",
    "2GiB",
    "--policy",
    "none",
)


@pytest.fixture(scope="module")
def model_dir(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a tokenizer of bytes that never ends by itself."""
    return add_tokenizer(
        checkpoint("llama", **CONFIG), tmp_path_factory.mktemp("interrupt") / "model"
    )


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """start(*argv) -> `flexinfer ARGV` with pipes, unbuffered; killed after the test if it still
    runs.
    """
    running: list[subprocess.Popen[bytes]] = []

    def begin(*argv: str, run: tuple[str, ...] = ("-m", "flexinfer")) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, *run, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def ended(process: "subprocess.Popen[bytes]") -> tuple[int, list[str]]:
    """Exit code and the lines of stderr."""
    _, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, err.decode().splitlines()


def first_text(process: "subprocess.Popen[bytes]") -> None:
    """Wait for the first text."""
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_generate_ends_after_the_token_in_hand(
    number: int, code: int, model_dir: Path, tmp_path: Path, start: Any
) -> None:
    trace = tmp_path / "run.json"
    process = start("generate", str(model_dir), "abc", *SAMPLING, "--trace", str(trace))
    first_text(process)
    process.send_signal(number)
    got, lines = ended(process)
    assert got == code, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("stopped; ")
    assert int(lines[0].split()[1]) < int(MANY)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]  # so the engine was closed
    assert json.loads(trace.read_text())["traceEvents"]


SLOW_READS = """
import os, sys, time
from flexinfer.cli.main import main
from flexinfer.streaming.reader import FileReader

class Slow(FileReader):
    def read_now(self, *wanted):
        time.sleep(1 if os.path.exists(sys.argv[1]) else 0)
        return super().read_now(*wanted)

import flexinfer.engine.load
flexinfer.engine.load.FileReader = Slow
sys.exit(main(sys.argv[2:]))
"""


def test_the_second_ctrl_c_ends_generate_at_once(
    model_dir: Path, tmp_path: Path, start: Any
) -> None:
    """Both come within one pass: after the first text each of its 29 reads takes a second."""
    slow = tmp_path / "slow"
    argv = ("generate", str(model_dir), "abc", *SAMPLING, "--io-threads", "0")
    process = start(str(slow), *argv, run=("-c", SLOW_READS))
    first_text(process)
    slow.touch()
    process.send_signal(signal.SIGINT)
    time.sleep(2)  # two signals at once would be one
    process.send_signal(signal.SIGINT)
    got, lines = ended(process)
    assert (got, lines[-1]) == (130, "stopped")
    assert not any("tokens" in line for line in lines)


def wait_until_caught(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Wait until the process has a handler of its own for a signal."""
    while True:
        assert process.poll() is None
        status = Path(f"/proc/{process.pid}/status").read_text()
        if int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_there_is_no_text_yet(number: int, model_dir: Path, start: Any) -> None:
    # Waits for the prompt, on stdin.
    process = start("generate", str(model_dir), "--memory", "2GiB")
    wait_until_caught(process, signal.SIGTERM)
    process.send_signal(number)
    assert ended(process) == (128 + number, ["stopped"])


def test_sigterm_ends_a_chat_in_the_middle_of_an_answer(model_dir: Path, start: Any) -> None:
    process = start("chat", str(model_dir), *SAMPLING, "--context", "4000")
    process.stdin.write(b"hello\n")
    first_text(process)
    process.send_signal(signal.SIGTERM)
    got, lines = ended(process)
    assert got == 143, lines
    assert lines[0].startswith("stopped; ")
    assert lines[1:] == ["stopped"]


def test_ctrl_c_ends_the_answer_and_sigterm_the_waiting_chat(model_dir: Path, start: Any) -> None:
    process = start("chat", str(model_dir), *SAMPLING, "--context", "4000")
    process.stdin.write(b"hello\n")
    first_text(process)
    process.send_signal(signal.SIGINT)
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(process.stderr.fileno(), 1)
    assert line.startswith(b"stopped; ")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    got, lines = ended(process)
    assert (got, lines[-1]) == (143, "stopped")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_quantize_leaves_nothing_that_loads_and_goes_on(
    number: int, checkpoint: Any, tmp_path: Path, start: Any
) -> None:
    source = checkpoint(
        "llama", torch.bfloat16, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3
    )
    target, partial = tmp_path / "copy", tmp_path / "copy.partial"
    process = start("quantize", str(source), str(target), "--type", "q4_k")
    deadline_s = time.monotonic() + TIMEOUT_S
    while not list(partial.glob("*.unfinished")):
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    process.send_signal(number)
    got, lines = ended(process)
    assert (got, lines) == (
        128 + number,
        ["stopped; the same command goes on after the last finished tensor"],
    )
    assert not target.exists()
    with pytest.raises(CheckpointError):
        open_checkpoint(partial)
    again = start("quantize", str(source), str(target), "--type", "q4_k")
    assert ended(again)[0] == 0
    assert open_checkpoint(target).tensors
    assert not partial.exists()


def test_interrupt_stops_softly_first_and_at_once_the_second_time() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    ids = torch.zeros(2, 3, dtype=torch.long)
    for number, raised, code in (
        (signal.SIGINT, KeyboardInterrupt, 130),
        (signal.SIGTERM, Terminated, 143),
    ):
        with Interrupt() as interrupt:
            assert not interrupt(ids, None).any()
            signal.raise_signal(number)
            assert interrupt(ids, None).tolist() == [True, True]
            assert interrupt.code == code
            with pytest.raises(raised):
                signal.raise_signal(number)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ctrl_c_after_sigterm_keeps_the_code_of_sigterm() -> None:
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGINT)
    assert interrupt.code == 143


def test_terminable_puts_the_handler_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, terminable():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_that_is_held_back_comes_at_the_end(
    number: int, raised: type[BaseException]
) -> None:
    reached: list[int] = []

    def run() -> None:
        with terminable(), held_back():
            signal.raise_signal(number)
            reached.append(number)

    with pytest.raises(raised):
        run()
    assert reached == [number]
    with held_back():
        pass  # nothing came, nothing is raised

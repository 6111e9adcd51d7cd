"""On a terminal one line shows what takes its time, and nothing of it stays; elsewhere nothing is
shown.
"""

import io
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress
from small_model import CONFIG, add_tokenizer

import flexinfer.cli.bars
from flexinfer.cli.bars import Bars

HIDE_CURSOR, SHOW_CURSOR, ERASE_LINE = b"\x1b[?25l", b"\x1b[?25h", b"\x1b[2K"
TIMEOUT_S = 300  # a busy machine is no failure


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def at_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stderr one; within a test, since pytest puts a stderr of its own in place before it."""
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    return shown


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that Bars sees: the one element, to be changed."""
    now = [100.0]
    monkeypatch.setattr(flexinfer.cli.bars, "perf_counter", lambda: now[0])
    return now


def test_nothing_is_shown_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars() as bars:
        bars.spin("loading")
        bars.expect("draft")
        assert bars.progress is None
    assert capsys.readouterr() == ("", "")


def test_a_bar_takes_the_place_of_the_spinner_when_much_is_left(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    terminal = at_terminal(monkeypatch)
    with Bars() as bars:
        assert bars.progress is not None
        bars.spin("loading")
        bars.expect("load", "draft")
        clock[0] += 1
        bars.progress("draft", 50, 100)  # a second for half of it: another is left
        assert (bars._spinner, type(bars._bar)) == (None, Progress)
        bars.stopping()
        bars.progress("draft", 100, 100)
        assert bars._bar is None
        bars.stopping()
    assert "making the draft" in terminal.getvalue()
    assert "one token more" in terminal.getvalue()


def test_what_is_quick_gets_no_bar(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    terminal = at_terminal(monkeypatch)
    with Bars() as bars:
        assert bars.progress is not None
        bars.spin("loading")
        bars.expect("load", "draft")
        for stage in ("load", "draft"):
            for done in range(10, 110, 10):
                clock[0] += 0.01
                bars.progress(stage, done, 100)
                assert bars._bar is None
        assert bars._spinner is not None
    assert "%" not in terminal.getvalue()


def test_stages_that_are_not_expected_get_no_bar(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    terminal = at_terminal(monkeypatch)
    with Bars() as bars:
        assert bars.progress is not None
        bars.expect("load", "draft")
        clock[0] += 10
        bars.progress("pass", 1, 100)
        bars.stop()
        bars.progress("draft", 1, 100)
        assert bars._bar is None
    assert terminal.getvalue() == ""


def run_at_terminal(
    argv: list[str],
    keys: bytes = b"",
    until: bytes = b"",
    number: int = 0,
    stdout_too: bool = False,
) -> tuple[int, bytes, bytes]:
    """Run at a pseudo-terminal; stdout is a pipe, unless that is the terminal too. Types `keys`,
    sends a signal when `until` is on the screen, checks that the terminal is left as it was.
    Returns exit code, stdout, what the terminal showed.
    """
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        argv,
        stdin=theirs,
        stderr=theirs,
        stdout=theirs if stdout_too else subprocess.PIPE,
        env=os.environ | {"TERM": "xterm"},
    )
    os.write(ours, keys)
    screen = b""
    sent = not number
    os.set_blocking(ours, False)
    while process.poll() is None:
        try:
            screen += os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.01)
        if not sent and until in screen:
            process.send_signal(number)
            sent = True
    out, _ = process.communicate(timeout=TIMEOUT_S)
    try:
        while piece := os.read(ours, 65536):
            screen += piece
    except BlockingIOError:
        pass
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)
    return process.returncode, screen if stdout_too else out, screen


@pytest.fixture(scope="module")
def model_dir(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(checkpoint("llama", **CONFIG), tmp_path_factory.mktemp("bars") / "model")


def test_generate_at_a_terminal_shows_and_erases(model_dir: Path) -> None:
    options = ["--memory", "2GiB", "--max-new-tokens", "4"]
    argv = [sys.executable, "-m", "flexinfer", "generate", str(model_dir), "abc", *options]
    code, out, screen = run_at_terminal(argv)
    assert code == 0
    assert out.endswith(b"\n")
    assert b"\x1b" not in out  # the text is the text
    assert b"loading" in screen
    last = screen.rpartition(ERASE_LINE)[2]
    assert b"loading" not in last
    assert b"4 tokens, first after" in last
    assert screen.count(HIDE_CURSOR) == screen.count(SHOW_CURSOR) > 0


def test_sigterm_at_the_prompt_of_a_chat_gives_the_terminal_back(model_dir: Path) -> None:
    argv = [sys.executable, "-m", "flexinfer", "chat", str(model_dir), "--memory", "2GiB"]
    code, _, screen = run_at_terminal(argv, until=b"Ctrl-C stops an answer", number=signal.SIGTERM)
    assert code == 143
    assert screen.rstrip().endswith(b"stopped")
    assert screen.count(HIDE_CURSOR) == screen.count(SHOW_CURSOR) > 0


def test_sigterm_while_it_loads_gives_the_terminal_back(model_dir: Path) -> None:
    argv = [
        sys.executable,
        "-m",
        "flexinfer",
        "generate",
        str(model_dir),
        "abc",
        "--memory",
        "2GiB",
    ]
    code, _, screen = run_at_terminal(argv, until=b"loading", number=signal.SIGTERM)
    assert code == 143
    assert screen.count(HIDE_CURSOR) == screen.count(SHOW_CURSOR) > 0

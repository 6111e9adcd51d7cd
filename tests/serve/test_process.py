"""`flexinfer serve` as a process of its own: how it stops, and what it takes with many clients,
some of them rude.
"""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from served import make_talker

from experiments.cgroups import find_place
from experiments.smollm2 import make_smollm2
from tests.stress.serve import run

GRACE_S = 0.5


@contextmanager
def process(path: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL, once it listens."""
    command = [
        sys.executable,
        "-m",
        "flexinfer",
        "serve",
        str(path),
        "--memory",
        "4GiB",
        "--port",
        "0",
        *options,
    ]
    with subprocess.Popen(
        [*command, "--policy", "none"], stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        try:
            for line in running.stderr:
                if found := re.search(r"http://\S+:\d+", line):
                    yield running, found[0]
                    break
        finally:
            running.kill()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is busy for a while with a text of 4,000 tokens."""
    return make_talker(tmp_path_factory.mktemp("process") / "talker")


def first_line(connection: socket.socket) -> bytes:
    return connection.recv(4096).splitlines()[0]


def ask(url: str, tokens: int, stream: bool = True) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "a", "max_tokens": tokens, "stream": stream}).encode()
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_what_runs_after_the_grace_and_sends_away_who_waits(
    slow: Path, number: signal.Signals, code: int
) -> None:
    with process(slow, "--grace", str(GRACE_S), "--context", "4096") as (running, url):
        with ask(url, 4000) as first, ask(url, 4000) as second:
            assert first_line(first).startswith(b"HTTP/1.1 200")
            while "flexinfer_queue_waiting 1.0" not in httpx.get(f"{url}/metrics").text:
                time.sleep(0.05)
            running.send_signal(number)
            assert first_line(second) == b"HTTP/1.1 503 Service Unavailable"
            text = b""
            while more := first.recv(65536):
                text += more
        assert running.wait(60) == code
    assert b'"finish_reason":"stop"' in text, "the stream was brought to its end"
    assert text.rstrip().endswith(b"0"), "and so was the response"


def test_a_short_answer_is_finished_within_the_grace(slow: Path) -> None:
    with process(slow, "--grace", "60", "--context", "4096") as (running, url):
        with ask(url, 200) as first:
            assert first_line(first).startswith(b"HTTP/1.1 200")
            running.send_signal(signal.SIGTERM)
            text = b""
            while more := first.recv(65536):
                text += more
        assert running.wait(60) == 143
    assert b'"finish_reason":"length"' in text
    assert b'"completion_tokens":200' in text


def test_eight_clients_some_of_them_rude_in_a_group_of_exactly_the_budget() -> None:
    place = find_place()
    if place.memory is None:
        pytest.skip(f"no right to limit memory here: {place.why_not}")
    record = run(make_smollm2(), clients=8, seconds=20, context=256, new_tokens=6)
    assert record["outcome"] == "ok", record
    assert record["oom_kills"] == 0
    assert record["group_peak_bytes"] <= record["memory_bytes"]
    assert record["answers"]["ok"] >= 1
    assert len(record["rude"]) >= 3

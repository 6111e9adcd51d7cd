"""A soak of the server: many clients at once, polite and rude ones, with `flexinfer serve` in a control group of exactly its budget.

The budget is the smallest that the server accepts and `share` of the weights, without swap. Each client draws from (seed, number) what it does next:
a chat or a completion, streamed or not, with a prompt and an answer of some length; or something that no client should do. What polite
clients get is compared with what stock transformers says, token by token. Nothing may be killed, wrong, hung or answered otherwise than it
should be, and the server has to stop when it is told to. One JSON line a run goes to the record.

    python -m flexinfer.bench.serve --minutes 30 --record results/reliability/serve.jsonl
"""

import argparse
import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx

from flexinfer.bench.limits import Limits
from flexinfer.bench.provenance import provenance
from flexinfer.bench.smollm2 import make_smollm2
from flexinfer.cli.interrupt import terminable
from flexinfer.sizes import format_size

RUDE_SHARE = 0.4
HUNG_S = 900.0  # for one answer, the wait for a turn included
START_S = 300.0
REFUSED_STARTS = (
    3  # times in a row that a process may be larger than the one before, which named the smallest budget
)
BAD = ("wrong", "hung", "error")
TOPICS = (
    "What is the capital of France?",
    "Name three fruits that are red.",
    "Write a sentence about the sea. " + "The waves come and go, and the gulls cry over the harbour. " * 6,
    "Summarise this. "
    + "The lighthouse keeper wrote down the wind and the ships, every day for forty years. " * 9,
)


@dataclass(slots=True)
class Tally:
    """What clients have seen; of all their threads."""

    answers: Counter[str] = field(default_factory=Counter)
    rude: dict[str, Counter[str]] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def polite(self, outcome: str, complaint: str = "") -> None:
        with self._lock:
            self.answers[outcome] += 1
            self._complain(outcome, complaint)

    def of_rude(self, kind: str, outcome: str, complaint: str = "") -> None:
        with self._lock:
            self.rude.setdefault(kind, Counter())[outcome] += 1
            self._complain(outcome, f"{kind}: {complaint}")

    def _complain(self, outcome: str, complaint: str) -> None:
        if outcome in BAD and len(self.complaints) < 20:
            self.complaints.append(f"{outcome}: {complaint}"[:500])

    @property
    def bad(self) -> int:
        counters = [self.answers, *self.rude.values()]
        return sum(counter[bad] for counter in counters for bad in BAD)


@dataclass(frozen=True, slots=True)
class Target:
    """The server under test, and what it should say."""

    url: str  # without /v1
    model: str
    texts: dict[tuple[bool, int], list[str]]  # by (chat, topic): the answer after 1, 2, ... tokens
    context: int

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)


def expected_texts(path: Path, new_tokens: int) -> dict[tuple[bool, int], list[str]]:
    """What stock transformers says to each topic, greedily, cut after each of `new_tokens` tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path).eval()
    texts = {}
    for chat in (False, True):
        for number, topic in enumerate(TOPICS):
            if chat:
                said = [{"role": "user", "content": topic}]
                inputs = tokenizer.apply_chat_template(
                    said, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            else:
                inputs = tokenizer(topic, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
            texts[chat, number] = [
                tokenizer.decode(ids[: n + 1], skip_special_tokens=True) for n in range(len(ids))
            ]
    return texts


# ---- what clients do


def ask_politely(target: Target, chance: random.Random, tally: Tally) -> None:
    """One text, checked. Comes back later when it is told to."""
    chat, topic, stream = chance.random() < 0.5, chance.randrange(len(TOPICS)), chance.random() < 0.5
    texts = target.texts[chat, topic]
    tokens = chance.randint(1, len(texts))
    prompt: dict[str, Any] = (
        {"messages": [{"role": "user", "content": TOPICS[topic]}]} if chat else {"prompt": TOPICS[topic]}
    )
    body = prompt | {"model": target.model, "max_tokens": tokens, "temperature": 0, "stream": stream}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    try:
        answer = httpx.post(target.url + path, json=body, timeout=HUNG_S)
    except httpx.TimeoutException:
        tally.polite("hung", f"{path} {tokens} tokens")
        return
    if answer.status_code == 503 and "retry-after" in answer.headers:
        tally.polite("told to come back")
        sleep(min(5.0, float(answer.headers["retry-after"])))
        return
    if answer.status_code != 200:
        tally.polite("error", f"{path}: {answer.status_code} {answer.text}")
        return
    text = "".join(_streamed(answer.text) if stream else _whole(answer.json()))
    right = text == texts[tokens - 1]
    tally.polite("ok" if right else "wrong", f"{path} stream={stream}: {text!r}, not {texts[tokens - 1]!r}")


def _whole(answer: dict[str, Any]) -> Iterator[str]:
    choice = answer["choices"][0]
    yield choice["message"]["content"] if "message" in choice else choice["text"]


def _streamed(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.startswith("data: {"):
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            yield choice["delta"].get("content", "") if "delta" in choice else choice["text"]


def _connection(target: Target, raw: bytes, read_bytes: int = 0, hold_s: float = 0.0) -> bytes:
    """What comes back when `raw` is sent, up to `read_bytes`, on a connection that is closed after `hold_s`."""
    with (
        contextlib.suppress(ConnectionError, TimeoutError),
        socket.create_connection(target.address, 60) as one,
    ):
        one.sendall(raw)
        received = one.recv(read_bytes) if read_bytes else b""
        sleep(hold_s)
        return received
    return b""


def _post(target: Target, body: bytes, path: str = "/v1/completions") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: {target.address[0]}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def _goes_away(target: Target, chance: random.Random) -> None:
    body = {"prompt": TOPICS[0], "max_tokens": 200, "stream": chance.random() < 0.5}
    _connection(target, _post(target, json.dumps(body).encode()), hold_s=chance.random() * 5)


def _reads_nothing(target: Target, chance: random.Random) -> None:
    body = json.dumps({"prompt": TOPICS[1], "max_tokens": 20, "stream": True}).encode()
    _connection(target, _post(target, body), hold_s=10)


def _half_a_request(target: Target, chance: random.Random) -> None:
    raw = _post(target, b'{"prompt": "a"}')
    _connection(target, raw[: chance.randrange(len(raw))], hold_s=chance.random() * 3)


def _garbage(target: Target, chance: random.Random) -> None:
    _connection(target, chance.randbytes(chance.randrange(1, 4096)), read_bytes=64)


def _many_connections(target: Target, chance: random.Random) -> None:
    with contextlib.ExitStack() as open_ones, contextlib.suppress(OSError):
        for _ in range(30):
            open_ones.enter_context(socket.create_connection(target.address, 10))
        sleep(1)


def _refused(*statuses: int, **fields: Any) -> "Callable[[Target, random.Random], str | None]":
    """A body that has to be answered with one of `statuses`; 503 is right too."""

    def ask(target: Target, chance: random.Random) -> str | None:
        asked = {"messages": [{"role": "user", "content": "a"}]} | fields
        content = asked.pop("raw", None) or json.dumps(asked).replace(
            '"LONG"', json.dumps("word " * 8 * target.context)
        )
        answer = httpx.post(
            f"{target.url}/v1/chat/completions",
            content=content,
            headers={"content-type": "application/json"},
            timeout=HUNG_S,
        )
        right = answer.status_code in (*statuses, 503) and "error" in answer.json()
        return None if right else f"{answer.status_code} {answer.text}"

    return ask


def _long_message(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


RUDE: "dict[str, Callable[[Target, random.Random], str | None]]" = {
    "goes away": _goes_away,
    "reads nothing": _reads_nothing,
    "half a request": _half_a_request,
    "garbage": _garbage,
    "many connections": _many_connections,
    "too long": _refused(400, 413, messages=_long_message("LONG")),
    "huge": _refused(413, messages=_long_message("x" * 2_000_000)),
    "no JSON": _refused(400, raw='{"messages": [' + "[" * 20_000),
    "several answers": _refused(400, n=50),
    "beams": _refused(400, generation_config='{"num_beams": 100}'),
    "another model": _refused(404, model="gpt-4"),
    "a picture": _refused(
        400, messages=_long_message([{"type": "image_url", "image_url": {"url": "http://a"}}])
    ),
    "a template": _refused(
        400, chat_template_kwargs={"chat_template": "{% for i in range(99999) %}x{% endfor %}"}
    ),
}


def _client(number: int, seed: int, target: Target, tally: Tally, until_s: float) -> None:
    chance = random.Random(f"{seed}.{number}")
    kinds = list(RUDE)
    while monotonic() < until_s:
        kind = chance.choice(kinds) if chance.random() < RUDE_SHARE else None
        try:
            if kind is None:
                ask_politely(target, chance, tally)
            else:
                complaint = RUDE[kind](target, chance)
                tally.of_rude(kind, "as it should be" if complaint is None else "wrong", complaint or "")
        except httpx.TimeoutException:
            tally.of_rude(str(kind), "hung")
        except (
            httpx.TransportError
        ) as error:  # closed before it was read: what a body that is too large may see
            if kind == "huge":
                tally.of_rude(kind, "as it should be")
            else:
                tally.polite("error", f"{kind}: {type(error).__name__}: {error}")


# ---- the server


@contextlib.contextmanager
def _server(
    path: Path, limits: Limits, memory: int, context: int, queue: int
) -> Iterator[tuple[subprocess.Popen[bytes], str, int]]:
    """The process, its URL, and 0; or, where the budget is refused, no URL and the smallest one."""
    command = [sys.executable, "-m", "flexinfer", "serve", str(path), "--memory", str(memory)]
    command += ["--port", "0", "--context", str(context), "--queue", str(queue), "--grace", "2"]
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(limits.command(command), stderr=log)
        try:
            deadline_s, url, smallest = monotonic() + START_S, "", 0
            while not url and process.poll() is None and monotonic() < deadline_s:
                sleep(0.2)
                text = Path(log.name).read_text(errors="replace")
                found = re.search(r"(http://\S+)/v1: ", text)
                url = found[1] if found else ""
            text = Path(log.name).read_text(errors="replace")
            if not url:
                named = re.search(r"at least (?:memory=)?(\d+)", text)
                if named is None:
                    raise RuntimeError(f"the server did not start: {text[-1500:]}")
                smallest = int(named[1])
            yield process, url, smallest
        finally:
            process.kill()
            process.wait()


def _metrics(url: str) -> dict[str, float]:
    rows = (
        line.rsplit(" ", 1)
        for line in httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
        if line[0] != "#"
    )
    return {name: float(value) for name, value in rows}


def _anonymous_bytes(process: subprocess.Popen[bytes]) -> int:
    resident, shared = Path(f"/proc/{process.pid}/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * 4096


def run(
    path: Path,
    clients: int = 8,
    seconds: float = 60.0,
    context: int = 512,
    share: float = 0.3,
    new_tokens: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """One run; its record. Raises RuntimeError where the server does not start."""
    texts = expected_texts(path, new_tokens)
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    queue = max(1, clients // 2)
    record: dict[str, Any] = {"model": path.name, "clients": clients, "seconds": seconds, "context": context}
    record |= {"queue": queue, "seed": seed, "share": share, "outcome": "error"}
    with _server(path, Limits(), 1 << 20, context, queue) as (_, _, smallest):
        pass
    for _ in range(REFUSED_STARTS):
        memory = (smallest + (1 << 20) + int(share * weights)) // 4096 * 4096
        record |= {"memory_bytes": memory, "smallest_bytes": smallest}
        with Limits(memory_bytes=memory) as limits, _server(path, limits, memory, context, queue) as one:
            process, url, smallest = one
            if not url:
                continue
            return record | _measured(
                process, limits, Target(url, path.name, texts, context), clients, seconds, seed
            )
    return record | {"message": f"refused {REFUSED_STARTS} times the budget that it had named"}


def _measured(
    process: subprocess.Popen[bytes], limits: Limits, target: Target, clients: int, seconds: float, seed: int
) -> dict[str, Any]:
    """What clients saw of a server that listens, what it counted, and how it stopped."""
    tally, samples = Tally(), list[int]()
    until_s = monotonic() + seconds
    threads = [
        threading.Thread(target=_client, args=(number, seed, target, tally, until_s))
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    while process.poll() is None and any(thread.is_alive() for thread in threads):
        samples.append(_anonymous_bytes(process))
        sleep(min(10.0, seconds / 10))
    alive = process.poll() is None
    if alive:
        for thread in threads:
            thread.join()
        counted = _metrics(target.url)
        stop_s = monotonic()
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
    else:
        counted, stop_s = {}, monotonic()
    usage = limits.usage()
    ended_well = alive and process.returncode == 143
    outcome = "killed" if usage.oom_kills else "ok" if ended_well and not tally.bad else "error"
    return {
        "outcome": outcome,
        "answers": dict(tally.answers),
        "rude": {kind: dict(counter) for kind, counter in sorted(tally.rude.items())},
        "complaints": tally.complaints,
        "counted": {
            name: value for name, value in counted.items() if "bucket" not in name and "created" not in name
        },
        "process_bytes": samples,
        "group_peak_bytes": usage.peak_memory_bytes,
        "oom_kills": usage.oom_kills,
        "exit_code": process.returncode,
        "stop_s": round(monotonic() - stop_s, 2),
    }


def main(argv: list[str] | None = None) -> int:
    """0 when nothing was killed, wrong, hung or answered otherwise than it should be."""
    parser = argparse.ArgumentParser(prog="python -m flexinfer.bench.serve", description=__doc__)
    parser.add_argument("model", nargs="?", help="checkpoint directory (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--share", type=float, default=0.3, help="of the weights, on top of the smallest budget"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="of the longest answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args(argv)
    path = Path(arguments.model) if arguments.model else make_smollm2()
    facts = provenance(path).model_dump(mode="json")
    with terminable():
        record = run(
            path,
            arguments.clients,
            60 * arguments.minutes,
            arguments.context,
            arguments.share,
            arguments.new_tokens,
            arguments.seed,
        )
    record["provenance"] = facts
    if arguments.record is not None:
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        with arguments.record.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
    peak = record.get("group_peak_bytes")
    print(
        f"{record['outcome']}: answers {record.get('answers')}, rude {record.get('rude')}, "
        f"peak {format_size(peak) if peak else '?'} of {format_size(record['memory_bytes'])}"
    )
    for complaint in record.get("complaints", [record.get("message", "")]):
        print(f"  {complaint}")
    return int(record["outcome"] != "ok")


if __name__ == "__main__":
    sys.exit(main())

"""The clients of a server soak: polite ones, whose answers are checked, and rude ones.

Each draws from (seed, number) what it does next: a chat or a completion, streamed or not, with a
prompt and an answer of some length; or something that no client should do.
"""

import contextlib
import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx

RUDE_SHARE = 0.4
HUNG_S = 900.0  # for one answer, the wait for a turn included
BAD = ("wrong", "hung", "error")
TOPICS = (
    "What is the capital of France?",
    "Name three fruits that are red.",
    "Write a sentence about the sea. "
    + "The waves come and go, and the gulls cry over the harbour. " * 6,
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
    """Greedy answers of stock transformers by topic, cut after each of `new_tokens` tokens."""
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


def ask_politely(target: Target, chance: random.Random, tally: Tally) -> None:
    """One text, checked. Comes back later when it is told to."""
    chat, topic, stream = (
        chance.random() < 0.5,
        chance.randrange(len(TOPICS)),
        chance.random() < 0.5,
    )
    texts = target.texts[chat, topic]
    tokens = chance.randint(1, len(texts))
    prompt: dict[str, Any] = (
        {"messages": [{"role": "user", "content": TOPICS[topic]}]}
        if chat
        else {"prompt": TOPICS[topic]}
    )
    body = prompt | {
        "model": target.model,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": stream,
    }
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
    tally.polite(
        "ok" if right else "wrong", f"{path} stream={stream}: {text!r}, not {texts[tokens - 1]!r}"
    )


def _whole(answer: dict[str, Any]) -> Iterator[str]:
    choice = answer["choices"][0]
    yield choice["message"]["content"] if "message" in choice else choice["text"]


def _streamed(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.startswith("data: {"):
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            yield choice["delta"].get("content", "") if "delta" in choice else choice["text"]


def _connection(target: Target, raw: bytes, read_bytes: int = 0, hold_s: float = 0.0) -> bytes:
    """What comes back when `raw` is sent, up to `read_bytes`, on a connection that is closed after
    `hold_s`.
    """
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
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {target.address[0]}\r\ncontent-type: application/json\r\n"
    )
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


def client(number: int, seed: int, target: Target, tally: Tally, until_s: float) -> None:
    chance = random.Random(f"{seed}.{number}")
    kinds = list(RUDE)
    while monotonic() < until_s:
        kind = chance.choice(kinds) if chance.random() < RUDE_SHARE else None
        try:
            if kind is None:
                ask_politely(target, chance, tally)
            else:
                complaint = RUDE[kind](target, chance)
                tally.of_rude(
                    kind, "as it should be" if complaint is None else "wrong", complaint or ""
                )
        except httpx.TimeoutException:
            tally.of_rude(str(kind), "hung")
        except (
            httpx.TransportError
        ) as error:  # closed before it was read: what a body that is too large may see
            if kind == "huge":
                tally.of_rude(kind, "as it should be")
            else:
                tally.polite("error", f"{kind}: {type(error).__name__}: {error}")

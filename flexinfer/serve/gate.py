"""Between the network and transformers' app: what a client sends is checked here, waits here, and
is watched from here.

ASGI. A request that generates is read (bounded, timed), checked (flexinfer.serve.requests), waits
in a line of bounded length, and then has the model to itself until its generation has ended on the
thread; the answer may still be on its way then, for a while. Heavy work, the making of a prompt
included, is done within a turn, so that the budget has to hold one request's and no more; what
waits is bytes. A client that goes away gives up its place or, within a pass, its turn.

Each request leaves one line in the log (logger "flexinfer.serve") and counts in the metrics.
"""

import asyncio
import hmac
import json
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter
from typing import Any

from flexinfer.messages import shown
from flexinfer.plan.plan import Plan
from flexinfer.serve.fields import Refusal
from flexinfer.serve.generation import Failed, Generation, Turn
from flexinfer.serve.line import Line
from flexinfer.serve.metrics import Metrics
from flexinfer.serve.requests import LOAD, MODELS, NEEDED, checked

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

READABLE = ("/health", MODELS, "/metrics")
# Most names of ignored fields that the log gets; our choice.
MAX_IGNORED = 100
# Time to send a body.
BODY_S = 20.0
# Time to read the rest of a finished answer.
DELIVERY_S = 60.0
REQUEST_ID = re.compile(rb"[\w.-]{1,64}")
# Status in the log for a client that went away.
GONE = 499
logger = logging.getLogger("flexinfer.serve")


class Exchange:
    """A request and what has been answered to it."""

    def __init__(self, scope: Any, receive: Receive, send: Send) -> None:
        self.path, self.method = scope["path"].rstrip("/"), scope["method"]
        self.scope, self.receive, self._send = scope | {"path": self.path}, receive, send
        self.headers = {name: value for name, value in scope["headers"]}
        # Status of the answer; 0 before it begins.
        self.status = 0
        # Whether the whole answer was sent.
        self.answered = False
        self.start_s = perf_counter()
        self.waited_s = 0.0
        self.turn: Turn | None = None

    @property
    def model(self) -> str:
        """The one that a path below MODELS names."""
        return self.path.removeprefix(MODELS + "/")

    @property
    def known(self) -> str | None:
        """The path, without a model; None where there is no such thing."""
        known = MODELS if self.path.startswith(MODELS + "/") else self.path
        return known if known in READABLE or known in NEEDED else None

    async def send(self, message: Message) -> None:
        """ASGI's send, noted."""
        self.status = message.get("status", self.status)
        await self._send(message)
        self.answered = message["type"] == "http.response.body" and not message.get(
            "more_body", False
        )

    async def body(self, limit_bytes: int) -> bytes:
        """All that the client sends. Raises Refusal where that is too much or takes too long."""
        body, more = bytearray(), True
        declared = self.headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit_bytes:
            raise too_large(limit_bytes)
        try:
            async with asyncio.timeout(BODY_S):
                while more:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(GONE, "the client went away")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit_bytes:
                        raise too_large(limit_bytes)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {BODY_S:g} seconds") from None
        return bytes(body)

    async def disconnected(self) -> None:
        """Return when the client has gone away, or has its whole answer."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an error, and with no more of this connection: the rest of a body may still
        be in it.
        """
        body = json.dumps(refusal.body).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        headers |= refusal.headers
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})


class Gate:
    """The ASGI app that is served. `app` is transformers'."""

    def __init__(
        self,
        app: App,
        generation: Generation,
        line: Line,
        metrics: Metrics,
        plan: Plan,
        api_key: str | None = None,
        hosts: frozenset[str] | None = None,
    ) -> None:
        self._app, self._generation, self._line, self._metrics = app, generation, line, metrics
        assert generation.limits is not None
        # The log compares with the bound of the plan.
        self._limits, self._plan = generation.limits, plan
        self._api_key = api_key
        # Hosts that requests may be addressed to; None for any.
        self._hosts = hosts
        # Ignored fields that the log has named.
        self._ignored: set[str] = set()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send)
        try:
            await self._answer(exchange)
        except Refusal as refusal:
            if refusal.status != GONE and not exchange.status:
                await exchange.refuse(refusal)
        except Failed:
            # The thread has logged it.
            pass
        except Exception:
            # The app's own handlers have answered.
            if exchange.status >= 500 or not exchange.status:
                logger.exception("a request failed")
            if not exchange.status:
                await exchange.refuse(
                    Refusal(500, "the request failed; the log of the server says more")
                )
        finally:
            self._note(exchange)

    def close(self, grace_s: float) -> None:
        """Admit nobody, send away who waits, and end what runs after `grace_s` seconds."""
        self._line.close(Refusal(503, "the server is stopping", retry_after_s=60))

        def stop() -> None:
            if self._generation.turn is not None:
                self._generation.turn.stop()

        asyncio.get_running_loop().call_later(grace_s, stop)

    async def _answer(self, exchange: Exchange) -> None:
        self._check_sender(exchange)
        if exchange.method in ("GET", "HEAD") and exchange.known in READABLE:
            if exchange.known != exchange.path and exchange.model != self._limits.model:
                raise self._limits.not_served(exchange.model)
            await self._app(exchange.scope | {"method": "GET"}, exchange.receive, exchange.send)
            return
        if exchange.method != "POST" or exchange.path not in NEEDED:
            there = f"GET {', '.join(READABLE)} and POST {', '.join(NEEDED)}"
            asked = f"{shown(exchange.method)} {shown(exchange.path or '/')}"
            raise Refusal(404, f"{asked}: there is no such thing here; there are {there}")
        if (
            exchange.headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            != b"application/json"
        ):
            raise Refusal(415, "the body has to be JSON, with content-type: application/json")
        if exchange.path != LOAD:
            self._line.check()
        ignored: set[str] = set()
        raw = await exchange.body(self._limits.body_bytes)
        body = checked(exchange.path, raw, self._limits, ignored)
        self._note_ignored(exchange.path, ignored)
        if not REQUEST_ID.fullmatch(exchange.headers.get(b"x-request-id", b"")):
            exchange.scope["headers"] = [
                *(pair for pair in exchange.scope["headers"] if pair[0] != b"x-request-id"),
                (b"x-request-id", uuid.uuid4().hex.encode()),
            ]
        await self._watched(exchange, json.dumps(body).encode())

    def _check_sender(self, exchange: Exchange) -> None:
        """Raises Refusal where the request is addressed to somebody else (a web page under a name
        of its own), or has no key.
        """
        host = exchange.headers.get(b"host", b"").decode("latin-1").lower()
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if self._hosts is not None and name not in self._hosts:
            raise Refusal(
                421,
                f"the request is addressed to {shown(host)}, and this server listens for this "
                f"machine alone: to {', '.join(sorted(self._hosts))}; send it there, or start the "
                "server with --host 0.0.0.0 (any name)",
            )
        if self._api_key is None or exchange.path == "/health":
            return
        given = exchange.headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self._api_key.encode()):
            raise Refusal(
                401, "the key is missing or wrong (Authorization: Bearer KEY)", "invalid_api_key"
            )

    async def _watched(self, exchange: Exchange, body: bytes) -> None:
        """Carry a request out, unless its client goes away."""
        gone = asyncio.create_task(exchange.disconnected())
        to_do = (
            self._load(exchange, body, gone)
            if exchange.path == LOAD
            else self._take_turn(exchange, body, gone)
        )
        work = asyncio.create_task(to_do)
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not exchange.answered:
                # It is still in the queue.
                if exchange.turn is None:
                    work.cancel()
                    await asyncio.wait({work})
                    raise Refusal(GONE, "the client went away")
                exchange.turn.stop()
            await work
        finally:
            gone.cancel()
            work.cancel()

    async def _load(self, exchange: Exchange, body: bytes, gone: "asyncio.Task[None]") -> None:
        await self._app(exchange.scope, _replay(body, gone), exchange.send)

    async def _take_turn(self, exchange: Exchange, body: bytes, gone: "asyncio.Task[None]") -> None:
        """Wait, generate, and see that the answer is read. The turn ends with the generation."""
        await self._line.enter()
        exchange.waited_s = perf_counter() - exchange.start_s
        turn = exchange.turn = self._generation.turn = Turn(asyncio.get_running_loop())
        answer = asyncio.ensure_future(
            self._app(exchange.scope, _replay(body, gone), exchange.send)
        )
        ended = asyncio.create_task(turn.ended.wait())
        try:
            await asyncio.wait({answer, ended}, return_when=asyncio.FIRST_COMPLETED)
            if turn.begun:
                await ended
        except asyncio.CancelledError:
            turn.stop()
            answer.cancel()
            raise
        finally:
            ended.cancel()
            self._generation.turn = None
            self._line.leave()
        await asyncio.wait({answer}, timeout=DELIVERY_S)
        if not answer.done():
            answer.cancel()
            await asyncio.wait({answer})
            raise Refusal(GONE, "the client does not read its answer")
        await answer

    def _note_ignored(self, path: str, fields: set[str]) -> None:
        """A line in the log for those that had none yet."""
        new = sorted(fields - self._ignored)[: MAX_IGNORED - len(self._ignored)]
        if new:
            self._ignored.update(new)
            logger.info("%s: ignored, also from now on: %s", path, shown(", ".join(new)))

    def _note(self, exchange: Exchange) -> None:
        """One line in the log, and the metrics."""
        status = exchange.status if exchange.answered else GONE
        self._metrics.requests.labels(exchange.known or "other", str(status)).inc()
        client = exchange.scope["client"]
        line = (
            f"{client[0] if client else '-'} {exchange.method} "
            f"{exchange.known or shown(exchange.path)}"
        )
        line += f" {status}" if exchange.answered else " the client went away"
        turn = exchange.turn
        if turn is not None and turn.begun:
            self._metrics.waited.observe(exchange.waited_s)
            self._metrics.tokens.labels("prompt").inc(turn.prompt_tokens)
            self._metrics.tokens.labels("answer").inc(turn.new_tokens)
            line += (
                f": {turn.prompt_tokens} tokens in, {turn.new_tokens} out, waited "
                f"{exchange.waited_s:.2f} s"
            )
            if turn.first_s:
                first_s = turn.first_s - turn.start_s
                self._metrics.first_token.observe(first_s)
                line += f", first after {first_s:.2f} s"
            if turn.tokens_per_s is not None:
                share = turn.tokens_per_s / self._plan.bound_tokens_per_s
                line += f", then {turn.tokens_per_s:.3g} tokens/s, {share:.2f} of the bound"
                if turn.passes != turn.new_tokens:
                    line += f" of one token a pass ({turn.passes} passes)"
            if turn.failure is not None:
                line += f", {turn.failure}"
        # Successful polls are not worth a line.
        quiet = exchange.method == "GET" and status == 200
        logger.log(logging.DEBUG if quiet else logging.INFO, "%s", line)


def too_large(limit_bytes: int) -> Refusal:
    """The refusal of a body of more than `limit_bytes`."""
    return Refusal(
        413,
        f"the body is larger than {limit_bytes} bytes, which is more than any text that fits into "
        "this model's context",
        "context_length_exceeded",
    )


def _replay(body: bytes, gone: "asyncio.Task[None]") -> Receive:
    """ASGI's receive, of a body that has been read."""
    rest = [body]

    async def receive() -> Message:
        if rest:
            return {"type": "http.request", "body": rest.pop(), "more_body": False}
        await asyncio.wait({gone})
        return {"type": "http.disconnect"}

    return receive

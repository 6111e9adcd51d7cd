"""`flexinfer serve`: an OpenAI-compatible server for one model in a memory budget.

transformers' app and handlers (transformers.cli.serving), with flexinfer's model in their
ModelManager, behind a gate (flexinfer.serve.gate).

The budget is that of the whole process: the libraries of the server are loaded, and a request of
each kind has gone through the handlers, before the process is measured for the plan; `ROOM_BYTES`
more, for what requests take beside their passes, are held meanwhile. Then a first text fills
memory, so that what does not work fails before the port is open.
"""

import asyncio
import contextlib
import ipaddress
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import uvicorn
from transformers.utils import logging as transformers_logging
from uvicorn.protocols.http.h11_impl import H11Protocol

import flexinfer
from flexinfer.formats.checkpoint import local_checkpoint
from flexinfer.formats.hub import resolve
from flexinfer.observe.report import plan_line
from flexinfer.serve.app import build_app, first_text, rehearse, small_tokenizer
from flexinfer.serve.gate import Gate
from flexinfer.serve.generation import Generation
from flexinfer.serve.line import Line
from flexinfer.serve.metrics import EngineCollector, Metrics
from flexinfer.serve.requests import Limits

# Memory for bodies, connections, prompts and pieces of answers; our choice.
ROOM_BYTES = 8 << 20
# In addition to those that generate or queue: to get a 503, or to look at /metrics.
SPARE_CONNECTIONS = 64
# Time for a connection to send a request.
HEAD_S = 10.0
# Time after the grace period for the current token.
LAST_S = 5.0
KEY_VARIABLE = "FLEXINFER_API_KEY"
# Threads for requests that generate nothing.
THREADS = 2
logger = logging.getLogger("flexinfer.serve")


def serve(
    model: str | Path,
    memory: str | int = "auto",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    queue: int = 16,
    grace_s: float = 10.0,
    gguf_file: str | None = None,
    started: Callable[["Server"], None] | None = None,
    **options: Any,
) -> None:
    """Serve `model` until SIGTERM or Ctrl-C; then what runs may go on for `grace_s` seconds.

    Args:
        model: as in flexinfer.from_pretrained; its last part is the name that clients give.
        memory: budget of the whole process, the server included.
        host: where to listen; only this machine reaches the default.
        port: 0 takes a free one.
        api_key: that requests have to bring; None: what FLEXINFER_API_KEY holds, or none.
        queue: requests that may wait while one generates.
        grace_s: seconds.
        gguf_file: as in flexinfer.from_pretrained.
        started: called with the server when it listens.
        options: other arguments of flexinfer.from_pretrained.

    Raises:
        OSError: nothing can listen there.
        BudgetError, CheckpointError, ValueError: as flexinfer.from_pretrained, and of the arguments
        here.
    """
    _check(queue, grace_s, api_key)
    api_key = api_key or os.environ.get(KEY_VARIABLE)
    with listen(host, port) as listener, _logged():
        transformers_logging.set_verbosity_error()
        path, name = resolve(model, gguf_file), name_of(model)
        generation = Generation()
        try:
            asyncio.run(rehearse(generation, small_tokenizer()))
            room = [bytearray(b"\1") * ROOM_BYTES]
            # On the thread that will generate: torch keeps some memory by thread.
            loaded = generation.submit(flexinfer.from_pretrained, path, memory, **options).result()
            with loaded.flexinfer as engine:
                _check_tokenizer(name, engine.tokenizer)
                asyncio.run(first_text(loaded, engine.tokenizer, generation))
                room.clear()
                gate = _gate(loaded, name, generation, Line(queue), api_key, _hosts(host))

                def listening(server: Server) -> None:
                    logger.info("%s: %s, a context of %d tokens", server.url, name, engine.context)
                    if started is not None:
                        started(server)

                logger.info("%s", plan_line(engine.plan))
                if api_key is None and not _hosts(host):
                    logger.warning("anyone who reaches %s may use it: it has no --api-key", host)
                server = Server(gate, listener, queue + 1 + SPARE_CONNECTIONS, grace_s, listening)
                asyncio.run(server.serve([listener]))
        finally:
            generation.stop()


def _check(queue: int, grace_s: float, api_key: str | None) -> None:
    if queue < 0:
        raise ValueError(f"queue={queue} must be 0 (nobody waits) or more")
    if grace_s < 0:
        raise ValueError(f"grace={grace_s:g} must be 0 seconds or more")
    if api_key == "":
        raise ValueError("api_key='' is empty; give a key, or leave it out")


def _check_tokenizer(name: str, tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer that is none of the tokenizers library."""
    if not hasattr(tokenizer, "_tokenizer"):
        kind = type(tokenizer).__name__
        raise ValueError(f"{name}: its tokenizer, {kind}, is none of the tokenizers library")


def _gate(
    model: Any,
    name: str,
    generation: Generation,
    line: Line,
    api_key: str | None,
    hosts: frozenset[str] | None,
) -> Gate:
    """transformers' app for `model`, behind its gate."""
    engine, metrics = model.flexinfer, Metrics()
    tokenizer = engine.tokenizer
    metrics.registry.register(EngineCollector(engine, line))
    generation.limits = Limits(name, engine.context, len(tokenizer), bool(tokenizer.chat_template))
    app = build_app(model, tokenizer, generation, metrics, name)
    return Gate(app, generation, line, metrics, engine.plan, api_key, hosts)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, and does not listen yet. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(
            f"nothing can listen on {host}, port {port}: {error.strerror}; give another --port"
        ) from None
    return listener


def name_of(model: str | Path) -> str:
    """What clients call the model: its id on the Hub, or the name of its file or directory."""
    found = local_checkpoint(model)
    return found.resolve().name if found is not None else str(model)


def _hosts(host: str) -> frozenset[str] | None:
    """The names by which requests may call a server that listens on `host`; None, any, where others
    reach it.
    """
    with contextlib.suppress(ValueError):
        if not ipaddress.ip_address(host).is_loopback:
            return None
        return frozenset({"localhost", "127.0.0.1", "[::1]", host})
    return frozenset({"localhost", "127.0.0.1", "[::1]"}) if host == "localhost" else None


class Connection(H11Protocol):
    """A connection of a client.

    Beyond the limit there is none, and one that asks nothing in time is closed.
    """

    def __init__(self, *args: Any, limit: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limit = limit

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limit:
            transport.abort()
        else:
            self._expect_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_request()

    def _expect_request(self) -> None:
        last = self.cycle

        def check() -> None:
            if self.cycle is last and (last is None or last.response_complete):
                self.transport.abort()

        self.loop.call_later(HEAD_S, check)


class Server(uvicorn.Server):
    """uvicorn's server of the app `gate`.

    It stops in an orderly way, within `grace_s` and LAST_S seconds.
    """

    def __init__(
        self,
        gate: Gate,
        listener: socket.socket,
        connections: int,
        grace_s: float,
        listening: "Callable[[Server], None]",
    ) -> None:
        protocol: Any = partial(Connection, limit=connections)
        super().__init__(
            uvicorn.Config(
                gate,
                http=protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(grace_s + LAST_S),
            )
        )
        self._gate, self._grace_s, self._listening = gate, grace_s, listening
        host, self.port = listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        await super().startup(sockets)
        self._listening(self)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen no more, finish or end what runs, close what is open."""
        self._gate.close(self._grace_s)
        await super().shutdown(sockets)


@contextmanager
def _logged() -> Iterator[None]:
    """A line for each request to stderr; uvicorn is quiet, for its warnings are of what clients
    send.
    """
    network, handler = logging.getLogger("uvicorn.error"), logging.StreamHandler()
    before = logger.level, logger.propagate, network.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    network.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate, network.level = before

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
import json
import logging
import math
import os
import socket
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio.to_thread
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler
from transformers.utils import logging as transformers_logging
from uvicorn.protocols.http.h11_impl import H11Protocol

import flexinfer
from flexinfer.formats.checkpoint import local_checkpoint
from flexinfer.formats.hub import resolve
from flexinfer.messages import cause
from flexinfer.observe.report import plan_line
from flexinfer.serve.gate import Gate
from flexinfer.serve.generation import Failed, Generation, OneGeneration, Reply, Turn
from flexinfer.serve.line import Line
from flexinfer.serve.metrics import CONTENT_TYPE, EngineCollector, Metrics
from flexinfer.serve.requests import (
    CHAT,
    COMPLETIONS,
    MODELS,
    RESPONSES,
    TEXT_PARTS,
    Limits,
    Refusal,
    error_body,
    settings,
    text_of,
)

ROOM_BYTES = 8 << 20  # bodies, connections, prompts in the making, pieces of answers; our choice
# Beside those that generate or wait: to be told to come back later, or to look.
SPARE_CONNECTIONS = 64
HEAD_S = 10.0  # for a connection to ask something
LAST_S = 5.0  # after the grace: for the token in hand
KEY_VARIABLE = "FLEXINFER_API_KEY"
THREADS = 2  # that answer what is not generated
REHEARSED: dict[str, dict[str, Any]] = {  # one request of each kind
    CHAT: {"messages": [{"role": "user", "content": "a"}]},
    COMPLETIONS: {"prompt": "a"},
    RESPONSES: {"input": "a"},
}
REHEARSED_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
)
OF_THE_REQUEST = (
    TemplateError,
    TypeError,
    KeyError,
    ValueError,
    AttributeError,
    IndexError,
    RecursionError,
)
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
    if queue < 0:
        raise ValueError(f"queue={queue} must be 0 (nobody waits) or more")
    if grace_s < 0:
        raise ValueError(f"grace={grace_s:g} must be 0 seconds or more")
    if api_key == "":
        raise ValueError("api_key='' is empty; give a key, or leave it out")
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
                tokenizer: Any = engine.tokenizer
                if not hasattr(tokenizer, "_tokenizer"):
                    raise ValueError(
                        f"{name}: its tokenizer, {type(tokenizer).__name__}, is none of the "
                        "tokenizers library"
                    )
                asyncio.run(first_text(loaded, tokenizer, generation))
                room.clear()
                line, metrics = Line(queue), Metrics()
                metrics.registry.register(EngineCollector(engine, line))
                generation.limits = Limits(
                    name, engine.context, len(tokenizer), bool(tokenizer.chat_template)
                )
                app = build_app(loaded, tokenizer, generation, metrics, name)
                gate = Gate(app, generation, line, metrics, engine.plan, api_key, _hosts(host))

                def listening(server: Server) -> None:
                    logger.info("%s: %s, a context of %d tokens", server.url, name, engine.context)
                    if started is not None:
                        started(server)

                logger.info("%s", plan_line(engine.plan))
                if api_key is None and not _hosts(host):
                    logger.warning(
                        "whoever reaches %s may use this server: it has no --api-key", host
                    )
                server = Server(gate, listener, queue + 1 + SPARE_CONNECTIONS, grace_s, listening)
                asyncio.run(server.serve([listener]))
        finally:
            generation.stop()


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


# ---- transformers' app


class OneModel(ModelManager):
    """transformers' manager of the models of a server, which has one."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self._model, self._tokenizer = model, tokenizer
        super().__init__(device="cpu", force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is: there are no revisions."""
        return model_id

    def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        return self._model


class _Handler(BaseHandler):
    """What the three handlers have in common, in place of transformers': the gate has checked the
    fields (flexinfer.serve.requests), each of them counts on every path, and a temperature asks for
    sampling, also where the model's own config does not sample.
    """

    def _validate_request(self, body: dict[str, Any]) -> None: ...

    def _build_generation_config(
        self, body: dict[str, Any], *args: Any, **kwargs: Any
    ) -> GenerationConfig:
        config = super()._build_generation_config(body, *args, **kwargs)
        for name, value in settings(body).items():
            setattr(config, name, value)
        return config

    def _streaming(self, *args: Any, **kwargs: Any) -> StreamingResponse:
        response: StreamingResponse = super()._streaming(*args, **kwargs)  # type: ignore[misc]
        response.body_iterator = _with_end(response.body_iterator)
        return response

    async def _non_streaming(
        self, request_id: str, model: Any, processor: Any, *args: Any, **kwargs: Any
    ) -> Any:
        reply = Reply(processor)
        return await super()._non_streaming(request_id, model, reply, *args, **kwargs)  # type: ignore[misc]


async def _with_end(events: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """`events` and the one that ends a stream of OpenAI's."""
    async for event in events:
        yield event
    yield "data: [DONE]\n\n"


class _Chat(_Handler, ChatCompletionHandler): ...


class _Completion(_Handler, CompletionHandler): ...


class _Response(_Handler, ResponseHandler):
    _streaming = ResponseHandler._streaming  # whose last event says that it is

    @staticmethod
    def _normalize_input(body: dict[str, Any]) -> list[dict[str, Any]]:
        """The messages of a conversation. transformers' drops all of one that does not begin with a
        message, and puts the instructions in the place of a system message.
        """
        items = body["input"]
        if isinstance(items, str) or items[0].get("type") in TEXT_PARTS:
            items = [{"role": "user", "content": items}]
        messages = ResponseHandler._normalize_response_items(items)
        if instructions := body.get("instructions"):
            system = [messages.pop(0)] if messages and messages[0]["role"] == "system" else []
            told = [instructions, *(text_of(message["content"]) for message in system)]
            messages.insert(0, {"role": "system", "content": "\n\n".join(told)})
        return messages


def build_app(
    model: Any, tokenizer: Any, generation: Generation, metrics: Metrics, name: str
) -> FastAPI:
    """transformers' app for one model, with /metrics, and errors as OpenAI's clients read them."""
    manager, state = OneModel(model, tokenizer, name), OneGeneration(generation)
    handlers: dict[str, Any] = {
        "chat_handler": _Chat(manager, state),
        "completion_handler": _Completion(manager, state),
        "response_handler": _Response(manager, state),
        "transcription_handler": None,  # the gate has no way to these
        "systemone_handler": None,
    }
    app = build_server(manager, generation_state=state, **handlers)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get(MODELS + "/{model:path}")  # the gate lets its own name pass
    async def read_model(model: str) -> Response:
        return JSONResponse(manager.list_models()[0])

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def refused_by_transformers(request: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        turn = generation.turn
        if turn is not None and not turn.begun and isinstance(error, OF_THE_REQUEST):
            return JSONResponse(
                error_body(400, f"no prompt can be made of this: {cause(error)}"), 400
            )
        text = (
            str(error)
            if isinstance(error, Failed)
            else "the request failed; the log of the server says more"
        )
        return JSONResponse(error_body(500, text), 500)

    return app


# ---- before the port is open


def small_tokenizer() -> PreTrainedTokenizerFast:
    """One of single bytes, to rehearse with: that of the model is loaded with it, when its memory
    has been planned.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=REHEARSED_TEMPLATE, **names
    )


async def rehearse(generation: Generation, tokenizer: Any) -> None:
    """Have a request of each kind go through the handlers, streamed and not, with a model that
    repeats its last token: what they import and build once is there when the process is measured.
    """

    def repeat(input_ids: torch.Tensor, stopping_criteria: Any = (), **kwargs: Any) -> torch.Tensor:
        text = torch.cat((input_ids, input_ids[:, -1:]), dim=1)
        for criterion in stopping_criteria:
            criterion(text, None)
        return text

    model = SimpleNamespace(
        generate=repeat,
        device="cpu",
        name_or_path="",
        config=SimpleNamespace(model_type=""),
        generation_config=GenerationConfig(),
    )
    generation.limits = Limits("", 1 << 20, len(tokenizer))
    app = build_app(model, tokenizer, generation, Metrics(), "rehearsal")
    for path, body in REHEARSED.items():
        for stream in (False, True):
            await _post(app, generation, path, body | {"stream": stream})
    await _post(app, generation, COMPLETIONS, {"prompt": ""})  # and an error


async def first_text(model: Any, tokenizer: Any, generation: Generation) -> None:
    """Generate for the first time, which fills memory. Raises RuntimeError where that fails."""
    app = build_app(model, tokenizer, generation, Metrics(), "first")
    status = await _post(app, generation, COMPLETIONS, {"prompt": "a", "max_tokens": 2})
    if status != 200:
        raise RuntimeError("the model generates no text")


async def _post(app: FastAPI, generation: Generation, path: str, body: dict[str, Any]) -> int:
    """Status of a request that no network carries."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    status, forever = 0, asyncio.Event()

    async def receive() -> Any:
        if messages:
            return messages.pop()
        return await forever.wait()

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
    }
    scope |= {"headers": [(b"content-type", b"application/json")], "client": None, "server": None}
    generation.turn = Turn(asyncio.get_running_loop())
    with contextlib.suppress(Exception):  # the app has answered by its own handlers
        await app(scope | {"http_version": "1.1", "scheme": "http"}, receive, send)
    return status


# ---- the network


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

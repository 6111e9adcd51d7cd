"""transformers' app and handlers for one model, and the requests that go through them before the
port is open.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterable, AsyncIterator
from types import SimpleNamespace
from typing import Any

import torch
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

from flexinfer.messages import cause
from flexinfer.serve.fields import TEXT_PARTS, Refusal, error_body
from flexinfer.serve.generation import Failed, Generation, OneGeneration, Reply, Turn
from flexinfer.serve.metrics import CONTENT_TYPE, Metrics
from flexinfer.serve.requests import CHAT, COMPLETIONS, MODELS, RESPONSES, Limits, settings, text_of

# One request of each kind.
REHEARSED: dict[str, dict[str, Any]] = {
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
    # Its last event says that it is the last.
    _streaming = ResponseHandler._streaming

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
            parts = [instructions, *(text_of(message["content"]) for message in system)]
            messages.insert(0, {"role": "system", "content": "\n\n".join(parts)})
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
        # The gate does not let requests to these pass.
        "transcription_handler": None,
        "systemone_handler": None,
    }
    app = build_server(manager, generation_state=state, **handlers)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    # The gate lets only the name of this model pass.
    @app.get(MODELS + "/{model:path}")
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
    # An error takes memory too.
    await _post(app, generation, COMPLETIONS, {"prompt": ""})


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
    # The app's own handlers have answered.
    with contextlib.suppress(Exception):
        await app(scope | {"http_version": "1.1", "scheme": "http"}, receive, send)
    return status

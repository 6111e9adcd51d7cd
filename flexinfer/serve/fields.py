"""The fields of a request: what each may hold, and how it is refused.

Which of them count, and for which path, flexinfer.serve.requests decides.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from flexinfer.messages import shown

# Continue, in an editor, sends about 30: words that begin a block of the language are among them.
MAX_STOPS, MAX_STOP_CHARACTERS = 64, 256
# OpenAI's limit.
MAX_BIASED_TOKENS = 300
MAX_TEMPLATE_OPTIONS, MAX_TOKEN_IDS = 16, 16
TEXT_PARTS = ("text", "input_text", "output_text")
# Keywords of apply_chat_template that clients may not set: a template of theirs would run here.
NOT_OF_TEMPLATES = {
    "conversation",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "load_audio_from_video",
    "num_frames",
    "sanitize_control_tokens",
}


class Refusal(ValueError):
    """A request that is not carried out: HTTP status, OpenAI's code of the error and the field it
    is about, seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        field: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.field, self.retry_after_s = status, code, field, retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.status, str(self), self.code, self.field)

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def error_body(
    status: int, message: str, code: str | None = None, field: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def parse(raw: bytes, what: str = "the body") -> dict[str, Any]:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=constant)
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        # Also for lone surrogates, which no tokenizer takes.
        raise Refusal(
            400, f"{what} is no JSON in UTF-8: {type(error).__name__}: {error}"[:300]
        ) from None
    if not isinstance(body, dict):
        raise Refusal(400, f"{what} is {shown(body)}; it has to be a JSON object")
    return body


def checked_generation_config(text: str) -> str:
    """The part of a generation config that a client may set, as JSON (`transformers chat` sends all
    of it).
    """
    if not isinstance(text, str):
        refuse("generation_config", "has to be JSON in a string")
    config = {
        name: value
        for name, value in parse(text.encode(), "generation_config").items()
        if value is not None
    }
    for name, value in config.items():
        if name not in OF_GENERATION:
            refuse(
                "generation_config",
                f"sets {shown(name)}; there are {', '.join(sorted(OF_GENERATION))}",
            )
        OF_GENERATION[name](f"generation_config.{name}", value)
        if name in FRACTIONS:
            # generate() refuses whole numbers for some.
            config[name] = float(value)
    config.pop("transformers_version", None)
    return json.dumps(config)


# Checks one field, by name and value. Raises Refusal.
Check = Callable[[str, Any], None]


def refuse(field: str, complaint: str) -> NoReturn:
    raise Refusal(400, f"{field} {complaint}", field=field)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(low: float, high: float, *, above: bool = False) -> Check:
    """From `low` to `high`; with `above`, more than `low`."""

    def check(field: str, value: Any) -> None:
        if not _is_number(value) or not low <= value <= high or (above and value == low):
            refuse(
                field,
                f"is {shown(value)}; it has to be {'above' if above else 'from'} {low:g} to "
                f"{high:g}",
            )

    return check


def _integer(low: int, high: int) -> Check:
    def check(field: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            refuse(field, f"is {shown(value)}; it has to be a whole number from {low} to {high}")

    return check


def _only(*allowed: Any) -> Check:
    """For what would be ignored."""

    def check(field: str, value: Any) -> None:
        if not any(type(value) is type(one) and value == one for one in allowed):
            there = (
                f"; {' or '.join(json.dumps(one) for one in allowed)} is all there is"
                if allowed
                else ""
            )
            refuse(field, f"is {shown(value)}, which this server cannot do{there}")

    return check


def _boolean(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        refuse(field, f"is {shown(value)}; it has to be true or false")


def _text(field: str, value: Any) -> None:
    if not isinstance(value, str):
        refuse(field, f"is {shown(value)}; it has to be a string")


def _stop(field: str, value: Any) -> None:
    stops = [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or not 1 <= len(stops) <= MAX_STOPS
        or not all(isinstance(one, str) and 1 <= len(one) <= MAX_STOP_CHARACTERS for one in stops)
    ):
        refuse(
            field, f"has to be 1 to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
        )


def _logit_bias(field: str, value: Any) -> None:
    if (
        not isinstance(value, dict)
        or len(value) > MAX_BIASED_TOKENS
        or not all(token.isascii() and token.isdigit() and len(token) < 10 for token in value)
        or not all(_is_number(bias) and -100 <= bias <= 100 for bias in value.values())
    ):
        refuse(
            field,
            f"has to name at most {MAX_BIASED_TOKENS} token ids, each with a number from -100 to "
            "100",
        )


def _template_options(field: str, value: Any) -> None:
    if not isinstance(value, dict) or len(value) > MAX_TEMPLATE_OPTIONS:
        refuse(field, f"has to be an object of at most {MAX_TEMPLATE_OPTIONS} options")
    for name, option in value.items():
        if name in NOT_OF_TEMPLATES or not name.isidentifier():
            refuse(field, f"sets {shown(name)}, which is no option of a chat template")
        if not isinstance(option, str | int | float | bool | None):
            refuse(f"{field}.{name}", "has to be a string, a number or a boolean")


def _objects(field: str, value: Any) -> Sequence[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        refuse(field, "has to be a list of at least one object")
    return value


def is_hosted(tool: Any) -> bool:
    """Whether a tool is one that the server would use by itself; functions and custom tools are the
    client's.
    """
    return isinstance(tool, dict) and tool.get("type") not in (None, "function", "custom")


def _tools(field: str, value: Any) -> None:
    for tool in _objects(field, value):
        function = tool.get("function", tool)
        if tool.get("type") != "function" or not isinstance(function, dict):
            refuse(field, f"has one of type {shown(tool.get('type'))}; functions are all there is")
        _text(f"{field}.function.name", function.get("name"))


def _content(field: str, value: Any) -> None:
    if value in (None, []) or isinstance(value, str):
        return
    for part in _objects(field, value):
        if part.get("type") not in TEXT_PARTS:
            refuse(
                field, f"has a part of type {shown(part.get('type'))}; this model reads text alone"
            )
        _text(f"{field}.text", part.get("text"))


def _messages(field: str, value: Any) -> None:
    for message in _objects(field, value):
        _text(f"{field}.role", message.get("role"))
        if message["role"] == "developer":
            # OpenAI's newer name of it, which many templates leave out without a word.
            message["role"] = "system"
        _content(f"{field}.content", message.get("content"))
        for call in (
            _objects(f"{field}.tool_calls", message["tool_calls"])
            if message.get("tool_calls")
            else ()
        ):
            _called(f"{field}.tool_calls", call.get("function", call))


def _called(field: str, function: Any) -> None:
    """A call of a tool that the model has made in an earlier turn."""
    arguments = function.get("arguments") if isinstance(function, dict) else None
    # Some clients send an empty string for none.
    if isinstance(arguments, str):
        arguments = function["arguments"] = parse(
            (arguments or "{}").encode(), f"{field}.arguments"
        )
    if not isinstance(arguments, dict):
        refuse(field, "have to be functions with a name and arguments, an object in JSON")
    _text(f"{field}.name", function.get("name"))


def _input(field: str, value: Any) -> None:
    """Of /v1/responses: a text, parts of one, or messages and calls of tools."""
    if isinstance(value, str):
        return
    items = _objects(field, value)
    if "role" not in items[0] and items[0].get("type") in TEXT_PARTS:
        _content(field, value)
        return
    for item in items:
        kind = item.get("type", "message")
        if "role" in item:
            _messages(field, [item])
        elif kind == "reasoning":
            _content(
                f"{field}.content", [part | {"type": "text"} for part in _parts_of(field, item)]
            )
        elif kind == "function_call":
            _called(field, item)
            _text(f"{field}.call_id", item.get("call_id"))
        elif kind == "function_call_output":
            _content(f"{field}.output", item.get("output"))
            _text(f"{field}.call_id", item.get("call_id"))
        else:
            refuse(field, f"has an item of type {shown(kind)}, which this server cannot read")


def _parts_of(field: str, item: dict[str, Any]) -> Sequence[dict[str, Any]]:
    return _objects(f"{field}.content", item["content"]) if item.get("content") else []


def _text_format(field: str, value: Any) -> None:
    if not isinstance(value, dict) or value.get("format", {"type": "text"}) != {"type": "text"}:
        refuse(field, f"is {shown(value)}; free text is all there is")


def _include(field: str, value: Any) -> None:
    if any("logprobs" in one for one in value if isinstance(one, str)):
        refuse(field, "has log probabilities, which this server cannot give")


def _tokens(field: str, value: Any) -> None:
    ids = value if isinstance(value, list) else [value]
    if not 1 <= len(ids) <= MAX_TOKEN_IDS:
        refuse(field, f"has to be 1 to {MAX_TOKEN_IDS} token ids")
    for one in ids:
        _integer(0, 2**31 - 1)(field, one)


def _anything(field: str, value: Any) -> None: ...


CHECKS: dict[str, Check] = {
    "model": _text,
    "messages": _messages,
    "prompt": _text,
    "input": _input,
    "instructions": _text,
    "tools": _tools,
    "tool_choice": _only("auto", "none"),
    "stream": _boolean,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, above=True),
    # -1 (vLLM) and 0 (llama.cpp) mean all of them.
    "top_k": _integer(-1, 2**31 - 1),
    "min_p": _number(0, 1),
    "typical_p": _number(0, 1, above=True),
    "repetition_penalty": _number(0, 10, above=True),
    "frequency_penalty": _number(-1, 2, above=True),
    "seed": _integer(-(2**63), 2**64 - 1),
    "max_tokens": _integer(1, 2**31 - 1),
    "max_completion_tokens": _integer(1, 2**31 - 1),
    "max_output_tokens": _integer(1, 2**31 - 1),
    "stop": _stop,
    "logit_bias": _logit_bias,
    "chat_template_kwargs": _template_options,
    # Checked when it is parsed.
    "generation_config": _anything,
}
# Fields that would change the answer and are not supported, with the values that change nothing.
UNSUPPORTED: dict[str, Check] = {
    # OpenAI's
    "n": _only(1),
    "best_of": _only(1),
    "echo": _only(False),
    "suffix": _only(""),
    "logprobs": _only(False),
    "top_logprobs": _only(0),
    "presence_penalty": _only(0, 0.0),
    "response_format": _only({"type": "text"}),
    "text": _text_format,
    "include": _include,
    "modalities": _only(["text"]),
    "background": _only(False),
    **dict.fromkeys(
        ("functions", "function_call", "audio", "prediction", "web_search_options"), _only()
    ),
    **dict.fromkeys(("previous_response_id", "conversation", "max_tool_calls"), _only()),
    # vLLM's, llama.cpp's and Ollama's
    "min_tokens": _only(0),
    "repeat_penalty": _only(1, 1.0),
    "ignore_eos": _only(False),
    "use_beam_search": _only(False),
    "add_generation_prompt": _only(True),
    "continue_final_message": _only(False),
    "skip_special_tokens": _only(True),
    "include_stop_str_in_output": _only(False),
    **dict.fromkeys(("prompt_logprobs", "stop_token_ids", "bad_words", "chat_template"), _only()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), _only()),
    **dict.fromkeys(("structured_outputs", "json_schema", "grammar", "format"), _only()),
}
# The handlers would only warn about them.
CHECKED_ONLY = UNSUPPORTED.keys()
CHECKS |= UNSUPPORTED
OF_GENERATION: dict[str, Check] = {
    "max_new_tokens": _integer(1, 2**31 - 1),
    "do_sample": _boolean,
    "temperature": _number(0, 2, above=True),
    "top_k": _integer(0, 2**31 - 1),
    "top_p": _number(0, 1, above=True),
    "min_p": _number(0, 1),
    "typical_p": _number(0, 1, above=True),
    "repetition_penalty": _number(0, 10, above=True),
    "bos_token_id": _tokens,
    "eos_token_id": _tokens,
    "pad_token_id": _tokens,
    "transformers_version": _anything,
}
FRACTIONS = {"temperature", "top_p", "min_p", "typical_p", "repetition_penalty"}

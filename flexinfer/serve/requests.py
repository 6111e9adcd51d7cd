"""What a client may ask of the server. Pure: the bytes of a body in, a checked body or a `Refusal`
out.

The handlers are transformers'. They trust what they are sent: a field that they do not know how to
honour is ignored, and a template, a generation config or a stop string of the client's own goes
straight into the process that the memory budget is for. So every body is held against the table at
the end of this module, and the handlers see no more than what was checked.

The rule: a field is refused by its name when an answer made without it would be wrong (`n`, log
probabilities, a JSON schema). Any other field is ignored, unknown ones too: labels, hints and
offers, without which the answer is the same, or as good.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from flexinfer.messages import shown

SMALLEST_BODY_BYTES = 64 << 10
# Of a text of as many tokens as fit, escapes, roles and tools included; our choice.
BODY_BYTES_PER_TOKEN = 32
# Continue's stop strings for a completion in an editor, words that begin a block of the language
# included, are about 30.
MAX_STOPS, MAX_STOP_CHARACTERS = 64, 256
MAX_BIASED_TOKENS = 300  # as OpenAI
MAX_TEMPLATE_OPTIONS = 16
MAX_TOKEN_IDS = 16
LEAST_TEMPERATURE = 1e-4  # below it logits overflow; the text is the greedy one
NOTHING: tuple[Any, ...] = (None, [], {})  # a field that holds this might as well be left out
TEXT_PARTS = ("text", "input_text", "output_text")
CHAT, COMPLETIONS, RESPONSES, LOAD = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/load_model",
)
MODELS = "/v1/models"
NEEDED = {CHAT: "messages", COMPLETIONS: "prompt", RESPONSES: "input", LOAD: "model"}
OF_SOME_PATHS = {  # elsewhere nothing would be made of them
    "messages": (CHAT,),
    "prompt": (COMPLETIONS,),
    "input": (RESPONSES,),
    "instructions": (RESPONSES,),
    "tools": (CHAT, RESPONSES),
    "chat_template_kwargs": (CHAT, RESPONSES),
}
# Fields that set an attribute of transformers' GenerationConfig; of two for the same, the later
# counts.
SETTINGS = {
    "max_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "stop": "stop_strings",
}
# Keywords of apply_chat_template that are not a template's own: a template of the client's would
# run here.
NOT_OF_TEMPLATES = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *(
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
    ),
    *(
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "load_audio_from_video",
        "num_frames",
        "sanitize_control_tokens",
    ),
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


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server has to offer."""

    model: str  # its name
    context: int  # tokens of a prompt and its answer
    vocab: int  # token ids
    chat: bool = True  # whether its tokenizer has a chat template

    @property
    def body_bytes(self) -> int:
        """The longest body that is read: no text that fits into the context is longer."""
        return max(SMALLEST_BODY_BYTES, BODY_BYTES_PER_TOKEN * self.context)

    def not_served(self, model: object) -> Refusal:
        """The refusal of another model."""
        message = f"the model {shown(model)} does not exist here; this server has {self.model!r}"
        return Refusal(404, message, "model_not_found", field="model")

    def too_long(self, prompt: str) -> Refusal:
        """The refusal of a prompt; `prompt` says how long it is."""
        return Refusal(
            400,
            f"this model's context is {self.context} tokens, for the prompt and the answer, and "
            f"{prompt}; send less, "
            f"or start the server with a larger --context",
            "context_length_exceeded",
        )


def checked(
    path: str, raw: bytes, limits: Limits, ignored: set[str] | None = None
) -> dict[str, Any]:
    """The body of a request to `path`, as far as the handlers are to see it; the names of the
    fields that are left out although nobody has looked at them are added to `ignored`. Raises
    Refusal.
    """
    body = {field: value for field, value in _parsed(raw).items() if value not in NOTHING}
    if body.get("model", limits.model) != limits.model:
        raise limits.not_served(body["model"])
    if NEEDED[path] not in body:
        _refuse(NEEDED[path], "is missing")
    if path in (CHAT, RESPONSES) and not limits.chat:
        _refuse(
            NEEDED[path],
            f"cannot be made into a prompt: {limits.model!r} has no chat template (it is a base "
            "model); "
            f"send a text to {COMPLETIONS}, as prompt",
        )
    if path == COMPLETIONS and isinstance(body["prompt"], list) and len(body["prompt"]) == 1:
        body["prompt"] = body["prompt"][0]
    if path == RESPONSES and isinstance(body.get("tools"), list):
        # Tools that OpenAI's machines run (web search) are an offer: the model answers without
        # them.
        hosted = [one for one in body["tools"] if _is_hosted(one)]
        body["tools"] = [one for one in body["tools"] if one not in hosted]
        if ignored is not None:
            ignored.update(f"tools of type {one['type']}" for one in hosted)
    for field, value in body.items():
        if path not in OF_SOME_PATHS.get(field, NEEDED):
            _refuse(field, f"is not a field of {path}, but of {' and '.join(OF_SOME_PATHS[field])}")
        if field in CHECKS and value not in NOTHING:
            CHECKS[field](field, value)
    for token in body.get("logit_bias", ()):
        if int(token) >= limits.vocab:
            _refuse("logit_bias", f"names token {token}; there are {limits.vocab}")
    if body.get("frequency_penalty") and "repetition_penalty" in body:
        _refuse("frequency_penalty", "is made a repetition penalty here; send one of the two")
    if body.pop("tool_choice", "auto") == "none":
        body.pop("tools", None)
    if path == RESPONSES:
        body.setdefault("stream", False)  # OpenAI's default; transformers' is to stream
    if ignored is not None:
        ignored.update(body.keys() - CHECKS.keys())
    kept = {field: body[field] for field in body if field in CHECKS.keys() - CHECKED_ONLY}
    if "generation_config" in kept:
        kept["generation_config"] = _generation_config(kept["generation_config"])
    return kept


def text_of(content: Any) -> str:
    """The text of a message's content; parts are joined as transformers joins them."""
    return content if isinstance(content, str) else " ".join(part["text"] for part in content or ())


def samples(body: Mapping[str, Any]) -> bool | None:
    """Whether a request wants its text sampled; None where it does not say, and the model's own way
    counts.
    """
    if "temperature" in body:
        return bool(body["temperature"] >= LEAST_TEMPERATURE)
    narrowed = body.get("top_p", 1) < 1 or body.get("typical_p", 1) < 1
    return True if narrowed or body.get("top_k", 0) > 0 or body.get("min_p", 0) > 0 else None


def settings(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a checked body sets in a GenerationConfig, on any path: each of transformers' handlers
    sets a part of it.
    """
    found = {name: body[field] for field, name in SETTINGS.items() if field in body}
    found |= {name: float(value) for name, value in found.items() if name in FRACTIONS}
    if body.get("frequency_penalty"):
        # As transformers' server takes it.
        found["repetition_penalty"] = 1.0 + body["frequency_penalty"]
    if "top_k" in found:
        found["top_k"] = max(found["top_k"], 0)
    if "logit_bias" in body:
        found["sequence_bias"] = {
            (int(token),): float(bias) for token, bias in body["logit_bias"].items()
        }
    if (sampled := samples(body)) is not None:
        found["do_sample"] = sampled
    return found


def _parsed(raw: bytes, what: str = "the body") -> dict[str, Any]:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=constant)
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    # Also of lone surrogates, which no tokenizer takes.
    except (ValueError, RecursionError) as error:
        raise Refusal(
            400, f"{what} is no JSON in UTF-8: {type(error).__name__}: {error}"[:300]
        ) from None
    if not isinstance(body, dict):
        raise Refusal(400, f"{what} is {shown(body)}; it has to be a JSON object")
    return body


def _generation_config(text: str) -> str:
    """The part of a generation config that a client may set, as JSON (`transformers chat` sends all
    of it).
    """
    if not isinstance(text, str):
        _refuse("generation_config", "has to be JSON in a string")
    config = {
        name: value
        for name, value in _parsed(text.encode(), "generation_config").items()
        if value is not None
    }
    for name, value in config.items():
        if name not in OF_GENERATION:
            _refuse(
                "generation_config",
                f"sets {shown(name)}; there are {', '.join(sorted(OF_GENERATION))}",
            )
        OF_GENERATION[name](f"generation_config.{name}", value)
        if name in FRACTIONS:
            config[name] = float(value)  # generate() takes no whole number for some
    config.pop("transformers_version", None)
    return json.dumps(config)


# ---- checks of one field: (name, value) -> None, or Refusal

Check = Callable[[str, Any], None]


def _refuse(field: str, complaint: str) -> NoReturn:
    raise Refusal(400, f"{field} {complaint}", field=field)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(low: float, high: float, *, above: bool = False) -> Check:
    """From `low` to `high`; with `above`, more than `low`."""

    def check(field: str, value: Any) -> None:
        if not _is_number(value) or not low <= value <= high or (above and value == low):
            _refuse(
                field,
                f"is {shown(value)}; it has to be {'above' if above else 'from'} {low:g} to "
                f"{high:g}",
            )

    return check


def _integer(low: int, high: int) -> Check:
    def check(field: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            _refuse(field, f"is {shown(value)}; it has to be a whole number from {low} to {high}")

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
            _refuse(field, f"is {shown(value)}, which this server cannot do{there}")

    return check


def _boolean(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        _refuse(field, f"is {shown(value)}; it has to be true or false")


def _text(field: str, value: Any) -> None:
    if not isinstance(value, str):
        _refuse(field, f"is {shown(value)}; it has to be a string")


def _stop(field: str, value: Any) -> None:
    stops = [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or not 1 <= len(stops) <= MAX_STOPS
        or not all(isinstance(one, str) and 1 <= len(one) <= MAX_STOP_CHARACTERS for one in stops)
    ):
        _refuse(
            field, f"has to be 1 to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
        )


def _logit_bias(field: str, value: Any) -> None:
    if (
        not isinstance(value, dict)
        or len(value) > MAX_BIASED_TOKENS
        or not all(token.isascii() and token.isdigit() and len(token) < 10 for token in value)
        or not all(_is_number(bias) and -100 <= bias <= 100 for bias in value.values())
    ):
        _refuse(
            field,
            f"has to name at most {MAX_BIASED_TOKENS} token ids, each with a number from -100 to "
            "100",
        )


def _template_options(field: str, value: Any) -> None:
    if not isinstance(value, dict) or len(value) > MAX_TEMPLATE_OPTIONS:
        _refuse(field, f"has to be an object of at most {MAX_TEMPLATE_OPTIONS} options")
    for name, option in value.items():
        if name in NOT_OF_TEMPLATES or not name.isidentifier():
            _refuse(field, f"sets {shown(name)}, which is no option of a chat template")
        if not isinstance(option, str | int | float | bool | None):
            _refuse(f"{field}.{name}", "has to be a string, a number or a boolean")


def _objects(field: str, value: Any) -> Sequence[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        _refuse(field, "has to be a list of at least one object")
    return value


def _is_hosted(tool: Any) -> bool:
    """Whether a tool is one that the server would use by itself; functions and custom tools are the
    client's.
    """
    return isinstance(tool, dict) and tool.get("type") not in (None, "function", "custom")


def _tools(field: str, value: Any) -> None:
    for tool in _objects(field, value):
        function = tool.get("function", tool)
        if tool.get("type") != "function" or not isinstance(function, dict):
            _refuse(field, f"has one of type {shown(tool.get('type'))}; functions are all there is")
        _text(f"{field}.function.name", function.get("name"))


def _content(field: str, value: Any) -> None:
    if value in (None, []) or isinstance(value, str):
        return
    for part in _objects(field, value):
        if part.get("type") not in TEXT_PARTS:
            _refuse(
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
    if isinstance(arguments, str):  # empty: some clients' word for none
        arguments = function["arguments"] = _parsed(
            (arguments or "{}").encode(), f"{field}.arguments"
        )
    if not isinstance(arguments, dict):
        _refuse(field, "have to be functions with a name and arguments, an object in JSON")
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
            _refuse(field, f"has an item of type {shown(kind)}, which this server cannot read")


def _parts_of(field: str, item: dict[str, Any]) -> Sequence[dict[str, Any]]:
    return _objects(f"{field}.content", item["content"]) if item.get("content") else []


def _text_format(field: str, value: Any) -> None:
    if not isinstance(value, dict) or value.get("format", {"type": "text"}) != {"type": "text"}:
        _refuse(field, f"is {shown(value)}; free text is all there is")


def _include(field: str, value: Any) -> None:
    if any("logprobs" in one for one in value if isinstance(one, str)):
        _refuse(field, "has log probabilities, which this server cannot give")


def _tokens(field: str, value: Any) -> None:
    ids = value if isinstance(value, list) else [value]
    if not 1 <= len(ids) <= MAX_TOKEN_IDS:
        _refuse(field, f"has to be 1 to {MAX_TOKEN_IDS} token ids")
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
    "top_k": _integer(-1, 2**31 - 1),  # -1 and 0: all of them, as vLLM and llama.cpp say it
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
    "generation_config": _anything,  # checked when it is read
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
CHECKED_ONLY = UNSUPPORTED.keys()  # the handlers would only warn of them
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

"""What a client may ask of the server. Pure: the bytes of a body in, a checked body or a `Refusal`
out.

The handlers are transformers'. They trust what they are sent: a field that they do not know how to
honour is ignored, and a template, a generation config or a stop string of the client's own goes
straight into the process that the memory budget is for. So every body is held against the tables of
flexinfer.serve.fields, and the handlers see no more than what was checked.

The rule: a field is refused by its name when an answer made without it would be wrong (`n`, log
probabilities, a JSON schema). Any other field is ignored, unknown ones too: labels, hints and
offers, without which the answer is the same, or as good.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexinfer.messages import shown
from flexinfer.serve.fields import (
    CHECKED_ONLY,
    CHECKS,
    FRACTIONS,
    Refusal,
    checked_generation_config,
    is_hosted,
    parse,
    refuse,
)

SMALLEST_BODY_BYTES = 64 << 10
# Of a text of as many tokens as fit, escapes, roles and tools included; our choice.
BODY_BYTES_PER_TOKEN = 32
# Logits overflow below it; the text is the greedy one.
LEAST_TEMPERATURE = 1e-4
# Values that mean the same as leaving the field out.
NOTHING: tuple[Any, ...] = (None, [], {})
CHAT, COMPLETIONS, RESPONSES, LOAD = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/load_model",
)
MODELS = "/v1/models"
NEEDED = {CHAT: "messages", COMPLETIONS: "prompt", RESPONSES: "input", LOAD: "model"}
# Fields that only these paths use.
OF_SOME_PATHS = {
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


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server has to offer."""

    # Name of the model.
    model: str
    # Most tokens of a prompt and its answer.
    context: int
    # Number of token ids.
    vocab: int
    # Whether the tokenizer has a chat template.
    chat: bool = True

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
            f"{prompt}; send less, or start the server with a larger --context",
            "context_length_exceeded",
        )


def checked(
    path: str, raw: bytes, limits: Limits, ignored: set[str] | None = None
) -> dict[str, Any]:
    """The body of a request to `path`, as far as the handlers are to see it; the names of the
    fields that are left out although nobody has looked at them are added to `ignored`. Raises
    Refusal.
    """
    body = {field: value for field, value in parse(raw).items() if value not in NOTHING}
    if body.get("model", limits.model) != limits.model:
        raise limits.not_served(body["model"])
    if NEEDED[path] not in body:
        refuse(NEEDED[path], "is missing")
    if path in (CHAT, RESPONSES) and not limits.chat:
        refuse(
            NEEDED[path],
            f"cannot be made into a prompt: {limits.model!r} has no chat template (it is a base "
            f"model); send a text to {COMPLETIONS}, as prompt",
        )
    if path == COMPLETIONS and isinstance(body["prompt"], list) and len(body["prompt"]) == 1:
        body["prompt"] = body["prompt"][0]
    if path == RESPONSES and isinstance(body.get("tools"), list):
        # Tools that OpenAI's machines run (web search) are an offer: the model answers without
        # them.
        hosted = [one for one in body["tools"] if is_hosted(one)]
        body["tools"] = [one for one in body["tools"] if one not in hosted]
        if ignored is not None:
            ignored.update(f"tools of type {one['type']}" for one in hosted)
    for field, value in body.items():
        if path not in OF_SOME_PATHS.get(field, NEEDED):
            refuse(field, f"is not a field of {path}, but of {' and '.join(OF_SOME_PATHS[field])}")
        if field in CHECKS and value not in NOTHING:
            CHECKS[field](field, value)
    for token in body.get("logit_bias", ()):
        if int(token) >= limits.vocab:
            refuse("logit_bias", f"names token {token}; there are {limits.vocab}")
    if body.get("frequency_penalty") and "repetition_penalty" in body:
        refuse("frequency_penalty", "is made a repetition penalty here; send one of the two")
    if body.pop("tool_choice", "auto") == "none":
        body.pop("tools", None)
    if path == RESPONSES:
        # OpenAI's default; transformers streams by default.
        body.setdefault("stream", False)
    if ignored is not None:
        ignored.update(body.keys() - CHECKS.keys())
    kept = {field: body[field] for field in body if field in CHECKS.keys() - CHECKED_ONLY}
    if "generation_config" in kept:
        kept["generation_config"] = checked_generation_config(kept["generation_config"])
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

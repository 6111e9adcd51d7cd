"""What a client may ask: everything that is no request is a Refusal with a reason, and nothing else."""

import contextlib
import inspect
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from flexinfer.serve.requests import (
    CHAT,
    CHECKS,
    COMPLETIONS,
    LOAD,
    NEEDED,
    NOT_OF_TEMPLATES,
    OF_GENERATION,
    RESPONSES,
    Limits,
    Refusal,
    checked,
    samples,
)

LIMITS = Limits(model="small", context=128, vocab=300)
SAID: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def body(**fields: Any) -> bytes:
    return json.dumps({"messages": SAID} | fields).encode()


def refusal(path: str, raw: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        checked(path, raw, LIMITS)
    return caught.value


def test_a_plain_request_is_handed_on_as_it_is() -> None:
    asked = {"model": "small", "messages": SAID, "stream": True, "temperature": 0.5, "stop": ["x"], "seed": 3}
    assert checked(CHAT, json.dumps(asked).encode(), LIMITS) == asked


def test_hints_and_what_happens_anyway_are_dropped() -> None:
    hints: dict[str, Any] = {
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "stream_options": {"include_usage": True},
    }
    anyway: dict[str, Any] = {
        "n": 1,
        "logprobs": False,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
    }
    nothing: dict[str, Any] = {"stop": None, "tools": [], "logit_bias": {}}
    assert checked(CHAT, body(**hints, **anyway, **nothing), LIMITS) == {"messages": SAID}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n": 2}, "n is 2"),
        ({"n": True}, "n is True"),
        ({"logprobs": True}, "logprobs is True"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "above -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_completion_tokens": 10**400}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**65}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a" * 300]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"300": 1}}, "names token 300"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1000}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "no role"}]}, "role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
                ]
            },
            "JSON",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]}, "name"),
        ({"tools": [{"type": "retrieval"}]}, "retrieval"),
        ({"tools": "f"}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": False}}, "tokenize"),
        ({"chat_template_kwargs": {"deep": {"er": 1}}}, "deep"),
        ({"generation_config": '{"num_beams": 64}'}, "num_beams"),
        ({"generation_config": '{"max_new_tokens": -1}'}, "max_new_tokens"),
        ({"generation_config": "{"}, "JSON"),
        ({"generation_config": {"max_new_tokens": 1}}, "string"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_reason(fields: dict[str, Any], reason: str) -> None:
    found = refusal(CHAT, body(**fields))
    assert found.status == 400
    assert reason in str(found)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    assert refusal(CHAT, raw).status == 400


def test_another_model_is_not_found() -> None:
    found = refusal(CHAT, body(model="gpt-4"))
    assert (found.status, found.code) == (404, "model_not_found")
    assert refusal(LOAD, b'{"model": "gpt-4"}').status == 404


@pytest.mark.parametrize(
    ("given_input", "reason"),
    [
        ([{"type": "input_image", "image_url": "x"}], "input_image"),
        ([{"type": "item_reference", "id": "x"}], "item_reference"),
        ([{"type": "function_call", "name": "f", "arguments": "{}"}], "call_id"),
        ([{"role": "user", "content": [{"type": "input_file"}]}], "input_file"),
        (7, "input"),
    ],
)
def test_responses_read_text_alone(given_input: Any, reason: str) -> None:
    assert reason in str(refusal(RESPONSES, json.dumps({"input": given_input}).encode()))


def test_responses_are_whole_unless_a_stream_is_asked_for() -> None:
    asked = {"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}
    assert checked(RESPONSES, json.dumps(asked).encode(), LIMITS)["stream"] is False


def test_a_temperature_says_whether_to_sample() -> None:
    assert samples({}) is None
    assert samples({"temperature": 0, "top_p": 0.5}) is False
    assert samples({"temperature": 0.1}) is True
    assert samples({"top_p": 0.5}) is True


def test_no_option_of_a_template_reaches_the_tokenizer() -> None:
    parameters = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    assert parameters - {"self", "kwargs"} <= NOT_OF_TEMPLATES


@given(
    path=st.sampled_from(sorted(NEEDED)),
    fields=st.dictionaries(
        st.sampled_from(sorted({*CHECKS, "model", "chat_template_kwargs"})), VALUES, max_size=4
    ),
    settings=st.dictionaries(st.sampled_from(sorted(OF_GENERATION)), VALUES, max_size=3),
)
def test_any_json_is_checked_or_refused(path: str, fields: dict[str, Any], settings: dict[str, Any]) -> None:
    raw = json.dumps({NEEDED[path]: "x"} | fields | {"generation_config": json.dumps(settings)}).encode()
    found: Refusal | None = None
    kept: dict[str, Any] = {}
    try:
        kept = checked(path, raw, LIMITS)
    except Refusal as error:
        found = error
    if found is not None:
        assert str(found)
        assert found.status in (400, 404)
    assert set(kept) <= {*fields, NEEDED[path], "generation_config", "stream"}


@given(st.binary(max_size=64))
def test_any_bytes_are_refused_unless_they_ask_for_something(raw: bytes) -> None:
    with contextlib.suppress(Refusal):
        assert isinstance(checked(COMPLETIONS, raw, LIMITS)["prompt"], str | list)

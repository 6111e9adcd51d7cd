"""What a client may ask: everything that is no request is a Refusal with a reason, and nothing
else.
"""

import asyncio
import contextlib
import inspect
import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flexinfer.serve.fields import CHECKS, NOT_OF_TEMPLATES, OF_GENERATION, Refusal
from flexinfer.serve.generation import StopText, Text, Turn
from flexinfer.serve.requests import (
    CHAT,
    COMPLETIONS,
    LOAD,
    NEEDED,
    RESPONSES,
    Limits,
    checked,
    samples,
    settings,
)

LIMITS = Limits(model="small", context=128, vocab=300)
SAID: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def body(**fields: Any) -> bytes:
    return json.dumps({"messages": SAID} | fields).encode()


def refusal(path: str, raw: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        checked(path, raw, LIMITS)
    return caught.value


def test_a_plain_request_is_handed_on_as_it_is() -> None:
    asked = {
        "model": "small",
        "messages": SAID,
        "stream": True,
        "temperature": 0.5,
        "stop": ["x"],
        "seed": 3,
    }
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
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": "x"}, "min_p"),
        ({"typical_p": 0}, "typical_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1.1, "frequency_penalty": 0.5}, "frequency_penalty"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
        ),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"grammar": "root ::= 'a'"}, "grammar"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"stop_token_ids": [3]}, "stop_token_ids"),
        ({"repeat_penalty": 1.1}, "repeat_penalty"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"suffix": "x"}, "suffix"),
        ({"input": "x"}, "/v1/responses"),
        ({"prompt": "x"}, "/v1/completions"),
        ({"stop": ["a" * 300]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"300": 1}}, "names token 300"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1000}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "no role"}]}, "role"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "JSON",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}
                ]
            },
            "name",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "["}}],
                    }
                ]
            },
            "messages.tool_calls.arguments",
        ),
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
def test_what_cannot_be_done_is_refused_with_its_reason(
    fields: dict[str, Any], reason: str
) -> None:
    found = refusal(CHAT, body(**fields))
    assert found.status == 400
    assert reason in str(found)
    assert found.body["error"]["param"] == found.field
    assert found.field is None or str(found).startswith(found.field)


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


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_what_changes_no_answer_is_ignored_and_named(path: str) -> None:
    plain = {NEEDED[path]: SAID if path == CHAT else "x", "stream": True}
    hints: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "client_metadata": {"x-codex": "1"},
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "parallel_tool_calls": True,
        "stream_options": {"include_usage": True},
        "reasoning_effort": "low",
        "unheard_of": [1],
    }
    neutral: dict[str, Any] = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0.0,
        "frequency_penalty": None,
        "response_format": {"type": "text"},
        "suffix": "",
        "echo": False,
        "ignore_eos": False,
    }
    ignored: set[str] = set()
    raw = json.dumps(plain | hints | neutral | {"null": None}).encode()
    assert checked(path, raw, LIMITS, ignored) == plain
    assert ignored == set(hints)


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_base_model_names_the_path_that_it_has(path: str) -> None:
    base = Limits(model="base", context=128, vocab=300, chat=False)
    with pytest.raises(Refusal, match=r"'base' has no chat template.*/v1/completions") as caught:
        checked(path, json.dumps({NEEDED[path]: SAID}).encode(), base)
    assert caught.value.status == 400
    assert checked(COMPLETIONS, b'{"prompt": "x"}', base) == {"prompt": "x"}


def test_a_list_of_one_prompt_is_that_prompt() -> None:
    assert checked(COMPLETIONS, b'{"prompt": ["x"]}', LIMITS) == {"prompt": "x"}
    for several in ('["x", "y"]', "[1, 2]", "[[1, 2]]", "[1]"):
        assert refusal(COMPLETIONS, f'{{"prompt": {several}}}'.encode()).field == "prompt"


def test_a_developer_is_the_system() -> None:
    for path in (CHAT, RESPONSES):
        said = [{"role": "developer", "content": "be kind"}, *SAID]
        kept = checked(path, json.dumps({NEEDED[path]: said}).encode(), LIMITS)
        assert kept[NEEDED[path]] == [{"role": "system", "content": "be kind"}, *SAID]


def test_a_call_without_arguments_has_none() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
    raw = body(messages=[*SAID, {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert checked(CHAT, raw, LIMITS)["messages"][1]["tool_calls"][0]["function"]["arguments"] == {}


def test_tools_of_openais_machines_are_left_out() -> None:
    tools = [
        {"type": "web_search"},
        {"type": "function", "name": "shell", "strict": False, "parameters": {}},
    ]
    ignored: set[str] = set()
    raw = json.dumps({"input": "x", "tools": tools}).encode()
    assert checked(RESPONSES, raw, LIMITS, ignored)["tools"] == tools[1:]
    assert ignored == {"tools of type web_search"}
    custom = json.dumps({"input": "x", "tools": [{"type": "custom", "name": "patch"}]}).encode()
    assert "custom" in str(refusal(RESPONSES, custom))


def test_each_setting_has_the_meaning_of_generate() -> None:
    def of(**fields: Any) -> dict[str, Any]:
        return settings(checked(CHAT, body(**fields), LIMITS))

    assert of() == {}
    assert of(top_k=40) == {"top_k": 40, "do_sample": True}
    assert of(top_k=-1) == of(top_k=0) == {"top_k": 0}
    assert of(min_p=0) == {"min_p": 0.0}
    assert of(min_p=0.1, temperature=0) == {"min_p": 0.1, "do_sample": False}
    assert of(typical_p=0.5) == {"typical_p": 0.5, "do_sample": True}
    assert of(repetition_penalty=2) == of(frequency_penalty=1) == {"repetition_penalty": 2.0}
    assert isinstance(of(repetition_penalty=2)["repetition_penalty"], float)
    assert of(frequency_penalty=0, repetition_penalty=1.5) == {"repetition_penalty": 1.5}
    assert of(logit_bias={"7": -1}) == {"sequence_bias": {(7,): -1.0}}
    for length in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        assert of(**{length: 5}) == {"max_new_tokens": 5}
    assert of(max_tokens=9, max_completion_tokens=5) == {"max_new_tokens": 5}
    assert of(stop="a") == {"stop_strings": "a"}
    kept = checked(CHAT, body(generation_config='{"repetition_penalty": 2}'), LIMITS)
    assert kept["generation_config"] == '{"repetition_penalty": 2.0}'


# ---- stop strings


def pieces(stops: list[str], *given: str) -> tuple[list[str], bool]:
    """What is handed on for each piece, and in the end; whether a stop string has ended it."""
    text, out = StopText(stops), []
    for piece in given:
        out.append(text.feed(piece))
        if text.complete:
            return out, True
    return [*out, text.rest()], False


@pytest.mark.parametrize(
    ("stops", "given_pieces", "out", "complete"),
    [
        ([], ["ab", "c"], ["ab", "c", ""], False),
        (["b"], ["a", "b"], ["a", ""], True),
        (["ab"], ["a", "b"], ["", ""], True),
        (["abc"], ["a", "b", "d"], ["", "", "abd", ""], False),
        (["abc"], ["xa", "b"], ["x", "", "ab"], False),
        (["abc"], ["xabcy"], ["x"], True),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),
        (["abac", "bad"], ["a", "b", "a", "d"], ["", "", "", "a"], True),
        (["never", "cd", "bc"], ["a", "b", "c", "d"], ["a", "", ""], True),
        (["c", "abc"], ["a", "b", "c"], ["", "", ""], True),
        (["bc", "abcd"], ["abcd"], ["a"], True),
        (["\n\n"], ["a\n", "b\n", "\n"], ["a", "\nb", ""], True),
        (["é"], ["x", "é"], ["x", ""], True),
    ],
)
def test_a_stop_string_is_held_back_until_it_is_known(
    stops: list[str], given_pieces: list[str], out: list[str], complete: bool
) -> None:
    assert pieces(stops, *given_pieces) == (out, complete)


@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
def test_it_does_not_matter_how_a_text_is_cut_into_pieces(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    ends = [
        end for end in range(1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)
    ]
    befores = (text[: ends[0]].removesuffix(stop) for stop in stops) if ends else [text]
    expected = min(befores, key=len)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for given_pieces in (list(text), [text[a:b] for a, b in pairwise(places)]):
        out, complete = pieces(stops, *given_pieces)
        assert ("".join(out), complete) == (expected, bool(ends))


@pytest.mark.parametrize(
    ("stop", "expected", "used"),
    [
        ("!", "é", 3),
        ("😀", "é!", 7),
        ("!😀", "é", 7),
        ("€", "é!😀x", 9),
        ("<end>", "é!😀x€", 10),
        ("é", "", 2),
    ],
)
def test_a_stop_string_may_begin_and_end_within_a_tokens_bytes(
    stop: str, expected: str, used: int
) -> None:
    """Tokens that are parts of characters, one with the end of a character and the beginning of the
    next, and a special one.
    """
    parts = [b"\xc3", b"\xa9", b"!", b"\xf0", b"\x9f", b"\x98", b"\x80", b"x\xe2\x82", b"\xac"]
    alphabet = bytes_to_unicode()
    names = ["".join(alphabet[byte] for byte in part) for part in parts]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    loop = asyncio.new_event_loop()
    handed_on: list[str] = []
    turn = Turn(loop, prompt_tokens=1)
    text = Text(turn, tokenizer, [stop], keep_special=False, emit=handed_on.append)
    ids, done = [0], False
    while not done:
        ids.append(len(ids) - 1)
        done = bool(text(torch.tensor([ids]), None)[0])
    text.end()
    assert ("".join(handed_on), turn.new_tokens) == (expected, used)
    loop.close()


def test_a_temperature_says_whether_to_sample() -> None:
    assert samples({}) is None
    assert samples({"temperature": 1e-45}) is False
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
def test_any_json_is_checked_or_refused(
    path: str, fields: dict[str, Any], settings: dict[str, Any]
) -> None:
    raw = json.dumps(
        {NEEDED[path]: "x"} | fields | {"generation_config": json.dumps(settings)}
    ).encode()
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

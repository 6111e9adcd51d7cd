"""The server as its clients have it: openai's, LangChain's, `transformers chat`, and rude ones."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from served import CALL, Brake, Served, make_caller, make_talker, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexinfer.serve.gate
import flexinfer.serve.server
from flexinfer.streaming.reader import FileReader, ReadError

SAID: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talker(tmp_path_factory.mktemp("served") / "talker")


@pytest.fixture(scope="module")
def brake() -> Brake:
    return Brake()


@pytest.fixture(scope="module")
def served(talker: Path, brake: Brake) -> Iterator[Served]:
    with serving(talker, queue=2, progress=brake) as server:
        yield server


@pytest.fixture(autouse=True)
def _released(brake: Brake) -> Iterator[None]:
    """A test that fails leaves no pass held."""
    yield
    brake.go.set()


def expected(path: Path, new_tokens: int, prompt: str | None = None, **settings: Any) -> str:
    """What stock transformers says, greedily: to SAID, or after `prompt`."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path).eval()
    if prompt is None:
        inputs = tokenizer.apply_chat_template(
            SAID, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    text = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **settings)
    return str(tokenizer.decode(text[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


# ---- the text


def test_chat_says_what_generate_says(served: Served, talker: Path) -> None:
    answer = served.client().chat.completions.create(model="talker", messages=SAID, max_tokens=20)
    assert answer.choices[0].message.content == expected(talker, 20)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (
        20,
        answer.usage.prompt_tokens + 20,
    )


def test_a_stream_says_the_same_token_by_token(served: Served, talker: Path) -> None:
    stream = served.client().chat.completions.create(
        model="talker", messages=SAID, max_tokens=20, stream=True
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(pieces) == expected(talker, 20)
    assert len(pieces) == 20
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20


@pytest.mark.parametrize("stream", [False, True])
def test_completions_go_on_from_a_prompt(served: Served, talker: Path, stream: bool) -> None:
    made: Any = served.client().completions.create(
        model="talker", prompt="once", max_tokens=12, stream=stream
    )
    text = "".join(chunk.choices[0].text for chunk in made) if stream else made.choices[0].text
    assert text == expected(talker, 12, "once")


def test_responses(served: Served, talker: Path) -> None:
    client = served.client()
    answer = client.responses.create(model="talker", input="hello", max_output_tokens=16)
    assert answer.output_text == expected(talker, 16)
    assert answer.usage is not None
    assert answer.usage.output_tokens == 16
    events = list(
        client.responses.create(model="talker", input="hello", max_output_tokens=16, stream=True)
    )
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected(talker, 16)
    assert events[-1].type == "response.completed"


def said(made: Any, stream: bool) -> tuple[str, str | None, int]:
    """Text, reason of its end and its tokens by the usage, of an answer of /v1/chat/completions."""
    chunks = list(made) if stream else [made]
    last = chunks[-1].choices[0]
    text = "".join(
        (chunk.choices[0].delta if stream else last.message).content or "" for chunk in chunks
    )
    return text, last.finish_reason, chunks[-1].usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("begin", "end", "more"),
    [
        (5, 8, ["never"]),
        (0, 1, []),  # at the very start: there is no text
        (0, 3, []),
        (5, 8, [(3, 7)]),  # the other one is complete first
        (5, 8, [(7, 8), "x" * 256]),  # both at the same token: the longer one
        (18, 20, []),  # at the last token that may come
    ],
)
def test_a_stop_string_ends_the_text_before_it(
    served: Served, talker: Path, stream: bool, begin: int, end: int, more: list[Any]
) -> None:
    whole = expected(talker, 20)
    stops = [one if isinstance(one, str) else whole[slice(*one)] for one in more] + [
        whole[begin:end]
    ]
    ends = min(whole.index(stop) + len(stop) for stop in stops if stop in whole)
    text = min((whole[:ends].removesuffix(stop) for stop in stops), key=len)
    made: Any = served.client().chat.completions.create(
        model="talker", messages=SAID, max_tokens=20, stop=stops, stream=stream
    )
    assert said(made, stream) == (text, "stop", ends)


@pytest.mark.parametrize("stream", [False, True])
def test_the_beginning_of_a_stop_string_is_text_where_it_does_not_go_on(
    served: Served, talker: Path, stream: bool
) -> None:
    whole = expected(talker, 20)
    stops = [whole[3:5] + "\t", whole[17:] + "\t"]
    made: Any = served.client().chat.completions.create(
        model="talker", messages=SAID, max_tokens=20, stop=stops, stream=stream
    )
    assert said(made, stream) == (whole, "length", 20)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_of_responses(served: Served, talker: Path, stream: bool) -> None:
    whole = expected(talker, 16)
    made: Any = served.client().responses.create(
        model="talker",
        input="hello",
        max_output_tokens=16,
        stream=stream,
        extra_body={"stop": whole[6:9]},
    )
    events = list(made) if stream else []
    answer = events[-1].response if stream else made
    if stream:
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == answer.output_text
    assert (answer.output_text, answer.usage.output_tokens) == (whole[:6], 9)


def test_sampling_is_repeatable_by_its_seed(served: Served, talker: Path) -> None:
    def text(**options: Any) -> str | None:
        answer = served.client().chat.completions.create(
            model="talker", messages=SAID, max_tokens=16, **options
        )
        return answer.choices[0].message.content

    first, again, other = (text(temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first != expected(talker, 16)
    assert text(temperature=0) == expected(talker, 16)
    assert text(logit_bias={"5": 100}) == "!" * 16  # the token of that character
    assert text(temperature=1.5, extra_body={"top_k": 1}) == expected(talker, 16)
    assert text(temperature=1.5, extra_body={"min_p": 1}) == expected(talker, 16)
    narrow = text(temperature=1.5, seed=1, extra_body={"top_k": 3, "min_p": 0.1})
    assert narrow not in (first, expected(talker, 16))


@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses"])
def test_settings_of_generate_have_its_meaning_on_every_path(
    served: Served, talker: Path, path: str
) -> None:
    settings = {"repetition_penalty": 3, "logit_bias": {"7": 100, "9": 98.5}}
    prompt: dict[str, Any] = {
        "chat/completions": {"messages": SAID},
        "responses": {"input": "hello"},
    }
    sent = prompt.get(path, {"prompt": "once"}) | settings | {"max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{served.url}/{path}", json=sent).json()
    if path == "responses":
        text = answer["output"][0]["content"][0]["text"]
    else:
        choice = answer["choices"][0]
        text = choice["text"] if path == "completions" else choice["message"]["content"]
    assert text == expected(
        talker,
        8,
        "once" if path == "completions" else None,
        repetition_penalty=3.0,
        sequence_bias={(7,): 100.0, (9,): 98.5},
    )


def test_more_tokens_than_there_is_room_for_end_the_text_there(
    served: Served, talker: Path
) -> None:
    answer = served.client().chat.completions.create(
        model="talker", messages=SAID, max_tokens=10_000
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 128
    assert answer.choices[0].message.content == expected(talker, answer.usage.completion_tokens)


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(make_caller(tmp_path_factory.mktemp("served") / "caller"), context=512) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called(caller: Served, stream: bool) -> None:
    made: Any = caller.client().chat.completions.create(
        model="caller", messages=SAID, tools=[TOOL], stream=stream
    )
    if stream:
        chunks = list(made)
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        reason = chunks[-1].choices[0].finish_reason
    else:
        calls, reason = made.choices[0].message.tool_calls, made.choices[0].finish_reason
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("weather", {"city": "Oslo"})
    ]
    assert reason == "tool_calls"
    told: Any = [
        *SAID,
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    caller.client().chat.completions.create(model="caller", messages=told, tools=[TOOL])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ({"max_tokens": 1}, "<tool_call>", "length"),
        ({"max_tokens": 2}, "", "tool_calls"),  # all of it but its end
        ({"stop": "weather"}, '<tool_call>{"name": "', "stop"),
        ({"stop": ["}}"]}, f"<tool_call>{CALL[:-2]}", "stop"),
        ({"stop": ["</tool_call>"]}, "", "tool_calls"),
        ({"stop": ["<tool_call>"]}, "", "stop"),
        ({"stop": ["<|im_end|>"], "tool_choice": "none"}, "", "tool_calls"),
    ],
)
def test_a_call_that_is_cut_off_is_text(
    caller: Served, stream: bool, options: dict[str, Any], text: str, reason: str
) -> None:
    made: Any = caller.client().chat.completions.create(
        model="caller", messages=SAID, tools=[TOOL], stream=stream, **options
    )
    assert said(made, stream)[:2] == (text, reason)


def test_langchain(served: Served, caller: Served, talker: Path) -> None:
    options: dict[str, Any] = {"api_key": "none", "max_retries": 0}
    chat = ChatOpenAI(model="talker", base_url=served.url, temperature=0, max_tokens=16, **options)
    assert chat.invoke("hello").content == expected(talker, 16)
    assert "".join(str(chunk.content) for chunk in chat.stream("hello")) == expected(talker, 16)

    @tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return city

    bound = ChatOpenAI(model="caller", base_url=caller.url, temperature=0, **options).bind_tools(
        [weather]
    )
    answer: Any = bound.invoke("hello")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [
        ("weather", {"city": "Oslo"})
    ]


def test_transformers_chat(served: Served, talker: Path) -> None:
    command = [str(Path(sys.executable).with_name("transformers")), "chat", "talker", served.root]
    done = subprocess.run(
        [*command, "max_new_tokens=16", "do_sample=False"],
        input="hello\nn\n!exit\n",
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "0"},  # it takes a server on this machine for the Hub
    )
    assert done.returncode == 0, done.stderr
    assert "talker was already loaded" in done.stdout
    assert "16 tokens in" in done.stdout, "it had the usage"


LITELLM: dict[str, Any] = {  # what aider sends by it
    "messages": [
        {"role": "system", "content": "be kind", "name": "aider"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": None},
        {
            "role": "assistant",
            "content": "ho",
            "tool_calls": None,
            "function_call": None,
            "refusal": None,
        },
        {"role": "user", "content": "hello"},
    ],
    **{"temperature": 0, "top_p": 1, "n": 1, "stream_options": {"include_usage": True}},
    **{
        "max_tokens": 16,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "stop": None,
    },
    **{"response_format": None, "seed": None, "tools": None, "tool_choice": None, "logprobs": None},
    **{"user": "", "extra_headers": {}, "num_retries": 0, "metadata": None, "service_tier": "auto"},
}
OPEN_WEBUI: dict[str, Any] = {
    "messages": [{"role": "developer", "content": "be kind"}, *SAID],
    **{"max_completion_tokens": 16, "temperature": 0.0, "min_p": 0.05, "top_k": 40, "top_p": 0.9},
    **{
        "chat_id": "1",
        "session_id": "2",
        "features": {"web_search": False},
        "model_item": {"id": "x"},
    },
    **{
        "reasoning_effort": "medium",
        "keep_alive": None,
        "background_tasks": {"title_generation": False},
    },
}
CONTINUE: dict[str, Any] = {
    "messages": SAID,
    **{"max_tokens": 16, "temperature": 0, "stop": ["<|im_end|>", *(f"\n{n}" for n in range(30))]},
    **{"parallel_tool_calls": False, "prediction": None, "tools": [], "tool_choice": "auto"},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("sent", "messages"),
    [
        (LITELLM, [{"role": "system", "content": "be kind"}, *LITELLM["messages"][1:]]),
        (OPEN_WEBUI, [{"role": "system", "content": "be kind"}, *SAID]),
        (CONTINUE, SAID),
    ],
)
def test_what_clients_send_in_addition_changes_no_answer(
    served: Served, talker: Path, sent: dict[str, Any], messages: Any, stream: bool
) -> None:
    headers = {"authorization": "Bearer none", "content-type": "application/json; charset=utf-8"}
    answer = httpx.post(
        f"{served.url}/chat/completions",
        json=sent | {"model": "talker", "stream": stream},
        headers=headers,
    )
    assert answer.status_code == 200, answer.text
    plain = served.client().chat.completions.create(
        model="talker", messages=messages, max_tokens=16, temperature=0
    )
    if stream:
        *chunks, end = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert end == "[DONE]"
        deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
        text = "".join(delta.get("content", "") for delta in deltas)
    else:
        text = answer.json()["choices"][0]["message"]["content"]
    assert text == plain.choices[0].message.content


def test_codex(caller: Served) -> None:
    shell = {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object"}}
    sent: dict[str, Any] = {
        "model": "caller",
        "instructions": "You are Codex.",
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "<permissions>"}],
            },
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "hello"}],
            },
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "x"},
            {"type": "function_call", "name": "shell", "arguments": "{}", "call_id": "1"},
            {
                "type": "function_call_output",
                "call_id": "1",
                "output": [{"type": "input_text", "text": "ok"}],
            },
        ],
        "tools": [shell, {"type": "web_search", "external_web_access": False}],
        **{"tool_choice": "auto", "parallel_tool_calls": False, "store": False, "stream": True},
        **{
            "reasoning": {"effort": "medium", "summary": "auto"},
            "include": ["reasoning.encrypted_content"],
        },
        **{"prompt_cache_key": "k"},
        **{"text": {"verbosity": "low"}, "service_tier": "priority"},
    }
    with caller.client() as client:
        events = list(
            client.responses.create(**sent, extra_body={"client_metadata": {"x-codex": "1"}})
        )
    calls = [item for item in events[-1].response.output if item.type == "function_call"]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("weather", {"city": "Oslo"})
    ]


def test_instructions_come_before_what_the_system_says(served: Served, talker: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(talker)

    def tokens(messages: Any) -> int:
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])

    def sent(given_input: Any, **fields: Any) -> int:
        made = served.client().responses.create(
            model="talker", input=given_input, max_output_tokens=1, **fields
        )
        assert made.usage is not None
        return made.usage.input_tokens

    system = {"role": "system", "content": "12345"}
    both = {"role": "system", "content": "abc\n\n12345"}
    assert sent([system, *SAID], instructions="abc") == tokens([both, *SAID])
    assert sent("hello", instructions="12345") == tokens([system, *SAID])
    called: Any = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}
    output: Any = {"type": "function_call_output", "call_id": "1", "output": "sunny"}
    turns = [{"role": "assistant", "content": ""}, {"role": "tool", "content": "sunny"}]
    assert sent([called, output]) == tokens(turns)


def test_a_model_whose_name_has_slashes(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flexinfer.serve.server, "name_of", lambda model: "org/talker")
    with serving(talker) as server:
        client = server.client()
        assert client.models.retrieve("org/talker").id == "org/talker"
        assert httpx.get(f"{server.url}/models/org/talker/").json()["id"] == "org/talker"
        for other in ("talker", "org", "org/talker/x", "org//talker"):
            assert httpx.get(f"{server.url}/models/{other}").status_code == 404
        made = client.completions.create(model="org/talker", prompt="a", max_tokens=1)
        assert made.model == "org/talker"


def test_a_base_model_has_completions(
    talker: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(talker, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    with serving(base) as server:
        client = server.client()
        for ask in (
            lambda: client.chat.completions.create(model="base", messages=SAID),
            lambda: client.responses.create(model="base", input="hello"),
        ):
            with pytest.raises(openai.BadRequestError, match=r"no chat template.*/v1/completions"):
                ask()
        fields = {"client_metadata": {}, "unheard\x1b": 1, "user": "me"}
        for _ in range(2):
            made = client.completions.create(
                model="base", prompt=["once"], max_tokens=6, extra_body=fields
            )
            assert made.choices[0].text == expected(talker, 6, "once")
    lines = [line for line in capfd.readouterr().err.splitlines() if "ignored" in line]
    assert len(lines) == 1
    assert "unheard\\x1b, user" in lines[0]


# ---- with a draft

ROUND: Any = "round and round and round and "  # in which a lookup finds candidates


@pytest.fixture(scope="module")
def drafting(talker: Path, brake: Brake) -> Iterator[Served]:
    with serving(talker, draft="lookup", progress=brake) as server:
        yield server


def completed(
    server: Served, stream: bool, **options: Any
) -> tuple[str, str | None, int, list[str]]:
    """Text, reason of its end, its tokens by the usage, and its pieces."""
    made: Any = server.client().completions.create(
        model="talker", prompt=ROUND, stream=stream, **options
    )
    chunks = list(made) if stream else [made]
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices and chunk.choices[0].text]
    return (
        "".join(pieces),
        chunks[-1].choices[0].finish_reason,
        chunks[-1].usage.completion_tokens,
        pieces,
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_draft_changes_no_text_and_saves_passes(
    drafting: Served, talker: Path, brake: Brake, stream: bool
) -> None:
    counted = 'flexinfer_tokens_total{of="answer"}'
    completed(drafting, stream, max_tokens=1)  # what was never counted is not there
    for tokens in (1, 2, 3, 17, 80):
        before, passes = drafting.metric(counted), brake.passes
        text, reason, used, pieces = completed(drafting, stream, max_tokens=tokens)
        assert (text, reason, used) == (expected(talker, tokens, ROUND), "length", tokens)
        assert len(pieces) == (tokens if stream else 1)
        assert drafting.metric(counted) == before + tokens
    assert brake.passes - passes < 80 * 0.8


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_a_drafted_text_at_the_same_token(
    drafting: Served, talker: Path, stream: bool
) -> None:
    whole = expected(talker, 80, ROUND)  # a token is a character
    for place in range(30, 60):
        stop = whole[place : place + 2]
        ends = whole.index(stop) + len(stop)
        stops = [stop, stop[1] + "\t"]
        text, reason, used, _ = completed(drafting, stream, max_tokens=80, stop=stops)
        assert (text, reason, used) == (whole[: ends - len(stop)], "stop", ends)


def test_sampling_with_a_draft_is_repeatable_by_its_seed(drafting: Served) -> None:
    first, again, other = (
        completed(drafting, False, max_tokens=40, temperature=1.5, seed=seed)[0]
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_a_drafted_text_within_a_pass(
    drafting: Served, brake: Brake, stream: bool
) -> None:
    before = brake.passes
    brake.hold()
    with raw_request(drafting, {"prompt": ROUND, "max_tokens": 90, "stream": stream}):
        assert brake.held.wait(60)
    for _ in range(3):
        assert httpx.get(f"{drafting.root}/health").status_code == 200
    brake.go.set()
    wait_for(lambda: not drafting.metric("flexinfer_generating"))
    assert brake.passes - before <= 2


# ---- what else there is


def test_the_model_is_listed_and_the_server_healthy(served: Served) -> None:
    assert [model.id for model in served.client().models.list()] == ["talker"]
    assert served.client().models.retrieve("talker").id == "talker"
    with pytest.raises(openai.NotFoundError, match=r"'gpt-4' does not exist.*'talker'") as caught:
        served.client().models.retrieve("gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert httpx.get(f"{served.url}/models/").json() == httpx.get(f"{served.url}/models").json()
    assert httpx.head(f"{served.url}/models").status_code == 200
    assert httpx.get(f"{served.root}/health").json() == {"status": "ok"}


def test_metrics_count_what_was_done(served: Served, brake: Brake) -> None:
    before, tokens = (
        served.metric("flexinfer_passes_total"),
        served.metric('flexinfer_tokens_total{of="answer"}'),
    )
    passes = brake.passes
    served.client().completions.create(model="talker", prompt="a", max_tokens=5)
    assert served.metric("flexinfer_passes_total") == before + 5
    assert served.metric('flexinfer_tokens_total{of="answer"}') == tokens + 5
    assert brake.passes == passes + 5
    assert served.metric("flexinfer_budget_bytes") == 6 << 30
    assert served.metric("flexinfer_queue_places") == 2
    assert served.metric("flexinfer_peak_bytes") > 0


def test_a_line_of_the_log_for_each_request(
    talker: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(talker) as server:
        server.client().completions.create(model="talker", prompt="abc", max_tokens=4)
        httpx.post(f"{server.root}/%1b[31mred", content=b"{}")
        httpx.get(f"{server.root}/health")
    lines = capfd.readouterr().err.splitlines()
    assert (
        sum(
            "POST /v1/completions 200: 3 tokens in, 4 out" in line and "of the bound" in line
            for line in lines
        )
        == 1
    )
    assert not any("\x1b" in line or "/health" in line for line in lines)


# ---- rude clients

DEEP = '{"messages": ' + "[" * 50_000


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x" * 200}]},
            400,
            "128 tokens",
        ),
        ("/v1/completions", {"prompt": "x" * 128}, 400, "the prompt has 128"),
        ("/v1/responses", {"input": "x" * 200}, 400, "128 tokens"),
        ("/v1/completions", {"prompt": ""}, 400, "empty"),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt"),
        ("/v1/chat/completions", {"messages": SAID, "n": 3}, 400, "n is 3"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "float"}, 404, "/v1/completions"),
        ("/v1", {}, 404, "/v1/chat/completions"),
        ("/chat/completions", {"messages": SAID}, 404, "/v1/chat/completions"),
        ("/v1/chat/completions", {"messages": SAID, "model": "gpt-4"}, 404, "talker"),
        ("/v1/chat/completions", "{", 400, "JSON"),
        ("/v1/chat/completions", DEEP, 400, "JSON"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x" * 200_000}]},
            413,
            "65536 bytes",
        ),
        ("/load_model", {"model": "somebody/else"}, 404, "talker"),
        ("/load_model", {}, 400, "model is missing"),
        ("/reset", {}, 404, "no such thing"),
        ("/v1/audio/transcriptions", {}, 404, "no such thing"),
        ("/v1/systemone", {}, 404, "no such thing"),
        ("/../../etc/passwd", {}, 404, "no such thing"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    served: Served, path: str, body: Any, status: int, reason: str
) -> None:
    raw = body if isinstance(body, str) else json.dumps(body)
    answer = httpx.post(
        f"{served.root}{path}", content=raw, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status
    assert reason in answer.json()["error"]["message"]


def test_a_prompt_that_is_too_long_has_openais_code(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="context is 128 tokens") as caught:
        served.client().chat.completions.create(
            model="talker", messages=[{"role": "user", "content": "x" * 300}], stream=True
        )
    assert caught.value.code == "context_length_exceeded"


def test_other_kinds_of_body_are_refused_as_browsers_send_them_unasked(served: Served) -> None:
    answer = httpx.post(
        f"{served.url}/completions",
        content=b'{"prompt": "a"}',
        headers={"content-type": "text/plain"},
    )
    assert answer.status_code == 415
    assert "access-control-allow-origin" not in answer.headers
    asked = httpx.options(f"{served.url}/completions", headers={"origin": "http://evil.example"})
    assert asked.status_code == 404
    assert "access-control-allow-origin" not in asked.headers


def test_a_page_that_calls_this_machine_by_a_name_of_its_own_is_refused(served: Served) -> None:
    port = served.root.rpartition(":")[2]
    answer = httpx.get(f"{served.url}/models", headers={"host": f"evil.example:{port}"})
    assert answer.status_code == 421
    for part in (f"evil.example:{port}", "127.0.0.1, [::1], localhost", "--host 0.0.0.0"):
        assert part in answer.json()["error"]["message"]
    assert (
        httpx.get(f"{served.url}/models", headers={"host": f"localhost:{port}"}).status_code == 200
    )


def test_a_key(talker: Path) -> None:
    with serving(talker, api_key="sesame") as server:
        assert httpx.get(f"{server.root}/health").status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(f"{server.root}{path}").status_code == 401
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="guess").completions.create(model="talker", prompt="a")
        made = server.client(api_key="sesame").completions.create(
            model="talker", prompt="a", max_tokens=2
        )
        assert made.usage is not None


def wait_for(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to be")


@contextlib.contextmanager
def raw_request(served: Served, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection on which /v1/completions has been asked for `body`."""
    host, port = served.root.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        yield connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_generation_within_a_pass(
    served: Served, brake: Brake, stream: bool
) -> None:
    before = brake.passes
    brake.hold()
    with raw_request(served, {"prompt": "a", "max_tokens": 100, "stream": stream}):
        assert brake.held.wait(60)
    for _ in range(3):  # the server has seen to what came before
        assert httpx.get(f"{served.root}/health").status_code == 200
    brake.go.set()
    wait_for(lambda: not served.metric("flexinfer_generating"))
    assert brake.passes - before <= 2
    text = served.client().completions.create(model="talker", prompt="a", max_tokens=100)
    assert text.usage is not None
    assert text.usage.completion_tokens == 100, "the memory of its keys and values is free again"


def test_requests_wait_in_a_line_of_bounded_length(
    served: Served, brake: Brake, talker: Path
) -> None:
    brake.hold()
    texts: dict[str, str] = {}

    def ask(prompt: str) -> None:
        made = served.client().completions.create(model="talker", prompt=prompt, max_tokens=6)
        texts[prompt] = made.choices[0].text

    asking = [threading.Thread(target=ask, args=(prompt,)) for prompt in ("ab", "cd", "ef")]
    for number, one in enumerate(asking):
        one.start()
        wait_for(lambda: served.metric("flexinfer_queue_waiting") == max(0, number))  # noqa: B023
    refused = httpx.post(f"{served.url}/completions", json={"prompt": "x"})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    brake.go.set()
    for one in asking:
        one.join()
    assert texts == {prompt: expected(talker, 6, prompt) for prompt in ("ab", "cd", "ef")}


def test_a_client_that_goes_away_while_it_waits_leaves_its_place(
    served: Served, brake: Brake
) -> None:
    brake.hold()
    before = brake.passes
    with raw_request(served, {"prompt": "a", "max_tokens": 3}) as first:
        assert brake.held.wait(60)
        with raw_request(served, {"prompt": "b", "max_tokens": 50}):
            wait_for(lambda: served.metric("flexinfer_queue_waiting") == 1)
        wait_for(lambda: served.metric("flexinfer_queue_waiting") == 0)
        brake.go.set()
        assert first.recv(4096).startswith(b"HTTP/1.1 200")
    wait_for(lambda: not served.metric("flexinfer_generating"))
    assert brake.passes == before + 3


def test_slow_and_silent_connections_are_closed(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flexinfer.serve.server, "HEAD_S", 0.3)
    monkeypatch.setattr(flexinfer.serve.gate, "BODY_S", 0.3)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
    body = b"content-type: application/json\r\ncontent-length: 50\r\n\r\n{"
    with serving(talker) as server:
        host, port = server.root.removeprefix("http://").split(":")
        for sent in (b"", head, head + body):
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(sent)
                received = b""
                with contextlib.suppress(ConnectionResetError):
                    while more := connection.recv(4096):
                        received += more
                assert (b" 408 " in received) == (sent == head + body)
        assert server.client().models.list().data


def test_more_connections_than_the_server_has_are_not_kept(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flexinfer.serve.server, "SPARE_CONNECTIONS", 4)
    with serving(talker, queue=0) as server, contextlib.ExitStack() as open_ones:
        host, port = server.root.removeprefix("http://").split(":")
        for _ in range(40):
            open_ones.enter_context(socket.create_connection((host, int(port)), timeout=30))
        last = open_ones.enter_context(socket.create_connection((host, int(port)), timeout=30))
        with contextlib.suppress(ConnectionResetError):
            assert last.recv(1) == b""
        open_ones.close()
        wait_for(lambda: httpx.get(f"{server.root}/health").status_code == 200)


@pytest.mark.parametrize("stream", [False, True])
def test_a_read_that_fails_is_said_and_the_next_request_goes_on(
    talker: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, broken = FileReader.read, threading.Event()

    def breaking(self: FileReader, *args: Any) -> int:
        if broken.is_set():
            raise ReadError('a disk that is "broken"')
        return read(self, *args)

    monkeypatch.setattr(FileReader, "read", breaking)
    with serving(talker, policy="none") as server:
        client, options = server.client(), {"model": "talker", "prompt": "a", "max_tokens": 100}
        broken.set()
        # of an error in a stream openai's client reads that it is there
        with pytest.raises(openai.APIError, match="during streaming" if stream else "ReadError"):
            list(
                client.completions.create(**options, stream=True)
            ) if stream else client.completions.create(**options)
        broken.clear()
        assert client.completions.create(**options).usage.completion_tokens == 100


def test_nothing_is_left_of_a_server(talker: Path) -> None:
    def held() -> tuple[list[str], int]:
        names = [one.name for one in threading.enumerate() if "AnyIO" not in one.name]
        return sorted(names), len(list(Path("/proc/self/fd").iterdir()))

    def ask() -> None:
        with serving(talker) as server, server.client() as client:
            client.completions.create(model="talker", prompt="a", max_tokens=2)

    ask()  # what is imported once
    before = held()
    ask()
    wait_for(lambda: held() == before)


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(
    talker: Path, served: Served
) -> None:
    port = int(served.root.rpartition(":")[2])
    with pytest.raises(OSError, match=f"port {port}.*--port"), serving(talker, port=port):
        pass


@pytest.mark.parametrize(("option", "value"), [("queue", -1), ("grace_s", -1.0), ("api_key", "")])
def test_options_that_cannot_be(talker: Path, option: str, value: Any) -> None:
    with (
        pytest.raises(ValueError, match=option.removesuffix("_s")),
        serving(talker, **{option: value}),
    ):
        pass

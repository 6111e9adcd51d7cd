"""The command line says what a resident model says, and what it could not do in one line."""

import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf_models
import pytest
import torch
from small_model import CONFIG, add_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexinfer.cli.chat
import flexinfer.cli.generate
from flexinfer.cli.bars import Bars
from flexinfer.cli.chat import Conversation
from flexinfer.cli.doctor_facts import Facts, advice, better_threads
from flexinfer.cli.main import main
from flexinfer.cli.text import Decoding, engine_of, speed_line
from flexinfer.plan.planner import DEFAULT_WINDOW_BYTES
from flexinfer.sizes import format_size

MEMORY = "2GiB"


@pytest.fixture(scope="module")
def model_dir(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama that never ends by itself, with a tokenizer of bytes and a chat
    template.
    """
    return add_tokenizer(checkpoint("llama", **CONFIG), tmp_path_factory.mktemp("cli") / "model")


def resident_ids(path: Path, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """What stock transformers says, greedily."""
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([prompt_ids])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
    )
    return output[0, len(prompt_ids) :].tolist()


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from flexinfer.cli.main import main; main(['generate', '--help']); "
        "print({'torch', 'transformers', 'rich'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_generate_says_what_the_resident_model_says(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json(
        capsys, "generate", str(model_dir), "abc", "--memory", MEMORY, "--max-new-tokens", "12"
    )
    prompt_ids = AutoTokenizer.from_pretrained(model_dir)("abc")["input_ids"]
    assert result["token_ids"] == resident_ids(model_dir, prompt_ids, 12)
    assert (result["prompt_tokens"], result["tokens"], result["passes"]) == (3, 12, 12)
    assert result["peak_bytes"] <= result["budget_bytes"] == 2 << 30
    assert result["ratio"] == pytest.approx(result["tokens_per_s"] / result["bound_tokens_per_s"])


def test_a_draft_says_what_it_gave_and_plan_what_it_would_give(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = (
        str(model_dir),
        "abcabcabc",
        "--memory",
        MEMORY,
        "--max-new-tokens",
        "12",
        "--policy",
        "none",
    )
    result = run_json(capsys, "generate", *told, "--draft", "substitute")
    prompt_ids = AutoTokenizer.from_pretrained(model_dir)("abcabcabc")["input_ids"]
    assert result["token_ids"] == resident_ids(model_dir, prompt_ids, 12)
    assert result["draft"]["accepted"] == 12 - result["passes"] > 0
    assert result["draft_that_pays"] is None
    line = speed_line(result)
    assert f"{result['passes']} passes of {12 / result['passes']:.3g} tokens" in line
    assert f"draft substitute: {result['draft']['accepted']} of" in line
    plan = ("plan", str(model_dir), "--memory", MEMORY, "--draft", "auto")
    kinds = [(one["kind"], one["type"]) for one in run_json(capsys, *plan)["drafts"]]
    assert kinds == [(None, "q4_0"), ("lookup", "q4_0")], "a substitute of nothing is none"
    planned = run_json(capsys, *plan, "--policy", "none")
    kinds = [(one["kind"], one["type"]) for one in planned["drafts"]]
    assert kinds == [
        (None, "q4_0"),
        ("lookup", "q4_0"),
        ("substitute", "q4_0"),
        ("substitute", "q8_0"),
    ]
    assert sum(planned["parts_bytes"].values()) == 2 << 30
    assert main(["plan", str(model_dir), "--memory", MEMORY, "--draft", "lookup"]) == 0
    assert "draft lookup: " in capsys.readouterr().out


def test_generate_streams_the_text_to_stdout_and_the_speed_to_stderr(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        str(model_dir),
        "--max-new-tokens",
        "8",
        "--policy",
        "none",
        "--io-threads",
        "0",
        "--buffered",
    )
    text = run_json(capsys, "generate", *options, "from the argument")["text"]
    monkeypatch.setattr("sys.stdin", io.StringIO("from the argument"))
    assert main(["generate", *options]) == 0
    shown = capsys.readouterr()
    assert shown.out == text + "\n"
    for part in (
        "8 tokens",
        "tokens/s reading",
        "GB/s",
        "of the bound",
        "read per token",
        "peak",
        "limited by",
    ):
        assert part in shown.err
    assert len(shown.err.splitlines()) == 1


def test_streamed_bytes_are_reported(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(
        capsys,
        "generate",
        str(model_dir),
        "abc",
        "--policy",
        "none",
        "--io-threads",
        "0",
        "--max-new-tokens",
        "5",
    )
    assert result["streamed_bytes_per_pass"] == result["total_bytes_per_pass"]
    assert result["bytes_read"] >= 5 * result["streamed_bytes_per_pass"]
    # Rows of the embedding and the pages around each piece come on top.
    assert result["read_bytes_per_s"] == pytest.approx(
        result["tokens_per_s"] * result["streamed_bytes_per_pass"], rel=0.2
    )


def test_gigabytes_per_second_stand_beside_tokens_per_second_where_something_is_read() -> None:
    result = {
        "tokens": 8,
        "passes": 8,
        "first_token_s": 1.5,
        "tokens_per_s": 0.531,
        "bytes_per_token": 1 << 30,
        "read_bytes_per_s": 0.957e9,
        "streamed_bytes_per_pass": 1 << 30,
        "peak_bytes": 1 << 30,
        "budget_bytes": 1 << 30,
        "bound_tokens_per_s": 0.56,
        "ratio": 0.95,
        "bottleneck": "disk: waiting 90% of the time",
    }
    assert "then 0.531 tokens/s reading 0.957 GB/s, 0.95 of the bound (0.56)" in speed_line(result)
    assert speed_line(result).endswith("limited by disk")
    assert "GB/s" not in speed_line(result | {"streamed_bytes_per_pass": 0})


def test_verbose_says_where_the_budget_goes_and_what_made_it_slow(
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--memory", MEMORY, "--max-new-tokens", "4", "--policy", "none")
    for _ in range(2):  # the second run must not say everything twice
        assert main(["generate", str(model_dir), "abc", *options, "-v"]) == 0
        said = capsys.readouterr().err.splitlines()
        # A slow disk's advice.
        plan, why, speed = [one for one in said if "--draft auto" not in one]
        assert plan.startswith("budget 2.00 GiB: ")
        assert why.partition(":")[0] in {"disk", "kernels", "memory"}
        assert speed.startswith("4 tokens, ")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain"))
    assert main(["chat", str(model_dir), *options, "--verbose"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [
        line.split()[0] for line in lines if not line.startswith(("disk", "kernels", "memory"))
    ] == ["budget", "4", "4"]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_trace_writes_a_file_for_perfetto(
    command: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.json"
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert main([command, str(model_dir), "--max-new-tokens", "4", "--trace", str(file)]) == 0
    names = {entry["name"] for entry in json.loads(file.read_text())["traceEvents"]}
    assert {"pass", "compute lm_head", "budget", "resident"} <= names


def test_help_names_the_default_window(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"(default: {format_size(DEFAULT_WINDOW_BYTES).replace(' ', '')})" in shown


def test_lookup_changes_passes_and_not_the_text(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("generate", str(model_dir), "abc" * 8, "--max-new-tokens", "60")
    plain, guessed = run_json(capsys, *command), run_json(capsys, *command, "--draft", "lookup")
    assert guessed["token_ids"] == plain["token_ids"]
    assert guessed["passes"] < plain["passes"] == 60


def test_sampling_is_repeatable(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "generate",
        str(model_dir),
        "abc",
        "--max-new-tokens",
        "16",
        "--temperature",
        "5",
        "--top-p",
        "0.99",
    )
    first, again, other = (run_json(capsys, *command, "--seed", seed) for seed in ("1", "1", "2"))
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["generate", "{model}", ""], "prompt="),
        (["generate", "{model}", "x", "--memory", "4 bananas"], "'4 bananas' is not a size"),
        (["generate", "{model}", "x", "--memory", "10MiB"], "needs at least"),
        (["generate", "{model}", "x", "--policy", "best"], "policy='best' does not exist"),
        (["generate", "{model}", "x", "--window", "none"], "window='none'"),
        (["generate", "{model}", "x", "--io-threads", "-1"], "io_threads=-1"),
        (["generate", "{model}", "x", "--trace", "{empty}/nothing/run.json"], "cannot be written"),
        (["generate", "{model}", "abc", "--context", "4", "--max-new-tokens", "2"], "--context 5"),
        (["generate", "{model}", "x", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["generate", "{model}", "x", "--temperature", "-1"], "temperature=-1"),
        (["generate", "{model}", "x", "--top-p", "7"], "top_p=7"),
        (["chat", "{model}", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["generate", "{model}/nothing", "x"], "no such directory"),
        (["generate", "{empty}", "x"], "config.json is missing"),
        (["generate", "{bare}", "x"], "no tokenizer"),
        (["chat", "{untold}"], "no chat template"),
        (["plan", "{model}", "--memory", "10MiB"], "needs at least"),
        (["plan", "{empty}"], "config.json is missing"),
        (["quantize", "{model}", "{empty}"], "exists already"),
        (["quantize", "{empty}", "{empty}/copy"], "config.json is missing"),
        (["doctor", "{model}/nothing"], "is no directory"),
        (["doctor", "{empty}", "--size", "1000TiB"], "does not fit"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    argv: list[str],
    said: str,
    model_dir: Path,
    checkpoint: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    untold = shutil.copytree(model_dir, tmp_path / "untold")
    (untold / "chat_template.jinja").unlink()
    (tmp_path / "empty").mkdir()
    places = {
        "model": model_dir,
        "empty": tmp_path / "empty",
        "bare": checkpoint("llama"),
        "untold": untold,
    }
    assert main([one.format(**places) for one in argv]) == 2
    shown = capsys.readouterr()
    lines = shown.err.strip().splitlines()
    assert shown.out == ""
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert said in lines[0]


def conversation(model_dir: Path, model: Any, max_new_tokens: int) -> Conversation:
    decoding = Decoding(max_new_tokens=max_new_tokens)
    return Conversation(model, AutoTokenizer.from_pretrained(model_dir), decoding, Bars())


def test_chat_keeps_history_and_computes_only_what_is_new(
    model_dir: Path, load: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(model_dir, context=600)
    talk = conversation(model_dir, model, 10)
    questions = ["how are you? " * 8, "and now?", "why"]
    for number, question in enumerate(questions):
        before = engine_of(model).stats()["tokens"]
        answer = talk.ask(question)
        computed = engine_of(model).stats()["tokens"] - before
        tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        prompt = tokenizer.apply_chat_template(
            talk.turns[:-1], add_generation_prompt=True, return_dict=True
        )
        expected = resident_ids(model_dir, list(prompt["input_ids"]), 10)
        assert answer == tokenizer.decode(expected, skip_special_tokens=True)
        if number:
            assert computed < len(prompt["input_ids"])


def test_chat_keeps_its_turns_when_a_question_is_too_long(
    model_dir: Path, load: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = conversation(model_dir, load(model_dir, context=150), 16)
    talk.ask("hello")
    turns = list(talk.turns)
    assert talk.ask("x" * 200) == ""
    assert talk.turns == turns
    assert "does not fit into a context of 150 tokens" in capsys.readouterr().err
    talk.ask("again")
    assert talk.turns[:2] == turns


def test_chat_and_generate_say_when_a_text_ends_at_the_context(
    model_dir: Path, load: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = conversation(model_dir, load(model_dir, context=150), 400)
    assert talk.ask("hello")
    assert "the text ends at the context of 150 tokens" in capsys.readouterr().err
    assert talk.turns[-1]["role"] == "assistant"
    for options, tokens, said in (
        (["--context", "40"], 37, True),  # nobody has asked for 256
        (["--context", "40", "--max-new-tokens", "37"], 37, False),
        (["--max-new-tokens", "9"], 9, False),
    ):
        assert main(["generate", str(model_dir), "abc", *options]) == 0
        shown = capsys.readouterr().err
        assert f"{tokens} tokens" in shown
        assert ("the text ends at the context of 40 tokens" in shown) == said


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(
    model_dir: Path, load: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = conversation(model_dir, load(model_dir, context=150), 16)
    talk.ask("a" * 60)
    talk.ask("b" * 60)
    assert [turn["content"] for turn in talk.turns if turn["role"] == "user"] == ["b" * 60]
    assert "the oldest 2 turns" in capsys.readouterr().err
    assert talk.ask("c" * 200) == ""
    assert "does not fit" in capsys.readouterr().err
    assert talk.ask("d")


def test_chat_leaves_at_exit_and_at_the_end_of_input(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for script, answers in (("hello\n/exit\nnever asked\n", 1), ("hello\n\nagain", 2), ("", 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO(script))
        assert main(["chat", str(model_dir), "--max-new-tokens", "4"]) == 0
        assert capsys.readouterr().err.count("tokens, first after") == answers


class Presses:
    """A streamer during which a signal comes some times, at the third call: the prompt and two
    tokens.
    """

    def __init__(self, times: int, number: int = signal.SIGINT) -> None:
        self.times, self.number, self.pieces = times, number, 0

    def put(self, value: torch.Tensor) -> None:
        self.pieces += 1
        for _ in range(self.times if self.pieces == 3 else 0):
            signal.raise_signal(self.number)

    def end(self) -> None: ...


def test_json_of_a_run_that_sigterm_stopped_is_complete(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(flexinfer.cli.generate, "Nowhere", lambda: Presses(1, signal.SIGTERM))
    assert main(["generate", str(model_dir), "abc", "--max-new-tokens", "20", "--json"]) == 143
    result = json.loads(capsys.readouterr().out)
    assert len(result["token_ids"]) == result["tokens"] <= 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_ends_a_chat_at_once(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        flexinfer.cli.chat, "text_streamer", lambda *_, **__: Presses(2, signal.SIGTERM)
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nnever asked"))
    assert main(["chat", str(model_dir), "--max-new-tokens", "20"]) == 143
    assert capsys.readouterr().err.splitlines() == ["stopped"]


@pytest.mark.parametrize(("times", "said"), [(1, "stopped; "), (2, "stopped at once")])
def test_ctrl_c_stops_the_answer_and_not_the_chat(
    times: int,
    said: str,
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streamers = [Presses(times), Presses(0)]
    monkeypatch.setattr(
        flexinfer.cli.chat, "text_streamer", lambda *args, **options: streamers.pop(0)
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n/exit\n"))
    assert main(["chat", str(model_dir), "--max-new-tokens", "20"]) == 0
    shown = capsys.readouterr().err
    assert said in shown
    # The first answer was cut, the second was not.
    assert shown.count("20 tokens, first after") == 1


def test_plan_accounts_for_every_byte_of_the_budget(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = run_json(capsys, "plan", str(model_dir), "--memory", MEMORY)
    assert sum(facts["parts_bytes"].values()) == facts["budget_bytes"] == 2 << 30
    assert min(facts["parts_bytes"].values()) >= 0
    roles = {row["role"]: row for row in facts["roles"]}
    # Layers x hidden x intermediate x float32.
    assert roles["mlp.down_proj"]["nbytes"] == 4 * 64 * 192 * 4
    assert sum(row["nbytes"] for row in facts["roles"]) == facts["total_bytes"]
    budgets = facts["budgets"]
    assert [one["budget_bytes"] for one in budgets] == sorted(
        one["budget_bytes"] for one in budgets
    )
    streamed = [one["streamed_bytes"] for one in budgets]
    assert streamed == sorted(streamed, reverse=True)
    assert budgets[-1]["streamed_bytes"] == 0
    assert all(
        one["predicted_tokens_per_s"] <= one["bound_tokens_per_s"] * 1.001 for one in budgets
    )


def test_plan_of_a_mixture_says_what_a_token_needs_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = gguf_models.write_model(tmp_path, "qwen3_moe", ("Q8_0",))
    facts = run_json(capsys, "plan", str(written.file), "--memory", MEMORY)
    of_one = 3 * 256 * 256 // 32 * 34
    assert facts["experts"]["total_bytes"] == 3 * 12 * of_one
    assert facts["experts"]["token_bytes"] == 3 * 3 * of_one
    assert facts["experts"]["hit_rate"] == 1.0
    assert sum(facts["parts_bytes"].values()) == facts["budget_bytes"]
    assert facts["total_bytes"] == facts["experts"]["token_bytes"] + sum(
        r["nbytes"] for r in facts["roles"]
    )
    rates = [one["expert_hit_rate"] for one in facts["budgets"]]
    assert rates == sorted(rates)
    assert rates[0] < 1
    assert all(
        one["predicted_tokens_per_s"] <= one["bound_tokens_per_s"] * 1.001
        for one in facts["budgets"]
    )
    assert main(["plan", str(written.file), "--memory", MEMORY]) == 0
    assert "100% hits" in capsys.readouterr().out


def test_plan_shows_tables(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model_dir), "--policy", "none"]) == 0
    shown = capsys.readouterr().out
    for text in ("KV cache", "mlp.gate_proj", "tokens/s predicted", "policy none"):
        assert text in shown


@pytest.mark.parametrize("kind", ["q4_0", "Q8_0"])
def test_quantize_makes_a_copy_that_generates(
    kind: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    report = run_json(capsys, "quantize", str(model_dir), str(copy), "--type", kind)
    assert report["nbytes"] < report["source_bytes"]
    assert len(report["packed"]) == 4 * 7 + 2
    assert report["architecture"] == "llama"
    result = run_json(capsys, "generate", str(copy), "abc", "--max-new-tokens", "4")
    assert result["tokens"] == 4


def test_doctor_measures_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = run_json(capsys, "doctor", str(tmp_path), "--size", "32MiB")
    assert list(tmp_path.iterdir()) == []
    assert facts["path"] == str(tmp_path)
    assert all(speed > 0 for speed in facts["buffered_bytes_per_s"].values())
    assert facts["kernel_s"]["bfloat16"]["1"] > 0
    assert facts["advice"]


FACTS = Facts(
    cpu="A CPU",
    cores=4,
    load=0.0,
    torch_threads=4,
    vector_width="AVX2",
    ggml="0.26.0, libggml-cpu-haswell.so",
    memory_bytes=8 << 30,
    path="/models",
    file_system="ext4",
    free_disk_bytes=100 << 30,
    direct_works=True,
    direct_note="",
    write_bytes_per_s=1e9,
    direct_bytes_per_s={1: 0.9e9, 2: 1e9, 4: 1e9},
    buffered_bytes_per_s={1: 0.8e9, 2: 0.8e9, 4: 0.8e9},
    kernel_bytes_per_s={"bfloat16": 10e9, "Q4_K": 5e9},
    kernel_s={"bfloat16": {1: 1e-3, 64: 1e-2}, "Q4_K": {1: 1e-3, 64: 1e-1}},
    lock_limit_bytes=None,
    lock_works=True,
    cgroups_writable=True,
)


def test_advice_of_a_good_machine_is_what_to_expect_and_no_more() -> None:
    assert advice(FACTS) == [
        "Every GB of weights that is not in memory costs 1.00 s a token.",
        "A 7B model in 4 bit (3.8 GB), half of it in memory: at most 0.53 tokens/s; in memory as "
        "a whole 1.3.",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"load": 6.0}, "busy"),
        ({"direct_works": False, "direct_note": "refused", "direct_bytes_per_s": {}}, "page cache"),
        ({"buffered_bytes_per_s": {1: 3e9, 2: 3e9, 4: 3e9}}, "--buffered"),
        ({"direct_bytes_per_s": {1: 1e9, 2: 1e9, 4: 2e9}}, "--io-threads 4"),
        ({"kernel_bytes_per_s": {"bfloat16": 10e9, "Q4_K": 0.5e9}}, "The Q4_K kernel"),
        ({"memory_bytes": 1 << 30}, "Only 1.00 GiB"),
        ({"lock_works": False, "lock_limit_bytes": 8 << 20}, "ulimit -l"),
        ({"cgroups_writable": False}, "unlimited"),
        ({"free_disk_bytes": 3 << 30}, "of disk are free"),
    ],
)
def test_advice_names_what_holds_a_machine_back(change: dict[str, Any], said: str) -> None:
    lines = advice(dataclasses.replace(FACTS, **change))
    assert any(said in line for line in lines)
    assert not any(said in line for line in advice(FACTS))


def test_more_threads_are_advised_only_where_they_matter() -> None:
    assert better_threads({1: 1.0, 2: 1.0, 4: 1.1}) is None
    assert better_threads({1: 2.0, 2: 1.0, 4: 1.1}) == 1

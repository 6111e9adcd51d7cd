"""Tokenizers: AutoTokenizer's to the last id, in a memory that was measured, so that the budget
holds with real ones too.

Runs in control groups are fresh processes in groups of exactly their budget, with real tokenizers
of 32,000 to 262,000 tokens.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import flexinfer.cache_dir
import flexinfer.formats.child
from experiments.cgroups import find_place
from experiments.limits import Limits
from experiments.real import as_gguf, real_tokenizer, with_tokenizer
from experiments.smollm2 import DownloadError
from flexinfer import CheckpointError
from flexinfer.formats.tokenizer import load_tokenizer, prepare_tokenizer
from flexinfer.formats.tokenizer_form import FACTS, WORDS
from flexinfer.formats.tokenizer_maker import TEXTS, difference, observe

MIB = 1 << 20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, for this process and for those that it starts."""
    monkeypatch.setattr(flexinfer.cache_dir, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setenv("FLEXINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(path: Path, backend: Tokenizer, **options: Any) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, **options).save_pretrained(path)
    return path


def byte_pairs() -> Tokenizer:
    """Spaces and line ends in merges, added tokens within the vocabulary and behind it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *letters, "ab", "abab", "\u0120a"]
    merges = [("a", "b"), ("ab", "ab"), ("\u0120", "a")]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, merges, ignore_merges=True)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<mask>"])
    backend.add_tokens(["new word", "<think>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.enable_truncation(64)
    return backend


def unigram() -> Tokenizer:
    words = [
        ("<unk>", 0.0),
        ("\u2581", -1.0),
        ("\u2581a", -1.5),
        *((chr(code), -3.0 - code / 999) for code in range(33, 127)),
    ]
    backend = Tokenizer(models.Unigram(words, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def whole_words() -> Tokenizer:
    backend = Tokenizer(
        models.WordLevel({"[UNK]": 0, "a": 1, "Hello": 2, "world": 3, "!": 4}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "byte pairs": (
        byte_pairs,
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "padding_side": "left"},
    ),
    "unigram": (unigram, {"unk_token": "<unk>", "truncation_side": "left", "model_max_length": 77}),
    "whole words": (whole_words, {"unk_token": "[UNK]", "clean_up_tokenization_spaces": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_autotokenizers_in_all_that_it_does(tmp_path: Path, cache: Path, kind: str) -> None:
    backend, options = KINDS[kind]
    template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    path = made(tmp_path / "model", backend(), chat_template=template, **options)
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert type(ours) is type(theirs)
    assert difference(observe(theirs, tmp_path), observe(ours, tmp_path)) is None
    names = set(vars(theirs)) - {"_tokenizer", "_vocab", "_merges"}
    assert {name: repr(vars(ours)[name]) for name in names} == {
        name: repr(vars(theirs)[name]) for name in names
    }
    facts = json.loads(next(cache.glob(f"tokenizers/*/{FACTS}")).read_text())
    assert facts["stock"] is None
    assert bool(list(cache.glob(f"tokenizers/*/{WORDS}"))) == (kind == "byte pairs")


def test_a_published_one_whose_class_and_file_differ() -> None:
    """Llama 2's: its class cuts a leading space in another way than tokenizer.json, and pads on the
    other side.
    """
    path = _or_skip(real_tokenizer, "llama2")
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    by_file = PreTrainedTokenizerFast.from_pretrained(path)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours(" leading space")["input_ids"] != by_file(" leading space")["input_ids"]
    assert ours.padding_side == theirs.padding_side != by_file.padding_side


def test_where_the_form_differs_the_stock_one_is_used(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path / "model", byte_pairs(), chat_template="x")
    form = prepare_tokenizer(path).form
    facts = json.loads((form / FACTS).read_text())
    (form / FACTS).write_text(json.dumps(facts | {"stock": "ids differ"}))
    (form / WORDS).write_bytes(bytes((form / WORDS).stat().st_size))  # it is not looked at
    assert (
        observe(load_tokenizer(path), tmp_path)["ids"]
        == observe(AutoTokenizer.from_pretrained(path), tmp_path)["ids"]
    )


def test_it_is_made_again_where_its_files_change_or_what_was_kept_is_damaged(
    tmp_path: Path, cache: Path
) -> None:
    path = made(tmp_path / "model", byte_pairs(), chat_template="one")
    first = prepare_tokenizer(path)
    copy = shutil.copytree(path, tmp_path / "copy")
    assert prepare_tokenizer(copy).form == first.form, "the same files, elsewhere"
    assert load_tokenizer(copy).name_or_path == str(copy)
    words = first.form / WORDS
    words.write_bytes(words.read_bytes()[:-7])
    assert (
        load_tokenizer(path)("abab")["input_ids"]
        == AutoTokenizer.from_pretrained(path)("abab")["input_ids"]
    )
    (path / "chat_template.jinja").write_text("two")
    assert load_tokenizer(path).chat_template == "two"
    assert len(list((cache / "tokenizers").iterdir())) == 2, "nothing unfinished is left"


def test_files_that_make_none_are_a_problem_only_where_it_is_used(
    tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    prepared = prepare_tokenizer(tmp_path)
    assert prepared.memory.peak_bytes == 0
    with pytest.raises(
        CheckpointError, match=r"no tokenizer can be made of the files .*load one of your own"
    ):
        prepared.load()


def test_first_uses_at_the_same_time(tmp_path: Path, cache: Path) -> None:
    path = made(tmp_path / "model", byte_pairs())
    program = (
        "import sys; from pathlib import Path; from flexinfer.formats.tokenizer import "
        "load_tokenizer; print(load_tokenizer(Path(sys.argv[1]))('abab')['input_ids'])"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    expected = str(AutoTokenizer.from_pretrained(path)("abab")["input_ids"])
    assert [run.communicate()[0].strip() for run in runs] == [expected] * 2
    assert len(list((cache / "tokenizers").iterdir())) == 1


def test_a_full_disk_and_a_process_that_was_killed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path / "model", byte_pairs())
    run_apart = flexinfer.formats.child.run_apart

    def full(module: str, *arguments: str) -> Any:
        if str(cache) in arguments[-1]:
            raise OSError(28, "No space left on device")
        return run_apart(module, *arguments)

    def killed(module: str, *arguments: str) -> Any:
        return subprocess.CompletedProcess([], -9, "", "")

    monkeypatch.setattr(flexinfer.formats.child, "run_apart", killed)
    with pytest.raises(
        CheckpointError, match=r"takes \d+ MiB of memory, once.*run `flexinfer plan`"
    ):
        prepare_tokenizer(path)
    assert not list(cache.glob("tokenizers/*"))
    monkeypatch.setattr(flexinfer.formats.child, "run_apart", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        prepared = prepare_tokenizer(path)
    assert prepared.load()("ab")["input_ids"]
    assert not list(cache.glob("tokenizers/*"))


# ---- in control groups of exactly the budget

PROGRAM = """
import json, sys, torch, flexinfer
path, memory, use = sys.argv[1:]
try:
    model = flexinfer.from_pretrained(path, int(memory))
except flexinfer.BudgetError as error:
    sys.exit(str(error))
if use == "late":
    ids = torch.tensor([[5, 6, 7]])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
tokenizer = model.flexinfer.tokenizer
inputs = tokenizer(" The sky is blue because", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
print(tokenizer.decode(output[0]))
"""
USES = ("early", "late", "generate", "chat", "serve")


def _or_skip(get: Any, name: str) -> Path:
    try:
        path: Path = get(name)
    except DownloadError as error:
        pytest.skip(str(error))
    return path


def _in_group() -> None:
    place = find_place()
    if place.memory is None:
        pytest.skip(f"no right to limit memory here: {place.why_not}")


def use(
    how: str, path: Path, memory: int, limits: Limits | None = None
) -> subprocess.CompletedProcess[str]:
    """Make text with a model in a process of its own."""
    ours = [sys.executable, "-m", "flexinfer", how, str(path)]
    options = ["--memory", str(memory)]
    text = ["--max-new-tokens", "4"]
    command = {
        "generate": [*ours, " The sky is blue because", *options, *text],
        "chat": [*ours, *options, *text],
        "serve": [*ours, *options, "--port", "0"],
    }.get(how, [sys.executable, "-c", PROGRAM, str(path), str(memory), how])
    command = limits.command(command) if limits else command
    if how != "serve":
        return subprocess.run(
            command, input="Hi\nAnd now?\n", capture_output=True, text=True, check=False
        )
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said, answer = "", ""
    for line in process.stderr:
        said += line
        if (url := re.search(r"(http://\S+/v1)", line)) is not None:
            body = {
                "model": path.name,
                "messages": [{"role": "user", "content": "Hi"}],
                "max_tokens": 4,
            }
            answer = _post(f"{url[1]}/chat/completions", body)
            process.send_signal(signal.SIGTERM)
            break
    said += process.stderr.read()
    return subprocess.CompletedProcess(
        command, 0 if process.wait() == 143 else process.returncode, answer, said
    )


def _post(url: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return str(json.loads(response.read())["choices"][0]["message"]["role"])


@pytest.mark.parametrize(
    ("name", "get", "how", "more_mib"),
    [
        ("gemma3", with_tokenizer, "late", 0),
        ("gemma3", as_gguf, "serve", 0),
        ("qwen3", as_gguf, "generate", 8),
        ("llama2", with_tokenizer, "chat", 0),
    ],
)
def test_the_budget_that_is_named_is_accepted_and_is_enough(
    name: str, get: Any, how: str, more_mib: int
) -> None:
    """By the same call in a group of exactly that size: never refused afterwards, never killed."""
    _in_group()
    path = _or_skip(get, name)
    refused = use(how, path, 1 * MIB)
    named = re.search(r"at least (\d+) bytes", refused.stdout + refused.stderr)
    assert named, refused.stderr[-2000:]
    memory = int(named[1]) + more_mib * MIB
    with Limits(memory_bytes=memory) as limits:
        done = use(how, path, memory, limits)
        usage = limits.usage()
    assert usage.oom_kills == 0
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    assert usage.peak_memory_bytes is not None
    assert usage.peak_memory_bytes <= memory


def test_a_first_use_in_a_small_group_says_what_is_needed(tmp_path: Path, cache: Path) -> None:
    """Nothing is in the cache: the process that prepares the tokenizer must not take the one that
    waits for it with it.
    """
    _in_group()
    path = _or_skip(with_tokenizer, "gemma3")
    with Limits(memory_bytes=450 * MIB) as limits:
        done = use("early", path, 450 * MIB, limits)
        assert limits.usage().oom_kills == 0
    assert done.returncode == 1
    assert re.search(r"takes \d+ MiB of memory, once.*run `flexinfer plan`", done.stderr), (
        done.stderr[-2000:]
    )

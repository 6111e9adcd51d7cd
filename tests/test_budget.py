"""The budget is the truth: in a cgroup of exactly `memory`, the smallest budget that is accepted is
enough to the last token.

Runs are fresh processes, as users have them: what a process takes before it loads a model is part
of the budget.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.cgroups import find_place
from experiments.gguf import make_gguf
from experiments.limits import Limits
from experiments.model_config import ExpertsConfig, ModelConfig, ShapeConfig
from experiments.synth import default_cache_dir, make_checkpoint

SHAPE = ShapeConfig(
    hidden=1024, intermediate=2816, layers=4, heads=16, kv_heads=4, vocab=16_384, tie=False
)
RUN = """
import json, sys
path, memory, context, prompt_tokens, new_tokens, repeats, system, draft = json.loads(sys.argv[1])
if system == "stock":
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path).eval()
else:
    import flexinfer
    try:
        model = flexinfer.from_pretrained(path, memory, context=context, draft=draft)
    except flexinfer.BudgetError as error:
        print(json.dumps({"refused": int(str(error).split("at least ")[1].split()[0])}))
        raise SystemExit
import psutil, torch
ids = torch.randint(3, 16_000, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
resident = []
for _ in range(repeats):
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                          do_sample=False, eos_token_id=None, pad_token_id=0)
    resident.append(psutil.Process().memory_info().rss)
report = {"tokens": text[0, prompt_tokens:].tolist(), "resident_bytes": resident}
if system == "flexinfer":
    plan, stats = model.flexinfer.plan, model.flexinfer.stats()
    report |= {"peak_bytes": stats["peak_bytes"], "drafted": stats.get("drafted"),
               "streamed_bytes": plan.streamed_bytes, "total_bytes": plan.total_bytes,
               "fixed": repr(plan.overheads), "window_bytes": plan.window_bytes}
print(json.dumps(report))
"""


def make_big() -> Path:
    """A Llama of 160 MB in bf16, random weights; kept in FlexInfer's cache directory."""
    return make_checkpoint(
        ModelConfig(name="test-budget", kind="synthetic", formats=["bf16"], shape=SHAPE),
        "bf16",
        progress=False,
    )


@pytest.fixture(scope="module")
def big() -> Path:
    return make_big()


def run(
    path: Path,
    memory: int,
    context: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int = 1,
    system: str = "flexinfer",
    limits: Limits | None = None,
    draft: str | None = None,
) -> dict[str, Any]:
    """One process that loads and generates; what it reports. Its death fails the test."""
    arguments = [str(path), memory, context, prompt_tokens, new_tokens, repeats, system, draft]
    command = [sys.executable, "-c", RUN, json.dumps(arguments)]
    done = subprocess.run(
        limits.command(command) if limits else command, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


# A long prompt, so that activations and KV cache are used to the full, and a short one, where
# loading itself is the peak.
@pytest.mark.parametrize(("context", "prompt_tokens"), [(512, 480), (32, 8)])
def test_smallest_budget_is_enough_in_a_cgroup_of_that_size(
    big: Path, context: int, prompt_tokens: int
) -> None:
    place = find_place()
    if place.memory is None:
        pytest.skip(f"no right to limit memory here: {place.why_not}")
    new_tokens = context - prompt_tokens
    expected = run(big, 0, context, prompt_tokens, new_tokens, system="stock")
    memory = run(big, 1 << 20, context, prompt_tokens, new_tokens)["refused"]
    with Limits(memory_bytes=memory) as limits:
        assert limits.applied.memory_bytes == memory, "whole pages"
        report = run(big, memory, context, prompt_tokens, new_tokens, limits=limits)
        usage = limits.usage()
    assert "refused" not in report, "the budget that a refusal names is accepted"
    spare_bytes = report["total_bytes"] - report["streamed_bytes"]
    assert spare_bytes < 12 << 20, (
        "the budget that is named streams all but its slack and what the process is smaller by "
        "this time"
    )
    assert report["tokens"] == expected["tokens"]
    assert usage.oom_kills == 0
    assert usage.peak_memory_bytes is not None
    assert usage.peak_memory_bytes <= memory
    assert report["peak_bytes"] <= memory
    assert report["peak_bytes"] >= 0.8 * memory, "the plan asks for much more than is used"
    print({"memory_bytes": memory, "cgroup_peak_bytes": usage.peak_memory_bytes} | report)


@pytest.mark.parametrize(
    ("draft", "context", "prompt_tokens"),
    [("substitute", 512, 480), ("lookup", 64, 8), ("model", 64, 8)],
)
def test_smallest_budget_is_enough_with_a_draft(
    big: Path, draft: str, context: int, prompt_tokens: int
) -> None:
    """As above: candidates, their scores, the substitute or draft model are in the budget."""
    place = find_place()
    if place.memory is None:
        pytest.skip(f"no right to limit memory here: {place.why_not}")
    told, new_tokens = draft, context - prompt_tokens
    if draft == "model":
        shape = replace(SHAPE, layers=1, hidden=256, intermediate=704, heads=4)
        small = ModelConfig(
            name="test-budget-draft", kind="synthetic", formats=["bf16"], shape=shape
        )
        told = str(make_checkpoint(small, "bf16", progress=False))
    memory = run(big, 1 << 20, context, prompt_tokens, new_tokens, draft=told)["refused"]
    with Limits(memory_bytes=memory) as limits:
        report = run(big, memory, context, prompt_tokens, new_tokens, limits=limits, draft=told)
        usage = limits.usage()
    assert "refused" not in report, "the budget that a refusal names is accepted"
    assert len(report["tokens"]) == new_tokens
    assert report["drafted"] >= 8
    assert usage.oom_kills == 0
    assert usage.peak_memory_bytes is not None
    assert max(usage.peak_memory_bytes, report["peak_bytes"]) <= memory
    assert report["peak_bytes"] >= 0.8 * memory, "the plan asks for much more than is used"


LENGTHS = """
import gc, json, sys, flexinfer, torch
from flexinfer.memory.process import anonymous_bytes
from flexinfer.memory.heap import trim_heap
model = flexinfer.from_pretrained(sys.argv[1], "2GiB", context=256)

def score(lengths):
    for tokens in lengths:
        with torch.no_grad():
            model(torch.ones(1, tokens, dtype=torch.long), logits_to_keep=1)
    gc.collect()
    trim_heap()
    return anonymous_bytes()

before = score(range(2, 20))
print(json.dumps(score(range(20, 60)) - before))
"""


def test_prompts_of_many_lengths_do_not_pile_up_kernels(big: Path) -> None:
    """Where torch compiles a bf16 kernel for each length: 40 lengths of 10 shapes would leave 200
    MB.
    """
    done = subprocess.run(
        [sys.executable, "-c", LENGTHS, str(big)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) < 48 << 20


def test_generating_again_takes_no_more_memory(big: Path) -> None:
    """The KV cache is set aside when the model is loaded."""
    report = run(big, 2 << 30, 256, 16, 8, repeats=5)
    assert max(report["resident_bytes"][1:]) <= report["resident_bytes"][0] + (4 << 20)


MIXTURE = ShapeConfig(512, 512, 4, 8, 2, 4096, experts=ExpertsConfig(16, 2, "llama"))
MANY_PROMPTS = """
import json, sys, flexinfer, torch
path, memory, resizes, new_tokens = json.loads(sys.argv[1])
try:
    model = flexinfer.from_pretrained(path, memory, context=512 + new_tokens)
except flexinfer.BudgetError as error:
    print(json.dumps({"refused": int(str(error).split("at least ")[1].split()[0])}))
    raise SystemExit
texts = []
for number, tokens in enumerate((1, 64, 512, 9)):
    ids = torch.randint(3, 4096, (1, tokens), generator=torch.Generator().manual_seed(number))
    if resizes:
        model.flexinfer.resize(resizes[number % len(resizes)])
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                          do_sample=False, eos_token_id=None, pad_token_id=0)
    texts.append(text[0, tokens:].tolist())
plan, stats = model.flexinfer.plan, model.flexinfer.stats()
experts = {"slots": plan.experts.slots, "experts_bytes": plan.experts.total_bytes}
print(json.dumps({"texts": texts} | experts | stats))
"""


def run_many_prompts(
    path: Path, memory: int, resizes: list[int], limits: Limits | None = None, new_tokens: int = 50
) -> dict[str, Any]:
    command = [
        sys.executable,
        "-c",
        MANY_PROMPTS,
        json.dumps([str(path), memory, resizes, new_tokens]),
    ]
    done = subprocess.run(
        limits.command(command) if limits else command, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.fixture(scope="module")
def mixture() -> Path:
    return make_gguf(ModelConfig("test-mixture", shape=MIXTURE), "q4_k", default_cache_dir())


@pytest.fixture(scope="module")
def mixture_texts(mixture: Path) -> dict[str, Any]:
    """What it says in plenty of memory."""
    return run_many_prompts(mixture, 4 << 30, [])


@pytest.mark.parametrize("more_bytes", [0, 16 << 20])
def test_a_mixture_generates_200_tokens_in_a_cgroup_of_its_budget(
    mixture: Path, mixture_texts: dict[str, Any], more_bytes: int
) -> None:
    """Prompts of 1 to 512 tokens; in the larger of the two budgets it is resized between them."""
    place = find_place()
    if place.memory is None:
        pytest.skip(f"no right to limit memory here: {place.why_not}")
    memory = run_many_prompts(mixture, 1 << 20, [])["refused"]
    with Limits(memory_bytes=memory + more_bytes) as limits:
        assert limits.applied.memory_bytes is not None
        budget = limits.applied.memory_bytes
        smaller = budget - more_bytes // 2
        report = run_many_prompts(mixture, budget, [smaller, budget] if more_bytes else [], limits)
        usage = limits.usage()
    assert "refused" not in report, "the budget that a refusal names is accepted"
    assert report["texts"] == mixture_texts["texts"]
    assert sum(map(len, report["texts"])) == 200
    assert report["expert_misses"] > mixture_texts["expert_misses"], "experts were read again"
    assert usage.oom_kills == 0
    assert usage.peak_memory_bytes is not None
    assert usage.peak_memory_bytes <= budget
    assert report["peak_bytes"] <= budget
    assert report["peak_bytes"] >= 0.8 * budget, "the plan asks for much more than is used"

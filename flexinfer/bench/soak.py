"""A soak: random models, budgets and calls, each in a control group of exactly its budget; nothing may be killed, wrong, hung or left.

A case is drawn from (seed, number) alone. One process computes its reference, stock transformers with all weights resident (for weights in ggml's
blocks, which that cannot multiply, flexinfer with all of them resident), and learns the smallest budget. Another, in a memory group of exactly the case's budget and no swap, loads the model with flexinfer and makes
the same calls, one after another. Outputs are compared token by token, logits bit by bit. A call that is to be refused must be refused before
anything runs. One JSON line a case goes to the record; finished cases are skipped, so that a soak can be gone on with; those that ended badly are run again.

    python -m flexinfer.bench.soak 1000 --record results/reliability/soak.jsonl
    python -m flexinfer.bench.soak --large --record results/reliability/large.jsonl
"""

import argparse
import gc
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from flexinfer.bench.limits import Limits
from flexinfer.bench.provenance import provenance
from flexinfer.bench.synth import default_cache_dir

if TYPE_CHECKING:
    from flexinfer.plan.budget import PassShape

TIMEOUT_S = 900
REFUSED_LOADS = (
    3  # times in a row that a process may be larger than the one before, which named the smallest budget
)
BAD = ("killed", "wrong", "hung", "leak", "error")
FAMILIES: dict[str, dict[str, Any]] = {  # transformers' configuration class, and what a shape does not say
    "llama": {"config": "LlamaConfig"},
    "mistral": {"config": "MistralConfig", "sliding_window": 64},
    "qwen2": {"config": "Qwen2Config"},
    "qwen3": {"config": "Qwen3Config", "head_dim": 64},
    "gemma2": {"config": "Gemma2Config", "head_dim": 64, "sliding_window": 64},
    "gemma3": {"config": "Gemma3TextConfig", "head_dim": 64, "sliding_window": 64},
    "phi3": {"config": "Phi3Config"},
    "gpt_neox": {"config": "GPTNeoXConfig"},
    "gpt2": {"config": "GPT2Config"},
    "opt": {"config": "OPTConfig"},
    "mixtral": {"config": "MixtralConfig", "num_local_experts": 8},
    "qwen3_moe": {"config": "Qwen3MoeConfig", "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4},
}
POLICIES = ("balanced", "balanced", "unbalanced", "attention-first", "ffn-first", "algorithm1", "none")
CALLS_OF_A_CASE = 16
NO_GENERATIONS = ("tokenize", "resize")  # calls that give no text and no logits
DRAFTED = 3  # tokens that a draft model says ahead
MIXTURES = ("mixtral", "qwen3_moe")  # of which no substitute is made
BLOCKS = (None, None, "q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_nl")  # what a checkpoint is quantised to
DRAFTS_BY = ("substitute", "substitute", "lookup", "auto")  # from_pretrained(draft=...)
DRAFTED_SHARE = 0.4  # of cases
NEAR = {
    "float32": 1e-3,
    "float16": 0.05,
    "bfloat16": 0.3,
}  # logits between which kernels for one row and several may choose otherwise
SHARES = (0.0, 0.15, 0.5, 0.8, 1.0)
RESIDENT_MEMORY = "12GiB"  # holds any case whole
LARGE_SEED = -1  # of the cases that are not drawn


@dataclass(frozen=True, slots=True)
class Call:
    """One thing asked of a loaded model."""

    kind: str
    batch: int = 1
    prompt_tokens: int = 0
    new_tokens: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """A model, how it is loaded, and what is asked of it."""

    seed: int
    number: int
    family: str
    hidden: int
    layers: int
    vocab: int
    tie: bool
    file_dtype: str
    dtype: str
    policy: str
    window: str | None
    io_threads: int
    direct: bool
    context: int
    logits_to_keep: int
    tokenizer: bool  # whether the checkpoint has one, and it is used
    share: float  # of the weights, on top of the smallest budget
    calls: tuple[Call, ...]
    blocks: str | None = None  # ggml's type, of a GGUF file
    draft: str | None = None


def draw(seed: int, number: int) -> Case:
    """Case `number` of a soak. Pure."""
    chance = random.Random(f"{seed}.{number}")
    family = list(FAMILIES)[number % len(FAMILIES)]
    file_dtype = chance.choice(("bfloat16", "float16", "float32", "float32"))
    dtype = chance.choice(("auto", "auto", "auto", "float32", "bfloat16"))
    computes_in = file_dtype if dtype == "auto" else dtype
    hidden = chance.choice((512, 768, 1024))
    context = chance.choice((96, 256, 768)) if computes_in == "float32" else chance.choice((64, 160))
    keep = chance.choice((1, 4, 12))
    tokenizer = chance.random() < 0.5
    calls = []
    for i in range(CALLS_OF_A_CASE):
        kind = chance.choice(tuple(CALLS))
        if (kind == "draft" and keep <= DRAFTED) or (kind == "tokenize" and not tokenizer):
            kind = "greedy"
        batch = chance.choice((2, 3, 4)) if kind in ("batch", "beams") else 1
        room = context // batch
        new = chance.randint(1, min(12, room // 3))
        longest = room - new - (8 if kind in ("lookup", "draft") else 0)
        tokens = longest if chance.random() < 0.3 else chance.randint(1, longest)
        calls.append(Call(kind, batch, tokens, new, seed=i))
    case = Case(
        seed=seed,
        number=number,
        family=family,
        hidden=hidden,
        layers=chance.randint(2, 5),
        vocab=chance.choice((8_192, 32_000, 151_936, 262_144)),
        tie=chance.random() < 0.5,
        file_dtype=file_dtype,
        dtype=dtype,
        policy=chance.choice(POLICIES),
        window=chance.choice((None, None, "9MiB", "64MiB", "2 layers")),
        io_threads=chance.choice((0, 1, 2, 2, 4)),
        direct=chance.random() < 0.8,
        context=context,
        logits_to_keep=keep,
        tokenizer=tokenizer,
        share=chance.choice((*SHARES, round(chance.random(), 2))),
        calls=tuple(calls),
        blocks=chance.choice(BLOCKS),
    )
    larger = case.blocks in (None, "q5_k", "q6_k", "q8_0")  # than substitutes of 4.5 bits
    drafts = DRAFTS_BY if larger and family not in MIXTURES else ("lookup", "auto")
    return replace(case, draft=chance.choice(drafts) if chance.random() < DRAFTED_SHARE else None)


def large() -> list[Case]:
    """Twelve combinations with large vocabularies and a context of 1024: what a user with a real model asks for first."""
    shapes: tuple[dict[str, Any], ...] = (
        {"family": "qwen2", "vocab": 151_936, "tie": True},
        {"family": "llama", "vocab": 128_256, "tie": False},
        {"family": "gemma2", "vocab": 262_144, "tie": True},
    )
    calls = (
        Call("tokenize", 1, 10, 1),
        Call("score", 1, 900),
        Call("greedy", 1, 300, 16),
        Call("score without cache", 1, 400),
        Call("sample", 1, 1000, 8),
    )
    return [
        Case(
            seed=LARGE_SEED,
            number=number,
            hidden=1024,
            layers=6,
            file_dtype="bfloat16",
            dtype="auto",
            policy="balanced",
            window=None,
            io_threads=2,
            direct=True,
            context=1024,
            logits_to_keep=1,
            tokenizer=True,
            share=share,
            calls=calls,
            **shape,
        )
        for number, (shape, share) in enumerate(itertools.product(shapes, SHARES[1:]))
    ]


# ---- what can be asked: (model, its own part of the child, call, case) -> what is compared


def _generate(**options: Any) -> Callable[..., Any]:
    def run(model: Any, call: Call, case: Case) -> Any:
        import torch

        ids = _ids(call, case)
        mask = torch.ones_like(ids)
        if call.batch > 1 and call.kind == "batch":
            mask[0, : call.prompt_tokens // 2] = 0
        torch.manual_seed(call.seed)
        with_margins = call.kind == "greedy" and case.draft is not None
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=call.new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            **{"do_sample": False} | options | ({"num_beams": call.batch} if call.kind == "beams" else {}),
            **({"output_logits": True, "return_dict_in_generate": True} if with_margins else {}),
        )
        if not with_margins:
            return output.tolist()
        leads = [logits[0].float().topk(2).values.tolist() for logits in output.logits]
        return {"text": output.sequences[0].tolist(), "margins": [first - second for first, second in leads]}

    return run


def _draft(model: Any, call: Call, case: Case) -> Any:
    return _generate(assistant_model=DRAFTS[case.seed, case.number])(model, call, case)


def _tokenize(model: Any, call: Call, case: Case) -> Any:
    """The text there and back; the reference by transformers' own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = (
        model.flexinfer.tokenizer
        if hasattr(model, "flexinfer")
        else AutoTokenizer.from_pretrained(model.name_or_path)
    )
    ids = tokenizer("the quick brown fox jumps over the lazy dog " * call.prompt_tokens)["input_ids"]
    return [ids, tokenizer.decode(ids)]


def _score(use_cache: bool) -> Callable[..., Any]:
    def run(model: Any, call: Call, case: Case) -> Any:
        import torch

        with torch.no_grad():
            logits = model(_ids(call, case), use_cache=use_cache).logits
        return hashlib.sha256(logits.contiguous().view(torch.uint8).numpy()).hexdigest()

    return run


def _resize(model: Any, call: Call, case: Case) -> Any:
    """Another budget within the group; the reference has none."""
    budget = int(os.environ["FLEXINFER_SOAK_MEMORY"])
    if budget:
        plan = model.flexinfer.plan
        spare = plan.locked_bytes + plan.unused_bytes
        less = random.Random(call.seed).random() * spare
        model.flexinfer.resize(budget if call.seed % 2 else int(plan.budget_bytes - less))
    return None


CALLS: dict[str, Callable[..., Any]] = {
    "greedy": _generate(),
    "sample": _generate(do_sample=True, temperature=0.9, top_k=40, top_p=0.9),
    "beams": _generate(),
    "batch": _generate(),
    "lookup": _generate(prompt_lookup_num_tokens=6),
    "score": _score(use_cache=True),
    "score without cache": _score(use_cache=False),
    "draft": _draft,
    "tokenize": _tokenize,
    "resize": _resize,
}


def _ids(call: Call, case: Case) -> Any:
    import torch

    rows = 1 if call.kind == "beams" else call.batch
    generator = torch.Generator().manual_seed(call.seed)
    return torch.randint(3, case.vocab, (rows, call.prompt_tokens), generator=generator)


# ---- the two processes of a case

DRAFTS: dict[tuple[int, int], Any] = {}  # by case: the draft model of this process


def prepare(case: Case) -> None:
    """Make what a program would hold beside the model: the draft model of the calls that want one."""
    if any(call.kind == "draft" for call in case.calls):
        import torch
        import transformers

        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        }
        torch.manual_seed(1)
        config = transformers.LlamaConfig(vocab_size=case.vocab, **sizes, max_position_embeddings=1024)
        draft = transformers.AutoModelForCausalLM.from_config(config).eval()
        draft.generation_config.num_assistant_tokens = DRAFTED
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        DRAFTS[case.seed, case.number] = draft


def make_tokenizer(case: Case, path: Path) -> None:
    """A byte-level tokenizer of the case's vocabulary, its merges drawn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    chance = random.Random(case.number)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate(letters)}
    merges, listed = [], list(letters)
    while len(tokens) < case.vocab:
        left, right = chance.choice(listed), chance.choice(listed)
        if len(left) + len(right) <= 12 and left + right not in tokens:
            tokens[left + right] = len(tokens)
            listed.append(left + right)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


def make_checkpoint(case: Case, path: Path) -> None:
    """Write the model of `case` to directory `path`; every parameter is random."""
    if case.blocks is None:
        make_floats(case, path)
        return
    from flexinfer.convert.quantize import quantize

    floats = path.with_name(path.name + "-floats")
    try:
        make_floats(case, floats)
        quantize(floats, path, case.blocks, progress=False)
    finally:
        shutil.rmtree(floats, ignore_errors=True)


def make_floats(case: Case, path: Path) -> None:
    """Write the model of `case` as safetensors."""
    import torch
    import transformers

    facts = dict(FAMILIES[case.family])
    config_class = getattr(transformers, facts.pop("config"))
    sizes = {"vocab_size": case.vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    heads = case.hidden // 64
    if case.family == "opt":
        sizes |= {"hidden_size": case.hidden, "word_embed_proj_dim": case.hidden, "ffn_dim": case.hidden * 3}
        sizes |= {
            "num_hidden_layers": case.layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 1024,
        }
    elif case.family == "gpt2":
        sizes |= {"n_embd": case.hidden, "n_layer": case.layers, "n_head": heads, "n_positions": 1024}
    else:
        sizes |= {
            "hidden_size": case.hidden,
            "intermediate_size": case.hidden * 3,
            "num_hidden_layers": case.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "max_position_embeddings": 1024,
            "tie_word_embeddings": case.tie,
        }
    torch.manual_seed(case.number)
    model = transformers.AutoModelForCausalLM.from_config(
        config_class(**sizes, **facts), dtype=getattr(torch, case.file_dtype)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(path)
    if case.tokenizer:
        make_tokenizer(case, path)


def reference(case: Case, path: Path) -> dict[str, Any]:
    """What stock transformers says to the calls, and the smallest budget that flexinfer names."""
    import torch
    from transformers import AutoModelForCausalLM

    import flexinfer

    prepare(case)
    smallest = total = 0
    try:
        flexinfer.from_pretrained(path, 1 << 20, **load_options(case), draft=case.draft)
    except flexinfer.BudgetError as error:
        smallest = needed_bytes(error)
    gc.collect()
    if case.blocks is None:
        dtype = getattr(torch, case.file_dtype if case.dtype == "auto" else case.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, experts_implementation="eager"
        ).eval()
        total = sum(p.numel() * p.element_size() for p in model.parameters())
    else:
        resident = load_options(case) | {"policy": "balanced", "context": 4 * case.context}
        model = flexinfer.from_pretrained(path, RESIDENT_MEMORY, **resident)  # without a draft
        plan = model.flexinfer.plan
        total = plan.total_bytes + (
            plan.experts.total_bytes - plan.experts.token_bytes if plan.experts else 0
        )
        assert not plan.streamed_bytes
    return {
        "smallest_bytes": smallest,
        "weights_bytes": total,
        "outputs": [CALLS[call.kind](model, call, case) for call in case.calls],
    }


def needed_bytes(error: Exception) -> int:
    """The smallest budget that a refusal names."""
    return int(str(error).split("at least ")[1].split()[0])


def load_options(case: Case) -> dict[str, Any]:
    """Keyword arguments of from_pretrained."""
    return {
        "policy": case.policy,
        "window": case.window,
        "io_threads": case.io_threads,
        "direct": case.direct,
        "context": case.context,
        "logits_to_keep": case.logits_to_keep,
        "dtype": case.dtype,
    }


def child(case: Case, path: Path, memory: int) -> dict[str, Any]:
    """The calls on a streamed model, in this process, and what they left behind."""
    import torch

    import flexinfer
    from flexinfer.formats.tokenizer import loading_bytes
    from flexinfer.memory.process import anonymous_bytes, peak_bytes
    from flexinfer.streaming.kv_cache import ContextError

    torch.ones(8) @ torch.ones(8)
    prepare(case)
    holdings_before = _holdings()
    try:
        model: Any = flexinfer.from_pretrained(path, memory, **load_options(case), draft=case.draft)
    except flexinfer.BudgetError as error:  # a process is not always of the same size before it loads
        return {"needed_bytes": needed_bytes(error)}
    outputs: list[Any] = []
    refusals: list[str | None] = []
    resting: list[int] = []
    explained, loaded = 0, False
    for call in case.calls:
        shape = shape_of(call, case)
        passes = model.flexinfer.stats()["passes"]
        held = anonymous_bytes() + model.flexinfer.file_bytes
        try:
            outputs.append(CALLS[call.kind](model, call, case))
            refusals.append(None)
            if call.kind == "tokenize" and not loaded:
                # Room for it is made first, where there is none; what a pass takes is not taken meanwhile.
                plan = model.flexinfer.plan
                at_most = plan.budget_bytes - plan.fixed.activation_bytes - plan.fixed.margin_bytes
                loaded, explained = True, max(explained, min(held + loading_bytes(path), at_most))
            if shape is not None:  # by the plan as it is now: the first pass has made it anew
                explained = max(explained, model.flexinfer.planned_bytes(shape))
        except (flexinfer.BudgetError, ContextError) as error:
            outputs.append(None)
            refusals.append(str(error)[:300])
            if model.flexinfer.stats()["passes"] != passes and call.kind.startswith("score"):
                raise RuntimeError(f"refused after it ran: {error}") from error
        gc.collect()
        resting.append(anonymous_bytes())
    stats, plan = model.flexinfer.stats(), model.flexinfer.plan
    peak = peak_bytes()
    model.flexinfer.close()
    del model
    gc.collect()
    return {
        "outputs": outputs,
        "refusals": refusals,
        "resting_bytes": resting,
        "explained_bytes": explained,
        "peak_bytes": stats["peak_bytes"],
        "vm_hwm_bytes": peak,
        "bytes_read": stats["bytes_read"],
        "plan": {
            "budget_bytes": plan.budget_bytes,
            "locked_bytes": plan.locked_bytes,
            "streamed_bytes": plan.streamed_bytes,
            "window_bytes": plan.window_bytes,
            "unused_bytes": plan.unused_bytes,
            "fixed": asdict(plan.fixed),
        },
        "left": [after - before for before, after in zip(holdings_before, _holdings(), strict=True)],
    }


def shape_of(call: Call, case: Case) -> "PassShape | None":
    """The largest pass of a call: its prompt."""
    from flexinfer.plan.budget import PassShape

    if call.kind in ("tokenize", "resize"):
        return None
    return PassShape(
        batch=call.batch,
        new_tokens=call.prompt_tokens,
        kept=0 if call.kind.startswith("score") else 1,
        cached=True,
    )


def _holdings() -> tuple[int, int, int]:
    """Threads, open files and locked bytes."""
    status = Path("/proc/self/status").read_text()
    locked = int(status.split("VmLck:")[1].split()[0]) << 10
    return threading.active_count(), len(os.listdir("/proc/self/fd")), locked


# ---- running and judging


def _same_but_for_ties(case: Case, call: Call, ours: Any, theirs: Any) -> bool:
    """Whether a drafted text is the other one up to where two tokens are as good as equal. Drawn ones have a distribution alone."""
    if call.kind != "greedy" or ours is None:
        return call.kind == "sample"
    pairs = zip(
        ours["text"][call.prompt_tokens :],
        theirs["text"][call.prompt_tokens :],
        theirs["margins"],
        strict=True,
    )
    margin = next((margin for one, other, margin in pairs if one != other), 0.0)
    in_blocks = "bfloat16" if case.blocks else case.file_dtype  # ggml rounds what it multiplies to 8 bits
    return margin < NEAR[in_blocks if case.dtype == "auto" or case.blocks else case.dtype]


def judge(case: Case, expected: dict[str, Any], report: dict[str, Any]) -> tuple[str, list[str]]:
    """The outcome of a case that ran to its end, and of each call."""
    outcomes = []
    for call, ours, theirs, refusal in zip(
        case.calls, report["outputs"], expected["outputs"], report["refusals"], strict=True
    ):
        same = ours == theirs or (case.draft is not None and _same_but_for_ties(case, call, ours, theirs))
        outcomes.append("refused" if refusal else "ok" if same else "wrong")
    if "wrong" in outcomes:
        return "wrong", outcomes
    return ("leak" if any(report["left"]) else "ok"), outcomes


def run_case(case: Case, scratch: Path, verbose: bool = False) -> dict[str, Any]:
    """Run one case; its record."""
    path = scratch / f"soak-{case.seed}-{case.number}"
    shutil.rmtree(path, ignore_errors=True)
    record: dict[str, Any] = {"case": asdict(case), "outcome": "error"}
    try:
        make_checkpoint(case, path)
        done = _process("reference", case, path)
        if done.returncode != 0:
            return record | {"message": "reference: " + done.stderr[-2000:]}
        expected = json.loads(done.stdout.splitlines()[-1])
        spare = int(case.share * expected["weights_bytes"] * 1.02)
        smallest, report = expected["smallest_bytes"], None
        for _ in range(REFUSED_LOADS):
            memory = (smallest + (1 << 20) + spare) // 4096 * 4096
            record |= {"memory_bytes": memory, "smallest_bytes": smallest}
            with Limits(memory_bytes=memory) as limits:
                try:
                    done = _process("child", case, path, memory, limits)
                except subprocess.TimeoutExpired:
                    return record | {"outcome": "hung"}
                usage = limits.usage()
            record |= {"group_peak_bytes": usage.peak_memory_bytes, "oom_kills": usage.oom_kills}
            if verbose:
                print(done.stderr, file=sys.stderr)
            if usage.oom_kills or done.returncode == -9:
                return record | {"outcome": "killed"}
            if done.returncode != 0:
                return record | {"message": done.stderr[-2000:]}
            report = json.loads(done.stdout.splitlines()[-1])
            if "needed_bytes" not in report:
                break
            smallest = report["needed_bytes"]
        else:
            return record | {"message": f"refused {REFUSED_LOADS} times the budget that it had named"}
        outcome, outcomes = judge(case, expected, report)
        del report["outputs"]
        planned = report["plan"]["budget_bytes"] - report["plan"]["unused_bytes"]
        return record | report | {"outcome": outcome, "outcomes": outcomes, "planned_bytes": planned}
    finally:
        shutil.rmtree(path, ignore_errors=True)


def generations_of(case: Case) -> int:
    """Calls of a case that ask for text or logits."""
    return sum(call.kind not in NO_GENERATIONS for call in case.calls)


def _process(
    role: str, case: Case, path: Path, memory: int = 0, limits: Limits | None = None
) -> subprocess.CompletedProcess[str]:
    arguments = json.dumps([role, asdict(case), str(path), memory])
    command = [sys.executable, "-m", "flexinfer.bench.soak", "--role", arguments]
    return subprocess.run(
        limits.command(command) if limits else command,
        env=os.environ | {"FLEXINFER_SOAK_MEMORY": str(memory)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def soak(
    cases: Iterable[Case],
    generations: int,
    record_file: Path | None,
    verbose: bool = False,
    again: bool = False,
) -> Counter[str]:
    """Run `cases`, of one seed, until `generations` texts or logits have been asked for, those of the record included. Returns outcomes, counted."""
    finished: dict[tuple[int, int], dict[str, Any]] = {}
    if record_file is not None and record_file.exists() and not again:
        records = map(json.loads, record_file.read_text().splitlines())
        finished = {
            (one["case"]["seed"], one["case"]["number"]): one for one in records if one["outcome"] not in BAD
        }
    scratch = default_cache_dir() / "soak"
    scratch.mkdir(parents=True, exist_ok=True)
    facts = provenance(scratch).model_dump(mode="json")
    outcomes: Counter[str] = Counter()
    made, start_s, new = 0, perf_counter(), 0
    for case in cases:
        record = finished.get((case.seed, case.number))
        if record is None:
            case_start_s = perf_counter()
            record = run_case(case, scratch, verbose)
            record |= {"seconds": round(perf_counter() - case_start_s, 1), "provenance": facts}
            new += generations_of(case)
            if record_file is not None:
                record_file.parent.mkdir(parents=True, exist_ok=True)
                with record_file.open("a") as stream:
                    stream.write(json.dumps(record) + "\n")
        made += generations_of(case)
        outcomes[record["outcome"]] += 1
        outcomes.update(f"call {one}" for one in record.get("outcomes", []))
        left_s = (perf_counter() - start_s) / max(new, 1) * max(0, generations - made)
        print(
            f"case {case.number} {case.family} {case.blocks or case.file_dtype}/{case.dtype} vocabulary {case.vocab} share {case.share}: "
            f"{record['outcome']}; {made} of {generations} generations, {dict(outcomes)}, {left_s / 60:.0f} min left",
            flush=True,
        )
        if record["outcome"] in BAD:
            print("  " + record.get("message", "")[-600:], flush=True)
        if made >= generations:
            break
    return outcomes


def main(argv: list[str] | None = None) -> int:
    """0 when nothing was killed, wrong, hung, left behind or in error."""
    parser = argparse.ArgumentParser(prog="python -m flexinfer.bench.soak", description=__doc__)
    parser.add_argument("generations", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--only", type=int, nargs="+", help="run these cases alone, again if need be")
    parser.add_argument("--large", action="store_true", help="run the twelve cases with large vocabularies")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.role:
        role, fields, path, memory = json.loads(arguments.role)
        case = Case(**fields | {"calls": tuple(Call(**call) for call in fields["calls"])})
        report = reference(case, Path(path)) if role == "reference" else child(case, Path(path), memory)
        print(json.dumps(report))
        return 0
    numbers = arguments.only or itertools.count()
    cases = large() if arguments.large else (draw(arguments.seed, number) for number in numbers)
    outcomes = soak(cases, arguments.generations, arguments.record, arguments.verbose, bool(arguments.only))
    return int(any(outcomes[bad] for bad in BAD))


if __name__ == "__main__":
    sys.exit(main())

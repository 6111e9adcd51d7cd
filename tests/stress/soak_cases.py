"""The cases of a soak: a model, how it is loaded and what is asked of it, drawn from (seed, number)
alone.
"""

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

from experiments.real import TOKENIZERS

# Transformers' configuration class, and what a shape does not say.
FAMILIES: dict[str, dict[str, Any]] = {
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
    "qwen3_moe": {
        "config": "Qwen3MoeConfig",
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
}
POLICIES = (
    "balanced",
    "balanced",
    "unbalanced",
    "attention-first",
    "ffn-first",
    "algorithm1",
    "none",
)
KINDS = (
    *("greedy", "sample", "beams", "batch", "lookup"),
    *("score", "score without cache", "draft", "tokenize", "resize"),
)
CALLS_OF_A_CASE = 16
NO_GENERATIONS = ("tokenize", "resize")  # calls that give no text and no logits
DRAFTED = 3  # tokens that a draft model says ahead
MIXTURES = ("mixtral", "qwen3_moe")  # of which no substitute is made
# What a checkpoint is quantised to.
BLOCKS = (None, None, "q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_nl")
DRAFTS_BY = ("substitute", "substitute", "lookup", "auto")  # from_pretrained(draft=...)
DRAFTED_SHARE = 0.4  # of cases
REAL_SHARE = 0.5  # of cases with a tokenizer
SHARES = (0.0, 0.15, 0.5, 0.8, 1.0)
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
    # Whether the checkpoint has one, and it is used; or the name of a published one
    # (experiments.real).
    tokenizer: bool | str
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
    context = (
        chance.choice((96, 256, 768)) if computes_in == "float32" else chance.choice((64, 160))
    )
    keep = chance.choice((1, 4, 12))
    tokenizer: bool | str = chance.random() < 0.5
    calls = []
    for i in range(CALLS_OF_A_CASE):
        kind = chance.choice(KINDS)
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
    if case.tokenizer and chance.random() < REAL_SHARE:
        name = chance.choice(sorted(TOKENIZERS))
        case = replace(case, tokenizer=name, vocab=TOKENIZERS[name])
    drafts = DRAFTS_BY if larger and family not in MIXTURES else ("lookup", "auto")
    return replace(case, draft=chance.choice(drafts) if chance.random() < DRAFTED_SHARE else None)


def large() -> list[Case]:
    """Twelve combinations with large vocabularies and a context of 1024: what a user with a real
    model asks for first.
    """
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


def generations_of(case: Case) -> int:
    """Calls of a case that ask for text or logits."""
    return sum(call.kind not in NO_GENERATIONS for call in case.calls)

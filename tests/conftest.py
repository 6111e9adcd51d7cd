"""Small random models of every family, saved as stock checkpoints, and the few helpers that all
tests of the engine use.

Every parameter is random, biases and norms too, so that a tensor read from the wrong place cannot
go unnoticed. Pieces are made small, so that a weight of these models has several and each test goes
through all of the machinery.
"""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

# Several processes of several threads share the cores: threads that wait for others sleep at once.
# libgomp reads it when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
import torch
import transformers
from hypothesis import settings
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

import flexinfer
import flexinfer.cache_dir
import flexinfer.model.pieces

# Ctrl-C is heard by this process and those that it starts, also in the background of a shell, which
# has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("flexinfer", deadline=None)  # a busy machine is no failure
settings.load_profile("flexinfer")

VOCAB = 160
WINDOW_BYTES = 3 * 16_384  # a few pieces: the default would hold the whole of a small model
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
HEAD = {"head_dim": 16, "sliding_window": 8}
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OPT_SHAPE = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 4}
GPT2_SHAPE = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128, "vocab_size": VOCAB}
FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": lambda **over: transformers.LlamaConfig(**{**SHAPE, **TOKENS, **over}),
    "mistral": lambda **over: transformers.MistralConfig(**{**SHAPE, **TOKENS, **over}),
    "qwen2": lambda **over: transformers.Qwen2Config(**{**SHAPE, **TOKENS, **over}),
    "qwen3": lambda **over: transformers.Qwen3Config(**{**SHAPE, **TOKENS, "head_dim": 16, **over}),
    "gemma2": lambda **over: transformers.Gemma2Config(**{**SHAPE, **HEAD, **TOKENS, **over}),
    "gemma3": lambda **over: transformers.Gemma3TextConfig(**{**SHAPE, **HEAD, **TOKENS, **over}),
    "phi3": lambda **over: transformers.Phi3Config(**{**SHAPE, **TOKENS, **over}),
    "gpt_neox": lambda **over: transformers.GPTNeoXConfig(
        **{**SHAPE, **TOKENS, "intermediate_size": 128, **over}
    ),
    "opt": lambda **over: transformers.OPTConfig(
        **{**SHAPE, **OPT_SHAPE, **TOKENS, "pad_token_id": 1, **over}
    ),
    "gpt2": lambda **over: transformers.GPT2Config(**{**GPT2_SHAPE, **TOKENS, **over}),
}

MakeCheckpoint = Callable[..., Path]
Load = Callable[..., PreTrainedModel]


def may_lock() -> bool:
    return os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] in (
        resource.RLIM_INFINITY,
        -1,
    )


needs_mlock = pytest.mark.skipif(not may_lock(), reason="mlock is limited here (ulimit -l)")


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    """Small products are slower on two threads than on one; tests that need both say so."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """checkpoint(family, dtype=torch.float32, sharded=False, **config) -> directory; made once a
    session, do not change it.
    """
    made: dict[str, Path] = {}

    def make(
        family: str = "llama",
        dtype: torch.dtype = torch.float32,
        sharded: bool = False,
        **config: Any,
    ) -> Path:
        key = repr((family, dtype, sharded, sorted(config.items())))
        if key not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(FAMILIES[family](**config), dtype=dtype)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
            made[key] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[key], max_shard_size="150KB" if sharded else "5GB")
        return made[key]

    return make


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is made once is kept for this run alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(flexinfer.cache_dir, "cache_dir", lambda: folder)
        yield


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a few tens of KiB in several pieces."""
    monkeypatch.setattr(flexinfer.model.pieces, "PIECE_BYTES", 8192)
    monkeypatch.setattr(flexinfer.model.pieces, "ROW_MULTIPLE", 16)


@pytest.fixture
def load(small_pieces: None) -> Iterator[Load]:
    """flexinfer.from_pretrained with a small context and window, and plenty of memory; closes what
    it loaded after the test.

    Fields of Experiment are given by their own names.
    """
    loaded: list[PreTrainedModel] = []

    def load_model(
        path: Path, memory: str | int = "8GiB", context: int = 64, **options: Any
    ) -> PreTrainedModel:
        names = {one.name for one in fields(flexinfer.Experiment)} & options.keys()
        if names:
            options["experiment"] = flexinfer.Experiment(
                **{name: options.pop(name) for name in names}
            )
        options = {"window": WINDOW_BYTES} | options
        model = flexinfer.from_pretrained(path, memory, context=context, **options)
        loaded.append(model)
        return model

    yield load_model
    for model in loaded:
        model.flexinfer.close()


def stock(path: Path, **options: Any) -> PreTrainedModel:
    """The same checkpoint by transformers alone, resident."""
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def smallest_budget(model: PreTrainedModel) -> int:
    """The smallest budget in bytes accepted here; a refusal names one with some slack."""
    smallest: int = model.flexinfer.runner.planner.smallest_bytes
    with pytest.raises(flexinfer.BudgetError, match="at least"):
        model.flexinfer.resize(smallest - 1)
    return smallest


def resize_to_share(model: PreTrainedModel, share: float) -> None:
    """A budget that is the smallest one and `share` of the weights."""
    model.flexinfer.resize(smallest_budget(model) + int(share * model.flexinfer.plan.total_bytes))


def prompt(batch: int = 1, tokens: int = 7, seed: int = 0) -> torch.Tensor:
    """[batch, tokens] random ids that are no special tokens."""
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(
    model: PreTrainedModel, ids: torch.Tensor, steps: int = 2, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Prefill `ids` [batch, tokens], then `steps` greedy tokens with a KV cache:

    [batch, tokens + steps, vocab].
    """
    mask = torch.ones_like(ids) if mask is None else mask
    cache = DynamicCache(config=model.config.get_text_config())
    outputs = []
    for _ in range(steps + 1):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        outputs.append(
            model(
                input_ids=ids,
                attention_mask=mask,
                cache=cache,
                use_cache=True,
                **({} if model.config.model_type == "opt" else {"position_ids": positions}),
            ).logits
        )
        ids = outputs[-1][:, -1:].argmax(-1)
        mask = torch.cat((mask, torch.ones_like(ids)), dim=-1)
    return torch.cat(outputs, dim=1)

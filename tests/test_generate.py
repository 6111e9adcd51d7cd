"""Everything that transformers' generate() can do works on a streamed model, with the outputs of
the resident one.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from flexinfer.plan.plan import PassShape
from flexinfer.streaming.kv_cache import ContextError
from tests.conftest import Load, MakeCheckpoint, prompt, resize_to_share, stock

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams, several returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    "beams that sample": {"do_sample": True, "num_beams": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 3},
    "no cache": {"do_sample": False, "use_cache": False},
    "repetition penalty": {
        "do_sample": False,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
    },
    "stop at a token": {"do_sample": False, "eos_token_id": list(range(3, 60))},
}


@pytest.fixture
def pair(checkpoint: MakeCheckpoint, load: Load) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model streamed, a third of it locked, and stock."""
    model = load(checkpoint(), context=512)
    resize_to_share(model, 0.3)
    assert 0 < model.flexinfer.plan.locked_bytes < model.flexinfer.plan.total_bytes
    return model, stock(checkpoint())


def generate(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    torch.manual_seed(7)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), **{"max_new_tokens": 9, **options}
    )
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_generating(pair: tuple[PreTrainedModel, PreTrainedModel], mode: str) -> None:
    model, reference = pair
    for batch in (1,) if mode == "prompt lookup" else (1, 3):
        ids = prompt(1, tokens=4).repeat(batch, 3) if mode == "prompt lookup" else prompt(batch, 9)
        ours = generate(model, ids, **MODES[mode])
        assert torch.equal(ours, generate(reference, ids, **MODES[mode]))
        assert ours.shape[1] > ids.shape[1]


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_families_that_keep_other_caches(
    checkpoint: MakeCheckpoint, load: Load, family: str, mode: str
) -> None:
    """Sliding windows are longer here than shorter: 9 + 9 tokens past a window of 8."""
    model = load(checkpoint(family), context=512)
    resize_to_share(model, 0.3)
    ours = generate(model, prompt(3, 9), **MODES[mode])
    assert torch.equal(ours, generate(stock(checkpoint(family)), prompt(3, 9), **MODES[mode]))


class Collect(BaseStreamer):
    """Keeps what it is given, in order."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        assert not self.ended
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamers_get_every_token(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, _ = pair
    streamer = Collect()
    out = generate(model, prompt(), do_sample=False, streamer=streamer)
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("streamed", [True, False])
def test_assisted_by_a_draft_model(
    checkpoint: MakeCheckpoint,
    load: Load,
    pair: tuple[PreTrainedModel, PreTrainedModel],
    streamed: bool,
) -> None:
    """The draft may be streamed as well: two engines in one process."""
    model, reference = pair
    draft_path = checkpoint(num_hidden_layers=2)
    draft = load(draft_path, context=512, policy="none") if streamed else stock(draft_path)
    expected = generate(reference, prompt(), do_sample=False)
    before = model.flexinfer.stats()["passes"]
    assert torch.equal(generate(model, prompt(), do_sample=False, assistant_model=draft), expected)
    assert torch.equal(
        generate(model, prompt(), do_sample=False, assistant_model=stock(checkpoint())), expected
    )
    assert model.flexinfer.stats()["passes"] - before < 2 * 9  # a draft that agrees saves passes


def test_going_on_from_a_cache_of_ones_own(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    outputs = []
    for model in pair:
        cache = DynamicCache(config=model.config)
        first = generate(model, prompt(), do_sample=False, cache=cache)
        longer = torch.cat((first, prompt(seed=1)), dim=-1)
        outputs.append(generate(model, longer, do_sample=False, cache=cache))
    assert torch.equal(*outputs)


def test_a_cache_filled_by_the_stock_model_is_taken_over(
    pair: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    model, reference = pair
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        reference(input_ids=prompt(), cache=cache)
    longer = torch.cat((prompt(), prompt(seed=1)), dim=-1)
    ours = generate(model, longer, do_sample=False, cache=caches[0])
    assert torch.equal(ours, generate(reference, longer, do_sample=False, cache=caches[1]))


def test_scores_hidden_states_and_attentions_come_out_alike(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    options: dict[str, Any] = {"attn_implementation": "eager"}
    model, reference = load(checkpoint()), stock(checkpoint(), **options)
    model.set_attn_implementation("eager")
    resize_to_share(model, 0.3)
    ask = {"output_hidden_states": True, "output_attentions": True}
    ours, theirs = model(prompt(2), **ask), reference(prompt(2), **ask)
    for name in ("hidden_states", "attentions"):
        assert len(ours[name]) == len(theirs[name]) > 0
        assert all(torch.equal(a, b) for a, b in zip(ours[name], theirs[name], strict=True))


def test_generation_config_of_the_checkpoint_is_kept(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path
) -> None:
    for file in checkpoint().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 5, "eos_token_id": null}')
    model, reference = load(tmp_path), stock(tmp_path)
    out = model.generate(prompt(), do_sample=False)
    assert torch.equal(out, reference.generate(prompt(), do_sample=False))
    assert out.shape == (1, 12)


def test_passes_and_tokens_are_counted(checkpoint: MakeCheckpoint, load: Load) -> None:
    model = load(checkpoint(), trace=True, policy="none")
    generate(model, prompt(2, tokens=7), do_sample=False, max_new_tokens=4, eos_token_id=None)
    stats = model.flexinfer.stats()
    assert stats["passes"] == 4
    assert stats["tokens"] == 2 * (7 + 3)
    assert stats["resyncs"] == 0
    events = model.flexinfer.events()
    pieces = [p for w in model.flexinfer.runner.planner.weights for p in w.pieces]
    computed = [event for event in events if event["kind"] == "compute"]
    assert [event["tensor"] for event in computed] == [p.name for p in pieces] * 4
    assert [event["layer"] for event in computed[: len(pieces)]] == [p.layer for p in pieces]
    assert sum(event["bytes"] for event in computed) == 4 * model.flexinfer.plan.total_bytes
    assert all(event["start_s"] <= event["stop_s"] for event in events)
    assert {event["kind"] for event in events} == {"read", "wait", "compute"}


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_prompt_as_long_as_the_context_is_one_pass_or_one_for_each_chunk(
    checkpoint: MakeCheckpoint, load: Load, chunk: int | None
) -> None:
    """The plan has room for a pass of all the context, so the weights are read once for a prompt;
    in chunks, once for each.
    """
    model, ids = load(checkpoint(), policy="none", io_threads=0), prompt(tokens=63)
    options = {
        "max_new_tokens": 1,
        "do_sample": False,
        "prefill_chunk_size": chunk,
        "pad_token_id": 0,
    }
    expected = stock(checkpoint()).generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    stats, plan = model.flexinfer.stats(), model.flexinfer.plan
    assert stats["passes"] == (1 if chunk is None else 4)
    pieces = sum(len(weight.pieces) for weight in model.flexinfer.runner.planner.weights)
    assert stats["reads"] == stats["passes"] * pieces
    assert stats["tokens"] == 63
    assert plan.overheads.activation_bytes >= model.flexinfer.runner.meter.extra_bytes(
        PassShape(1, 63), 64
    )
    with pytest.raises(ContextError, match="context=64"):
        model.generate(prompt(tokens=66), **options)

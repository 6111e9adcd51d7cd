"""A length that is asked for and does not fit is refused before the first pass; one that nobody
asked for ends at the context.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import CONFIG, add_tokenizer
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    TextGenerationPipeline,
)

from flexinfer.streaming.kv_cache import ContextError
from tests.conftest import Load, MakeCheckpoint, prompt, stock

CONTEXT = 32
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
REACHED = r"reached the context of 32 tokens"


def with_settings(path: Path, to: Path, **settings: Any) -> Path:
    """A copy of a checkpoint whose generation_config.json says so."""
    shutil.copytree(path, to)
    (to / "generation_config.json").write_text(
        json.dumps({"eos_token_id": None, "pad_token_id": 0} | settings)
    )
    return to


def refused(model: PreTrainedModel, *args: Any, **options: Any) -> int:
    """Have a call refused before any pass; returns the context that is named."""
    passes = model.flexinfer.stats()["passes"]
    with pytest.raises(
        ContextError, match=r"nothing was run.*from_pretrained\(\.\.\., context=\d+\)"
    ) as error:
        model.generate(*args, **options)
    assert model.flexinfer.stats()["passes"] == passes
    return int(str(error.value).rpartition("context=")[2].partition(")")[0])


REQUESTS: dict[
    str, tuple[int, dict[str, Any], int]
] = {  # sequences, options, tokens of the cache that the whole takes
    "max_new_tokens": (1, {"max_new_tokens": 40}, 46),
    "one token too many": (1, {"max_new_tokens": 27}, 33),
    "max_length": (1, {"max_length": 40}, 39),
    "generation config": (
        1,
        {"generation_config": GenerationConfig(max_new_tokens=40, **GREEDY)},
        46,
    ),
    "its max_length": (1, {"generation_config": GenerationConfig(max_length=41, **GREEDY)}, 40),
    "min_new_tokens": (1, {"min_new_tokens": 40, "max_new_tokens": 60}, 66),
    "batch": (3, {"max_new_tokens": 9}, 45),
    "beams": (1, {"max_new_tokens": 9, "num_beams": 3}, 45),
    "several samples": (2, {"max_new_tokens": 9, "do_sample": True, "num_return_sequences": 2}, 60),
    "prompt lookup": (1, {"max_new_tokens": 40, "prompt_lookup_num_tokens": 3}, 46),
    "chunked prefill": (1, {"max_new_tokens": 40, "prefill_chunk_size": 3}, 46),
    "a time too": (1, {"max_new_tokens": 40, "max_time": 60.0}, 46),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_what_is_asked_for_is_refused_first_and_fits_into_the_context_that_is_named(
    checkpoint: MakeCheckpoint, load: Load, request_: str
) -> None:
    batch, options, expected = REQUESTS[request_]
    model, ids = load(checkpoint(), context=CONTEXT), prompt(batch)
    options = options if "generation_config" in options else GREEDY | options
    named = refused(model, ids, **options)
    assert named == expected
    model.flexinfer.close()
    torch.manual_seed(3)
    ours = load(checkpoint(), context=named, logits_to_keep=8).generate(ids, **options)
    torch.manual_seed(3)
    assert torch.equal(ours, stock(checkpoint()).generate(ids, **options))
    with pytest.raises(ContextError):
        load(checkpoint(), context=named - 1, logits_to_keep=8).generate(ids, **options)


@pytest.mark.parametrize(
    "options", [{}, {"prompt_lookup_num_tokens": 4}, {"num_beams": 2}, {"prefill_chunk_size": 2}]
)
def test_what_just_fits_is_made(
    checkpoint: MakeCheckpoint, load: Load, options: dict[str, Any]
) -> None:
    rows = options.get("num_beams", 1)
    options = GREEDY | options | {"max_new_tokens": CONTEXT // rows - 7 + 1}
    model = load(checkpoint(), context=CONTEXT, logits_to_keep=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert torch.equal(
            model.generate(prompt(), **options), stock(checkpoint()).generate(prompt(), **options)
        )


@pytest.mark.parametrize("draft", ["lookup", "substitute"])
def test_with_a_draft(checkpoint: MakeCheckpoint, load: Load, draft: str) -> None:
    path = checkpoint(intermediate_size=192)
    model = load(path, context=CONTEXT, draft=draft, policy="none")
    assert refused(model, prompt(), max_new_tokens=40, **GREEDY) == 46
    assert model.generate(prompt(), max_new_tokens=26, **GREEDY).shape == (1, 33)
    with pytest.warns(RuntimeWarning, match=REACHED):
        out = model.generate(prompt(), stopping_criteria=[MaxLengthCriteria(400)], **GREEDY)
    assert out.shape == (1, 33)


@pytest.mark.parametrize(
    "settings",
    [{"max_length": 4096}, {"max_new_tokens": 2048}, {"min_new_tokens": 50, "max_length": 99}],
)
@pytest.mark.parametrize("given", ["nothing", "the model's", "a time", "an empty one"])
def test_a_length_of_the_checkpoint_is_a_default(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path, settings: dict[str, Any], given: str
) -> None:
    model = load(with_settings(checkpoint(), tmp_path / "model", **settings), context=CONTEXT)
    options: dict[str, Any] = {
        "nothing": {"do_sample": False},
        "the model's": {"generation_config": model.generation_config},
        "a time": {"max_time": 60.0},
        "an empty one": {"generation_config": GenerationConfig(do_sample=False)},
    }[given]
    with pytest.warns(RuntimeWarning, match=REACHED) as said:
        out = model.generate(prompt(), **options)
    assert out.shape == (1, 33)
    assert len([one for one in said if "context" in str(one.message)]) == 1
    assert torch.equal(out, stock(checkpoint()).generate(prompt(), max_new_tokens=26, **GREEDY))
    assert refused(model, prompt(), max_new_tokens=40) == 46
    assert model.generate(prompt(), max_new_tokens=4).shape == (1, 11)
    with pytest.raises(ContextError, match="nothing was run"):  # there is no room for a text at all
        model.generate(prompt(tokens=33))


def test_without_any_length_twenty_tokens_or_what_fits(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint(), context=CONTEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert model.generate(prompt(), **GREEDY).shape == (1, 27)
    with pytest.warns(RuntimeWarning, match=REACHED):
        assert model.generate(prompt(tokens=20), **GREEDY).shape == (1, 33)
    with pytest.warns(RuntimeWarning, match=REACHED):
        assert model.generate(prompt(2), **GREEDY).shape == (2, 17)


def test_a_text_that_ends_by_itself_before_or_at_the_context_says_nothing(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path
) -> None:
    model = load(with_settings(checkpoint(), tmp_path / "model", max_length=4096), context=CONTEXT)
    whole = stock(checkpoint()).generate(prompt(), max_new_tokens=26, **GREEDY)
    ends = {len(whole[0]): int(whole[0, -1])}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for end in ends.values():
            out = model.generate(prompt(), do_sample=False, eos_token_id=end)
            assert out[0, -1] == end


def test_a_stopping_criterion_with_a_longer_text(checkpoint: MakeCheckpoint, load: Load) -> None:
    model = load(checkpoint(), context=CONTEXT)
    with pytest.warns(RuntimeWarning, match=REACHED):
        out = model.generate(
            prompt(), stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(99)]), **GREEDY
        )
    assert out.shape == (1, 33)


@pytest.mark.parametrize("only_new", [False, True])
def test_tokens_of_a_cache_from_an_earlier_turn_count(
    checkpoint: MakeCheckpoint, load: Load, only_new: bool
) -> None:
    model, reference = load(checkpoint(), context=CONTEXT), stock(checkpoint())
    texts = []
    for one in (model, reference):
        cache = DynamicCache(config=one.config)
        first = one.generate(prompt(), cache=cache, max_new_tokens=9, **GREEDY)
        # 19 tokens, of which the cache has 15.
        whole = torch.cat((first, prompt(tokens=3, seed=1)), dim=-1)
        ids = whole[:, cache.get_seq_length() :] if only_new else whole
        turn = {"cache": cache, "attention_mask": torch.ones_like(whole)} | GREEDY
        if one is model:
            assert refused(model, ids, max_new_tokens=15, **turn) == 33
            assert cache.get_seq_length() == 15  # it can be used for something shorter
        texts.append(one.generate(ids, max_new_tokens=14, **turn))
    assert torch.equal(*texts)


def test_embeddings_as_a_prompt(checkpoint: MakeCheckpoint, load: Load) -> None:
    model, reference = load(checkpoint(), context=CONTEXT), stock(checkpoint())
    embeds = [one.get_input_embeddings()(prompt()).detach() for one in (model, reference)]
    assert refused(model, inputs_embeds=embeds[0], max_new_tokens=27, **GREEDY) == 33
    ours = model.generate(inputs_embeds=embeds[0], max_new_tokens=26, **GREEDY)
    assert torch.equal(
        ours, reference.generate(inputs_embeds=embeds[1], max_new_tokens=26, **GREEDY)
    )
    with pytest.warns(RuntimeWarning, match=REACHED):
        out = model.generate(
            inputs_embeds=embeds[0], stopping_criteria=[MaxLengthCriteria(99)], **GREEDY
        )
    assert torch.equal(out, ours)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_what_needs_no_memory_that_is_set_aside_goes_on_while_there_is_other(
    checkpoint: MakeCheckpoint, load: Load, options: dict[str, Any]
) -> None:
    model = load(checkpoint(), context=CONTEXT)
    options = GREEDY | options | {"max_new_tokens": 29}
    assert torch.equal(
        model.generate(prompt(), **options), stock(checkpoint()).generate(prompt(), **options)
    )


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_without_other_memory_it_is_refused_first(
    checkpoint: MakeCheckpoint, load: Load, options: dict[str, Any]
) -> None:
    wide = {
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "num_hidden_layers": 2,
    }
    model = load(checkpoint(**wide), context=CONTEXT)
    model.generate(prompt(), max_new_tokens=1, **GREEDY)
    while unused_bytes := model.flexinfer.plan.unused_bytes:
        model.flexinfer.resize(model.flexinfer.plan.budget_bytes - unused_bytes)
    refused(model, prompt(), **(GREEDY | options | {"max_new_tokens": 2000}))


def test_sliding_windows_alone_have_no_end_and_count_their_full_layers_elsewhere(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    path = checkpoint("gemma2")
    model = load(path, context=CONTEXT)
    assert refused(model, prompt(), max_new_tokens=27, **GREEDY) == 33
    alone = checkpoint("mistral", sliding_window=8)
    model = load(alone, context=CONTEXT)
    options = GREEDY | {"max_new_tokens": 60}
    assert torch.equal(
        model.generate(prompt(), **options), stock(alone).generate(prompt(), **options)
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_loop_of_ones_own_is_told_before_the_pass_and_can_go_on(
    checkpoint: MakeCheckpoint, load: Load, family: str
) -> None:
    """The first layer of gemma2 has a window: it must not have taken the token in either."""
    model, reference = load(checkpoint(family), context=CONTEXT), stock(checkpoint(family))
    caches = [DynamicCache(config=one.config) for one in (model, reference)]
    ids = prompt(tokens=CONTEXT)
    with torch.no_grad():
        for one, cache in zip((model, reference), caches, strict=True):
            one(ids[:, :-1], cache=cache)
        passes = model.flexinfer.stats()["passes"]
        with pytest.raises(
            ContextError, match=r"nothing was run and the cache is as it was.*context=33"
        ):
            model(prompt(tokens=2), cache=caches[0])
        assert model.flexinfer.stats()["passes"] == passes
        assert [layer.get_seq_length() for layer in caches[0].layers] == [31] * 4
        ours = model(ids[:, -1:], cache=caches[0]).logits
        assert torch.equal(ours, reference(ids[:, -1:], cache=caches[1]).logits)
        if family == "llama":
            for cache in caches:
                cache.crop(-9)
            ours = model(prompt(tokens=9, seed=4), cache=caches[0]).logits
            assert torch.equal(ours, reference(prompt(tokens=9, seed=4), cache=caches[1]).logits)


def test_a_call_without_a_cache_that_is_too_long_takes_nothing_from_an_earlier_one(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint(), context=CONTEXT)
    with torch.no_grad():
        output = model(prompt())
        with pytest.raises(ContextError):
            model(prompt(tokens=33))
        model(prompt(tokens=1), cache=output.cache)
    assert output.cache.get_seq_length() == 8


def test_pipelines(checkpoint: MakeCheckpoint, load: Load, tmp_path: Path) -> None:
    """Their default of 256 tokens is nobody's wish; what is asked of them is."""
    path = add_tokenizer(checkpoint(**CONFIG), tmp_path / "model")
    model, tokenizer = load(path, context=CONTEXT), AutoTokenizer.from_pretrained(path)
    pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    options: dict[str, Any] = {"return_tensors": True, "do_sample": False}
    with pytest.warns(RuntimeWarning, match=REACHED):
        assert len(pipe("hello", **options)[0]["generated_token_ids"]) == 33
    own = GenerationConfig(do_sample=False)
    with pytest.warns(RuntimeWarning, match=REACHED):
        assert (
            len(pipe("hello", return_tensors=True, generation_config=own)[0]["generated_token_ids"])
            == 33
        )
    assert len(pipe("hello", max_new_tokens=4, **options)[0]["generated_token_ids"]) == 9
    asked = TextGenerationPipeline(model=model, tokenizer=tokenizer, max_new_tokens=256)
    for call in (
        lambda: pipe("hello", max_new_tokens=256, **options),
        lambda: pipe(
            "hello", return_tensors=True, generation_config=GenerationConfig(max_new_tokens=256)
        ),
        lambda: asked("hello", **options),
    ):
        with pytest.raises(ContextError, match="context=260"):
            call()

"""Calls that the plan has room for run within it; others are refused before they run; two threads
do not mix; weights that are not there say so.
"""

import gc
import threading

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import flexinfer
from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.model.skeleton import build_skeleton
from flexinfer.plan.plan import PassShape
from tests.conftest import Load, MakeCheckpoint, logits, prompt, resize_to_share, stock

LARGE = {"vocab_size": 65_536, "num_hidden_layers": 2}


def squeeze(model: PreTrainedModel) -> None:
    """The budget in which a loaded model leaves nothing unused."""
    # A smaller budget has smaller page tables too.
    while unused_bytes := model.flexinfer.plan.unused_bytes:
        model.flexinfer.resize(model.flexinfer.plan.budget_bytes - unused_bytes)


def test_logits_of_all_positions_are_refused_where_there_is_no_room(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    path = checkpoint("llama", **LARGE)
    model = load(path, context=128)
    model(prompt(tokens=2))
    squeeze(model)
    before = model.flexinfer.stats()
    ids = prompt(tokens=120)
    with pytest.raises(
        flexinfer.BudgetError, match=r"logits of 120 positions.*nothing was run.*logits_to_keep=1"
    ) as refused:
        model(ids)
    assert "from_pretrained(..., memory=" in str(refused.value)
    assert model.flexinfer.stats() == before | {"peak_bytes": model.flexinfer.stats()["peak_bytes"]}
    reference = stock(path)
    with torch.no_grad():
        expected = reference(ids, logits_to_keep=1).logits
        assert torch.equal(model(ids, logits_to_keep=1).logits, expected)


def test_what_the_refusal_names_makes_it_fit(checkpoint: MakeCheckpoint, load: Load) -> None:
    path = checkpoint("llama", **LARGE)
    model = load(path, context=128, logits_to_keep=120)
    ids = prompt(tokens=120)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(path)(ids).logits)
    squeeze(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(path)(ids).logits)


def test_scoring_again_and_again_uses_the_memory_set_aside(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    """A call without a cache gets one in the reserve, also while the output of the call before is
    still held.
    """
    model, reference = load(checkpoint()), stock(checkpoint())
    kept = []
    for seed in range(3):
        with torch.no_grad():
            kept.append(model(prompt(seed=seed)))
            assert torch.equal(kept[-1].logits, reference(prompt(seed=seed)).logits)
    assert model.flexinfer.store.kv.holds(kept[-1].cache)
    with torch.no_grad():
        following = torch.tensor([[5]])
        ours = model(following, cache=kept[-1].cache).logits
        cache = DynamicCache(config=reference.config)
        reference(prompt(seed=2), cache=cache)
        assert torch.equal(ours, reference(following, cache=cache).logits)
        with pytest.raises(RuntimeError, match="make a transformers DynamicCache for each"):
            model(following, cache=kept[0].cache)
        assert torch.equal(model(prompt()).logits, reference(prompt()).logits)


def test_a_cache_by_its_older_name_gets_the_memory_set_aside(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint())
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompt(), **{name: cache})
        assert model.flexinfer.store.kv.holds(cache)
        assert cache.get_seq_length() == prompt().shape[1]
        del cache


@pytest.mark.parametrize("use_cache", [True, False])
def test_scoring_with_and_without_a_cache(
    checkpoint: MakeCheckpoint, load: Load, use_cache: bool
) -> None:
    model, reference = load(checkpoint()), stock(checkpoint())
    with torch.no_grad():
        ours = model(prompt(2), use_cache=use_cache)
        theirs = reference(prompt(2), use_cache=use_cache)
    assert torch.equal(ours.logits, theirs.logits)
    assert (ours.cache is None) == (theirs.cache is None)


def test_a_process_that_grows_gives_locked_memory_back(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    big = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 2,
        "vocab_size": 512,
    }
    model = load(checkpoint("llama", **big), window="8MiB")
    model(prompt())
    resize_to_share(model, 0.6)
    expected, before = logits(model, prompt()), model.flexinfer.plan
    ballast = bytearray(b"x") * (24 << 20)
    with pytest.warns(RuntimeWarning, match=r"the process has grown by 2\d MiB"):
        assert torch.equal(logits(model, prompt()), expected)
    after = model.flexinfer.plan
    assert after.budget_bytes == before.budget_bytes
    assert before.locked_bytes - after.locked_bytes >= 16 << 20
    del ballast
    gc.collect()


def test_a_process_that_grows_where_nothing_is_locked_takes_of_the_margin_and_no_more(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint())
    expected = logits(model, prompt())
    resize_to_share(model, 0.0)
    margin_bytes = model.flexinfer.plan.overheads.margin_bytes
    ballast = [bytearray(b"x") * (margin_bytes * 3 // 4)]
    with pytest.warns(RuntimeWarning, match="the process has grown by"):
        assert torch.equal(logits(model, prompt()), expected)
    ballast.append(bytearray(b"x") * margin_bytes)
    with pytest.raises(flexinfer.BudgetError, match="too little for this model"):
        logits(model, prompt())
    ballast.clear()
    gc.collect()
    assert torch.equal(logits(model, prompt()), expected)


def test_two_threads_that_generate_do_not_mix(checkpoint: MakeCheckpoint, load: Load) -> None:
    model, reference = load(checkpoint(), policy="none"), stock(checkpoint())
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts: dict[int, torch.Tensor] = {}

    def generate(seed: int) -> None:
        texts[seed] = model.generate(prompt(seed=seed), **options)

    threads = [threading.Thread(target=generate, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert torch.equal(texts[seed], reference.generate(prompt(seed=seed), **options))


def test_a_module_called_from_another_thread_gets_its_own_weights(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model, reference = load(checkpoint(), policy="none"), stock(checkpoint())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    right: list[bool] = []

    def call(layer: int) -> None:
        for _ in range(20):
            ours = model.model.layers[layer].mlp.up_proj(x)
            right.append(torch.equal(ours, reference.model.layers[layer].mlp.up_proj(x)))

    threads = [threading.Thread(target=call, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 80


def test_resizing_from_a_streamer_and_from_another_thread(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model, reference = load(checkpoint()), stock(checkpoint())
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(prompt(), **options)
    plans = []

    class Resizing:
        def put(self, value: torch.Tensor) -> None:
            resize_to_share(model, (0.2, 0.7, 0.0)[len(plans) % 3])
            plans.append(model.flexinfer.plan.streamed_bytes)

        def end(self) -> None: ...

    assert torch.equal(model.generate(prompt(), streamer=Resizing(), **options), expected)
    assert len(set(plans)) == 3
    stop = threading.Event()

    def resize() -> None:
        while not stop.is_set():
            for share in (0.1, 0.9, 0.4):
                resize_to_share(model, share)

    thread = threading.Thread(target=resize)
    thread.start()
    try:
        for _ in range(3):
            assert torch.equal(model.generate(prompt(), **options), expected)
    finally:
        stop.set()
        thread.join()


def test_memory_is_given_back_inside_a_pass(checkpoint: MakeCheckpoint, load: Load) -> None:
    model, reference = load(checkpoint()), stock(checkpoint())
    model(prompt())
    resize_to_share(model, 0.9)
    before, seen = model.flexinfer.plan, []

    def hook(*_: object) -> None:
        wanted = model.flexinfer.resize(before.budget_bytes - before.locked_bytes)
        seen.append((model.flexinfer.plan is before, wanted.locked_bytes))

    later = []
    handle = model.model.layers[1].register_forward_hook(hook)
    model.model.layers[2].register_forward_hook(
        lambda *_: later.append(model.flexinfer.plan.locked_bytes)
    )
    with torch.no_grad():
        assert torch.equal(model(prompt()).logits, reference(prompt()).logits)
    handle.remove()
    assert seen[0][0]
    assert later[0] == seen[0][1]
    assert model.flexinfer.plan.locked_bytes == seen[0][1] < before.locked_bytes


def test_a_streamed_weight_has_a_shape_and_no_numbers(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint())
    weight = model.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device.type) == ((176, 64), torch.float32, "cpu")
    assert (
        sum(parameter.numel() for parameter in model.parameters())
        == stock(checkpoint()).num_parameters()
    )
    assert model.to("cpu") is model
    assert "up_proj" in repr(weight)
    for use in (
        lambda: weight + 1,
        lambda: torch.nn.functional.linear(torch.ones(1, 64), weight),
        lambda: weight[0],
        lambda: weight.float().sum(),
        lambda: weight.to(torch.bfloat16),
        lambda: weight.data,
        lambda: weight.tolist(),
        lambda: model.get_input_embeddings().weight.norm(),
        lambda: model.to(torch.float16),
    ):
        with pytest.raises(RuntimeError, match="streamed from disk"):
            use()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize(
    "shape", [PassShape(1, 60), PassShape(1, 60, 0, 0), PassShape(2, 20), PassShape(1, 1, 50)]
)
def test_memory_of_a_pass_on_the_meta_device_covers_its_tensors(
    checkpoint: MakeCheckpoint, family: str, shape: PassShape
) -> None:
    """At least the logits and the widest activations, and more for more tokens."""
    skeleton = build_skeleton(open_checkpoint(checkpoint(family)))
    found = skeleton.meter.extra_bytes(shape, 128)
    rows = shape.batch * shape.new_tokens
    logits_bytes = shape.batch * shape.kept_tokens * 160 * 4
    if family in ("gpt2", "opt") and shape.kept == 1:
        logits_bytes = 0
    assert found >= logits_bytes + rows * 64 * 4 * 2
    twice = PassShape(shape.batch, 2 * shape.new_tokens, shape.past_tokens, shape.kept)
    assert skeleton.meter.extra_bytes(twice, 128) > found

"""A loaded model from beginning to end: what it holds, how it changes its budget, how it fails, and
that nothing is left.
"""

import gc
import os
import pickle
import re
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import DynamicCache

import flexinfer
from flexinfer.memory.buffer import PAGE_BYTES
from flexinfer.memory.process import anonymous_bytes
from flexinfer.sizes import BudgetError, name_budget
from flexinfer.streaming.kv_cache import ContextError
from flexinfer.streaming.reader import ReadError
from tests.conftest import (
    Load,
    MakeCheckpoint,
    logits,
    needs_mlock,
    prompt,
    resize_to_share,
    smallest_budget,
    stock,
)

BIG = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 1, "vocab_size": 512}


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmLck, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def holdings() -> tuple[int, int, int]:
    """Threads, open files and locked bytes of this process."""
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd")), status_bytes("VmLck")


@pytest.mark.parametrize("share", [0.0, 0.5, None])
def test_close_leaves_no_thread_file_or_memory(
    checkpoint: MakeCheckpoint, load: Load, share: float | None
) -> None:
    before = holdings()
    model = load(checkpoint())
    if share is not None:
        resize_to_share(model, share)
    model.generate(prompt(), max_new_tokens=2)
    assert holdings() != before
    model.flexinfer.close()
    assert holdings() == before
    model.flexinfer.close()
    assert holdings() == before


@needs_mlock
def test_library_pages_that_a_pass_needs_are_locked_while_a_model_is_loaded(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    """In a full control group they would be the first to go, and come back one read-ahead at a
    time.
    """
    before = status_bytes("VmLck")
    streamed = [
        load(checkpoint(), policy="none"),
        load(checkpoint(), policy="none", dtype="float32"),
    ]
    streamed[0](prompt())
    for model in streamed:
        libraries = model.flexinfer.store.libraries
        assert model.flexinfer.file_bytes == libraries.nbytes > 8 << 20
        assert status_bytes("VmLck") - before >= libraries.nbytes
        model.flexinfer.close()
    assert status_bytes("VmLck") == before


def test_with_block_closes(checkpoint: MakeCheckpoint, load: Load) -> None:
    before, model = holdings(), load(checkpoint(), policy="none")
    with model.flexinfer as engine:
        assert engine is model.flexinfer
        model(prompt())
    assert holdings() == before


def test_use_after_close_says_so(checkpoint: MakeCheckpoint, load: Load) -> None:
    for policy in ("none", "balanced"):
        model = load(checkpoint(), policy=policy)
        model.flexinfer.close()
        for use in (
            lambda model=model: model(prompt()),
            lambda model=model: model.generate(prompt(), max_new_tokens=1),
            lambda model=model: model.model.layers[0].mlp.up_proj(torch.ones(1, 64)),
            lambda model=model: model.flexinfer.resize("8GiB"),
        ):
            with pytest.raises(
                RuntimeError, match=r"closed; load it again with flexinfer\.from_pretrained"
            ):
                use()
        assert model.flexinfer.stats()["passes"] == 0
        assert model.flexinfer.plan.total_bytes > 0


def test_collecting_an_unclosed_model_ends_its_threads_and_files(
    checkpoint: MakeCheckpoint, small_pieces: None
) -> None:
    before = holdings()
    model = flexinfer.from_pretrained(checkpoint(), "8GiB", context=64, policy="none")
    model.generate(prompt(), max_new_tokens=2)
    assert holdings() != before
    del model
    assert holdings() == before


def test_collecting_a_model_inside_its_own_reader_locks_nothing_up(
    checkpoint: MakeCheckpoint, small_pieces: None
) -> None:
    """The collector runs in whatever thread allocates, a reader of the dropped model too, and while
    the window's lock is held.
    """
    for held in (False, True):
        before = holdings()
        model = flexinfer.from_pretrained(checkpoint(), "8GiB", context=64, policy="none")
        model(prompt())
        engine = model.flexinfer
        queue = engine.store.queue
        del model
        if held:
            with queue.changed:
                gc.collect()
        else:
            collector = threading.Thread(target=gc.collect)
            queue._threads.append(collector)  # as if it were a reader
            collector.start()
            collector.join()
        for thread in threading.enumerate():
            if thread.name == "flexinfer-close":
                thread.join(timeout=60)
                assert not thread.is_alive(), "locked up"
        assert engine.store.closed
        del engine, queue
        assert holdings() == before


def test_a_refused_load_leaves_nothing(checkpoint: MakeCheckpoint, load: Load) -> None:
    before = holdings()
    for bad in (
        {"memory": "1MiB"},
        {"policy": "bananas"},
        {"window": "4 bananas"},
        {"memory": "4 bananas"},
    ):
        with pytest.raises(ValueError, match=r"bananas|too little"):
            load(checkpoint(), **bad)
    for bad in ({"io_threads": -1}, {"context": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            load(checkpoint(), **bad)
    assert holdings() == before


def test_smallest_budget_that_a_refusal_names_works(checkpoint: MakeCheckpoint, load: Load) -> None:
    model = load(checkpoint())
    smallest = smallest_budget(model)
    plan = model.flexinfer.resize(smallest)
    assert plan.slots == 2
    assert plan.locked_bytes == 0
    with pytest.raises(BudgetError, match=re.escape(f"at least {name_budget(smallest)}")):
        model.flexinfer.resize(smallest - 1)
    with pytest.raises(BudgetError, match="at least") as refused:
        load(checkpoint(), "1MiB")
    named = int(str(refused.value).split("at least ")[1].split()[0])
    assert load(checkpoint(), named).flexinfer.plan.budget_bytes == named


def test_resizing_a_live_model_changes_memory_and_not_the_output(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    path = checkpoint("llama", sharded=True)
    model, expected = load(path), logits(stock(path), prompt(2))
    streamed = []
    for share in (0.9, 0.0, 0.4, 5.0, 0.2, 0.2):
        resize_to_share(model, share)
        assert torch.equal(logits(model, prompt(2)), expected), share
        streamed.append(model.flexinfer.plan.streamed_bytes)
    assert streamed[3] == 0 < streamed[0] < streamed[2] < streamed[4] == streamed[5] < streamed[1]


def test_resizing_in_the_middle_of_a_generation(checkpoint: MakeCheckpoint, load: Load) -> None:
    model, reference = load(checkpoint()), stock(checkpoint())
    outputs = []
    for each in (model, reference):
        cache, ids, tokens = DynamicCache(config=each.config), prompt(), []
        for step in range(4):
            if each is model:
                resize_to_share(model, (0.8, 0.1, 3.0, 0.3)[step])
            ids = each(input_ids=ids, cache=cache).logits[:, -1:].argmax(-1)
            tokens.append(ids)
        outputs.append(torch.cat(tokens, dim=-1))
    assert torch.equal(*outputs)


@needs_mlock
def test_memory_is_locked_and_follows_the_budget(checkpoint: MakeCheckpoint) -> None:
    before = holdings()[-1]
    model = flexinfer.from_pretrained(checkpoint("llama", **BIG), "8GiB", context=64, window="8MiB")
    model(prompt())  # the first pass fills what stays
    total = model.flexinfer.plan.total_bytes
    gc.collect()
    unlocked = status_bytes("VmLck") - model.flexinfer.plan.kv_bytes - total
    tolerance = 1 << 20
    for share in (0.0, 0.7, 0.2, 3.0, 0.4):
        resize_to_share(model, share)
        model(prompt())
        gc.collect()
        plan = model.flexinfer.plan
        locked = plan.locked_bytes + plan.window_bytes + plan.kv_bytes
        assert status_bytes("VmLck") - unlocked == pytest.approx(locked, abs=tolerance), share
        assert anonymous_bytes() <= plan.budget_bytes
    model.flexinfer.close()
    gc.collect()
    assert status_bytes("VmLck") == before


def test_a_budget_that_is_refused_leaves_the_model_as_it_was(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint())
    resize_to_share(model, 0.5)
    expected, plan = logits(model, prompt()), model.flexinfer.plan
    for bad in ("1MiB", "4 bananas", 0, -1):
        with pytest.raises(BudgetError, match="memory="):
            model.flexinfer.resize(bad)
        assert model.flexinfer.plan is plan
        assert torch.equal(logits(model, prompt()), expected)


def test_weights_cannot_be_saved_from_a_streamed_model(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path
) -> None:
    model = load(checkpoint())
    for save in (
        lambda: safetensors.torch.save_file(model.state_dict(), tmp_path / "copy.safetensors"),
        lambda: model.save_pretrained(tmp_path / "copy"),
        lambda: pickle.dumps(model.state_dict()),
        lambda: stock(checkpoint()).load_state_dict(model.state_dict()),
    ):
        with pytest.raises(
            RuntimeError, match=r"weight is streamed from disk.*the checkpoint on disk is unchanged"
        ):
            save()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_sequence_longer_than_the_context_is_refused(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint(), context=16)
    assert model.generate(prompt(tokens=8), max_new_tokens=8, eos_token_id=None).shape == (1, 16)
    with pytest.raises(ContextError, match=r"context=16.*from_pretrained\(\.\.\., context=17\)"):
        model.generate(prompt(tokens=8), max_new_tokens=10, eos_token_id=None)
    with pytest.raises(ContextError, match=r"context=16 tokens in all \(2 x 8\).*2 x 9"):
        model.generate(prompt(2, tokens=9), max_new_tokens=1)
    assert model.generate(prompt(2, tokens=4), max_new_tokens=4, eos_token_id=None).shape == (2, 8)


def test_two_live_caches_do_not_mix(checkpoint: MakeCheckpoint, load: Load) -> None:
    model, reference = load(checkpoint()), stock(checkpoint())
    first, second = prompt(seed=1), prompt(seed=2)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    expected = [DynamicCache(config=model.config) for _ in range(2)]
    for _ in range(3):
        for ids, ours, theirs in zip((first, second), caches, expected, strict=True):
            a = model(input_ids=ids, cache=ours).logits
            assert torch.equal(a, reference(input_ids=ids, cache=theirs).logits)


@pytest.mark.parametrize("io_threads", [0, 2])
@pytest.mark.parametrize("direct", [True, False])
def test_a_shard_cut_short_while_running_is_an_error_and_mends(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path, io_threads: int, direct: bool
) -> None:
    """Stock transformers maps the file: there it is a bus error."""
    for file in checkpoint().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    model = load(tmp_path, policy="none", io_threads=io_threads, direct=direct)
    expected = logits(model, prompt())
    weights.write_bytes(content[: len(content) // 2])
    for _ in range(2):
        with pytest.raises(
            ReadError, match=r"model.safetensors: ends before byte \d+: truncated while"
        ):
            logits(model, prompt())
    weights.write_bytes(content)
    before = model.flexinfer.stats()["passes"]
    assert torch.equal(logits(model, prompt()), expected), (
        "the first pass after the repair is right"
    )
    assert torch.equal(logits(model, prompt()), expected)
    assert model.flexinfer.stats()["passes"] > before


def test_a_pass_that_is_interrupted_and_the_next_one(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model, reference = load(checkpoint(), policy="none"), stock(checkpoint())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for layer in (0, 2, 3):
        hook = model.model.layers[layer].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt())
        hook.remove()
        assert torch.equal(logits(model, prompt()), logits(reference, prompt()))
    assert model.flexinfer.stats()["resyncs"] == 3


def test_a_token_outside_the_vocabulary(checkpoint: MakeCheckpoint, load: Load) -> None:
    model = load(checkpoint(), policy="none")
    for bad in (-1, 160):
        with pytest.raises(IndexError, match="160 rows"):
            model(torch.tensor([[5, bad]]))
    assert torch.equal(logits(model, prompt()), logits(stock(checkpoint()), prompt()))


def read_bytes() -> int:
    """Bytes this process has had read from disks."""
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


@pytest.mark.parametrize("io_threads", [0, 2])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_bytes_read_in_a_pass_are_those_of_the_plan(
    checkpoint: MakeCheckpoint, load: Load, io_threads: int, share: float
) -> None:
    """Each piece with the pages at its ends, and one row of the embedding: no more, no less."""
    model = load(checkpoint(), io_threads=io_threads)
    if not model.flexinfer.store.reader.direct:
        pytest.skip(
            "no direct reads on this file system, and those through the page cache are counted "
            "otherwise"
        )
    resize_to_share(model, share)
    engine = model.flexinfer
    streamed = [
        p
        for w in engine.runner.planner.weights
        for p in w.pieces[engine.plan.locked_pieces.get(w.name, 0) :]
    ]
    assert sum(p.nbytes for p in streamed) == engine.plan.streamed_bytes > 0
    with_pages = sum(p.memory_bytes for p in streamed)
    assert with_pages <= engine.plan.streamed_bytes + 2 * PAGE_BYTES * len(streamed)

    def quiet_count() -> tuple[int, int]:
        """Counted when the readers have filled the window, as at the end of each pass."""
        counts = (-1, -1)
        while counts != (counts := (read_bytes(), engine.stats()["bytes_read"])):
            threading.Event().wait(0.1)
        return counts

    model(prompt(tokens=1))
    before = quiet_count()
    for _ in range(3):
        model(prompt(tokens=1))
    by_kernel, by_us = (after - start for after, start in zip(quiet_count(), before, strict=True))
    row_bytes = 64 * 4
    rows = 3 * PAGE_BYTES
    assert by_us - 3 * with_pages in (rows, 2 * rows)  # a row may lie on two pages
    assert row_bytes < PAGE_BYTES
    assert by_us - 3 * PAGE_BYTES <= by_kernel <= by_us  # the file's last page is not whole

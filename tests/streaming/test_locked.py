"""Memory that keeps weights is filled by the first pass: every byte once, in the order of use,
while the pass computes; and errors of it.
"""

import errno
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from flexinfer.streaming.reader import ReadError
from tests.conftest import (
    Load,
    MakeCheckpoint,
    logits,
    prompt,
    resize_to_share,
    smallest_budget,
    stock,
)

Read = tuple[Path, int, int]


def watched(
    model: PreTrainedModel, before: Callable[[int], None] = lambda offset: None
) -> list[Read]:
    """The reads of weights from now on, in the order in which they begin; `before` each, with its
    offset.
    """
    reader, reads, lock = model.flexinfer.store.reader, list[Read](), threading.Lock()
    read_now = reader.read_now

    def read(file: Path, offset_bytes: int, nbytes: int, into: memoryview) -> int:
        with lock:
            reads.append((file, offset_bytes, nbytes))
        before(offset_bytes)
        return read_now(file, offset_bytes, nbytes, into)

    reader.read_now = read
    return reads


def half(checkpoint: MakeCheckpoint, load: Load, **options: object) -> PreTrainedModel:
    """A model that keeps about half of its weights, nothing of it read yet."""
    model = load(checkpoint("llama"), **options)
    resize_to_share(model, 0.5)
    plan = model.flexinfer.plan
    assert 0.3 < plan.locked_bytes / plan.total_bytes < 0.7
    return model


def of_weights(model: PreTrainedModel, reads: list[Read]) -> "Counter[tuple[str, int]]":
    """How often each row of each weight was read."""
    rows: Counter[tuple[str, int]] = Counter()
    for weight in model.flexinfer.runner.planner.weights:
        for piece in weight.pieces:
            for file, offset, nbytes in reads:
                if file == piece.file and offset <= piece.offset_bytes < offset + nbytes:
                    assert piece.offset_bytes + piece.nbytes <= offset + nbytes
                    rows[weight.name, piece.row_start] += 1
    return rows


@pytest.mark.parametrize("io_threads", [0, 1, 2])
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_the_first_pass_reads_every_weight_once(
    checkpoint: MakeCheckpoint, load: Load, io_threads: int, share: float
) -> None:
    """Loading has read none that stays; beyond the pass no more than the window holds is read."""
    model = load(checkpoint("llama"), io_threads=io_threads)
    resize_to_share(model, share)
    reads, engine = watched(model), model.flexinfer
    assert engine.stats()["bytes_read"] == 0
    assert torch.equal(
        logits(model, prompt(), steps=0), logits(stock(checkpoint("llama")), prompt(), steps=0)
    )
    rows = of_weights(model, reads)
    assert set(rows) == {
        (w.name, p.row_start) for w in engine.runner.planner.weights for p in w.pieces
    }
    locked = {
        (w.name, p.row_start)
        for w in engine.runner.planner.weights
        for p in w.pieces[: engine.plan.locked_pieces.get(w.name, 0)]
    }
    assert {rows[row] for row in locked} == {1}
    again = sum(rows.values()) - len(rows)
    assert again <= engine.plan.slots if io_threads else again == 0
    starts = [
        offset
        for w in engine.runner.planner.weights
        for offset in [w.pieces[0].offset_bytes]
        if (w.name, 0) in locked
    ]
    begun = [offset for _, offset, _ in reads if offset in set(starts)]
    if io_threads < 2:
        assert begun == starts, "in the order of use"
    model.flexinfer.close()


def test_the_second_pass_reads_what_is_streamed_alone(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = half(checkpoint, load, io_threads=0)
    logits(model, prompt(), steps=0)
    reads, plan = watched(model), model.flexinfer.plan
    logits(model, prompt(), steps=0)
    of_pieces = [nbytes for _, _, nbytes in reads if nbytes > 64 * 4]  # rows of the embedding apart
    assert sum(of_pieces) == plan.streamed_bytes


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_it_computes_before_all_has_been_read(
    checkpoint: MakeCheckpoint, load: Load, share: float
) -> None:
    """The last weight is not to be had until the first layer has run."""
    model = load(checkpoint("llama"))
    resize_to_share(model, share)
    ran = threading.Event()
    model.model.layers[0].register_forward_hook(lambda *_: ran.set())
    last = {piece.offset_bytes for piece in model.flexinfer.runner.planner.weights[-1].pieces}
    watched(
        model,
        lambda offset: None if offset not in last or ran.wait(60) else pytest.fail("too late"),
    )
    assert torch.equal(logits(model, prompt()), logits(stock(checkpoint("llama")), prompt()))


@pytest.mark.parametrize("io_threads", [0, 2])
def test_an_error_of_the_first_pass_is_raised_and_the_next_goes_on(
    checkpoint: MakeCheckpoint, load: Load, io_threads: int
) -> None:
    model = half(checkpoint, load, io_threads=io_threads)
    broken, engine = threading.Event(), model.flexinfer
    middle = {
        p.offset_bytes
        for p in engine.runner.planner.weights[len(engine.runner.planner.weights) // 2].pieces
    }

    def fail(offset: int) -> None:
        if broken.is_set() and offset in middle:
            raise ReadError(errno.EIO, f"file: reading at {offset}: broken")

    reads = watched(model, fail)
    broken.set()
    for _ in range(2):
        with pytest.raises(ReadError, match="broken"):
            logits(model, prompt())
    broken.clear()
    assert torch.equal(logits(model, prompt()), logits(stock(checkpoint("llama")), prompt()))
    kept = [
        w.pieces[0].offset_bytes
        for w in engine.runner.planner.weights[: len(engine.runner.planner.weights) // 2]
    ]
    for start in kept:
        if engine.plan.locked_pieces[engine.runner.planner.weights[kept.index(start)].name]:
            assert [offset for _, offset, _ in reads].count(start) == 1, "what was filled stays"


def test_a_read_of_the_first_pass_that_never_returns_is_given_up(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint("llama"), read_timeout_s=2.0)
    come_back, once = threading.Event(), iter([True])
    weight = model.flexinfer.runner.planner.weights[5]
    stuck = weight.pieces[0].offset_bytes
    watched(
        model,
        lambda offset: come_back.wait() and None if offset == stuck and next(once, False) else None,
    )
    expected = logits(stock(checkpoint("llama")), prompt())
    with pytest.raises(ReadError, match=r"took more than read_timeout_s=2"):
        logits(model, prompt())
    assert torch.equal(logits(model, prompt()), expected), "with the read still stuck"
    come_back.set()
    assert torch.equal(logits(model, prompt()), expected)


def test_ctrl_c_in_the_first_pass_leaves_a_model_that_goes_on(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    wishes = ["stop"]

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "pass" and done > total / 3 and wishes:
            wishes.clear()
            raise KeyboardInterrupt

    model = load(checkpoint("llama"), progress=stop)
    resize_to_share(model, 0.5)
    with pytest.raises(KeyboardInterrupt):
        logits(model, prompt())
    assert "first_token_s" not in model.flexinfer.stats()
    assert torch.equal(logits(model, prompt()), logits(stock(checkpoint("llama")), prompt()))


@pytest.mark.parametrize("shares", [(0.9, 0.1), (0.1, 0.9), (0.9, 0.0, 2.0)])
def test_another_budget_in_the_middle_of_the_first_pass(
    checkpoint: MakeCheckpoint, load: Load, shares: tuple[float, ...]
) -> None:
    model = load(checkpoint("llama"))
    resize_to_share(model, shares[0])
    later = iter(shares[1:])
    smallest, whole = smallest_budget(model), model.flexinfer.plan.total_bytes

    def resize(*_: object) -> None:
        if (share := next(later, None)) is not None:
            model.flexinfer.resize(smallest + int(share * whole))

    model.model.layers[1].register_forward_hook(resize)
    model.model.layers[2].register_forward_hook(resize)
    expected = logits(stock(checkpoint("llama")), prompt())
    assert torch.equal(logits(model, prompt()), expected)
    assert torch.equal(logits(model, prompt()), expected)


def test_closing_before_all_is_read_ends_the_readers(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    before = threading.active_count()
    model = half(checkpoint, load)
    model.model.layers[1].register_forward_hook(lambda *_: model.flexinfer.close())
    with pytest.raises(RuntimeError, match="closed"):
        model(prompt())
    assert threading.active_count() == before


def test_weights_in_another_dtype_are_converted_by_the_first_pass(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    path = checkpoint("llama", torch.bfloat16)
    model = load(path, dtype="float32")
    resize_to_share(model, 0.8)
    reads = watched(model)
    expected = logits(stock(path, dtype=torch.float32), prompt(), steps=0)
    assert torch.equal(logits(model, prompt(), steps=0), expected)
    rows = of_weights(model, reads)
    assert sum(rows.values()) - len(rows) <= model.flexinfer.plan.slots


def test_the_time_to_the_first_token_is_that_of_loading_and_one_pass(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = half(checkpoint, load)
    assert "first_token_s" not in model.flexinfer.stats()
    model(prompt())
    stats = model.flexinfer.stats()
    assert stats["first_token_s"] > stats["pass_s"] > 0
    model(prompt())
    assert model.flexinfer.stats()["first_token_s"] == stats["first_token_s"]

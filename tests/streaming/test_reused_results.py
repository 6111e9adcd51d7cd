"""Results of operations that use memory again: the same bits, less memory taken, and none of it
left.
"""

import gc
from typing import Any

import pytest
import torch

import flexinfer.engine.runner
import flexinfer.modules.results
from flexinfer.memory.buffer import PAGE_BYTES, Buffer
from flexinfer.modules.results import INTO_MEMORY, SMALLEST_BYTES, ReusedResults
from tests.conftest import FAMILIES, Load, MakeCheckpoint, logits, prompt, resize_to_share, stock

aten = torch.ops.aten
SHAPE = (512, SMALLEST_BYTES // 1024)  # float32: twice the smallest that is taken care of
NBYTES = 2 * SMALLEST_BYTES


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flexinfer.engine.runner, "MANY_ROWS", 1)
    monkeypatch.setattr(flexinfer.modules.results, "SMALLEST_BYTES", 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("any_size")
def test_logits_are_those_of_a_model_that_takes_new_memory(
    checkpoint: MakeCheckpoint, load: Load, family: str, dtype: torch.dtype
) -> None:
    path = checkpoint(family, dtype)
    model, reference = load(path), stock(path)
    resize_to_share(model, 0.5)
    assert torch.equal(logits(model, prompt(3)), logits(reference, prompt(3)))


OPERATIONS: dict[Any, tuple[Any, ...]] = {
    aten.add.Tensor: (torch.randn(SHAPE), torch.randn(SHAPE[1])),
    aten.sub.Tensor: (torch.randn(SHAPE), 2.0),
    aten.mul.Tensor: (torch.randn(SHAPE).T, torch.randn(SHAPE).T),
    aten.div.Tensor: (torch.randint(9, SHAPE), 4),
    aten.pow.Tensor_Scalar: (torch.randn(SHAPE), 2),
    aten.cat.default: ([torch.randn(SHAPE), torch.randn(SHAPE)], 1),
    aten.gather.default: (torch.randn(SHAPE), 1, torch.randint(SHAPE[1], SHAPE)),
    aten.mm.default: (torch.randn(SHAPE), torch.randn(SHAPE[::-1]).T.contiguous().T),
    aten.addmm.default: (torch.randn(512), torch.randn(SHAPE), torch.randn(SHAPE[::-1])),
    aten.clone.default: (torch.randn(SHAPE)[:, ::2],),
    aten._to_copy.default: (torch.randn(SHAPE),),
}


@pytest.mark.parametrize(
    "operation", [*INTO_MEMORY, aten.clone.default, aten._to_copy.default], ids=str
)
def test_each_operation_gives_the_same_numbers_in_the_same_layout(operation: Any) -> None:
    args = OPERATIONS.get(operation, (torch.randn(SHAPE).T,))
    options = {"dtype": torch.float16} if operation is aten._to_copy.default else {}
    expected = operation(*args, **options)
    with ReusedResults(1 << 30) as results:
        found = operation(*args, **options)
        assert results.taken_bytes >= expected.nbytes, "the result is in memory of ours"
    assert torch.equal(found, expected)
    assert (found.dtype, found.shape, found.stride()) == (
        expected.dtype,
        expected.shape,
        expected.stride(),
    )


def test_memory_of_a_result_that_is_gone_is_used_again_and_no_other() -> None:
    x = torch.randn(SHAPE)
    with ReusedResults(1 << 30) as results:
        kept = x + 1
        for _ in range(5):
            gone = x * 2
            view = gone[3:]  # keeps it too
            address = gone.data_ptr()
            del gone
            assert (x - 1).data_ptr() != address
            del view
        assert results.taken_bytes <= 4 * NBYTES
        assert results.in_use_bytes == NBYTES
        assert torch.equal(kept, x + 1)
    before = kept.clone()
    with ReusedResults(1 << 30):
        x * 3
    assert torch.equal(kept, before), "a result outlives its pass"


def test_what_is_kept_and_what_is_in_use_are_within_the_limit() -> None:
    x = torch.randn(SHAPE)
    with ReusedResults(5 * NBYTES) as results:
        held = [x + i for i in range(3)]
        del held
        assert (results.kept_bytes, results.in_use_bytes) == (3 * NBYTES, 0)
        wide = torch.cat([x, x, x])  # of another size
        assert (results.kept_bytes, results.in_use_bytes) == (2 * NBYTES, 3 * NBYTES)
        order = torch.argsort(x)  # takes its memory elsewhere
        assert results.in_use_bytes == 3 * NBYTES + order.nbytes
        assert results.kept_bytes <= NBYTES
        assert wide.shape == (3 * SHAPE[0], SHAPE[1])
    with ReusedResults(0) as results:  # as without it
        assert torch.equal((x + 1) * 2, 2 * (x + 1))
        assert results.kept_bytes == 0


def test_a_pass_leaves_nothing_behind(
    checkpoint: MakeCheckpoint, load: Load, any_size: None
) -> None:
    model = load(checkpoint())
    model(prompt())
    gc.collect()
    before = sum(type(one) is Buffer for one in gc.get_objects())
    for ids in (prompt(1, 40), prompt(2, 9)):
        model(ids)
        with pytest.raises(IndexError):
            model(ids + 10_000)
    gc.collect()
    assert sum(type(one) is Buffer for one in gc.get_objects()) == before
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_pages_are_whole() -> None:
    with ReusedResults(1 << 30) as results:
        torch.empty(SMALLEST_BYTES + 1, dtype=torch.uint8)
    assert results.taken_bytes % PAGE_BYTES == 0

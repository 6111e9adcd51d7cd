"""ggml's kernels: right numbers, the same bits however a weight is cut, laid and shared out, and
clear errors.
"""

import importlib.util
import itertools
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from flexinfer.formats.ggml_types import GgmlError, GgmlType
from flexinfer.kernels import ggml, ggml_abi
from flexinfer.kernels.ggml import (
    FEW_ROWS,
    KEPT_SHAPES,
    TYPES,
    WORK_ROWS,
    GgmlKernel,
    dequantize_rows,
    library,
    multiply_rows,
    quantize_rows,
)
from flexinfer.memory.buffer import Buffer

IN = 512
ROWS = 75
NEED_CALIBRATION = {"IQ1_S", "IQ2_XXS", "IQ2_XS"}
SLOW_TO_MAKE = {"IQ1_M", "IQ2_S"}
every_type = pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)


def random_rows(kind: GgmlType, rows: int = ROWS, in_features: int = IN) -> torch.Tensor:
    """Rows of random weights; where ggml cannot quantise them, or needs long, random blocks with a
    small scale.
    """
    if kind.name not in NEED_CALIBRATION | SLOW_TO_MAKE:
        return quantize_rows(kind, torch.randn(rows, in_features))
    blocks = torch.randint(
        256, (rows, in_features // kind.block_elements, kind.block_bytes), dtype=torch.uint8
    )
    if kind.name == "IQ1_M":  # the exponent of its scale
        blocks[..., -1] = blocks[..., -1] & 0x0F | 0x20
    else:
        blocks[..., :2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    return blocks.view(rows, -1)


def multiply(kind: GgmlType, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return GgmlKernel(x.shape[-1], kind, x.dtype).multiply(x, packed, len(packed), None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_type
def test_blocks_are_those_of_the_format(kind: GgmlType) -> None:
    theirs = gguf.GGMLQuantizationType[kind.name]
    assert theirs.value == kind.id
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block_elements, kind.block_bytes)


@every_type
def test_weights_are_those_that_the_gguf_package_reads(kind: GgmlType) -> None:
    packed = random_rows(kind)
    theirs = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind.name])
    assert np.array_equal(dequantize_rows(kind, packed, IN).numpy(), theirs)


@every_type
@pytest.mark.parametrize("activation_rows", [1, 5, 40])
def test_a_product_is_that_of_the_weights_up_to_8_bit_activations(
    kind: GgmlType, activation_rows: int
) -> None:
    packed, x = random_rows(kind), torch.randn(activation_rows, IN)
    exact = x @ dequantize_rows(kind, packed, IN).T
    assert (multiply(kind, x, packed) - exact).norm() < 0.02 * exact.norm()


@every_type
@pytest.mark.parametrize("activation_rows", [1, 2, 7, 8, 33, WORK_ROWS + 1])
def test_cutting_and_moving_rows_changes_no_bit(kind: GgmlType, activation_rows: int) -> None:
    packed, x = random_rows(kind), torch.randn(activation_rows, IN)
    kernel = GgmlKernel(IN, kind, torch.float32)
    whole = kernel.multiply(x, packed, ROWS, None)
    for cuts, offset in (((0, 1, 34, ROWS), 2), ((0, 16, 61, ROWS), 34)):
        parts = []
        for start, stop in itertools.pairwise(cuts):
            buffer = Buffer((stop - start) * kernel.row_bytes + offset, lock=False)
            view = kernel.view(buffer, offset, stop - start)
            view.copy_(packed[start:stop])
            parts.append(kernel.multiply(x, view, stop - start, None))
        assert torch.equal(torch.cat(parts, -1), whole)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
@pytest.mark.parametrize("activation_rows", [2, 20])
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit(name: str, activation_rows: int) -> None:
    packed, x = random_rows(TYPES[name], 1100, 1024), torch.randn(activation_rows, 1024)
    assert x.numel() * len(packed) > ggml.ONE_THREAD_WORK
    products = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        products.append(multiply(TYPES[name], x, packed))
    assert torch.equal(products[0], products[1])
    assert torch.equal(products[0], products[2])


@every_type
def test_a_row_does_not_depend_on_the_others_of_a_batch_as_large(kind: GgmlType) -> None:
    packed, x = random_rows(kind), torch.randn(40, IN)
    assert torch.equal(multiply(kind, x, packed)[3:13], multiply(kind, x[3:13], packed))
    assert torch.equal(multiply(kind, x[:7], packed)[3:5], multiply(kind, x[3:5], packed))


def test_many_rows_are_multiplied_in_equal_parts() -> None:
    packed, x = random_rows(TYPES["Q4_K"]), torch.randn(WORK_ROWS + 10, IN)
    parts = [multiply(TYPES["Q4_K"], part, packed) for part in x.tensor_split(2)]
    assert torch.equal(multiply(TYPES["Q4_K"], x, packed), torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_once_with_the_bias(dtype: torch.dtype) -> None:
    kind, x, bias = TYPES["Q6_K"], torch.randn(2, 3, IN).to(dtype), torch.randn(ROWS).to(dtype)
    packed = random_rows(kind)
    y = GgmlKernel(IN, kind, dtype).multiply(x, packed, ROWS, bias)
    assert torch.equal(y, (multiply(kind, x.float(), packed) + bias).to(dtype))
    assert y.shape == (2, 3, ROWS)


def test_activations_may_lie_apart_or_be_none() -> None:
    packed, x = random_rows(TYPES["Q5_0"]), torch.randn(4, 2 * IN)
    assert torch.equal(
        multiply(TYPES["Q5_0"], x[:, ::2], packed),
        multiply(TYPES["Q5_0"], x[:, ::2].clone(), packed),
    )
    assert multiply(TYPES["Q5_0"], x[:0, :IN], packed).shape == (0, ROWS)


def test_several_threads_may_multiply() -> None:
    packed, xs = random_rows(TYPES["Q4_0"], 1024, 1024), torch.randn(8, 2, 1024)
    alone = [multiply(TYPES["Q4_0"], x, packed) for x in xs]
    with ThreadPoolExecutor(4) as executor:
        together = list(executor.map(lambda x: multiply(TYPES["Q4_0"], x, packed), xs))
    assert all(map(torch.equal, alone, together))


def test_an_interrupt_comes_through_and_leaves_nothing_behind() -> None:
    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def until_interrupted(microseconds: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)
        while True:
            multiply(TYPES["Q4_K"], x, packed)

    packed, x = random_rows(TYPES["Q4_K"], 1024, 1024), torch.randn(4, 1024)
    expected = multiply(TYPES["Q4_K"], x, packed)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for microseconds in range(100, 3000, 100):
            with pytest.raises(KeyboardInterrupt):
                until_interrupted(microseconds)
            assert torch.equal(multiply(TYPES["Q4_K"], x, packed), expected)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_memory_to_work_in_is_bounded_and_given_back() -> None:
    kernel = GgmlKernel(IN, TYPES["Q4_K"], torch.float32)
    assert kernel.work_bytes(10 * WORK_ROWS, ROWS) == kernel.work_bytes(WORK_ROWS, ROWS)
    in_bf16 = GgmlKernel(IN, TYPES["Q4_K"], torch.bfloat16).work_bytes(WORK_ROWS, ROWS)
    assert in_bf16 == kernel.work_bytes(WORK_ROWS, ROWS) + 4 * WORK_ROWS * (IN + ROWS)
    kernel.multiply(torch.randn(FEW_ROWS + 1, IN), random_rows(kernel.type), ROWS, None)
    assert library()._work == []


def test_graphs_of_the_last_shapes_are_kept_and_no_more() -> None:
    kernel = GgmlKernel(IN, TYPES["Q4_K"], torch.float32)
    packed, x = random_rows(kernel.type), torch.randn(1, IN)
    expected = kernel.multiply(x, packed, ROWS, None)
    kept = library()._shared
    graphs = list(kept.values())[-1]
    kernel.multiply(torch.randn(2, IN), packed, ROWS, None)
    assert torch.equal(kernel.multiply(x, packed, ROWS, None), expected)
    assert list(kept.values())[-1] is graphs
    for rows in range(3, KEPT_SHAPES + 3):
        kernel.multiply(torch.randn(rows, IN), packed, ROWS, None)
    assert len(kept) == KEPT_SHAPES
    assert torch.equal(kernel.multiply(x, packed, ROWS, None), expected)


def test_graphs_that_are_no_longer_kept_are_used_for_other_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    class Counted(ggml.Product):
        def __init__(self, *libraries: Any) -> None:
            made.append(self)
            super().__init__(*libraries)

    monkeypatch.setattr(ggml, "Product", Counted)
    monkeypatch.setattr(library(), "_shared", {})
    monkeypatch.setattr(library(), "_spare", [])
    kernel = GgmlKernel(1024, TYPES["Q4_K"], torch.float32)
    packed = random_rows(kernel.type, 1100, 1024)
    counts = []
    for _ in range(3):
        for rows in range(1, KEPT_SHAPES + 5):  # few rows and many: more shares and fewer
            kernel.multiply(torch.randn(rows, 1024), packed, 1100, None)
        counts.append(len(made))
    assert counts[0] >= KEPT_SHAPES
    assert counts[2] <= counts[0] + ggml.SHARES_OF_FEW * torch.get_num_threads()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_row_for_each_weight_gives_what_each_gives_alone(name: str, count: int) -> None:
    kernel, x = GgmlKernel(1024, TYPES[name], torch.float32), torch.randn(count, 1024)
    weights = [random_rows(kernel.type, 1100, 1024) for _ in range(count)]
    alone = [
        kernel.multiply(row[None], packed, 1100, None)
        for row, packed in zip(x, weights, strict=True)
    ]
    assert torch.equal(
        multiply_rows(x, [(kernel, packed.data_ptr()) for packed in weights], 1100),
        torch.cat(alone),
    )


@pytest.mark.parametrize("activation_rows", [1, 20])
@pytest.mark.usefixtures("threads")
def test_output_rows_are_cut_into_more_shares_than_threads(activation_rows: int) -> None:
    packed, x = random_rows(TYPES["Q4_K"], 1100, 1024), torch.randn(activation_rows, 1024)
    torch.set_num_threads(2)
    multiply(TYPES["Q4_K"], x, packed)
    assert len(list(library()._shared.values())[-1]) == 2 * (
        ggml.SHARES_OF_FEW if activation_rows == 1 else ggml.SHARES_OF_MANY
    )


def test_rows_that_end_within_a_block_are_refused() -> None:
    with pytest.raises(GgmlError, match=r"Q4_K: rows of 288 .* 256"):
        quantize_rows(TYPES["Q4_K"], torch.randn(2, 288))


def test_weights_that_are_not_numbers_are_refused() -> None:
    weight = torch.randn(2, IN)
    weight[1, 7] = torch.inf
    with pytest.raises(GgmlError, match="infinity"):
        quantize_rows(TYPES["Q4_0"], weight)


@pytest.mark.parametrize("name", sorted(NEED_CALIBRATION))
def test_types_that_need_calibration_are_refused(name: str) -> None:
    with pytest.raises(GgmlError, match=name):
        quantize_rows(TYPES[name], torch.randn(2, IN))


def test_without_ggml_the_error_says_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GgmlError, match=r"pip install 'flexinfer\[ggml\]'"):
        library.__wrapped__()


def test_a_package_without_its_libraries_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GgmlError, match=r"pip install 'flexinfer\[ggml\]'"):
        ggml.Library(tmp_path)


def test_kernels_that_no_cpu_here_can_run_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(GgmlError, match="no kernels for this CPU"):
        ggml_abi.best_kernels(tmp_path)


def test_another_version_of_ggml_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "VERSION", "9.")
    with pytest.raises(GgmlError, match=r"0\.26.* knows 9"):
        library.__wrapped__()

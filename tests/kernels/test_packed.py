"""Packed blocks: what is stored is what is multiplied, whatever the shape, the way taken and the place in memory."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexinfer.kernels.packed import (
    ALIGNMENT_BYTES,
    BLOCK_BYTES,
    TILE_ROWS,
    PackedError,
    PackedFormat,
    blocks,
    can_pack,
    cpu_layout,
    dequantize,
    measure_dequantize_rows,
    pack_rows,
    packed_linear,
    packed_nbytes,
)

INT4, INT4_32, INT8 = (
    PackedFormat.for_this_cpu(4, 64),
    PackedFormat.for_this_cpu(4, 32),
    PackedFormat.for_this_cpu(8),
)
FORMATS = pytest.mark.parametrize("fmt", [INT4, INT4_32, INT8], ids=["int4", "int4-32", "int8"])
SHAPES = pytest.mark.parametrize("shape", [(64, 64), (17, 128), (100, 64), (176, 192), (192, 576)], ids=str)


def weight_of(rows: int, in_features: int) -> torch.Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)) * 0.05


@FORMATS
@SHAPES
def test_kernel_multiplies_by_what_dequantize_returns(fmt: PackedFormat, shape: tuple[int, int]) -> None:
    rows, in_features = shape
    block = pack_rows(fmt, weight_of(rows, in_features))
    one_hot = torch.eye(in_features, dtype=torch.bfloat16)
    columns = packed_linear(replace(fmt, dequantize_rows=10**6), one_hot, block, rows, in_features)
    assert torch.equal(columns, dequantize(fmt, block, rows, in_features).T.bfloat16())


@SHAPES
def test_int8_weights_survive_within_half_a_step(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    error = (dequantize(INT8, pack_rows(INT8, weight), *shape) - weight).abs()
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert (
        error <= (0.5 + 127 * 2**-9) * step * 1.01
    ).all()  # a scale in bf16 is off by up to 2^-9 of itself


@pytest.mark.parametrize("fmt", [INT4, INT4_32], ids=["int4", "int4-32"])
@SHAPES
def test_int4_is_no_worse_than_rounding_in_the_whole_range(fmt: PackedFormat, shape: tuple[int, int]) -> None:
    weight = weight_of(*shape) ** 3  # with outliers, for which narrower ranges are
    groups = weight.view(shape[0], -1, fmt.group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    plain = (groups - zero).div(scale).round().clamp(-8, 7) * scale + zero
    found = dequantize(fmt, pack_rows(fmt, weight), *shape).view_as(groups)
    plain_error, found_error = ((way - groups).abs().pow(2.5).sum(-1) for way in (plain, found))
    assert (found_error <= plain_error * 1.001).all()
    assert found_error.sum() < 0.97 * plain_error.sum()


@pytest.mark.parametrize("value", [0.0, 0.37, -3.0])
@FORMATS
def test_constant_weights(fmt: PackedFormat, value: float) -> None:
    weight = torch.full((32, 64), value)
    assert torch.allclose(dequantize(fmt, pack_rows(fmt, weight), 32, 64), weight, rtol=2**-8)


@FORMATS
def test_many_rows_and_few_agree(fmt: PackedFormat) -> None:
    rows, in_features = 176, 192
    block = pack_rows(fmt, weight_of(rows, in_features))
    x = torch.randn(2, 20, in_features, dtype=torch.bfloat16)
    exact = x.float() @ dequantize(fmt, block, rows, in_features).T
    for dequantize_rows in (1, 40, 41):
        y = packed_linear(replace(fmt, dequantize_rows=dequantize_rows), x, block, rows, in_features)
        assert y.shape == (2, 20, rows)
        assert y.dtype == x.dtype
        assert torch.allclose(y.float(), exact, rtol=2**-7, atol=2e-3)


@FORMATS
def test_many_rows_in_several_steps_equal_one(fmt: PackedFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, in_features = 400, 128
    block = pack_rows(fmt, weight_of(rows, in_features))
    weight = dequantize(fmt, block, rows, in_features)
    monkeypatch.setattr("flexinfer.kernels.packed.SCRATCH_WEIGHTS", 64 * in_features)
    eye = torch.eye(in_features)
    assert torch.equal(
        packed_linear(replace(fmt, dequantize_rows=1), eye, block, rows, in_features), weight.T
    )


@FORMATS
def test_packing_in_slices_equals_packing_at_once(fmt: PackedFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(300, 128)
    whole = pack_rows(fmt, weight)
    monkeypatch.setattr("flexinfer.kernels.packed.PACK_WEIGHTS", 64 * 128)
    assert torch.equal(pack_rows(fmt, weight), whole)


@FORMATS
@pytest.mark.parametrize("dequantize_rows", [1, 1000])
def test_place_in_memory_changes_no_bit(fmt: PackedFormat, dequantize_rows: int) -> None:
    fmt = replace(fmt, dequantize_rows=dequantize_rows)
    block = pack_rows(fmt, weight_of(80, 128))
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    expected = packed_linear(fmt, x, block, 80, 128)
    for offset_bytes in (2, 4, 8, 4096 + 6):
        memory = torch.zeros(offset_bytes + block.numel() + 100, dtype=torch.uint8)
        memory[offset_bytes : offset_bytes + block.numel()] = block
        assert torch.equal(packed_linear(fmt, x, memory[offset_bytes:], 80, 128), expected)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_activation_dtypes_are_cast_and_cast_back(fmt: PackedFormat, dtype: torch.dtype) -> None:
    block = pack_rows(fmt, weight_of(64, 64))
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    y = packed_linear(fmt, x.to(dtype), block, 64, 64)
    assert y.dtype == dtype
    assert torch.equal(y, packed_linear(fmt, x, block, 64, 64).to(dtype))


@FORMATS
def test_blocks_of_a_split_weight_give_the_bits_of_one_block(fmt: PackedFormat) -> None:
    weight = weight_of(320, 128)
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    whole = packed_linear(fmt, x, pack_rows(fmt, weight), 320, 128)
    parts = [packed_linear(fmt, x, pack_rows(fmt, part), len(part), 128) for part in weight.split(128)]
    assert torch.equal(torch.cat(parts, -1), whole)


@settings(max_examples=200)
@given(
    bits=st.sampled_from([4, 8]),
    out_features=st.integers(1, 200_000),
    in_features=st.integers(1, 300).map(lambda n: 64 * n),
)
def test_blocks_tile_the_tensor(bits: int, out_features: int, in_features: int) -> None:
    fmt = INT4 if bits == 4 else INT8
    cut = blocks(fmt, out_features, in_features)
    assert cut[0].row_start == 0
    assert cut[0].offset_bytes == 0
    assert cut[-1].row_stop == out_features
    assert packed_nbytes(fmt, out_features, in_features) == sum(block.nbytes for block in cut)
    for block, after in itertools.pairwise(cut):
        assert block.row_stop == after.row_start
        assert block.offset_bytes + block.nbytes == after.offset_bytes
        assert (block.row_stop - block.row_start) % 64 == 0
    row_bytes = (in_features * bits // 8) + (in_features // 16 if bits == 4 else 2)
    for block in cut:
        rows = block.row_stop - block.row_start
        assert block.nbytes % ALIGNMENT_BYTES == 0
        assert block.nbytes >= rows * row_bytes
        # 63 rows that fill no unit of 64, the padding of rows to 16, and that of bytes to a page
        assert rows <= 127 or block.nbytes <= BLOCK_BYTES + 79 * row_bytes + ALIGNMENT_BYTES


@FORMATS
def test_a_block_has_the_size_the_plan_says(fmt: PackedFormat) -> None:
    for rows, in_features in ((1, 64), (64, 64), (130, 256), (1000, 128)):
        (block,) = blocks(fmt, rows, in_features)
        assert pack_rows(fmt, weight_of(rows, in_features)).numel() == block.nbytes


def test_config_round_trip() -> None:
    for fmt in (INT4, INT4_32, replace(INT8, dequantize_rows=7)):
        assert PackedFormat.from_config(fmt.to_config()) == fmt


def test_layout_of_another_cpu_is_refused_with_the_command_that_mends_it() -> None:
    other = next(name for name in TILE_ROWS if name != cpu_layout())
    with pytest.raises(PackedError, match=rf"layout is '{other}'.*flexinfer quantize SRC DST --bits 4"):
        PackedFormat.from_config(replace(INT4, layout=other).to_config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"format_version": 2}, "format_version is 2"),
        ({"bits": 3}, "bits: got 3"),
        ({"group_size": 48}, "group_size: got 48"),
        ({"layout": "neon"}, "layout: got 'neon'"),
        ({"dequantize_rows": 0}, "dequantize_rows: got 0"),
        ({"dequantize_rows": "64"}, "dequantize_rows: got '64'"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_config_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(PackedError, match=message):
        PackedFormat.from_config(INT4.to_config() | change)


def test_missing_key_is_refused() -> None:
    config = INT4.to_config()
    del config["layout"]
    with pytest.raises(PackedError, match="layout"):
        PackedFormat.from_config(config)


def test_rows_the_kernels_cannot_take_are_refused() -> None:
    assert not can_pack(INT4, 96)
    assert can_pack(INT4_32, 96)
    assert not can_pack(INT8, 48)
    with pytest.raises(PackedError, match="in_features: 96"):
        pack_rows(INT4, weight_of(64, 96))
    with pytest.raises(PackedError, match="in_features: 48"):
        blocks(INT8, 64, 48)


@FORMATS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(fmt: PackedFormat, value: float) -> None:
    weight = weight_of(64, 64)
    weight[63, 63] = value
    with pytest.raises(PackedError, match="NaN or infinity"):
        pack_rows(fmt, weight)


@FORMATS
def test_measured_crossover_keeps_the_rest_of_the_format(fmt: PackedFormat) -> None:
    threads = torch.get_num_threads()
    measured = measure_dequantize_rows(fmt, in_features=128, rows=64)
    assert replace(measured, dequantize_rows=fmt.dequantize_rows) == fmt
    assert 1 <= measured.dequantize_rows <= 512
    assert torch.get_num_threads() == threads

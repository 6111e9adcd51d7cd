"""Attention over rounded keys and values gives the bits of wide copies; any other operation gets
such copies.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from flexinfer.kernels.attention import Rounded

TOKENS, HEAD_DIM = 300, 32


class Largest(TorchDispatchMode):
    """Notes the most numbers that any operation within it makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, torch.Tensor)
            and result.dtype == torch.float32
            and not result._is_view()
        ):
            self.numbers = max(self.numbers, result.numel())
        return result


def pair(batch: int, heads: int, room: int) -> tuple[torch.Tensor, ...]:
    """Keys and values in float16 within a longer cache, and the same rounded, with `room` numbers
    to work in.
    """
    memory = torch.randn(2, batch, heads, TOKENS + 20, HEAD_DIM).half()
    key, value = memory.narrow(3, 0, TOKENS)
    scratch = torch.full((room,), torch.nan)
    return key, value, Rounded.of(key, scratch), Rounded.of(value, scratch)


@pytest.mark.parametrize("heads_at_once", [0, 1, 3, 99])
@pytest.mark.parametrize(("batch", "heads", "group"), [(1, 6, 1), (2, 4, 3)])
@pytest.mark.parametrize("queries", [1, 7, TOKENS])
@pytest.mark.parametrize("masked", ["no", "all heads", "each head", "causal", "two dimensions"])
def test_heads_a_few_at_a_time_give_the_same_bits(
    heads_at_once: int, batch: int, heads: int, group: int, queries: int, masked: str
) -> None:
    torch.manual_seed(0)
    room = 2 * batch * TOKENS * HEAD_DIM * heads_at_once
    key, value, rounded_key, rounded_value = pair(batch, heads, room)
    query = torch.randn(batch, queries, heads * group, HEAD_DIM).transpose(1, 2)
    mask_heads = {"all heads": 1, "each head": heads * group}.get(masked)
    mask = None if mask_heads is None else torch.rand(batch, mask_heads, queries, TOKENS) > 0.3
    if masked == "two dimensions":
        mask = torch.rand(queries, TOKENS) > 0.3
    options = {"enable_gqa": group > 1, "is_causal": masked == "causal", "scale": 0.3}
    expected = F.scaled_dot_product_attention(
        query, key.float(), value.float(), attn_mask=mask, **options
    )
    ours = F.scaled_dot_product_attention(
        query, rounded_key, rounded_value, attn_mask=mask, **options
    )
    assert torch.equal(ours, expected)
    assert type(ours) is torch.Tensor


def test_one_query_for_several_heads_as_transformers_packs_them() -> None:
    key, value, rounded_key, rounded_value = pair(1, 4, 2 * TOKENS * HEAD_DIM)
    query = torch.randn(1, 4, 3, HEAD_DIM)  # three query heads of each head, as if they were tokens
    ours = F.scaled_dot_product_attention(query, rounded_key, rounded_value)
    assert torch.equal(ours, F.scaled_dot_product_attention(query, key.float(), value.float()))


def test_no_wide_copy_of_all_heads_is_made() -> None:
    _, _, key, value = pair(1, 8, 4 * TOKENS * HEAD_DIM)
    with Largest() as largest:
        F.scaled_dot_product_attention(torch.randn(1, 8, 1, HEAD_DIM), key, value)
    assert largest.numbers < 8 * TOKENS * HEAD_DIM


def test_other_operations_take_wide_copies() -> None:
    key, value, rounded_key, rounded_value = pair(1, 2, 1 << 20)
    query = torch.randn(1, 2, 5, HEAD_DIM)
    assert torch.equal(query @ rounded_key.transpose(2, 3), query @ key.float().transpose(2, 3))
    assert torch.equal(
        torch.cat([rounded_key, rounded_value], dim=1), torch.cat([key, value], dim=1).float()
    )
    expanded = (
        rounded_key[:, :, None].expand(1, 2, 3, TOKENS, HEAD_DIM).reshape(1, 6, TOKENS, HEAD_DIM)
    )
    assert torch.equal(expanded, key.float().repeat_interleave(3, dim=1))


def test_what_is_asked_of_it_is_said_without_a_copy() -> None:
    _, _, key, _ = pair(1, 2, 1 << 20)
    with Largest() as largest:
        assert (key.dtype, key.shape, key.ndim) == (torch.float32, (1, 2, TOKENS, HEAD_DIM), 4)
        assert (key.size(2), key.dim(), key.numel()) == (TOKENS, 4, 2 * TOKENS * HEAD_DIM)
        assert key.device.type == "cpu"
    assert largest.numbers == 0

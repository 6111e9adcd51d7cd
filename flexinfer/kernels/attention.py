"""Keys and values that are kept in fewer bits than the model computes in, and attention over them a
few heads at a time.

A `Rounded` stands for numbers of the wider dtype: whatever is done with it is done with a wide
copy. Only scaled_dot_product_attention, which has no use for all heads at once, gets them a few at
a time, in memory that is set aside for that and stays in the caches of the CPU. Heads do not depend
on one another, so the bits are the same. A wide copy of a whole layer took four times as long as
the weights for a token behind 1,400 others: new pages for each layer, and three times the bytes
(docs/log.md).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from flexinfer.kernels.gradients import records_gradients

# Properties of a tensor that do not need its numbers.
ASKED = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.stride,
}


class Rounded(torch.Tensor):
    """Numbers in fewer bits than `wide`, in which they take part in operations.

    `scratch` is memory for wide copies of some heads.
    """

    wide: torch.dtype
    # [n] of dtype `wide`.
    scratch: torch.Tensor

    @classmethod
    def of(cls, kept: torch.Tensor, scratch: torch.Tensor) -> "Rounded":
        """`kept` [batch, heads, tokens, head_dim], which is not copied."""
        rounded = kept.as_subclass(cls)
        rounded.wide, rounded.scratch = scratch.dtype, scratch
        return rounded

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in ASKED:
                return func(*args, **kwargs)
            if func == torch.Tensor.dtype.__get__:  # type: ignore[attr-defined]
                return args[0].wide
            if func is F.scaled_dot_product_attention:
                return attend(*args, **kwargs)
            return func(
                *map(widened, args), **{name: widened(value) for name, value in kwargs.items()}
            )


def widened(value: Any) -> Any:
    """`value` with wide copies in place of what is rounded, in lists and tuples too."""
    if isinstance(value, Rounded):
        return value.as_subclass(torch.Tensor).to(value.wide)
    return type(value)(map(widened, value)) if type(value) in (list, tuple) else value


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """scaled_dot_product_attention of query [batch, query heads, new tokens, head_dim] to key and
    value [batch, heads, tokens, head_dim].
    """
    # A graph would keep the scratch memory, which the next heads and the next layer overwrite.
    in_scratch = query.dim() == key.dim() == 4 and not records_gradients(query)
    if in_scratch and isinstance(key, Rounded) and isinstance(value, Rounded):
        numbers_of_a_head = (key.numel() + value.numel()) // key.shape[1]
        step = min(key.scratch.numel() // max(1, numbers_of_a_head), key.shape[1])
        if step:
            return _attend_by_heads(query, key, value, attn_mask, step, **options)
    return F.scaled_dot_product_attention(query, widened(key), widened(value), attn_mask, **options)


def _attend_by_heads(
    query: torch.Tensor,
    key: Rounded,
    value: Rounded,
    mask: torch.Tensor | None,
    step: int,
    **options: Any,
) -> torch.Tensor:
    """`step` heads at a time.

    `mask`: None, or [..., new tokens, tokens], before that one for each query head or one for all.
    """
    heads = key.shape[1]
    group = query.shape[1] // heads
    batch, _, tokens, _ = query.shape
    output = query.new_empty(batch, tokens, query.shape[1], value.shape[-1]).transpose(1, 2)
    of_each_head = mask is not None and mask.dim() > 2 and mask.shape[-3] > 1
    for first in range(0, heads, step):
        some, asking = slice(first, first + step), slice(group * first, group * (first + step))
        wide_key, wide_value = _wide(key[:, some], value[:, some], key.scratch)
        some_mask = mask[..., asking, :, :] if mask is not None and of_each_head else mask
        output[:, asking] = F.scaled_dot_product_attention(
            query[:, asking], wide_key, wide_value, some_mask, **options
        )
    return output


def _wide(
    key: torch.Tensor, value: torch.Tensor, scratch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the dtype of `scratch`, and there."""
    keys, both = key.numel(), key.numel() + value.numel()
    return (
        scratch[:keys].view(key.shape).copy_(key),
        scratch[keys:both].view(value.shape).copy_(value),
    )

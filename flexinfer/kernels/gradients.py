"""Gradients through weights that are not kept: the backward pass reads the rows once more.

torch would keep a view of the rows for the backward pass, and by then their memory has other rows
in it, or has gone back to the system; products of ggml are unknown to it. `ReadAgain` keeps
nothing. The gradient for the input is the sum over the pieces of a weight: to the bit torch's own
where there is but one, else up to the order of summation. Through weights in ggml's blocks it is
that of the numbers that the blocks stand for, as if activations were not quantised.

What a graph keeps of activations and what the backward pass computes with are beyond the plan.
There are no gradients for the weights themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class ReadAgain(torch.autograd.Function):
    """multiply(x), whose gradients are input_gradient(gradient) and, for a bias that has been
    added, its sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        multiply: Callable[[torch.Tensor], torch.Tensor],
        input_gradient: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        ctx.input_gradient = input_gradient
        return multiply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_x, of_bias = ctx.needs_input_grad[:2]
        return (
            ctx.input_gradient(gradient) if of_x else None,
            gradient.flatten(0, -2).sum(0) if of_bias else None,
            None,
            None,
        )


def records_gradients(*inputs: torch.Tensor | None) -> bool:
    """Whether torch records what is done with `inputs`."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)


def multiply_with_gradient(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    product: Callable[[torch.Tensor], torch.Tensor],
    input_gradient: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """product(x), with gradients where they are recorded."""
    if records_gradients(x, bias):
        output: torch.Tensor = ReadAgain.apply(x, bias, product, input_gradient)
        return output
    return product(x)


class Sum:
    """gradient [..., rows of a weight] times the weight, of which rows come a piece at a time:

    [..., in_features].
    """

    def __init__(self, gradient: torch.Tensor) -> None:
        self._gradient = gradient
        self._rows = gradient.reshape(-1, gradient.shape[-1])
        self._total: torch.Tensor | None = None

    def add(self, start: int, matrix: torch.Tensor) -> None:
        """Add what `matrix` [rows, in_features] gives, its rows counted from `start`."""
        part = self._rows[:, start : start + len(matrix)].to(matrix.dtype) @ matrix
        self._total = part if self._total is None else self._total.float().add_(part)

    @property
    def value(self) -> torch.Tensor:
        assert self._total is not None
        shape = *self._gradient.shape[:-1], self._total.shape[-1]
        return self._total.to(self._gradient.dtype).view(shape)

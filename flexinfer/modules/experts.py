"""The experts of a layer, computed one after another from a cache that reads those that are
missing.

transformers lets the forward pass of its experts modules be replaced (ExpertsInterface); ours is
registered as IMPLEMENTATION. Tokens are grouped by the expert that they are routed to, each expert
multiplies its tokens once, piece by piece as its weights come from the cache
(flexinfer.streaming.expert_cache), and what it makes is added up in the order of the experts'
numbers: the operations and the order of transformers' own "eager" implementation, so the bits are
its bits.

Of a single token the experts that are in memory are computed together where their weights are in
ggml's blocks: threads are woken twice for all of them, and an operation of torch works on all of
them.

While there are few tokens, the hidden states of a layer are also put through the next layer's
router: what that chooses is read when there is nothing else to read. Experts that are in memory are
computed first while outputs are small, so that the others are read meanwhile. What was computed out
of turn is held until its turn to be added comes.

On the meta device the same operations run for the worst routing: all tokens to one expert.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import takewhile
from time import perf_counter
from typing import Any, cast

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from flexinfer.kernels import Kernel
from flexinfer.kernels.ggml import GgmlKernel, multiply_each, multiply_rows
from flexinfer.kernels.gradients import Sum, multiply_with_gradient, records_gradients
from flexinfer.modules.routing import RoutedTokens, group
from flexinfer.observe.trace import Trace
from flexinfer.plan.experts import ExpertLayer
from flexinfer.plan.weights import Weight
from flexinfer.streaming.expert_cache import ExpertCache
from flexinfer.streaming.store import WeightStore

IMPLEMENTATION = "flexinfer"
# Memory for outputs that wait for their turn.
HELD_BYTES = 1 << 20
# Most tokens of a pass whose next experts are predicted: one, or the candidates of a draft.
FEW_TOKENS = 16

# Which expert, the first of its pieces, and the weights and kernels that follow one another from
# there.
Where = tuple[int, int, Sequence[Weight], Sequence[Kernel]]
# [n, in] -> [n, out], without bias.
Products = Callable[[torch.Tensor], torch.Tensor]


def expert_output(
    module: Any, states: torch.Tensor, expert: int, up: Products, down: Products
) -> torch.Tensor:
    """states [n, hidden] of one expert -> [n, hidden], not weighted yet."""
    y = up(states)
    if module.has_bias:
        y = y + (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[expert]
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = down(y)
    if module.has_bias:
        y = y + module.down_proj_bias[expert]
    return module.post_expert_norm(y) if module.has_post_expert_norm else y


class StreamedExperts:
    """The experts of one layer. May be called from several threads, as `StreamedLinear` may.

    Args:
        layer: its experts.
        kernels: of the weights of any of them.
        first: the number of this layer's first expert, over all layers.
        alternate: the model interleaves the outputs of gate and up, the file has one after the
            other.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        kernels: Sequence[Kernel],
        first: int,
        store: WeightStore,
        trace: Trace,
        *,
        alternate: bool = False,
    ) -> None:
        self._alternate = alternate
        self._layer, self._kernels, self._first = layer, kernels, first
        self._store, self._trace = store, trace
        # Whether `_outputs_together` can compute them, if their module is as plain.
        self._goes_together = not alternate and all(
            isinstance(kernel, GgmlKernel)
            and kernel.dtype == torch.float32
            and len(weight.pieces) == 1
            for kernel, weight in zip(kernels, layer.experts[0], strict=True)
        )
        self._hints: Callable[[torch.Tensor], Sequence[int]] | None = None
        self._note: Callable[[list[int]], object] | None = None

    def look_ahead(self, hints: Callable[[torch.Tensor], Sequence[int]]) -> None:
        """Have what `hints` makes of hidden states [tokens, hidden], experts numbered over all
        layers, read ahead.
        """
        self._hints = hints

    def record(self, note: Callable[[list[int]], object]) -> None:
        """Call `note` with the experts of each pass, numbered over all layers."""
        self._note = note

    def forward(
        self,
        module: Any,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """hidden [tokens, hidden], top_k_index and _weights [tokens, k] -> [tokens, hidden]."""
        with self._store.lock:
            self._store.before_use()
            cache = self._cache()
            groups = group(top_k_index, len(self._layer.experts))
            group_of = {self._first + one.expert: one for one in groups}
            numbers = list(group_of)
            held_bytes = top_k_index.numel() * hidden.shape[-1] * hidden.element_size()
            order = self._request(cache, hidden, numbers, held_bytes)
            few = len(hidden) == 1 and held_bytes <= HELD_BYTES and not records_gradients(hidden)
            held = (
                self._outputs_in_memory(module, hidden, group_of, top_k_weights, order)
                if few
                else {}
            )
            others = iter(order[len(held) :])
            output = torch.zeros_like(hidden, dtype=_sum_dtype(module, hidden, top_k_weights))
            for turn in numbers:
                while turn not in held:
                    number = next(others)
                    one = group_of[number]
                    y = self._output(module, one.take(hidden), one.expert)
                    held[number] = one.weigh(y, top_k_weights)
                group_of[turn].add(held.pop(turn).to(output.dtype), output)
            return output.to(hidden.dtype)

    def _cache(self) -> ExpertCache:
        assert self._store.cache is not None
        return self._store.cache

    def _request(
        self, cache: ExpertCache, hidden: torch.Tensor, numbers: list[int], held_bytes: int
    ) -> list[int]:
        """Have the experts `numbers` read, and those that the next layer may want.

        Returns the order to compute them in.
        """
        cache.score_hints(numbers)
        order = cache.want(numbers, those_here_first=held_bytes <= HELD_BYTES)
        if self._hints is not None and len(hidden) <= FEW_TOKENS and cache.uses_hints():
            cache.hint(self._hints(hidden))
        if self._note is not None:
            self._note(numbers)
        return order

    def _outputs_in_memory(
        self,
        module: Any,
        hidden: torch.Tensor,
        group_of: dict[int, RoutedTokens],
        top_k_weights: torch.Tensor,
        order: Sequence[int],
    ) -> dict[int, torch.Tensor]:
        """Weighed outputs [1, hidden] of the first experts in `order` that are in memory, for one
        token, in one call where their modules allow that.
        """
        if not self._goes_together or module.has_bias or module.has_post_expert_norm:
            return {}
        here = list(takewhile(self._cache().holds, order))
        if len(here) < 2:
            return {}
        places = [cast(int, group_of[number].places) for number in here]
        y = self._outputs_together(module, hidden, here) * top_k_weights[0, places, None]
        return dict(zip(here, y.split(1), strict=True))

    def _outputs_together(
        self, module: Any, hidden: torch.Tensor, numbers: Sequence[int]
    ) -> torch.Tensor:
        """hidden [1, hidden] -> [experts, hidden] of the experts `numbers`, all of them in memory,
        not weighted yet.
        """
        cache, start_s = self._cache(), perf_counter()
        kernels = cast(Sequence[GgmlKernel], self._kernels)
        weights = self._layer.experts[numbers[0] - self._first]
        rows = [weight.pieces[0].row_stop - weight.pieces[0].row_start for weight in weights]

        def address(number: int, i: int) -> int:
            buffer, position = cache.acquire(number, i)
            return buffer.address + position

        last = len(weights) - 1
        ups = [
            (kernels[i], address(number, i), rows[i], None)
            for number in numbers
            for i in range(last)
        ]
        # [experts, gate and up].
        y = torch.cat(multiply_each(hidden, ups), -1).view(len(numbers), -1)
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = multiply_rows(
            y.contiguous(),
            [(kernels[last], address(number, last)) for number in numbers],
            rows[last],
        )
        for number in numbers:
            for i in range(len(weights)):
                cache.release(number, i)
        nbytes = len(numbers) * sum(weight.nbytes for weight in weights)
        self._trace.add("compute", weights[0].name, weights[0].layer, start_s, nbytes)
        return y

    def _output(self, module: Any, states: torch.Tensor, expert: int) -> torch.Tensor:
        weights = self._layer.experts[expert]

        def product(x: torch.Tensor, own: slice) -> torch.Tensor:
            first = sum(len(weight.pieces) for weight in weights[: own.start])
            where = expert, first, weights[own], self._kernels[own]
            return multiply_with_gradient(
                x, None, partial(self._product, where), partial(self._input_gradient, where)
            )

        def up(x: torch.Tensor) -> torch.Tensor:
            # [n, gate and up]
            y = product(x, slice(0, len(weights) - 1))
            return y.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if self._alternate else y

        def down(x: torch.Tensor) -> torch.Tensor:
            return product(x, slice(len(weights) - 1, None))

        return expert_output(module, states, expert, up, down)

    def _product(self, where: Where, x: torch.Tensor) -> torch.Tensor:
        """x [n, in] times the rows of some weights of an expert, one after another: [n, rows]."""
        expert, i, weights, kernels = where
        number, cache = self._first + expert, self._cache()
        if len(weights) == len(weights[0].pieces) == 1:
            return self._multiply(cache, number, i, x, weights[0], 0, kernels[0])
        y = x.new_empty(len(x), weights[-1].pieces[-1].row_stop)
        for weight, kernel in zip(weights, kernels, strict=True):
            for place, piece in enumerate(weight.pieces):
                part = self._multiply(cache, number, i, x, weight, place, kernel)
                y[:, piece.row_start : piece.row_stop] = part
                i += 1
        return y

    def _input_gradient(self, where: Where, gradient: torch.Tensor) -> torch.Tensor:
        """gradient [n, rows] of what `_product` made -> [n, in]."""
        expert, i, weights, kernels = where
        number = self._first + expert
        with self._store.lock:
            self._store.before_use()
            cache = self._cache()
            # Each is read when it is acquired.
            cache.want([], those_here_first=False)
            total = Sum(gradient)
            for weight, kernel in zip(weights, kernels, strict=True):
                for piece in weight.pieces:
                    buffer, position = cache.acquire(number, i)
                    try:
                        view = kernel.view(buffer, position, piece.row_stop - piece.row_start)
                        total.add(piece.row_start, kernel.matrix(view))
                    finally:
                        cache.release(number, i)
                    i += 1
            return total.value

    def _multiply(
        self,
        cache: ExpertCache,
        number: int,
        i: int,
        x: torch.Tensor,
        weight: Weight,
        place: int,
        kernel: Kernel,
    ) -> torch.Tensor:
        piece = weight.pieces[place]
        buffer, position = cache.acquire(number, i)
        try:
            start_s = perf_counter()
            rows = piece.row_stop - piece.row_start
            y = kernel.multiply(x, kernel.view(buffer, position, rows), rows, None)
        finally:
            cache.release(number, i)
        self._trace.add("compute", weight.name, weight.layer, start_s, piece.nbytes)
        return y


def register() -> None:
    """Make IMPLEMENTATION known to transformers. A model with it in its config has experts modules
    that call the `StreamedExperts` in their attribute `streamed`; on the meta device they need
    none.
    """
    ExpertsInterface.register(IMPLEMENTATION, _forward)


def expert_modules(model: nn.Module) -> dict[str, Any]:
    """The modules whose experts another implementation can compute, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "_is_expert_parallel")
    }


def _forward(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    if hidden.is_meta:
        return _on_meta(module, hidden, top_k_index, top_k_weights)
    experts: StreamedExperts = module.streamed
    return experts.forward(module, hidden, top_k_index, top_k_weights)


def _on_meta(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As if all tokens were routed to the first expert; and few of them, for as long as outputs are
    held, to others too.
    """
    up, down = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj

    def product(weight: torch.Tensor) -> Products:
        rows = weight.shape[2 if module.is_transposed else 1]
        return lambda x: x.new_empty(len(x), rows)

    order = torch.sort(top_k_index.t().reshape(-1), stable=True).indices
    tokens, places = order % len(hidden), order // len(hidden)
    output = torch.zeros_like(hidden, dtype=_sum_dtype(module, hidden, top_k_weights))
    held = [hidden.new_empty(HELD_BYTES // hidden.element_size())]
    one, place = tokens[: len(hidden)], places[: len(hidden)]
    y = expert_output(module, hidden[one], 0, product(up), product(down))
    held.append(y * top_k_weights[one, place, None])
    return output.index_add_(0, one, held[-1].to(output.dtype)).to(hidden.dtype)


def _sum_dtype(module: Any, hidden: torch.Tensor, top_k_weights: torch.Tensor) -> torch.dtype:
    """What the outputs of a token's experts are added in: as transformers' own loop over experts
    does it, which for Nemotron-H is the dtype of their weights.
    """
    return top_k_weights.dtype if _adds_wide(type(module).forward) else hidden.dtype


@cache
def _adds_wide(loop: Callable[..., Any]) -> bool:
    return "dtype=top_k_weights.dtype" in inspect.getsource(inspect.unwrap(loop))

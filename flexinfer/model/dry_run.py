"""Passes on the meta device: the order in which linears run, the form of the cache, and how tokens
come to experts.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel

from flexinfer.model.cache_form import CacheForm, growth_is_known
from flexinfer.model.experts import Route, Router
from flexinfer.modules.experts import expert_modules


def dry_run(
    model: PreTrainedModel, linears: Collection[str]
) -> tuple[list[str], list[list[str]], CacheForm, dict[str, Route]]:
    """Passes on the meta device: the order in which the linears that can be streamed run, which of
    them are given the same input, the form of the cache, and how a token comes to the experts of
    each module.
    """
    order: list[str] = []
    inputs: list[object] = []
    id_of = {name: id(model.get_submodule(name).weight) for name in linears}
    used = _UsedElsewhere(frozenset(id_of.values()))

    def note(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        order.append(name)
        inputs.append(args[0] if args else None)
        used.running = id_of[name]

    def ran(_module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        used.running = None

    routes = _watch_routes(model)
    first, cache = (DynamicCache(config=model.config.get_text_config(decoder=True)) for _ in "12")
    for name in linears:
        model.get_submodule(name).register_forward_pre_hook(partial(note, name))
        model.get_submodule(name).register_forward_hook(ran)
    with torch.device("meta"), torch.no_grad(), used:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), cache=first, use_cache=True)
        order.clear()
        inputs.clear()
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), cache=cache, use_cache=True)
        form = CacheForm(model.config, first, growth_is_known(first, cache))
    once = list(dict.fromkeys(order))
    together: list[list[str]] = []
    for i, name in enumerate(order):
        if order.count(name) == 1 and inputs[i] is not None and i and inputs[i] is inputs[i - 1]:
            together[-1].append(name)
        else:
            together.append([name])
    every = once + [name for name in linears if name not in once]
    # The layer before asks a router too, out of turn.
    routers = tuple(f"{route.router.name}." for route in routes.values() if route.router)
    streamed = [
        name for name in every if id_of[name] not in used.weights and not name.startswith(routers)
    ]
    several = [names for names in together if len(names) > 1 and {*names} <= {*streamed}]
    return streamed, several, form, routes


class _UsedElsewhere(TorchFunctionMode):
    """Finds linears whose weight a model also uses by itself, as Mamba does: not to be streamed."""

    def __init__(self, known: frozenset[int]) -> None:
        """known: weights, by their `id`."""
        super().__init__()
        self._known = known
        # That of the linear whose forward runs.
        self.running: int | None = None
        self.weights: set[int] = set()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # An embedding reads rows of a weight that the head may share.
        if isinstance(result, torch.Tensor) and func is not F.embedding:
            self.weights |= {id(one) for one in args} & self._known - {self.running}
        return result


def _watch_routes(model: PreTrainedModel) -> dict[str, Route]:
    """Filled by the next pass of `model`: how tokens come to each experts module, by its name."""
    routes: dict[str, Route] = {}
    # What modules other than experts have returned.
    chosen: list[tuple[torch.Tensor, Router]] = []

    def note_output(
        name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        # It chooses by the hidden states alone.
        if len(args) == 1 and not kwargs:
            chosen.extend(
                (one, Router(name, i))
                for i, one in enumerate(outputs)
                if isinstance(one, torch.Tensor)
            )

    def note_route(
        name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        index = [*args, *kwargs.values()][1]
        router = next((router for one, router in chosen if one is index), None)
        routes[name] = Route(index.shape[-1], router)
        chosen.clear()

    for name, module in expert_modules(model).items():
        for sibling, beside in model.get_submodule(name.rpartition(".")[0]).named_children():
            if beside is not module:
                note = partial(note_output, f"{name.rpartition('.')[0]}.{sibling}")
                beside.register_forward_hook(note, with_kwargs=True)
        module.register_forward_pre_hook(partial(note_route, name), with_kwargs=True)
    return routes

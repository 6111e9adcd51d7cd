"""One pass on the meta device: the order in which linears run, what a cache layer keeps, and how
tokens come to experts.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicIndexedLayer

from flexinfer.formats.tensors import CheckpointError
from flexinfer.model.experts import Route, Router
from flexinfer.modules.experts import expert_modules
from flexinfer.streaming.kv_cache import LayerShape


def dry_run(
    model: PreTrainedModel, linears: Collection[str]
) -> tuple[list[str], list[list[str]], list[LayerShape], dict[str, Route]]:
    """One pass on the meta device: the order in which the linears run, which of them are given the
    same input, what a token keeps in each cache layer, and how it comes to the experts of each
    module.
    """
    order: list[str] = []
    inputs: list[object] = []

    def note(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        order.append(name)
        inputs.append(args[0] if args else None)

    routes = _watch_routes(model)
    with torch.device("meta"), torch.no_grad():
        for name, module in model.named_modules():
            if name in linears:
                module.register_forward_pre_hook(partial(note, name))
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), cache=cache, use_cache=True)
    layers = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or isinstance(layer, DynamicIndexedLayer):
            raise CheckpointError(
                f"{type(model).__name__}: keeps a {type(layer).__name__} between tokens; only "
                "attention caches are supported (keys and values, nothing besides)"
            )
        layers.append(
            LayerShape(
                (keys.shape[1], keys.shape[3]),
                (values.shape[1], values.shape[3]),
                getattr(layer, "sliding_window", None),
            )
        )
    once = list(dict.fromkeys(order))
    together: list[list[str]] = []
    for i, name in enumerate(order):
        if order.count(name) == 1 and inputs[i] is not None and i and inputs[i] is inputs[i - 1]:
            together[-1].append(name)
        else:
            together.append([name])
    several = [names for names in together if len(names) > 1]
    return once + [name for name in linears if name not in once], several, layers, routes


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

"""Records which experts a mixture asks for, and what policies of a cache make of it, beside the
best in hindsight.

    python -m experiments.routing MODEL --tokens 256 --record results/quality/routing.jsonl

A routing is what each layer of each token is routed to (`Engine.record_routing`), decoding the text
of a prompt token by token. For caches of several shares of all experts the misses of each policy
are counted (flexinfer.streaming.expert_policies), and those of Belady's rule; the first quarter of
the tokens warms the cache up. One JSON line for a routing. `--simulate` needs no model: it draws a
routing in which a token keeps each expert of the one before it with a probability, as consecutive
tokens of a text do (Jiang et al. 2024, Mixtral of Experts, section 5, find such repetitions, in
higher layers most); it is marked as simulated.

Cost: one pass a token; Belady's rule looks at the whole cache for each miss.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import flexinfer
from experiments.expert_misses import HINDSIGHT, fewest_misses, misses
from experiments.provenance import provenance
from experiments.synth import default_cache_dir
from experiments.systems.interface import prompt_ids
from flexinfer.streaming.expert_policies import POLICIES

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True)
class Routing:
    """What each layer of each token is routed to, in order; experts numbered over all layers."""

    name: str
    kind: str  # measured, simulated
    layers: int
    experts: int  # of a layer
    used: int  # of a token in a layer
    steps: list[list[int]]


def record(path: Path, name: str, tokens: int, memory: str) -> Routing:
    """The routing of `tokens` tokens drawn at random, one at a time, by the mixture in `path`.

    Raises ValueError for a model without experts.
    """
    model: Any = flexinfer.from_pretrained(path, memory, context=tokens)
    with model.flexinfer:
        mixture = model.flexinfer.mixture
        if mixture is None:
            raise ValueError(f"{path}: has no experts")
        steps = model.flexinfer.record_routing()
        cache = None
        for token in prompt_ids(tokens, model.config.vocab_size):
            with torch.inference_mode():
                cache = model(torch.tensor([[token]]), cache=cache, use_cache=True).cache
    layer = mixture.layers[0]
    return Routing(name, "measured", len(mixture.layers), len(layer.experts), layer.used, steps)


def simulate(
    layers: int, experts: int, used: int, tokens: int, repeats: float, seed: int = 0
) -> Routing:
    """A routing in which a token keeps each expert of the token before it with probability
    `repeats`, the others being drawn evenly.
    """
    draw = random.Random(seed)
    before = [draw.sample(range(experts), used) for _ in range(layers)]
    steps = []
    for _ in range(tokens):
        for layer in range(layers):
            kept = [expert for expert in before[layer] if draw.random() < repeats]
            others = [expert for expert in range(experts) if expert not in kept]
            before[layer] = sorted(kept + draw.sample(others, used - len(kept)))
            steps.append([layer * experts + expert for expert in before[layer]])
    name = f"{layers} x {used} of {experts}, {repeats:.0%} kept"
    return Routing(name, "simulated", layers, experts, used, steps)


def hit_rates(routing: Routing, shares: Sequence[float] = SHARES) -> dict[str, dict[str, float]]:
    """By policy, and in hindsight: share of all experts in the cache -> share of the uses that hit,
    after the first quarter of the tokens.
    """
    warm = len(routing.steps) // routing.layers // 4 * routing.layers
    counted = sum(map(len, routing.steps[warm:]))
    rates: dict[str, dict[str, float]] = {}
    for name in (*POLICIES, HINDSIGHT):
        rates[name] = {}
        for share in shares:
            capacity = max(routing.used, int(share * routing.layers * routing.experts))
            if name == HINDSIGHT:
                missed = fewest_misses(routing.steps, capacity, warm)
            else:
                missed = misses(
                    POLICIES[name](routing.layers * routing.used), routing.steps, capacity, warm
                )
            rates[name][str(share)] = 1 - missed / counted
    return rates


def main() -> None:
    """Record one routing, or draw one, and append its line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--memory", default="auto")
    parser.add_argument(
        "--simulate",
        type=float,
        metavar="P",
        help="no model: tokens keep an expert with probability P",
    )
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    if (given.model is None) == (given.simulate is None):
        parser.error("give a model, or --simulate P")
    if given.model is not None:
        routing = record(given.model, given.model.parent.name, given.tokens, given.memory)
    else:
        routing = simulate(4, 128, 8, given.tokens, given.simulate)
    origin = provenance(given.model or default_cache_dir())
    line = {key: value for key, value in asdict(routing).items() if key != "steps"} | {
        "tokens": len(routing.steps) // routing.layers,
        "hit_rates": hit_rates(routing),
        "provenance": json.loads(origin.model_dump_json()),
    }
    print(json.dumps(line["hit_rates"], indent=1))
    if given.record is not None:
        given.record.parent.mkdir(parents=True, exist_ok=True)
        with given.record.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

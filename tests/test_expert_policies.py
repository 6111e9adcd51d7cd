"""Policies of the expert cache on routings: none beats Belady's rule, the optimum."""

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.expert_misses import fewest_misses, misses
from flexinfer.streaming.expert_policies import POLICIES, Frequency

LONG = 1000  # experts that a token uses
routings = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), min_size=1, max_size=40
)


@settings(max_examples=150)
@given(routings, st.integers(3, 10), st.sampled_from(sorted(POLICIES)))
def test_hindsight_is_never_beaten(routing: list[list[int]], capacity: int, policy: str) -> None:
    best = fewest_misses(routing, capacity)
    assert len({expert for wanted in routing for expert in wanted}) <= best
    assert best <= misses(POLICIES[policy](LONG), routing, capacity) <= sum(map(len, routing))


def fewest_by_trying(routing: tuple[int, ...], capacity: int) -> int:
    """The fewest misses over all choices of what goes, one expert a step."""
    states = {frozenset[int](): 0}
    for expert in routing:
        after: dict[frozenset[int], int] = {}
        for there, missed in states.items():
            if expert in there:
                options = [(there, missed)]
            else:
                options = [(there, missed + 1)]  # it passes through
                if len(there) < capacity:
                    options.append((there | {expert}, missed + 1))
                options += [(there - {gone} | {expert}, missed + 1) for gone in there]
            for state, cost in options:
                after[state] = min(cost, after.get(state, cost))
        states = after
    return min(states.values())


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_hindsight_is_the_best_of_all_choices(capacity: int) -> None:
    for routing in product(range(4), repeat=6):
        assert fewest_misses([[e] for e in routing], capacity) == fewest_by_trying(
            routing, capacity
        ), routing


def test_recency_never_hits_in_less_than_a_token_uses() -> None:
    """And a fixed set hits its share, though all experts are as likely."""
    layers, each = 6, 8
    chosen = random.Random(0)
    token = [
        [[layer * each + chosen.randrange(each)] for layer in range(layers)] for _ in range(400)
    ]
    routing = [wanted for layers_of_token in token for wanted in layers_of_token]
    assert misses(POLICIES["recency"](LONG), routing, layers - 1) == len(routing)
    for policy in ("fixed", "recency", "frequency"):
        hit_rate = 1 - misses(POLICIES[policy](LONG), routing, layers * each // 2) / len(routing)
        assert hit_rate == pytest.approx(0.5, abs=0.06), policy


def test_frequency_keeps_what_is_used_often_through_a_prompt() -> None:
    often, rest = [0, 1, 2], list(range(10, 40))
    routing = [[expert] for _ in range(20) for expert in often] + [[expert] for expert in rest]
    after = [[expert] for expert in often]
    for policy, lost in (("frequency", 0), ("fixed", 0), ("recency", 3)):
        make = POLICIES[policy]
        assert misses(make(LONG), routing + after, 4) - misses(make(LONG), routing, 4) == lost, (
            policy
        )


def test_old_uses_count_less() -> None:
    policy = Frequency(100)
    for expert, uses in ((1, 5), (2, 400), (3, 2)):
        for _ in range(uses):
            policy.touch(expert)
    for expert in (1, 2, 3):
        policy.add(expert)
    assert policy.worst(lambda _: True) == 1
    assert policy.worst(lambda expert: expert != 1) == 3
    policy.discard(1)
    assert policy.worst(lambda _: True) == 3


def test_counts_do_not_overflow() -> None:
    policy = Frequency(2)
    for expert in (1, 2, 3):
        policy.add(expert)
    for i in range(5000):
        policy.touch(1 + i % 2)
    assert policy.worst(lambda _: True) == 3
    assert policy.worst(lambda expert: expert != 3) in {1, 2}

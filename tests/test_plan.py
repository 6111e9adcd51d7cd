"""The plan: every byte of the budget accounted for, the policies of the paper as printed, and ours
better than those.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexinfer.plan.plan import Costs, Overheads, Plan
from flexinfer.plan.planner import (
    DEFAULT_WINDOW_BYTES,
    MIN_SLOTS,
    Planner,
    page_table_bytes,
    parse_window,
)
from flexinfer.plan.preservation import POLICIES
from flexinfer.plan.weights import Kind, Piece, Weight
from flexinfer.sizes import (
    SLACK_BYTES,
    BudgetError,
    format_size,
    name_budget,
    named_budget_bytes,
    parse_size,
    whole_mib,
)

OVERHEADS = Overheads(
    process_bytes=1000, unstreamed_bytes=200, kv_bytes=300, activation_bytes=400, margin_bytes=100
)
COSTS = Costs(bandwidth_bytes_per_s=1e6, compute_s=1e-3)
Role = tuple[str, Kind, int]  # name, kind, pieces of a page each
LLAMA: list[Role] = [
    ("q", "attention", 8),
    ("k", "attention", 2),
    ("v", "attention", 2),
    ("o", "attention", 8),
    ("gate", "ffn", 20),
    ("up", "ffn", 20),
    ("down", "ffn", 20),
]
PAGE = 4096


def named_bytes(refused: Exception) -> int:
    """The budget that a refusal names."""
    return int(str(refused).split("at least ")[1].split()[0])


def weight(
    name: str, role: str, layer: int, kind: Kind, sizes: list[int], padding_bytes: int = 0
) -> Weight:
    """A weight whose pieces have these sizes; each takes `padding_bytes` more in memory."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return Weight(
        name,
        role,
        layer,
        kind,
        tuple(
            Piece(
                name,
                layer,
                i,
                i + 1,
                Path("f"),
                start,
                size,
                size + padding_bytes,
                size + padding_bytes,
            )
            for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
        ),
    )


def stack(roles: list[Role], layers: int, head_pieces: int = 0) -> list[Weight]:
    """`layers` alike, of whole pages, and a head if it has pieces."""
    weights = [
        weight(f"{layer}.{role}", role, layer, kind, [PAGE] * pieces)
        for layer in range(layers)
        for role, kind, pieces in roles
    ]
    return weights + (
        [weight("head", "head", layers, "head", [PAGE] * head_pieces)] if head_pieces else []
    )


def plan_for(
    weights: list[Weight], lock_bytes: int, policy: str = "balanced", window_slots: int = MIN_SLOTS
) -> Plan:
    """The plan when `lock_bytes` are left for locking."""
    slot_bytes = max(piece.memory_bytes for w in weights for piece in w.pieces)
    window_bytes = window_slots * slot_bytes
    planner = Planner(weights, OVERHEADS, COSTS, policy=policy, window=window_bytes)
    return planner.plan(OVERHEADS.nbytes + window_bytes + lock_bytes)


def whole(plan: Plan, weights: list[Weight]) -> set[str]:
    """Names of the weights that are locked whole."""
    return {w.name for w in weights if plan.locked_pieces.get(w.name, 0) == len(w.pieces)}


@st.composite
def any_weights(draw: st.DrawFn) -> list[Weight]:
    """Any decoder: roles of any size, pieces alike but for the last of each weight, padded as
    direct reads are.
    """
    piece_bytes = draw(st.integers(1, 50)) * PAGE
    roles = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["attention", "ffn"]),
                st.integers(1, 9),
                st.integers(1, piece_bytes),
            ),
            min_size=1,
            max_size=7,
        )
    )
    padding = draw(st.sampled_from([0, 17, PAGE]))
    weights = [
        weight(f"{layer}.{i}", str(i), layer, kind, [piece_bytes] * (pieces - 1) + [last], padding)
        for layer in range(draw(st.integers(2, 12)))
        for i, (kind, pieces, last) in enumerate(roles)
    ]
    if draw(st.booleans()):
        weights.append(
            weight("head", "head", 99, "head", [piece_bytes] * draw(st.integers(2, 20)), padding)
        )
    return weights


WINDOWS = st.sampled_from([None, 1, "1 layers", "3 layers", 3 * PAGE, "1MiB"])


@given(any_weights(), st.sampled_from(sorted(POLICIES)), WINDOWS, st.floats(0, 1.2))
def test_every_byte_is_accounted_for(
    weights: list[Weight], policy: str, window: str | int | None, share: float
) -> None:
    total_memory = sum(w.lock_cost_bytes for w in weights)
    slot_bytes = max(piece.memory_bytes for w in weights for piece in w.pieces)
    budget = Planner(weights, OVERHEADS).smallest_bytes + int(share * total_memory)
    plan = Planner(weights, OVERHEADS, COSTS, policy=policy, window=window).plan(budget)
    tables = page_table_bytes(budget - OVERHEADS.nbytes)
    locked_memory = sum(
        p.memory_bytes for w in weights for p in w.pieces[: plan.locked_pieces.get(w.name, 0)]
    )

    assert (
        plan.locked_bytes + plan.streamed_bytes
        == plan.total_bytes
        == sum(w.nbytes for w in weights)
    )
    assert plan.unused_bytes >= 0
    assert plan.overheads == replace(OVERHEADS, process_bytes=OVERHEADS.process_bytes + tables)
    assert plan.held_bytes == plan.window_bytes + locked_memory
    assert plan.overheads.nbytes + plan.held_bytes + plan.unused_bytes == budget
    assert plan.budget_bytes == budget
    assert all(0 <= plan.locked_pieces.get(w.name, 0) <= len(w.pieces) for w in weights)
    if plan.streamed_bytes:
        assert plan.slots >= MIN_SLOTS
        assert plan.slot_bytes == slot_bytes
    if plan.window_layers is None and plan.slots > MIN_SLOTS:
        asked = DEFAULT_WINDOW_BYTES if window is None else parse_window(window)[0]
        assert asked is not None
        assert plan.window_bytes <= asked
    assert 0 < plan.predicted_tokens_per_s <= plan.bound_tokens_per_s * (1 + 1e-9)


@given(any_weights(), st.floats(0, 1))
def test_balanced_leaves_less_than_one_piece_unused(weights: list[Weight], share: float) -> None:
    plan = plan_for(weights, int(share * sum(w.lock_cost_bytes for w in weights)))
    open_pieces = [
        w.pieces[plan.locked_pieces.get(w.name, 0)].memory_bytes
        for w in weights
        if plan.locked_pieces.get(w.name, 0) < len(w.pieces)
    ]
    assert not open_pieces or plan.unused_bytes < min(open_pieces)


@given(any_weights(), st.floats(0, 1))
def test_balanced_spreads_what_is_streamed_over_the_whole_pass(
    weights: list[Weight], share: float
) -> None:
    """At every point of a pass the share that was streamed is the share of the whole, to within
    three pieces.
    """
    plan = plan_for(weights, int(share * sum(w.lock_cost_bytes for w in weights)))
    slot_bytes = plan.slot_bytes
    locked_memory = {
        w.name: sum(p.memory_bytes for p in w.pieces[: plan.locked_pieces.get(w.name, 0)])
        for w in weights
    }
    memory = sum(w.lock_cost_bytes for w in weights)
    locked_share = sum(locked_memory.values()) / memory
    so_far = locked_so_far = 0
    for w in weights:
        so_far += w.lock_cost_bytes
        locked_so_far += locked_memory[w.name]
        assert abs(locked_so_far - locked_share * so_far) <= 3 * slot_bytes


@pytest.mark.parametrize("lock_pages", range(0, 12 * 80, 37))
def test_balanced_layers_stream_alike(lock_pages: int) -> None:
    weights = stack(LLAMA, layers=12)
    plan = plan_for(weights, lock_pages * PAGE)
    streamed = Counter[int]()
    for w in weights:
        streamed[w.layer] += len(w.pieces) - plan.locked_pieces.get(w.name, 0)
    assert max(streamed.values()) - min(streamed.values()) <= 2
    assert plan.unused_bytes == 0


@given(any_weights(), st.floats(0, 1), st.floats(0, 0.2))
def test_more_memory_never_streams_more(weights: list[Weight], share: float, more: float) -> None:
    """But for a piece, which rounding can put the other way."""
    total = sum(w.lock_cost_bytes for w in weights)
    less = plan_for(weights, int(share * total))
    enough = plan_for(weights, int((share + more) * total))
    assert enough.streamed_bytes <= less.streamed_bytes + less.slot_bytes


def test_more_memory_never_streams_more_page_by_page() -> None:
    weights = stack(LLAMA, layers=5, head_pieces=30)
    smallest = OVERHEADS.nbytes + MIN_SLOTS * PAGE
    streamed = [
        Planner(weights, OVERHEADS, COSTS, window=16 * PAGE)
        .plan(smallest + i * PAGE)
        .streamed_bytes
        for i in range(5 * 80 + 40)
    ]
    assert streamed == sorted(streamed, reverse=True)
    assert streamed[0] == sum(w.nbytes for w in weights)
    assert streamed[-1] == 0


TRUE_SHAPES = {  # hidden, intermediate, layers, key-value share, bytes of a weight
    "7B in 4.5 bits": (4096, 11008, 32, 1.0, 0.5625),
    "70B in 4.5 bits": (8192, 28672, 80, 0.125, 0.5625),
    "3B in bf16": (3072, 8192, 12, 1 / 3, 2.0),
}


@pytest.mark.parametrize("shape", TRUE_SHAPES)
@pytest.mark.parametrize("share", [0.05, 0.2, 0.33, 0.5, 0.77, 0.95])
def test_at_true_shapes_balanced_uses_98_percent_and_algorithm1_does_not(
    shape: str, share: float
) -> None:
    hidden, intermediate, layers, kv_share, itemsize = TRUE_SHAPES[shape]

    def pieces(nbytes: float) -> int:
        return math.ceil(nbytes / (4 << 20))

    attention, kv, ffn = (
        int(n * itemsize) for n in (hidden**2, hidden**2 * kv_share, hidden * intermediate)
    )
    sizes: list[tuple[str, Kind, int]] = [
        ("q", "attention", attention),
        ("k", "attention", kv),
        ("v", "attention", kv),
        ("o", "attention", attention),
        ("gate", "ffn", ffn),
        ("up", "ffn", ffn),
        ("down", "ffn", ffn),
    ]
    weights = [
        weight(
            f"{layer}.{role}",
            role,
            layer,
            kind,
            [nbytes // pieces(nbytes)] * pieces(nbytes),
            2 * PAGE,
        )
        for layer in range(layers)
        for role, kind, nbytes in sizes
    ]
    lock_bytes = int(share * sum(w.lock_cost_bytes for w in weights))
    balanced = plan_for(weights, lock_bytes)
    assert balanced.unused_bytes <= 0.02 * lock_bytes
    assert balanced.streamed_bytes <= plan_for(weights, lock_bytes, "algorithm1").streamed_bytes + (
        4 << 20
    )


def test_algorithm1_thresholds_as_printed() -> None:
    """m >= 3 f N + 2 a N: all FFN; m >= 2 f N: two of each layer; m >= f N: one; then attention,
    one by one.
    """
    layers = 4
    roles: list[Role] = [(r, "attention", 2) for r in "qkvo"] + [
        (r, "ffn", 5) for r in ("gate", "up", "down")
    ]
    weights = stack(roles, layers)
    f, a = 5 * PAGE, 2 * PAGE

    def kept(lock_bytes: int) -> tuple[int, int]:
        names = whole(plan_for(weights, lock_bytes, "algorithm1"), weights)
        ffn = {w.name for w in weights if w.kind == "ffn"}
        return len(names & ffn), len(names - ffn)

    assert kept(f * layers - 1) == (0, (f * layers - 1) // a)
    assert kept(f * layers) == (layers, 0)
    assert kept(f * layers + 3 * a) == (layers, 3)
    assert kept(2 * f * layers - 1) == (layers, (f * layers - 1) // a)
    assert kept(2 * f * layers) == (2 * layers, 0)
    assert kept(3 * f * layers) == (2 * layers, min(4 * layers, f * layers // a))
    assert kept((3 * f + 2 * a) * layers - 1) == (2 * layers, 4 * layers)
    assert kept((3 * f + 2 * a) * layers) == (3 * layers, 2 * layers)
    assert all(
        0 < n <= len(weights[0].pieces) or n == 5
        for n in plan_for(weights, 3 * a, "algorithm1").locked_pieces.values()
    )


def test_algorithm1_leaves_unused_what_balanced_uses() -> None:
    weights = stack(LLAMA, layers=8)
    lock_bytes = 8 * (3 * 20 + 2 * 8) * PAGE - PAGE  # a page less than all FFN weights ask for
    assert plan_for(weights, lock_bytes, "algorithm1").unused_bytes > 0.02 * lock_bytes
    assert plan_for(weights, lock_bytes).unused_bytes == 0


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("attention-first", ["k", "v", "q", "o", "gate", "up", "down"]),
        ("ffn-first", ["gate", "up", "down", "k", "v", "q", "o"]),
    ],
)
def test_roles_are_locked_in_order_small_ones_first(policy: str, order: list[str]) -> None:
    """With grouped-query attention K and V are smallest and go first."""
    layers, pages = 4, {role: pieces for role, _, pieces in LLAMA}
    weights = stack(LLAMA, layers)
    for i in range(len(order)):
        before = sum(pages[role] for role in order[:i]) * layers
        half = before + pages[order[i]] * layers // 2
        assert whole(plan_for(weights, before * PAGE, policy), weights) == {
            f"{layer}.{role}" for role in order[:i] for layer in range(layers)
        }
        of_role = {
            n
            for n in whole(plan_for(weights, half * PAGE, policy), weights)
            if n.endswith("." + order[i])
        }
        assert of_role == {f"0.{order[i]}", f"2.{order[i]}"}  # spread evenly, not the leading ones


def test_unbalanced_locks_whole_leading_layers() -> None:
    weights, layer_pages = stack(LLAMA, layers=6), 80
    for lock_pages in (0, layer_pages - 1, layer_pages, 3 * layer_pages + 79, 5 * layer_pages):
        plan = plan_for(weights, lock_pages * PAGE, "unbalanced")
        leading = range(lock_pages // layer_pages)
        assert whole(plan, weights) == {w.name for w in weights if w.layer in leading}
        assert plan.locked_bytes == len(leading) * layer_pages * PAGE


@pytest.mark.parametrize("policy", ["unbalanced", "attention-first", "ffn-first", "algorithm1"])
def test_the_papers_policies_keep_the_head_first_and_lock_whole_weights(policy: str) -> None:
    weights = stack(LLAMA, layers=6, head_pieces=30)
    assert "head" not in whole(plan_for(weights, 29 * PAGE, policy), weights)
    for lock_pages in (30, 100, 300):
        plan = plan_for(weights, lock_pages * PAGE, policy)
        assert "head" in whole(plan, weights)
        assert set(plan.locked_pieces) == whole(plan, weights)


def test_none_locks_nothing_even_when_all_would_fit() -> None:
    weights = stack(LLAMA, layers=3)
    plan = plan_for(weights, 10**9, "none")
    assert plan.locked_bytes == 0
    assert plan.streamed_bytes == plan.total_bytes


def test_window_of_layers_holds_that_many_whole_layers() -> None:
    weights = stack(LLAMA, layers=6, head_pieces=30)
    for layers in (1, 2, 3):
        plan = Planner(weights, OVERHEADS, COSTS, policy="none", window=f"{layers} layers").plan(
            10**8
        )
        assert plan.window_layers == layers
        assert plan.slots == layers * 80


@given(any_weights(), st.sampled_from(sorted(POLICIES)))
def test_refused_budget_names_the_smallest_that_works(weights: list[Weight], policy: str) -> None:
    with pytest.raises(
        BudgetError, match=r"memory=1 B is too little.* at least \d+ bytes"
    ) as refused:
        Planner(weights, OVERHEADS, COSTS, policy=policy).plan(1)
    named, smallest = named_bytes(refused.value), Planner(weights, OVERHEADS).smallest_bytes
    assert SLACK_BYTES <= named - smallest < SLACK_BYTES + (1 << 20), (
        "accepted by the next process too"
    )
    for budget in (named, smallest):
        Planner(weights, OVERHEADS, COSTS, policy=policy).plan(budget)
    with pytest.raises(BudgetError, match=f"at least {named} bytes"):
        Planner(weights, OVERHEADS, COSTS, policy=policy).plan(smallest - 1)


@given(st.integers(1, 1 << 38))
def test_a_budget_is_named_as_it_can_be_given(smallest: int) -> None:
    given = name_budget(smallest).split("(")[1].rstrip(")")
    assert (
        parse_size(given) == named_budget_bytes(smallest) == int(name_budget(smallest).split()[0])
    )
    assert parse_size(whole_mib(smallest)) >= smallest


def test_the_smallest_budget_holds_a_tokenizer_while_it_is_loaded() -> None:
    """Nothing else is there meanwhile, so the larger of both counts, not their sum."""
    weights = stack(LLAMA, layers=2)
    without = Planner(weights, OVERHEADS).smallest_bytes
    rest = without - OVERHEADS.process_bytes - OVERHEADS.margin_bytes
    assert Planner(weights, replace(OVERHEADS, loading_bytes=rest // 2)).smallest_bytes == without
    loading = replace(OVERHEADS, loading_bytes=rest + (1 << 30))
    smallest = Planner(weights, loading).smallest_bytes
    assert 1 << 30 <= smallest - without < (1 << 30) + (4 << 20)  # with its tables of pages
    Planner(weights, loading, COSTS).plan(smallest)
    with pytest.raises(BudgetError, match="while it is loaded"):
        Planner(weights, loading, COSTS).plan(smallest - 1)


def test_speeds_are_those_of_the_cost_model() -> None:
    """Equation 4: 1 / max(compute, streamed / bandwidth); the bound has all but process and KV
    cache for weights.
    """
    weights = stack(LLAMA, layers=5)
    total = sum(w.nbytes for w in weights)
    plan = plan_for(weights, 100 * PAGE)
    assert plan.streamed_bytes == total - 100 * PAGE
    assert plan.predicted_tokens_per_s == pytest.approx(1e6 / (total - 100 * PAGE))
    at_best = plan.budget_bytes - OVERHEADS.process_bytes - OVERHEADS.kv_bytes
    assert plan.bound_tokens_per_s == pytest.approx(1e6 / (total - at_best))
    slow = Planner(weights, OVERHEADS, replace(COSTS, compute_s=9.0), window=2 * PAGE).plan(
        plan.budget_bytes
    )
    assert slow.predicted_tokens_per_s == slow.bound_tokens_per_s == pytest.approx(1 / 9)
    assert plan_for(weights, total).predicted_tokens_per_s == pytest.approx(1e3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 << 30),
        ("1.5 GB", 1_500_000_000),
        (" 700 mib ", 700 << 20),
        ("0.5KiB", 512),
        ("2TB", 2 * 1000**4),
        ("12", 12),
        ("12B", 12),
        (12, 12),
        (".5GiB", 1 << 29),
        ("4G", 4 << 30),  # docker, systemd
        ("4g", 4 << 30),
        ("512m", 512 << 20),
        ("1.5g", 3 << 29),
        ("64K", 64 << 10),
        ("1T", 1 << 40),
        ("4Gi", 4 << 30),  # Kubernetes
        ("4gi", 4 << 30),
        ("4 GiB", 4 << 30),
        ("4gb", 4 * 10**9),
        ("4Gb", 4 * 10**9),
        ("9b", 9),
        (4e9, 4 * 10**9),
        (np.int64(4 << 30), 4 << 30),
        (np.float64(4096.0), 4096),
    ],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "bad",
    [
        "4 bananas",
        "50%",
        "4.5",
        4.5,
        np.float32(0.5),
        "9" * 400 + "GiB",
        10**400,
        "4GG",
        "4iB",
        "4 G B",
        "",
        "   ",
        "-1",
        "-4GiB",
        "nan",
        "inf",
        "GiB",
        "4G iB",
        "1e9",
        "1.2.3GiB",
        "4,5GiB",
        "0x10",
        "٣GiB",
        "0",
        "0GiB",
        "0.1B",
        0,
        -5,
        True,
        False,
        None,
        float("nan"),
        [4],
    ],
)
def test_nonsense_sizes_are_refused_by_name_and_value(bad: object) -> None:
    with pytest.raises(BudgetError, match="memory=") as error:
        parse_size(bad)  # type: ignore[arg-type]
    assert repr(bad) in str(error.value)


@given(st.integers(1, 10**15))
def test_a_number_of_bytes_is_itself(nbytes: int) -> None:
    assert parse_size(nbytes) == parse_size(str(nbytes)) == parse_size(f"{nbytes} B") == nbytes


def test_formatted_sizes() -> None:
    assert [format_size(n) for n in (5, 2048, 3 << 20, 3 << 30)] == [
        "5 B",
        "2 KiB",
        "3 MiB",
        "3.00 GiB",
    ]


def test_windows() -> None:
    assert parse_window(None) == (DEFAULT_WINDOW_BYTES, None)
    assert parse_window("64MiB") == (64 << 20, None)
    assert parse_window("3 layers") == (None, 3)
    assert parse_window("1 layer") == (None, 1)
    for bad in (
        "0 layers",
        "-1 layers",
        "x layers",
        "layers",
        "3 layers please",
        "3 bananas",
        0,
        True,
    ):
        with pytest.raises(BudgetError, match="window="):
            parse_window(bad)


def test_policy_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"policy='bananas'.*algorithm1.*balanced"):
        plan_for(stack(LLAMA, 1), 0, "bananas")


def test_a_model_with_nothing_to_stream_has_a_plan_under_every_policy() -> None:
    overheads = Overheads(
        process_bytes=10, unstreamed_bytes=20, kv_bytes=5, activation_bytes=5, margin_bytes=1
    )
    costs = Costs(bandwidth_bytes_per_s=1.0, compute_s=0.0)
    for policy in POLICIES:
        plan = Planner([], overheads, costs, policy=policy).plan(100)
        assert (plan.streamed_bytes, plan.locked_bytes, plan.slots, plan.unused_bytes) == (
            0,
            0,
            0,
            59,
        )
        with pytest.raises(BudgetError, match="at least"):
            Planner([], overheads, costs, policy=policy).plan(40)


@pytest.mark.parametrize("mib", [1, 30, 700])
def test_tables_of_pages_are_in_the_budget(mib: int) -> None:
    weights = [weight(str(i), "q", i, "attention", [mib << 20] * 4) for i in range(3)]
    smallest = Planner(weights, OVERHEADS).smallest_bytes
    Planner(weights, OVERHEADS, COSTS).plan(smallest)
    with pytest.raises(BudgetError, match=f"at least {named_budget_bytes(smallest)} bytes"):
        Planner(weights, OVERHEADS, COSTS).plan(smallest - 1)
    budget = smallest + 5 * (mib << 20)
    plan = Planner(weights, OVERHEADS, COSTS).plan(budget)
    tables = plan.overheads.process_bytes - OVERHEADS.process_bytes
    assert tables >= (plan.held_bytes + plan.unused_bytes) // 512 - PAGE
    assert plan.overheads.nbytes + plan.held_bytes + plan.unused_bytes == budget

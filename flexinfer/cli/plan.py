"""flexinfer plan: where a budget would go, and how fast it would be at this and other budgets."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexinfer.cli.bars import Bars
from flexinfer.cli.parameters import Json, Model
from flexinfer.cli.terminal import console, table
from flexinfer.cli.text import find
from flexinfer.observe.report import PART_COLOURS, budget_parts
from flexinfer.options import Options
from flexinfer.plan.batches import Batch, best_batch, counts_up_to, plan_batches
from flexinfer.plan.plan import Costs, Plan
from flexinfer.plan.planner import Planner, with_page_tables
from flexinfer.plan.weights import Weight
from flexinfer.sizes import format_size, named_budget_bytes, whole_mib

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flexinfer.draft.drafts import Option
    from flexinfer.engine.prepare import Prepared
    from flexinfer.model.skeleton import Skeleton

# Budgets between the smallest and everything in memory.
STEPS = 8
BAR_COLUMNS = 32
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch",
        metavar="N",
        help="tokens/s for 1, 2, 4, ... N sequences at a time, each of the context",
    ),
]


def plan(model: Model, options: Options, batch: BatchOption = None, as_json: Json = False) -> int:
    """Where a budget would go, and how fast.

    Reads no weights but a sample.
    """
    counts = counts_up_to(batch) if batch is not None else []
    if counts and options.draft is not None:
        raise ValueError(
            f"batch={batch}: batches go without a draft; leave one of --batch and --draft out"
        )
    with Bars() as bars:
        path = find(model, options, bars)
        bars.spin(f"reading {model}")
        from flexinfer.engine.prepare import prepare
        from flexinfer.formats.checkpoint import open_checkpoint

        prepared = prepare(open_checkpoint(path), options)
        bars.spin("measuring disk and kernels")
        costs = _measured(prepared)
        planner, budget_bytes = prepared.planner(costs), useful_bytes(prepared)
        drafted = _drafted(prepared, planner, budget_bytes)
        batches = _batches(prepared, planner, budget_bytes, counts)
    best = max(drafted, key=lambda one: one.tokens_per_s, default=None)
    chosen = best.plan if best is not None else planner.plan(budget_bytes)
    plans = [planner.plan(nbytes) for nbytes in _budgets(planner, budget_bytes)]
    if as_json:
        facts = plan_facts(prepared.skeleton, chosen, plans) | {
            "drafts": [draft_facts(one) for one in drafted]
        }
        print(json.dumps(facts | ({"batches": batch_facts(batches)} if batches else {})))
        return 0
    show(console(), prepared.skeleton, chosen, plans, drafted)
    if batches:
        console().print(
            f"Several sequences at a time, of {chosen.overheads.context_tokens} tokens each"
        )
        console().print(batch_table(batches))
    return 0


def useful_bytes(prepared: "Prepared") -> int:
    """The budget that is given; of what the machine has to spare, no more than can be used."""
    if prepared.options.memory != "auto":
        return prepared.budget_bytes
    return min(prepared.budget_bytes, _everything_bytes(prepared.planner()))


def _everything_bytes(planner: Planner) -> int:
    """A budget that holds every weight."""
    experts_bytes = planner.mixture.slots().nbytes if planner.mixture is not None else 0
    weights_bytes = sum(weight.lock_cost_bytes for weight in planner.weights) + experts_bytes
    return max(planner.smallest_bytes, planner.overheads.nbytes + with_page_tables(weights_bytes))


def _budgets(planner: Planner, budget_bytes: int) -> list[int]:
    """The smallest budget, everything in memory, steps between them, and the one that is given."""
    smallest_bytes = named_budget_bytes(planner.smallest_bytes)
    span_bytes = max(0, _everything_bytes(planner) - smallest_bytes)
    steps = {smallest_bytes + span_bytes * step // STEPS for step in range(STEPS + 1)}
    return sorted(nbytes for nbytes in steps | {budget_bytes} if nbytes >= planner.smallest_bytes)


def _measured(prepared: "Prepared") -> Costs:
    """What reading and computing cost."""
    from flexinfer.streaming.costs import measure_costs
    from flexinfer.streaming.reader import FileReader

    skeleton, options = prepared.skeleton, prepared.options
    reader = FileReader(skeleton.checkpoint.files, direct=options.direct)
    try:
        return measure_costs(skeleton.used, reader, max(1, options.io_threads))
    finally:
        reader.close()


def _drafted(prepared: "Prepared", planner: Planner, budget_bytes: int) -> "list[Option]":
    """The plan with each draft that is possible; none where no draft is asked for.

    Measures what they cost.
    """
    from flexinfer.draft.costs import measure_draft_costs
    from flexinfer.draft.drafter import draft_options

    drafts, skeleton = prepared.drafts, prepared.skeleton
    if drafts is None:
        return []
    drafted, undrafted = prepared.drafted_planners(planner)
    return draft_options(
        drafts,
        drafted,
        undrafted,
        budget_bytes,
        lambda: measure_draft_costs(skeleton.used, drafts.kernels, drafts.model_share),
    )


def _batches(
    prepared: "Prepared", planner: Planner, budget_bytes: int, counts: Sequence[int]
) -> list[Batch]:
    """What each of `counts` sequences at a time gives, each as long as the context.

    Measures what passes of that many rows cost. The plan is that of `from_pretrained(...,
    context=sequences * context, logits_to_keep=sequences)`. Raises ValueError for a mixture.
    """
    from flexinfer.streaming.costs import measure_rows

    skeleton = prepared.skeleton
    if not counts:
        return []
    if skeleton.mixture is not None:
        raise ValueError(
            "batch: this is a mixture of experts, whose reads depend on what sequences are routed "
            "to; plan it without --batch"
        )
    return plan_batches(
        counts,
        planner,
        budget_bytes,
        lambda count: prepared.overheads(context=count * prepared.context, logits_to_keep=count),
        measure_rows(skeleton.used, counts),
    )


def locked_by_role(weights: list[Weight], plan: Plan) -> list[dict[str, Any]]:
    """Bytes of each role of weight over all layers, and how many of them are locked."""
    rows: dict[str, dict[str, Any]] = {}
    for weight in weights:
        row = rows.setdefault(
            weight.role, {"role": weight.role, "kind": weight.kind, "nbytes": 0, "locked_bytes": 0}
        )
        row["nbytes"] += weight.nbytes
        locked = weight.pieces[: plan.locked_pieces.get(weight.name, 0)]
        row["locked_bytes"] += sum(piece.nbytes for piece in locked)
    return list(rows.values())


def expert_facts(plan: Plan) -> dict[str, Any] | None:
    """Of a mixture: bytes of all experts, of those that a token uses and of the cache, and the hits
    where routing is uniform.
    """
    experts = plan.experts
    if experts is None:
        return None
    return {
        "total_bytes": experts.total_bytes,
        "token_bytes": experts.token_bytes,
        "cache_bytes": experts.cache_bytes,
        "hit_rate": experts.hit_rate,
    }


def draft_facts(option: "Option") -> dict[str, Any]:
    """What a draft, or none, gives."""
    draft = option.plan.draft
    facts = {"kind": option.kind, "type": option.type, "tokens_per_s": option.tokens_per_s}
    return facts | (
        {"candidates": draft.candidates, "tokens_per_pass": draft.tokens_per_pass} if draft else {}
    )


def batch_facts(batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """What each number of sequences takes and gives; the speed is None where the budget is too
    small.
    """
    return [
        {
            "sequences": one.sequences,
            "tokens_per_s": one.tokens_per_s if one.plan is not None else None,
            "compute_s": one.plan.costs.compute_s if one.plan is not None else None,
            "locked_bytes": one.plan.locked_bytes if one.plan is not None else None,
            "streamed_bytes": one.plan.streamed_bytes if one.plan is not None else None,
            "kv_bytes": one.overheads.kv_bytes,
            "activation_bytes": one.overheads.activation_bytes,
            "best": one is best_batch(batches),
        }
        for one in batches
    ]


def batch_table(batches: Sequence[Batch]) -> "Table":
    """tokens/s by the number of sequences."""
    made = table(
        "sequences", "KV and activations", "read per pass", "compute", "tokens/s predicted", left=0
    )
    for one in batches:
        best = one is best_batch(batches)
        sizes = format_size(one.overheads.kv_bytes + one.overheads.activation_bytes)
        number = ("* " if best else "") + str(one.sequences)
        if one.plan is None:
            made.add_row(number, sizes, "", "", "does not fit")
            continue
        read, compute = (
            format_size(one.plan.streamed_bytes),
            f"{one.plan.costs.compute_s * 1e3:.0f} ms",
        )
        made.add_row(
            number, sizes, read, compute, f"{one.tokens_per_s:.3g}", style="bold" if best else ""
        )
    return made


def plan_facts(skeleton: "Skeleton", plan: Plan, plans: list[Plan]) -> dict[str, Any]:
    """`flexinfer plan --json`."""
    return {
        "model": str(skeleton.checkpoint.path),
        "policy": plan.policy,
        "context_tokens": plan.overheads.context_tokens,
        "costs": asdict(plan.costs),
        "budget_bytes": plan.budget_bytes,
        "parts_bytes": budget_parts(plan),
        "total_bytes": plan.total_bytes,
        "streamed_bytes": plan.streamed_bytes,
        "predicted_tokens_per_s": plan.predicted_tokens_per_s,
        "bound_tokens_per_s": plan.bound_tokens_per_s,
        "roles": locked_by_role(skeleton.weights, plan),
        "experts": expert_facts(plan),
        "budgets": [
            {
                "budget_bytes": other.budget_bytes,
                "streamed_bytes": other.streamed_bytes,
                "predicted_tokens_per_s": other.predicted_tokens_per_s,
                "bound_tokens_per_s": other.bound_tokens_per_s,
                "expert_hit_rate": other.experts.hit_rate if other.experts is not None else None,
            }
            for other in plans
        ],
    }


def show(
    screen: "Console", skeleton: "Skeleton", plan: Plan, plans: list[Plan], drafted: "list[Option]"
) -> None:
    """`flexinfer plan` for people: a bar of the budget and tables; bars only where a terminal sees
    them.
    """
    name, parts = skeleton.checkpoint.path.name, budget_parts(plan)
    screen.print(
        f"{name}: where {format_size(plan.budget_bytes)} go, for a context of "
        f"{plan.overheads.context_tokens} tokens"
    )
    if screen.is_terminal:
        screen.print()
        screen.print(budget_bar(parts, min(screen.width, 80)))
    screen.print(budget_table(parts, coloured=screen.is_terminal))
    screen.print(f"What is locked (policy {plan.policy})")
    screen.print(locked_table(skeleton, plan))
    bandwidth = f"{plan.costs.bandwidth_bytes_per_s / 1e6:.0f} MB/s"
    compute = f"{plan.costs.compute_s * 1e3:.0f} ms"
    screen.print(f"Speed, reads at {bandwidth}, {compute} of compute a token (* this budget)")
    screen.print(speed_table(plan, plans, bars=screen.is_terminal))
    for one in drafted:
        what = f"{one.kind} {one.type}" if one.kind == "substitute" else one.kind or "none"
        each = f", {one.plan.draft.tokens_per_pass:.3g} tokens a pass" if one.plan.draft else ""
        screen.print(f"draft {what}: {one.tokens_per_s:.3g} tokens/s expected{each}")


def budget_bar(parts: dict[str, int], columns: int) -> "Text":
    """One line, as long as the budget is large, in the colours of its parts."""
    from rich.text import Text

    bar, total, done = Text(), sum(parts.values()), 0
    for part, nbytes in parts.items():
        start, done = round(done * columns / total), done + nbytes
        bar.append("█" * (round(done * columns / total) - start), style=PART_COLOURS[part])
    return bar


def budget_table(parts: dict[str, int], coloured: bool) -> "Table":
    """The parts of the budget that are there, and their shares."""
    from rich.text import Text

    made, total = table("part", "memory", "share"), sum(parts.values())
    for part, nbytes in parts.items():
        square = Text("■ ", style=PART_COLOURS[part]) if coloured else Text()
        made.add_row(square + Text(part), format_size(nbytes), f"{nbytes / total:.0%}")
    return made


def locked_table(skeleton: "Skeleton", plan: Plan) -> "Table":
    """How much of each role of weight stays."""
    made = table("weight", "kind", "all layers", "locked", "share", left=2)
    for row in locked_by_role(skeleton.weights, plan):
        share = row["locked_bytes"] / row["nbytes"]
        sizes = format_size(row["nbytes"]), format_size(row["locked_bytes"])
        made.add_row(row["role"], row["kind"], *sizes, f"{share:.0%}")
    if (experts := plan.experts) is not None:
        sizes = format_size(experts.total_bytes), f"cache {format_size(experts.cache_bytes)}"
        name, hits = (
            f"experts ({format_size(experts.token_bytes)} a token)",
            f"{experts.hit_rate:.0%} hits",
        )
        made.add_row(name, "ffn", *sizes, hits)
    return made


def speed_table(plan: Plan, plans: list[Plan], bars: bool) -> "Table":
    """tokens/s over budgets.

    Bars: as far as it will go solid, as far as any system could go shaded.
    """
    from rich.text import Text

    made = table("budget", "read per token", "tokens/s predicted", "bound", left=0)
    if bars:
        made.add_column("")
    most = max(other.bound_tokens_per_s for other in plans)
    for other in plans:
        here = other.budget_bytes == plan.budget_bytes
        size = format_size if here or made.row_count else whole_mib
        row = [
            ("* " if here else "") + size(other.budget_bytes),
            format_size(other.streamed_bytes),
            f"{other.predicted_tokens_per_s:.3g}",
            f"{other.bound_tokens_per_s:.3g}",
        ]
        solid = round(BAR_COLUMNS * other.predicted_tokens_per_s / most)
        whole = round(BAR_COLUMNS * other.bound_tokens_per_s / most)
        bar = Text("█" * solid, style=PART_COLOURS["locked weights"]) + Text(
            "░" * (whole - solid), style=PART_COLOURS["tokenizer"]
        )
        made.add_row(*row, *([bar] if bars else []), style="bold" if here else "")
    return made

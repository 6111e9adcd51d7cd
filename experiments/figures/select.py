"""Which records stand in one figure: by machine, by how tokens came, by system."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from experiments.record_files import load_records, say_none
from experiments.records import Record, with_common_costs


def find_records(
    results_dir: Path, command: str, tokens: str = "one by one"
) -> dict[str, list[Record]]:
    """The records below `results_dir` that may stand in one figure, by machine: the one with most
    records first.

    `tokens`: "one by one"; "drafts": of real or replayed text (experiments.drafts); "batches": of
    several sequences (experiments.batches). They are in no figure together.
    Those of the smoke model only where there are no others. Says which command makes records where
    there are none. Cells that have a limited record are shown without their unlimited ones. B and c
    of the bounds are a machine's (`with_common_costs`).
    """
    records = load_records(results_dir) if results_dir.exists() else []
    records = [one for one in records if _tokens(one) == tokens]
    records = [one for one in records if one.cell.model.name != "smoke"] or records
    if not records:
        say_none(results_dir, command)
    machines: dict[str, list[Record]] = defaultdict(list)
    for one in records:
        machines[one.provenance.machine].append(one)
    largest_first = sorted(machines.items(), key=lambda one: (-len(one[1]), one[0]))
    return {
        machine: with_common_costs(_limited(machine, found)) for machine, found in largest_first
    }


def _tokens(record: Record) -> str:
    workload = record.cell.workload
    if workload.batch is not None:
        return "batches"
    return "drafts" if workload.texts or workload.replayed else "one by one"


def of_systems(
    found: Mapping[str, Sequence[Record]], systems: Collection[str]
) -> dict[str, list[Record]]:
    """Of every machine the records of `systems`, without those of the experiments that have budgets
    of their own, and without what was measured in one budget on a device of its own (mapped,
    devices).
    """
    kept = {}
    for machine, records in found.items():
        mine = [
            one
            for one in records
            if one.cell.system.name in systems
            and one.cell.experiment not in ("targets", "resident", "moe", "exact")
        ]
        budgets = Counter(place[:3] for place in {one.place for one in mine})
        kept[machine] = [
            one
            for one in mine
            if one.cell.experiment not in ("mapped", "devices") or budgets[one.place[:3]] > 1
        ]
    return kept


def _limited(machine: str, records: list[Record]) -> list[Record]:
    """`records` without the unlimited ones, where there are others; those that never ran stay."""
    ran = [one for one in records if one.status in ("ok", "killed", "timeout")]
    unlimited = {one.run_id for one in ran if one.limits.method == "unlimited"}
    if not 0 < len(unlimited) < len(ran):
        return records
    print(
        f"{machine}: {len(unlimited)} records without limits are left out beside "
        f"{len(ran) - len(unlimited)} with"
    )
    return [one for one in records if one.run_id not in unlimited]

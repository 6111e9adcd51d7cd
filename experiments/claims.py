"""The paper's claims C1 to C9 against records: pure functions from records to verdicts, by criteria
that are stated.

A gain is a ratio of median speeds of two systems on the same weights, device and budget, where the
base reads for every token. It is clear when it is more than the noise (3 %, our choice) and no
round of the slower system reaches one of the faster: spreads that overlap are no difference. Where
either has fewer than three rounds they say little of the spread, and a clear gain is one of more
than 20 %: seven in ten pairs of rounds of one cell differ by less. What 'reproduced' asks for
depends on how the paper says it, of clear gains alone:

- a range over budgets (C1): every gain reaches the range's least, and one its greatest;
- a number at the least memory (C3): the gain there reaches it;
- one range for the least memory and one for more (C4, C5): the gain at the least reaches the first,
  the best of the others the second;
- up to a number (C6, C7): the best gain reaches it.

'partly' when a part of that is so, or there are clear gains and no clear loss; 'not' otherwise. C2,
C8 and C9 have criteria of their own, in their functions. C6 to C8 are about the paper's Algorithm
1, and judged with it; our own policy is told beside it. Claims are judged for each machine, model,
weights and device that has what the claim is about: a model that the paper gives a number for, a
budget of at most a third of the weights where it speaks of the least memory, and another one where
it speaks of more.
The bound says why a gain differs from the paper's: overlap can save no more than the smaller of
computing and reading, so where the disk is slow against the kernels, or the other way round, there
is little to gain for anyone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.figures.tables import frame, summary
from experiments.records import Record

NOISE = 0.03
FEW_ROUNDS = 0.20
LITTLE = 1 / 3  # of the weights: a budget that can be called the least memory
CLOSE = 0.10
FLAT = 1.25
DIFFERENT_TOKENS = 8  # that a run has decoded at least, to say anything of its output
QUOTED_ROUNDS = 3  # DESIGN: Measuring


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one claim on one machine, model, weights and device."""

    claim: str
    machine: str
    model: str
    weights: str
    device: str
    paper: str
    measured: str
    verdict: str  # reproduced | partly | not | not measured
    why: str


def judge(found: Mapping[str, Sequence[Record]], paper: Mapping[str, Any]) -> list[Verdict]:
    """A verdict for every claim of results/paper.json, on every machine, model, weights and device
    there are records of.

    found: the records of each machine (figures.find_records).
    """
    parts = [part for machine, records in found.items() for part in _parts(machine, records)]
    verdicts = []
    for claim, decide in _judges(paper).items():
        said = paper[claim]["text"]
        answers = [_verdict(claim, said, part, decide) for part in parts]
        none = f"no records for it: python scripts/run.py +exp={paper[claim]['experiment']}"
        verdicts += [one for one in answers if one] or [
            Verdict(claim, "", "", "", "", said, "", "not measured", none)
        ]
    return verdicts


@dataclass(frozen=True, slots=True)
class Part:
    """The records of one model's weights on one device of one machine, and their summary."""

    machine: str
    model: str
    weights: str
    device: str
    rows: pd.DataFrame
    records: list[Record]

    def speeds(self, system: str) -> dict[int, float]:
        """Median tokens per second of a system by budget, where it ran."""
        rows = self.rows[(self.rows["system"] == system) & self.rows["tokens_per_s"].notna()]
        return dict(zip(rows["budget_bytes"], rows["tokens_per_s"], strict=True))

    def gains(self, system: str, base: str) -> dict[int, float]:
        """Times that `system` is as fast as `base`, by budget, the least first, where both ran and
        the model does not fit `base`.
        """
        ours, theirs = self.speeds(system), self.speeds(base)
        budgets = sorted(
            budget for budget in ours.keys() & theirs.keys() if not self.fits(base, budget)
        )
        return {budget: ours[budget] / theirs[budget] for budget in budgets}

    def overlap(self, system: str, base: str, budget_bytes: int) -> bool:
        """Whether the rounds of two systems in that budget overlap."""
        rows = self.rows[self.rows["budget_bytes"] == budget_bytes].set_index("system")
        ours, theirs = rows.loc[system], rows.loc[base]
        return bool(ours["low"] <= theirs["high"] and theirs["low"] <= ours["high"])

    def clear(self, system: str, base: str, budget_bytes: int) -> int:
        """1: `system` is clearly faster than `base` in that budget, -1: clearly slower, 0: no
        difference to be seen.
        """
        rows = self.rows[self.rows["budget_bytes"] == budget_bytes].set_index("system")
        few = rows.loc[[system, base], "n"].min() < QUOTED_ROUNDS
        noise = FEW_ROUNDS if few else NOISE
        gain = rows.loc[system, "tokens_per_s"] / rows.loc[base, "tokens_per_s"]
        if self.overlap(system, base, budget_bytes) or 1 / (1 + noise) <= gain <= 1 + noise:
            return 0
        return 1 if gain > 1 else -1

    @property
    def weight_bytes(self) -> float:
        """All weights, those of experts that a token does not touch too."""
        return float(self.rows["weights_gib"].max() * 2**30)

    def fits(self, system: str, budget_bytes: int) -> bool:
        """Whether `system` has all weights in memory in that budget: then nothing is compared."""
        return any(
            one.reads_nothing
            for one in self.records
            if one.cell.system.name == system and one.cell.budget_bytes == budget_bytes
        )

    def overlap_room(self, budget_bytes: int) -> float | None:
        """The most that overlap can gain there: (compute + read) / max(compute, read) - 1, of our
        own system.
        """
        rooms = []
        for one in self.records:
            if (
                one.cell.system.name != "flexinfer"
                or one.cell.budget_bytes != budget_bytes
                or not one.bound_tokens_per_s
            ):
                continue
            assert one.total_weight_bytes and one.bandwidth_bytes_per_s and one.compute_s_per_pass  # noqa: PT018
            resident = one.cell.budget_bytes - (one.process_bytes or 0) - (one.kv_bytes or 0)
            read_s = max(0.0, one.total_weight_bytes - resident) / one.bandwidth_bytes_per_s
            rooms.append(
                (one.compute_s_per_pass + read_s) / max(one.compute_s_per_pass, read_s) - 1
            )
        return max(rooms, default=None)


def _parts(machine: str, records: Iterable[Record]) -> list[Part]:
    untraced = [one for one in records if not one.cell.trace]
    parts = []
    for (model, weights, device), rows in summary(frame(untraced)).groupby(
        ["model", "weights", "device"], sort=False
    ):
        found = [one for one in untraced if one.place[:3] == (model, weights, device)]
        parts.append(Part(machine, str(model), str(weights), str(device), rows, found))
    return parts


def _judges(paper: Mapping[str, Any]) -> dict[str, Callable[[Part], tuple[str, str, str]]]:
    """For each claim, what gives (measured, verdict, why) of a part.

    Empty words where the part lacks the records.
    """
    return {
        "C1": lambda part: _gain(part, "flexinfer", "llama-cpp-mmap", paper["C1"], RANGE),
        "C2": _flat,
        "C3": lambda part: _gain(part, _synchronous(part), "llama-cpp-mmap", paper["C3"], LEAST),
        "C4": lambda part: _gain(
            part, "flexinfer", _synchronous(part), paper["C4"], LEAST_AND_MORE
        ),
        "C5": lambda part: _gain(part, "flexinfer", "unbalanced", paper["C5"], LEAST_AND_MORE),
        "C6": lambda part: _policies(part, "attention-first", paper["C6"]),
        "C7": lambda part: _policies(part, "ffn-first", paper["C7"]),
        "C8": _close,
        "C9": _same_tokens,
    }


def _verdict(
    claim: str, said: str, part: Part, decide: Callable[[Part], tuple[str, str, str]]
) -> Verdict | None:
    measured, verdict, why = decide(part)
    if not verdict:
        return None
    rounds = int(part.rows.loc[part.rows["n"] > 0, "n"].min())
    if rounds < QUOTED_ROUNDS and claim != "C9":  # C9 compares tokens, not speeds
        why += (
            f"; fewest rounds {rounds}: a first look, in which the disk's noise is as large as "
            "such gains"
        )
    return Verdict(
        claim, part.machine, part.model, part.weights, part.device, said, measured, verdict, why
    )


def claims_frame(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """The verdicts as a table."""
    heads = [
        "claim",
        "machine",
        "model",
        "weights",
        "device",
        "paper",
        "measured",
        "verdict",
        "why",
    ]
    return pd.DataFrame([[getattr(one, head) for head in heads] for one in verdicts], columns=heads)


def by_machine(verdicts: Iterable[Verdict], names: Mapping[str, str]) -> pd.DataFrame:
    """A row for each claim, a column for each machine (`names`: shorter ones): its verdicts, and of
    which models and devices.
    """
    told: dict[str, dict[str, dict[str, list[str]]]] = {}
    for one in verdicts:
        machine = told.setdefault(names.get(one.machine, one.machine), {})
        machine.setdefault(one.claim, {}).setdefault(one.verdict, []).append(
            f"{one.model} {one.device}"
        )
    return pd.DataFrame(
        {
            machine: {
                claim: "; ".join(
                    f"{verdict} ({', '.join(places)})" for verdict, places in found.items()
                )
                for claim, found in claims.items()
            }
            for machine, claims in told.items()
        }
    ).fillna("")


def _synchronous(part: Part) -> str:
    """Synchronous reads by as many readers as prefetching has.

    By one, where records are older than that.
    """
    return "sync-2" if part.speeds("sync-2") else "sync"


Gains = Sequence[float]
Wanted = Sequence[Mapping[str, float]]


def _whole_range(gains: Gains, wanted: Wanted) -> list[bool]:
    low, high = wanted[0]["low"], wanted[0]["high"]
    return [min(gains) >= low, max(gains) >= low, max(gains) >= high]


def _least_and_best(gains: Gains, wanted: Wanted) -> list[bool]:
    return [gains[0] >= wanted[0]["low"], max(gains[1:]) >= wanted[1]["low"]]


@dataclass(frozen=True, slots=True)
class Said:
    """How the paper says a gain: of which budgets, and what of its numbers clear gains by budget
    (1: none), the least first, reach.
    """

    reached: Callable[[Gains, Wanted], list[bool]]
    of_the_least: bool  # a budget that can be called so has to be there
    of_more: bool  # and another one


RANGE = Said(_whole_range, of_the_least=True, of_more=True)
LEAST = Said(lambda gains, wanted: [gains[0] >= wanted[0]["low"]], of_the_least=True, of_more=False)
LEAST_AND_MORE = Said(_least_and_best, of_the_least=True, of_more=True)
UP_TO = Said(
    lambda gains, wanted: [max(gains) >= wanted[0]["low"]], of_the_least=False, of_more=False
)


def _gain(
    part: Part, system: str, base: str, claim: Mapping[str, Any], said: Said
) -> tuple[str, str, str]:
    """Ratio of speeds over the budgets in which the model does not fit, or at the least of them
    where the paper speaks of no other.
    """
    gains = part.gains(system, base)
    wanted = [
        claim[name].get(part.model) or claim[name].get("any")
        for name in ("ranges", "ranges_ample")
        if name in claim
    ]
    if said.of_the_least and not said.of_more:
        gains = dict(list(gains.items())[:1])
    missing = len(gains) < 1 + said.of_more or None in wanted
    if missing or (said.of_the_least and min(gains) > LITTLE * part.weight_bytes):
        return "", "", ""
    clear = [part.clear(system, base, budget) for budget in gains]
    measured = ", ".join(
        f"{_times(gain)}{'' if seen else ' (no clear difference)'} at {budget / 2**30:.2f} GiB"
        for (budget, gain), seen in zip(gains.items(), clear, strict=True)
    )
    some = "partly" if max(clear) > 0 and min(clear) >= 0 else "not"
    parts = said.reached(
        [gain if seen else 1.0 for gain, seen in zip(gains.values(), clear, strict=True)], wanted
    )
    verdict = "reproduced" if all(parts) else "partly" if any(parts) else some
    numbers = " and ".join(
        _times(each["low"]) + (f" to {_times(each['high'])}" if each["high"] > each["low"] else "")
        for each in wanted
    )
    return measured, verdict, _why(part, gains, system, base, f"the paper's {numbers}")


def _policies(part: Part, base: str, claim: Mapping[str, Any]) -> tuple[str, str, str]:
    """C6 and C7: Algorithm 1 over attention or FFN first; our default beside it."""
    measured, verdict, why = _gain(part, "algorithm1", base, claim, UP_TO)
    ours, _, _ = _gain(part, "flexinfer", base, claim, UP_TO)
    return measured, verdict, f"{why}; our default: {ours}" if measured and ours else why


def _why(part: Part, gains: dict[int, float], system: str, base: str, paper: str) -> str:
    """The bound's share in the answer: what could be gained at all."""
    table = part.rows.set_index(["budget_bytes", "system"])
    ratios = [table["ratio"].get((budget, system)) for budget in gains]
    shares = [ratio for ratio in ratios if ratio is not None and ratio == ratio]
    words = [f"best {_times(max(gains.values()))}, {paper}"]
    if shares:
        words.append(f"{system} is at {min(shares):.2f} to {max(shares):.2f} of its bound")
    others = [table["ratio"].get((budget, base)) for budget in gains]
    known = [ratio for ratio in others if ratio is not None and ratio == ratio]
    if known:
        words.append(f"{base} at {min(known):.2f} to {max(known):.2f} of its own")
    rooms = [room for budget in gains if (room := part.overlap_room(budget)) is not None]
    if base == "sync":
        words.append("sync has one reader, flexinfer two")
    if rooms and base in ("sync", "sync-2", "unbalanced"):
        words.append(f"overlap could gain {min(rooms):.0%} to {max(rooms):.0%} here")
    if base in ("sync", "sync-2", "unbalanced") and part.records[0].cell.device.read_bytes_per_s:
        words.append(
            "the bandwidth limit lends a pause's reads to what follows, which spares this base: "
            "see device native"
        )
    return "; ".join(words)


def _times(gain: float) -> str:
    return f"{gain:.2f}x" if gain >= 2 else f"{gain - 1:+.1%}"


def _flat(part: Part) -> tuple[str, str, str]:
    """C2: mmap's greatest over its least speed, in budgets up to 0.8 of the weights, is at most
    1.25 (reproduced).
    """
    speeds = part.speeds("llama-cpp-mmap")
    shape = part.records[0].cell.model.shape
    if shape is not None and shape.experts is not None:  # every token reads other weights
        return "", "", ""
    small = {budget: speed for budget, speed in speeds.items() if budget <= 0.8 * part.weight_bytes}
    if len(small) < 2:
        return "", "", ""
    spread = max(small.values()) / min(small.values())
    budgets = sorted(small)
    measured = (
        f"greatest / least {spread:.2f} from {budgets[0] / 2**30:.2f} to {budgets[-1] / 2**30:.2f} "
        "GiB"
    )
    memory = budgets[-1] / budgets[0]
    fitting = [speed for budget, speed in speeds.items() if part.fits("llama-cpp-mmap", budget)]
    if fitting:
        measured += (
            f"; {max(fitting):.2f} tokens/s when it fits, {max(fitting) / max(small.values()):.0f} "
            "times as much"
        )
    verdict = "reproduced" if spread <= FLAT else "partly" if spread < memory**0.5 else "not"
    return (
        measured,
        verdict,
        f"flat means at most {FLAT} times, over {memory:.1f} times the memory; the paper's is 1.11",
    )


def _close(part: Part) -> tuple[str, str, str]:
    """C8, models with grouped queries: Algorithm 1 and attention-first within 10 % of each other,
    or rounds that overlap, in all budgets (reproduced).
    """
    shape = part.records[0].cell.model.shape
    if shape is None or shape.kv_heads == shape.heads or shape.experts is not None:
        return "", "", ""
    found = {
        system: part.gains(system, "attention-first") for system in ("algorithm1", "flexinfer")
    }
    if not found["algorithm1"]:
        return "", "", ""
    told = {
        system: ", ".join(
            f"{gain - 1:+.1%} at {budget / 2**30:.2f} GiB" for budget, gain in gains.items()
        )
        for system, gains in found.items()
    }
    close = [
        abs(gain - 1) <= CLOSE or part.overlap("algorithm1", "attention-first", budget)
        for budget, gain in found["algorithm1"].items()
    ]
    verdict = "reproduced" if all(close) else "partly" if any(close) else "not"
    why = f"close means within {CLOSE:.0%}, or rounds that overlap"
    if told["flexinfer"]:
        why += f"; our default: {told['flexinfer']}"
    return told["algorithm1"], verdict, why


def _same_tokens(part: Part) -> tuple[str, str, str]:
    """C9: every run of ours, and of stock transformers, on the same weights and prompt decodes the
    same tokens, at every budget and policy.

    Runs that say one thing over and over, as random weights soon do, are no evidence.
    """
    runs: dict[int, list[Record]] = {}
    for one in part.records:
        told = len(set(one.output_tokens)) >= DIFFERENT_TOKENS
        if one.cell.system.kind in ("flexinfer", "transformers") and one.status == "ok" and told:
            runs.setdefault(one.cell.workload.prompt_tokens, []).append(one)
    compared = different = 0
    for found in runs.values():
        longest = max(found, key=lambda one: len(one.output_tokens))
        for one in found:
            if one.run_id != longest.run_id:
                compared += 1
                different += one.output_tokens != longest.output_tokens[: len(one.output_tokens)]
    if not compared:
        return "", "", ""
    measured = f"{compared - different} of {compared} runs decode the same tokens as the longest"
    systems = sorted({one.cell.system.label for found in runs.values() for one in found})
    why = (
        f"{', '.join(systems)}, token by token; the tests compare logits bit for bit with the "
        "resident model"
    )
    return measured, "not" if different else "reproduced", why

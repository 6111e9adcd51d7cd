"""Drafts: several tokens for each pass over the weights, with the same output. What they give, and
how many candidates: pure functions.

A draft proposes candidates, and one pass over the true weights computes the logits of all of them
(flexinfer.assistant). It is the model itself with a low-bit substitute of its streamed rows
(flexinfer.draft.substitute), a small resident model of the same tokenizer, or what stands in
the text already.

Cost model. A candidate is accepted with probability a if those before it were, so k of them give (1
- a^(k+1)) / (1 - a) tokens; that takes k draft passes and one pass over the weights of k + 1 rows.
`best_candidates` takes the k of most tokens per second; `Pace` follows acceptance and seconds as
they are seen. Not done: trees of candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexinfer.cache_dir import user_path
from flexinfer.plan.batches import at_rows
from flexinfer.plan.plan import Costs, DraftPlan, Plan

# Kinds of drafts besides a small model.
DRAFTS = ("substitute", "lookup", "auto")
DEFAULT_TYPE = "q4_0"
MOST_CANDIDATES = 16

# Of a candidate whose predecessors were accepted, before any was seen: at 4.5 and 8.5 bits of
# SmolLM2-135M (docs/log.md), else guessed.
ACCEPTANCE_OF_BITS = ((2.6, 0.45), (3.5, 0.7), (4.5, 0.85), (5.5, 0.9), (8.5, 0.95))
ACCEPTANCE_OF = {"model": 0.7, "lookup": 0.2}

# As many the prior counts for at first; it is forgotten as what was seen is.
PRIOR_CANDIDATES = 16.0
# Factor by which each pass discounts earlier ones (docs/log.md).
FORGETTING = 0.85
# A pass waits for the disk if its kernels take less than this share of it.
READING_SHARE = 0.8
# Longest run of tokens that is looked up in the text so far.
LOOKED_UP_TOKENS = 3


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """What `from_pretrained` was asked for."""

    # "substitute", "lookup", "auto", or "model".
    kind: str
    # Path or id of the small model.
    model: str | Path | None
    # ggml's type of a substitute.
    type: str | None
    # Candidates a pass; None for as many as pay.
    candidates: int | None
    # Where substitutes are kept.
    folder: Path | None

    @classmethod
    def of(
        cls,
        draft: str | Path | None,
        type: str | None,
        candidates: int | None,
        folder: str | Path | None,
    ) -> "DraftChoice | None":
        """Raises ValueError for arguments that do not go together."""
        for name, value in (
            ("draft_type", type),
            ("draft_tokens", candidates),
            ("draft_dir", folder),
        ):
            if draft is None and value is not None:
                raise ValueError(f"{name}={value!r} needs a draft, such as draft='auto'")
        if draft is None:
            return None
        if candidates is not None and candidates < 1:
            raise ValueError(
                f"draft_tokens={candidates} must be at least 1 candidate; leave it out to have it "
                "chosen"
            )
        kind = str(draft) if draft in DRAFTS else "model"
        if kind in ("lookup", "model") and (type is not None or folder is not None):
            raise ValueError(
                f"draft={str(draft)!r} has no substitute: leave draft_type and draft_dir out"
            )
        where = draft if kind == "model" else None
        return cls(kind, where, type, candidates, user_path(folder) if folder is not None else None)


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """Seconds of computing, as measured when a model is loaded."""

    # Seconds of a pass over all weights: (rows, seconds), ascending.
    rows_s: tuple[tuple[int, float], ...]
    # Seconds of a draft pass if every weight is streamed, and so read from its substitute.
    draft_s: float
    # Seconds of a draft pass if every weight is locked.
    locked_s: float

    def pass_s(self, rows: int) -> float:
        """Seconds of a pass of `rows` rows."""
        return at_rows(self.rows_s, rows)


def rough_costs(compute_s: float) -> DraftCosts:
    """Without measuring: rows that share no work, and drafts that take as long as passes."""
    return DraftCosts(((1, compute_s), (2, 2 * compute_s)), compute_s, compute_s)


def acceptance_of(bits: float) -> float:
    """What to expect of a substitute of so many bits a weight before any of its candidates was
    seen.
    """
    before = ACCEPTANCE_OF_BITS[0]
    for after in ACCEPTANCE_OF_BITS:
        if after[0] >= bits:
            width = after[0] - before[0]
            return (
                after[1]
                if not width
                else before[1] + (bits - before[0]) / width * (after[1] - before[1])
            )
        before = after
    return before[1]


def expected_tokens(acceptance: float, candidates: int) -> float:
    """Tokens that a pass gives which verifies so many candidates, each accepted with `acceptance`
    if those before it were.
    """
    if acceptance >= 1:
        return candidates + 1.0
    return (1 - acceptance ** (candidates + 1)) / (1 - acceptance)


def best_candidates(
    acceptance: float, counts: range, draft_s: float, pass_s: Callable[[int], float]
) -> tuple[int, float]:
    """The number of candidates, one of `counts`, that gives most tokens per second, and how many.

    draft_s: seconds of drafting one candidate. pass_s: seconds of a pass of so many rows, reading
    included.
    """

    def speed(candidates: int) -> float:
        seconds = candidates * draft_s + pass_s(candidates + 1)
        return expected_tokens(acceptance, candidates) / seconds if seconds else float("inf")

    best = max(counts, key=speed)
    return best, speed(best)


def plan_draft(
    plan: Plan,
    costs: Costs,
    draft_costs: DraftCosts,
    kind: str,
    type: str | None,
    acceptance: float,
    counts: range,
) -> DraftPlan:
    """What drafts of `kind` give in the memory that `plan` divides, of so many candidates as
    `counts` has and pay most. While they are made the window is filled.
    """
    read_s = plan.streamed_bytes / costs.bandwidth_bytes_per_s
    streamed = plan.streamed_bytes / plan.total_bytes if plan.total_bytes else 0.0
    draft_s = streamed * draft_costs.draft_s + (1 - streamed) * draft_costs.locked_s
    draft_s = {"substitute": draft_s, "lookup": 0.0}.get(kind, draft_costs.draft_s)

    def pass_s(rows: int) -> float:
        ahead_s = min((rows - 1) * draft_s, plan.window_bytes / costs.bandwidth_bytes_per_s)
        return max(draft_costs.pass_s(rows), read_s - ahead_s)

    candidates, speed = best_candidates(acceptance, counts, draft_s, pass_s)
    tokens = expected_tokens(acceptance, candidates)
    return DraftPlan(kind, type, candidates, acceptance, tokens, speed)


@dataclass(slots=True)
class Pace:
    """How many candidates the next pass gets: follows acceptance and seconds as they are seen, from
    what was planned.
    """

    planned: DraftPlan
    most: int
    # Rows of a pass -> seconds of compute.
    rows_s: Callable[[int], float]
    # Whether the number of candidates stays as planned.
    fixed: bool = False
    _prior: float = PRIOR_CANDIDATES
    _accepted: float = 0.0
    _rejected: float = 0.0
    _draft_s: float | None = None
    _pass_s: float | None = None
    _pass_rows: int = 1
    # Passes seen so far.
    passes: int = 0

    @property
    def acceptance(self) -> float:
        seen = self._accepted + self._rejected
        return (self._accepted + self._prior * self.planned.acceptance) / (seen + self._prior)

    def saw(self, candidates: int, accepted: int) -> None:
        """A pass verified so many candidates and kept the first `accepted` of them."""
        self._prior *= FORGETTING
        self._accepted = self._accepted * FORGETTING + accepted
        self._rejected = self._rejected * FORGETTING + (accepted < candidates)

    def took(
        self, draft_s: float | None = None, pass_s: float | None = None, rows: int = 1
    ) -> None:
        """Seconds of one draft pass, or of one pass over the weights with so many rows."""
        if draft_s is not None:
            self._draft_s = (
                draft_s if self._draft_s is None else 0.9 * self._draft_s + 0.1 * draft_s
            )
        if pass_s is not None:
            self._pass_s = pass_s if self._pass_s is None else 0.7 * self._pass_s + 0.3 * pass_s
            self._pass_rows, self.passes = rows, self.passes + 1

    def candidates(self) -> int:
        """For the next pass."""
        return self.planned.candidates if self.fixed else self._best()[0]

    def predicted_tokens_per_s(self) -> float:
        """By what has been seen so far."""
        if self._draft_s is None or self._pass_s is None:
            return self.planned.predicted_tokens_per_s
        if self.fixed:
            count = self.planned.candidates
            return expected_tokens(self.acceptance, count) / (count * self._draft_s + self._pass_s)
        return self._best()[1]

    def _best(self) -> tuple[int, float]:
        if self._draft_s is None or self._pass_s is None:
            return self.planned.candidates, self.planned.predicted_tokens_per_s
        measured_s, computing_s = self._pass_s, self.rows_s(self._pass_rows)
        # Then more rows cost nothing, until computing them takes as long.
        reading = computing_s < READING_SHARE * measured_s

        def pass_s(rows: int) -> float:
            if reading:
                return max(measured_s, self.rows_s(rows))
            return measured_s * self.rows_s(rows) / computing_s

        return best_candidates(self.acceptance, range(1, self.most + 1), self._draft_s, pass_s)


def looked_up(ids: Sequence[int], most: int) -> list[int]:
    """What followed the last tokens of `ids` where they stood before, the longest and latest such
    place first; at most `most`.
    """
    for length in range(min(LOOKED_UP_TOKENS, len(ids) - 1), 0, -1):
        end = list(ids[-length:])
        for start in range(len(ids) - length - 1, -1, -1):
            if list(ids[start : start + length]) == end:
                return list(ids[start + length : start + length + most])
    return []

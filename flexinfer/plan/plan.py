"""A plan: where a memory budget goes, and the speed to expect of it. Data alone;
`flexinfer.plan.planner` makes plans.

Cost model, the paper's equation 4: seconds per pass = max(compute, streamed bytes / bandwidth).
"""

from dataclasses import dataclass, field

from flexinfer.plan.experts import ExpertPlan


@dataclass(frozen=True, slots=True)
class Costs:
    """What this machine was measured to do."""

    bandwidth_bytes_per_s: float
    # One pass at one row with every weight resident.
    compute_s: float


@dataclass(frozen=True, slots=True)
class Overheads:
    """Memory that is taken before any weight is locked or streamed, in bytes."""

    # Interpreter, libraries, the model's modules.
    process_bytes: int
    # Norms, biases, positions and other parameters that are never streamed.
    unstreamed_bytes: int
    # Keys and values of full-attention layers, reserved when the model is loaded.
    kv_bytes: int
    # The largest pass, and the layers of sliding windows.
    activation_bytes: int
    # What cannot be known: allocator, threads.
    margin_bytes: int
    # Tokens that the KV cache and the activations are sized for.
    context_tokens: int = 0
    # Kept free for the tokenizer: to load it, and what it grows by when it is used.
    tokenizer_bytes: int = 0
    # A draft model, and the scores of candidates.
    draft_bytes: int = 0
    # What loading the tokenizer takes at most; over before anything else is in memory.
    loading_bytes: int = 0
    # Some heads of keys and values in the compute dtype, where the cache keeps another.
    attention_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """All of it."""
        return (
            self.process_bytes
            + self.tokenizer_bytes
            + self.draft_bytes
            + self.attention_bytes
            + self.unstreamed_bytes
            + self.kv_bytes
            + self.activation_bytes
            + self.margin_bytes
        )


@dataclass(frozen=True, slots=True)
class PassShape:
    """What a call needs of one pass over the weights."""

    batch: int
    # Per sequence, like the counts below.
    new_tokens: int
    # In the KV cache.
    past_tokens: int = 0
    # The last positions, whose logits are wanted; 0 for all.
    kept: int = 1
    # Whether its keys and values go into the memory reserved for them.
    cached: bool = True

    @property
    def kept_tokens(self) -> int:
        """Positions of each sequence that get logits."""
        return min(self.kept, self.new_tokens) if self.kept else self.new_tokens

    @property
    def total_tokens(self) -> int:
        """Tokens of all sequences, when the pass is over."""
        return self.batch * (self.past_tokens + self.new_tokens)


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """Several tokens for each pass over the weights, and the speed to expect of that."""

    # "substitute", "lookup" or "model".
    kind: str
    # Of a substitute's blocks.
    type: str | None
    # Candidates that a pass verifies.
    candidates: int
    # Probability that a candidate is accepted if those before it were.
    acceptance: float
    tokens_per_pass: float
    predicted_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a budget goes.

    All sizes in bytes; `streamed_bytes`, `total_bytes` and the speeds are per pass over the
    weights. Of experts a pass uses those that one token is routed to, and reads as many as are
    expected to be missed.
    """

    budget_bytes: int
    overheads: Overheads
    policy: str
    # The paper's k, or None where the window is counted in bytes alone.
    window_layers: int | None
    slots: int
    slot_bytes: int
    # Weight name -> how many of its pieces are locked.
    locked_pieces: dict[str, int] = field(repr=False)
    locked_bytes: int
    # What they take in memory: whole pages, in the compute dtype.
    locked_memory_bytes: int
    streamed_bytes: int
    total_bytes: int
    unused_bytes: int
    costs: Costs
    # What no system can beat in this budget: 1 / max(compute, (total - R) / bandwidth).
    bound_tokens_per_s: float
    predicted_tokens_per_s: float
    # None where there are none.
    experts: ExpertPlan | None = None
    # Substitutes of what is streamed, for drafts.
    substitute_bytes: int = 0
    draft: DraftPlan | None = None

    @property
    def held_bytes(self) -> int:
        """Memory for weights: locked, substitutes, window and cache of experts."""
        cache_bytes = self.experts.cache_bytes if self.experts is not None else 0
        return self.locked_memory_bytes + self.substitute_bytes + self.window_bytes + cache_bytes

    @property
    def kv_bytes(self) -> int:
        """Keys and values of full-attention layers."""
        return self.overheads.kv_bytes

    @property
    def window_bytes(self) -> int:
        """Memory for prefetched pieces."""
        return self.slots * self.slot_bytes

"""What is known of a model before its budget is divided. Shared by loading, `flexinfer plan`, `ls`
and the server.

The way: index the checkpoint, build the model empty (flexinfer.model.skeleton), see what can draft,
measure the process. Reads headers, never weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from flexinfer.cache_dir import user_path
from flexinfer.draft.drafts import Drafts
from flexinfer.formats.tensors import Checkpoint
from flexinfer.formats.tokenizer import PreparedTokenizer, TokenizerMemory, prepare_tokenizer
from flexinfer.kernels.dense import bound_kernel_caches
from flexinfer.memory.heap import give_back, return_freed_memory
from flexinfer.memory.libraries import LibraryPages
from flexinfer.memory.process import anonymous_bytes, available_bytes, file_bytes
from flexinfer.model.match import NotStreamableError
from flexinfer.model.rehearsal import rehearse_once
from flexinfer.model.skeleton import Skeleton, build_skeleton
from flexinfer.model.whole import whole_skeleton
from flexinfer.observe.trace import Progress
from flexinfer.options import Options
from flexinfer.plan.plan import Costs, Overheads
from flexinfer.plan.planner import NOT_MEASURED, Planner
from flexinfer.sizes import BudgetError, parse_size
from flexinfer.streaming.checksums import Checksums, checksums_of
from flexinfer.streaming.kv_cache import reserved_bytes

# Threads' stacks, the allocator, what a first pass imports.
MARGIN_BYTES = 16 << 20
# A parameter of so much that cannot be streamed is named by a refusal.
LARGE_PARAMETER_BYTES = 16 << 20
SMALLEST_DEFAULT_CONTEXT, LARGEST_DEFAULT_CONTEXT = 128, 2048


@dataclass(frozen=True, slots=True)
class ContextOf:
    """The context that a prompt needs, which only its tokenizer can tell."""

    # Bounds, before the tokenizer is loaded.
    least: int
    most: int
    exact: Callable[[PreTrainedTokenizerBase], int]


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """What a process holds that has loaded no weight yet, in bytes."""

    anonymous_bytes: int
    # Pages of libraries that a pass touches; the others can be read again from disk.
    libraries: LibraryPages
    file_bytes: int
    # What the tokenizer beside the weights will take, if it is not loaded yet.
    tokenizer: TokenizerMemory = field(default_factory=TokenizerMemory)
    margin_bytes: int = MARGIN_BYTES

    @classmethod
    def measure(cls, skeleton: Skeleton, *, in_blocks: bool = False) -> "ProcessMemory":
        """Measured after what every run does once has been done, on a model of a few kilobytes.

        in_blocks: whether ggml's kernels are used, even if no weight of `skeleton` lies in its
        blocks.
        """
        libraries = rehearse_once(
            skeleton.dtype,
            skeleton.attention,
            dense=skeleton.dense,
            in_blocks=skeleton.in_blocks or in_blocks,
        )
        # The dry run's model.
        give_back()
        return cls(anonymous_bytes(), libraries, libraries.nbytes or file_bytes())

    def with_loaded_tokenizer(self, taken_bytes: int) -> "ProcessMemory":
        """The same process with its tokenizer, which took `taken_bytes`.

        The sum stays what it was, so that a budget that was accepted still is: what was taken
        beyond the plan is part of the margin.
        """
        planned_bytes = self.tokenizer.stays_bytes + self.tokenizer.use_bytes
        return replace(
            self,
            anonymous_bytes=self.anonymous_bytes + taken_bytes,
            tokenizer=TokenizerMemory(use_bytes=max(0, planned_bytes - taken_bytes)),
            margin_bytes=max(0, self.margin_bytes - max(0, taken_bytes - planned_bytes)),
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model whose weights are still on disk, and all that its plan depends on."""

    skeleton: Skeleton
    options: Options
    budget_bytes: int
    process: ProcessMemory
    context: int
    # Positions of a pass that there is room for the logits of, with candidates of a draft or
    # without.
    logits_to_keep: int
    undrafted_logits: int
    drafts: Drafts | None
    # The one beside the weights; None where the program has loaded its own.
    tokenizer: PreparedTokenizer | None
    checksums: Mapping[Path, Checksums] | None
    # Why the model has to be in memory whole; empty where it can be streamed.
    not_streamable: str = ""

    def overheads(
        self, *, drafted: bool = True, context: int | None = None, logits_to_keep: int | None = None
    ) -> Overheads:
        """What the process takes besides the weights of linears: with the draft or without, for
        this context or another.
        """
        kept = self.logits_to_keep if drafted else self.undrafted_logits
        return overheads_of(
            self.skeleton,
            self.process,
            context or self.context,
            logits_to_keep or kept,
            self.drafts if drafted else None,
        )

    def planner(self, costs: Costs = NOT_MEASURED) -> Planner:
        """Plans for any budget. With draft="auto" as for no draft, until one is chosen."""
        drafts, skeleton = self.drafts, self.skeleton
        chosen = drafts is not None and not drafts.auto
        return Planner(
            skeleton.weights,
            self.overheads(drafted=chosen),
            costs,
            policy=self.options.policy,
            window=self.options.window,
            mixture=skeleton.mixture,
            substitutes=drafts.substitutes if chosen and drafts is not None else None,
            not_streamable=self.not_streamable or _large_parameters(skeleton),
        )

    def fits(self, context: int) -> bool:
        """Whether the budget is enough for `context` tokens."""
        planner = replace(self, context=context).planner()
        return planner.smallest_bytes <= self.budget_bytes

    def drafted_planners(self, planner: Planner) -> tuple[Planner, Planner]:
        """`planner` with the overheads of a draft, and without."""
        undrafted = replace(planner, overheads=self.overheads(drafted=False), substitutes=None)
        return replace(planner, overheads=self.overheads()), undrafted


def prepare(
    checkpoint: Checkpoint,
    options: Options,
    *,
    context_of: ContextOf | None = None,
    process: ProcessMemory | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Build the empty model of `checkpoint`, and measure this process.

    Args:
        checkpoint: the model.
        options: what `from_pretrained` was given.
        context_of: the context, where the options leave it to a prompt.
        process: what this process held before its first model, where this is another; measured if
            left out.
        progress: called while checksums are made.

    Raises:
        CheckpointError: not a model, or one that cannot be run.
        DraftError: the draft cannot be made for this model.
        BudgetError: it cannot be streamed, and the budget does not hold it whole.
    """
    # Before the dry run: what it frees would stay in the heap.
    return_freed_memory()
    bound_kernel_caches()
    budget_bytes = available_bytes() if options.memory == "auto" else parse_size(options.memory)
    not_streamable = ""
    try:
        skeleton = build_skeleton(checkpoint, options.dtype, options.kv_dtype)
    except NotStreamableError as error:
        skeleton, not_streamable = whole_skeleton(checkpoint, options.dtype), str(error)
    checksums = _checksums(skeleton, options.verify, progress)
    drafts, logits_to_keep = None, options.logits_to_keep
    if options.draft_choice is not None:
        drafts = Drafts(options.draft_choice, skeleton, skeleton.dtype)
        logits_to_keep = max(logits_to_keep, drafts.fit(budget_bytes) + 1)
    tokenizer = prepare_tokenizer(checkpoint.config_dir) if options.tokenizer is None else None
    if process is None:
        process = ProcessMemory.measure(
            skeleton, in_blocks=drafts is not None and bool(drafts.kernels)
        )
    if tokenizer is not None:
        process = replace(process, tokenizer=tokenizer.memory)
    context = options.context or (context_of.least if context_of is not None else None)
    context = context or default_context(skeleton, process, budget_bytes, logits_to_keep, drafts)
    prepared = Prepared(
        skeleton=skeleton,
        options=options,
        budget_bytes=budget_bytes,
        process=process,
        context=context,
        logits_to_keep=logits_to_keep,
        undrafted_logits=options.logits_to_keep,
        drafts=drafts,
        tokenizer=tokenizer,
        checksums=checksums,
        not_streamable=not_streamable,
    )
    longest = context if options.context or context_of is None else context_of.most
    if drafts is not None and not drafts.auto:
        # Fewer candidates where the budget has no room for more: it is never refused for them.
        while not prepared.fits(longest) and drafts.fit_fewer():
            kept = max(options.logits_to_keep, drafts.most + 1)
            prepared = replace(prepared, logits_to_keep=kept)
    return prepared


def load_tokenizer(
    prepared: Prepared, context_of: ContextOf | None
) -> tuple[Prepared, PreTrainedTokenizerBase | None]:
    """Load the tokenizer beside the weights, before anything else takes memory, and take the
    context that it tells.

    Raises BudgetError before it is loaded, where the budget is too small.
    """
    tokenizer, options = prepared.options.tokenizer, prepared.options
    context_of = context_of if options.context is None else None
    try:
        prepared.planner().plan(prepared.budget_bytes)
    except BudgetError:
        if context_of is not None:
            # What is named has to be enough for the prompt.
            replace(prepared, context=context_of.most).planner().plan(prepared.budget_bytes)
        raise
    if prepared.tokenizer is not None and prepared.tokenizer.problem is None:
        before_bytes = anonymous_bytes()
        tokenizer = prepared.tokenizer.load()
        process = prepared.process.with_loaded_tokenizer(anonymous_bytes() - before_bytes)
        prepared = replace(prepared, process=process)
    if context_of is not None and tokenizer is not None:
        prepared = replace(prepared, context=context_of.exact(tokenizer))
    return prepared, tokenizer


def overheads_of(
    skeleton: Skeleton,
    process: ProcessMemory,
    context: int,
    logits_to_keep: int = 1,
    drafts: Drafts | None = None,
) -> Overheads:
    """What the process takes besides the weights of linears, with `context` tokens in the cache and
    in one pass.
    """
    state = skeleton.model.state_dict()
    kv_bytes, attention_bytes = reserved_bytes(
        skeleton.cache.layers, context, skeleton.kv_dtype, skeleton.dtype
    )
    activation_bytes = skeleton.meter.planned_bytes(context, logits_to_keep)
    return Overheads(
        process_bytes=process.anonymous_bytes + process.file_bytes,
        tokenizer_bytes=process.tokenizer.stays_bytes + process.tokenizer.use_bytes,
        loading_bytes=process.tokenizer.peak_bytes,
        unstreamed_bytes=skeleton.whole_bytes
        + sum(state[name].numel() * state[name].dtype.itemsize for name in skeleton.unstreamed),
        kv_bytes=kv_bytes,
        activation_bytes=activation_bytes,
        margin_bytes=process.margin_bytes,
        context_tokens=context,
        draft_bytes=drafts.bytes_beside(context) if drafts is not None else 0,
        attention_bytes=attention_bytes,
    )


def default_context(
    skeleton: Skeleton,
    process: ProcessMemory,
    budget_bytes: int,
    logits_to_keep: int = 1,
    drafts: Drafts | None = None,
) -> int:
    """Tokens a model is loaded for where no context is given.

    2048, or the model's own limit if that is less; halved, down to 128, while the KV cache and
    activations would take more than a quarter of the budget, or the rest not fit beside them.
    """
    context = min(LARGEST_DEFAULT_CONTEXT, context_limit(skeleton.config))
    substitutes = drafts.substitutes if drafts is not None and not drafts.auto else None
    while context >= 2 * SMALLEST_DEFAULT_CONTEXT:
        overheads = overheads_of(skeleton, process, context, logits_to_keep, drafts)
        planner = Planner(
            skeleton.weights, overheads, mixture=skeleton.mixture, substitutes=substitutes
        )
        fits = planner.smallest_bytes <= budget_bytes
        if fits and overheads.kv_bytes + overheads.activation_bytes <= budget_bytes // 4:
            break
        context //= 2
    return context


def context_limit(config: PretrainedConfig) -> int:
    """The tokens that a model is made for, by its config; 2048 where that does not say."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else LARGEST_DEFAULT_CONTEXT


def _large_parameters(skeleton: Skeleton) -> str:
    """Large parameters that are not streamed, and why."""
    large = [
        spec.name for spec in skeleton.unstreamed.values() if spec.nbytes > LARGE_PARAMETER_BYTES
    ]
    if not large:
        return ""
    return (
        f"{large[0]} and {len(large) - 1} more are not weights of linears or of experts that can "
        "be told apart, cannot be streamed yet and have to stay in memory"
    )


def _checksums(
    skeleton: Skeleton, verify: bool | str | Path, progress: Progress | None
) -> Mapping[Path, Checksums] | None:
    if verify is False:
        return None
    if not skeleton.weights:
        raise ValueError(
            "verify=True: this model is loaded whole by transformers, which does not check what "
            "it reads"
        )
    return checksums_of(
        skeleton.checkpoint.files, None if verify is True else user_path(verify), progress
    )

"""`from_pretrained`: a stock transformers model whose weights come from disk as they are needed.

The way: prepare (flexinfer.engine.prepare), measure what reading and computing cost, divide the
budget (flexinfer.plan), make the store (flexinfer.streaming.store), and put streamed modules where
the linears are (flexinfer.engine.install). Everything else of the model, and `generate()` with all
that is built on it, stays transformers' own. Parameters that are no weight of a linear or an expert
are not streamed: they stay in memory, or the budget is refused and they are named.
"""

import logging
import warnings
import weakref
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexinfer.draft.costs import measure_draft_costs
from flexinfer.draft.drafter import Drafter, choose_draft, substitute_source
from flexinfer.engine.engine import Engine
from flexinfer.engine.install import install
from flexinfer.engine.prepare import MARGIN_BYTES, ContextOf, Prepared, load_tokenizer, prepare
from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.formats.hub import resolve
from flexinfer.memory.process import reset_peak
from flexinfer.model.experts import Experts
from flexinfer.model.whole import load_whole
from flexinfer.observe.notebook import TqdmBars
from flexinfer.observe.report import plan_line
from flexinfer.observe.trace import MAX_EVENTS, Trace
from flexinfer.options import Options
from flexinfer.plan.planner import Planner
from flexinfer.streaming.costs import measure_costs
from flexinfer.streaming.expert_cache import ExpertCache
from flexinfer.streaming.kv_cache import KVReserve
from flexinfer.streaming.reader import FileReader
from flexinfer.streaming.store import SubstituteSource, WeightStore

logger = logging.getLogger("flexinfer")


def from_pretrained(
    path_or_hub_id: str | Path, memory: str | int = "auto", **options: Any
) -> PreTrainedModel:
    """Load a causal LM that streams its weights from disk inside a memory budget.

    Args:
        path_or_hub_id: a checkpoint directory (safetensors), a GGUF file or a directory with one,
            or a Hugging Face Hub id, taken from the local cache when it is there.
        memory: budget of the whole process, "4GiB" or bytes; "auto" takes what the machine or its
            cgroup has to spare.
        options: the other fields of `flexinfer.Options`, by name, which say what they mean.

    Returns:
        The transformers model, with its `Engine` as `model.flexinfer`.

    Raises:
        CheckpointError: not a checkpoint, or a damaged one.
        DraftError: the draft cannot be made of, or for, this model.
        BudgetError: `memory` or `window` is no size, or too small for this model; names the
            smallest that works.
        ValueError: another argument is wrong.
        TypeError: there is no option of that name.
    """
    return load(path_or_hub_id, Options.of({"memory": memory} | options))


# For help() and notebooks.
from_pretrained.__signature__ = Options.signature_of(from_pretrained)  # type: ignore[attr-defined]


def load(
    path_or_hub_id: str | Path, options: Options, context_of: ContextOf | None = None
) -> PreTrainedModel:
    """`from_pretrained`, with options that are made already, and with the context of a prompt where
    none is given.
    """
    progress = TqdmBars() if options.progress is True else options.progress or None
    # Before the process is measured: its memory is part of it.
    trace = Trace(max_events=MAX_EVENTS if options.trace else 0, progress=progress)
    checkpoint = open_checkpoint(resolve(path_or_hub_id, options.gguf_file))
    prepared = prepare(checkpoint, options, context_of=context_of, progress=progress)
    prepared, tokenizer = load_tokenizer(prepared, context_of)
    with ExitStack() as undo:
        model = _load(prepared, tokenizer, trace, undo)
        undo.pop_all()
    engine = model.flexinfer
    assert isinstance(engine, Engine)
    weakref.finalize(model, engine.close_when_collected)
    if options.follow:
        engine.follow()
    return model


def _load(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase | None, trace: Trace, undo: ExitStack
) -> PreTrainedModel:
    """Plan, read the parameters that stay, and put the streamed modules in place.

    BudgetError comes before anything is read.
    """
    skeleton, options, budget_bytes = prepared.skeleton, prepared.options, prepared.budget_bytes
    planner = prepared.planner()
    planner.plan(budget_bytes)
    if prepared.not_streamable:
        warnings.warn(
            f"{prepared.not_streamable}; it is kept in memory whole", RuntimeWarning, stacklevel=4
        )
        skeleton.model = load_whole(skeleton)
    libraries = prepared.process.libraries
    libraries.lock()
    undo.callback(libraries.unlock)
    reset_peak()
    reader = FileReader(
        skeleton.checkpoint.files,
        direct=options.direct,
        timeout_s=options.experiment.read_timeout_s,
        checksums=prepared.checksums,
    )
    undo.callback(reader.close)
    room_bytes = budget_bytes - planner.overheads.process_bytes - MARGIN_BYTES // 2
    threads = max(1, options.io_threads)
    costs = measure_costs(skeleton.used, reader, threads, room_bytes)
    planner, drafter = _choose_draft(prepared, replace(planner, costs=costs), trace, room_bytes)
    plan = planner.plan(budget_bytes)
    store = WeightStore(
        skeleton.weights,
        skeleton.kernels,
        plan,
        reader,
        KVReserve(skeleton.cache.layers, prepared.context, skeleton.kv_dtype, skeleton.dtype),
        libraries,
        trace,
        cache=_expert_cache(skeleton.experts, options.experiment.expert_policy, trace),
        substitutes=_substitutes(prepared, planner, reader, trace),
        io_threads=options.io_threads,
        read_ahead=options.experiment.read_ahead,
    )
    undo.callback(store.close)
    drafting = drafter is not None and drafter.drafts.kind is not None
    logits_to_keep = prepared.logits_to_keep if drafting else prepared.undrafted_logits
    kept_rows = 2 * logits_to_keep if planner.substitutes is not None else 0
    experts = install(
        skeleton, store, trace, look_ahead=options.experiment.look_ahead, kept_rows=kept_rows
    )
    if drafter is not None and drafter.drafts.kind == "model":
        drafter.drafts.load()
    engine = Engine(prepared, tokenizer, planner, store, trace, experts, drafter, logits_to_keep)
    logger.info("%s", plan_line(plan))
    return engine.attach_to(skeleton.model)


def _choose_draft(
    prepared: Prepared, planner: Planner, trace: Trace, room_bytes: int
) -> tuple[Planner, Drafter | None]:
    """The planner with the draft that is used, if there is one."""
    drafts, skeleton = prepared.drafts, prepared.skeleton
    if drafts is None:
        return planner, None

    def measure() -> Any:
        return measure_draft_costs(skeleton.used, drafts.kernels, drafts.model_share, room_bytes)

    planner, costs = choose_draft(
        drafts, *prepared.drafted_planners(planner), prepared.budget_bytes, measure
    )
    drafter = Drafter(drafts, costs, trace)
    return replace(planner, draft=drafter.planned), drafter


def _substitutes(
    prepared: Prepared, planner: Planner, reader: FileReader, trace: Trace
) -> SubstituteSource | None:
    if prepared.drafts is None or planner.substitutes is None:
        return None
    direct = prepared.options.direct
    return substitute_source(
        prepared.drafts, prepared.skeleton, planner, reader, trace, direct=direct
    )


def _expert_cache(experts: Experts | None, policy: str, trace: Trace) -> ExpertCache | None:
    if experts is None:
        return None
    pieces, slot_bytes = list(experts.mixture.pieces()), experts.mixture.slots().slot_bytes
    used = sum(layer.used for layer in experts.mixture.layers)
    return ExpertCache(pieces, slot_bytes, policy, trace, token_experts=used)

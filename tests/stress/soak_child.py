"""The two processes of a case: the reference, and the streamed model in a group of exactly its
budget.
"""

import gc
import os
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.stress.soak_calls import CALLS, prepare
from tests.stress.soak_cases import Call, Case

if TYPE_CHECKING:
    from flexinfer.plan.plan import PassShape

RESIDENT_MEMORY = "12GiB"  # holds any case whole


def reference(case: Case, path: Path) -> dict[str, Any]:
    """What stock transformers says to the calls, and the smallest budget that flexinfer names."""
    import torch
    from transformers import AutoModelForCausalLM

    import flexinfer

    prepare(case)
    smallest = total = 0
    try:
        flexinfer.from_pretrained(path, 1 << 20, **load_options(case), draft=case.draft)
    except flexinfer.BudgetError as error:
        smallest = needed_bytes(error)
    gc.collect()
    if case.blocks is None:
        dtype = getattr(torch, case.file_dtype if case.dtype == "auto" else case.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, experts_implementation="eager"
        ).eval()
        total = sum(p.numel() * p.element_size() for p in model.parameters())
    else:
        resident = load_options(case) | {"policy": "balanced", "context": 4 * case.context}
        model = flexinfer.from_pretrained(path, RESIDENT_MEMORY, **resident)  # without a draft
        plan = model.flexinfer.plan
        total = plan.total_bytes + (
            plan.experts.total_bytes - plan.experts.token_bytes if plan.experts else 0
        )
        assert not plan.streamed_bytes
    return {
        "smallest_bytes": smallest,
        "weights_bytes": total,
        "outputs": [CALLS[call.kind](model, call, case) for call in case.calls],
    }


def needed_bytes(error: Exception) -> int:
    """The smallest budget that a refusal names."""
    return int(str(error).split("at least ")[1].split()[0])


def load_options(case: Case) -> dict[str, Any]:
    """Keyword arguments of from_pretrained."""
    return {
        "policy": case.policy,
        "window": case.window,
        "io_threads": case.io_threads,
        "direct": case.direct,
        "context": case.context,
        "logits_to_keep": case.logits_to_keep,
        "dtype": case.dtype,
    }


def child(case: Case, path: Path, memory: int) -> dict[str, Any]:
    """The calls on a streamed model, in this process, and what they left behind."""
    import torch

    import flexinfer
    from flexinfer.memory.process import anonymous_bytes, peak_bytes

    torch.ones(8) @ torch.ones(8)
    prepare(case)
    holdings_before = _holdings()
    try:
        model: Any = flexinfer.from_pretrained(path, memory, **load_options(case), draft=case.draft)
    except flexinfer.BudgetError as error:
        return {"needed_bytes": needed_bytes(error)}
    outputs: list[Any] = []
    refusals: list[str | None] = []
    resting: list[int] = []
    explained = 0
    for call in case.calls:
        output, refusal = _ask(model, call, case)
        outputs.append(output)
        refusals.append(refusal)
        shape = shape_of(call, case)
        # By the plan as it is now: the first pass has made it anew.
        if refusal is None and shape is not None:
            explained = max(explained, model.flexinfer.runner.planned_bytes(shape))
        gc.collect()
        resting.append(anonymous_bytes())
    stats, plan = model.flexinfer.stats(), model.flexinfer.plan
    peak = peak_bytes()
    model.flexinfer.close()
    del model
    gc.collect()
    names = ("budget_bytes", "locked_bytes", "streamed_bytes", "window_bytes", "unused_bytes")
    return {
        "outputs": outputs,
        "refusals": refusals,
        "resting_bytes": resting,
        "explained_bytes": explained,
        "peak_bytes": stats["peak_bytes"],
        "vm_hwm_bytes": peak,
        "bytes_read": stats["bytes_read"],
        "plan": {name: getattr(plan, name) for name in names} | {"fixed": asdict(plan.overheads)},
        "left": [
            after - before for before, after in zip(holdings_before, _holdings(), strict=True)
        ],
    }


def _ask(model: Any, call: Call, case: Case) -> tuple[Any, str | None]:
    """What a call came to, and why it was refused.

    Raises RuntimeError where it was refused after it ran.
    """
    from flexinfer import BudgetError
    from flexinfer.streaming.kv_cache import ContextError

    passes = model.flexinfer.stats()["passes"]
    try:
        return CALLS[call.kind](model, call, case), None
    except (BudgetError, ContextError) as error:
        if model.flexinfer.stats()["passes"] != passes and call.kind.startswith("score"):
            raise RuntimeError(f"refused after it ran: {error}") from error
        return None, str(error)[:300]


def shape_of(call: Call, case: Case) -> "PassShape | None":
    """The largest pass of a call: its prompt."""
    from flexinfer.plan.plan import PassShape

    if call.kind in ("tokenize", "resize"):
        return None
    return PassShape(
        batch=call.batch,
        new_tokens=call.prompt_tokens,
        kept=0 if call.kind.startswith("score") else 1,
        cached=True,
    )


def _holdings() -> tuple[int, int, int]:
    """Threads, open files and locked bytes."""
    status = Path("/proc/self/status").read_text()
    locked = int(status.split("VmLck:")[1].split()[0]) << 10
    return threading.active_count(), len(os.listdir("/proc/self/fd")), locked

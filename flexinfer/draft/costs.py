"""What drafting costs on this machine, measured when a model is loaded."""

from collections.abc import Mapping, Sequence

from flexinfer.draft.economics import DraftCosts
from flexinfer.kernels import Kernel
from flexinfer.plan.weights import Weight
from flexinfer.streaming.costs import CACHE_BYTES, kernel_s, measure_rows, zeros

# Of passes that are timed: candidates and one.
DRAFT_ROWS = (1, 2, 5, 9, 17)


def measure_draft_costs(
    used: Sequence[tuple[Weight, Kernel]],
    substitutes: Mapping[str, Kernel],
    model_share: float,
    memory_bytes: int = CACHE_BYTES,
) -> DraftCosts:
    """What passes of several rows take, and a draft pass: by `substitutes` of the weights, or a
    model with `model_share` of them.

    As `measure_costs`: from one piece of each role, in at most `memory_bytes` or two pieces.
    """
    rows_s = measure_rows(used, DRAFT_ROWS, memory_bytes)
    # `seconds` are those of a byte, by role.
    draft_s, seconds = 0.0, dict[str, float]()
    if substitutes:
        buffer = zeros(used, memory_bytes)
        for weight, _ in used:
            piece, rows = weight.pieces[0], weight.pieces[0].row_stop - weight.pieces[0].row_start
            if weight.role not in seconds:
                substitute = substitutes[weight.name]
                nbytes = substitute.view(buffer, 0, rows).nbytes
                seconds[weight.role] = kernel_s(substitute, rows, nbytes, buffer) / piece.nbytes
            draft_s += weight.nbytes * seconds[weight.role]
    alone_s = rows_s[0][1]
    return DraftCosts(rows_s, draft_s or model_share * alone_s, alone_s)

"""FlexInfer: run language models that do not fit in memory, inside a memory budget, with the output unchanged.

    model = flexinfer.from_pretrained("path-or-hub-id", memory="4GiB")
    model.generate(**inputs, max_new_tokens=64)

After Du et al., "FlexInfer: Breaking Memory Constraint via Flexible and Efficient Offloading for On-Device LLM
Inference", EuroMLSys '25 (arXiv 2503.03777).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexinfer.formats.tensors import CheckpointError
    from flexinfer.model.engine import from_pretrained
    from flexinfer.options import Options
    from flexinfer.plan.budget import Plan
    from flexinfer.sizes import BudgetError

__version__ = "0.2.0"

__all__ = ["BudgetError", "CheckpointError", "Options", "Plan", "from_pretrained"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torch and transformers take seconds, `flexinfer --help` should not."""
    home = {
        "CheckpointError": "formats.checkpoint",
        "from_pretrained": "model",
        "Options": "options",
        "BudgetError": "plan",
        "Plan": "plan",
    }
    if name not in home:
        raise AttributeError(f"module 'flexinfer' has no attribute {name!r}")
    return getattr(import_module(f"flexinfer.{home[name]}"), name)

"""FlexInfer: run language models that do not fit in memory, inside a memory budget, with the output
unchanged.

    model = flexinfer.from_pretrained("path-or-hub-id", memory="4GiB")
    model.generate(**inputs, max_new_tokens=64)

After Du et al., "FlexInfer: Breaking Memory Constraint via Flexible and Efficient Offloading for
On-Device LLM Inference", EuroMLSys '25 (arXiv 2503.03777).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexinfer.engine.load import from_pretrained
    from flexinfer.formats.tensors import CheckpointError
    from flexinfer.options import Experiment, Options
    from flexinfer.plan.plan import Plan
    from flexinfer.sizes import BudgetError

__version__ = "0.2.0"

__all__ = ["BudgetError", "CheckpointError", "Experiment", "Options", "Plan", "from_pretrained"]

MODULES = {
    "BudgetError": "sizes",
    "CheckpointError": "formats.tensors",
    "Experiment": "options",
    "Options": "options",
    "Plan": "plan.plan",
    "from_pretrained": "engine.load",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: torch and transformers take seconds, `flexinfer --help`
    should not.
    """
    if name not in MODULES:
        raise AttributeError(f"module 'flexinfer' has no attribute {name!r}")
    return getattr(import_module(f"flexinfer.{MODULES[name]}"), name)

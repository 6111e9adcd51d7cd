"""How the rows of a weight are seen in memory and multiplied, a module for each encoding.

Nothing here knows files or budgets.
"""

from typing import TYPE_CHECKING, Any, Protocol

# The command line and the process that makes a tokenizer do without torch.
if TYPE_CHECKING:
    import torch

    from flexinfer.memory.buffer import Buffer


class Kernel(Protocol):
    """How the rows of one kind of weight are seen in memory and multiplied."""

    @property
    def in_features(self) -> int: ...

    @property
    def dtype(self) -> "torch.dtype":
        """Compute dtype."""
        ...

    @property
    def locked(self) -> "Kernel":
        """The kernel of locked rows: this one, or that of the dtype they are converted to once."""
        ...

    def locked_bytes(self, nbytes: int) -> int:
        """Memory that `nbytes` of a file take when they are locked."""
        ...

    def copied_bytes(self, nbytes: int) -> int:
        """Memory that `multiply` may take for copies of `nbytes` of a file."""
        ...

    def work_bytes(self, activation_rows: int, output_rows: int) -> int:
        """Memory that `multiply` works in, besides input, output and copies of the weight."""
        ...

    def view(self, buffer: "Buffer", position: int, rows: int) -> Any:
        """`rows` output rows whose bytes begin at `position` of `buffer`, with what lies beside
        them behind; no copy. Some of its rows are `view[a:b]`.
        """
        ...

    def multiply(
        self, x: "torch.Tensor", view: Any, rows: int, bias: "torch.Tensor | None"
    ) -> "torch.Tensor":
        """x [..., in_features] times the rows in `view`, plus `bias` [rows]: [..., rows]."""
        ...

    def matrix(self, view: Any) -> "torch.Tensor":
        """The rows in `view` as floats [rows, in_features], for gradients; a copy where they are
        stored in another way.
        """
        ...

"""What stands for a weight that is on disk: a parameter with its shape, dtype and device, and no
numbers.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn


class StreamedWeight(torch.Tensor):
    """Stands for a weight that is on disk: has its shape, dtype and device, and raises where its
    numbers are asked for.
    """

    streamed_name: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__self__.__name__ if func.__name__ in {"__get__", "__set__"} else func.__name__
        with torch._C.DisableTorchFunctionSubclass():
            if name == "requires_grad_" or (name == "requires_grad" and func.__name__ == "__set__"):
                if all((*args[1:], *kwargs.values())):
                    raise RuntimeError(
                        f"{args[0].streamed_name} is streamed from disk and cannot be trained; "
                        "gradients go through it to its input. Name the parameters that are to "
                        "have gradients, instead of taking all"
                    )
                return func(*args, **kwargs)
            if name in FACTS_OF_A_WEIGHT and func.__name__ != "__set__":
                return func(*args, **kwargs)
            # A conversion to the present device and dtype does nothing.
            if name in CONVERSIONS:
                asked = getattr(torch.empty(0, dtype=args[0].dtype), name)(*args[1:], **kwargs)
                if (asked.dtype, asked.device) == (args[0].dtype, args[0].device):
                    return args[0]
            # As a state dict has it.
            if name == "detach":
                return args[0]
            if name == "_has_compatible_shallow_copy_type":
                return True
            if name == "data" and func.__name__ == "__set__" and args[0] is args[1]:
                return None
        weight = next((a for a in (*args, *kwargs.values()) if isinstance(a, StreamedWeight)), None)
        raise RuntimeError(
            f"{weight.streamed_name if weight is not None else 'this weight'} is streamed from "
            f"disk, {name}() has no numbers to work with; the checkpoint on disk is unchanged: "
            "copy that, read the tensor from it with safetensors, or load the model with "
            "transformers"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StreamedWeight({self.streamed_name}, {tuple(self.shape)}, {self.dtype})"


CONVERSIONS = frozenset({"to", "cpu", "float", "half", "bfloat16", "double"})

FACTS_OF_A_WEIGHT = frozenset(
    {"shape", "dtype", "device", "layout", "ndim", "grad", "is_leaf", "requires_grad", "is_meta"}
    | {"is_sparse", "names", "is_cuda", "is_cpu", "is_quantized", "is_nested", "size", "dim"}
    | {"numel", "nelement", "element_size", "itemsize", "nbytes", "is_floating_point"}
    | {"is_complex", "is_contiguous", "stride", "__hash__", "__len__", "grad_fn"}
    | {"_backward_hooks"}
)


def streamed_weight(name: str, shape: Sequence[int], dtype: torch.dtype) -> nn.Parameter:
    """A parameter for a weight that is not there; takes the memory of one number."""
    stored = torch.zeros((), dtype=dtype).expand(*shape)
    weight = torch.Tensor._make_subclass(StreamedWeight, stored, False)
    weight.streamed_name = name
    # isinstance(weight, nn.Parameter), and so one of the model's parameters.
    weight._is_param = True
    return cast(nn.Parameter, weight)

"""Memory that the results of operations use again within a pass.

A tensor of a long prompt is large, and glibc maps a large block anew each time: its pages are
zeroed and faulted in one by one, for a result that lives for an operation or two (docs/log.md).
glibc's heap would keep the pages, and several times what is in use.

Within `ReusedResults` operations with an `out=` form write into memory left by an earlier result.
They are torch's own, in their own layout, so the bits are the same. What is in use and what is kept
for the next are together within a limit, and at the end nothing is kept.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexinfer.memory.buffer import Buffer, round_up

# Smallest result that is worth the trouble.
SMALLEST_BYTES = 512 << 10

aten = torch.ops.aten

EMPTY = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
}

COPIES = {aten.clone.default, aten._to_copy.default}

INTO_MEMORY: dict[Any, Callable[..., torch.Tensor]] = {
    aten.add.Tensor: aten.add.out,
    aten.sub.Tensor: aten.sub.out,
    aten.mul.Tensor: aten.mul.out,
    aten.div.Tensor: aten.div.out,
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Scalar_out,
    aten.neg.default: aten.neg.out,
    aten.tanh.default: aten.tanh.out,
    aten.silu.default: aten.silu.out,
    aten.gelu.default: aten.gelu.out,
    aten.cat.default: aten.cat.out,
    aten.gather.default: aten.gather.out,
    aten.mm.default: aten.mm.out,
    aten.addmm.default: aten.addmm.out,
}

TAKES_MEMORY = EMPTY | COPIES | INTO_MEMORY.keys()


class ReusedResults(TorchDispatchMode):
    """A context: large results of this thread's operations take memory that others of the same size
    had. Nothing is kept that would not be within `limit_bytes` with what is in use.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: not wrapped in a way that would import the compiler, which is not used here."""
        return False

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self._limit_bytes = limit_bytes
        # By size in bytes, the last used at the end.
        self._kept: dict[int, list[Buffer]] = {}
        # By storage; says when it is gone.
        self._in_use: dict[int, weakref.ref[Any]] = {}
        self._entered = False
        self.kept_bytes = self.in_use_bytes = 0
        # Memory newly taken since the beginning.
        self.taken_bytes = 0

    def __enter__(self) -> "ReusedResults":
        self._entered = True
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._entered = False
        self._kept.clear()
        self.kept_bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in TAKES_MEMORY and str(kwargs.get("device") or "cpu") == "cpu":
            like = _without_numbers(func, args, kwargs)
            if like.nbytes >= SMALLEST_BYTES:
                memory = self._take(like)
                if func in EMPTY:
                    return memory
                return (
                    memory.copy_(args[0])
                    if func in COPIES
                    else INTO_MEMORY[func](*args, **kwargs, out=memory)
                )
        elif not (func.is_view or func._schema.is_mutable) and (
            large := list(filter(_is_large, args))
        ):
            self._make_room(max(arg.nbytes for arg in large))
            result = func(*args, **kwargs)
            for one in filter(_is_large, result if isinstance(result, tuple | list) else (result,)):
                self._count(one.untyped_storage())
            return result
        return func(*args, **kwargs)

    def _take(self, like: torch.Tensor) -> torch.Tensor:
        """Memory for a result with this layout and dtype."""
        nbytes = round_up(like.untyped_storage().nbytes())
        kept = self._kept.pop(nbytes, [])
        if kept:
            buffer = kept.pop()
            self._kept[nbytes] = kept
            self.kept_bytes -= nbytes
        else:
            self._make_room(nbytes)
            buffer = Buffer(nbytes, lock=False)
            self.taken_bytes += nbytes
        # A view for this result alone, which goes when the result does.
        view = buffer.memory(0, nbytes)
        flat = torch.frombuffer(view, dtype=like.dtype, count=nbytes // like.itemsize)
        self._note(view, flat.untyped_storage(), nbytes, buffer)
        return flat.as_strided(like.size(), like.stride())

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Of an operation that took its memory elsewhere."""
        if storage._cdata not in self._in_use:
            self._note(storage, storage, storage.nbytes())

    def _note(
        self, owner: Any, storage: torch.UntypedStorage, nbytes: int, buffer: Buffer | None = None
    ) -> None:
        """Count memory that is in use until `owner` is gone."""
        key = storage._cdata

        def gone(_: Any) -> None:
            del self._in_use[key]
            self.in_use_bytes -= nbytes
            fits = self.in_use_bytes + self.kept_bytes + nbytes <= self._limit_bytes
            if buffer is not None and self._entered and fits:
                self._kept.setdefault(nbytes, []).append(buffer)
                self.kept_bytes += nbytes

        self._in_use[key] = weakref.ref(owner, gone)
        self.in_use_bytes += nbytes

    def _make_room(self, nbytes: int) -> None:
        """Let go of memory that is kept, of the size not used for longest first, until `nbytes`
        more are within the limit.
        """
        for size in list(self._kept):
            while (
                self._kept[size]
                and self.in_use_bytes + self.kept_bytes + nbytes > self._limit_bytes
            ):
                self._kept[size].pop()
                self.kept_bytes -= size


def _without_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The result of an operation, on the meta device."""
    if func in EMPTY or "device" in kwargs:
        kwargs = kwargs | {"device": "meta"}
    result: torch.Tensor = func(*map(_shape_of, args), **kwargs)
    return result


def _shape_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return [_shape_of(one) for one in value] if isinstance(value, list | tuple) else value


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.nbytes >= SMALLEST_BYTES

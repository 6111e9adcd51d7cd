"""Modules that transformers imports and that no run on a CPU uses: their code runs when something
first asks for it.

transformers' modelling code imports parts of `torch.distributed` (with sympy), `torch._dynamo` and,
where it is installed, `scipy.optimize`: for sharded models, for compiled graphs, for the losses of
object detectors. Inside a memory budget that is a third of what a process holds before its first
weight. After `defer()` these modules get their places in `sys.modules` without being run, and what
transformers takes from them are stand-ins: a decorator that leaves a function as it is while
nothing is compiled, a class that nothing is an instance of before it exists. Anything else that
asks one of them for a name has all of them imported as usual, and the stand-ins then pass on to the
real things.

The commands and the server call it, and so may a program that wants the memory; importing the
library does not. What it costs: the first such use (`torch.compile`, a `DTensor`) waits a second or
two and takes the memory that was spared, outside the plan. No class or function of anybody is
replaced, and what is already imported stays as it is.
"""

import importlib
import importlib.machinery
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib.abc import Loader
from types import ModuleType
from typing import Any, cast

# These modules and all below them.
DEFERRED = (
    "scipy.optimize",
    "sympy",
    "torch._dynamo",
    "torch.distributed._composable",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
)
# Who gets stand-ins; everyone else gets the real thing.
IMPORTERS = re.compile(
    r"transformers\.|torch$|torch\.compiler|torch\._(compile|prims|refs|decomp|meta_registrations)"
)
# What functions on symbolic shapes say of plain numbers. Before their module has been run there are
# no others.
OF_PLAIN_NUMBERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("expect_true", "guard_bool", "guard_int", "guard_or_false"), lambda value: value
    ),
    **dict.fromkeys(
        ("guard_or_true", "guard_size_oblivious", "statically_known_true"), lambda value: value
    ),
    **dict.fromkeys(("is_nested_int", "is_symbolic", "has_free_symbols"), lambda value: False),
    "sym_and": lambda *values: all(values),
    "sym_or": lambda *values: any(values),
    "sym_eq": lambda one, other: one == other,
}


def defer() -> None:
    """From now on put off what transformers imports and a run on a CPU does not need.

    For the entry point of a program.
    """
    # torch itself is imported as usual.
    importlib.import_module("torch")
    if not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def are_deferred() -> list[str]:
    """The modules that have been put off and not been used yet."""
    return sorted(
        name for name, module in list(sys.modules.items()) if isinstance(module, _Deferred)
    )


class _Finder:
    """Finds the modules of DEFERRED where they are, and makes them without running them."""

    # Once one of them has been used, all are imported as usual.
    given_up = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if self.given_up or not _is_deferred(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = cast(Loader, _Loader(self))
        return spec


class _Loader:
    """Makes a module and does not run it."""

    def __init__(self, finder: _Finder) -> None:
        self._finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = _Deferred(spec.name)
        module.__finder__ = self._finder
        return module

    def exec_module(self, module: ModuleType) -> None: ...


class _Deferred(ModuleType):
    """A module that has not been run.

    Being asked for a name by anyone but IMPORTERS has it imported.
    """

    __finder__: _Finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
            "importlib."
        ):
            # `from ... import` asks twice, once through the import system.
            frame = frame.f_back
        importer = frame.f_globals.get("__name__", "")
        if isinstance(sys.modules.get(self.__name__), _Deferred) and IMPORTERS.match(importer):
            return _stand_in(self.__name__, name)
        return getattr(_import(self.__name__), name)


def _import(name: str) -> ModuleType:
    """The module itself: everything that was put off is imported as usual from now on."""
    for deferred in are_deferred():
        sys.modules.pop(deferred).__finder__.given_up = True
    return importlib.import_module(name)


def _is_deferred(name: str) -> bool:
    return any(f"{name}.".startswith(f"{one}.") for one in DEFERRED)


@cache
def _stand_in(module: str, name: str) -> type:
    def real() -> Any:
        return getattr(_import(module), name)

    def waits() -> bool:
        return isinstance(sys.modules.get(module), _Deferred)

    class StandIn(type):
        """Does what the real class or function does, by finding it when it is used."""

        def __instancecheck__(cls, instance: object) -> bool:
            return not waits() and isinstance(instance, real())

        def __getattr__(cls, attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            return getattr(real(), attribute)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if not waits():
                return real()(*args, **kwargs)
            if name in OF_PLAIN_NUMBERS:
                return OF_PLAIN_NUMBERS[name](*args)
            if name[0].isupper():
                return _Instance(lambda: real()(*args, **kwargs), waits)
            # Used as a decorator.
            if args and callable(args[0]):
                return _decorated_when_called(real, *args, **kwargs)
            # Used as a decorator with options.
            if not args or args[0] is None:
                return lambda function: _decorated_when_called(real, function, *args[1:], **kwargs)
            return real()(*args, **kwargs)

    return StandIn(name, (), {"__module__": module})


def _decorated_when_called(
    decorator: Callable[[], Any], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Callable[..., Any]:
    """What `decorator` makes of a function.

    They are torch._dynamo's, and say what a compiler should make of it: nothing, without one.
    """
    decorated = cache(lambda: decorator()(function, *args, **kwargs))

    def call(*a: Any, **k: Any) -> Any:
        if isinstance(sys.modules.get("torch._dynamo"), _Deferred):
            return function(*a, **k)
        return decorated()(*a, **k)

    return wraps(function)(call)


class _Instance:
    """An object of a class that has not been imported: made when something is asked of it."""

    def __init__(self, make: Callable[[], Any], waits: Callable[[], bool]) -> None:
        self._made, self._waits = cache(make), waits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made(), name)

    def _class(self) -> type:
        return type(self) if self._waits() else type(self._made())

    # isinstance() asks for it.
    __class__ = property(_class)

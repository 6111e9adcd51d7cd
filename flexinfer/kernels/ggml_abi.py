"""ggml's C interface: its structures and functions as ctypes sees them, and its threads.

The structures are laid out as in the header of ggml 0.26.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    byref,
    c_bool,
    c_char,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint,
    c_uint32,
    c_void_p,
)
from pathlib import Path
from typing import Any

import torch

from flexinfer.formats.ggml_types import GgmlError, GgmlType

PACKAGE = "transcribe_cpp_native"
# ggml's number for the type of activations and outputs.
F32 = 0
# Memory for the structures of one product; ggml 0.26 takes 1440 bytes.
CONTEXT_BYTES = 4096
# What a thread does, with the address of memory to work in; something true says that it failed.
Job = Callable[[int], object]


def open_library(folder: Path) -> tuple[ctypes.CDLL, ctypes.CDLL, Path]:
    """libggml-base.so in `folder`, the kernels that suit this CPU best, and their file.

    Raises OSError where they cannot be loaded, and GgmlError where no kernels suit this CPU.
    """
    base = ctypes.CDLL(str(folder / "libggml-base.so"))
    kernels = best_kernels(folder)
    cpu = ctypes.CDLL(str(kernels))
    signatures: tuple[tuple[Any, Any, list[Any]], ...] = (
        (base.ggml_version, c_char_p, []),
        (base.ggml_init, c_void_p, [Init]),
        (base.ggml_new_tensor_2d, c_void_p, [c_void_p, c_int, c_int64, c_int64]),
        (base.ggml_mul_mat, c_void_p, [c_void_p, c_void_p, c_void_p]),
        (base.ggml_new_graph_custom, c_void_p, [c_void_p, c_size_t, c_bool]),
        (base.ggml_build_forward_expand, None, [c_void_p, c_void_p]),
        (base.ggml_threadpool_params_init, None, [POINTER(PoolParams), c_int]),
        (base.ggml_quantize_requires_imatrix, c_bool, [c_int]),
        (base.ggml_quantize_chunk, c_size_t,
         [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
        (base.ggml_get_type_traits, POINTER(Traits), [c_int]),
        (cpu.ggml_cpu_init, None, []),
        (cpu.ggml_threadpool_new, c_void_p, [POINTER(PoolParams)]),
        (cpu.ggml_graph_plan, ComputePlan, [c_void_p, c_int, c_void_p]),
        (cpu.ggml_graph_compute, c_int, [c_void_p, POINTER(ComputePlan)]),
        (cpu.ggml_get_type_traits_cpu, POINTER(CpuTraits), [c_int]),
    )  # fmt: skip
    for function, result, arguments in signatures:
        function.restype, function.argtypes = result, arguments
    return base, cpu, kernels


def best_kernels(folder: Path) -> Path:
    """The kernels that suit this CPU best, by ggml's own score; 0 says that it cannot run them."""
    scores = {}
    for path in sorted(folder.glob("libggml-cpu*.so")):
        # None: built for one CPU.
        score = getattr(ctypes.CDLL(str(path)), "ggml_backend_score", None)
        scores[path] = 1 if score is None else score()
    best = max(scores, key=scores.__getitem__, default=None)
    if best is None or not scores[best]:
        raise GgmlError(
            f"{folder}: ggml has no kernels for this CPU; run `pip install --no-binary :all: "
            f"--force-reinstall {PACKAGE}`"
        )
    return best


class Init(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Tensor(Structure):
    _fields_ = (
        ("type", c_int),
        ("buffer", c_void_p),
        # Elements of each dimension, the innermost first.
        ("ne", c_int64 * 4),
        # Stride in bytes.
        ("nb", c_size_t * 4),
        ("op", c_int),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * 64),
        ("extra", c_void_p),
        ("padding", c_char * 8),
    )


class ComputePlan(Structure):
    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    )


class PoolParams(Structure):
    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


class Traits(Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", c_void_p),
        ("from_float_ref", c_void_p),
    )


class CpuTraits(Structure):
    _fields_ = (
        ("from_float", c_void_p),
        ("vec_dot", c_void_p),
        ("vec_dot_type", c_int),
        ("nrows", c_int64),
    )


JOB = CFUNCTYPE(None, c_void_p)
TO_FLOAT = CFUNCTYPE(None, c_void_p, c_void_p, c_int64)
FROM_FLOAT = CFUNCTYPE(None, c_void_p, c_void_p, c_int64)


class Team:
    """Runs jobs on torch's OpenMP threads, as compiled code does for `#pragma omp parallel`."""

    def __init__(self) -> None:
        torch_cpu = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
        self._waiting: Iterator[Job] = iter(())
        self._rooms: Iterator[int] = iter(())
        self._failed = False
        self._joined = JOB(self._join)
        self._job = ctypes.cast(self._joined, c_void_p)
        self._known = threading.local()
        try:
            # With the interpreter held, so that the others wait for it until this thread computes;
            # then without.
            self._start = ctypes.PyDLL(torch_cpu).GOMP_parallel_start
            self._end = ctypes.CDLL(torch_cpu).GOMP_parallel_end
        except AttributeError as error:
            raise GgmlError(
                "torch: this build has no OpenMP, whose threads multiply; install PyTorch's own"
            ) from error
        self._start.restype, self._start.argtypes = None, [c_void_p, c_void_p, c_uint]
        self._end.restype = None

    def run(self, jobs: Sequence[Job], rooms: Sequence[int]) -> bool:
        """Do them all, on a thread for each of `rooms`, the addresses of memory to work in; one of
        them is this thread. Returns whether a job failed.
        """
        self._waiting, self._rooms, self._failed = iter(jobs), iter(rooms), False
        if len(rooms) == 1:
            self._take()
        else:
            # An exception in here (Ctrl-C) is raised after the first call.
            try:
                self._start(self._job, None, len(rooms))
                self._take()
            finally:
                self._end()
        return self._failed

    def _join(self, _: None) -> None:
        """What a thread of torch's does, which Python does not know."""
        if not hasattr(self._known, "yes"):
            # Never undone: else Python forgets the thread, which takes 14 us.
            ctypes.pythonapi.PyGILState_Ensure()
            self._known.yes = True
        self._take()

    def _take(self) -> None:
        """Do what nobody has taken yet: a list's iterator gives each job once."""
        room = next(self._rooms)
        for job in self._waiting:
            if job(room):
                self._failed = True


class Product:
    """A graph of one share of a product, for one thread: some columns of y, x times some rows of a
    weight.
    """

    def __init__(self, base: ctypes.CDLL, cpu: ctypes.CDLL) -> None:
        # For good: the structures alone, no numbers.
        context = base.ggml_init(Init(CONTEXT_BYTES, None, True))
        weight, x = (base.ggml_new_tensor_2d(context, F32, 1, 1) for _ in range(2))
        y = base.ggml_mul_mat(context, weight, x)
        self._graph = base.ggml_new_graph_custom(context, 4, False)
        base.ggml_build_forward_expand(self._graph, y)
        self._weight, self._x, self._y = (
            Tensor.from_address(address) for address in (weight, x, y)
        )
        assert self._y.src[:2] == [weight, x]
        params = PoolParams()
        # One thread, the calling one.
        base.ggml_threadpool_params_init(byref(params), 1)
        self._pool = cpu.ggml_threadpool_new(byref(params))
        self._make_plan, self._compute = cpu.ggml_graph_plan, cpu.ggml_graph_compute
        self._start_row = self._row_bytes = 0

    def shape(
        self,
        kind: GgmlType,
        packed: GgmlType,
        in_features: int,
        start: int,
        rows: int,
        all_rows: int,
        n: int,
    ) -> None:
        """Say which part of which product this is, and in which blocks x comes."""
        self._start_row, self._row_bytes = start, kind.row_bytes(in_features)
        self._weight.type, self._x.type = kind.id, packed.id
        for tensor, inner, outer, unit_bytes, line_bytes in (
            (self._weight, in_features, rows, kind.block_bytes, self._row_bytes),
            (self._x, in_features, n, packed.block_bytes, packed.row_bytes(in_features)),
            (self._y, rows, n, 4, 4 * all_rows),
        ):
            tensor.ne[:2] = inner, outer
            tensor.nb[:] = unit_bytes, line_bytes, outer * line_bytes, outer * line_bytes
        self._plan = self._make_plan(self._graph, 1, self._pool)
        self.work_bytes = int(self._plan.work_size)
        self._call = self._graph, byref(self._plan)

    def place(self, weight: int, x: int, y: int) -> None:
        """Say where the whole weight, x and y begin."""
        self._weight.data = weight + self._start_row * self._row_bytes
        self._x.data = x
        self._y.data = y + 4 * self._start_row

    def compute(self, work: int) -> bool:
        """Multiply, working in the memory at `work`. Returns whether it failed."""
        self._plan.work_data = work
        return bool(self._compute(*self._call))

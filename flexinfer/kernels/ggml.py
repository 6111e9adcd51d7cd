"""ggml's kernels: quantised rows as they lie in a GGUF file, multiplied where they are. The one module that calls ggml.

A row of a weight is `in_features` numbers in blocks of 32 or 256, each block with its scales: a few bytes that ggml alone has to
understand. Activations are float32; ggml quantises them itself (to 8 bit, a row at a time) before it multiplies, as llama.cpp does.

How it is called. One graph of one product is built once; types, shapes and addresses are set before each call, so nothing is built
or kept per shape. ggml works in a thread pool of its own, which sleeps between calls: it does not spin while the disk is
awaited or torch computes. Calls come one at a time (a lock); the interpreter is free meanwhile.

What does not change a bit: cutting a weight by output rows, the address of its bytes, the number of threads. Activation rows do not depend on
one another either, but from 8 rows on ggml takes another way for types in blocks of 256 (TILED_ROWS), whose sums are in
another order. So row i of a batch equals the single row where both have fewer rows than that, or both have at least as many; and always for
types in blocks of 32.

Cost: each byte is read once, and bound by memory at a few rows; at many rows by arithmetic. More than WORK_ROWS rows are multiplied in
equal parts, so that what ggml writes meanwhile (quantised activations, float32 outputs) stays bounded: see `work_bytes`.

Who ships ggml: the wheel of transcribe-cpp-native has it with kernels for every kind of CPU, chosen when it is loaded; docs/log.md says
why that one. Not here: files (flexinfer.formats) and memory (the caller owns the bytes).
"""

import ctypes
import importlib.util
import os
import threading
from ctypes import (
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
    c_uint32,
    c_void_p,
)
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from flexinfer.streaming.memory import Buffer

PACKAGE = "transcribe_cpp_native"
INSTALL = "pip install transcribe-cpp-native==0.4.1"
VERSION = "0.26."  # of ggml: the structures below are laid out as in its header
TILED_ROWS = 8  # activation rows from which on types in blocks of 256 are multiplied in tiles
WORK_ROWS = 512  # activation rows that are multiplied at a time
F32_ID = 0  # of the type of activations and outputs
ONE_THREAD_WORK = 1 << 19  # products of fewer multiplications are not worth waking another thread


class GgmlError(ValueError):
    """ggml is not there, or is asked for what it cannot do."""


@dataclass(frozen=True, slots=True)
class GgmlType:
    """How numbers lie in a file: `block_elements` of them in `block_bytes` bytes."""

    name: str
    id: int  # in GGUF files, and in ggml
    block_elements: int
    block_bytes: int

    def row_bytes(self, in_features: int) -> int:
        """Bytes of a row. Raises: GgmlError if the row does not end with a block."""
        if in_features % self.block_elements:
            raise GgmlError(f"{self.name}: rows of {in_features} are no multiple of {self.block_elements}")
        return in_features // self.block_elements * self.block_bytes


# The names and numbers are those of the GGUF format.
_TYPES = (
    GgmlType("Q4_0", 2, 32, 18),
    GgmlType("Q4_1", 3, 32, 20),
    GgmlType("Q5_0", 6, 32, 22),
    GgmlType("Q5_1", 7, 32, 24),
    GgmlType("Q8_0", 8, 32, 34),
    GgmlType("Q2_K", 10, 256, 84),
    GgmlType("Q3_K", 11, 256, 110),
    GgmlType("Q4_K", 12, 256, 144),
    GgmlType("Q5_K", 13, 256, 176),
    GgmlType("Q6_K", 14, 256, 210),
    GgmlType("IQ1_S", 19, 256, 50),
    GgmlType("IQ1_M", 29, 256, 56),
    GgmlType("IQ2_XXS", 16, 256, 66),
    GgmlType("IQ2_XS", 17, 256, 74),
    GgmlType("IQ2_S", 22, 256, 82),
    GgmlType("IQ3_XXS", 18, 256, 98),
    GgmlType("IQ3_S", 21, 256, 110),
    GgmlType("IQ4_NL", 20, 32, 18),
    GgmlType("IQ4_XS", 23, 256, 136),
    GgmlType("TQ1_0", 34, 256, 54),
    GgmlType("TQ2_0", 35, 256, 66),
    GgmlType("MXFP4", 39, 32, 17),
    GgmlType("NVFP4", 40, 64, 36),
)
TYPES = {one.name: one for one in _TYPES}


@dataclass(frozen=True, slots=True)
class GgmlKernel:
    """Rows of `in_features` numbers of one of ggml's types, as they lie in a GGUF file."""

    in_features: int
    type: GgmlType
    dtype: torch.dtype  # what the model computes in
    joins: bool = True

    @property
    def row_bytes(self) -> int:
        return self.type.row_bytes(self.in_features)

    @property
    def resident(self) -> "GgmlKernel":
        return self

    def resident_bytes(self, nbytes: int) -> int:
        return nbytes

    def copied_bytes(self, nbytes: int) -> int:
        """None: rows are read where they lie."""
        return 0

    def work_bytes(self, activation_rows: int, output_rows: int) -> int:
        """Quantised activations and ggml's tiles; in another dtype than float32 also a copy of both sides in that."""
        rows = min(activation_rows, WORK_ROWS)
        copied_bytes = 0 if self.dtype == torch.float32 else 4 * rows * (self.in_features + output_rows)
        return library().work_bytes(self.type, self.in_features, output_rows, rows) + copied_bytes

    def view(self, buffer: Buffer, position: int, rows: int) -> torch.Tensor:
        """uint8 [rows, row_bytes], at any address."""
        return buffer.tensor(position, torch.uint8, (rows, self.row_bytes))

    def multiply(
        self, x: torch.Tensor, view: torch.Tensor, rows: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        assert view.shape == (rows, self.row_bytes)
        assert view.is_contiguous()
        flat = x.reshape(-1, self.in_features)  # [activation rows, in]
        y = x.new_empty(flat.shape[0], rows)
        parts = -(-flat.shape[0] // WORK_ROWS)
        for part, out in zip(flat.tensor_split(parts), y.tensor_split(parts), strict=True) if parts else ():
            product = out if out.dtype == torch.float32 else torch.empty(out.shape)
            library().multiply(self.type, view, part.float().contiguous(), product)
            if bias is not None:
                product += bias
            if product is not out:
                out.copy_(product)
        return y.view(*x.shape[:-1], rows)


def quantize_rows(kind: GgmlType, weight: torch.Tensor) -> torch.Tensor:
    """weight float32 [rows, in_features] in blocks of `kind`: uint8 [rows, row_bytes]. Uses one thread; may be called from several.

    Raises: GgmlError for a type that needs calibration, rows that do not end with a block, and numbers that are not finite.
    """
    rows, in_features = weight.shape
    packed = torch.empty(rows, kind.row_bytes(in_features), dtype=torch.uint8)
    library().quantize(kind, weight.float().contiguous(), packed)
    return packed


def dequantize_rows(kind: GgmlType, packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """uint8 [rows, row_bytes] as float32 [rows, in_features]. Uses one thread; may be called from several."""
    assert packed.dtype == torch.uint8
    assert packed.shape[1] == kind.row_bytes(in_features)
    weight = torch.empty(packed.shape[0], in_features)
    library().dequantize(kind, packed.contiguous(), weight)
    return weight


def rehearse() -> None:
    """Do once what every run does once: load ggml, start its threads, multiply few rows and many."""
    for name in ("Q4_0", "Q4_K"):
        kernel = GgmlKernel(1024, TYPES[name], torch.float32)
        view = torch.zeros(1024, kernel.row_bytes, dtype=torch.uint8)
        for activation_rows in (1, 64):
            kernel.multiply(torch.ones(activation_rows, kernel.in_features), view, len(view), None)


def library() -> "Library":
    """ggml, loaded by the first who asks. Raises: GgmlError where it is not installed."""
    return _library(os.getpid())  # threads do not survive a fork


@cache
def _library(pid: int) -> "Library":
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise GgmlError(f"ggml is not installed, which multiplies the weights of GGUF files; run `{INSTALL}`")
    return Library(Path(spec.submodule_search_locations[0]) / "_native")


class Library:
    """ggml as it lies in `folder`: libggml-base.so, and a libggml-cpu-*.so for each kind of CPU."""

    def __init__(self, folder: Path) -> None:
        try:
            base = ctypes.CDLL(str(folder / "libggml-base.so"))
            cpu = ctypes.CDLL(str(_best(folder)))
        except OSError as error:
            raise GgmlError(f"ggml cannot be loaded ({error}); run `{INSTALL}`") from error
        signatures = (
            (base.ggml_version, c_char_p, []),
            (base.ggml_init, c_void_p, [_Init]),
            (base.ggml_tensor_overhead, c_size_t, []),
            (base.ggml_new_tensor_2d, c_void_p, [c_void_p, c_int, c_int64, c_int64]),
            (base.ggml_mul_mat, c_void_p, [c_void_p, c_void_p, c_void_p]),
            (base.ggml_new_graph_custom, c_void_p, [c_void_p, c_size_t, c_bool]),
            (base.ggml_build_forward_expand, None, [c_void_p, c_void_p]),
            (base.ggml_threadpool_params_init, None, [POINTER(_PoolParams), c_int]),
            (base.ggml_quantize_requires_imatrix, c_bool, [c_int]),
            (base.ggml_quantize_chunk, c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
            (base.ggml_get_type_traits, POINTER(_Traits), [c_int]),
            (cpu.ggml_cpu_init, None, []),
            (cpu.ggml_threadpool_new, c_void_p, [POINTER(_PoolParams)]),
            (cpu.ggml_graph_plan, _Plan, [c_void_p, c_int, c_void_p]),
            (cpu.ggml_graph_compute, c_int, [c_void_p, POINTER(_Plan)]),
             )  # fmt: skip
        for function, result, arguments in signatures:
            function.restype, function.argtypes = result, arguments
        self.version = base.ggml_version().decode()
        if not self.version.startswith(VERSION):
            raise GgmlError(f"ggml {self.version} is installed, flexinfer knows {VERSION}x; run `{INSTALL}`")
        self._base, self._cpu = base, cpu
        self._lock = threading.Lock()
        self._pools: dict[int, int] = {}  # by number of threads
        cpu.ggml_cpu_init()
        context = base.ggml_init(_Init(16384, None, True))
        weight, x = (base.ggml_new_tensor_2d(context, F32_ID, 1, 1) for _ in range(2))
        y = base.ggml_mul_mat(context, weight, x)
        self._graph = base.ggml_new_graph_custom(context, 4, False)
        base.ggml_build_forward_expand(self._graph, y)
        self._weight, self._x, self._y = (_Tensor.from_address(address) for address in (weight, x, y))
        assert self._y.src[:2] == [weight, x]

    def multiply(self, kind: GgmlType, weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        """y [n, rows] = x [n, in] times the rows of `weight`; x and y float32, all contiguous."""
        n, in_features = x.shape
        rows = y.shape[1]
        threads = torch.get_num_threads() if n * rows * in_features >= ONE_THREAD_WORK else 1
        with self._lock:
            plan = self._plan(kind, in_features, rows, n, threads)
            work = torch.empty(plan.work_size, dtype=torch.uint8)
            plan.work_data = work.data_ptr()
            self._weight.data, self._x.data, self._y.data = weight.data_ptr(), x.data_ptr(), y.data_ptr()
            status = self._cpu.ggml_graph_compute(self._graph, byref(plan))
        if status:
            raise RuntimeError(f"ggml: status {status} for {kind.name}, {n} x {in_features} x {rows}")

    def work_bytes(self, kind: GgmlType, in_features: int, rows: int, n: int) -> int:
        """Memory that `multiply` takes besides x and y."""
        with self._lock:
            return self._plan(kind, in_features, rows, n, torch.get_num_threads()).work_size

    def quantize(self, kind: GgmlType, weight: torch.Tensor, packed: torch.Tensor) -> None:
        """weight float32 [rows, in] into packed uint8 [rows, row_bytes], both contiguous."""
        if self._base.ggml_quantize_requires_imatrix(kind.id):
            raise GgmlError(f"{kind.name}: cannot be made without calibration; choose another type")
        if not bool(torch.isfinite(weight).all()):
            raise GgmlError(
                "weight: holds NaN or infinity; the checkpoint is damaged or not meant to be quantised"
            )
        rows, in_features = weight.shape
        done = self._base.ggml_quantize_chunk(
            kind.id, weight.data_ptr(), packed.data_ptr(), 0, rows, in_features, None
        )
        assert done == packed.numel()

    def dequantize(self, kind: GgmlType, packed: torch.Tensor, weight: torch.Tensor) -> None:
        """packed uint8 [rows, row_bytes] into weight float32 [rows, in], both contiguous."""
        traits = self._base.ggml_get_type_traits(kind.id).contents
        _TO_FLOAT(traits.to_float)(packed.data_ptr(), weight.data_ptr(), weight.numel())

    def _plan(self, kind: GgmlType, in_features: int, rows: int, n: int, threads: int) -> "_Plan":
        """Give the graph its shape: weight [rows, in] of `kind`, x [n, in], y [n, rows]."""
        row_bytes = kind.row_bytes(in_features)
        self._weight.type = kind.id
        self._weight.ne[:2], self._weight.nb[:] = (
            (in_features, rows),
            (kind.block_bytes, row_bytes, rows * row_bytes, rows * row_bytes),
        )
        self._x.ne[:2], self._x.nb[:] = (
            (in_features, n),
            (4, 4 * in_features, 4 * n * in_features, 4 * n * in_features),
        )
        self._y.ne[:2], self._y.nb[:] = (rows, n), (4, 4 * rows, 4 * n * rows, 4 * n * rows)
        return self._cpu.ggml_graph_plan(self._graph, threads, self._pool(threads))

    def _pool(self, threads: int) -> int:
        if threads not in self._pools:
            params = _PoolParams()
            self._base.ggml_threadpool_params_init(byref(params), threads)
            params.poll = 0  # sleep at once between calls
            self._pools[threads] = self._cpu.ggml_threadpool_new(byref(params))
        return self._pools[threads]


def _best(folder: Path) -> Path:
    """The library of ggml's kernels that this CPU runs, and likes best by ggml's own count."""
    scores = {}
    for path in sorted(folder.glob("libggml-cpu*.so")):
        score = getattr(ctypes.CDLL(str(path)), "ggml_backend_score", None)
        scores[path] = 1 if score is None else score()
    best = max(scores, key=scores.__getitem__, default=None)
    if best is None or not scores[best]:
        raise GgmlError(
            f"{folder}: ggml has no kernels for this CPU; run `{INSTALL} --no-binary :all:` to build it"
        )
    return best


class _Init(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Tensor(Structure):
    _fields_ = (
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),  # elements of each dimension, the innermost first
        ("nb", c_size_t * 4),  # bytes from one to the next
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


class _Plan(Structure):
    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    )


class _PoolParams(Structure):
    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


class _Traits(Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", c_void_p),
        ("from_float_ref", c_void_p),
    )


_TO_FLOAT = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)

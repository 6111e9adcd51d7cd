"""ggml's kernels: rows as they lie in a GGUF file, multiplied where they are. All calls of ggml are
here.

A row of a weight is `in_features` numbers in blocks of 32 or 256, each block with its scales: bytes
that ggml alone has to understand. Activations are float32, quantised (to 8 bit, a row at a time)
before they are multiplied, as llama.cpp does: by ggml's own function, once for all threads.

How it is called. Output rows are cut into shares, a few for each thread, and a thread takes the
next when it is done with one: one that wakes late holds the others up less. The graph of a share is
built once for each shape, the last few shapes are kept, and addresses are set before each call. The
threads are torch's own, with ggml on one thread in each. A pool of ggml's beside torch's would have
to share the cores with threads of torch that spin for some milliseconds after each operation: twice
the time (docs/log.md). Calls come one at a time (a lock); the interpreter is free meanwhile.

What changes no bit: cutting a weight by output rows, the address of its bytes, the number of
threads. (Tested on x86 with six of the library's kernels; on ARM with i8mm ggml takes rows in
pairs, so there it should hold for even cuts.) Activation rows do not depend on one another, but
ggml may have two ways, with sums in another order: types in blocks of 256 go one way below 8
activation rows and another from 8 on, IQ4_NL (without AVX2 also Q4_0 and Q8_0) one way for a single
row and another for more. Row i of a batch equals row i of a batch that goes the same way.

Cost: each byte is read once, so it is bound by memory at a few activation rows, and by arithmetic
at many. More than WORK_ROWS rows are multiplied in equal parts, so that what ggml writes meanwhile
stays bounded: see `work_bytes`.

Who ships ggml: the wheel of transcribe-cpp-native has it with kernels for every kind of CPU, of
which the best is chosen here; docs/log.md says why that one. Not here: files (flexinfer.formats)
and memory (the caller owns the bytes). bf16, fp16 and fp32 have torch's kernels
(flexinfer.kernels.dense): with ggml's a cut by rows would change bits.
"""

import ctypes
import importlib.util
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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flexinfer.formats.ggml_types import INSTALL, TYPES, GgmlError, GgmlType
from flexinfer.memory.buffer import Buffer

PACKAGE = "transcribe_cpp_native"
VERSION = "0.26."  # of ggml: the structures below are laid out as in its header
F32 = 0  # ggml's number for the type of activations and outputs
WORK_ROWS = 256  # activation rows that are multiplied at a time
SHARE_ROWS = 16  # output rows of a share are a multiple of this: float32 outputs of one cache line
FEW_ROWS = 8  # up to so many activation rows the memory to work in is kept from call to call
# Of output rows, for each thread, with up to FEW_ROWS activation rows and with more.
SHARES_OF_FEW, SHARES_OF_MANY = (4, 2)
CONTEXT_BYTES = 4096  # for the structures of one product, of which ggml 0.26 takes 1440
# Products whose graphs are kept: a model has ten or so, for one token and for a few; experts of a
# layer three each.
KEPT_SHAPES = 64
ONE_THREAD_WORK = 1 << 20  # products of fewer multiplications are not worth waking another thread

# Of a product: in_features, output rows, activation rows, threads, and which it is of those that
# are computed together.
Shape = tuple[GgmlType, int, int, int, int, int]
# What a thread does, with the address of memory to work in; something true says that it failed.
Job = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class GgmlKernel:
    """Rows of `in_features` numbers of one of ggml's types, as they lie in a GGUF file."""

    in_features: int
    type: GgmlType
    dtype: torch.dtype  # what the model computes in

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
        """What ggml works in; for other dtypes than float32 also a copy of both sides in it."""
        rows = min(activation_rows, WORK_ROWS)
        copies_bytes = (
            0 if self.dtype == torch.float32 else 4 * rows * (self.in_features + output_rows)
        )
        return library().work_bytes(self.type, self.in_features, output_rows, rows) + copies_bytes

    def view(self, buffer: Buffer, position: int, rows: int) -> torch.Tensor:
        """uint8 [rows, row_bytes], at any address."""
        return buffer.tensor(position, torch.uint8, (rows, self.row_bytes))

    def multiply(
        self, x: torch.Tensor, view: torch.Tensor, rows: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        flat = x.reshape(-1, self.in_features)  # [activation rows, in]
        y = x.new_empty(len(flat), rows)
        if len(flat) <= WORK_ROWS:
            self._multiply(flat, view, y, bias)
        else:
            parts = -(-len(flat) // WORK_ROWS)
            for part, out in zip(flat.tensor_split(parts), y.tensor_split(parts), strict=True):
                self._multiply(part, view, out, bias)
        return y.view(*x.shape[:-1], rows)

    def matrix(self, view: torch.Tensor) -> torch.Tensor:
        return dequantize_rows(self.type, view, self.in_features)

    def _multiply(
        self, x: torch.Tensor, view: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """y [n, rows] = x [n, in] times the rows in `view`, plus `bias`; rounded once."""
        product = y if y.dtype == torch.float32 else torch.empty(y.shape)
        assert view.shape == (y.shape[1], self.row_bytes)
        library().multiply(x.float().contiguous(), [(self.type, view.data_ptr(), product)])
        if bias is not None:
            product += bias
        if product is not y:
            y.copy_(product)


def multiply_each(
    x: torch.Tensor, parts: Sequence[tuple[GgmlKernel, int, int, torch.Tensor | None]]
) -> list[torch.Tensor]:
    """What each kernel's `multiply` makes of x, the view at an address, its rows and bias, computed
    together: threads are woken once for all.

    x has FEW_ROWS activation rows at most, and all kernels have its dtype and width.
    """
    flat = x.reshape(-1, x.shape[-1])
    exact = flat.float().contiguous()
    products = [torch.empty(len(flat), rows) for _, _, rows, _ in parts]
    library().multiply(
        exact, [(part[0].type, part[1], y) for part, y in zip(parts, products, strict=True)]
    )
    for (_, _, _, bias), y in zip(parts, products, strict=True):
        if bias is not None:
            y += bias
    return [y.to(x.dtype).view(*x.shape[:-1], y.shape[1]) for y in products]


def multiply_rows(
    x: torch.Tensor, weights: Sequence[tuple[GgmlKernel, int]], rows: int
) -> torch.Tensor:
    """[n, rows]: row i of x [n, in_features] times the `rows` rows at the i-th address, as its
    kernel's `multiply` makes it; computed together.

    x is float32 and contiguous, and has as many rows as there are weights.
    """
    y = torch.empty(len(x), rows)
    parts = [(kernel.type, address, y[i : i + 1]) for i, (kernel, address) in enumerate(weights)]
    library().multiply(x, parts, a_row_each=True)
    return y


def quantize_rows(kind: GgmlType, weight: torch.Tensor) -> torch.Tensor:
    """weight [rows, in_features] in blocks of `kind`: uint8 [rows, row_bytes]. Threads may share it
    out.

    Raises: GgmlError for a type that needs calibration, for rows that do not end with a block, and
    for numbers that are not finite.
    """
    packed = torch.empty(len(weight), kind.row_bytes(weight.shape[1]), dtype=torch.uint8)
    library().quantize(kind, weight.float().contiguous(), packed)
    return packed


def dequantize_rows(kind: GgmlType, packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """uint8 [rows, row_bytes] as float32 [rows, in_features]. Threads may share it out."""
    weight = torch.empty(len(packed), in_features)
    library().dequantize(kind, packed.contiguous(), weight)
    return weight


def rehearse() -> None:
    """Do once what every run does once: load ggml, set graphs up, multiply few rows and many."""
    for name in ("Q4_0", "Q4_K"):
        kernel = GgmlKernel(1024, TYPES[name], torch.float32)
        view = torch.zeros(1024, kernel.row_bytes, dtype=torch.uint8)
        for activation_rows in (1, 64):
            kernel.multiply(torch.ones(activation_rows, kernel.in_features), view, len(view), None)


@cache
def library() -> "Library":
    """ggml, loaded by the first who asks. Raises: GgmlError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise GgmlError(
            f"ggml is not installed, which multiplies the weights of GGUF files; run `{INSTALL}`"
        )
    return Library(Path(spec.submodule_search_locations[0]) / "_native")


class Library:
    """ggml as it lies in `folder`: libggml-base.so, and a libggml-cpu-*.so for each kind of CPU."""

    def __init__(self, folder: Path) -> None:
        try:
            base = ctypes.CDLL(str(folder / "libggml-base.so"))
            kernels = best_kernels(folder)
            cpu = ctypes.CDLL(str(kernels))
        except OSError as error:
            raise GgmlError(f"ggml cannot be loaded ({error}); run `{INSTALL}`") from error
        signatures: tuple[tuple[Any, Any, list[Any]], ...] = (
            (base.ggml_version, c_char_p, []),
            (base.ggml_init, c_void_p, [_Init]),
            (base.ggml_new_tensor_2d, c_void_p, [c_void_p, c_int, c_int64, c_int64]),
            (base.ggml_mul_mat, c_void_p, [c_void_p, c_void_p, c_void_p]),
            (base.ggml_new_graph_custom, c_void_p, [c_void_p, c_size_t, c_bool]),
            (base.ggml_build_forward_expand, None, [c_void_p, c_void_p]),
            (base.ggml_threadpool_params_init, None, [POINTER(_PoolParams), c_int]),
            (base.ggml_quantize_requires_imatrix, c_bool, [c_int]),
            (base.ggml_quantize_chunk, c_size_t,
             [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
            (base.ggml_get_type_traits, POINTER(_Traits), [c_int]),
            (cpu.ggml_cpu_init, None, []),
            (cpu.ggml_threadpool_new, c_void_p, [POINTER(_PoolParams)]),
            (cpu.ggml_graph_plan, _Plan, [c_void_p, c_int, c_void_p]),
            (cpu.ggml_graph_compute, c_int, [c_void_p, POINTER(_Plan)]),
            (cpu.ggml_get_type_traits_cpu, POINTER(_CpuTraits), [c_int]),
        )  # fmt: skip
        for function, result, arguments in signatures:
            function.restype, function.argtypes = result, arguments
        self.version = base.ggml_version().decode()
        self.kernels = kernels.name  # the file of those that suit this CPU
        if not self.version.startswith(VERSION):
            raise GgmlError(
                f"ggml {self.version} is installed, flexinfer knows {VERSION}x; run `{INSTALL}`"
            )
        cpu.ggml_cpu_init()
        self._base, self._cpu = base, cpu
        self._team = _Team()
        self._shared: dict[Shape, list[_Product]] = {}  # the last used is the last
        self._spare: list[_Product] = []  # of shapes that are no longer kept
        self._activations: dict[GgmlType, _Activations] = {}
        self._work: list[torch.Tensor] = []  # what each thread works in
        self._lock = threading.Lock()

    def multiply(
        self,
        x: torch.Tensor,
        weights: Sequence[tuple[GgmlType, int, torch.Tensor]],
        *,
        a_row_each: bool = False,
    ) -> None:
        """For each type, address and y in `weights`: y [n, rows] = x [n, in] times the rows that
        lie there; with `a_row_each`, y [1, rows] = row i of x times the rows at the i-th address. x
        and y are float32, all is contiguous.
        """
        n, in_features = (1 if a_row_each else len(x)), x.shape[1]
        with self._lock:
            threads = torch.get_num_threads()
            # Weights to go round: none has to be cut.
            enough = len(weights) >= threads * SHARES_OF_FEW
            packed: dict[GgmlType, torch.Tensor] = {}
            products: list[_Product] = []
            for part, (kind, address, y) in enumerate(weights):
                rows = y.shape[1]
                activations = self._activations_for(kind)
                blocks = activations.type
                if blocks not in packed:
                    packed[blocks] = self._pack(x, activations, threads)
                x_address = packed[blocks].data_ptr() + (
                    part * packed[blocks].shape[1] if a_row_each else 0
                )
                few_threads = 1 if enough or n * rows * in_features < ONE_THREAD_WORK else threads
                for product in self._shares((kind, in_features, rows, n, few_threads, part)):
                    product.place(address, x_address, y.data_ptr())
                    products.append(product)
            threads = min(threads, len(products))
            self._make_room(threads, max(product.work_bytes for product in products))
            room = [work.data_ptr() for work in self._work[:threads]]
            failed = self._team.run([product.compute for product in products], room)
            if n > FEW_ROWS:
                self._work.clear()
        if failed:
            kinds = ", ".join(kind.name for kind, _, _ in weights)
            raise RuntimeError(f"ggml: could not multiply {kinds}, {n} x {in_features}")

    def work_bytes(self, kind: GgmlType, in_features: int, rows: int, n: int) -> int:
        """Memory that `multiply` takes besides x and y."""
        with self._lock:
            threads = torch.get_num_threads()
            products = self._shares((kind, in_features, rows, n, threads, 0))
            packed_bytes = n * self._activations_for(kind).type.row_bytes(in_features)
            return packed_bytes + threads * max(product.work_bytes for product in products)

    def _activations_for(self, kind: GgmlType) -> "_Activations":
        """How activations are quantised for a weight of `kind`."""
        if kind not in self._activations:
            number = self._cpu.ggml_get_type_traits_cpu(kind.id).contents.vec_dot_type
            traits = self._base.ggml_get_type_traits(number).contents
            blocks = GgmlType(traits.type_name.decode(), number, traits.blck_size, traits.type_size)
            from_float = self._cpu.ggml_get_type_traits_cpu(number).contents.from_float
            self._activations[kind] = _Activations(blocks, _FROM_FLOAT(from_float))
        return self._activations[kind]

    def _pack(self, x: torch.Tensor, activations: "_Activations", threads: int) -> torch.Tensor:
        """x [n, in] quantised: uint8 [n, row_bytes]. Threads share many rows out."""
        packed = torch.empty(len(x), activations.type.row_bytes(x.shape[1]), dtype=torch.uint8)

        def job(part: torch.Tensor, into: torch.Tensor) -> Job:
            addresses, count = (part.data_ptr(), into.data_ptr()), part.numel()
            return lambda _: activations.from_float(*addresses, count)

        parts = threads if len(x) > FEW_ROWS else 1
        jobs = [
            job(*pair)
            for pair in zip(x.tensor_split(parts), packed.tensor_split(parts), strict=True)
        ]
        self._team.run(jobs, [0] * parts)
        return packed

    def quantize(self, kind: GgmlType, weight: torch.Tensor, packed: torch.Tensor) -> None:
        """weight float32 [rows, in] into packed uint8 [rows, row_bytes], both contiguous."""
        if self._base.ggml_quantize_requires_imatrix(kind.id):
            raise GgmlError(f"{kind.name}: cannot be made without calibration; choose another type")
        if not bool(torch.isfinite(weight).all()):
            raise GgmlError(
                "weight: holds NaN or infinity; the checkpoint is damaged or not meant to be "
                "quantised"
            )
        done = self._base.ggml_quantize_chunk(
            kind.id, weight.data_ptr(), packed.data_ptr(), 0, *weight.shape, None
        )
        assert done == packed.numel()

    def dequantize(self, kind: GgmlType, packed: torch.Tensor, weight: torch.Tensor) -> None:
        """packed uint8 [rows, row_bytes] into weight float32 [rows, in], both contiguous."""
        assert packed.dtype == torch.uint8
        assert packed.shape == (len(weight), kind.row_bytes(weight.shape[1]))
        traits = self._base.ggml_get_type_traits(kind.id).contents
        _TO_FLOAT(traits.to_float)(packed.data_ptr(), weight.data_ptr(), weight.numel())

    def _shares(self, shape: Shape) -> "list[_Product]":
        """Products that make up one of `shape`: several per thread if there are enough rows."""
        products = self._shared.pop(shape, None)
        if products is None:
            if len(self._shared) == KEPT_SHAPES:
                self._spare += self._shared.pop(next(iter(self._shared)))
            kind, in_features, rows, n, threads, _ = shape
            shares = (
                1
                if threads == 1
                else threads * (SHARES_OF_FEW if n <= FEW_ROWS else SHARES_OF_MANY)
            )
            share = -(-rows // (shares * SHARE_ROWS)) * SHARE_ROWS
            products = []
            for start in range(0, rows, share):
                product = self._spare.pop() if self._spare else _Product(self._base, self._cpu)
                count, blocks = min(share, rows - start), self._activations_for(kind).type
                product.shape(kind, blocks, in_features, start, count, rows, n)
                products.append(product)
        self._shared[shape] = products
        return products

    def _make_room(self, threads: int, nbytes: int) -> None:
        """See that so many threads have memory to work in."""
        for i in range(threads):
            if i == len(self._work):
                self._work.append(torch.empty(nbytes, dtype=torch.uint8))
            elif self._work[i].nbytes < nbytes:
                self._work[i] = torch.empty(nbytes, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class _Activations:
    """How activations are quantised before they are multiplied."""

    type: GgmlType
    # Addresses of numbers and of blocks, and how many numbers.
    from_float: Callable[[int, int, int], None]


class _Product:
    """A graph of one share of a product, for one thread: some columns of y, x times some rows of a
    weight.
    """

    def __init__(self, base: ctypes.CDLL, cpu: ctypes.CDLL) -> None:
        # For good: the structures alone, no numbers.
        context = base.ggml_init(_Init(CONTEXT_BYTES, None, True))
        weight, x = (base.ggml_new_tensor_2d(context, F32, 1, 1) for _ in range(2))
        y = base.ggml_mul_mat(context, weight, x)
        self._graph = base.ggml_new_graph_custom(context, 4, False)
        base.ggml_build_forward_expand(self._graph, y)
        self._weight, self._x, self._y = (
            _Tensor.from_address(address) for address in (weight, x, y)
        )
        assert self._y.src[:2] == [weight, x]
        params = _PoolParams()
        base.ggml_threadpool_params_init(byref(params), 1)  # one thread, the calling one
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


class _Team:
    """Runs jobs on torch's OpenMP threads, as compiled code does for `#pragma omp parallel`."""

    def __init__(self) -> None:
        torch_cpu = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
        self._waiting: Iterator[Job] = iter(())
        self._rooms: Iterator[int] = iter(())
        self._failed = False
        self._joined = _JOB(self._join)
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
            try:  # what is raised in here (Ctrl-C) is raised after the first call
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


class _CpuTraits(Structure):
    _fields_ = (
        ("from_float", c_void_p),
        ("vec_dot", c_void_p),
        ("vec_dot_type", c_int),
        ("nrows", c_int64),
    )


_JOB = CFUNCTYPE(None, c_void_p)
_TO_FLOAT = CFUNCTYPE(None, c_void_p, c_void_p, c_int64)
_FROM_FLOAT = CFUNCTYPE(None, c_void_p, c_void_p, c_int64)

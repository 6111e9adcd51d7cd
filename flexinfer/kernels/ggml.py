"""ggml's kernels: rows as they lie in a GGUF file, multiplied where they are. All calls of ggml are
here; its C interface is in ggml_abi.

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

import importlib.util
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from flexinfer.formats.ggml_types import INSTALL, TYPES, GgmlError, GgmlType
from flexinfer.kernels.ggml_abi import (
    FROM_FLOAT,
    PACKAGE,
    TO_FLOAT,
    Job,
    Product,
    Team,
    open_library,
)
from flexinfer.memory.buffer import Buffer

# Version of ggml whose header ggml_abi follows.
VERSION = "0.26."
# Activation rows multiplied at a time.
WORK_ROWS = 256
# A share has a multiple of this many output rows: float32 outputs of one cache line.
SHARE_ROWS = 16
# Up to this many activation rows, work memory is kept from call to call.
FEW_ROWS = 8
# Of output rows, for each thread, with up to FEW_ROWS activation rows and with more.
SHARES_OF_FEW, SHARES_OF_MANY = (4, 2)
# Products whose graphs are kept: a model has ten or so, for one token and for a few; experts of a
# layer three each.
KEPT_SHAPES = 64
# Products of fewer multiplications are not worth waking another thread.
ONE_THREAD_WORK = 1 << 20

# Of a product: in_features, output rows, activation rows, threads, and which it is of those that
# are computed together.
Shape = tuple[GgmlType, int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class GgmlKernel:
    """Rows of `in_features` numbers of one of ggml's types, as they lie in a GGUF file."""

    in_features: int
    type: GgmlType
    # Compute dtype.
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.type.row_bytes(self.in_features)

    @property
    def locked(self) -> "GgmlKernel":
        return self

    def locked_bytes(self, nbytes: int) -> int:
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
        # [activation rows, in].
        flat = x.reshape(-1, self.in_features)
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
            base, cpu, kernels = open_library(folder)
        except OSError as error:
            raise GgmlError(f"ggml cannot be loaded ({error}); run `{INSTALL}`") from error
        self.version = base.ggml_version().decode()
        # File with the kernels for this CPU.
        self.kernels = kernels.name
        if not self.version.startswith(VERSION):
            raise GgmlError(
                f"ggml {self.version} is installed, flexinfer knows {VERSION}x; run `{INSTALL}`"
            )
        cpu.ggml_cpu_init()
        self._base, self._cpu = base, cpu
        self._team = Team()
        # In order of use, the last used at the end.
        self._shared: dict[Shape, list[Product]] = {}
        # Products of shapes that are no longer kept.
        self._spare: list[Product] = []
        self._activations: dict[GgmlType, _Activations] = {}
        # Work memory of each thread.
        self._work: list[torch.Tensor] = []
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
            products: list[Product] = []
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
            self._activations[kind] = _Activations(blocks, FROM_FLOAT(from_float))
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
        TO_FLOAT(traits.to_float)(packed.data_ptr(), weight.data_ptr(), weight.numel())

    def _shares(self, shape: Shape) -> "list[Product]":
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
                product = self._spare.pop() if self._spare else Product(self._base, self._cpu)
                count, blocks = min(share, rows - start), self._activations_for(kind).type
                product.shape(kind, blocks, in_features, start, count, rows, n)
                products.append(product)
        self._shared[shape] = products
        return products

    def _make_room(self, threads: int, nbytes: int) -> None:
        """Give each of the first `threads` threads `nbytes` to work in."""
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

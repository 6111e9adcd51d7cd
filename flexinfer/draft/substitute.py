"""Low-bit substitutes of streamed rows: what drafts the tokens that a pass over the true weights
then verifies.

SubSpec (arXiv 2509.18344): of each weight that is streamed in part, the streamed rows are also in
memory in a few bits (ggml's blocks, flexinfer.kernels.ggml). While candidates are drafted the same
modules compute locked rows as they are and the others from their substitute, so a draft pass reads
no weight. They are in the file's order of rows, as the weights are.

Where they come from: made of the true rows by the first pass, which has them in memory to multiply
them, or read before the first draft from a file that holds those of all rows, made once
(`SubstituteFile`), so that any budget finds its part there. Costs: the first quantises the streamed
rows (on two cores 800 million weights a second for Q4_0, 25 for Q4_K: flexinfer.convert.quantize),
the second reads a third of them. Memory: a piece and 32,768 numbers for each thread. Not here: how
many bits, and what is locked (flexinfer.plan, flexinfer.draft).
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from flexinfer.cache_dir import in_cache, make_folder
from flexinfer.formats.ggml_types import KINDS, TYPES, kind_for
from flexinfer.kernels import Kernel
from flexinfer.kernels.dense import Conv1DKernel, DenseKernel
from flexinfer.kernels.ggml import GgmlKernel, dequantize_rows, quantize_rows
from flexinfer.kernels.input_rows import QuantisedKernel
from flexinfer.memory.buffer import PAGE_BYTES, Buffer, round_up
from flexinfer.plan.weights import Piece, Weight
from flexinfer.sizes import format_size
from flexinfer.streaming.locked import Rows
from flexinfer.streaming.reader import FileReader, padded_bytes

# Quantised in one call: torch shares larger tensors out to threads, which take memory.
NUMBERS_AT_ONCE = 32_768

SPARE_DISK_BYTES = 64 << 20
# Padding of a substitute: it begins and ends within a page.
EXTRA_BYTES = 2 * PAGE_BYTES


class DraftError(ValueError):
    """A draft that cannot be made or used; says why and what would work."""


def substitute_kernels(
    weights: Sequence[Weight], kernels: Mapping[str, Kernel], kind: str, dtype: torch.dtype
) -> dict[str, GgmlKernel]:
    """What multiplies the substitute of each weight: blocks of `kind`, or of the nearest type where
    rows are no multiple of 256.

    Raises DraftError for a type that there is not, and a weight whose rows cannot be cut into
    blocks.
    """
    if kind.upper() not in KINDS:
        raise DraftError(
            f"draft_type={kind!r} does not exist; there are {', '.join(KINDS).lower()}"
        )
    found = {}
    for weight in weights:
        if isinstance(kernels[weight.name], QuantisedKernel):
            raise DraftError(
                "draft='substitute': no substitute is made of weights that somebody quantised; use "
                "draft='lookup' or a small model"
            )
        in_features = kernels[weight.name].in_features
        name = kind_for(kind.upper(), in_features)
        if name is None:
            raise DraftError(
                f"draft='substitute': rows of {weight.name} have {in_features} numbers, no "
                "multiple of 32, and cannot be cut into blocks; use draft='lookup' or a small "
                "model"
            )
        found[weight.name] = GgmlKernel(in_features, TYPES[name], dtype)
    return found


def substitute_bytes(
    weights: Sequence[Weight], kernels: Mapping[str, GgmlKernel]
) -> dict[str, list[int]]:
    """Memory that the substitute of each piece takes, by the name of its weight; the last has what
    a buffer takes besides.

    Raises DraftError where substitutes are no smaller than the weights.
    """
    found = {}
    for weight in weights:
        row_bytes = kernels[weight.name].row_bytes
        sizes = [(piece.row_stop - piece.row_start) * row_bytes for piece in weight.pieces]
        found[weight.name] = [*sizes[:-1], sizes[-1] + EXTRA_BYTES]
    if sum(map(sum, found.values())) >= (
        whole_bytes := sum(weight.lock_cost_bytes for weight in weights)
    ):
        raise DraftError(
            f"draft='substitute': in {next(iter(kernels.values())).type.name.lower()} it would "
            f"take as much memory as the weights ({format_size(whole_bytes)}); choose a draft_type "
            "of fewer bits, draft='lookup' or a small model"
        )
    return found


def true_rows(kernel: Kernel, view: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of what `kernel` multiplies, as float32 [rows, in_features]."""
    if isinstance(kernel, GgmlKernel):
        return dequantize_rows(kernel.type, view[start:stop], kernel.in_features)
    if isinstance(kernel, Conv1DKernel):
        return view[:, start:stop].T.float().contiguous()
    assert isinstance(kernel, DenseKernel)
    return view[start:stop].float()


class Substitute:
    """The rows of a weight from one piece on, in few bits; complete when none of `pieces` is
    missing.
    """

    def __init__(
        self,
        rows: Rows,
        pieces: Sequence[Piece],
        pack: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
        memory: Buffer | None = None,
    ) -> None:
        self.rows, self.memory = rows, memory
        self.missing = {piece.row_start: piece for piece in pieces}
        self._pack = pack

    def add(self, piece: Piece, view: torch.Tensor) -> None:
        """Make the part of `piece`, whose true rows `view` has; nothing where it is read from a
        file, or there already.
        """
        if self._pack is not None and piece.row_start in self.missing:
            start, stop = (
                piece.row_start - self.rows.row_start,
                piece.row_stop - self.rows.row_start,
            )
            self._pack(view, self.rows.view[start:stop])
            del self.missing[piece.row_start]


class SubstituteMaker:
    """Makes substitutes of the true rows, as passes have them in memory."""

    def __init__(
        self,
        kernels: Mapping[str, Kernel],
        substitutes: Mapping[str, GgmlKernel],
        reader: FileReader,
    ) -> None:
        self._kernels, self._substitutes, self._reader = kernels, substitutes, reader

    def begin(self, weight: Weight, first: int) -> Substitute:
        """Memory for the substitute of all pieces of `weight` from number `first` on, which passes
        fill as they multiply them.
        """
        kernel = self._substitutes[weight.name]
        count = weight.pieces[-1].row_stop - weight.pieces[first].row_start
        packed = kernel.view(Buffer(count * kernel.row_bytes, lock=True), 0, count)
        return Substitute(
            _as_rows(weight, first, packed, kernel),
            weight.pieces[first:],
            partial(self._pack, weight),
        )

    def complete(self, weight: Weight, substitute: Substitute) -> None:
        """Read and make what no pass has made. Raises ReadError."""
        kernel = self._kernels[weight.name]
        scratch = Buffer(max(piece.memory_bytes for piece in weight.pieces), lock=False)
        for piece in list(substitute.missing.values()):
            position = self._read(piece, scratch)
            substitute.add(piece, kernel.view(scratch, position, piece.row_stop - piece.row_start))

    def close(self) -> None:
        """Nothing to close: the reader is the store's."""

    def seconds_per_number(self, weight: Weight) -> float:
        """Of quantising, all cores at work: measured on as few rows as are quantised in one call.

        Reading is not in it.
        """
        kernel, substitute = self._kernels[weight.name], self._substitutes[weight.name]
        rows = torch.ones(max(1, NUMBERS_AT_ONCE // kernel.in_features), kernel.in_features)
        rows *= torch.linspace(-1, 1, kernel.in_features)
        times_s = []
        for _ in range(5):
            start_s = perf_counter()
            quantize_rows(substitute.type, rows)
            times_s.append(perf_counter() - start_s)
        return min(times_s) / rows.numel() / max(1, len(os.sched_getaffinity(0)))

    def pack(self, weight: Weight, piece: Piece, scratch: Buffer, packed: torch.Tensor) -> None:
        """Read a piece of `weight` into `scratch`, and write its substitute to `packed` [rows,
        row_bytes] uint8.
        """
        position = self._read(piece, scratch)
        view = self._kernels[weight.name].view(scratch, position, piece.row_stop - piece.row_start)
        self._pack(weight, view, packed)

    def _read(self, piece: Piece, scratch: Buffer) -> int:
        memory = scratch.memory(0, scratch.nbytes)
        return self._reader.read(piece.file, piece.offset_bytes, piece.nbytes, memory)

    def _pack(self, weight: Weight, view: torch.Tensor, packed: torch.Tensor) -> None:
        """The substitute of the rows that `view` has, to `packed` [rows, row_bytes] uint8."""
        kernel, substitute, rows = (
            self._kernels[weight.name],
            self._substitutes[weight.name],
            len(packed),
        )
        step = max(1, NUMBERS_AT_ONCE // kernel.in_features)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            packed[start:stop] = quantize_rows(
                substitute.type, true_rows(kernel, view, start, stop)
            )


def _as_rows(weight: Weight, first: int, packed: torch.Tensor, kernel: GgmlKernel) -> Rows:
    """Rows of the pieces of `weight` from number `first` on, `packed` [rows, row_bytes] uint8."""
    pieces = weight.pieces[first:]
    step = max(piece.row_stop - piece.row_start for piece in pieces)
    return Rows(pieces[0].row_start, len(packed), step, packed.numel(), packed, kernel)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the substitute of a weight lies in the file."""

    offset_bytes: int
    nbytes: int


class SubstituteFile:
    """Substitutes of all rows of all weights in one file, in order of use; made by the first who
    wants it.

    Kept under the path, size and time of change of the checkpoint's files, so that one that is
    written anew has a new one. A run that is killed while it is made goes on after the last
    finished piece.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        substitutes: Mapping[str, GgmlKernel],
        kind: str,
        # None for the cache directory.
        folder: Path | None = None,
    ) -> None:
        self._weights, self._substitutes = weights, substitutes
        self._places: dict[str, _Place] = {}
        end = 0
        for weight in weights:
            nbytes = weight.pieces[-1].row_stop * substitutes[weight.name].row_bytes
            self._places[weight.name] = _Place(end, nbytes)
            end = round_up(end + nbytes)
        self.nbytes = end
        files = sorted({piece.file for weight in weights for piece in weight.pieces})
        facts = [
            (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files
        ]
        identity = json.dumps([facts, kind.lower(), [weight.name for weight in weights], end])
        name = f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.{kind.lower()}"
        self.path = in_cache("drafts", name) if folder is None else folder / name
        self._file: FileReader | None = None

    @property
    def exists(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.nbytes

    def make(
        self, maker: SubstituteMaker, progress: Callable[[str, int, int], None] | None
    ) -> None:
        """Make the file unless it is there.

        Raises DraftError where the disk is too full or another process makes it now.
        """
        if self.exists:
            return
        make_folder(self.path.parent, "draft_dir")
        partial = self.path.with_suffix(self.path.suffix + ".partial")
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DraftError(
                    f"{partial}: another process is making it; wait for it to finish"
                ) from error
            # Written in order and synced before the length grows past it, so its length says how
            # far it is.
            have = os.fstat(descriptor).st_size
            free = os.statvfs(self.path.parent)
            missing = self.nbytes - have + SPARE_DISK_BYTES - free.f_bavail * free.f_frsize
            if missing > 0:
                raise DraftError(
                    f"{self.path.parent}: the substitute takes {format_size(self.nbytes)} there, "
                    f"{format_size(missing)} are missing; make room, or name a directory on "
                    "another disk with draft_dir"
                )
            for weight in self._weights:
                row_bytes = self._substitutes[weight.name].row_bytes
                scratch = Buffer(max(piece.memory_bytes for piece in weight.pieces), lock=False)
                for piece in weight.pieces:
                    start = self._places[weight.name].offset_bytes + piece.row_start * row_bytes
                    rows = piece.row_stop - piece.row_start
                    if start + rows * row_bytes > have:
                        packed = torch.empty(rows, row_bytes, dtype=torch.uint8)
                        maker.pack(weight, piece, scratch, packed)
                        _write(descriptor, packed.numpy().data.cast("B"), start)
                    if progress is not None:
                        progress("draft", start + rows * row_bytes, self.nbytes)
            os.ftruncate(descriptor, self.nbytes)
            if progress is not None:
                progress("draft", self.nbytes, self.nbytes)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            partial.rename(self.path)
        finally:
            os.close(descriptor)

    def open(self, *, direct: bool) -> None:
        """Be ready for `complete`."""
        self._file = FileReader([self.path], direct=direct)

    def begin(self, weight: Weight, first: int) -> Substitute:
        """Memory for the substitute of all pieces of `weight` from number `first` on, which
        `complete` fills.
        """
        offset, nbytes = self._span(weight, first)
        buffer = Buffer(padded_bytes(offset, nbytes), lock=True)
        count = nbytes // self._substitutes[weight.name].row_bytes
        kernel = self._substitutes[weight.name]
        packed = kernel.view(buffer, offset % PAGE_BYTES, count)
        return Substitute(
            _as_rows(weight, first, packed, kernel), weight.pieces[first:], memory=buffer
        )

    def complete(self, weight: Weight, substitute: Substitute) -> None:
        """Read it from the file. Raises ReadError."""
        assert self._file is not None
        assert substitute.memory is not None
        first = len(weight.pieces) - len(substitute.missing)
        buffer = substitute.memory
        self._file.read(self.path, *self._span(weight, first), buffer.memory(0, buffer.nbytes))
        substitute.missing.clear()

    def _span(self, weight: Weight, first: int) -> tuple[int, int]:
        """Where the substitute of the pieces from `first` on lies in the file, and its bytes."""
        row_bytes, row_start = (
            self._substitutes[weight.name].row_bytes,
            weight.pieces[first].row_start,
        )
        offset = self._places[weight.name].offset_bytes + row_start * row_bytes
        return offset, (weight.pieces[-1].row_stop - row_start) * row_bytes

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _write(descriptor: int, data: memoryview, offset_bytes: int) -> None:
    """Whole, then synced, so that the bytes of a file of full length are right."""
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset_bytes + written)
    os.fdatasync(descriptor)

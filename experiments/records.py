"""Records: what one measured cell came to, with one schema, checked when written and when read.

Mechanism: a `Record` keeps the cell as it was configured, the raw samples (seconds and bytes of
every counted token), what the bound is made of, the limits that were really applied, and where it
ran. Speed, bound and ratio are derived from these; they are written too, for whoever reads the line
without this module, and a line in which they disagree with the samples is refused.
The bound (our choice, after the paper's equation 4): a pass over the weights takes at least
max(c, (S - R) / B), S the bytes of weights touched, R of them resident (the budget less process and
KV cache), B the bandwidth, c the compute time of a pass with everything resident.
It does not measure, and it does not draw.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, computed_field, model_validator

from experiments.config import CellConfig, from_dict
from flexinfer.messages import shown

SCHEMA_VERSION: Literal[1] = 1
# Folder with the records of earlier engines, each a results directory under its version.
OLDER = "older"
DERIVED = ("cell_key", "tokens_per_s", "bound_tokens_per_s", "ratio")
FINISHED = ("ok", "killed", "timeout", "unsupported")  # not done again; error and missing are
STRANGERS = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
MAX_INT = 2**63 - 1  # no count or size is larger; a float holds it
Size = Annotated[int, Field(gt=0, le=MAX_INT)]
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Kernels = tuple[str, str, str, str, int | None, int]


class RecordError(ValueError):
    """A line of a records file, or a set of records, cannot be used as asked."""


class Limits(BaseModel):
    """The limits that were applied, not those that were asked for."""

    model_config = STRANGERS
    method: Literal["v1", "v2", "systemd", "unlimited"]
    memory_bytes: Size | None = None
    read_bytes_per_s: Size | None = None
    cores: Size | None = None
    swap_off: bool = False
    page_cache_dropped: bool = False
    read_ahead_kb: Count | None = None  # of the disk, where the cell set it
    device: str | None = None  # the disk that is limited
    note: str = ""  # what could not be limited, and why


class Provenance(BaseModel):
    """Where and with what a record was measured."""

    model_config = STRANGERS
    versions: dict[str, str]  # package -> version; 'python' as well
    git_commit: str  # 'unknown' outside a repository
    git_dirty: bool
    cpu: str
    cores: Size
    memory_bytes: Size
    kernel: str
    file_system: str  # of the checkpoint
    # CPU family, hypervisor, disk, readahead, huge pages.
    about: dict[str, str] = Field(default_factory=dict)
    started: datetime

    @property
    def engine(self) -> str:
        """The version of FlexInfer, which must agree within one figure too."""
        return self.versions.get("flexinfer", "unknown")

    @property
    def machine(self) -> str:
        """What must agree within one figure."""
        return f"{self.cpu}, {self.cores} cores, {self.memory_bytes / 2**30:.0f} GiB"

    def comparable(self, other: "Provenance") -> bool:
        """Whether records of both may stand in one figure: the machine and the engine agree."""
        return (self.machine, self.engine) == (other.machine, other.engine)


def _known_fields(data: Any) -> Any:
    """Refuses unknown fields at every depth of a cell, which pydantic would ignore in plain
    dataclasses.
    """
    if isinstance(data, dict):
        from_dict(CellConfig, data)
    return data


class Record(BaseModel):
    """One measured cell. Immutable."""

    model_config = STRANGERS
    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str = Field(min_length=8)  # unique
    kind: Literal["measured"] = "measured"
    status: Literal["ok", "killed", "timeout", "missing", "unsupported", "error"]
    message: str = ""  # why, when the status is not ok; and the command that mends it
    # Experiment, model, system, device, budget_bytes, workload, round.
    cell: Annotated[CellConfig, BeforeValidator(_known_fields)]
    # Per weight of all matrices, scales and zeros included.
    bits: float | None = Field(default=None, gt=0)
    limits: Limits
    provenance: Provenance
    # raw samples, of the counted tokens (warm-up excluded)
    tokens: Count = 0
    passes: Count = 0  # over the weights; fewer than tokens where a pass yields several
    token_s: list[float] = Field(default_factory=list)  # seconds of each counted pass
    # Bytes read in each counted pass, /proc/<pid>/io.
    token_bytes: list[Count] = Field(default_factory=list)
    bytes_read: Count | None = None  # by the process in all, loading and warm-up included
    load_s: float | None = Field(default=None, ge=0)
    peak_memory_bytes: Count | None = None  # from the cgroup, the page cache charged to it included
    # Prompt tokens -> seconds to the first token, every repeat.
    prefill_s: dict[Size, list[float]] = Field(default_factory=dict)
    # Ids, warm-up included, to compare systems.
    output_tokens: list[Count] = Field(default_factory=list)
    # What the engine counted in the counted passes.
    counted: dict[str, Count] = Field(default_factory=dict)
    # what the bound is made of
    total_weight_bytes: Size | None = None  # S; of a mixture those that a token touches
    untouched_bytes: Size | None = None  # of the experts of a mixture that a token does not touch
    # That a counted pass of a mixture had to read, what was read in vain apart.
    missed_bytes: Count | None = None
    process_bytes: Count | None = None
    kv_bytes: Count | None = None
    compute_s_per_pass: float | None = Field(default=None, gt=0)  # c
    compute_source: str = ""  # how c was got
    # B, measured under the same limits.
    bandwidth_bytes_per_s: float | None = Field(default=None, gt=0)
    bandwidth_source: str = ""  # how B was got
    others_cpu_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        # Of all cores' time while the cell ran: what went to processes that were not its own, and
        # to the kernel.
    )
    # What the engine said of itself: plan and stats.
    engine: dict[str, Any] = Field(default_factory=dict)
    # of a traced cell: run_cell returns the events here, the runner moves them to a JSON file
    # beside the records
    events: list[dict[str, Any]] = Field(default_factory=list)
    events_file: str | None = None  # its name, relative to the records file

    @property
    def weights(self) -> str:
        """What the weights are, as figures print it.

        Older records hold one comparison of two 4.5-bit formats.
        """
        format = self.cell.system.format
        old = format == "int4" or (format == "gguf" and self.cell.model.kind != "path")
        return "int4 and Q4_0" if old else format.upper()

    @property
    def place(self) -> tuple[str, str, str, int]:
        """Model, weights, device and budget in bytes: systems are compared where these are the
        same.
        """
        return self.cell.model.name, self.weights, self.cell.device.name, self.cell.budget_bytes

    @property
    def kernels(self) -> Kernels:
        """What the time of a resident pass depends on: model, whose kernels (and whether they
        repack), format, cores, sequences.
        """
        system = self.cell.system.resident()
        return (
            self.cell.model.name,
            system.kind,
            str(system.options),
            system.format,
            self.cell.device.cores,
            self.cell.workload.batch or 1,
        )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def cell_key(self) -> str:
        """Names what was measured; see CellConfig.key."""
        return self.cell.key

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of a pass over the median seconds of a pass."""
        if not self.token_s or not self.passes:
            return None
        return self.tokens / self.passes / statistics.median(self.token_s)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bound_tokens_per_s(self) -> float | None:
        """No system that takes one pass a token can be faster in this budget.

        Of a mixture: none that misses as many bytes.
        """
        if self.missed_bytes is not None and self.bandwidth_bytes_per_s and self.compute_s_per_pass:
            return 1 / max(self.compute_s_per_pass, self.missed_bytes / self.bandwidth_bytes_per_s)
        if self.process_bytes is None or self.kv_bytes is None:
            return None
        if not (self.total_weight_bytes and self.bandwidth_bytes_per_s and self.compute_s_per_pass):
            return None
        return bound_tokens_per_s(
            self.total_weight_bytes,
            self.cell.budget_bytes - self.process_bytes - self.kv_bytes,
            self.bandwidth_bytes_per_s,
            self.compute_s_per_pass,
        )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratio(self) -> float | None:
        """Achieved passes per second over the bound."""
        if not self.tokens_per_s or not self.bound_tokens_per_s:
            return None
        return self.tokens_per_s * self.passes / self.tokens / self.bound_tokens_per_s

    @property
    def reads_nothing(self) -> bool:
        """Whether the counted passes had all weights in memory: they read less than a hundredth of
        them.
        """
        weight_bytes = (self.total_weight_bytes or 0) + (self.untouched_bytes or 0)
        return bool(self.token_bytes) and sum(self.token_bytes) < 0.01 * weight_bytes * self.passes

    @property
    def hit_rate(self) -> float | None:
        """The share of the experts that were in memory when a layer wanted them, in the counted
        passes.
        """
        hits, misses = (self.counted.get(f"expert_{name}", 0) for name in ("hits", "misses"))
        return hits / (hits + misses) if hits + misses else None

    def _check_samples(self) -> None:
        if len(self.token_s) != self.passes or (
            self.token_bytes and len(self.token_bytes) != self.passes
        ):
            raise ValueError(
                f"token_s: {len(self.token_s)} samples, token_bytes: {len(self.token_bytes)}, "
                f"passes: {self.passes}"
            )
        if any(seconds <= 0 for seconds in self.token_s):
            raise ValueError("token_s: seconds must be positive")
        if any(seconds <= 0 for found in self.prefill_s.values() for seconds in found):
            raise ValueError("prefill_s: seconds must be positive")
        if self.status == "ok" and not (self.passes and self.tokens >= self.passes):
            raise ValueError(
                f"tokens: a record that is ok has counted tokens, this one {self.tokens} in "
                f"{self.passes} passes"
            )
        if self.status != "ok" and not self.message:
            raise ValueError(f"message: a record that is {self.status} says why")

    @model_validator(mode="wrap")
    @classmethod
    def _derived_agree(cls, data: Any, handler: Callable[[Any], "Record"]) -> "Record":
        if not isinstance(data, dict):
            return handler(data)  # a Record already
        _all_finite(data)
        written = {name: data[name] for name in DERIVED if name in data}
        record = handler({name: value for name, value in data.items() if name not in written})
        record._check_samples()
        for name in DERIVED:
            ours = getattr(record, name)
            if isinstance(ours, float) and not math.isfinite(ours):
                raise ValueError(f"{name}: the samples give {ours}")
            if name in written and not _agrees(written[name], ours):
                raise ValueError(
                    f"{name}: {shown(written[name])} is written, the samples give {ours!r}"
                )
        return record


def _all_finite(data: dict[str, Any]) -> None:
    """Refuses NaN and infinity at every depth, in what has no schema too: JSON does not have them,
    and NaN is not equal to itself.
    """
    stack: list[tuple[str, Any]] = list(data.items())
    while stack:
        name, value = stack.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: {value} is no number")
        if isinstance(value, dict | list):
            inner = value.values() if isinstance(value, dict) else value
            stack.extend((name, one) for one in inner)


def _agrees(written: object, ours: object) -> bool:
    if isinstance(ours, float) and isinstance(written, float | int) and abs(written) <= MAX_INT:
        return abs(ours - written) <= 1e-6 * abs(ours)
    return ours == written


def bound_tokens_per_s(
    total_weight_bytes: int,
    resident_bytes: int,
    bandwidth_bytes_per_s: float,
    compute_s_per_pass: float,
) -> float:
    """1 / max(c, (S - R) / B), R clipped to 0..S."""
    resident_bytes = min(max(resident_bytes, 0), total_weight_bytes)
    return 1 / max(
        compute_s_per_pass, (total_weight_bytes - resident_bytes) / bandwidth_bytes_per_s
    )


def with_common_costs(records: Iterable[Record]) -> list[Record]:
    """The same records of one machine, with B and c that are the machine's rather than the run's.

    B, for each device: the 90th percentile of the rates that direct reads had before and after each
    cell, up to the limit. By its own B a run in a slow moment of the disk would look as if it were
    at its bound, and the best of all grows with their number. c, for each model, kernels, cores and
    number of sequences, for it depends on neither disk nor budget: the fastest pass of any run
    where one had everything in memory; otherwise the least that shallow models gave. The bytes that
    a mixture misses: the least of any system.
    """
    records = list(records)
    rates: dict[str, list[float]] = defaultdict(list)
    missed: dict[tuple[str, str, str, int], int] = {}
    told: dict[Kernels, float] = {}
    passes: dict[Kernels, float] = {}
    in_memory: set[Kernels] = set()
    for one in records:
        if one.bandwidth_bytes_per_s:
            limit = one.limits.read_bytes_per_s or math.inf
            rates[one.cell.device.name].append(min(one.bandwidth_bytes_per_s, limit))
        if one.missed_bytes is not None:
            missed[one.place] = min(missed.get(one.place, one.missed_bytes), one.missed_bytes)
        if one.compute_s_per_pass:
            told[one.kernels] = min(told.get(one.kernels, math.inf), one.compute_s_per_pass)
            passes[one.kernels] = min([passes.get(one.kernels, math.inf), *one.token_s])
            if one.reads_nothing:
                in_memory.add(one.kernels)
    common = {
        device: sorted(found)[math.ceil(0.9 * len(found)) - 1] for device, found in rates.items()
    }
    computes = told | {kernels: passes[kernels] for kernels in in_memory}
    return [
        one.model_copy(
            update={
                "bandwidth_bytes_per_s": one.bandwidth_bytes_per_s and common[one.cell.device.name],
                "compute_s_per_pass": computes.get(one.kernels),
                "missed_bytes": missed.get(one.place),
            }
        )
        for one in records
    ]


def check_comparable(records: Iterable[Record]) -> None:
    """Refuses to put records of two machines or two versions of the engine, or limited and
    unlimited ones, into one figure.
    """
    records = [record for record in records if record.status in ("ok", "killed", "timeout")]
    machines = sorted({record.provenance.machine for record in records})
    if len(machines) > 1:
        raise RecordError(
            f"records of {len(machines)} machines in one figure: {'; '.join(machines)}. Name one "
            "of them"
        )
    engines = sorted({record.provenance.engine for record in records})
    if len(engines) > 1:
        raise RecordError(
            f"records of engines {', '.join(engines)} in one figure: measure again, or move the "
            f"older to {OLDER}/{engines[0]}/"
        )
    methods = {record.limits.method for record in records}
    if "unlimited" in methods and len(methods) > 1:
        raise RecordError(
            "unlimited records beside limited ones in one figure: select one kind, or measure "
            "again with cgroup rights"
        )

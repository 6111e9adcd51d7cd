"""What an experiment is made of: model, systems, device, budgets, workload.

And one cell, which is one process.

Mechanism: plain dataclasses are the schema. scripts/run.py registers `RunConfig` with Hydra, first
in the defaults, so that an unknown key or a value of the wrong type in any YAML file or override
fails at once; `OmegaConf.to_object` then makes these objects, whose `__post_init__` refuses values
that cannot work. A `CellConfig` is one measurement (one model, system, device, budget, round); it
goes to the child process and into its record as JSON, by `asdict` and `from_dict`.
Cost model: the budget may be a fraction of the bytes of the model's weights at the bits of its
format (`model_config.weight_bytes`). No I/O in here, and nothing of Hydra.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

from experiments.model_config import (
    FORMATS,
    GGUF_FORMATS,
    RECORDED_FORMATS,
    SYNTHETIC_FORMATS,
    ConfigError,
    ModelConfig,
    require,
)
from flexinfer.options import Options
from flexinfer.sizes import parse_size

TEXT_KINDS = ("edit", "code", "chat")
SYSTEM_KINDS = ("flexinfer", "llama_cpp", "transformers", "accelerate", "airllm", "ollm")
KERNELS_OF = {"accelerate": "transformers", "airllm": "transformers", "ollm": "transformers"}


@dataclass(slots=True)
class SystemConfig:
    """What runs: one of ours with a policy, or one of the others."""

    name: str
    label: str  # as figures print it
    kind: str = "flexinfer"  # flexinfer | llama_cpp | transformers | accelerate | airllm | ollm
    # Auto: that of the comparison; or one of FORMATS, for a system that runs no other.
    format: str = "auto"
    # Keyword arguments of the system's loader.
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self.kind in SYSTEM_KINDS, "system.kind", self.kind, f"one of {', '.join(SYSTEM_KINDS)}"
        )
        require(
            self.format in ("auto", *RECORDED_FORMATS),
            "system.format",
            self.format,
            f"auto or one of {', '.join(FORMATS)}",
        )

    def check_options(self) -> None:
        """Raises ConfigError where `flexinfer.from_pretrained` would refuse the options."""
        try:
            Options.of({name: value for name, value in self.options.items() if name != "python"})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"system.options of {self.name}: {error}") from error

    def resident(self) -> "SystemConfig":
        """What computes this system's passes when everything is in memory: its kernels, without
        what it does about memory.
        """
        kind = KERNELS_OF.get(self.kind, self.kind)
        repacks = {"use_extra_bufts": self.options.get("use_extra_bufts", True)}
        return replace(self, kind=kind, options=repacks if kind == "llama_cpp" else {})


@dataclass(slots=True)
class DeviceConfig:
    """A storage device stood for by a read-bandwidth limit, and the number of cores."""

    name: str
    source: str  # where the bandwidth comes from
    read_bytes_per_s: int | None = None  # None: no limit
    cores: int | None = None  # by affinity; None: all
    read_ahead_kb: int | None = None  # of the disk; None: as it is

    def __post_init__(self) -> None:
        rate = self.read_bytes_per_s
        require(
            rate is None or rate > 0,
            "device.read_bytes_per_s",
            rate,
            "must be positive, or null for no limit",
        )
        require(
            self.cores is None or self.cores > 0,
            "device.cores",
            self.cores,
            "must be positive, or null for all",
        )
        ahead = self.read_ahead_kb
        require(
            ahead is None or ahead >= 0,
            "device.read_ahead_kb",
            ahead,
            "at least 0, or null to leave it",
        )


@dataclass(slots=True)
class BudgetConfig:
    """The axis of memory budgets: sizes ('2GiB', bytes) or fractions of the model's weight bytes
    (numbers up to 4).
    """

    grid: list[float | int | str] = field(default_factory=lambda: [0.5])

    def __post_init__(self) -> None:
        require(
            bool(self.grid),
            "budget.grid",
            self.grid,
            "give at least one budget, such as [2GiB] or [0.5]",
        )
        for entry in self.grid:
            resolve_budget_bytes(entry, 1)


@dataclass(slots=True)
class WorkloadConfig:
    """How long a cell decodes, and when it has counted enough."""

    name: str = "standard"
    prompt_tokens: int = 16
    warmup_tokens: int = 2  # decoded first, not counted
    min_tokens: int = 8  # counted at least, and
    min_seconds: float = 10.0  # for at least so long; except that
    max_seconds: float = 120.0  # a slow cell stops here with the tokens it has (one at least), and
    max_tokens: int = 64  # a fast one here
    context: int = 256  # tokens the KV cache is sized for
    # The whole process, loading included; then it is killed and recorded as a timeout.
    timeout_s: float = 600.0
    prefill_tokens: list[int] = field(default_factory=list)  # prompts whose prefill is timed
    # Real text (experiments.texts) instead of the fixed prompt, each kind by generate() with up to
    # max_tokens:
    texts: list[str] = field(default_factory=list)
    # or tokens that a draft has right before each that it has not, as seen elsewhere; the weights
    # have no say in it
    replayed: list[int] = field(default_factory=list)
    # Decode tokens drawn at random instead of greedily: random weights soon repeat themselves.
    drawn: bool = False
    # Sequences at a time, each of `context` tokens; what the plan says of it is recorded.
    batch: int | None = None

    def __post_init__(self) -> None:
        require(
            self.prompt_tokens > 0, "workload.prompt_tokens", self.prompt_tokens, "must be positive"
        )
        require(
            self.warmup_tokens >= 0,
            "workload.warmup_tokens",
            self.warmup_tokens,
            "must not be negative",
        )
        require(
            0 < self.min_tokens <= self.max_tokens,
            "workload.min_tokens",
            self.min_tokens,
            "1 to max_tokens",
        )
        require(
            0 <= self.min_seconds <= self.max_seconds,
            "workload.min_seconds",
            self.min_seconds,
            "0 to max_seconds",
        )
        require(self.timeout_s > 0, "workload.timeout_s", self.timeout_s, "must be positive")
        for tokens in self.prefill_tokens:
            require(tokens > 0, "workload.prefill_tokens", tokens, "must be positive")
        for kind in self.texts:
            require(kind in TEXT_KINDS, "workload.texts", kind, f"one of {', '.join(TEXT_KINDS)}")
        for run in self.replayed:
            require(run >= 0, "workload.replayed", run, "must not be negative")
        require(
            not (self.texts and self.replayed),
            "workload.replayed",
            self.replayed,
            "leave workload.texts empty",
        )
        require(
            self.batch is None or self.batch > 0, "workload.batch", self.batch, "must be positive"
        )
        require(
            self.batch is None
            or not (self.texts or self.replayed or self.prefill_tokens or self.drawn),
            "workload.batch",
            self.batch,
            "leave texts, replayed, prefill_tokens and drawn empty",
        )
        needed = max(
            self.prompt_tokens + self.warmup_tokens + self.max_tokens, *self.prefill_tokens, 0
        )
        require(
            self.context >= needed,
            "workload.context",
            self.context,
            f"prompts and decoding need {needed} tokens",
        )

    def enough(self, tokens: int, counted_s: float) -> bool:
        """Whether a cell that has counted `tokens` in `counted_s` seconds may stop."""
        if tokens >= self.max_tokens or (tokens >= 1 and counted_s >= self.max_seconds):
            return True
        return tokens >= self.min_tokens and counted_s >= self.min_seconds


@dataclass(slots=True)
class CellConfig:
    """One measurement: what a child process is told, and what its record repeats."""

    experiment: str
    model: ModelConfig
    system: SystemConfig  # format resolved: never auto
    device: DeviceConfig
    budget_bytes: int  # of the whole process
    workload: WorkloadConfig
    round: int
    cache_dir: str  # synthetic checkpoints are made and kept here
    trace: bool = False  # record the events of reads, waits and kernels as well

    def __post_init__(self) -> None:
        require(self.budget_bytes > 0, "budget_bytes", self.budget_bytes, "must be positive")
        require(self.round >= 0, "round", self.round, "must not be negative")
        require(
            self.system.format in RECORDED_FORMATS,
            "system.format",
            self.system.format,
            "resolve it first: comparison_format",
        )

    @property
    def key(self) -> str:
        """Names what is measured, whichever experiment asks: two cells of one key are the same
        measurement.
        """
        told = asdict(self)
        for name in ("experiment", "cache_dir"):
            del told[name]
        for group, name in (("system", "label"), ("device", "source"), ("workload", "name")):
            del told[group][name]
        # Older than these fields are most records.
        for name in ("prefill_tokens", "texts", "replayed", "drawn", "batch"):
            if not told["workload"][name]:
                del told["workload"][name]
        if self.device.read_ahead_kb is None:
            del told["device"]["read_ahead_kb"]
        if self.model.shape is not None:
            told["model"]["shape"] = self.model.shape.facts()
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(slots=True)
class RunConfig:
    """One comparison as Hydra composes it: the systems take turns at every budget, in every round,
    on the same weights.
    """

    model: ModelConfig
    systems: dict[str, SystemConfig]
    device: DeviceConfig
    budget: BudgetConfig
    workload: WorkloadConfig
    experiment: str = "adhoc"
    # Of the weights, for all systems: auto: the model's first that all of them can run.
    format: str = "auto"
    rounds: int = 1
    trace: bool = False
    # Skip cells this machine has finished; false: measure them again, and keep both.
    resume: bool = True
    # One format after the other, its synthetic checkpoint deleted when done.
    delete_checkpoints: bool = False
    # Run the missing cells of these experiments instead.
    include: list[str] = field(default_factory=list)
    results_dir: str = "results"
    cache_dir: str = "~/.cache/flexinfer"

    def __post_init__(self) -> None:
        require(self.rounds > 0, "rounds", self.rounds, "must be positive")
        require(
            bool(self.systems),
            "system",
            [],
            "name at least one, such as system=[flexinfer,llama-cpp-mmap]",
        )
        for one in self.systems.values():
            if one.kind == "flexinfer":
                one.check_options()
        require(
            self.format in ("auto", *FORMATS),
            "format",
            self.format,
            f"auto or one of {', '.join(FORMATS)}",
        )
        for where, names in (
            ("model.formats", self.model.formats),
            (
                "system.format",
                [one.format for one in self.systems.values() if one.format != "auto"],
            ),
        ):
            can = SYNTHETIC_FORMATS if self.model.kind == "synthetic" else FORMATS
            for name in names:
                require(
                    name in can,
                    where,
                    name,
                    f"a {self.model.kind} model can be had in {', '.join(can)}",
                )
        require(
            bool(re.fullmatch(r"[A-Za-z0-9_.-]+", self.experiment)),
            "experiment",
            self.experiment,
            "a file name",
        )


def from_dict(kind: Any, data: Any, where: str = "cell") -> Any:
    """The dataclass `kind` from what `asdict` (or JSON) made of it.

    Raises ConfigError naming the field for unknown or missing fields and values of another type.
    """
    options = [option for option in get_args(kind) if option is not type(None)]
    if data is None and len(options) < len(get_args(kind)):
        return None
    target = options[0] if len(options) == 1 and not hasattr(kind, "__origin__") else kind
    accepted = {int: int, float: int | float, str: str, bool: bool}.get(target)
    if accepted is not None:
        same = isinstance(data, accepted) and (target is bool or not isinstance(data, bool))
        require(same, where, data, f"must be of type {target.__name__}")
    if not is_dataclass(target):
        return data
    assert isinstance(target, type)
    require(isinstance(data, dict), where, data, "must be an object")
    hints = get_type_hints(target)
    known = {one.name for one in fields(target)}
    unknown = sorted(set(data) - known)
    require(not unknown, where, unknown, f"unknown; the fields are {', '.join(sorted(known))}")
    values = {
        name: from_dict(hints[name], value, f"{where}.{name}") for name, value in data.items()
    }
    try:
        return target(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def comparison_format(
    model: ModelConfig, systems: Iterable[SystemConfig], format: str = "auto"
) -> str:
    """The format in which all `systems` run `model`, from one and the same file: `format`, or the
    model's first that they can.

    Raises ConfigError naming the system that cannot, or the formats that there are.
    """
    left = list(model.formats) if format == "auto" else [format]
    require(
        set(left) <= set(model.formats),
        "format",
        format,
        f"{model.name} comes in {', '.join(model.formats)}",
    )
    for system in systems:
        runs = {"flexinfer": FORMATS, "llama_cpp": GGUF_FORMATS}.get(system.kind, ("bf16",))
        can = [name for name in left if name in runs and system.format in ("auto", name)]
        require(bool(can), "system", system.name, f"cannot run {model.name} in {' or '.join(left)}")
        left = can
    return left[0]


def resolve_budget_bytes(budget: float | int | str, model_bytes: int) -> int:
    """Bytes of a budget: a size ('2GiB', 2147483648), or, up to 4, a fraction of `model_bytes`.

    The fraction may be a string too ('0.5'), as a command line gives it.
    """
    if isinstance(budget, str) and re.fullmatch(r"\d*\.\d+", budget):
        budget = float(budget)
    if not isinstance(budget, str) and 0 < budget <= 4:
        return int(budget * model_bytes)
    size_bytes = parse_size(int(budget) if isinstance(budget, float) else budget, "budget")
    remedy = "a size such as '2GiB', or a fraction of the model up to 4, such as 0.5"
    require(size_bytes >= 2**20, "budget", budget, remedy)
    return size_bytes

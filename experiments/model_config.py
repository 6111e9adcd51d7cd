"""What a model is in an experiment: its shape, the formats it can be had in, the bytes of its
weights.

Plain dataclasses whose `__post_init__` refuses values that cannot work. No I/O in here.
"""

from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any

MODEL_KINDS = ("synthetic", "real", "path")
BITS_PER_WEIGHT = {"q4_0": 4.5, "q4_1": 5.0, "q4_k": 4.5, "bf16": 16.0}
GGUF_FORMATS = ("q4_0", "q4_1", "q4_k", "gguf")  # gguf: a file by path, whatever types are in it
FORMATS = (*GGUF_FORMATS, "bf16")
SYNTHETIC_FORMATS = ("q4_0", "q4_k", "bf16")
# Int4 had kernels of its own, beside a GGUF in Q4_0 for llama.cpp.
RECORDED_FORMATS = (*FORMATS, "int4")


class ConfigError(ValueError):
    """A field of a configuration has a value that cannot work."""


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raises ConfigError naming field, value and remedy, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name}={value!r}: {remedy}")


@dataclass(slots=True)
class ExpertsConfig:
    """The mixture in each layer of a decoder, in place of its feed-forward part."""

    count: int  # experts of a layer
    used: int  # of each token
    architecture: str  # llama.cpp's: qwen3moe, or llama (Mixtral)
    # Of an expert's share of the routing, the next one's: 1 is even (experiments.gguf).
    popularity: float = 1.0

    def __post_init__(self) -> None:
        known = ("llama", "qwen3moe")
        require(
            0 < self.used <= self.count,
            "model.shape.experts.used",
            self.used,
            f"1 to count={self.count}",
        )
        require(
            self.architecture in known,
            "model.shape.experts.architecture",
            self.architecture,
            f"one of {', '.join(known)}",
        )
        require(
            0 < self.popularity <= 1,
            "model.shape.experts.popularity",
            self.popularity,
            "above 0, at most 1 (even)",
        )


@dataclass(slots=True)
class ShapeConfig:
    """Shape of a Llama-like decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tie: bool = False  # lm_head shares the embedding's weight
    head_dim: int | None = None  # None: hidden / heads
    experts: ExpertsConfig | None = None  # each with intermediate numbers inside; None: no mixture

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocab"):
            require(
                getattr(self, name) > 0,
                f"model.shape.{name}",
                getattr(self, name),
                "must be positive",
            )
        require(
            self.head_dim is not None or self.hidden % self.heads == 0,
            "model.shape.heads",
            self.heads,
            f"must divide hidden={self.hidden}",
        )
        require(
            self.heads % self.kv_heads == 0,
            "model.shape.kv_heads",
            self.kv_heads,
            f"must divide heads={self.heads}",
        )

    @property
    def linear_weights(self) -> int:
        """Weights of all linears and experts, lm_head included (norms, routers and embedding rows
        are negligible).
        """
        attention = 2 * self.hidden * self.head_width * (self.heads + self.kv_heads)
        feed_forward = (
            3 * self.hidden * self.intermediate * (self.experts.count if self.experts else 1)
        )
        return self.layers * (attention + feed_forward) + self.vocab * self.hidden

    @property
    def head_width(self) -> int:
        """Numbers of a head."""
        return self.head_dim or self.hidden // self.heads

    def facts(self) -> dict[str, Any]:
        """What tells it from other shapes.

        Fields that came later are left out where they say nothing.
        """
        told = asdict(self)
        return {key: value for key, value in told.items() if value is not None}


@dataclass(slots=True)
class ModelConfig:
    """A checkpoint: synthetic of a true shape, the real one on hand, or any other by path."""

    name: str
    kind: str = "synthetic"  # synthetic | real | path
    # What can be had of it; the first that all systems of a comparison can run is the default.
    formats: list[str] = field(default_factory=lambda: ["q4_0"])
    shape: ShapeConfig | None = None  # None: kind=path, read from the files
    path: str | None = None  # a checkpoint directory, or a .gguf file; only with kind=path

    def __post_init__(self) -> None:
        require(
            self.kind in MODEL_KINDS, "model.kind", self.kind, f"one of {', '.join(MODEL_KINDS)}"
        )
        require(
            bool(self.formats),
            "model.formats",
            self.formats,
            f"name at least one of {', '.join(FORMATS)}",
        )
        for name in self.formats:
            require(name in RECORDED_FORMATS, "model.formats", name, f"one of {', '.join(FORMATS)}")
        if self.kind == "path":
            require(
                bool(self.path),
                "model.path",
                self.path,
                "a model by path needs model.path=/a/checkpoint/directory",
            )
            self.name = PurePath(str(self.path)).name if self.name == "path" else self.name
        else:
            require(
                self.shape is not None,
                "model.shape",
                None,
                f"a model of kind {self.kind} needs its shape",
            )


def weight_bytes(shape: ShapeConfig, format: str) -> int:
    """Bytes of the weights, counted from the shape."""
    return int(shape.linear_weights * BITS_PER_WEIGHT[format] / 8)

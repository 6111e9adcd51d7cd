"""How long the first token took, and what it is made of: stages that follow one another, from the start of the process on."""

import time
from dataclasses import dataclass, field
from time import perf_counter

import psutil

BEFORE = "start"  # of the process until a model is asked for: imports, and what the program does besides

STAGES = {  # what each is, in a line for people
    BEFORE: "start and imports",
    "header": "headers and skeleton",
    "verify": "checksums",
    "rehearsal": "measuring the process",
    "tokenizer": "tokenizer",
    "costs": "measuring disk and kernels",
    "load": "what stays, modules",
    "program": "the program meanwhile",
    "memory": "memory and substitutes",
    "reading": "waiting for weights",
    "computing": "computing",
}


@dataclass(slots=True)
class FirstToken:
    """Seconds of each stage; `total_s` from the call of `from_pretrained` to the end of the first whole pass, 0 before."""

    seconds: dict[str, float] = field(default_factory=dict)
    total_s: float = 0.0
    _since_s: float = field(default_factory=perf_counter)

    def __post_init__(self) -> None:
        self.seconds[BEFORE] = max(0.0, time.time() - psutil.Process().create_time())

    def reached(self, stage: str) -> None:
        """All that passed since the stage before was `stage`. What comes after the first pass is not counted."""
        if not self.total_s:
            now_s = perf_counter()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now_s - self._since_s
            self._since_s = now_s

    def came(self, waited_s: float) -> None:
        """The first pass is over; for so long of it weights were waited for."""
        if not self.total_s:
            self.reached("computing")
            self.seconds["computing"] -= waited_s
            self.seconds["reading"] = waited_s
            self.total_s = sum(self.seconds.values()) - self.seconds[BEFORE]

    def facts(self) -> dict[str, float]:
        """For `stats()`: "first_token_s" and its parts; "start" comes before it. Nothing before the first pass is over."""
        if not self.total_s:
            return {}
        parts = {f"first_token_{name}_s": self.seconds.get(name, 0.0) for name in STAGES}
        return {"first_token_s": self.total_s} | parts

    def line(self) -> str:
        """For people."""
        parts = [f"{what} {self.seconds[name]:.2f}" for name, what in STAGES.items() if name in self.seconds]
        return f"first token after {self.total_s:.2f} s of loading and one pass: " + ", ".join(parts)

"""The systems on top of transformers: forward passes with a cache, and the argmax."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments.systems.interface import UnsupportedError, resident_bytes

ALLOCATOR_BYTES = 64 << 20  # of accelerate's process beside weights and cache; our choice
COUNTERS = {
    "expert_hits",
    "expert_misses",
    "experts_foretold",
    "experts_foretold_right",
    "wasted_bytes",
}
# As flexinfer.cli.main, which says why; not imported, for its memory would count.
SPIN_COUNT = "6000"


class TorchSystem:
    """What systems on top of transformers share: passes with a cache, and the argmax."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from transformers.models.llama import modeling_llama  # noqa: F401  counted as process, not as model

        torch.set_num_threads(job["cores"])
        torch.set_grad_enabled(False)
        self.torch, self.job, self.options = torch, job, dict(job["options"])
        self.model: Any = None
        self.cache: Any = None
        self.ids: list[list[int]] = []  # of each sequence
        self.last_alone: dict[str, int] = {}

    def load(self) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            self.job["model"], dtype="auto", **self.options
        ).eval()

    def start(self, prompt: list[int]) -> None:
        from transformers import DynamicCache

        shifted = (
            prompt[i % len(prompt) :] + prompt[: i % len(prompt)] for i in range(self.job["batch"])
        )
        self.ids, self.cache = list(shifted), None  # the old one goes first
        self.cache = DynamicCache(config=self.model.config)
        parameters = inspect.signature(self.model.forward).parameters
        self.last_alone = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def step(self) -> list[int]:
        ids = self.torch.tensor(self.ids)
        out = self.model(input_ids=ids, cache=self.cache, use_cache=True, **self.last_alone)
        self.cache = out.cache
        tokens: list[int] = out.logits[:, -1].argmax(-1).tolist()
        self.ids = [[token] for token in tokens]
        return tokens

    def take(self, token: int) -> None:
        self.ids = [[token]]

    def counters(self) -> dict[str, int]:
        return {}

    def engine(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.model = self.cache = None


class FlexInfer(TorchSystem):
    def __init__(self, job: dict[str, Any]) -> None:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        super().__init__(job)
        self.predicted: dict[str, Any] = {}

    def predict(self) -> None:
        """What `flexinfer plan --batch` says, asked under the limits that the run has.

        The process is gone before it.
        """
        job = self.job
        context = f"--context={job['context']}"
        argv = [
            "plan",
            job["model"],
            f"--memory={job['budget_bytes']}",
            context,
            f"--batch={job['batch']}",
        ]
        told = subprocess.run(
            [sys.executable, "-m", "flexinfer", *argv, "--json"],
            check=True,
            capture_output=True,
            text=True,
        )
        self.predicted = {"batches": json.loads(told.stdout)["batches"]}

    def load(self) -> None:
        # As the commands do.
        importlib.import_module("flexinfer.imports").defer()
        flexinfer = importlib.import_module("flexinfer")
        batch = self.job["batch"]
        told: dict[str, Any] = {
            "memory": self.job["budget_bytes"],
            "context": self.job["context"] * batch,
        }
        if batch > 1:
            told["logits_to_keep"] = batch
        if self.job["trace"]:
            told["trace"] = True
        self.model = flexinfer.from_pretrained(self.job["model"], **(told | self.options))

    def counters(self) -> dict[str, int]:
        return {
            name: value for name, value in self.model.flexinfer.stats().items() if name in COUNTERS
        }

    def engine(self) -> dict[str, Any]:
        engine = self.model.flexinfer
        plan: dict[str, Any] = {
            name: value
            for name in dir(engine.plan)
            if not name.startswith("_")
            and isinstance(value := getattr(engine.plan, name), int | float | str)
        }
        draft = engine.plan.draft
        if draft is not None:
            plan["draft"] = {name: getattr(draft, name) for name in draft.__slots__}
        told: dict[str, Any] = {"plan": plan, "stats": engine.stats(), **self.predicted}
        return told | ({"events": engine.events()} if self.job["trace"] else {})

    def close(self) -> None:
        self.model.flexinfer.close()
        super().close()


class Accelerate(TorchSystem):
    def load(self) -> None:
        allowance_bytes = self.options.pop("cpu_bytes", None)
        if allowance_bytes is None:
            # accelerate itself keeps room for the largest layer of what it is allowed
            allowance_bytes = max(
                0,
                self.job["budget_bytes"]
                - resident_bytes()
                - self.job["kv_bytes"]
                - ALLOCATOR_BYTES,
            )
        self.options |= {"device_map": "auto", "max_memory": {"cpu": allowance_bytes}}
        self.options.setdefault("offload_folder", self.job["scratch"])
        self.allowance_bytes = allowance_bytes
        super().load()

    def engine(self) -> dict[str, Any]:
        placed = list(getattr(self.model, "hf_device_map", {}).values())
        return {
            "cpu_bytes": self.allowance_bytes,
            "modules_on_disk": placed.count("disk"),
            "modules": len(placed),
        }


class AirLLM(TorchSystem):
    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.base = importlib.import_module("airllm.airllm_base").AirLLMBaseModel
        self.utils = importlib.import_module("airllm.utils")

    def split(self) -> None:
        """Make AirLLM's copy of the checkpoint, one file a layer."""
        names = {
            "embed": "model.embed_tokens",
            "layer_prefix": "model.layers",
            "norm": "model.norm",
            "lm_head": "lm_head",
        }
        self.utils.find_or_create_local_splitted_path(
            self.job["model"], self.job["copy"], layer_names=names
        )

    def load(self) -> None:
        base: type[Any] = self.base

        class WithoutTokenizer(base):
            def get_tokenizer(self, hf_token: str | None = None) -> None:
                return None

        airllm = WithoutTokenizer(
            self.job["model"],
            device="cpu",
            layer_shards_saving_path=self.job["copy"],
            **self.options,
        )
        self.model = airllm.model


class OLLM(TorchSystem):
    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.inference = importlib.import_module("ollm.inference").Inference

    def load(self) -> None:
        sharded = (Path(self.job["model"]) / "model.safetensors.index.json").exists()
        holder = self.inference(
            "llama3-8B-chat" if sharded else "llama3-1B-chat", device="cpu", logging=False
        )
        holder.tokenizer = None  # synthetic checkpoints have none
        try:
            holder.load_model(self.job["model"])
        except (RuntimeError, AttributeError, TypeError, ImportError) as error:
            raise _unsupported("ollm", error) from error
        self.model = holder.model

    def step(self) -> list[int]:
        try:
            return super().step()
        except (RuntimeError, AttributeError, TypeError, NameError) as error:
            raise _unsupported("ollm", error) from error


def _unsupported(package: str, error: Exception) -> UnsupportedError:
    """The refusal of `package` in its own words, with the versions that it met."""
    found = ", ".join(f"{name} {version(name)}" for name in (package, "transformers"))
    return UnsupportedError(f"{found}, on a CPU: {type(error).__name__}: {error}")

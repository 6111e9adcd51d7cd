"""The systems that are compared, behind one interface, and the process that measures one of them.

Run as a script (`python -P systems.py`, the job as JSON on stdin) it is the measured process of a cell: it pins itself
to its cores, imports one system's libraries, loads the model, decodes greedily from a fixed prompt of token ids, and
appends one JSON line per event to a file, so that a run that is killed leaves what it had. It imports nothing of
flexinfer unless flexinfer is the system: its memory is the system's own.

How each system is driven:
- flexinfer: `flexinfer.from_pretrained` with the cell's budget; options are its keyword arguments. On a GGUF file it
  reads the same bytes as llama.cpp, and both multiply them by ggml.
- llama_cpp: the package llama-cpp-python, compiled at installation (4 minutes on two cores) for the CPU it runs on. Wheels made
  elsewhere hold no AVX-512: with one, a resident pass of Llama2-7B in Q4_0 took 0.70 s on a CPU that has it. Option use_extra_bufts=false stops
  repacking, as --no-repack does: repacked weights are a copy in memory, so where the model does not fit it is killed or hangs. The context is the workload's.
- transformers: `AutoModelForCausalLM.from_pretrained(dtype="auto")`, which maps the safetensors.
- accelerate: the same with device_map="auto" and a CPU allowance of what the budget leaves after process, KV cache,
  one decoder layer and the largest other matrix, which its hooks load to compute; option cpu_bytes overrides.
- airllm: AirLLM on a CPU, prefetching on. It splits the checkpoint into a copy beside it, which `prepare` makes before the
  clock starts. Synthetic checkpoints have no tokenizer, so the subclass here loads none.
- ollm: `Inference.load_model` on a CPU; what it lacks or refuses is its record.

When all is decoded, prefills are timed, if the workload has any: each length PREFILL_REPEATS times, every one from an empty
cache to the first token, with logits of the last position alone.

What it does not do: limit itself. The groups are the parent's (experiments.cell).
"""

import contextlib
import importlib
import inspect
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

INSTALL = "make baselines"
ALLOCATOR_BYTES = 64 << 20  # of accelerate's process beside weights and cache; our choice
REQUEST_BYTES = 4 << 20
WAYS_TO_READ = (  # readers, and bytes that each asks for at a time
    (1, REQUEST_BYTES),
    (2, REQUEST_BYTES),
    (4, REQUEST_BYTES),
    (4, 1 << 20),
)
PREFILL_REPEATS = 3
COUNTERS = {"expert_hits", "expert_misses", "experts_foretold", "experts_foretold_right", "wasted_bytes"}
SPIN_COUNT = "6000"  # as flexinfer.cli, which says why; not imported, for its memory would count


class UnsupportedError(RuntimeError):
    """A system that cannot run this model here, for a reason that installing nothing mends."""


class System(Protocol):
    """One system. Construction imports its libraries, `load` makes it ready to decode."""

    def load(self) -> None:
        """Open the model."""

    def start(self, prompt: list[int]) -> None:
        """Begin a new text with the prompt, or a batch of texts; the first `step` may do the work."""

    def step(self) -> list[int]:
        """Decode one token of each sequence greedily. Their ids."""

    def take(self, token: int) -> None:
        """Go on with `token` instead of the one that was decoded."""

    def counters(self) -> dict[str, int]:
        """What the system counts, so far."""

    def engine(self) -> dict[str, Any]:
        """What the system says of itself."""

    def close(self) -> None:
        """Let go of the model."""


class TorchSystem:
    """What the systems on top of transformers share: forward passes with a cache, and the argmax."""

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

        shifted = (prompt[i % len(prompt) :] + prompt[: i % len(prompt)] for i in range(self.job["batch"]))
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
        """What `flexinfer plan --batch` says, asked under the limits that the run has; the process is gone before it."""
        job = self.job
        context = f"--context={job['context']}"
        argv = ["plan", job["model"], f"--memory={job['budget_bytes']}", context, f"--batch={job['batch']}"]
        told = subprocess.run(
            [sys.executable, "-m", "flexinfer", *argv, "--json"], check=True, capture_output=True, text=True
        )
        self.predicted = {"batches": json.loads(told.stdout)["batches"]}

    def load(self) -> None:
        flexinfer = importlib.import_module("flexinfer")
        batch = self.job["batch"]
        told: dict[str, Any] = {"memory": self.job["budget_bytes"], "context": self.job["context"] * batch}
        if batch > 1:
            told["logits_to_keep"] = batch
        if self.job["trace"]:
            told["trace"] = True
        self.model = flexinfer.from_pretrained(self.job["model"], **(told | self.options))

    def counters(self) -> dict[str, int]:
        return {name: value for name, value in self.model.flexinfer.stats().items() if name in COUNTERS}

    def engine(self) -> dict[str, Any]:
        engine = self.model.flexinfer
        plan: dict[str, Any] = {
            name: value
            for name in dir(engine.plan)
            if not name.startswith("_") and isinstance(value := getattr(engine.plan, name), int | float | str)
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
                0, self.job["budget_bytes"] - resident_bytes() - self.job["kv_bytes"] - ALLOCATOR_BYTES
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
        self.utils.find_or_create_local_splitted_path(self.job["model"], self.job["copy"], layer_names=names)

    def load(self) -> None:
        base: type[Any] = self.base

        class WithoutTokenizer(base):
            def get_tokenizer(self, hf_token: str | None = None) -> None:
                return None

        airllm = WithoutTokenizer(
            self.job["model"], device="cpu", layer_shards_saving_path=self.job["copy"], **self.options
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


class LlamaCpp:
    """llama.cpp by its C interface, which the package binds as it is; weights stay in the mapped file unless it repacks them."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.api = importlib.import_module("llama_cpp")
        self.job = job
        self.next: list[int] = []

    def load(self) -> None:
        self.api.llama_backend_init()
        params = self.api.llama_model_default_params()
        params.load_mode = self.api.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = self.job["options"].get("use_extra_bufts", True)
        self.model = self.api.llama_model_load_from_file(self.job["model"].encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {self.job['model']}; its reason stands above")
        if self.job["options"].get("madvise_random"):
            madvise_random(self.job["model"])
        params = self.api.llama_context_default_params()
        params.n_ctx = max(256, self.job["context"])
        params.n_threads = params.n_threads_batch = self.job["cores"]
        self.context = self.api.llama_init_from_model(self.model, params)
        self.sampler = self.api.llama_sampler_init_greedy()

    def start(self, prompt: list[int]) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.next = prompt

    def step(self) -> list[int]:
        ids = (self.api.llama_token * len(self.next))(*self.next)
        failed = self.api.llama_decode(self.context, self.api.llama_batch_get_one(ids, len(ids)))
        if failed:
            raise RuntimeError(f"llama.cpp: llama_decode returns {failed}")
        token = int(self.api.llama_sampler_sample(self.sampler, self.context, -1))
        self.next = [token]
        return [token]

    def take(self, token: int) -> None:
        self.next = [token]

    def counters(self) -> dict[str, int]:
        return {}

    def engine(self) -> dict[str, Any]:
        return {"system_info": self.api.llama_print_system_info().decode()}

    def close(self) -> None:
        self.api.llama_sampler_free(self.sampler)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


SYSTEMS: dict[str, Callable[[dict[str, Any]], System]] = {
    "flexinfer": FlexInfer,
    "llama_cpp": LlamaCpp,
    "transformers": TorchSystem,
    "accelerate": Accelerate,
    "airllm": AirLLM,
    "ollm": OLLM,
}


def madvise_random(file: str) -> None:
    """Have the kernel read no more than the page that is missing of a mapped file, as llama.cpp asks for on machines of several NUMA nodes."""
    ctypes = importlib.import_module("ctypes")
    libc, mapped = ctypes.CDLL(None, use_errno=True), 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name == file:
            start, stop = (int(address, 16) for address in span.split("-"))
            size = ctypes.c_size_t(stop - start)
            if libc.madvise(ctypes.c_void_p(start), size, mmap.MADV_RANDOM):
                raise OSError(ctypes.get_errno(), f"{file}: madvise")
            mapped += 1
    if not mapped:
        raise RuntimeError(f"{file} is not mapped")


def resident_bytes() -> int:
    """Memory this process holds now, mapped libraries included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def bytes_read() -> int:
    """Bytes this process has had read from storage so far."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


def prompt_ids(tokens: int, vocab: int) -> list[int]:
    """The fixed prompt: ids spread over the vocabulary above its control tokens."""
    first = min(300, vocab // 2)
    return [first + number * 7919 % (vocab - first) for number in range(tokens)]


def measure(job: dict[str, Any], emit: Callable[..., None]) -> None:
    """Load one system and decode until the workload has enough; one event for each pass."""
    system = SYSTEMS[job["kind"]](job)
    if job["batch"] > 1 and not isinstance(system, TorchSystem):
        raise UnsupportedError("a batch is decoded by flexinfer and transformers alone")
    if job["predict"] and isinstance(system, FlexInfer):
        system.predict()
    emit("ready", process_bytes=resident_bytes())
    start_s = time.perf_counter()
    system.load()
    emit("loaded", load_s=time.perf_counter() - start_s)
    if job["texts"] or job["replayed"]:
        measure_texts(job, system, emit)
        return
    text = prompt_ids(job["prompt_tokens"] + job["tokens"], job["vocab"])
    system.start(text[: job["prompt_tokens"]])
    counted, counted_s, before = 0, 0.0, dict[str, int]()
    for number in range(job["tokens"]):
        before_bytes, start_s = bytes_read(), time.perf_counter()
        tokens = system.step()
        seconds = time.perf_counter() - start_s
        count = number > job["warmup_tokens"]  # the first step takes the prompt in
        told = {"id": tokens[0]} if len(tokens) == 1 else {"ids": tokens}
        emit("token", **told, s=seconds, bytes=bytes_read() - before_bytes, counted=count)
        if job["drawn"]:
            system.take(text[job["prompt_tokens"] + number])
        if not count:
            before = system.counters()
        counted, counted_s = counted + count, counted_s + seconds * count
        if counted and counted_s >= job["max_seconds"]:
            break
        if counted >= job["min_tokens"] and counted_s >= job["min_seconds"]:
            break
    emit("counted", told={name: value - before[name] for name, value in system.counters().items()})
    for tokens in job["prefill_tokens"]:
        for _ in range(PREFILL_REPEATS):
            system.start(prompt_ids(tokens, job["vocab"]))
            start_s = time.perf_counter()
            system.step()
            emit("prefill", tokens=tokens, s=time.perf_counter() - start_s)
    emit("engine", told=system.engine())
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    emit("done", bytes_read=bytes_read(), peak_bytes=peak_bytes)
    system.close()


def measure_texts(job: dict[str, Any], system: System, emit: Callable[..., None]) -> None:
    """Decode real or replayed text by `generate()`; what drafts give is in the engine's word, by kind of text."""
    if not isinstance(system, FlexInfer):
        raise UnsupportedError("texts are decoded by flexinfer alone")
    texts = importlib.import_module("experiments.texts")
    job["prompt_ids"] = prompt_ids(job["prompt_tokens"], job["vocab"])
    found = texts.decode(system.model, job, emit, bytes_read)
    emit("engine", told=system.engine() | {"texts": found})
    emit(
        "done", bytes_read=bytes_read(), peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    system.close()


def measure_bandwidth(
    files: list[str], seconds: float, threads: int = 2, request_bytes: int = REQUEST_BYTES
) -> float:
    """Bytes per second of direct reads of `request_bytes` by some threads, over `files` in turn; the first 0.3 s do not count."""
    blocks = [
        (file, at)
        for file in files
        for at in range(0, os.path.getsize(file) - request_bytes + 1, request_bytes)
    ]
    if not blocks:
        raise ValueError(
            f"files: {files} hold less than {request_bytes} bytes each: too small to measure a bandwidth"
        )
    lock, start_s = threading.Lock(), time.perf_counter()
    finished: list[tuple[float, int]] = []
    todo = iter(blocks * max(1, 1 + (64 << 30) // (len(blocks) * request_bytes)))

    def read() -> None:
        buffer = mmap.mmap(-1, request_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(
            AttributeError, OSError
        ):  # without huge pages ordinary ones do, at a third less
            buffer.madvise(mmap.MADV_HUGEPAGE)
        opened: dict[str, int] = {}
        try:
            while time.perf_counter() - start_s < seconds:
                with lock:
                    file, at = next(todo)
                if file not in opened:
                    opened[file] = _open_direct(file)
                got = os.preadv(opened[file], [buffer], at)
                with lock:
                    finished.append((time.perf_counter() - start_s, got))
        finally:
            for descriptor in opened.values():
                os.close(descriptor)

    workers = [threading.Thread(target=read) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    finished.sort()
    later = [(at_s, got) for at_s, got in finished if at_s >= 0.3]
    if len(later) < 2:
        later = finished
    first_s = max([at_s for at_s, _ in finished if at_s < 0.3] or [0.0]) if later is not finished else 0.0
    return sum(got for _, got in later) / (later[-1][0] - first_s)


def _open_direct(file: str) -> int:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        os.preadv(descriptor, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
        return descriptor
    except OSError:  # tmpfs and some overlays
        return os.open(file, os.O_RDONLY)


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it dies."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main() -> int:
    _die_with_parent()
    job = json.loads(sys.stdin.read())
    os.sched_setaffinity(0, job["core_set"])
    with open(job["events"], "a", buffering=1) as file:

        def emit(event: str, **fields: Any) -> None:
            file.write(json.dumps({"event": event, **fields}) + "\n")

        try:
            if job["kind"] == "bandwidth":
                rates = {
                    f"{threads} x {nbytes >> 20} MiB": measure_bandwidth(
                        job["files"], job["seconds"], threads, nbytes
                    )
                    for threads, nbytes in WAYS_TO_READ
                }
                emit("bandwidth", bytes_per_s=rates)
            elif job["kind"] == "split":
                AirLLM(job).split()
                emit("done", bytes_read=bytes_read())
            else:
                measure(job, emit)
        except ModuleNotFoundError as error:
            emit("failed", status="missing", message=f"{error.name} is not installed; {INSTALL} installs it")
        except UnsupportedError as error:
            emit("failed", status="unsupported", message=str(error))
        except Exception as error:
            emit("failed", status="error", message=f"{type(error).__name__}: {error}")
            raise
    return 0


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # libraries may hang in their own tear-down; everything measured is written

"""llama.cpp, on a mapped file or repacked."""

import importlib
import mmap
from pathlib import Path
from typing import Any


class LlamaCpp:
    """llama.cpp by its C interface, which the package binds as it is.

    Weights stay in the mapped file unless it repacks them.
    """

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
            raise RuntimeError(
                f"llama.cpp does not load {self.job['model']}; its reason stands above"
            )
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


def madvise_random(file: str) -> None:
    """Have the kernel read no more than the page that is missing of a mapped file, as llama.cpp
    asks for on machines of several NUMA nodes.
    """
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
